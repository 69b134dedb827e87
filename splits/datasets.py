"""Data sets: UCF-101, HMDB-51, or any folder of class folders; a new one is one entry in `DATASETS`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from splits import folder, hmdb51, ucf101
from splits.split import RANDOM, Clip, Lists, Split, random_split
from utils.flags import accepted_by, setting
from utils.process import MissingFileError, UserError
from video.files import check_whole
from video.reader import Video

AUTO = "auto"
# Those whose lists are found without being named.
OFFICIAL = ("ucf101", "hmdb51")
# Of --split_number: each split of a data set in turn.
ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """How a data set is read.

    Attributes:
        lists_folder: of the official lists, as they are unpacked
        is_lists: whether a folder holds lists of its form
        numbers: of the splits whose lists are in a folder
        read_lists: the lists of a split out of that folder
        splits_are_whole: each split names every clip, on one side or the other
        source: what a clip is cut out of, by its name; None where that does not tell
        next_step: where there are no lists
    """

    lists_folder: str
    is_lists: Callable[[Path], bool]
    numbers: Callable[[Path], tuple[int, ...]]
    read_lists: Callable[[Path, int], Lists]
    splits_are_whole: bool
    source: Callable[[str], str | None]
    next_step: str


DATASETS = {
    "ucf101": Dataset(
        lists_folder="ucfTrainTestlist",
        is_lists=ucf101.is_lists,
        numbers=lambda _: ucf101.SPLIT_NUMBERS,
        read_lists=ucf101.read_lists,
        splits_are_whole=True,
        source=ucf101.source,
        next_step="unzip ucfTrainTestlist.zip, name it with --split_path",
    ),
    "hmdb51": Dataset(
        lists_folder="testTrainMulti_7030_splits",
        is_lists=hmdb51.is_lists,
        numbers=lambda _: hmdb51.SPLIT_NUMBERS,
        read_lists=hmdb51.read_lists,
        splits_are_whole=False,
        source=hmdb51.source,
        next_step=hmdb51.GET_LISTS,
    ),
    "folder": Dataset(
        lists_folder="lists",
        is_lists=folder.is_lists,
        numbers=folder.list_numbers,
        read_lists=ucf101.read_lists,
        splits_are_whole=True,
        source=folder.source,
        next_step="name the lists that training wrote into its folder below runs with --split_path",
    ),
}


def _check_pattern(text: str) -> None:
    try:
        re.compile(text)
    except re.error as error:
        raise UserError(f"{text!r} is no regular expression: {error}") from error


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Where the clips are, and the lists that name them."""

    dataset_path: Path = setting(
        Path("data/UCF-101"),
        "videos or extracted frames, in a folder for each class; default: data/UCF-101, for test.py what the "
        "checkpoint was trained on; videos take a fifth of the disk",
        Path,
    )
    split_path: Path | None = setting(
        None,
        "folder of the lists; default: the official ones where they fit, in data/ or beside the data set, "
        "for test.py those of the training; without any, folds are drawn from the clips and kept in the "
        "folder of the run",
        Path,
    )
    dataset: str = setting(
        AUTO,
        "auto (default) is ucf101 or hmdb51 where lists of that form fit, else folder: classes are the "
        "folders in --dataset_path, and its splits are five folds over groups of clips",
        choices=(AUTO, *DATASETS),
    )
    group_pattern: str | None = setting(
        None,
        "regular expression for the part of a file's name that tells which video a clip is cut out of, since "
        "such clips must lie on one side of a split: 'person[0-9]+' for example; default: by the form of "
        "UCF-101's or HMDB-51's names, else holiday_1 and holiday_2 are of one video, and names without a "
        "number of their own",
        accepted_by(_check_pattern),
    )


def split_number(text: str) -> int | str:
    """The value of --split_number: a number, or a word for several or for a random split."""
    return int(text) if text.isdecimal() else text


class Listed:
    """A data set's splits, in official lists or drawn from its clips.

    Args:
        data: where it is, as typed

    Attributes:
        name: in `DATASETS`
        path: folder of the lists; None where they are drawn from the clips, once

    Raises: MissingFileError or UserError if the data set or its lists are not there or are wrong.
    """

    def __init__(self, data: DataSettings) -> None:
        self.data = data
        self.name, self.path = find_lists(data)
        self._dataset = DATASETS[self.name]
        self._folds: folder.Folds | None = None
        self._pattern = data.group_pattern
        if self.path is None:
            self._folds = folder.draw_folds(data.dataset_path, data.group_pattern)
        elif not self.path.is_dir():
            raise MissingFileError(f"{self.path}: no such folder; {self._dataset.next_step}")
        elif folder.is_lists(self.path) and self._pattern is None:
            self._pattern = folder.read_pattern(self.path)

    @property
    def numbers(self) -> tuple[int, ...]:
        """Of the splits that there are."""
        if self._folds:
            return self._folds.numbers
        assert self.path
        return self._dataset.numbers(self.path)

    def lists(self, number: int | str) -> Lists:
        """What a split names. Raises: UserError for another number, or a wrong list; MissingFileError."""
        if number not in self.numbers:
            *most, last = map(str, self.numbers)
            raise UserError(
                f"split number {number} does not exist; choose {', '.join(most)}{' or ' * bool(most)}{last}"
            )
        assert isinstance(number, int)
        if self._folds:
            return self._folds.lists(number)
        assert self.path
        return self._dataset.read_lists(self.path, number)

    def split(self, number: int | str, *, seed: int = 0) -> Split:
        """The clips of a split that are there; arguments and errors are those of `load_split`."""
        if number == RANDOM:
            return random_split(self.split(1), seed)
        return self._split(self.lists(number))

    def all_clips(self) -> Split:
        """The clips of all splits, each once, as if all were trained on. Raises: as `load_split`."""
        numbers = self.numbers[:1] if self._dataset.splits_are_whole else self.numbers
        every = [self.lists(number) for number in numbers]
        entries = dict.fromkeys(entry for lists in every for entry in lists.train + lists.test)
        return self._split(Lists(every[0].classes, list(entries), []))

    def _split(self, lists: Lists) -> Split:
        path = self.data.dataset_path
        if not path.is_dir():
            raise MissingFileError(f"{path}: no such folder; name the data set with --dataset_path")
        if self.path:
            _check_classes(path, lists.classes, self.path)
        find = partial(_find, path, self._source)
        listed = lists.train + lists.test
        split = Split(lists.classes, find(lists.train), find(lists.test), len(listed))
        if not split.train and not split.test:
            expected = path / listed[0][0] if listed else path / "<Class>/<clip>.avi"
            raise MissingFileError(
                f"none of the {split.listed:,} listed clips is in {path}; expected for example "
                f"{expected}, or frames in the folder {expected.with_suffix('')}"
            )
        return split

    def _source(self, name: str) -> str | None:
        if self._pattern:
            return folder.group_of(name, self._pattern)
        return self._dataset.source(name)

    def keep(self, path: Path) -> None:
        """Write lists that were drawn into a folder. Raises: OSError if they cannot be written."""
        if self._folds:
            folder.write_lists(path, self._folds, self.data.group_pattern)

    def describe(self) -> list[str]:
        """What is worth knowing of splits that were drawn from the clips, in lines; else none."""
        if not self._folds:
            return []
        path = self.data.dataset_path
        places = [
            place for name in OFFICIAL for place in list_places(name, path) if DATASETS[name].is_lists(place)
        ]
        others = f", and the lists in {places[0]} name none of its clips" if places else ""
        rule = self.data.group_pattern or "the form of their names"
        lines = [
            f"{path}: its folders are the classes{others}: {len(self._folds.fold):,} clips of "
            f"{len(self._folds.classes):,} classes, {len(self._folds.numbers)} folds over groups by {rule}"
        ]
        if outside := folder.linked_outside(path, self._folds):
            lines.append(
                f"{len(outside):,} clips are links that leave {path} and are read where they lead, the first "
                f"{outside[0]}"
            )
        return lines


def find_lists(data: DataSettings) -> tuple[str, Path | None]:
    """The name of a data set, and the folder of its lists; None where they are to be drawn from the clips.

    Raises: MissingFileError if there is no folder to tell it from.
    """
    if data.split_path:
        of_form = [name for name in ("folder", "hmdb51") if DATASETS[name].is_lists(data.split_path)]
        return (data.dataset if data.dataset != AUTO else (*of_form, "ucf101")[0]), data.split_path
    if data.dataset == "folder":
        return "folder", None
    if data.dataset != AUTO:
        places = list_places(data.dataset, data.dataset_path)
        return data.dataset, next(filter(DATASETS[data.dataset].is_lists, places), places[0])
    if not data.dataset_path.is_dir():
        raise MissingFileError(f"{data.dataset_path}: no such folder; name the data set with --dataset_path")
    for name in OFFICIAL:
        for path in list_places(name, data.dataset_path):
            if DATASETS[name].is_lists(path) and _fit(name, path, data.dataset_path):
                return name, path
    return "folder", None


def list_places(name: str, dataset_path: Path) -> list[Path]:
    """Where official lists may be: in data/, beside the data set, and loose in it."""
    own = DATASETS[name].lists_folder
    return [Path("data") / own, dataset_path.parent / own, dataset_path]


def _fit(name: str, path: Path, dataset_path: Path) -> bool:
    """Whether a clip that the lists of the first split name is there."""
    lists = DATASETS[name].read_lists(path, 1)
    there = {label for label, name in enumerate(lists.classes) if (dataset_path / name).is_dir()}
    return any(_video(dataset_path, name) for name, label in lists.train + lists.test if label in there)


def _video(dataset_path: Path, name: str) -> Path | None:
    """The file or the folder of frames of a clip; None if it is not there."""
    file = dataset_path / name
    if file.is_file():
        return file
    return frames if (frames := file.with_suffix("")).is_dir() else None


def _find(
    dataset_path: Path, source: Callable[[str], str | None], entries: Sequence[tuple[str, int]]
) -> list[Clip]:
    clips = []
    for name, label in entries:
        if path := _video(dataset_path, name):
            if not path.is_dir():
                check_whole(path)
            clips.append(Clip(name, label, Video(path), source(name)))
    return clips


def _check_classes(dataset_path: Path, classes: Sequence[str], lists: Path) -> None:
    """Raises: UserError for a class folder that the lists do not name."""
    known = set(classes)
    unknown = sorted(path.name for path in folder.visible_folders(dataset_path) if path.name not in known)
    if unknown:
        where = lists / "classInd.txt" if (lists / "classInd.txt").is_file() else lists
        raise UserError(
            f"{dataset_path / unknown[0]}: the class {unknown[0]} is not in {where}; "
            "add it there, or move the folder away"
        )


def load_split(data: DataSettings, number: int | str, *, seed: int = 0) -> Split:
    """The clips of a split, from videos or from folders of extracted frames, whichever are there.

    Args:
        data: where the data set is
        number: of the split, or `RANDOM` for `random_split`
        seed: of the random split

    Raises: MissingFileError if a folder or list is not there, or none of the listed clips; UserError for
        another split number, a wrong list, or a class folder that the lists do not name; VideoError for
        a video that is empty or truncated.
    """
    return Listed(data).split(number, seed=seed)
