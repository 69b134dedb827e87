"""Which frames of a video go through an encoder together, and which frames each embedding stands for.

An image encoder takes a frame at a time. A video encoder takes a window of frames and gives an embedding for
every few of them, its hop.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Windows:
    """How an encoder moves along a video: embedding k stands for frames [hop k, hop (k + 1)).

    Windows follow each other without overlap. The last one ends with the video and is shorter, but it has
    whole hops and at least `least` frames: it may begin inside the window before, whose embeddings are not
    computed twice but skipped. A video that is shorter than that repeats its last frame.

    Attributes:
        frames: frames of a window
        hop: frames of an embedding; divides `frames` and `least`
        least: frames of the shortest window
    """

    frames: int = 1
    hop: int = 1
    least: int = 1

    def count(self, num_frames: int) -> int:
        """Number of embeddings of a video."""
        return -(-num_frames // self.hop)

    def window(self, start: int, num_frames: int) -> tuple[np.ndarray, slice]:
        """The window whose first new embedding stands for the frames from `start` on.

        Returns: its frame numbers, ascending, and which of its embeddings are new.
        """
        left = num_frames - start
        length = min(self.frames, max(self.least, self.hop * self.count(left)))
        first = min(start, max(0, num_frames - length))
        new = self.count(min(left, self.frames))
        skip = 0 if first == start else length // self.hop - new
        return np.arange(first, first + length).clip(max=num_frames - 1), slice(skip, skip + new)


def nearest_stride(fps: float | Fraction, wanted: float) -> int:
    """The stride that brings a video of `fps` frames/s nearest to `wanted` frames/s."""
    return max(1, round(fps / wanted))


class Cutter:
    """Cuts windows out of frames that come in chunks; holds about a batch of windows, however long the video.

    Args:
        layout: of the windows
        batch: windows to give at a time
    """

    def __init__(self, layout: Windows, batch: int) -> None:
        self._layout, self._batch = layout, batch
        self._held = np.empty(0, np.uint8)
        # Frame numbers: the first one held, the first one of the next window, and the number read.
        self._first = self._start = self._read = 0

    def add(self, frames: np.ndarray) -> Iterator[tuple[Tensor, slice]]:
        """Full batches of windows (N, L, 3, H, W), all new; `frames` are (n, H, W, 3) uint8."""
        self._held = np.concatenate([self._held, frames]) if len(self._held) else frames
        self._read += len(frames)
        while self._read - self._start >= self._batch * self._layout.frames:
            yield self._complete(self._batch)

    def end(self) -> Iterator[tuple[Tensor, slice]]:
        """The windows that are left, and which of the embeddings of each are new."""
        if complete := (self._read - self._start) // self._layout.frames:
            yield self._complete(complete)
        if self._read > self._start:
            numbers, new = self._layout.window(self._start, self._read)
            yield _as_tensor(self._held[numbers - self._first][None]), new

    def _complete(self, number: int) -> tuple[Tensor, slice]:
        begin, length = self._start - self._first, self._layout.frames
        windows = self._held[begin : begin + number * length]
        self._start += number * length
        # The last window may reach back by so much.
        drop = max(0, self._start - self._layout.least + 1 - self._first)
        self._held, self._first = self._held[drop:], self._first + drop
        return _as_tensor(windows.reshape(number, length, *windows.shape[1:])), slice(None)


def _as_tensor(windows: np.ndarray) -> Tensor:
    return torch.from_numpy(windows).permute(0, 1, 4, 2, 3)
