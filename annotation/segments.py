"""What the probabilities of a video's frames come to: labels that last, segments, and tables of them."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np

from utils.files import csv_bytes, json_bytes, write_whole

T = TypeVar("T")
# The label of a frame without an action, and what it is called.
NONE, NO_ACTION = -1, "no action"


def label_of(probabilities: np.ndarray, min_probability: float) -> int:
    """The most probable action out of (C,); `NONE` where it is less probable than that."""
    label = int(probabilities.argmax())
    return label if probabilities[label] >= min_probability else NONE


def name_of(label: int, classes: Sequence[str]) -> str:
    """What a label is called."""
    return NO_ACTION if label == NONE else classes[label]


class Steady:
    """Labels that last: one holds until it has been away for some seconds; the commonest since then follows.

    Attributes:
        label: that holds; None before the first
        away: seconds of each other label since it was seen last
    """

    def __init__(self, seconds: float) -> None:
        # A frame's time is no round number.
        self._seconds = seconds - 1e-6
        self.label: int | None = None
        self.away: Counter[int] = Counter()

    def add(self, label: int, elapsed: float) -> int:
        """The label that holds, after one that lasts `elapsed` seconds."""
        if self.label is None or label == self.label:
            self.begin()
            self.label = label
            return label
        self.away[label] += elapsed  # type: ignore[assignment]
        if self.away.total() >= self._seconds:
            follows = self.away.most_common(1)[0][0]
            self.begin()
            self.label = follows
        return self.label

    def begin(self) -> None:
        """Forget what was before."""
        self.label = None
        self.away.clear()


def steady(rows: Iterable[tuple[T, int, bool, float]], seconds: float) -> Iterator[tuple[T, int]]:
    """What comes with labels; a label that lasts less than `seconds` gives way to the one before it.

    Args:
        rows: with the label of each, whether it is the first of a shot, where labels begin anew, and for how
            many seconds it is shown
    """
    lasting, waiting, holds = Steady(seconds), deque[T](), NONE
    for row, label, begins, shown in rows:
        if begins:
            # At the end of a shot nothing follows.
            yield from ((each, holds) for each in waiting)
            waiting.clear()
            lasting.begin()
        waiting.append(row)
        holds = lasting.add(label, shown)
        if not lasting.away:
            yield from ((each, holds) for each in waiting)
            waiting.clear()
    yield from ((each, holds) for each in waiting)


@dataclass(frozen=True)
class Segment:
    """Consecutive frames with one label.

    Attributes:
        first, last: frame numbers
        label: of the action, or `NONE`
        probability: mean over the frames; of no action, that of the most probable one
    """

    first: int
    last: int
    label: int
    probability: float


def segments(probabilities: np.ndarray, labels: np.ndarray) -> list[Segment]:
    """Runs of frames with the same label, out of probabilities (frames, C) and labels (frames,)."""
    ends = [*np.flatnonzero(np.diff(labels)).tolist(), len(labels) - 1] if len(labels) else []
    starts = [0, *(end + 1 for end in ends[:-1])]
    found = []
    for first, last in zip(starts, ends, strict=True):
        label, rows = int(labels[first]), probabilities[first : last + 1]
        of_frame = rows.max(1) if label == NONE else rows[:, label]
        found.append(Segment(first, last, label, float(of_frame.mean())))
    return found


def shown_at(frame: int, fps: Fraction, times: Sequence[Fraction] | None = None) -> float:
    """When a frame of a video is shown, in seconds.

    Args:
        times: of the first frames, in seconds; those after them follow at `fps`, all where there is none
    """
    known = times or [Fraction(0)]
    last = min(frame, len(known) - 1)
    return float(known[last] + (frame - last) / fps)


def write_tables(
    path: Path,
    probabilities: np.ndarray,
    labels: np.ndarray,
    runs: Sequence[Segment],
    classes: Sequence[str],
    fps: Fraction,
    about: dict[str, object],
    times: Sequence[Fraction] | None = None,
) -> tuple[Path, Path]:
    """Write <path>.json, with segments and all that is known, and <path>.csv, a row for each frame.

    Args:
        path: without suffix
        probabilities, labels: (frames, C) and (frames,)
        runs: the `segments` of them
        about: more for the JSON file
        times: when each frame is shown, in seconds; None at a steady `fps`

    Returns: the two files.
    Raises: OSError if one cannot be written.
    """

    def second(frame: int) -> float:
        return round(shown_at(frame, fps, times), 4)

    listed = [
        {
            "action": name_of(segment.label, classes),
            "start_seconds": second(segment.first),
            "end_seconds": second(segment.last + 1),
            "first_frame": segment.first,
            "last_frame": segment.last,
            "mean_probability": round(segment.probability, 6),
        }
        for segment in runs
    ]
    whole = {**about, "frames": len(probabilities), "fps": str(fps), "segments": listed}
    head = ["frame", "second", "action", *classes]
    rows = (
        [number, second(number), name_of(label, classes), *(f"{value:.6f}" for value in row)]
        for number, (label, row) in enumerate(zip(labels.tolist(), probabilities, strict=True))
    )
    files = path.with_name(path.name + ".json"), path.with_name(path.name + ".csv")
    write_whole(files[0], json_bytes(whole))
    write_whole(files[1], csv_bytes(chain([head], rows)))
    return files
