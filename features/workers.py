"""Threads that compute side by side on a CPU, each on a core of its own.

A computation on all cores waits for the slowest of them at every layer, and all of it for the one that
decodes or writes a video meanwhile. Several computations on a core each do not wait for each other: two are
as fast as one on 2 cores, or up to 9 % faster, and what else is to be done takes no more than its own time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import torch

# Each computation has activations of its own, 0.4 GB with i3d.
MOST = 8

T = TypeVar("T")
_setting = threading.Lock()
_here = threading.local()


def stay_on(cores: int) -> None:
    """Have what PyTorch computes in this thread use so many cores; other threads keep theirs."""
    with _setting:
        before = _all_cores()
        _here.others = before
        torch.set_num_threads(cores)
        # It is also what threads begin with that come later.
        again = threading.Thread(target=torch.set_num_threads, args=(before,))
        again.start()
        again.join()


def count_workers() -> int:
    """Computations that `in_worker` runs side by side, on the cores that PyTorch may use."""
    return min(MOST, _all_cores())


def _all_cores() -> int:
    """Those of the threads that have not been told to stay on some."""
    return _here.__dict__.get("others") or torch.get_num_threads()


def is_worker() -> bool:
    """Whether this thread is one of those."""
    return "worker" in _here.__dict__


def in_worker(function: Callable[..., T], *args: Any) -> Future[T]:
    """Call `function` in one of the threads; what it returns or raises is in the answer."""
    with _setting:
        pool = _pool(_all_cores())
    return pool.submit(function, *args)


@cache
def _pool(cores: int) -> ThreadPoolExecutor:
    count = min(MOST, cores)

    def begin() -> None:
        _here.worker = True
        stay_on(cores // count)

    return ThreadPoolExecutor(count, "encoder", begin)
