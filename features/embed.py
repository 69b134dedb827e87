"""From a video to an array of embeddings: one function for data sets, single videos, the page and programs.

Shapes: V views (the frames, and with flip their mirror images), K embeddings along the video, D their width.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from features.windows import Cutter, Windows
from utils.process import UserError
from video.files import VideoError
from video.frames import Resize, resize_frames
from video.reader import Video
from video.shots import Shots

# Frames that are resized at a time, and fewer where they are large.
CHUNK, CHUNK_BYTES = 32, 2**26
# Seconds by which a frame may be early or late in a video that is called steady.
STEADY = 1e-3


class FrameEncoder(Protocol):
    """What `embed_video` needs: an `encoder.Encoder`, or an exported one."""

    @property
    def windows(self) -> Windows:
        """How it moves along a video."""

    @property
    def resize(self) -> Resize:
        """How frames become squares."""

    @property
    def img_dim(self) -> int:
        """Height and width of the frames in pixels."""

    @property
    def batch_size(self) -> int:
        """Windows that are best encoded at once."""

    def embed(self, windows: Tensor) -> Tensor:
        """Embeddings of windows: (N, L, 3, img_dim, img_dim) uint8 -> (N, K, D)."""


@dataclass(frozen=True)
class Embedded:
    """The embeddings of a video, and the frames they stand for.

    Attributes:
        embeddings: (V, K, D) float16
        frames: frames of the video
        hop: encoded frames of an embedding
        stride: every stride-th frame was encoded
        begins: frames at which windows begin anew: 0, and the first frame of each shot where cuts were sought
        cuts: cuts were sought
        fps: frames per second; None for a folder of frames
        end: second at which the last frame ends
        times: second of each frame where the rate is not steady, else None
        lost_frames: frames that did not decode
        problems: what is wrong with the file, in sentences
    """

    embeddings: np.ndarray
    frames: int
    hop: int
    stride: int = 1
    begins: list[int] = field(default_factory=lambda: [0])
    cuts: bool = False
    fps: Fraction | None = None
    end: float = 0.0
    times: list[float] | None = None
    lost_frames: int = 0
    problems: list[str] = field(default_factory=list)

    def shots(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """First frame, number of frames and embeddings (V, k, D) of each shot."""
        at = 0
        for first, last in pairwise([*self.begins, self.frames]):
            count = math.ceil(math.ceil((last - first) / self.stride) / self.hop)
            yield first, last - first, self.embeddings[:, at : at + count]
            at += count

    def bounds(self) -> np.ndarray:
        """First frame of each embedding, which ends where the next begins, and number of frames: (K + 1,)."""
        span = self.hop * self.stride
        first = [begin + span * np.arange(rows.shape[1]) for begin, _, rows in self.shots()]
        return np.append(np.concatenate(first), self.frames)

    def middles(self) -> np.ndarray:
        """Second of the middle of each embedding (K,)."""
        bounds = self.bounds()
        return np.interp((bounds[:-1] + bounds[1:]) / 2, np.arange(self.frames + 1), self.seconds())

    def seconds(self) -> np.ndarray:
        """Second at which each frame is shown, and that at which the last one ends, (frames + 1,)."""
        steady = np.arange(self.frames) / float(self.fps or 25)
        return np.append(steady if self.times is None else self.times, self.end)


def embed_video(
    video: Video,
    encoder: FrameEncoder,
    *,
    stride: int = 1,
    flip: bool = False,
    cuts: bool = False,
    map: Callable[..., Iterable[Any]] = map,
) -> Embedded:
    """Encode a whole video.

    Args:
        stride: encode every stride-th frame, counted from the beginning of each shot
        flip: also encode mirrored frames
        cuts: look for cuts; windows begin anew behind each
        map: applies the encoder to windows; `workers.map_on_cores` uses all cores for one video

    Returns: embeddings of shape (V, K, D): V = 2 with flip, else 1; K = ceil(ceil(frames / stride) / hop),
        summed over the shots.
    Raises: MissingFileError or VideoError if the video cannot be decoded; UserError if an embedding does not
        fit into float16.
    """
    layout, finder = encoder.windows, Shots(find=cuts)
    begins, times = [0], list[float]()

    def read() -> Iterator[tuple[Tensor, slice]]:
        cutter, kept = Cutter(layout, encoder.batch_size), list[np.ndarray]()

        def resized() -> np.ndarray:
            frames = resize_frames(kept, encoder.img_dim, encoder.resize).permute(0, 2, 3, 1).numpy()
            kept.clear()
            return frames

        for frame in video.timed_frames():
            if finder.begins(frame.image):
                yield from cutter.add(resized()) if kept else ()
                yield from cutter.end()
                cutter = Cutter(layout, encoder.batch_size)
                begins.append(len(times))
            if (len(times) - begins[-1]) % stride == 0:
                kept.append(frame.image)
            times.append(float(frame.second))
            size = max(1, min(CHUNK, CHUNK_BYTES // frame.image.nbytes))
            if len(kept) >= size:
                yield from cutter.add(resized())
        yield from cutter.add(resized()) if kept else ()
        yield from cutter.end()

    def embed(part: tuple[Tensor, slice]) -> np.ndarray:
        windows, new = part
        views = [windows, windows.flip(-1)] if flip else [windows]
        embeddings = torch.stack([encoder.embed(view)[:, new].flatten(0, 1) for view in views])
        return embeddings.cpu().numpy()

    parts = []
    for part in map(embed, read()):
        with np.errstate(over="ignore"):
            parts.append(part.astype(np.float16))
        if not np.isfinite(parts[-1]).all():
            raise UserError(f"{video.name}: an embedding does not fit into float16; choose another encoder")
    folder, fps = video.path.is_dir(), None
    if not folder:
        # What makes no sense as a rate may have good frames.
        with contextlib.suppress(VideoError):
            fps = video.fps()
    steady = all(abs(time - number / (fps or 25)) <= STEADY for number, time in enumerate(times))
    return Embedded(
        np.concatenate(parts, axis=1),
        len(times),
        layout.hop,
        stride,
        begins,
        cuts,
        fps,
        len(times) / 25 if folder else float(video.end),
        None if steady else times,
        video.lost,
        list(video.problems),
    )
