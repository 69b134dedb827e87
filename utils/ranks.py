"""Processes that work together, started by torchrun; PyTorch's own DistributedDataParallel does the work."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")
# How long a process waits for the others: encoding takes hours, and not as long on each.
PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Ranks:
    """This process and the others.

    Attributes:
        rank: number of this one; 0 alone prints and writes
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

    def gather(self, value: T) -> list[T]:
        """What each process has, by rank, in all of them; anything that can be pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def sum(self, values: Tensor) -> Tensor:
        """Sums over all processes, in all of them; `values` is changed in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.size > 1:
            dist.barrier()

    @contextlib.contextmanager
    def common_folder(self, path: Path) -> Iterator[Path]:
        """An empty folder of all processes, which is removed afterwards."""
        if self.rank == 0:
            shutil.rmtree(path, ignore_errors=True)
        self.wait()
        try:
            yield path
            self.wait()
        finally:
            if self.rank == 0:
                shutil.rmtree(path, ignore_errors=True)

    def parallel(self, module: nn.Module, device: torch.device) -> nn.Module:
        """The module, its gradients averaged over all processes; on CUDA a head's BatchNorm sees all."""
        if self.size == 1:
            return module
        # Those of an encoder stay as they are.
        norms = [name for name, part in module.named_modules() if isinstance(part, nn.BatchNorm1d)]
        for name in norms if device.type == "cuda" else ():
            norm = nn.SyncBatchNorm.convert_sync_batchnorm(module.get_submodule(name))
            module.set_submodule(name, norm)
        return DistributedDataParallel(module, [device] if device.type == "cuda" else None)

    def close(self) -> None:
        """Part from the others."""
        if self.size > 1:
            dist.destroy_process_group()
            # Gloo's threads let go of the last tensors a moment later, which aborts a process that ends.
            time.sleep(0.2)


ALONE = Ranks()
