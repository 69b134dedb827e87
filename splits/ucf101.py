"""UCF-101: its classes and its official splits.

The files read here are those of ucfTrainTestlist.zip (Soomro, Zamir and Shah, 2012):

    classInd.txt        1 ApplyEyeMakeup                                    label and class folder
    trainlist01.txt     ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1       clip and label
    testlist01.txt      ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi         clip
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from splits.split import RANDOM, Clip, Split, random_split
from utils.flags import setting
from utils.process import MissingFileError, UserError
from video.files import check_whole
from video.reader import Video

SPLIT_NUMBERS = (1, 2, 3)
# Of flags: each of SPLIT_NUMBERS in turn.
ALL = "all"


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Where the clips are, and the lists that name them."""

    dataset_path: Path = setting(
        Path("data/UCF-101"),
        "videos or extracted frames; the videos (default) take a fifth of the disk",
        Path,
    )
    split_path: Path = setting(Path("data/ucfTrainTestlist"), "folder of the official lists", Path)


def split_number(text: str) -> int | str:
    """The value of --split_number: a number, or a word for several or for a random split."""
    return int(text) if text.isdecimal() else text


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a list file that are not blank."""
    if not path.is_file():
        raise MissingFileError(
            f"{path}: no such list file; unzip ucfTrainTestlist.zip and name its folder with --split_path"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file; unzip ucfTrainTestlist.zip again") from error
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, line.strip()


def read_classes(path: Path) -> list[str]:
    """Class names of a classInd.txt, in the order of their labels.

    Raises: MissingFileError if there is no such file; UserError for a line that is not `<label> <Class>`,
        labels that do not count 1, 2, 3, ..., or a name that stands twice.
    """
    classes: list[str] = []
    for number, line in _lines(path):
        label, _, name = line.partition(" ")
        name = name.strip()
        if label != str(len(classes) + 1) or not name or "/" in name or "\\" in name or name in (".", ".."):
            raise UserError(f"{path}, line {number}: {line!r} is not '{len(classes) + 1} <Class>'")
        if name in classes:
            raise UserError(f"{path}, line {number}: the class {name} stands there twice")
        classes.append(name)
    if not classes:
        raise UserError(f"{path}: the file names no class; unzip ucfTrainTestlist.zip again")
    return classes


def read_list(path: Path, classes: Sequence[str], *, labelled: bool) -> list[tuple[str, int]]:
    """Names and labels of a trainlist (`labelled`) or a testlist.

    The label is that of the class folder: UCF-101 spells HandstandPushups another way in its file names.

    Raises: MissingFileError if there is no such file; UserError with the line for a malformed one, a class
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
            raise UserError(f"{where}: {line!r} is not {form}")
        if len(rest) != int(labelled):
            raise UserError(f"{where}: {line!r} is not {form}")
        if parts[0] not in labels:
            raise UserError(f"{where}: the class {parts[0]} is not in classInd.txt; add it there")
        label = labels[parts[0]]
        if labelled and rest[0] != str(label + 1):
            raise UserError(
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

    Raises: MissingFileError if a folder or list is not there, or none of the listed clips; UserError for
        another split number, a wrong list, or a class folder that classInd.txt does not name; VideoError for
        a video that is empty or truncated.
    """
    if split_number == RANDOM:
        return random_split(load_split(dataset_path, split_path, 1), seed)
    if split_number not in SPLIT_NUMBERS:
        raise UserError(f"split number {split_number} does not exist; choose 1, 2 or 3")
    if not split_path.is_dir():
        raise MissingFileError(
            f"{split_path}: no such folder; unzip ucfTrainTestlist.zip, name it with --split_path"
        )
    classes = read_classes(split_path / "classInd.txt")
    train = read_list(split_path / f"trainlist{split_number:02d}.txt", classes, labelled=True)
    test = read_list(split_path / f"testlist{split_number:02d}.txt", classes, labelled=False)
    if not dataset_path.is_dir():
        raise MissingFileError(f"{dataset_path}: no such folder; name the data set with --dataset_path")
    unknown = sorted(
        entry.name
        for entry in dataset_path.iterdir()
        if entry.is_dir() and not entry.name.startswith(".") and entry.name not in classes
    )
    if unknown:
        raise UserError(
            f"{dataset_path / unknown[0]}: the class {unknown[0]} is not in {split_path / 'classInd.txt'}; "
            "add it there, or move the folder away"
        )
    split = Split(classes, _find(dataset_path, train), _find(dataset_path, test), len(train) + len(test))
    if not split.train and not split.test:
        expected = (
            dataset_path / (train + test)[0][0] if train or test else dataset_path / "<Class>/<clip>.avi"
        )
        raise MissingFileError(
            f"none of the {split.listed:,} listed clips is in {dataset_path}; expected for example "
            f"{expected}, or frames in the folder {expected.with_suffix('')}"
        )
    return split
