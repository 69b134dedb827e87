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
    except RuntimeError:
        device = None
    if (
        device is None
        or device.type not in here
        or (device.index or 0) >= max(1, torch.accelerator.device_count())
    ):
        raise UserError(f"device {name!r} is not available; choose one of auto, {', '.join(here)}")
    if device.type != "cpu" and "LOCAL_RANK" in os.environ:
        device = torch.device(device.type, int(os.environ["LOCAL_RANK"]))
        torch.accelerator.set_device_index(device)
    return device


def has_bf16(cpuinfo: str) -> bool:
    """Whether a CPU has instructions for bfloat16, by the text of /proc/cpuinfo.

    Without them PyTorch emulates it, which is slower than float32 (oneDNN does so on any AVX-512).
    """
    for line in cpuinfo.splitlines():
        name, _, words = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(words.split())
    return False


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What the frozen encoder computes in: bfloat16 if asked for, or if not and the hardware has it."""
    if precision in ("auto", "int8"):
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            info = Path("/proc/cpuinfo")
            fast = device.type == "cpu" and info.exists() and has_bf16(info.read_text())
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


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
    _say_what_is_not_deterministic()


def _say_what_is_not_deterministic() -> None:
    """Turn PyTorch's warnings about kernels without a deterministic form into one line of our own."""
    show, told = warnings.showwarning, False

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

    if not getattr(show, "of_seeds", False):
        showwarning.of_seeds = True  # type: ignore[attr-defined]
        warnings.showwarning = showwarning
