"""UCF-101: its classes and its official splits, as in ucfTrainTestlist.zip (Soomro, Zamir and Shah, 2012).

classInd.txt        1 ApplyEyeMakeup                                    label and class folder
trainlist01.txt     ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1       clip and label
testlist01.txt      ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi         clip
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from splits.split import Lists
from utils.process import MissingFileError, UserError

GET_LISTS = "unzip ucfTrainTestlist.zip and name its folder with --split_path"


def read_lines(path: Path, next_step: str) -> Iterator[tuple[int, str]]:
    """Numbered lines of a list that are not blank. Raises: MissingFileError; UserError if it is no text."""
    if not path.is_file():
        raise MissingFileError(f"{path}: no such list file; {next_step}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file; {next_step}") from error
    # Not splitlines, which also parts lines at characters that names may hold.
    return ((number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def read_classes(path: Path) -> list[str]:
    """Class names of a classInd.txt by label. Raises: MissingFileError; UserError for a wrong line."""
    classes: list[str] = []
    for number, line in read_lines(path, GET_LISTS):
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


def read_list(path: Path, classes: Sequence[str], *, labeled: bool) -> list[tuple[str, int]]:
    """Names and labels of a trainlist (`labeled`) or a testlist.

    The label is that of the class folder: UCF-101 spells HandstandPushups another way in its file names.

    Raises: MissingFileError; UserError for a wrong line.
    """
    form = "'<Class>/<clip>.avi <label>'" if labeled else "'<Class>/<clip>.avi'"
    entries = []
    for number, line in read_lines(path, GET_LISTS):
        # Names may hold spaces.
        name, _, stated = line.rpartition(" ") if labeled else (line, "", "")
        name = name.rstrip()
        parts, where = PurePosixPath(name).parts, f"{path}, line {number}"
        if len(parts) != 2 or ".." in parts or "\\" in name or not re.search(r"\.\w+$", name):
            raise UserError(f"{where}: {line!r} is not {form}")
        if parts[0] not in classes:
            raise UserError(f"{where}: the class {parts[0]} is not in classInd.txt; add it there")
        label = classes.index(parts[0])
        if labeled and stated != str(label + 1):
            raise UserError(f"{where}: label {stated} is not that of {parts[0]} in classInd.txt, {label + 1}")
        entries.append((name, label))
    return entries


def read_lists(folder: Path, number: int) -> Lists:
    """The lists of a split. Raises: as `read_classes` and `read_list`."""
    classes = read_classes(folder / "classInd.txt")
    train = read_list(folder / f"trainlist{number:02d}.txt", classes, labeled=True)
    return Lists(classes, train, read_list(folder / f"testlist{number:02d}.txt", classes, labeled=False))


def source(name: str) -> str | None:
    """The group of a clip's name, v_<Class>_g<group>_c<clip>: its clips are cut out of one video."""
    match = re.fullmatch(r"(.*_g\d+)_c\d+", PurePosixPath(name).stem)
    return match[1] if match else None
