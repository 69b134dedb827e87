"""A frozen network and the C library, changed so that the same answers come faster."""

from __future__ import annotations

import ctypes
import sys
from collections import Counter

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
BATCHNORMS = (nn.modules.batchnorm._BatchNorm,)


class _LayerTracer(fx.Tracer):
    """Sees a network as a graph of convolutions and BatchNorms, timm's own kinds included."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        layers = isinstance(m, CONVOLUTIONS + BATCHNORMS)
        return layers or super().is_leaf_module(m, module_qualified_name)


def fold_batchnorm(network: nn.Module) -> nn.Module:
    """Fold each BatchNorm that follows a convolution into its weights, in place; returns the network.

    In eval mode BatchNorm is a constant scale and shift per channel, so the answers stay the same but for
    rounding (Jacob et al., CVPR 2018, section 3.2), and a pass over the activations is saved.
    """
    layers = dict(network.named_modules())
    if not any(isinstance(layer, BATCHNORMS) for layer in layers.values()):
        return network
    try:
        graph = _LayerTracer().trace(network)
    # A network whose way depends on its input has no such graph. It works as it is, only slower.
    except Exception:
        return network
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(layers[node.target], BATCHNORMS):
            continue
        source, norm = node.args[0], layers[node.target]
        # A layer that is called twice would be folded with the one, and used with the other.
        if (
            source.op == "call_module"
            and isinstance(layers[source.target], CONVOLUTIONS)
            and len(source.users) == 1
            and calls[source.target] == calls[node.target] == 1
        ):
            network.set_submodule(source.target, fuse_conv_bn_eval(layers[source.target], norm))
            # Timm's BatchNormAct2d holds the activation too.
            network.set_submodule(node.target, getattr(norm, "act", nn.Identity()))
    return network


def channels_last(network: nn.Module) -> nn.Module:
    """Lay the kernels out so that convolutions read them fastest, in place; returns the network."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for tensor in network.parameters():
        if tensor.ndim in formats:
            tensor.data = tensor.data.contiguous(memory_format=formats[tensor.ndim])
    return network


class Normalized(nn.Module):
    """A frozen network that takes frames as they are decoded: windows uint8 -> embeddings (N, K, D).

    Args:
        network: float32, on the CPU
        mean, scale: of the three channels, for values in [0, 255]
        video: it sees all frames of a window at once
        by_pixel: windows are (N, L, H, W, 3), as decoders write them, not (N, L, 3, H, W)
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self, network: nn.Module, mean: Tensor, scale: Tensor, *, video: bool, by_pixel: bool
    ) -> None:
        super().__init__()
        self.network, self.video, self.by_pixel = network, video, by_pixel
        shape = (3,) if by_pixel else (3, 1, 1)
        self.register_buffer("mean", mean.view(shape))
        self.register_buffer("scale", scale.view(shape))

    def forward(self, windows: Tensor) -> Tensor:
        """Embeddings of windows."""
        values = (windows.float() - self.mean) * self.scale
        if self.by_pixel:
            values = values.permute(0, 1, 4, 2, 3)
        if self.video:
            return self.network(values.transpose(1, 2))
        return self.network(values[:, 0])[:, None]


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next tensor instead of giving it back to the system.

    A network's activations are freed and asked for again layer by layer. What went back to the system
    comes again as zeroed pages, thousands of page faults in each pass: EfficientNet-Lite0 took 40 ms for 32
    frames with them and 24 ms without. Each arena keeps its own, so threads share two of them: the web page
    grew from 0.9 to 1.3 GB in the course of 160 videos before. Only glibc has these settings (mallopt(3));
    elsewhere nothing is done.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold, arena_max = -1, -3, -8
        libc.mallopt(mmap_threshold, 2**30)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(arena_max, 2)
