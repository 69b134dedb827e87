"""UCF-101: its classes, its official splits, and others that hold groups of clips out.

The files read here are those of ucfTrainTestlist.zip (Soomro, Zamir and Shah, 2012):

    classInd.txt        1 ApplyEyeMakeup                                    label and class folder
    trainlist01.txt     ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1       clip and label
    testlist01.txt      ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi         clip
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Self

import numpy as np

from video import Video, check_whole

SPLIT_NUMBERS = (1, 2, 3)
RANDOM = "random"
# Of flags: each of SPLIT_NUMBERS in turn.
ALL = "all"
# The original's share of test clips in its random split.
RANDOM_TEST = 0.2


@dataclass(frozen=True)
class Clip:
    """A clip of the data set that is there.

    Attributes:
        name: as the lists name it, `<Class>/<file>.avi`
        label: from 0, the line of its class folder in classInd.txt
        video: its file or its folder of frames
    """

    name: str
    label: int
    video: Video

    @property
    def group(self) -> str:
        """The source video that it is cut out of, with its class: clips of a group show the same scene.

        Raises: ValueError if the name does not say, as v_<Class>_g<group>_c<clip> does.
        """
        if (group := self._group()) is None:
            raise ValueError(
                f"{self.name}: the name does not tell its group, as v_<Class>_g01_c01.avi does; without "
                "groups no clips can be held out"
            )
        return group

    @property
    def group_or_name(self) -> str:
        """The group; a clip whose name tells none is one of its own."""
        return self._group() or self.name

    def _group(self) -> str | None:
        match = re.fullmatch(r"(.*_g\d+)_c\d+", PurePosixPath(self.name).stem)
        return match[1] if match else None


@dataclass(frozen=True)
class Split:
    """The clips of one official split that are there, and how many the lists name.

    Attributes:
        classes: class names, by label
        train, test: clips in the order of the lists
        listed: number of clips that both lists name
    """

    classes: list[str]
    train: list[Clip]
    test: list[Clip]
    listed: int

    def missing(self) -> str | None:
        """One line that counts what the lists name and is not there; None if all is."""
        found = len(self.train) + len(self.test)
        if found == self.listed:
            return None
        labels = {clip.label for clip in self.train + self.test}
        return (
            f"{found:,} of {self.listed:,} listed clips found, "
            f"{len(labels)} of {len(self.classes)} classes; going on with those"
        )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a list file that are not blank."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such list file; unzip ucfTrainTestlist.zip and name its folder with --split_path"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file; unzip ucfTrainTestlist.zip again") from error
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, line.strip()


def read_classes(path: Path) -> list[str]:
    """Class names of a classInd.txt, in the order of their labels.

    Raises: FileNotFoundError if there is no such file; ValueError for a line that is not `<label> <Class>`,
        labels that do not count 1, 2, 3, ..., or a name that stands twice.
    """
    classes: list[str] = []
    for number, line in _lines(path):
        label, _, name = line.partition(" ")
        name = name.strip()
        if label != str(len(classes) + 1) or not name or "/" in name or "\\" in name or name in (".", ".."):
            raise ValueError(f"{path}, line {number}: {line!r} is not '{len(classes) + 1} <Class>'")
        if name in classes:
            raise ValueError(f"{path}, line {number}: the class {name} stands there twice")
        classes.append(name)
    if not classes:
        raise ValueError(f"{path}: the file names no class; unzip ucfTrainTestlist.zip again")
    return classes


def read_list(path: Path, classes: Sequence[str], *, labelled: bool) -> list[tuple[str, int]]:
    """Names and labels of a trainlist (`labelled`) or a testlist.

    The label is that of the class folder: UCF-101 spells HandstandPushups another way in its file names.

    Raises: FileNotFoundError if there is no such file; ValueError with the line for a malformed one, a class
        that classInd.txt does not name, a path that leaves its folder, or a label that is not the class's.
    """
    labels = {name: label for label, name in enumerate(classes)}
    form = "'<Class>/<clip>.avi <label>'" if labelled else "'<Class>/<clip>.avi'"
    entries = []
    for number, line in _lines(path):
        name, *rest = line.split()
        parts = PurePosixPath(name).parts
        where = f"{path}, line {number}"
        if len(parts) != 2 or ".." in parts or "\\" in name or not PurePosixPath(name).suffix:
            raise ValueError(f"{where}: {line!r} is not {form}")
        if len(rest) != int(labelled):
            raise ValueError(f"{where}: {line!r} is not {form}")
        if parts[0] not in labels:
            raise ValueError(f"{where}: the class {parts[0]} is not in classInd.txt; add it there")
        label = labels[parts[0]]
        if labelled and rest[0] != str(label + 1):
            raise ValueError(
                f"{where}: label {rest[0]} is not that of {parts[0]} in classInd.txt, {label + 1}"
            )
        entries.append((name, label))
    return entries


def _find(dataset_path: Path, entries: list[tuple[str, int]]) -> list[Clip]:
    clips = []
    for name, label in entries:
        file = dataset_path / name
        folder = file.with_suffix("")
        if file.is_file():
            check_whole(file)
            clips.append(Clip(name, label, Video(file)))
        elif folder.is_dir():
            clips.append(Clip(name, label, Video(folder)))
    return clips


def load_split(dataset_path: Path, split_path: Path, split_number: int | str, *, seed: int = 0) -> Split:
    """The clips of a split, from videos or from folders of extracted frames, whichever are there.

    Args:
        dataset_path: holds `<Class>/<clip>.avi` or `<Class>/<clip>/<n>.jpg`
        split_path: holds classInd.txt, trainlist0N.txt and testlist0N.txt
        split_number: N: 1, 2 or 3, or `RANDOM` for `random_split`
        seed: of the random split

    Raises: FileNotFoundError if a folder or list is not there, or none of the listed clips; ValueError for
        another split number, a wrong list, or a class folder that classInd.txt does not name; VideoError for
        a video that is empty or truncated.
    """
    if split_number == RANDOM:
        return random_split(load_split(dataset_path, split_path, 1), seed)
    if split_number not in SPLIT_NUMBERS:
        raise ValueError(f"split number {split_number} does not exist; choose 1, 2 or 3")
    if not split_path.is_dir():
        raise FileNotFoundError(
            f"{split_path}: no such folder; unzip ucfTrainTestlist.zip, name it with --split_path"
        )
    classes = read_classes(split_path / "classInd.txt")
    train = read_list(split_path / f"trainlist{split_number:02d}.txt", classes, labelled=True)
    test = read_list(split_path / f"testlist{split_number:02d}.txt", classes, labelled=False)
    if not dataset_path.is_dir():
        raise FileNotFoundError(f"{dataset_path}: no such folder; name the data set with --dataset_path")
    unknown = sorted(
        entry.name
        for entry in dataset_path.iterdir()
        if entry.is_dir() and not entry.name.startswith(".") and entry.name not in classes
    )
    if unknown:
        raise ValueError(
            f"{dataset_path / unknown[0]}: the class {unknown[0]} is not in {split_path / 'classInd.txt'}; "
            "add it there, or move the folder away"
        )
    split = Split(classes, _find(dataset_path, train), _find(dataset_path, test), len(train) + len(test))
    if not split.train and not split.test:
        expected = (
            dataset_path / (train + test)[0][0] if train or test else dataset_path / "<Class>/<clip>.avi"
        )
        raise FileNotFoundError(
            f"none of the {split.listed:,} listed clips is in {dataset_path}; expected for example "
            f"{expected}, or frames in the folder {expected.with_suffix('')}"
        )
    return split


def names_sha256(clips: Sequence[Clip]) -> str:
    """SHA-256 of the clips' names in their order, as 64 hexadecimal digits: the same for the same clips."""
    return hashlib.sha256("\n".join(clip.name for clip in clips).encode()).hexdigest()


def random_split(split: Split, seed: int) -> Split:
    """The original's split: a fifth of all clips at random, whatever group they are of.

    It leaks: see `siblings`.
    """
    clips = sorted(split.train + split.test, key=lambda clip: clip.name)
    order = np.random.default_rng(seed).permutation(len(clips))
    number = round(RANDOM_TEST * len(clips))
    parts = order[number:], order[:number]
    train, test = ([clips[index] for index in sorted(part.tolist())] for part in parts)
    return replace(split, train=train, test=test)


def siblings(split: Split) -> int:
    """Number of test clips that have a clip of the same group, cut out of the same video, in training."""
    trained = {clip.group for clip in split.train}
    return sum(clip.group in trained for clip in split.test)


def hold_out(clips: Sequence[Clip], fraction: float, seed: int) -> tuple[list[Clip], list[Clip]]:
    """Training and validation clips: of each class about `fraction` of its groups, whole, and at least one.

    Raises: ValueError if a name does not tell its group, or a class has a single group.
    """
    groups: dict[int, list[str]] = {}
    for clip in clips:
        groups.setdefault(clip.label, []).append(clip.group)
    held: set[str] = set()
    for label, names in groups.items():
        distinct = sorted(set(names))
        if len(distinct) < 2:
            raise ValueError(
                f"the group {distinct[0]} is the only one of its class in training, so none can be held out; "
                "add clips, or leave out --val_fraction"
            )
        number = min(len(distinct) - 1, max(1, round(fraction * len(distinct))))
        held.update(np.random.default_rng([seed, label]).choice(distinct, number, replace=False).tolist())
    return [clip for clip in clips if clip.group not in held], [clip for clip in clips if clip.group in held]


def some_labels(clips: Sequence[Clip], fraction: float, seed: int) -> list[Clip]:
    """Of each class about `fraction` of its clips, drawn at random, and at least one, in their order."""
    if fraction == 1:
        return list(clips)
    of_class: dict[int, list[int]] = {}
    for index, clip in enumerate(clips):
        of_class.setdefault(clip.label, []).append(index)
    chosen: list[int] = []
    for label, indices in of_class.items():
        number = max(1, round(fraction * len(indices)))
        chosen += np.random.default_rng([seed, label]).choice(indices, number, replace=False).tolist()
    return [clips[index] for index in sorted(chosen)]


@dataclass(frozen=True)
class Shard:
    """Part `number` (from 1) of `count` parts of a data set, for one process or machine."""

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """Of a flag such as 2/8.

        Raises: ValueError if it is anything else.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(f"shard {text!r} does not exist; write 1/8 for the first of eight")
        return cls(int(match[1]), int(match[2]))

    @property
    def suffix(self) -> str:
        """What the names of its files end in."""
        return "" if self.count == 1 else f"-{self.number}of{self.count}"

    def of(self, clips: Sequence[Clip]) -> list[Clip]:
        """The clips that fall to it; depends on nothing but their names."""
        return sorted(clips, key=lambda clip: clip.name)[self.number - 1 :: self.count]


WHOLE = Shard()
