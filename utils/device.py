"""Where a command computes, in what precision, and with which random numbers."""

from __future__ import annotations

import os
import random
import warnings
from pathlib import Path
from typing import Any

# cuBLAS gives the same sums twice only with a fixed workspace; it reads this when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import torch

from utils.process import UserError, say


def choose_device(name: str) -> torch.device:
    """The device that --device names; of several of a kind, each process of torchrun gets its own.

    Raises: UserError if PyTorch has no such device here.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    here = ["cpu"] + ([accelerator.type] if accelerator else [])
    try:
        device = (accelerator or torch.device("cpu")) if name == "auto" else torch.device(name)
        there = device.type in here and (device.index or 0) < max(1, torch.accelerator.device_count())
    except RuntimeError:
        there = False
    if not there:
        raise UserError(f"device {name!r} is not available; choose one of auto, {', '.join(here)}")
    if device.type != "cpu" and "LOCAL_RANK" in os.environ:
        device = torch.device(device.type, int(os.environ["LOCAL_RANK"]))
        torch.accelerator.set_device_index(device)
    return device


def has_bf16(cpuinfo: str) -> bool:
    """Whether a CPU has instructions for bfloat16, by the text of /proc/cpuinfo.

    Without them PyTorch emulates it, which is slower than float32 (oneDNN does so on any AVX-512).
    """
    lines = [line for line in cpuinfo.splitlines() if line.startswith(("flags", "Features"))]
    return any(not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(line.split()) for line in lines[:1])


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What the frozen encoder computes in: bfloat16 if asked for, or if not and the hardware has it."""
    fast = precision == "bf16"
    if precision in ("auto", "int8") and device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif precision in ("auto", "int8"):
        info = Path("/proc/cpuinfo")
        fast = device.type == "cpu" and info.exists() and has_bf16(info.read_text())
    return torch.bfloat16 if fast else torch.float32


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's random numbers, and ask for deterministic kernels.

    Where PyTorch has none, one line says so.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    # As torch.use_deterministic_algorithms, which loads the compiler, a second or more, to tell it too.
    torch.set_deterministic_debug_mode("warn")
    # Nothing here reads memory before it is written; filling it first costs a pass over every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    show, told = warnings.showwarning, False
    if getattr(show, "of_seeds", False):
        return

    def showwarning(message: Warning | str, *rest: Any, **more: Any) -> None:
        nonlocal told
        if "does not have a deterministic implementation" not in str(message):
            show(message, *rest, **more)
        elif not told:
            told = True
            say(
                f"warning: {str(message).split(' ')[0]} gives other roundings each time on this device: the "
                "same command twice, or --resume, ends with nearly the same weights, not bit for bit"
            )

    showwarning.of_seeds = True  # type: ignore[attr-defined]
    warnings.showwarning = showwarning
