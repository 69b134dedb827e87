"""Long videos, and a table of which action each shows when: every segment is a clip.

segments.csv        video,start,end,action          seconds, or hours:minutes:seconds; "," ";" or tabs
                    split: train, val or test       optional, the same for all rows of a video
                    group                           optional; default: each video is a group of its own
annotations.json    as ActivityNet's: database -> <video> -> subset, annotations -> segment, label

What no segment covers in these videos is "no action", a class of its own. The names of BORIS's and ELAN's
columns are known too; docs/data.md shows how to get there from other programs.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from splits.folder import FOLDS
from splits.split import NO_ACTION, Clip, Split, check_number, stratified_folds
from utils.files import csv_bytes, write_whole
from utils.process import MissingFileError, UserError
from video.files import VIDEO_SUFFIXES, printable
from video.reader import Video

if TYPE_CHECKING:
    from splits.datasets import DataSettings

COLUMNS = {
    "video": ("video", "media file name"),
    "start": ("start", "start (s)", "begin time - ss.msec"),
    "end": ("end", "stop (s)", "end time - ss.msec"),
    "action": ("action", "behavior", "label"),
    "split": ("split", "subset"),
    "group": ("group",),
    "fold": ("fold",),
}
REQUIRED, KEPT = ("video", "start", "end", "action"), "segments.csv"
SIDES = {"train": "train", "training": "train", "val": "val", "validation": "val", "test": "test",
         "testing": "test"}  # fmt: skip
# Seconds by which neighbors may overlap: a rounded number.
ROUNDED = 2e-3
# Seconds by which a segment may end behind its video.
BEHIND = 1.0


@dataclass(frozen=True)
class Segment:
    """A row of the table; `side` and `fold` are "" and 0 where it says nothing of them."""

    where: str
    video: str
    start: float
    end: float
    action: str
    side: str = ""
    group: str = ""
    fold: int = 0


def parse_seconds(text: str) -> float:
    """Seconds out of 12.5, 1:02.5 or 0:01:02.5; a comma is a point. Raises: ValueError for anything else."""
    parts = [float(part) for part in text.replace(",", ".").split(":")]
    seconds = sum(part * 60**power for power, part in enumerate(reversed(parts)))
    if len(parts) > 3 or not 0 <= seconds < math.inf or min(parts) < 0:
        raise ValueError(text)
    return seconds


def _seconds(text: str, where: str) -> float:
    try:
        return parse_seconds(text)
    except ValueError:
        raise UserError(f"{where} {text!r} is no time; write seconds, or hours:minutes:seconds") from None


@dataclass(frozen=True)
class Cells:
    """A table as it stands in its file: `places` are those of the columns that we know."""

    header: list[str]
    places: dict[str, int]
    rows: list[tuple[int, list[str]]]  # number of the line, cells

    def by_name(self, cells: Sequence[str]) -> dict[str, str]:
        """The cells of a row by our names of the columns."""
        return {name: cells[at].strip() for name, at in self.places.items() if at < len(cells)}

    def named_rows(self) -> Iterator[tuple[str, dict[str, str]]]:
        """Where each row stands, and its cells by our names of the columns."""
        yield from ((f"row {number}", self.by_name(row)) for number, row in self.rows)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8; save the table as CSV in UTF-8") from error


def read_cells(path: Path) -> Cells:
    """The cells of a table in CSV. Raises: UserError for one that lacks a column; OSError."""
    text = _text(path)
    first = text.split("\n", 1)[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count))
    header = [cell.strip() for cell in next(reader, [])]
    lower = [cell.lower() for cell in header]
    places = {
        name: next(lower.index(column) for column in columns if column in lower)
        for name, columns in COLUMNS.items()
        if set(columns) & set(lower)
    }
    if missing := [name for name in REQUIRED if name not in places]:
        raise UserError(
            f"{path}, row 1: no column {missing[0]}; the first row names the columns, "
            f"{','.join(REQUIRED)} and perhaps split, group"
        )
    rows = [(reader.line_num, cells) for cells in reader if any(map(str.strip, cells))]
    return Cells(header, places, rows)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Where each row of a table stands, and its cells by our names of the columns."""
    if path.suffix.lower() == ".json":
        yield from _activitynet(path, _text(path))
        return
    yield from read_cells(path).named_rows()


def _activitynet(path: Path, text: str) -> Iterator[tuple[str, dict[str, str]]]:
    try:
        for video, entry in json.loads(text)["database"].items():
            for number, each in enumerate(entry["annotations"], 1):
                start, end = map(str, each["segment"])
                yield f"{video}, annotation {number}", {
                    "video": video, "start": start, "end": end, "action": str(each["label"]),
                    "split": str(entry["subset"]),
                }  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not ActivityNet's form, database -> <video> -> subset, annotations -> segment, label"
        ) from error


def named(action: str) -> str:
    """The name of an action as it is kept: no action in any capitals is one."""
    return NO_ACTION if action.lower() == NO_ACTION else action


def read_segments(path: Path) -> list[Segment]:
    """The segments of a table, as `segments_of`. Raises: MissingFileError; as that."""
    if not path.is_file():
        what = "a folder, and no table" if path.is_dir() else "no such table"
        raise MissingFileError(f"{path}: {what}; name it with --segments")
    return segments_of(path, _rows(path))


def segments_of(path: Path, rows: Iterable[tuple[str, dict[str, str]]]) -> list[Segment]:
    """The segments of a table's rows, by video and start; overlapping ones of one action become one.

    Raises: UserError with the row for a wrong one, or for a table without any.
    """
    segments = []
    for where, row in rows:
        at = f"{path}, {where}"
        if empty := [name for name in REQUIRED if not row.get(name)]:
            raise UserError(f"{at}: no {empty[0]}; fill it in, or delete the row")
        start, end = (_seconds(row[name], f"{at}: {name}") for name in ("start", "end"))
        if end <= start:
            raise UserError(f"{at}: it ends at {row['end']}, and starts at {row['start']}; swap the two?")
        side = row.get("split", "").lower()
        if side not in SIDES and ("split" in row or side):
            raise UserError(
                f"{at}: split {row['split']!r} is none of train, val, test; fill it in, or leave the column "
                "out"
            )
        fold = row.get("fold", "0") or "0"
        if not (fold.isdecimal() and int(fold) <= len(FOLDS)):
            raise UserError(f"{at}: fold {fold!r} is none of 1 to {len(FOLDS)}; or leave the column out")
        segments.append(
            Segment(
                where, row["video"], start, end, named(row["action"]), SIDES.get(side, ""),
                row.get("group") or row["video"], int(fold),
            )
        )  # fmt: skip
    if not segments:
        raise UserError(f"{path}: no segment in it; write a row for each, {','.join(REQUIRED)}")
    segments.sort(key=lambda each: (each.video, each.start, each.end))
    whole: list[Segment] = []
    for each in segments:
        before = whole[-1] if whole and whole[-1].video == each.video else None
        if before and (before.side, before.group, before.fold) != (each.side, each.group, each.fold):
            raise UserError(
                f"{path}, {each.where}: {printable(each.video)} has another split or group in "
                f"{before.where}; a video is on one side"
            )
        if before and each.start < before.end - ROUNDED:
            if before.action != each.action:
                raise UserError(
                    f"{path}, {each.where}: {each.action} overlaps {before.action} of {before.where}; a "
                    "moment has one action, so cut one of the two"
                )
            whole[-1] = replace(before, end=max(before.end, each.end))
        else:
            whole.append(each)
    return whole


class Files:
    """The videos of a folder by the names that a table has for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def _by_name(self) -> dict[str, Path]:
        """Videos by their name and their stem, for tables that say no more."""
        paths = [path for path in sorted(self.folder.rglob("*"))
                 if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()]  # fmt: skip
        return {key: path for path in reversed(paths) for key in (path.stem, path.name)}

    def find(self, name: str) -> Path | None:
        """The file of a video that a table names: below the folder, else by its last part."""
        path = self.folder / name
        if not Path(name).is_absolute() and ".." not in path.parts and path.is_file():
            return path
        last = name.replace("\\", "/").rsplit("/", 1)[-1]
        return self._by_name.get(last) or self._by_name.get(f"v_{last}")


class SegmentedVideos:
    """A data set of segments, as `datasets.Listed` is one of clips.

    Raises: as `read_segments`; MissingFileError if none of the videos is there; UserError if there is nothing
        to train on or to test.
    """

    name, path = "segments", None

    def __init__(self, data: DataSettings) -> None:
        assert data.segments
        self.data, self.table, self.notes = data, data.segments, list[str]()
        self.segments = read_segments(self.table)
        if not data.dataset_path.is_dir():
            raise MissingFileError(
                f"{data.dataset_path}: no such folder; name that of the videos with --dataset_path"
            )
        named, files = {each.video: each.where for each in self.segments}, Files(data.dataset_path)
        self.videos = {name: path for name in named if (path := files.find(name))}
        # From the data set on.
        self.names = {
            name: path.relative_to(data.dataset_path).as_posix() for name, path in self.videos.items()
        }
        self.gone = [
            f"{printable(name)} ({where})" for name, where in named.items() if name not in self.videos
        ]
        if not self.videos:
            raise MissingFileError(
                f"{self.table}: none of its {len(named):,} videos is in {data.dataset_path}, for example "
                f"{self.gone[0]}; name their folder with --dataset_path"
            )
        self.found = [each for each in self.segments if each.video in self.videos]
        self.actions = sorted({each.action for each in self.found} - {NO_ACTION})
        first: dict[str, str] = {}
        for name, whole in self.names.items():
            if first.setdefault(whole, name) != name:
                raise UserError(
                    f"{self.table}, {named[name]}: {printable(name)} is {printable(first[whole])} of "
                    f"{named[first[whole]]}; write one name for one video"
                )
        if self.found[0].side:
            self.numbers: tuple[int, ...] = (1,)
            sides_there = {each.side for each in self.found}
            for side in ("train", "test"):
                # As ActivityNet is published, whose test has no labels.
                if side not in sides_there and {"train", "val", "test"} - sides_there == {side}:
                    self.found = [
                        replace(each, side=side) if each.side == "val" else each for each in self.found
                    ]
                    self.notes.append(f"{self.table}: no {side} split, so val takes its place")
                elif side not in sides_there:
                    raise UserError(
                        f"{self.table}: no row has the split {side}; change some, or leave the column out"
                    )
            sides: dict[str, str] = {}
            for each in self.found:
                if sides.setdefault(each.group, each.side) != each.side:
                    raise UserError(f"{self.table}, {each.where}: the group {each.group} is on two sides")
        else:
            if not self.found[0].fold:
                self.found = self._draw_folds()
            self.numbers = tuple(range(1, 1 + max(each.fold for each in self.found)))

    def _draw_folds(self) -> list[Segment]:
        """The segments with a fold each: groups stay together, actions are spread; always the same."""
        groups = [each.group for each in self.found]
        count = min(len(FOLDS), len(set(groups)))
        if count < 2:
            raise UserError(
                f"{self.table}: all its segments are of one video or group; add those of another, or name "
                "what trains and what tests in a column split"
            )
        folds = stratified_folds([each.action for each in self.found], groups, count)
        # A fold may be empty where groups are large.
        used = {fold: number for number, fold in enumerate(sorted(set(folds)), 1)}
        return [replace(each, fold=used[fold]) for each, fold in zip(self.found, folds, strict=True)]

    def split(self, number: int | str) -> Split:
        """The segments of a split. Raises: UserError for a number that does not exist."""
        check_number(number, self.numbers)
        classes, sides = [*self.actions, NO_ACTION], defaultdict[str, list[Clip]](list)
        labels = {name: label for label, name in enumerate(classes)}
        videos = {name: Video(path) for name, path in self.videos.items()}
        for each in self.found:
            side = each.side or ("test" if each.fold == number else "train")
            name, span = self.names[each.video], (each.start, each.end)
            sides[side].append(Clip(name, labels[each.action], videos[each.video], each.group, span))
        return Split(classes, sides["train"], sides["test"], len(self.found), sides["val"])

    def check_ends(self, ends: Mapping[str, float]) -> None:
        """Raises: UserError for a segment that ends behind its video, of some by name with their seconds."""
        for each in self.found:
            end = ends.get(self.names[each.video], math.inf)
            if each.end > end + BEHIND:
                raise UserError(
                    f"{self.table}, {each.where}: the segment ends at {each.end:.2f} s, and "
                    f"{printable(each.video)} at {end:.2f} s; correct the row"
                )

    def keep(self, folder: Path) -> None:
        """Write the table with the folds that were drawn. Raises: OSError if it cannot be written."""
        folder.mkdir(parents=True, exist_ok=True)
        last = "split" if self.found[0].side else "fold"
        rows = [
            [each.video, each.start, each.end, each.action, each.group, each.side or each.fold]
            for each in self.found
        ]
        write_whole(folder / KEPT, csv_bytes([[*REQUIRED, "group", last], *rows]))

    def describe(self) -> list[str]:
        """What is read, in lines."""
        lines = [
            *self.notes,
            f"{self.table}: {len(self.found):,} segments of {len(self.actions):,} actions in "
            f"{len(self.videos):,} videos"
            + ("" if self.found[0].side else f", {len(self.numbers)} folds over groups of videos"),
        ]
        groups: dict[str, set[str]] = defaultdict(set)
        for each in self.found:
            groups[each.action].add(each.group)
        trained = {each.action for each in self.found if each.side == "train"}
        alone = [
            name
            for name, members in groups.items()
            if (name not in trained if self.found[0].side else len(members) < 2)
        ]
        if alone:
            where = (
                "have no segment to train on"
                if self.found[0].side
                else ("are in one group only, so that the split that tests them does not train on them")
            )
            lines.append(f"warning: {len(alone):,} of the actions {where}, the first {alone[0]}")
        if self.gone:
            lines.append(
                f"warning: {len(self.gone):,} of the videos are not in {self.data.dataset_path}, the first "
                f"{self.gone[0]}; going on without them"
            )
        return lines


def uncovered(spans: list[tuple[float, float]], end: float, piece: float) -> list[tuple[float, float]]:
    """What sorted spans leave of the seconds from 0 to `end`, in pieces of at most `piece` seconds."""
    edges = [0.0, *(min(second, end) for span in spans for second in span), end]
    pieces: list[tuple[float, float]] = []
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        if stop <= start:
            continue
        count = max(1, math.ceil((stop - start) / piece))
        cuts = [start + (stop - start) * place / count for place in range(count + 1)]
        pieces += pairwise(cuts)
    return pieces
