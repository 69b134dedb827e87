"""A table of segments that is written while people look: each change is one new, whole file.

Other windows and other processes may change it too. Each change reads the file anew, under a lock beside it,
and leaves all rows and columns as they are that it is not about.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import filelock

from splits.segments import REQUIRED, Cells, Files, named, parse_seconds, read_cells, segments_of
from utils.files import csv_bytes, write_whole
from utils.process import UserError
from video.files import printable

# Characters of the longest name of an action, and seconds of the shortest segment.
LONGEST, SHORTEST = 100, 0.02
# Seconds that a change waits for another one.
PATIENCE = 10.0
# Columns that a new row takes from another row of its video.
OF_VIDEO = ("split", "group", "fold")


class Span(NamedTuple):
    """A segment of a video, which is named from the folder on; in seconds.

    `row` has the cells of a row that was taken out, as JSON, so that all of it can be put back.
    """

    video: str
    start: float
    end: float
    action: str
    row: str = ""


@dataclass(frozen=True)
class _Row:
    span: Span
    cells: tuple[str, ...]


class SpanError(UserError):
    """A segment that cannot be, whatever is in the table."""


def checked(span: Span) -> Span:
    """A segment as it is written. Raises: SpanError for times or a name that cannot be."""
    name = " ".join(span.action.split())
    if not name or name != printable(name):
        raise SpanError(f"an action must have a name that can be shown, not {printable(name[:40])!r}")
    if len(name) > LONGEST:
        raise SpanError(f"{name[:40]}...: {len(name)} characters; an action has at most {LONGEST}")
    start, end = round(max(0.0, span.start), 3), round(span.end, 3)
    if not SHORTEST <= end - start < math.inf:
        raise SpanError(
            f"{name}: a segment from {start} to {end} s is too short; mark its end after its start"
        )
    return span._replace(start=start, end=end, action=named(name))


class SegmentTable:
    """The file of segments in a folder of videos.

    Args:
        folder: of the videos; the table is segments.csv in it, made with the first segment
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "segments.csv"

    def stamp(self) -> tuple[int, int]:
        """Something that changes with the file; it is cheap."""
        try:
            status = self.path.stat()
        except OSError:
            return 0, 0
        return status.st_mtime_ns, status.st_size

    def read(self) -> list[Span]:
        """All segments, those of videos that are not there too. Raises: UserError with what is wrong."""
        return [row.span for row in self._read()[1]]

    def _read(self) -> tuple[Cells, list[_Row]]:
        if not self.path.exists():
            places = {name: place for place, name in enumerate(REQUIRED)}
            return Cells(list(REQUIRED), places, []), []
        cells = read_cells(self.path)
        if cells.rows:
            # What is wrong with a row.
            segments_of(self.path, cells.named_rows())
        rows, files, videos = list[_Row](), Files(self.folder), dict[str, str]()
        for _, row in cells.rows:
            own = cells.by_name(row)
            if (name := own["video"]) not in videos:
                path = files.find(name)
                videos[name] = printable(path.relative_to(self.folder).as_posix()) if path else name
            start, end = parse_seconds(own["start"]), parse_seconds(own["end"])
            rows.append(_Row(Span(videos[name], start, end, named(own["action"])), tuple(row)))
        return cells, rows

    def edit(self, remove: Iterable[Span], add: Iterable[Span]) -> tuple[list[Span], list[Span]]:
        """Take segments out and put others in, all or none; what is new cuts what it overlaps.

        Of one action, segments that overlap become one. What is to be removed and is not there is passed
        over, so that a change can be sent twice.

        Returns: segments that this took out and put in; the other way round it is undone.
        Raises: SpanError; UserError if the table is wrong, or cannot be written: then it is as it was before.
        """
        remove, add = {span._replace(row="") for span in remove}, [checked(span) for span in add]
        try:
            with filelock.FileLock(self.folder / ".segments.csv.lock", timeout=PATIENCE):
                cells, before = self._read()
                rows = [row for row in before if row.span not in remove]
                for span in add:
                    rows = _put(rows, span, cells)
                was, now = set(before), set(rows)
                out, new = [row for row in before if row not in now], [row for row in rows if row not in was]
                if out or new:
                    lines = [[*row.cells, *[""] * (len(cells.header) - len(row.cells))] for row in rows]
                    write_whole(self.path, csv_bytes([cells.header, *lines]))
        except filelock.Timeout as error:
            raise UserError(f"{self.path}: another program is writing it; try again") from error
        except OSError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{self.path}: cannot be written ({error.strerror or error})") from error
        return [row.span._replace(row=json.dumps(row.cells)) for row in out], [row.span for row in new]


def _put(rows: list[_Row], span: Span, cells: Cells) -> list[_Row]:
    """Rows with one more; of those that it overlaps stays what is outside of it."""
    left: list[_Row] = []
    start, end = span.start, span.end
    for row in rows:
        own = row.span
        if own.video != span.video or own.end <= span.start or own.start >= span.end:
            left.append(row)
        elif own.action == span.action:
            start, end = min(start, own.start), max(end, own.end)
        else:
            pieces = [(own.start, span.start), (span.end, own.end)]
            left += [_moved(row, a, b, cells) for a, b in pieces if b - a >= SHORTEST]
    new = list(map(str, json.loads(span.row))) if span.row else []
    new += [""] * (len(cells.header) - len(new))
    if not span.row:
        beside = next((cells.by_name(row.cells) for row in rows if row.span.video == span.video), None)
        values = {"video": span.video, "action": span.action}
        if beside:
            values |= {name: beside[name] for name in ("video", *OF_VIDEO) if name in beside}
        elif "split" in cells.places:
            values["split"] = "train"
        for name, value in values.items():
            new[cells.places[name]] = value
    return [*left, _moved(_Row(span._replace(row=""), tuple(new)), start, end, cells)]


def _moved(row: _Row, start: float, end: float, cells: Cells) -> _Row:
    new = list(row.cells)
    new[cells.places["start"]], new[cells.places["end"]] = f"{start:.3f}", f"{end:.3f}"
    return replace(row, span=row.span._replace(start=start, end=end), cells=tuple(new))
