"""What a test found: figures, how sure they are, and files that another program or a reader can use.

report.json         figures, and everything that it takes to repeat them
classes.csv         each class: clips, accuracy, what it is taken for
predictions.csv     each clip: label, what it was taken for, and the probabilities of all classes
confusion.png       what is taken for what
classes.png         accuracy of each class

The figures are scikit-learn's.
"""

from __future__ import annotations

import hashlib
import io
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import torch
from matplotlib.figure import Figure
from sklearn import metrics

from checkpoint import Checkpoint
from dataset import ClipBatches, Sampling
from engine import Batches, predict
from features import ClipSource
from files import csv_bytes, json_bytes, write_whole
from models import Classifier
from ranks import ALONE, Ranks
from splits import Clip, names_sha256

RESAMPLES = 10_000
# Classes up to which a picture has room for the numbers.
NUMBERED_CLASSES = 20


@dataclass(frozen=True)
class Predictions:
    """What a model says of N clips.

    Attributes:
        classes: class names, by label
        clips: what was tested
        probabilities: (N, C) float64, each row sums to 1
    """

    classes: list[str]
    clips: Sequence[Clip]
    probabilities: np.ndarray

    @cached_property
    def labels(self) -> np.ndarray:
        """(N,) int64."""
        return np.array([clip.label for clip in self.clips])

    @cached_property
    def predicted(self) -> np.ndarray:
        """Labels of the highest probabilities (N,) int64."""
        return self.probabilities.argmax(1)

    @cached_property
    def correct(self) -> np.ndarray:
        """(N,) bool."""
        return self.predicted == self.labels

    def mistakes(self) -> list[int]:
        """Numbers of the clips that are taken for another class, the most certain first."""
        wrong = np.flatnonzero(~self.correct)
        return sorted(wrong.tolist(), key=lambda index: -self.probabilities[index].max())


def predict_clips(
    model: Classifier,
    loader: Batches,
    batches: ClipBatches,
    clips: Sequence[Clip],
    classes: list[str],
    *,
    views: int = 1,
    ranks: Ranks = ALONE,
) -> Predictions:
    """Test a model on clips, each counted once whichever process has it.

    Args:
        loader: gives what `batches` name
        views: passes over the clips, whose probabilities are averaged; the epoch of `batches` tells which
    """
    probabilities = np.zeros((len(clips), len(classes)))
    for view in range(views):
        batches.epoch = view
        description = "testing" if views == 1 else f"testing, clip {view + 1} of {views}"
        predicted = predict(model, loader, model.encoder.device, description=description, ranks=ranks)
        assert predicted is not None
        mine = [index for batch in batches for _, index in batch]
        for indices, part in ranks.gather((mine, predicted[0].double().softmax(1).numpy())):
            probabilities[indices] += part / views
    return Predictions(classes, clips, probabilities)


def interval(correct: np.ndarray, groups: Sequence[str]) -> tuple[float, float] | None:
    """95 % interval of the accuracy in percent: the percentile bootstrap over groups.

    Clips of a group are cut out of one video and stand or fall together, so whole groups are drawn (the
    cluster bootstrap; Davison and Hinkley, 1997, section 3.8).

    Returns: lower and upper end; None where there are fewer than two groups to draw from.
    """
    names, of = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        return None
    right, size = np.bincount(of, correct), np.bincount(of)
    found = scipy.stats.bootstrap(
        (right, size),
        lambda right, size, axis: 100 * right.sum(axis) / size.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=1000,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def figures(predictions: Predictions) -> dict[str, Any]:
    """Clips, top-1, its interval, top-5, mean class accuracy in percent, and the loss in nats."""
    labels, probabilities = predictions.labels, predictions.probabilities
    every, present = np.arange(len(predictions.classes)), np.unique(labels)
    top5 = None
    if len(every) > 5:
        top5 = 100 * float(metrics.top_k_accuracy_score(labels, probabilities, k=5, labels=every))
    recall = metrics.recall_score(labels, predictions.predicted, labels=present, average="macro")
    return {
        "clips": len(labels),
        "correct": int(predictions.correct.sum()),
        "top1_percent": 100 * float(metrics.accuracy_score(labels, predictions.predicted)),
        "top1_interval95_percent": interval(
            predictions.correct, [clip.group_or_name for clip in predictions.clips]
        ),
        "top5_percent": top5,
        "mean_class_accuracy_percent": 100 * float(recall),
        "loss_nats": float(metrics.log_loss(labels, probabilities, labels=every)),
    }


def summary(found: dict[str, Any]) -> str:
    """The figures in a line."""
    ends = found["top1_interval95_percent"]
    return (
        f"loss {found['loss_nats']:.3f} nats, accuracy {found['top1_percent']:.2f} % "
        f"({found['correct']:,} of {found['clips']:,} clips"
        + (f"; 95 % interval {ends[0]:.1f} to {ends[1]:.1f} %)" if ends else ")")
        + (f", top-5 {found['top5_percent']:.2f} %" if found["top5_percent"] is not None else "")
        + f", mean of the classes {found['mean_class_accuracy_percent']:.2f} %"
    )


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def _per_class(predictions: Predictions) -> list[list[Any]]:
    rows: list[list[Any]] = []
    for label in np.unique(predictions.labels).tolist():
        mine = predictions.labels == label
        wrong = predictions.predicted[mine & ~predictions.correct]
        taken = predictions.classes[np.bincount(wrong).argmax()] if len(wrong) else ""
        right = int(predictions.correct[mine].sum())
        rows.append(
            [predictions.classes[label], int(mine.sum()), right, f"{100 * right / mine.sum():.2f}", taken]
        )
    return rows


def _per_clip(predictions: Predictions) -> list[list[Any]]:
    rows = []
    for index, clip in enumerate(predictions.clips):
        label, said = clip.label, int(predictions.predicted[index])
        names = [predictions.classes[label], predictions.classes[said], int(label == said)]
        probabilities = map(repr, predictions.probabilities[index].tolist())
        rows.append([clip.name, clip.group_or_name, *names, *probabilities])
    return rows


def png(figure: Figure) -> bytes:
    """A picture as the bytes of a PNG file; no display is needed."""
    contents = io.BytesIO()
    figure.savefig(contents, format="png", dpi=120, metadata={"Software": None})
    return contents.getvalue()


def _confusion(predictions: Predictions, title: str) -> bytes:
    shown = np.unique(np.concatenate([predictions.labels, predictions.predicted]))
    counts = metrics.confusion_matrix(predictions.labels, predictions.predicted, labels=shown)
    shares = 100 * counts / np.maximum(1, counts.sum(1, keepdims=True))
    side = max(5.0, 0.22 * len(shown) + 2.5)
    figure = Figure((side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    names = [predictions.classes[label] for label in shown]
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


def _bars(rows: list[list[Any]], title: str) -> bytes:
    rows = sorted(rows, key=lambda row: (float(row[3]), row[0]))
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


def about(
    checkpoint: Checkpoint, path: Path, source: ClipSource, sampling: Sampling, split_number: int | str
) -> dict[str, Any]:
    """What it takes to repeat the test of a checkpoint, as plain values."""
    encoder = source.model.encoder
    return {
        "model": checkpoint.model.name,
        "streams": list(checkpoint.model.streams),
        "trained_parameters": sum(map(torch.Tensor.numel, checkpoint.model.heads.parameters())),
        "checkpoint": str(path),
        "checkpoint_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "epoch": checkpoint.epoch,
        "encoder": encoder.name,
        "encoder_sha256": encoder.sha256(),
        "encoder_computed_in": encoder.variant,
        "device": str(encoder.device),
        "split_number": split_number,
        "img_dim": source.img_dim,
        "sequence_length": sampling.sequence_length,
        "frame_stride": sampling.frame_stride,
        "clips_per_video": sampling.views,
        "frames_shuffled": sampling.shuffle,
        "training": checkpoint.settings,
        "command": sys.argv,
        "versions": {
            "python": platform.python_version(),
            "machine": platform.machine(),
            **{name: version(name) for name in ("torch", "torchvision", "numpy", "scikit-learn", "scipy")},
        },
    }


def write_report(folder: Path, predictions: Predictions, about: dict[str, Any]) -> dict[str, Any]:
    """Write the files into a folder, each whole or not at all; returns what report.json holds.

    Args:
        about: as the function of this name gives it

    Raises: OSError if a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = figures(predictions)
    mistakes = [
        {
            "clip": predictions.clips[index].name,
            "taken_for": predictions.classes[predictions.predicted[index]],
            "probability": float(predictions.probabilities[index].max()),
        }
        for index in predictions.mistakes()
    ]
    report = {
        "figures": found,
        **about,
        "test_clips_sha256": names_sha256(predictions.clips),
        "mistakes": mistakes,
    }
    score = f"{found['top1_percent']:.2f} % of {found['clips']:,} clips"
    title = f"{about['model']}, {about['encoder']}, split {about['split_number']}: {score}"
    rows = _per_class(predictions)
    head = ["class", "clips", "correct", "accuracy_percent", "taken_for"]
    write_whole(folder / "classes.csv", csv_bytes([head, *rows]))
    head = ["clip", "group", "label", "predicted", "correct"]
    write_whole(
        folder / "predictions.csv", csv_bytes([[*head, *predictions.classes], *_per_clip(predictions)])
    )
    write_whole(folder / "confusion.png", _confusion(predictions, title))
    write_whole(folder / "classes.png", _bars(rows, title))
    write_whole(folder / "report.json", json_bytes(report))
    return report
