"""Processes that train together, started by torchrun; PyTorch's own engine does the work."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")
# How long a process waits for the others: filling a cache takes hours, and not as long on each.
PATIENCE = timedelta(days=7)


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
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
        return cls(dist.get_rank(), dist.get_world_size())

    def sum(self, values: Tensor) -> Tensor:
        """The sums of some numbers over all processes, in all of them; `values` is changed in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: T) -> list[T]:
        """What each process has, by rank, in all of them; anything that can be pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def gather_rows(self, rows: Tensor) -> tuple[Tensor, int]:
        """Rows (N, D) of all processes by rank, N of each its own, and where those of this one begin.

        No gradient goes through them.
        """
        if self.size == 1:
            return rows.detach(), 0
        sizes = torch.zeros(self.size, dtype=torch.int64, device=rows.device)
        sizes[self.rank] = len(rows)
        counts = self.sum(sizes).tolist()
        padded = rows.new_zeros(max(counts), rows.shape[1])
        padded[: len(rows)] = rows.detach()
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        joined = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
        return joined, sum(counts[: self.rank])

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.size > 1:
            dist.barrier()

    def parallel(
        self, trained: nn.Module, forward: Callable[..., Any], *, uses_all: bool = True
    ) -> nn.Module:
        """A module that calls `forward`; the gradients of `trained` are averaged over the processes.

        The BatchNorms in `trained` become such that see the rows of all processes. Without `uses_all` there
        may be parameters that `forward` has no use for.
        """
        calls = _Calls(trained, forward)
        if self.size == 1:
            return calls
        for name, module in list(trained.named_modules()):
            if isinstance(module, nn.BatchNorm1d):
                trained.set_submodule(name, SharedBatchNorm.wrap(module))
        device = next(trained.parameters()).device
        # Running statistics are the same everywhere: each process computes them of all clips. The option has
        # another name from PyTorch 2.14 on.
        new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        options: dict[str, Any] = {"forward_sync_buffers" if new else "broadcast_buffers": False}
        devices = [device] if device.type == "cuda" else None
        return DistributedDataParallel(calls, devices, find_unused_parameters=not uses_all, **options)

    def close(self) -> None:
        """Part from the others."""
        if self.size > 1:
            dist.destroy_process_group()
            # Gloo's threads let go of the tensors of the last sum a moment after it. One that does so while
            # Python ends aborts the process.
            time.sleep(0.2)


ALONE = Ranks()


class _Calls(nn.Module):
    def __init__(self, trained: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.trained, self._forward = trained, forward

    def forward(self, *inputs: Tensor) -> Any:
        return self._forward(*inputs)


class _Sum(torch.autograd.Function):
    """The sum of a tensor over all processes; its gradient is the sum of theirs.

    PyTorch has one under torch.distributed.nn, which is on its way out, and one behind a private import,
    which has gradients from 2.11 on only.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def _sum(tensor: Tensor) -> Tensor:
    total = _Sum.apply(tensor)
    assert isinstance(total, Tensor)
    return total


class SharedBatchNorm(nn.BatchNorm1d):
    """BatchNorm1d over the rows of all processes; torch.nn.SyncBatchNorm does the same on CUDA only."""

    @classmethod
    def wrap(cls, norm: nn.BatchNorm1d) -> Self:
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
        count = _sum(torch.tensor(float(len(rows)), device=rows.device))
        mean = _sum(rows.sum(0)) / count
        centred = rows - mean
        variance = _sum(centred.square().sum(0)) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked += 1
        rows = centred * (variance + self.eps).rsqrt()
        return rows * self.weight + self.bias if self.affine else rows
