"""What is drawn onto a labeled video: the probable actions, and below it a timeline of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from splits.split import NO_ACTION
from utils.fonts import font_runs

# The label of a frame without an action.
NONE = -1

OVERLAYS = ("full", "minimal")
# Actions whose probability is shown.
SHOWN = 3
DARK, EMPTY, MUTED, LIGHT = (24, 24, 24), (70, 70, 70), (170, 170, 170), (255, 255, 255)
# Told apart by people of any color vision (Okabe and Ito, 2008), on dark ground.
PALETTE = (
    (86, 180, 233), (230, 159, 0), (0, 158, 115), (240, 228, 66),
    (204, 121, 167), (213, 94, 0), (0, 114, 178), (190, 190, 190),
)  # fmt: skip


def hex_color(color: tuple[int, int, int]) -> str:
    """A color as web pages and matplotlib write it."""
    return "#{:02x}{:02x}{:02x}".format(*color)


def font_size(height: int, width: int) -> int:
    """Pixels of a text that can be read in frames of `height` x `width` pixels."""
    return max(10, min(height, width) // 18)


def _runs(text: str, size: int) -> list[tuple[ImageFont.FreeTypeFont, str]]:
    if text.isascii():
        font = ImageFont.load_default(size)
        assert isinstance(font, ImageFont.FreeTypeFont)
        return [(font, text)]
    return [(ImageFont.truetype(path, size), part) for path, part in font_runs(text)]


@lru_cache(maxsize=1024)
def draw_text(text: str, size: int, color: tuple[int, int, int], width: int) -> np.ndarray:
    """`text` on dark ground, (h, w, 3) uint8 RGB: `size` pixels high, smaller where `width` asks for it."""
    runs = _runs(text, size)
    while (length := sum(font.getlength(part) for font, part in runs)) > width and size > 4:
        size -= 1
        runs = _runs(text, size)
    image = Image.new("RGB", (max(1, min(width, round(length))), round(1.3 * size)), DARK)
    # On one line, though some fonts are higher than they are large.
    left, line = 0.0, min(size, *(font.getmetrics()[0] for font, _ in runs)) if len(runs) else size
    for font, part in runs:
        ImageDraw.Draw(image).text((left, line), part, font=font, fill=color, anchor="ls")
        left += font.getlength(part)
    return np.asarray(image)


def _paste(frame: np.ndarray, image: np.ndarray, top: int, left: int) -> None:
    part = frame[top : top + image.shape[0], left : left + image.shape[1]]
    part[:] = image[: part.shape[0], : part.shape[1]]


class Overlay:
    """Draws onto the frames of one video, in their order.

    Actions get their colors as they come up. Sizes follow from the frame's.

    Args:
        classes: class names, by label
        total: frames of the video, as far as is known; the timeline is as long; 0 where nobody knows: it then
            shows the last frames, one in each column
        style: "full", or "minimal": the most probable action alone
    """

    def __init__(self, classes: Sequence[str], total: int, style: str = "full") -> None:
        self.classes, self.total, self.style = classes, total, style
        self._colors: dict[int, tuple[int, int, int]] = {}
        # Frames of each action so far.
        self._counts: Counter[int] = Counter()
        self._legend: list[int] = []
        self._strip: np.ndarray | None = None
        self._line = np.empty((0, 0, 3), np.uint8)
        self._plate_key: object = None
        self._plate = np.empty((0, 0, 3), np.uint8)

    def color(self, label: int) -> tuple[int, int, int]:
        """The color of an action, the same all through the video."""
        if label == NONE:
            return EMPTY
        return self._colors.setdefault(label, PALETTE[len(self._colors) % len(PALETTE)])

    def draw(self, frame: np.ndarray, probabilities: np.ndarray, label: int, note: str = "") -> np.ndarray:
        """A frame (H, W, 3) uint8 RGB with its labels, changed in place; taller if "full".

        Args:
            probabilities: (C,)
            label: of the frame, or `NONE`
            note: a few words for the lower right corner
        """
        height, width = frame.shape[:2]
        margin, full = height // 40, self.style == "full"
        if note:
            text = draw_text(note, font_size(height, width), MUTED, max(1, width - 2 * margin))
            _paste(frame, text, max(0, height - margin - len(text)), max(0, width - margin - text.shape[1]))
        if full:
            self._counts[label] += 1
            self.color(label)
        # The frame's own label first, though for a moment another may be more probable.
        likely = np.argsort(-probabilities, kind="stable")[:SHOWN].tolist()
        shown = [label, *(other for other in likely if other != label)][: SHOWN if full else 1]
        percent = [None if each == NONE else round(100 * float(probabilities[each])) for each in shown]
        key = (frame.shape, tuple(shown), tuple(percent))
        # Frames share their probabilities for a while.
        if key != self._plate_key:
            self._plate_key, self._plate = key, self._make_plate(height, width, shown, percent)
        _paste(frame, self._plate, margin, margin)
        return np.concatenate([frame, self._draw_strip(height, width, label)]) if full else frame

    def _name(self, label: int) -> str:
        return NO_ACTION if label == NONE else self.classes[label]

    def _make_plate(
        self, height: int, width: int, labels: list[int], percent: list[int | None]
    ) -> np.ndarray:
        bars = self.style == "full"
        size = font_size(height, width)
        pad, line, bar = size // 2, round(1.3 * size), max(2, size // 5)
        most = max(8, width - 2 * (height // 40 + pad))
        step = line + (bar + pad // 2 if bars else 0)
        names = [self._name(label) + ("" if share is None else f" {share} %")
                 for label, share in zip(labels, percent, strict=True)]  # fmt: skip
        texts = [draw_text(name, size, MUTED if row else LIGHT, most) for row, name in enumerate(names)]
        widest = max(text.shape[1] for text in texts)
        if bars:
            # As wide all through the video, or nearly: a plate that jumps draws the eye.
            widest = min(most, max(widest, round(0.42 * width)))
        rows = 2 * pad + step * len(labels) - (pad // 2 if bars else 0)
        plate = np.full((rows, widest + 2 * pad, 3), DARK, np.uint8)
        for row, (label, text, share) in enumerate(zip(labels, texts, percent, strict=True)):
            top = pad + step * row
            _paste(plate, text, top, pad)
            if bars and share is not None:
                ground = plate[top + line : top + line + bar, pad : pad + widest]
                ground[:] = EMPTY
                ground[:, : round(share / 100 * widest)] = self._colors.get(label, MUTED)
        return plate

    def _draw_strip(self, height: int, width: int, label: int) -> np.ndarray:
        """The timeline up to the frame at hand, and the actions that it has shown most."""
        size = font_size(height, width)
        pad, line = size // 2, max(4, size // 2)
        rows = line + 2 * pad + round(1.3 * size)
        if self._strip is None:
            self._strip = np.full((rows + (height + rows) % 2, width, 3), DARK, np.uint8)
            self._line = np.full((line, width, 3), EMPTY, np.uint8)
        # A file may state fewer frames than it has.
        frames = self._counts.total()
        if self.total:
            start, end = (min(width, round(frame * width / self.total)) for frame in (frames - 1, frames))
        else:
            start, end = width - 1, width
            self._line[:, :-1] = self._line[:, 1:]
        self._line[:, start:end] = self.color(label)
        self._strip[:line] = self._line
        # Where we are.
        self._strip[:line, max(0, end - 2) : max(2, end)] = LIGHT
        order = [each for each, _ in self._counts.most_common()]
        if order != self._legend:
            self._legend, ground, left = order, self._strip[line:], pad
            ground[:] = DARK
            for each in order:
                text = draw_text(self._name(each), size, LIGHT, width - 2 * size)
                if left + size + text.shape[1] > width:
                    break
                top = pad + size // 4
                ground[top : top + size // 2, left : left + size // 2] = self.color(each)
                _paste(ground, text, pad, left + size)
                left += text.shape[1] + 2 * size
        return self._strip
