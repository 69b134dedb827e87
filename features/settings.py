"""Flags of every command that encodes videos: which encoder, what it sees, where embeddings are kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from features.networks import ENCODERS_WORDS, EncoderSpec, encoder_spec
from features.streams import parse_streams
from features.weights import State, read_weights
from utils.flags import COUNT, accepted_by, setting
from utils.process import UserError, say


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """Where embeddings are kept."""

    cache: str = setting(
        "disk",
        "disk (default) encodes each video once and trains from there; off encodes in every epoch anew",
        choices=("disk", "off"),
    )
    cache_path: Path | None = setting(
        None, "folder of the embeddings; default: <dataset_path>-embeddings; a local SSD is best", Path
    )
    frame_stride: int | None = setting(
        None,
        "use every N-th frame only; default (recommended): the checkpoint's, or what brings UCF-101's 25 "
        "frames/s nearest to what the encoder was trained at: 1 for i3d and for photographs; 2 halves time "
        "and disk of the cache",
        COUNT,
    )


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """What becomes of a frame."""

    encoder: str = setting(
        "resnet152",
        "frozen network: resnet152 (default) is the original's, i3d sees motion, works offline and is the "
        "most accurate (recommended), efficientnet_lite0 is the fastest; also " + ENCODERS_WORDS,
        accepted_by(encoder_spec),
    )
    encoder_weights: Path | None = setting(
        None,
        "file with other weights for it, .safetensors or .pth, with the tensor names of its library; default "
        "(recommended): those that it was released with",
        Path,
    )
    streams: str = setting(
        "rgb",
        "what heads read, joined at the end: rgb (default), where the encoder sees single frames also diff "
        "(what changed since the frame before), and the names of further encoders, at their own frame size: "
        "rgb,diff or rgb,efficientnet_lite0; each is another cache",
        accepted_by(parse_streams),
    )
    img_dim: int | None = setting(
        None,
        "height and width of the frames in pixels; default: what the encoder was trained at, 224 for most, "
        "which is the most accurate; 112 is 4 times as fast. UCF-101 in an hour on a laptop (recommended "
        "there): --encoder i3d --model MeanPool --img_dim 160 --frame_stride 2, with OpenVINO",
        COUNT,
    )
    no_flip: bool = setting(
        False,
        "do not mirror training clips; for classes that differ in left and right, not for UCF-101; halves "
        "the cache; default for encoders of videos, where mirrored clips are not worth their time",
    )
    flip: bool = setting(
        False, "mirror training clips with an encoder of videos too; doubles time and disk of the cache"
    )

    def mirrors(self, spec: EncoderSpec) -> bool:
        """Whether training clips are mirrored, by the flags or as is best for the encoder.

        Raises: UserError if both flags are given.
        """
        if self.flip and self.no_flip:
            raise UserError("--flip and --no_flip exclude each other; leave one out")
        return (spec.flip or self.flip) and not self.no_flip

    def state(self) -> State | None:
        """The weights of --encoder_weights, as `given_weights`."""
        return given_weights(self.encoder, self.encoder_weights)


def given_weights(encoder: str, path: Path | None) -> State | None:
    """Weights for an encoder out of a file, whose SHA-256 is printed; None without a file.

    Raises: MissingFileError if there is no such file, WeightsError if it holds no tensors.
    """
    if path is None:
        return None
    state, digest = read_weights(path)
    say(f"weights of {encoder}: {path}, SHA-256 {digest}")
    return state
