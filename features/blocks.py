"""What of a network is trained further: its blocks, in their order, whatever library it comes from."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor, nn

from features.folding import BATCHNORMS

# A ResNet's stem and stages, and what share of the parameters the largest of them may have.
STAGES, LARGEST = 5, 0.8


def used_parameters(network: nn.Module, result: Tensor) -> list[nn.Parameter]:
    """Parameters that a result of a network depends on, in the order of its layers, but for BatchNorms."""
    # The gradient's graph has what it takes to compute one, and costs nothing to walk.
    leaves, seen, ahead = set[int](), set[Any](), [result.grad_fn]
    while ahead:
        step = ahead.pop()
        if step is None or step in seen:
            continue
        seen.add(step)
        if (leaf := getattr(step, "variable", None)) is not None:
            leaves.add(id(leaf))
        ahead += [each for each, _ in step.next_functions]
    norms = [part for part in network.modules() if isinstance(part, BATCHNORMS)]
    leaves -= {id(parameter) for norm in norms for parameter in norm.parameters()}
    return [parameter for parameter in network.parameters() if id(parameter) in leaves]


def blocks_of(network: nn.Module, used: list[nn.Parameter]) -> list[nn.Module]:
    """The blocks of a network, or its stages.

    Of the modules that lie one in another, each with more than half of the parameters, the outermost has them
    that has five children or more, none of which is nearly all; without such, the largest list of modules.
    """
    known = {id(parameter) for parameter in used}

    def size(part: nn.Module) -> int:
        return sum(parameter.numel() for parameter in part.parameters() if id(parameter) in known)

    def children(part: nn.Module) -> list[nn.Module]:
        return [child for child in part.children() if size(child)]

    whole, inner = size(network), [network]
    while inner:
        stages = children(inner[0])
        if len(stages) >= STAGES and max(map(size, stages)) < LARGEST * whole:
            return stages
        inner = [child for child in stages if size(child) > whole / 2]
    lists = [part for part in network.modules() if isinstance(part, nn.ModuleList | nn.Sequential)]
    lists = [part for part in lists if len(children(part)) > 1]
    return children(max(lists, key=size)) if lists else [network]


def depths_of(used: list[nn.Parameter], blocks: list[nn.Module]) -> list[tuple[nn.Parameter, int]]:
    """How deep each parameter lies: 0 before all blocks, n in the n-th of N, N + 1 behind the last."""
    within = {id(each): depth for depth, block in enumerate(blocks, 1) for each in block.parameters()}
    last = max(place for place, parameter in enumerate(used) if id(parameter) in within)
    behind = len(blocks) + 1
    return [(each, within.get(id(each), behind if at > last else 0)) for at, each in enumerate(used)]


def keep_activations(network: Any, keep: bool) -> None:
    """Whether a network keeps all activations for the gradient, or computes them again; where it offers that.

    Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016.
    """
    inner = getattr(network, "network", network)
    if hasattr(inner, "set_grad_checkpointing"):  # timm
        # Some have the function and assert in it that nobody asks.
        with contextlib.suppress(AssertionError):
            inner.set_grad_checkpointing(not keep)
    elif getattr(inner, "supports_gradient_checkpointing", False):  # transformers
        inner.activation_checkpointing_disable() if keep else inner.activation_checkpointing_enable()
