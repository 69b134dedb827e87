"""How well the segments of long videos were found: the field's measures, each with an interval over videos.

Frame accuracy counts frames. The segmental F1 and the edit score count segments, those of no action aside
(Lea et al., CVPR 2017; Farha and Gall, CVPR 2019). The mean average precision looks for each segment by
itself (ActivityNet; Caba Heilbron et al., CVPR 2015).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np

from annotation.labels import runs
from annotation.overlay import NONE
from annotation.recognizer import Recognition

OVERLAPS, IOUS = (0.1, 0.25, 0.5), (0.3, 0.4, 0.5, 0.6, 0.7)
RESAMPLES = 500
# A frame that a segment begins with may be shown a moment before that.
ROUNDED = 2e-3


class Run(NamedTuple):
    """Consecutive frames of one label, in seconds; `score` tells how sure a prediction is."""

    label: int
    start: float
    end: float
    score: float = 1.0


@dataclass(frozen=True)
class Timeline:
    """What a video shows, and what was predicted.

    Attributes:
        name: of the video
        group: that it is of
        times: second of each frame, and that at which the last one ends, (N + 1,)
        truth, predicted: labels of its frames (N,); `NONE` for no action
        true_runs, predicted_runs: the segments that these are, those of no action left out
    """

    name: str
    group: str
    times: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray
    true_runs: list[Run]
    predicted_runs: list[Run]

    @classmethod
    def of(
        cls, recognition: Recognition, name: str, group: str, spans: Iterable[tuple[int, tuple[float, float]]]
    ) -> Self:
        """Of what was recognized in a video, and its true segments: label, start and end in seconds."""
        times, truth = recognition.times, np.full(len(recognition.labels), NONE)
        for label, (start, end) in spans:
            truth[(times[:-1] >= start - ROUNDED) & (times[:-1] < end - ROUNDED)] = label
        true = [Run(int(truth[first]), times[first], times[last + 1]) for first, last in runs(truth)]
        found = [Run(each.label, each.start, each.end, each.probability) for each in recognition.segments]
        labeled = ([run for run in either if run.label != NONE] for either in (true, found))
        return cls(name, group, times, truth, recognition.labels, *labeled)


def overlap(run: Run, others: Sequence[Run]) -> np.ndarray:
    """Intersection over union of the seconds of a run and of others, (len(others),)."""
    starts, ends = np.array([each.start for each in others]), np.array([each.end for each in others])
    shared = np.minimum(ends, run.end) - np.maximum(starts, run.start)
    return shared.clip(0) / (np.maximum(ends, run.end) - np.minimum(starts, run.start))


def matches(predicted: Sequence[Run], truth: Sequence[Run], least: float) -> int:
    """Predicted runs that are right: each true one is found once, by the first that overlaps it most."""
    found: set[int] = set()
    for run in predicted:
        same = [place for place, other in enumerate(truth) if other.label == run.label]
        if same:
            share = overlap(run, [truth[place] for place in same])
            best = int(share.argmax())
            if share[best] >= least:
                found.add(same[best])
    return len(found)


def edit_score(predicted: Sequence[int], truth: Sequence[int]) -> float:
    """How alike two orders of labels are, in %: 100 x (1 - Levenshtein distance / the longer length)."""
    row = list(range(len(truth) + 1))
    for number, label in enumerate(predicted, 1):
        before, row[0] = row[0], number
        for place, other in enumerate(truth, 1):
            before, row[place] = (
                row[place],
                min(row[place] + 1, row[place - 1] + 1, before + (label != other)),
            )
    return 100 * (1 - row[-1] / max(len(predicted), len(truth), 1))


def detections(timelines: Sequence[Timeline], label: int, least: float) -> list[np.ndarray]:
    """Of each video the predictions of an action: score, and 1 where it is right, (n, 2).

    The most certain is matched first, with the true segment that it overlaps most and that is still free.
    """
    found = []
    for line in timelines:
        truth = [run for run in line.true_runs if run.label == label]
        own = sorted((run for run in line.predicted_runs if run.label == label), key=lambda run: -run.score)
        free, rows = np.ones(len(truth), bool), np.zeros((len(own), 2))
        for row, run in zip(rows, own, strict=True):
            share = np.where(free, overlap(run, truth), -1) if truth else np.empty(0)
            row[0] = run.score
            if len(share) and share.max() >= least:
                free[share.argmax()], row[1] = False, 1
        found.append(rows)
    return found


def average_precision(found: np.ndarray, truth: int) -> float:
    """Area below the interpolated curve of precision over recall, in %.

    Args:
        found: score of each prediction, and 1 where it is right, (n, 2)
        truth: number of true segments
    """
    right = found[np.argsort(-found[:, 0], kind="stable"), 1].cumsum()
    precision = right / np.arange(1, len(right) + 1)
    # The best precision at this recall or a greater one.
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return 100 * float((np.diff(right, prepend=0) * precision).sum()) / truth


def measure(timelines: Sequence[Timeline]) -> Callable[[Sequence[int]], dict[str, float]]:
    """A function that gives each measure in % by its name, of some of the videos by their numbers."""
    labels = sorted({run.label for line in timelines for run in line.true_runs})
    precise = {(label, iou): detections(timelines, label, iou) for label in labels for iou in IOUS}
    numbers = []
    for line in timelines:
        right, action = line.truth == line.predicted, line.truth != NONE
        own, true = line.predicted_runs, line.true_runs
        numbers.append([
            right.sum(), right.size, (right & action).sum(), action.sum(), (right & ~action).sum(),
            (~action).sum(), *(matches(own, true, least) for least in OVERLAPS), len(own) + len(true),
            edit_score([run.label for run in own], [run.label for run in true]),
            *(sum(run.label == label for run in true) for label in labels),
        ])  # fmt: skip
    table = np.array(numbers, float)

    def of(videos: Sequence[int]) -> dict[str, float]:
        right, frames, right_action, actions, right_none, none, *rest = table[videos].sum(0).tolist()
        values = {"frame accuracy": 100 * right / frames}
        values["frame accuracy of actions"] = 100 * right_action / max(1, actions)
        values["frame accuracy of no action"] = 100 * right_none / max(1, none)
        both, edits, *counts = rest[len(OVERLAPS) :]
        for least, hits in zip(OVERLAPS, rest, strict=False):
            values[f"F1@{100 * least:.0f}"] = 100 * 2 * hits / max(1, both)
        values["edit score"] = edits / len(videos)
        precisions = []
        for iou in IOUS:
            of_label = [
                average_precision(np.concatenate([precise[label, iou][video] for video in videos]), count)
                for label, count in zip(labels, counts, strict=True)
                if count
            ]
            values[f"mAP@{iou}"] = float(np.mean(of_label)) if of_label else 0.0
            precisions.append(values[f"mAP@{iou}"])
        return values | {"mean mAP": float(np.mean(precisions))}

    return of


def measures(
    timelines: Sequence[Timeline], *, intervals: bool = True
) -> dict[str, tuple[float, tuple[float, float] | None]]:
    """Each measure in % by its name, and its 95 % interval: the percentile bootstrap over groups of videos.

    Returns: None for intervals where there are fewer than two groups, or none is wanted.
    """
    of, group = measure(timelines), np.unique([line.group for line in timelines], return_inverse=True)[1]
    values, members = of(range(len(timelines))), [np.flatnonzero(group == each) for each in np.unique(group)]
    if len(members) < 2 or not intervals:
        return {name: (value, None) for name, value in values.items()}
    rng = np.random.default_rng(0)
    draws = [
        of(np.concatenate([members[each] for each in rng.integers(0, len(members), len(members))]).tolist())
        for _ in range(RESAMPLES)
    ]
    ends = {name: np.percentile([draw[name] for draw in draws], [2.5, 97.5]).tolist() for name in values}
    return {name: (value, (ends[name][0], ends[name][1])) for name, value in values.items()}
