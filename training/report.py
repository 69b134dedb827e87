"""What a test found: figures, how sure they are, and files that another program or a reader can use.

report.json         figures, and everything that it takes to repeat them
classes.csv         each class: clips, accuracy, what it is most often mistaken for
predictions.csv     each clip: label, prediction, and the probabilities of all classes
confusion.png       what is mistaken for what
reliability.png     how often an answer of some probability is right
mistakes.png        frames of the most certain mistakes

The figures are scikit-learn's.
"""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dataset import EmbeddingClips, batch_items
from features.encoder import Encoder
from models import Head
from splits.split import Clip, names_sha256
from training.calibration import Reliability, with_temperature
from training.checkpoint import Checkpoint, check_finite
from training.pictures import confusion_matrix, reliability_diagram, strips
from utils.files import csv_bytes, json_bytes, write_whole
from utils.ranks import ALONE, Ranks
from video.files import VideoError

RESAMPLES = 10_000
# Mistakes that are shown, and frames of each.
MISTAKES, FRAMES = 12, 8
TEST_BATCH = 64
# Clips that it takes to tell a calibration error.
CALIBRATED = 50


@dataclass(frozen=True)
class Predictions:
    """Class probabilities of N clips.

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
        """True labels of the clips, (N,) int64."""
        return np.array([clip.label for clip in self.clips])

    @cached_property
    def predicted(self) -> np.ndarray:
        """Labels of the highest probabilities (N,) int64."""
        return self.probabilities.argmax(1)

    @cached_property
    def reliability(self) -> Reliability:
        """How often answers of some probability are right."""
        return Reliability.of(self.probabilities, self.labels)

    @cached_property
    def correct(self) -> np.ndarray:
        """Which predictions are right, (N,) bool."""
        return self.predicted == self.labels

    def mistakes(self) -> list[int]:
        """Numbers of the clips that are mistaken for another class, the most certain first."""
        wrong = np.flatnonzero(~self.correct)
        return sorted(wrong.tolist(), key=lambda index: -self.probabilities[index].max())


@torch.no_grad()
def predict_logits(
    head: Head, clips: EmbeddingClips, device: torch.device, *, ranks: Ranks = ALONE
) -> tuple[Tensor, Tensor]:
    """Calibrated logits (N, C) and labels (N,) of all clips, each once, whichever process computes it."""
    head.eval()
    logits, own = [], []
    for items in batch_items(len(clips.clips), TEST_BATCH * ranks.size, ranks=ranks):
        embeddings, padding, _ = clips.batch(items)
        logits.append(head.classify(embeddings.to(device), padding.to(device)).float().cpu())
        own += [index for _, index in items]
    gathered = ranks.gather((own, torch.cat(logits) if logits else None))
    parts = [part for part in gathered if part[1] is not None]
    order = torch.tensor([index for indices, _ in parts for index in indices]).argsort()
    labels = torch.tensor([clip.label for clip in clips.clips])
    return torch.cat([rows for _, rows in parts if rows is not None])[order], labels


def predict(
    head: Head, clips: EmbeddingClips, classes: list[str], device: torch.device, *, ranks: Ranks = ALONE
) -> Predictions:
    """Test a head on clips. Raises: CheckpointError if its logits are not finite."""
    logits, _ = predict_logits(head, clips, device, ranks=ranks)
    check_finite(bool(logits.isfinite().all()))
    return Predictions(classes, clips.clips, logits.double().softmax(1).numpy())


def interval(correct: np.ndarray, groups: Sequence[str]) -> tuple[float, float] | None:
    """95 % interval of the accuracy in percent: the percentile bootstrap over groups.

    Clips of a group are cut out of one video and stand or fall together, so whole groups are drawn (the
    cluster bootstrap; Davison and Hinkley, 1997, section 3.8). Where all clips are right, or all wrong, every
    draw is the same; the interval is then the exact one of as many groups (Clopper and Pearson, 1934).

    Returns: lower and upper end; None where there are fewer than two groups to draw from.
    """
    import scipy.stats

    names, group = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        return None
    right, size = np.bincount(group, correct), np.bincount(group)
    if not right.any() or (right == size).all():
        exact = scipy.stats.binomtest(len(names) if right.any() else 0, len(names)).proportion_ci()
        return 100 * float(exact.low), 100 * float(exact.high)
    bootstrap = scipy.stats.bootstrap(
        (right, size), lambda right, size, axis: 100 * right.sum(axis) / size.sum(axis), paired=True,
        vectorized=True, n_resamples=RESAMPLES, batch=1000, method="percentile", rng=np.random.default_rng(0),
    )  # fmt: skip
    return float(bootstrap.confidence_interval.low), float(bootstrap.confidence_interval.high)


def figures(predictions: Predictions) -> dict[str, Any]:
    """Clips, top-1, its interval, top-5, mean class accuracy and calibration error in %, loss in nats."""
    from sklearn import metrics

    labels, probabilities = predictions.labels, predictions.probabilities
    every, present = np.arange(len(predictions.classes)), np.unique(labels)
    top5 = None
    if len(every) > 5:
        top5 = 100 * float(metrics.top_k_accuracy_score(labels, probabilities, k=5, labels=every))
    recall = metrics.recall_score(labels, predictions.predicted, labels=present, average="macro")
    groups = [clip.group_or_name for clip in predictions.clips]
    return {
        "clips": len(labels),
        "correct": int(predictions.correct.sum()),
        "top1_percent": 100 * float(metrics.accuracy_score(labels, predictions.predicted)),
        "top1_interval95_percent": interval(predictions.correct, groups),
        "top5_percent": top5,
        "mean_class_accuracy_percent": 100 * float(recall),
        "loss_nats": float(metrics.log_loss(labels, probabilities, labels=every)),
        "calibration_error_percent": 100 * predictions.reliability.error,
    }


def summary(values: dict[str, Any]) -> str:
    """The figures in a line."""
    ends = values["top1_interval95_percent"]
    before = values.get("calibration_error_without_temperature_percent")
    # Of few clips it is chance.
    enough = values["clips"] >= CALIBRATED
    return (
        f"loss {values['loss_nats']:.3f} nats, accuracy {values['top1_percent']:.2f} % "
        f"({values['correct']:,} of {values['clips']:,} clips"
        + (f"; 95 % interval {ends[0]:.1f} to {ends[1]:.1f} %)" if ends else ")")
        + (f", top-5 {values['top5_percent']:.2f} %" if values["top5_percent"] is not None else "")
        + f", mean of the classes {values['mean_class_accuracy_percent']:.2f} %"
        + (f", calibration error {values['calibration_error_percent']:.1f} %" if enough else "")
        + (f" ({before:.1f} % without the temperature)" if enough and before is not None else "")
        + (" (--val_fraction calibrates)" if enough and before is None else "")
    )


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def _per_class(predictions: Predictions) -> list[list[Any]]:
    rows: list[list[Any]] = [["class", "clips", "correct", "accuracy_percent", "mistaken_for"]]
    for label in np.unique(predictions.labels).tolist():
        of_class = predictions.labels == label
        wrong = predictions.predicted[of_class & ~predictions.correct]
        mistaken = predictions.classes[np.bincount(wrong).argmax()] if len(wrong) else ""
        clips, right = int(of_class.sum()), int(predictions.correct[of_class].sum())
        rows.append([predictions.classes[label], clips, right, f"{100 * right / clips:.2f}", mistaken])
    return rows


def _per_clip(predictions: Predictions) -> list[list[Any]]:
    rows: list[list[Any]] = [["clip", "group", "label", "predicted", "correct", *predictions.classes]]
    for clip, label, row in zip(
        predictions.clips, predictions.predicted.tolist(), predictions.probabilities, strict=True
    ):
        names = [predictions.classes[clip.label], predictions.classes[label], int(clip.label == label)]
        rows.append([clip.title, clip.group_or_name, *names, *map(repr, row.tolist())])
    return rows


def _mistakes(predictions: Predictions) -> bytes:
    """Frames of the most certain mistakes, a row each, as a PNG file."""
    rows = []
    for index in tqdm(
        predictions.mistakes()[:MISTAKES], "mistakes", unit="clip", leave=False, dynamic_ncols=True
    ):
        clip, mistaken = predictions.clips[index], predictions.classes[predictions.predicted[index]]
        percent = 100 * predictions.probabilities[index].max()
        caption = f"{clip.title}: mistaken for {mistaken}, {percent:.1f} %"
        try:
            last, fps = clip.video.count() - 1, clip.video.fps() if clip.span else 1
            first, end = (second * float(fps) for second in clip.span or (0, last))
            places = np.linspace(first, end, FRAMES).round().clip(0, last).astype(int)
            rows.append((caption, list(clip.video.frames(np.unique(places)))))
        # The test needed its embeddings only, and counts.
        except (VideoError, OSError) as error:
            rows.append((f"{caption} ({error})", []))
    return strips(rows)


def number_of_parameters(module: nn.Module) -> int:
    """Numbers in the parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def about(checkpoint: Checkpoint, path: Path, encoder: Encoder, split_number: int) -> dict[str, Any]:
    """What it takes to repeat the test of a checkpoint, as plain values.

    Args:
        encoder: that computed the embeddings
    """
    return {
        "model": checkpoint.model,
        "temperature": checkpoint.head.temperature,
        "trained_parameters": number_of_parameters(checkpoint.head),
        "checkpoint": str(path),
        "checkpoint_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "epoch": checkpoint.epoch,
        "encoder": encoder.name,
        "encoder_trained_on": encoder.spec.trained_on if encoder.pretrained else "",
        "encoder_sha256": encoder.sha256(),
        "encoder_precision": encoder.precision,
        "device": str(encoder.device),
        "split_number": split_number,
        "img_dim": encoder.img_dim,
        "sequence_length": checkpoint.sequence_length,
        "frame_stride": checkpoint.frame_stride,
        "training": checkpoint.settings,
        "command": sys.argv,
        "versions": {
            "python": platform.python_version(),
            "machine": platform.machine(),
            **{name: version(name) for name in ("torch", "torchvision", "numpy", "scikit-learn", "scipy")},
        },
    }


def write_report(folder: Path, predictions: Predictions, described: dict[str, Any]) -> dict[str, Any]:
    """Write the files into a folder, each whole or not at all; returns what report.json holds.

    Args:
        described: as `about` gives it, and more

    Raises: OSError if a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    measured, temperature = figures(predictions), described["temperature"]
    if temperature != 1:
        before = with_temperature(predictions.probabilities, 1 / temperature)
        error = Reliability.of(before, predictions.labels).error
        measured["calibration_error_without_temperature_percent"] = 100 * error
    mistakes = predictions.mistakes()
    report = {
        "figures": measured,
        **described,
        "test_clips_sha256": names_sha256(predictions.clips),
        "mistakes": [
            {
                "clip": predictions.clips[index].title,
                "mistaken_for": predictions.classes[predictions.predicted[index]],
                "probability": float(predictions.probabilities[index].max()),
            }
            for index in mistakes
        ],
    }
    score = f"{measured['top1_percent']:.2f} % of {measured['clips']:,} clips"
    title = f"{described['model']}, {described['encoder']}, split {described['split_number']}: {score}"
    confusion = confusion_matrix(predictions.classes, predictions.labels, predictions.predicted, title)
    write_whole(folder / "classes.csv", csv_bytes(_per_class(predictions)))
    write_whole(folder / "predictions.csv", csv_bytes(_per_clip(predictions)))
    write_whole(folder / "confusion.png", confusion)
    write_whole(folder / "reliability.png", reliability_diagram(predictions.reliability, title))
    write_whole(folder / "report.json", json_bytes(report))
    if mistakes:
        write_whole(folder / "mistakes.png", _mistakes(predictions))
    else:
        (folder / "mistakes.png").unlink(missing_ok=True)
    return report
