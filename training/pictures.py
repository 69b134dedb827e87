"""Pictures of results, drawn without a display."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from training.calibration import Reliability
from utils.fonts import USUAL, font_runs

# Classes up to which a picture has room for the numbers.
NUMBERED_CLASSES = 20
# Classes of a picture: more would be taller than libpng and memory allow.
PICTURED_CLASSES = 250


def png(figure: Figure) -> bytes:
    """A picture as the bytes of a PNG file; no display is needed."""
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
    """What is mistaken for what: labels and predicted labels (N,), as a PNG file.

    Of more than `NUMBERED_CLASSES` it shows those that occur, of more than `PICTURED_CLASSES` those with the
    most mistakes.
    """
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
    axes.set_xlabel("prediction")
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
    columns = max(len(frames) for _, frames in rows)
    figure = Figure((1.5 * max(4, columns), 1.5 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), max(1, columns), squeeze=False)
    for (caption, frames), row in zip(rows, grid, strict=True):
        row[0].set_title(caption, loc="left", fontsize=9)
        for axes in row:
            axes.axis("off")
        for axes, frame in zip(row, frames, strict=False):
            axes.imshow(frame)
    return png(figure)


COLORS = {"train": "#4878a8", "val": "#6aa56e", "test": "#c8553d"}


def curves(epochs: Sequence[dict[str, float]], title: str) -> bytes:
    """Loss, accuracy and learning rate over the epochs, as a PNG file.

    Args:
        epochs: figures by name, such as train_loss (nats) or test_accuracy (%)
    """
    figure = Figure((11, 3.4), layout="constrained")
    figure.suptitle(title, fontsize=10)
    loss, accuracy, rate = figure.subplots(1, 3)
    for axes, quantity, unit in ((loss, "loss", "nats"), (accuracy, "accuracy", "%")):
        for part, color in COLORS.items():
            key = f"{part}_{quantity}"
            points = [(epoch["epoch"], epoch[key]) for epoch in epochs if key in epoch]
            if points:
                axes.plot(*zip(*points, strict=True), color=color, marker=".", label=part)
        axes.set_title(f"{quantity}, {unit}", fontsize=10)
        axes.legend(frameon=False, fontsize=8)
    numbers = [epoch["epoch"] for epoch in epochs]
    rate.plot(numbers, [epoch["learning_rate"] for epoch in epochs], color="#555555")
    rate.set_title("learning rate at the end of the epoch", fontsize=10)
    accuracy.set_ylim(0, 101)
    for axes in (loss, accuracy, rate):
        axes.set_ylim(bottom=0)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return png(figure)
