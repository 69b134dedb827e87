"""Frames as a network for images sees them: resized, and with what has changed since the frame before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from utils.process import UserError

# What a frame may be seen as: itself, and what has changed since the frame before it.
STREAMS = ("rgb", "diff")
# Neighbouring frames differ little; the embeddings tell actions apart best so (see benchmarks/README.md).
GRAY, DIFF_GAIN = 128, 2


def parse_streams(text: str) -> tuple[str, ...]:
    """Streams out of words between commas, such as rgb,diff.

    Raises: UserError for an unknown one, or one that is there twice.
    """
    streams = tuple(text.split(","))
    if unknown := [stream for stream in streams if stream not in STREAMS]:
        raise UserError(f"unknown stream {unknown[0]!r}; choose from {','.join(STREAMS)}")
    if len(set(streams)) < len(streams):
        raise UserError(f"{text}: a stream twice is worth no more than once; name each once")
    return streams


def resize_frames(frames: Sequence[np.ndarray], img_dim: int) -> Tensor:
    """Frames as the encoder takes them: (T, H, W, 3) uint8 RGB -> (T, 3, img_dim, img_dim) uint8.

    Bicubic with antialiasing, on uint8; the aspect ratio is not kept, as in the original.
    """
    stacked = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
    return F.interpolate(stacked, size=(img_dim, img_dim), mode="bicubic", antialias=True)


def stream_images(frames: Tensor, before: Tensor, streams: Sequence[str]) -> Tensor:
    """Frames as a network for images sees them, three channels for each stream.

    The difference of two frames shows what moves, as in the RGB differences of TSN (Wang et al., ECCV 2016).
    It is drawn around middle gray, where a network for photographs expects its input.

    Args:
        frames: (T, 3, H, W) uint8 RGB
        before: the frame before each of them, the same shape; the first frame of a video is its own

    Returns: (T, 3 S, H, W) uint8.
    """
    if "diff" not in streams:
        return frames
    # By NumPy, since threads read: PyTorch would start a pool of its own in each, in the encoder's way.
    images = []
    for stream in streams:
        image = frames.numpy()
        if stream == "diff":
            change = image.astype(np.int16) - before.numpy()
            image = np.clip(GRAY + DIFF_GAIN * change, 0, 255).astype(np.uint8)
        images.append(image)
    return torch.from_numpy(np.concatenate(images, axis=1))


class StreamReader:
    """`stream_images` of a video's frames that come some at a time.

    Args:
        streams: what a frame is seen as
        stride: how many frames before a frame the one stands that it is compared with; the first frame
            stands in for those before it
    """

    def __init__(self, streams: Sequence[str], stride: int = 1) -> None:
        self.streams, self.stride = streams, stride
        self._before: np.ndarray | None = None

    def read(self, frames: Tensor) -> Tensor:
        """The next frames (T, 3, H, W) uint8, as (T, 3 S, H, W) uint8."""
        if "diff" not in self.streams:
            return frames
        if self._before is None:
            self._before = np.repeat(frames[:1].numpy(), self.stride, axis=0)
        joined = np.concatenate([self._before, frames.numpy()])
        self._before = joined[-self.stride :].copy()
        return stream_images(frames, torch.from_numpy(joined[: len(frames)]), self.streams)
