"""Data sets: UCF-101, HMDB-51, or any folder of class folders; a new one is one entry in `DATASETS`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from splits import folder, hmdb51, ucf101
from splits.split import RANDOM, Lists, Split, find_clips, random_split
from utils.flags import accepted_by, setting
from utils.process import MissingFileError, UserError, say
from video.files import VIDEO_SUFFIXES

AUTO = "auto"
# Of --split_number: each split of a data set in turn.
ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """How a data set is read.

    Attributes:
        lists_folder: of the official lists, as they are unpacked; None where there are none
        is_lists: whether a folder holds lists of its form
        numbers: of the splits whose lists are in a folder
        read_lists: the lists of a split out of that folder
        splits_are_whole: each split names every clip, on one side or the other
        source: what a clip is cut out of, by its name; None where that does not tell
        names_class: a clip's name holds that of its class
        next_step: where there are no lists
    """

    lists_folder: str | None
    is_lists: Callable[[Path], bool]
    numbers: Callable[[Path], tuple[int, ...]]
    read_lists: Callable[[Path, int], Lists]
    splits_are_whole: bool
    source: Callable[[str], str | None]
    names_class: bool
    next_step: str


# Lists take the first form that fits: those of a folder are UCF-101's and one file more.
DATASETS = {
    "folder": Dataset(
        lists_folder=None,
        is_lists=folder.is_lists,
        numbers=folder.list_numbers,
        read_lists=ucf101.read_lists,
        splits_are_whole=True,
        source=folder.source,
        names_class=False,
        next_step="name the lists that training wrote into its folder below runs with --split_path",
    ),
    "ucf101": Dataset(
        lists_folder="ucfTrainTestlist",
        is_lists=ucf101.is_lists,
        numbers=lambda _: ucf101.SPLIT_NUMBERS,
        read_lists=ucf101.read_lists,
        splits_are_whole=True,
        source=ucf101.source,
        names_class=True,
        next_step="unzip ucfTrainTestlist.zip, name it with --split_path",
    ),
    "hmdb51": Dataset(
        lists_folder="testTrainMulti_7030_splits",
        is_lists=hmdb51.is_lists,
        numbers=lambda _: hmdb51.SPLIT_NUMBERS,
        read_lists=hmdb51.read_lists,
        splits_are_whole=False,
        source=hmdb51.source,
        names_class=False,
        next_step=hmdb51.GET_LISTS,
    ),
}
OFFICIAL = [name for name, entry in DATASETS.items() if entry.lists_folder]


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
        "auto (default) is ucf101 or hmdb51 where lists of that form name most of the clips that are there, "
        "else folder: classes are the folders in --dataset_path, and its splits are five folds over groups "
        "of clips",
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
            self._folds = folder.draw_folds(data.dataset_path, self._source)
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

    def never_tested(self) -> set[str]:
        """Names of the clips that no split tests; none where not all lists are there. Raises: as `lists`."""
        try:
            every = [self.lists(number) for number in self.numbers]
        except MissingFileError:
            return set()
        tested = {name for lists in every for name, _ in lists.test}
        return {name for lists in every for name, _ in lists.train if name not in tested}

    def all_clips(self) -> Split:
        """The clips of all splits, each once, as if all were trained on. Raises: as `load_split`."""
        numbers = self.numbers[:1] if self._dataset.splits_are_whole else self.numbers
        every = [self.lists(number) for number in numbers]
        entries = dict.fromkeys(entry for lists in every for entry in lists.entries)
        return self._split(Lists(every[0].classes, list(entries), []))

    def _split(self, lists: Lists) -> Split:
        path = self.data.dataset_path
        if not path.is_dir():
            raise MissingFileError(f"{path}: no such folder; name the data set with --dataset_path")
        if self.path:
            _check_classes(path, lists.classes, self.path)
        find = partial(find_clips, path, self._source)
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
        return folder.group_of(name, self._pattern) if self._pattern else self._dataset.source(name)

    def keep(self, path: Path) -> None:
        """Write lists that were drawn into a folder. Raises: OSError if they cannot be written."""
        if self._folds:
            folder.write_lists(path, self._folds, self.data.group_pattern)

    def describe(self) -> list[str]:
        """Which clips are read, and how splits were drawn, in lines, where it is not as a list says."""
        path = self.data.dataset_path
        if self._folds is None:
            if self.data.split_path or not path.is_dir():
                return []
            named = {stem for number in self.numbers for stem in self.lists(number).stems()}
            unlisted = sorted(folder.stems(path) - named)
            return [
                f"warning: {len(unlisted):,} clips in {path} are in none of the lists in {self.path} and are "
                f"left out, the first {first}; --dataset folder takes all, with splits of its own"
                for first in unlisted[:1]
            ]
        places = [
            place for name in OFFICIAL for place in list_places(name, path) if DATASETS[name].is_lists(place)
        ]
        others = f", and the lists in {places[0]} do not name most of its clips" if places else ""
        lines = [
            f"{path}: its folders are the classes{others}: {len(self._folds.fold):,} clips of "
            f"{len(self._folds.classes):,} classes, {len(self._folds.numbers)} folds over groups by "
            f"{self._pattern or 'the form of their names'}; {self._folds.balance()}"
        ]
        if outside := folder.linked_outside(path, self._folds):
            lines.append(
                f"{len(outside):,} clips are links that leave {path} and are read where they lead, the first "
                f"{outside[0]}"
            )
        if strays := folder.strays(path):
            lines.append(
                f"{len(strays):,} files in the class folders do not end as videos do "
                f"({', '.join(VIDEO_SUFFIXES)}) and are left out, the first {strays[0]}"
            )
        return lines


def open_listed(data: DataSettings) -> Listed:
    """A data set, having said what a user should know of its clips. Raises: as `Listed`."""
    listed = Listed(data)
    for line in listed.describe():
        say(line)
    return listed


def find_lists(data: DataSettings) -> tuple[str, Path | None]:
    """The name of a data set, and the folder of its lists; None where they are to be drawn from the clips.

    Raises: MissingFileError if there is no folder to tell it from, or no lists; UserError for wrong ones.
    """
    if data.split_path:
        return _named(data.dataset, data.split_path), data.split_path
    if data.dataset != AUTO:
        if data.dataset not in OFFICIAL:
            return data.dataset, None
        places = list_places(data.dataset, data.dataset_path)
        for path in filter(DATASETS[data.dataset].is_lists, places):
            return data.dataset, path
        raise MissingFileError(
            f"{' or '.join(map(str, places))}: no lists of {data.dataset} there; "
            f"{DATASETS[data.dataset].next_step}"
        )
    if not data.dataset_path.is_dir():
        raise MissingFileError(f"{data.dataset_path}: no such folder; name the data set with --dataset_path")
    for name in OFFICIAL:
        for path in list_places(name, data.dataset_path):
            if DATASETS[name].is_lists(path) and _fit(name, path, data.dataset_path):
                return name, path
    return "folder", None


def _named(name: str, lists: Path) -> str:
    """The data set whose lists are in a folder that was named; UCF-101 if there are none."""
    forms = [form for form, entry in DATASETS.items() if entry.is_lists(lists)]
    name = name if name != AUTO else (*forms, "ucf101")[0]
    if not lists.is_dir():
        raise MissingFileError(f"{lists}: no such folder; {DATASETS[name].next_step}")
    if not forms:
        for inner in sorted(folder.visible_folders(lists)):
            if any(entry.is_lists(inner) for entry in DATASETS.values()):
                raise MissingFileError(
                    f"{lists}: no lists there, but in {inner}; name that with --split_path"
                )
    return name


def list_places(name: str, dataset_path: Path) -> list[Path]:
    """Where official lists may be: in data/, beside the data set, and loose in it."""
    own = DATASETS[name].lists_folder
    assert own
    return [Path("data") / own, dataset_path.parent / own, dataset_path]


def _fit(name: str, path: Path, dataset_path: Path) -> bool:
    """Whether the lists name most of the clips that are there."""
    try:
        lists = DATASETS[name].read_lists(path, 1)
    except UserError as error:
        raise type(error)(f"{error}; or do without these lists, with --dataset folder") from error
    there = folder.stems(dataset_path)
    return 2 * len(there & lists.stems()) > len(there)


def _check_classes(dataset_path: Path, classes: Sequence[str], lists: Path) -> None:
    """Raises: UserError for a class folder that the lists do not name."""
    known = set(classes)
    unknown = sorted(path.name for path in folder.visible_folders(dataset_path) if path.name not in known)
    if unknown:
        where = lists / "classInd.txt" if (lists / "classInd.txt").is_file() else lists
        raise UserError(
            f"{dataset_path / unknown[0]}: the class {unknown[0]} is not in {where}; "
            "add it there, move the folder away, or do without the lists, with --dataset folder"
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
