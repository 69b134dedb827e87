"""Data sets: UCF-101, HMDB-51, or any folder of class folders; a new one is one entry in `DATASETS`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from splits import folder, hmdb51, ucf101
from splits.segments import SegmentedVideos
from splits.split import Clip, Lists, Split, check_number
from utils.flags import accepted_by, setting
from utils.process import MissingFileError, UserError, say
from video.files import VIDEO_SUFFIXES
from video.reader import Video, check_whole

AUTO = "auto"
# Of --split_number: each split of a data set in turn.
ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """How a data set is read."""

    list_file: str  # a pattern: a folder with such a file has lists of this form
    read_lists: Callable[[Path, int], Lists]  # of a split, out of that folder
    source: Callable[[str], str | None]  # what a clip is cut out of, by its name, if that tells
    next_step: str  # where there are no lists
    lists_folder: str | None = None  # of the official lists, as they are unpacked, if there are any
    numbers: Callable[[Path], tuple[int, ...]] = lambda _: (1, 2, 3)  # of the splits in a folder of lists
    names_class: bool = False  # a clip's name holds that of its class

    def is_lists(self, path: Path) -> bool:
        """Whether a folder holds lists of this form."""
        return any(path.glob(self.list_file))


# Lists take the first form that fits: those of a folder are UCF-101's and one file more.
DATASETS = {
    "folder": Dataset(
        list_file=folder.ABOUT,
        read_lists=ucf101.read_lists,
        source=folder.source,
        next_step="name the lists that training wrote into its folder below runs with --split_path",
        numbers=lambda path: tuple(n for n in folder.FOLDS if (path / f"testlist{n:02d}.txt").is_file()),
    ),
    "ucf101": Dataset(
        list_file="classInd.txt",
        read_lists=ucf101.read_lists,
        source=ucf101.source,
        next_step=ucf101.GET_LISTS,
        lists_folder="ucfTrainTestlist",
        names_class=True,
    ),
    "hmdb51": Dataset(
        list_file="*_test_split1.txt",
        read_lists=hmdb51.read_lists,
        source=hmdb51.source,
        next_step=hmdb51.GET_LISTS,
        lists_folder="testTrainMulti_7030_splits",
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
        "videos or extracted frames, in a folder for each class; default: data/UCF-101, for test.py that of "
        "the training",
        Path,
    )
    split_path: Path | None = setting(
        None,
        "folder of the lists; default: official ones in data/ or beside the data set, for test.py those of "
        "the training, else folds are drawn",
        Path,
    )
    dataset: str = setting(
        AUTO,
        "auto (default): ucf101 or hmdb51 where their lists name most of the clips, else folder: five folds "
        "over groups of clips",
        choices=(AUTO, *DATASETS),
    )
    segments: Path | None = setting(
        None,
        "table of segments of the videos, with columns video, start, end, action; for long videos; default: "
        "each video is a clip",
        Path,
    )
    group_pattern: str | None = setting(
        None,
        "regular expression for the part of a clip's name that tells its group, as 'person[0-9]+'; default: "
        "holiday_1 and holiday_2 are of one group",
        accepted_by(_check_pattern),
    )


def split_number(text: str) -> int | str:
    """The value of --split_number: a number, or a word for several."""
    return int(text) if text.isdecimal() else text


class Listed:
    """A data set's splits: their `numbers`, and the `path` of their lists, or None if drawn from the clips.

    Raises: MissingFileError or UserError if the data set or its lists are not there or are wrong.
    """

    def __init__(self, data: DataSettings) -> None:
        self.data = data
        self.name, self.path = find_lists(data)
        self._dataset, self._pattern, self._folds = DATASETS[self.name], data.group_pattern, None
        if self.path is None:
            self._folds = folder.draw_folds(data.dataset_path, self._source)
            self.numbers = self._folds.numbers
        else:
            self.numbers = self._dataset.numbers(self.path)
            if self._pattern is None and DATASETS["folder"].is_lists(self.path):
                self._pattern = folder.read_pattern(self.path)

    def lists(self, number: int | str) -> Lists:
        """What a split names. Raises: UserError for another number, or a wrong list; MissingFileError."""
        check_number(number, self.numbers)
        assert isinstance(number, int)
        if self._folds:
            return self._folds.lists(number)
        assert self.path
        return self._dataset.read_lists(self.path, number)

    def split(self, number: int | str) -> Split:
        """The clips of a split that are there, as videos or as frames.

        Raises: as `lists`; MissingFileError if there is none; VideoError for one that is empty or truncated.
        """
        return self._split(self.lists(number))

    def _split(self, lists: Lists) -> Split:
        path = self.data.dataset_path
        if not path.is_dir():
            raise MissingFileError(f"{path}: no such folder; name the data set with --dataset_path")
        for inner in folder.visible(path) if self.path else []:
            if inner.is_dir() and inner.name not in lists.classes:
                raise UserError(
                    f"{inner}: the class {inner.name} is not in the lists in {self.path}; add it there, move "
                    "the folder away, or do without the lists, with --dataset folder"
                )
        train, test, listed = self._clips(lists.train), self._clips(lists.test), lists.train + lists.test
        if not train and not test:
            (first, _), *_ = [*listed, ("<Class>/<clip>.avi", 0)]
            raise MissingFileError(
                f"none of the {len(listed):,} listed clips is in {path}; expected for example "
                f"{path / first}, or frames in the folder {(path / first).with_suffix('')}"
            )
        return Split(lists.classes, train, test, len(listed))

    def _clips(self, entries: list[tuple[str, int]]) -> list[Clip]:
        clips = []
        for name, label in entries:
            path = self.data.dataset_path / name
            if path.is_file():
                check_whole(path)
            elif not (path := path.with_suffix("")).is_dir():
                continue
            clips.append(Clip(name, label, Video(path), self._source(name)))
        return clips

    def _source(self, name: str) -> str | None:
        return folder.group_of(name, self._pattern) if self._pattern else self._dataset.source(name)

    def keep(self, path: Path) -> None:
        """Write lists that were drawn into a folder. Raises: OSError if they cannot be written."""
        if self._folds:
            folder.write_lists(path, self._folds, self.data.group_pattern)

    def describe(self) -> list[str]:
        """Which clips are read, and how splits were drawn, in lines, where it is not as a list says."""
        path = self.data.dataset_path
        if self._folds:
            lines = [
                f"{path}: its folders are the classes: {len(self._folds.fold):,} clips of "
                f"{len(self._folds.clips):,} classes, {len(self.numbers)} folds over groups by "
                f"{self._pattern or 'the form of their names'}; {self._folds.balance()}"
            ]
            inside = path.resolve()
            outside = [n for n in self._folds.fold if not (path / n).resolve().is_relative_to(inside)]
            if outside:
                lines.append(
                    f"{len(outside):,} clips are links that leave {path} and are read where they lead, the "
                    f"first {outside[0]}"
                )
            for name, dataset in DATASETS.items():
                unused = filter(dataset.is_lists, list_places(name, path))
                lines += [f"the lists in {place} are not used" for place in unused]
            files = [file for inner in folder.class_folders(path) for file in folder.visible(inner)]
            strays = [file for file in files if file.suffix.lower() not in VIDEO_SUFFIXES and file.is_file()]
            if strays:
                ends = ", ".join(VIDEO_SUFFIXES)
                lines.append(
                    f"{len(strays):,} files are left out, not being {ends}; the first is {strays[0]}"
                )
            return lines
        if self.data.split_path or not path.is_dir():
            return []
        named = {stem for number in self.numbers for stem in self.lists(number).stems()}
        if not (unlisted := sorted(folder.stems(path) - named)):
            return []
        return [
            f"warning: {len(unlisted):,} clips in {path} are in none of the lists in {self.path} and are "
            f"left out, the first {unlisted[0]}; --dataset folder takes all, with splits of its own"
        ]


AnyListed = Listed | SegmentedVideos


def open_listed(data: DataSettings, *, quiet: bool = False) -> AnyListed:
    """A data set, having said what a user should know of its clips. Raises: as one of the two."""
    listed = SegmentedVideos(data) if data.segments else Listed(data)
    for line in () if quiet else listed.describe():
        say(line)
    return listed


def list_places(name: str, dataset_path: Path) -> list[Path]:
    """Where official lists may be, if there are any: in data/, beside the data set, and loose in it."""
    lists = DATASETS[name].lists_folder
    return [Path("data") / lists, dataset_path.parent / lists, dataset_path] if lists else []


def find_lists(data: DataSettings) -> tuple[str, Path | None]:
    """The name of a data set, and the folder of its lists; None where they are to be drawn from the clips."""
    name, folder_of_lists, clips = data.dataset, data.split_path, data.dataset_path
    if folder_of_lists:
        if name == AUTO:
            forms = [form for form, entry in DATASETS.items() if entry.is_lists(folder_of_lists)]
            name = (*forms, "ucf101")[0]
        if not folder_of_lists.is_dir():
            raise MissingFileError(f"{folder_of_lists}: no such folder; {DATASETS[name].next_step}")
        return name, folder_of_lists
    if name != AUTO:
        places = list_places(name, clips)
        there = [*filter(DATASETS[name].is_lists, places)]
        if places and not there:
            looked = " or ".join(map(str, places))
            raise MissingFileError(f"{looked}: no lists of {name} there; {DATASETS[name].next_step}")
        return name, there[0] if there else None
    if not clips.is_dir():
        raise MissingFileError(f"{clips}: no such folder; name the data set with --dataset_path")
    for name, dataset in DATASETS.items():
        for path in filter(dataset.is_lists, list_places(name, clips)):
            try:
                lists = dataset.read_lists(path, 1)
            except UserError as error:
                raise type(error)(f"{error}; or do without these lists, with --dataset folder") from error
            stems = folder.stems(clips)
            if 2 * len(stems & lists.stems()) > len(stems):
                return name, path
    return "folder", None
