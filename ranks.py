"""Processes that train together, started by torchrun; PyTorch's own engine does the work."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process and the others.

    Attributes:
        rank: this one's number; 0 alone prints and writes
        size: how many there are
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def from_environment(cls, device: torch.device) -> Self:
        """The processes that torchrun started, joined; one of one if it did not."""
        if "WORLD_SIZE" not in os.environ:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums of some numbers over all processes, in all of them."""
        if self.size == 1:
            return list(values)
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        sums = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        return cast(list[float], sums.tolist())

    def gather(self, value: T) -> list[T]:
        """What each process has, by rank, in all of them; anything that can be pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process."""
        return self.sum([flag])[0] > 0

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.size > 1:
            dist.barrier()

    def parallel(self, model: nn.Module, forward: Callable[..., Any], *, uses_all: bool = True) -> nn.Module:
        """A module that calls `forward`, a part of `model`; its gradients are averaged over the processes.

        Without `uses_all` there may be trained parameters that `forward` has no use for.

        The BatchNorms of `model` that are trained become such that see the clips of all processes.
        """
        calls = _Calls(model, forward)
        if self.size == 1:
            return calls
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.BatchNorm1d):
                model.set_submodule(name, SharedBatchNorm.of(module))
        device = next(model.parameters()).device
        # Running statistics are the same everywhere: each process computes them of all clips.
        return DistributedDataParallel(
            calls,
            [device] if device.type == "cuda" else None,
            broadcast_buffers=False,
            find_unused_parameters=not uses_all,
        )

    def close(self) -> None:
        """Part from the others."""
        if self.size > 1:
            dist.destroy_process_group()
            # Gloo's threads let go of the tensors of the last sum a moment after it. One that does so while
            # Python ends aborts the process.
            time.sleep(0.2)


ALONE = Ranks()


class _Calls(nn.Module):
    def __init__(self, model: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self._forward = model, forward

    def forward(self, *inputs: Tensor) -> Any:
        return self._forward(*inputs)


class SharedBatchNorm(nn.BatchNorm1d):
    """BatchNorm1d over the rows of all processes; torch.nn.SyncBatchNorm does the same on CUDA only."""

    @classmethod
    def of(cls, norm: nn.BatchNorm1d) -> Self:
        """One with the very parameters and statistics of `norm`."""
        shared = cls(norm.num_features, norm.eps, norm.momentum, norm.affine)
        shared._parameters, shared._buffers = norm._parameters, norm._buffers
        return shared.train(norm.training)

    def forward(self, rows: Tensor) -> Tensor:
        """(N, C) -> (N, C); N may differ between processes."""
        if not self.training:
            return super().forward(rows)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        group = dist.distributed_c10d._get_default_group()
        count = all_reduce(torch.tensor(float(len(rows)), device=rows.device), "sum", group)
        mean = all_reduce(rows.sum(0), "sum", group) / count
        centred = rows - mean
        variance = all_reduce(centred.square().sum(0), "sum", group) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked += 1
        rows = centred * (variance + self.eps).rsqrt()
        return rows * self.weight + self.bias if self.affine else rows
