"""Frames as a network sees them: resized, and cut to a square."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Resize:
    """How a frame of any size becomes a square of pixels, cut out of the middle."""

    crop: int = 1  # side in pixels of the square that `size` is meant for; for others it is scaled
    size: tuple[int, int] | int = (1, 1)  # of the resized frame; or its shorter side, which keeps the ratio
    mode: str = "bicubic"  # of PyTorch's interpolation
    antialias: bool = True  # frames that become smaller are blurred first

    def shape(self, height: int, width: int, side: int) -> tuple[int, int]:
        """Height and width that a frame is resized to before a square of `side` pixels is cut out."""
        if isinstance(self.size, tuple):
            return round(self.size[0] * side / self.crop), round(self.size[1] * side / self.crop)
        short = round(self.size * side / self.crop)
        # As torchvision rounds.
        long = int(short * max(height, width) / min(height, width))
        return (short, long) if height <= width else (long, short)

    def with_margin(self, side: int) -> Resize:
        """The same, but that a square of `side` pixels never is the whole frame: a seventh is left over."""
        if self.shape(side, side, side) != (side, side):
            return self
        size = 8 * self.size if isinstance(self.size, int) else (8 * self.size[0], 8 * self.size[1])
        return replace(self, crop=7 * self.crop, size=size)


# As the original: the aspect ratio is not kept.
SQUEEZE = Resize()


def resize_frames(
    frames: Sequence[np.ndarray],
    side: int,
    resize: Resize = SQUEEZE,
    corner: tuple[float, float] = (0.5, 0.5),
) -> Tensor:
    """Frames as an encoder takes them: (H, W, 3) uint8 RGB each -> (T, 3, side, side) uint8.

    Args:
        corner: what share of the margin is cut off above and at the left; by default the middle is left
    """
    stacked = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
    height, width = resize.shape(stacked.shape[2], stacked.shape[3], side)
    if (height, width) != tuple(stacked.shape[2:]):
        stacked = F.interpolate(stacked, size=(height, width), mode=resize.mode, antialias=resize.antialias)
    # Rounded as torchvision's center_crop does.
    top, left = round((height - side) * corner[0]), round((width - side) * corner[1])
    return stacked[:, :, top : top + side, left : left + side]
