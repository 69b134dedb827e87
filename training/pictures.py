"""Pictures of results, drawn without a display.

What draws and computes is imported where it is used: it takes seconds, which --help has no need of.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.fonts import USUAL, font_runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from training.calibration import Reliability

# Classes up to which a picture has room for the numbers.
NUMBERED_CLASSES = 20
# Classes of a picture: more would be taller than libpng and memory allow.
PICTURED_CLASSES = 250
# Height in pixels of the frames of a strip.
STRIP = 112


def png(figure: Figure) -> bytes:
    """A picture as the bytes of a PNG file; no display is needed."""
    from matplotlib import font_manager
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        if not text.get_text().isascii():
            families = [USUAL]
            for path, _ in font_runs(text.get_text()):
                font_manager.fontManager.addfont(path)
                families.append(font_manager.FontProperties(fname=path).get_name())
            text.set_fontfamily(families)
    contents = io.BytesIO()
    figure.savefig(contents, format="png", dpi=120, metadata={"Software": None})
    return contents.getvalue()


def confusion_matrix(classes: Sequence[str], labels: np.ndarray, predicted: np.ndarray, title: str) -> bytes:
    """What is taken for what: labels and predicted labels (N,), as a PNG file.

    Of more than `NUMBERED_CLASSES` it shows those that occur, of more than `PICTURED_CLASSES` those with the
    most mistakes.
    """
    from matplotlib.figure import Figure
    from sklearn import metrics

    shown = np.arange(len(classes))
    if len(classes) > NUMBERED_CLASSES:
        shown = np.unique(np.concatenate([labels, predicted]))
    if len(shown) > PICTURED_CLASSES:
        mistakes = np.bincount(labels[labels != predicted], minlength=len(classes))
        title += f"\nthe {PICTURED_CLASSES} of {len(shown):,} classes with the most mistakes"
        shown = np.sort(shown[np.argsort(-mistakes[shown], kind="stable")[:PICTURED_CLASSES]])
    counts = metrics.confusion_matrix(labels, predicted, labels=shown)
    clips = np.bincount(labels, minlength=len(classes))[shown]
    shares = 100 * counts / np.maximum(1, clips)[:, None]
    side = max(5.0, 0.22 * len(shown) + 2.5)
    figure = Figure((side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    names = [classes[label] for label in shown.tolist()]
    axes.set_xticks(range(len(shown)), names, rotation=90, fontsize=8)
    axes.set_yticks(range(len(shown)), names, fontsize=8)
    axes.set_xlabel("taken for")
    axes.set_ylabel("action")
    axes.set_title(title, fontsize=10)
    if len(shown) <= NUMBERED_CLASSES:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                color = "white" if shares[row, column] > 60 else "black"
                axes.text(column, row, f"{count}", ha="center", va="center", fontsize=8, color=color)
    figure.colorbar(image, label="% of the action's clips", shrink=0.8)
    return png(figure)


def reliability_diagram(reliability: Reliability, title: str) -> bytes:
    """How often answers of some probability are right, and how many there are, as a PNG file."""
    from matplotlib.figure import Figure

    width = 100 / len(reliability.counts)
    middles = width * (np.arange(len(reliability.counts)) + 0.5)
    figure = Figure((5, 5.5), layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    filled = reliability.counts > 0
    axes.bar(middles[filled], 100 * reliability.accuracy[filled], width * 0.92, color="#4878a8")
    axes.plot([0, 100], [0, 100], "--", color="#888888", linewidth=1, label="as often right as it says")
    means = 100 * reliability.confidence[filled], 100 * reliability.accuracy[filled]
    axes.plot(*means, "o", color="#c8553d", markersize=4, label="mean probability of the bin")
    axes.set_ylim(0, 105)
    axes.set_ylabel("right, %")
    axes.legend(loc="upper left", fontsize=8)
    axes.set_title(f"{title}\nexpected calibration error {100 * reliability.error:.1f} %", fontsize=10)
    bars = below.bar(middles, reliability.counts, width * 0.92, color="#aaaaaa")
    below.bar_label(bars, [str(count or "") for count in reliability.counts.tolist()], fontsize=7)
    below.set_ylabel("clips")
    below.set_xlabel("probability of the answer, %")
    below.set_xlim(0, 100)
    below.margins(y=0.25)
    for each in (axes, below):
        each.spines[["top", "right"]].set_visible(False)
    return png(figure)


def strips(rows: Sequence[tuple[str, Sequence[np.ndarray]]]) -> bytes:
    """Frames (H, W, 3) uint8 RGB of some clips, a row for each with its caption above, as a PNG file."""
    from PIL import Image, ImageDraw, ImageFont

    font, caption_height = ImageFont.load_default(13), 20
    parts = []
    for caption, frames in rows:
        images = [Image.fromarray(frame) for frame in frames]
        widths = [max(1, round(image.width * STRIP / image.height)) for image in images]
        images = [image.resize((width, STRIP)) for image, width in zip(images, widths, strict=True)]
        width = max(sum(image.width for image in images), round(font.getlength(caption)) + 8)
        part = Image.new("RGB", (width, caption_height + STRIP), "white")
        ImageDraw.Draw(part).text((4, 2), caption, "black", font)
        for place, image in enumerate(images):
            part.paste(image, (sum(earlier.width for earlier in images[:place]), caption_height))
        parts.append(part)
    whole = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white")
    for place, part in enumerate(parts):
        whole.paste(part, (0, sum(earlier.height for earlier in parts[:place])))
    contents = io.BytesIO()
    whole.save(contents, format="png")
    return contents.getvalue()


def class_bars(rows: Sequence[Sequence[Any]], title: str) -> bytes:
    """Accuracy of each class, as a PNG file: rows of class, clips, correct, accuracy in percent.

    Of more than `PICTURED_CLASSES` it shows the least accurate.
    """
    from matplotlib.figure import Figure

    rows = sorted(rows, key=lambda row: (float(row[3]), row[0]))
    if len(rows) > PICTURED_CLASSES:
        title += f"\nthe {PICTURED_CLASSES} least accurate of {len(rows):,} classes"
        rows = rows[:PICTURED_CLASSES]
    figure = Figure((7, 0.22 * len(rows) + 1.5), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh([row[0] for row in rows], [float(row[3]) for row in rows], color="#4878a8", height=0.7)
    axes.bar_label(bars, [f"{row[2]} of {row[1]}" for row in rows], padding=3, fontsize=7)
    axes.set_xlim(0, 115)
    axes.set_xticks(range(0, 101, 20))
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel("accuracy, % of the class's clips")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    return png(figure)
