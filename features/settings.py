"""Flags of every command that encodes videos: which encoder, what it sees, where embeddings are kept.

Like all modules of settings it does not load PyTorch, which takes seconds: flags are read first.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from features.encoder import check_size
from features.networks import EncoderSpec, encoder_spec
from features.streams import parse_streams
from features.weights import State, read_weights
from splits.datasets import DataSettings
from splits.split import Shard
from utils.flags import COUNT, NATURAL, accepted_by, add_flags, checked, setting
from utils.process import UserError, available_cores, say

ENCODERS_WORDS = (
    "resnet18 to resnet101, timm/<name> for any network of timm, and for videos i3d, r3d_18, mc3_18, "
    "r2plus1d_18, s3d, mvit_v1_b, mvit_v2_s, swin3d_t, swin3d_s, swin3d_b, and hf/<name or folder> for a "
    "V-JEPA 2, VideoMAE, TimeSformer or ViViT of Hugging Face"
)


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
        """The weights of --encoder_weights, as `given_weights`.

        Raises: as that and, before weights are sought, as `check_size`.
        """
        if self.img_dim:
            check_size(self.encoder, encoder_spec(self.encoder), self.img_dim)
        return given_weights(self.encoder, self.encoder_weights)


@dataclass(frozen=True, kw_only=True)
class DeviceSettings:
    """Where and how to compute."""

    device: str = setting("auto", "cpu, cuda, ...; auto (default) takes the accelerator where there is one")
    precision: str = setting(
        "auto",
        "of the frozen encoder; auto (default, recommended) is bf16 where the hardware has it, 2 to 5 times "
        "as fast as fp32, and int8 where --engine says so",
        choices=("auto", "fp32", "bf16", "int8"),
    )
    engine: str = setting(
        "auto",
        "what computes the frozen encoder on a CPU; auto (default, recommended) is OpenVINO in int8 where it "
        "is installed (requirements-openvino.txt), in training with encoders that are known to lose nothing "
        "by it (i3d, nearly twice as fast then) and for checkpoints of such a training; else torch",
        choices=("auto", "torch", "openvino"),
    )
    compile: bool = setting(
        False,
        "compile the encoder: some 20 %% faster after a minute or two, pays for more than 10,000 frames",
    )
    num_workers: int = setting(
        # On a machine that torchrun shares out, each process gets its part.
        max(1, min(8, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))),
        "threads or processes that decode video; one per core (default) keeps the encoder fed",
        NATURAL,
    )


def given_weights(encoder: str, path: Path | None) -> State | None:
    """Weights for an encoder out of a file, whose SHA-256 is printed; None without a file.

    Raises: MissingFileError if there is no such file, WeightsError if it holds no tensors.
    """
    if path is None:
        return None

    state, digest = read_weights(path)
    say(f"weights of {encoder}: {path}, SHA-256 {digest}")
    return state


def get_args_parser() -> argparse.ArgumentParser:
    """The flags of features.py."""
    parser = argparse.ArgumentParser(description="Fill the embedding cache of a data set ahead of training.")
    for settings in (DataSettings, CacheSettings, EncoderSettings, DeviceSettings):
        add_flags(parser, settings)
    parser.add_argument(
        "--shard",
        type=checked(Shard.parse),
        help="fill part i/n only, such as 1/8 on the first of 8 machines; copy the files of all parts into "
        "one folder, or let all machines write to a shared one",
    )
    return parser
