"""Flags of every command that encodes videos: which encoder, on what device, where embeddings are kept."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from features.encoder import Encoder
from features.networks import EncoderSpec, encoder_spec
from features.weights import State, read_weights
from utils.device import choose_device
from utils.flags import COUNT, accepted_by, setting
from utils.process import UserError, available_cores, say


@dataclass(frozen=True, kw_only=True)
class StoreSettings:
    """Where embeddings are kept."""

    cache_path: Path | None = setting(
        None, "folder of the embeddings; default: <dataset_path>-embeddings; a local SSD is best", Path
    )
    frame_stride: int | None = setting(
        None,
        "encode every N-th frame; default: the checkpoint's, or what suits the encoder at 25 frames/s; 2 "
        "halves time and disk",
        COUNT,
    )


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """What encodes frames."""

    encoder: str = setting(
        "resnet152",
        "network, default {default}; i3d is recommended, resnet152 the original's; also "
        "efficientnet_lite0, resnet18 to 101, torchvision's for video, timm/<name>, hf/<name or folder>",
        accepted_by(encoder_spec),
    )
    encoder_weights: Path | None = setting(
        None, "file of other weights for it, .safetensors or .pth; default: the released ones", Path
    )
    img_dim: int | None = setting(
        None,
        "height and width of frames in pixels; default: what the encoder was trained at, which is best; 112 "
        "is 4 times as fast",
        COUNT,
    )
    no_flip: bool = setting(
        False, "do not mirror training clips; for classes that differ in left and right; halves the encoding"
    )
    flip: bool = setting(False, "mirror training clips with a video encoder too; doubles the encoding")

    def mirrors(self, spec: EncoderSpec) -> bool:
        """Whether training clips are mirrored. Raises: UserError if both flags are set."""
        if self.flip and self.no_flip:
            raise UserError("--flip and --no_flip exclude each other; leave one out")
        return (spec.flip or self.flip) and not self.no_flip


@dataclass(frozen=True, kw_only=True)
class DeviceSettings:
    """Where and how to compute."""

    device: str = setting("auto", "cpu, cuda, ...; auto (default) takes the accelerator where there is one")
    precision: str = setting(
        "auto",
        "of the encoder; auto (default): int8 on a CPU where OpenVINO is installed and nothing is lost, else "
        "bf16 where the hardware has it",
        choices=("auto", "fp32", "bf16", "int8"),
    )
    num_workers: int = setting(
        # Processes of torchrun on one machine share its cores.
        max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))),
        "videos that are encoded at a time; default: one per core; lower it if memory is short",
        # The original's 0 meant no worker processes.
        lambda text: max(1, int(text)),
    )


def read_state(encoder: str, path: Path | None) -> State | None:
    """Weights for an encoder out of a file, whose SHA-256 is printed; None without a file.

    Raises: MissingFileError if there is no such file, WeightsError if it holds no tensors.
    """
    if path is None:
        return None
    state, digest = read_weights(path)
    say(f"weights of {encoder}: {path}, SHA-256 {digest}")
    return state


def open_encoder(seen: EncoderSettings, computed: DeviceSettings) -> Encoder:
    """The encoder that flags ask for, on its device and prepared. Raises: as `Encoder` and its `prepare`."""
    encoder = Encoder(
        seen.encoder, state=read_state(seen.encoder, seen.encoder_weights), img_dim=seen.img_dim
    )
    return encoder.to(choose_device(computed.device)).prepare(computed.precision)
