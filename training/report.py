"""What a test found: figures, how sure they are, and files that another program or a reader can use.

report.json         figures, and everything that it takes to repeat them
classes.csv         each class: clips, accuracy, what it is taken for
predictions.csv     each clip: label, what it was taken for, and the probabilities of all classes
confusion.png       what is taken for what
classes.png         accuracy of each class
reliability.png     how often an answer of some probability is right
mistakes/           for each class with mistakes, the most certain ones: frames of the clips

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
from tqdm import tqdm

from dataset import Sampling
from splits.split import Clip, names_sha256
from training.calibration import Reliability, with_temperature
from training.checkpoint import Checkpoint, check_answers
from training.classifier import Classifier
from training.evaluate import predict
from training.loop import Part
from training.pictures import class_bars, confusion_matrix, reliability_diagram, strips
from training.setup import ClipSource, number_of_parameters
from utils.files import csv_bytes, json_bytes, write_whole
from utils.ranks import ALONE, Ranks
from video.files import VideoError

RESAMPLES = 10_000
# Mistakes of a class, and frames of each, that are shown.
MISTAKES, FRAMES = 3, 8


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
        """(N,) int64."""
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
        """(N,) bool."""
        return self.predicted == self.labels

    def mistakes(self) -> list[int]:
        """Numbers of the clips that are taken for another class, the most certain first."""
        wrong = np.flatnonzero(~self.correct)
        return sorted(wrong.tolist(), key=lambda index: -self.probabilities[index].max())


def predict_clips(
    model: Classifier, part: Part, classes: list[str], *, views: int = 1, ranks: Ranks = ALONE
) -> Predictions:
    """Test a model on clips, each counted once whichever process has it.

    Args:
        views: passes over the clips, whose probabilities are averaged; the epoch of the order tells which

    Raises: CheckpointError if the model's answers are no numbers, as with a damaged checkpoint.
    """
    probabilities = np.zeros((len(part.clips), len(classes)))
    for view in range(views):
        part.order.epoch = view
        description = "testing" if views == 1 else f"testing, clip {view + 1} of {views}"
        predicted = predict(model, part.batches, description=description, ranks=ranks)
        assert predicted is not None
        own = [index for batch in part.order for _, index in batch]
        for indices, rows in ranks.gather((own, predicted[0].double().softmax(1).numpy())):
            probabilities[indices] += rows / views
    check_answers(bool(np.isfinite(probabilities).all()))
    return Predictions(classes, part.clips, probabilities)


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
        (right, size),
        lambda right, size, axis: 100 * right.sum(axis) / size.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=1000,
        method="percentile",
        rng=np.random.default_rng(0),
    )
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
        "calibration_error_percent": 100 * predictions.reliability.error,
    }


def summary(values: dict[str, Any]) -> str:
    """The figures in a line."""
    ends = values["top1_interval95_percent"]
    before = values.get("calibration_error_without_temperature_percent")
    return (
        f"loss {values['loss_nats']:.3f} nats, accuracy {values['top1_percent']:.2f} % "
        f"({values['correct']:,} of {values['clips']:,} clips"
        + (f"; 95 % interval {ends[0]:.1f} to {ends[1]:.1f} %)" if ends else ")")
        + (f", top-5 {values['top5_percent']:.2f} %" if values["top5_percent"] is not None else "")
        + f", mean of the classes {values['mean_class_accuracy_percent']:.2f} %"
        + f", calibration error {values['calibration_error_percent']:.1f} %"
        + (f" ({before:.1f} % without the temperature)" if before is not None else "")
    )


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def _per_class(predictions: Predictions) -> list[list[Any]]:
    rows: list[list[Any]] = []
    for label in np.unique(predictions.labels).tolist():
        of_class = predictions.labels == label
        wrong = predictions.predicted[of_class & ~predictions.correct]
        taken = predictions.classes[np.bincount(wrong).argmax()] if len(wrong) else ""
        right = int(predictions.correct[of_class].sum())
        rows.append(
            [
                predictions.classes[label],
                int(of_class.sum()),
                right,
                f"{100 * right / of_class.sum():.2f}",
                taken,
            ]
        )
    return rows


def _per_clip(predictions: Predictions) -> list[list[Any]]:
    rows = []
    for index, clip in enumerate(predictions.clips):
        label, predicted = clip.label, int(predictions.predicted[index])
        names = [predictions.classes[label], predictions.classes[predicted], int(label == predicted)]
        probabilities = map(repr, predictions.probabilities[index].tolist())
        rows.append([clip.name, clip.group_or_name, *names, *probabilities])
    return rows


def about(
    checkpoint: Checkpoint, path: Path, source: ClipSource, sampling: Sampling, split_number: int | str
) -> dict[str, Any]:
    """What it takes to repeat the test of a checkpoint, as plain values."""
    encoder = source.model.encoder
    return {
        "model": checkpoint.model.name,
        "streams": list(checkpoint.model.streams),
        "temperature": checkpoint.temperature,
        "trained_parameters": number_of_parameters(checkpoint.model.heads),
        "checkpoint": str(path),
        "checkpoint_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "epoch": checkpoint.epoch,
        "encoder": encoder.name,
        "encoder_trained_on": " + ".join(
            dict.fromkeys(own.spec.trained_on if own.pretrained else "" for own in source.model.encoders())
        ),
        "encoder_sha256": encoder.sha256(),
        "encoder_computed_in": source.computed_in,
        "further_sha256": {further.name: further.sha256() for further in source.model.encoders()[1:]},
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


def _write_mistakes(folder: Path, predictions: Predictions) -> None:
    """A picture for each class with mistakes; those of an earlier test, and no other files, are gone."""
    of_class: dict[str, list[int]] = {}
    for index in predictions.mistakes():
        of_class.setdefault(predictions.classes[predictions.labels[index]], []).append(index)
    earlier = {path for name in predictions.classes if (path := folder / f"{name}.png").is_file()}
    few = len(of_class) <= 20
    for name, indices in tqdm(of_class.items(), "mistakes", unit="class", dynamic_ncols=True, disable=few):
        rows = []
        for index in indices[:MISTAKES]:
            clip, taken_for = predictions.clips[index], predictions.classes[predictions.predicted[index]]
            percent = 100 * predictions.probabilities[index].max()
            caption = f"{clip.name}: taken for {taken_for}, {percent:.1f} %"
            try:
                places = np.linspace(0, clip.video.count() - 1, FRAMES).round().astype(int)
                rows.append((caption, list(clip.video.frames(np.unique(places)))))
            # The test took its embeddings from the cache, and counts.
            except (VideoError, OSError) as error:
                rows.append((f"{caption} ({error})", []))
        folder.mkdir(exist_ok=True)
        path = folder / f"{name}.png"
        write_whole(path, strips(rows))
        earlier.discard(path)
    for path in earlier:
        path.unlink()


def write_report(folder: Path, predictions: Predictions, about: dict[str, Any]) -> dict[str, Any]:
    """Write the files into a folder, each whole or not at all; returns what report.json holds.

    Args:
        about: as the function of this name gives it

    Raises: OSError if a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    measured, temperature = figures(predictions), about["temperature"]
    # The mean over several clips of a video is none of a softmax.
    if temperature != 1 and about["clips_per_video"] == 1:
        before = with_temperature(predictions.probabilities, 1 / temperature)
        error = Reliability.of(before, predictions.labels).error
        measured["calibration_error_without_temperature_percent"] = 100 * error
    mistakes = [
        {
            "clip": predictions.clips[index].name,
            "taken_for": predictions.classes[predictions.predicted[index]],
            "probability": float(predictions.probabilities[index].max()),
        }
        for index in predictions.mistakes()
    ]
    report = {
        "figures": measured,
        **about,
        "test_clips_sha256": names_sha256(predictions.clips),
        "mistakes": mistakes,
    }
    score = f"{measured['top1_percent']:.2f} % of {measured['clips']:,} clips"
    title = f"{about['model']}, {about['encoder']}, split {about['split_number']}: {score}"
    rows = _per_class(predictions)
    head = ["class", "clips", "correct", "accuracy_percent", "taken_for"]
    write_whole(folder / "classes.csv", csv_bytes([head, *rows]))
    head = ["clip", "group", "label", "predicted", "correct"]
    write_whole(
        folder / "predictions.csv", csv_bytes([[*head, *predictions.classes], *_per_clip(predictions)])
    )
    write_whole(
        folder / "confusion.png",
        confusion_matrix(predictions.classes, predictions.labels, predictions.predicted, title),
    )
    write_whole(folder / "classes.png", class_bars(rows, title))
    write_whole(folder / "reliability.png", reliability_diagram(predictions.reliability, title))
    write_whole(folder / "report.json", json_bytes(report))
    _write_mistakes(folder / "mistakes", predictions)
    return report
