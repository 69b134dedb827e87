"""What is wrong with a data set: every clip decoded, every list compared with what is there."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from splits.datasets import DATASETS, DataSettings, Listed
from splits.folder import class_folders, clip_names
from video.decoder import TOLERATED
from video.files import VideoError, frame_files
from video.reader import Video


@dataclass
class Report:
    """The outcome of a check.

    Attributes:
        faults: lines about what would corrupt a result
        remarks: lines about what is harmless
        clips, frames: counted
    """

    faults: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    clips: int = 0
    frames: int = 0


@dataclass(frozen=True)
class _Looked:
    frames: int
    lost: int
    problems: list[str]
    stated: int
    digest: str
    error: str | None


def _look(path: Path) -> _Looked:
    """Decode all of a clip and hash its bytes."""
    video = Video(path)
    try:
        stated = video.stated_count()
        frames = sum(1 for _ in video.frames())
        digest = hashlib.sha256()
        for file in frame_files(path) if path.is_dir() else [path]:
            with file.open("rb") as opened:
                while block := opened.read(2**20):
                    digest.update(block)
    except (VideoError, OSError) as error:
        return _Looked(0, 0, [], 0, "", str(error))
    return _Looked(frames, video.lost, video.problems, stated, digest.hexdigest(), None)


def _names_class(path: Path, name: str) -> bool:
    """Whether a class is in a file's name, as UCF-101 writes it, in whatever case."""
    return f"_{name}_".lower() in f"_{path.name.removeprefix('v_')}".lower()


def check(data: DataSettings, *, threads: int) -> Report:
    """Decode everything and compare it with the lists of all splits.

    Raises: MissingFileError if a folder or list is not there; UserError for a list that is wrong in itself,
        a label that is not its class's among them.
    """
    report = Report()
    listed = Listed(data)
    classes: set[str] = set()
    sides: dict[str, dict[int, str]] = defaultdict(dict)
    for number in listed.numbers:
        lists = listed.lists(number)
        classes.update(lists.classes)
        for side, entries in (("train", lists.train), ("test", lists.test)):
            for name, _ in entries:
                if number in sides[name]:
                    report.faults.append(
                        f"{listed.path}: {name} stands twice in the lists of split {number}, "
                        f"{sides[name][number]} and {side}"
                    )
                sides[name][number] = side
    report.remarks += listed.describe()
    there = {name: path for folder in class_folders(data.dataset_path) for name, path in clip_names(folder)}
    report.clips = len(there)
    same: dict[str, list[str]] = defaultdict(list)
    with ThreadPoolExecutor(threads) as pool:
        looks = pool.map(_look, there.values())
        bar = tqdm(
            zip(there, looks, strict=True), desc="checking", total=len(there), unit="clip", dynamic_ncols=True
        )
        for name, look in bar:
            report.frames += look.frames
            if look.error is not None:
                report.faults.append(look.error)
                continue
            same[look.digest].append(name)
            if look.problems:
                many = look.lost > TOLERATED * (look.frames + look.lost)
                lines = report.faults if many else report.remarks
                lines += [f"{there[name]}: {problem}" for problem in look.problems]
            elif look.frames < look.stated:
                report.remarks.append(
                    f"{there[name]}: {look.frames} frames decode, its index claims {look.stated}"
                )
            folder = name.split("/")[0]
            if folder not in classes:
                report.faults.append(f"{there[name]}: the class {folder} is not in the lists")
            elif DATASETS[listed.name].names_class and not _names_class(there[name], folder):
                report.faults.append(
                    f"{there[name]}: lies in the folder {folder}, and its name tells another class"
                )
            elif name not in sides:
                report.remarks.append(f"{there[name]}: in no list")
    for names in same.values():
        if len(names) > 1:
            _duplicates(names, sides, listed.numbers, report)
    gone = [name for name in sides if name not in there]
    if gone:
        report.remarks.append(
            f"{len(gone):,} of {len(sides):,} listed clips are not there, the first {gone[0]}"
        )
    return report


def _duplicates(
    names: list[str], sides: dict[str, dict[int, str]], numbers: Sequence[int], report: Report
) -> None:
    where = [
        f"{name} ({', '.join(f'{side} {number}' for number, side in sides[name].items()) or 'in no list'})"
        for name in names
    ]
    line = f"the same bytes: {'; '.join(where)}"
    labels = {name.split("/")[0] for name in names}
    leaks = any(len({sides[name].get(number) for name in names} - {None}) > 1 for number in numbers)
    if leaks or len(labels) > 1:
        why = "on both sides of a split" if leaks else "under two classes"
        report.faults.append(f"{line}: {why}")
    else:
        report.remarks.append(line)
