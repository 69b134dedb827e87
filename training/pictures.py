"""Pictures of results, drawn without a display.

What draws and computes is imported where it is used: it takes seconds, which --help has no need of.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Classes up to which a picture has room for the numbers.
NUMBERED_CLASSES = 20
# Classes of a picture: more would be taller than libpng and memory allow.
PICTURED_CLASSES = 250


def png(figure: Figure) -> bytes:
    """A picture as the bytes of a PNG file; no display is needed."""
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
