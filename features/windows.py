"""Which frames of a video an encoder sees at once, and which frames each of its embeddings stands for.

A network for photographs sees a frame at a time. One for videos sees a window of some frames and gives an
embedding for every few of them. One for changes sees each frame together with the one before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """Frames that go through an encoder together.

    Attributes:
        frames: their numbers, ascending; the first or the last may be repeated
        skip: embeddings at its front that the window before gives too
        count: embeddings behind those that are kept
    """

    frames: np.ndarray
    skip: int
    count: int


@dataclass(frozen=True)
class Cut:
    """Windows of a video with as many frames each.

    Attributes:
        windows: (N, L, H, W, 3) uint8
        skip, count: as in `Window`, of each of them
    """

    windows: np.ndarray
    skip: int
    count: int

    def tensor(self) -> Tensor:
        """The windows as an encoder takes them, (N, L, 3, H, W)."""
        return torch.from_numpy(self.windows).permute(0, 1, 4, 2, 3)


@dataclass(frozen=True)
class Windows:
    """How an encoder goes along a video: embedding k stands for frames [hop k, hop (k + 1)).

    Windows of `frames` frames follow each other. The last one ends with the video and has as many frames as
    are left, rounded up to whole hops and no fewer than `least`: it reaches back over frames that were seen.
    A video that is shorter repeats its last frame. With `context`, each window sees some frames before its
    own too; the first frame of a video stands in for those before it.

    Attributes:
        frames: of a window, its context not counted
        hop: frames to an embedding; divides `frames` and `least`
        least: frames of the shortest window
        context: frames before a window that are seen with it
    """

    frames: int = 1
    hop: int = 1
    least: int = 1
    context: int = 0

    def count(self, num_frames: int) -> int:
        """Embeddings of a video."""
        return -(-num_frames // self.hop)

    def windows(self, num_frames: int) -> list[Window]:
        """All windows of a video; the embeddings that are kept of them are those of the video in order.

        Raises: ValueError if `num_frames` is not positive.
        """
        if num_frames < 1:
            raise ValueError(f"a video of {num_frames} frames cannot be: it must be positive")
        starts = range(0, num_frames, self.frames)
        return [self.window(start, num_frames) for start in starts]

    def window(self, start: int, num_frames: int) -> Window:
        """The window whose first embedding that is kept stands for the frames from `start` on."""
        left = num_frames - start
        length = min(self.frames, max(self.least, self.hop * self.count(left)))
        keep = self.count(min(left, self.frames))
        # Where the video is shorter than the window, it begins with it, and repeats the last frame.
        first = min(start, max(0, num_frames - length))
        skip = 0 if first == start else length // self.hop - keep
        numbers = np.arange(first - self.context, first + length)
        return Window(numbers.clip(0, num_frames - 1), skip, keep)

    def holding(self, num_frames: int, indices: np.ndarray) -> tuple[list[Window], np.ndarray]:
        """The windows of a video that give some of its embeddings.

        Args:
            indices: of the embeddings, (T,)

        Returns: the windows, and where the embeddings are among all that these give, (T,).
        """
        per_window = self.frames // self.hop
        numbers, which = np.unique(indices // per_window, return_inverse=True)
        windows = [self.window(number * self.frames, num_frames) for number in numbers.tolist()]
        given = [0, *((len(window.frames) - self.context) // self.hop for window in windows)]
        first = np.cumsum(given[:-1]) + [window.skip for window in windows]
        return windows, first[which] + indices - numbers[which] * per_window

    @property
    def words(self) -> str:
        """All of it, for a key."""
        return f"{self.frames} frames, {self.hop} to an embedding, {self.least} at least"


# Each frame by itself, and each with the one before it.
PHOTOGRAPHS, CHANGES = Windows(), Windows(context=1)


class WindowReader:
    """`Windows.windows` of a video whose frames come some at a time, (n, H, W, 3) uint8.

    Holds a window's worth of frames, however long the video.
    """

    def __init__(self, windows: Windows) -> None:
        self._windows = windows
        self._held = np.empty(0, np.uint8)
        # Numbers of the first frame that is held, of the first of the next window, and of frames so far.
        self._first, self._start, self._read = -windows.context, 0, 0

    def read(self, frames: np.ndarray) -> list[Cut]:
        """The windows that the next frames complete."""
        layout, length = self._windows, self._windows.context + self._windows.frames
        if not self._read and layout.context:
            self._held = np.repeat(frames[:1], layout.context, axis=0)
        self._held = np.concatenate([self._held, frames]) if len(self._held) else frames
        self._read += len(frames)
        number = (self._read - self._start) // layout.frames
        if not number:
            return []
        begin = self._start - layout.context - self._first
        held = self._held[begin : begin + layout.context + number * layout.frames]
        # A view: nothing is copied, though windows share frames.
        views = np.lib.stride_tricks.sliding_window_view(held, length, axis=0, writeable=True)[
            :: layout.frames
        ]
        self._start += number * layout.frames
        # What the last window may reach back to.
        drop = max(0, self._start - layout.context - max(0, layout.least - 1) - self._first)
        self._held, self._first = self._held[drop:], self._first + min(drop, len(self._held))
        return [Cut(np.moveaxis(views, -1, 1), 0, layout.frames // layout.hop)]

    def end(self) -> list[Cut]:
        """The last window, at the end of the video, where frames are left over."""
        if self._read == self._start:
            return []
        window = self._windows.window(self._start, self._read)
        return [Cut(self._held[window.frames - self._first][None], window.skip, window.count)]


def joint_indices(
    layouts: Sequence[Windows], counts: Sequence[int], indices: np.ndarray
) -> Iterator[np.ndarray]:
    """Places of the embeddings of several streams that stand side by side, one array for each stream.

    The stream with the longest hop sets the pace; of each other one it is the embedding of the frame in the
    middle of that hop.

    Args:
        layouts: of the streams
        counts: embeddings of the video in each stream
        indices: embeddings of the stream with the longest hop
    """
    hop = joint_hop(layouts)
    for layout, count in zip(layouts, counts, strict=True):
        yield np.minimum((indices * hop + hop // 2) // layout.hop, count - 1)


def nearest_stride(fps: float | Fraction, wanted: float) -> int:
    """Every how many frames of a video of `fps` frames/s come nearest to `wanted` frames/s."""
    return max(1, round(fps / wanted))


def joint_hop(layouts: Sequence[Windows]) -> int:
    """Frames to an embedding of several streams together: those of the stream with the longest hop."""
    return max(layout.hop for layout in layouts)
