"""What is wrong with a data set: every clip decoded, every list compared with what is there."""

from __future__ import annotations

import hashlib
from collections import defaultdict
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
    """The outcome of a check: what would corrupt a result, what is harmless, and what was counted."""

    faults: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    clips: int = 0
    frames: int = 0


def _decode(path: Path) -> tuple[Video, int, int, str] | str:
    """Decode all of a clip and hash its bytes: frames, stated frames, SHA-256; or the error."""
    video, digest = Video(path), hashlib.sha256()
    try:
        stated = video.stated_count()
        frames = sum(1 for _ in video.frames())
        for file in frame_files(path) if path.is_dir() else [path]:
            with file.open("rb") as opened:
                while block := opened.read(2**20):
                    digest.update(block)
    except (VideoError, OSError) as error:
        return str(error)
    return video, frames, stated, digest.hexdigest()


def check(data: DataSettings, *, threads: int) -> Report:
    """Decode everything and compare it with the lists of all splits. Raises: as `Listed.lists`."""
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
        decoded = pool.map(_decode, there.values())
        bar = tqdm(decoded, desc="checking", total=len(there), unit="clip", dynamic_ncols=True)
        for (name, path), found in zip(there.items(), bar, strict=True):
            if isinstance(found, str):
                report.faults.append(found)
                continue
            video, frames, stated, digest = found
            report.frames += frames
            same[digest].append(name)
            if video.problems:
                many = video.lost > TOLERATED * (frames + video.lost)
                lines = report.faults if many else report.remarks
                lines += [f"{path}: {problem}" for problem in video.problems]
            elif frames < stated:
                report.remarks.append(f"{path}: {frames} frames decode, its index claims {stated}")
            class_name = name.split("/")[0]
            # As UCF-101 writes it, in whatever case.
            in_name = f"_{class_name}_".lower() in f"_{path.name.removeprefix('v_')}".lower()
            if class_name not in classes:
                report.faults.append(f"{path}: the class {class_name} is not in the lists")
            elif DATASETS[listed.name].names_class and not in_name:
                report.faults.append(
                    f"{path}: lies in the folder {class_name}, and its name tells another class"
                )
            elif name not in sides:
                report.remarks.append(f"{path}: in no list")
    for names in same.values():
        if len(names) == 1:
            continue
        where = [", ".join(f"{side} {number}" for number, side in sides[name].items()) for name in names]
        both = [f"{name} ({lists or 'in no list'})" for name, lists in zip(names, where, strict=True)]
        line = f"the same bytes: {'; '.join(both)}"
        if any(len({sides[name].get(number) for name in names} - {None}) > 1 for number in listed.numbers):
            report.faults.append(f"{line}: on both sides of a split")
        elif len({name.split("/")[0] for name in names}) > 1:
            report.faults.append(f"{line}: under two classes")
        else:
            report.remarks.append(line)
    gone = [name for name in sides if name not in there]
    if gone:
        report.remarks.append(
            f"{len(gone):,} of {len(sides):,} listed clips are not there, the first {gone[0]}"
        )
    return report
