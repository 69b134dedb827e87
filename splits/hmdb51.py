"""HMDB-51: its official splits, and the film that a clip is cut out of.

The files read here are those of test_train_splits.rar (Kuehne et al., ICCV 2011), one a class and split:

    testTrainMulti_7030_splits/brush_hair_test_split1.txt
        April_09_brush_hair_u_nm_np1_ba_goo_0.avi 1             clip; 1 trains, 2 tests, 0 does neither
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from splits.split import Lists
from splits.ucf101 import read_lines
from utils.process import MissingFileError, UserError

SPLIT_NUMBERS = (1, 2, 3)
UNUSED, TRAIN, TEST = "0", "1", "2"
GET_LISTS = "run data/download_hmdb51.sh, name its folder testTrainMulti_7030_splits with --split_path"
# What its names say of a clip, behind film and class: part of the body, camera motion, number of people,
# view, quality; the film's clips are numbered.
PROPERTIES = r"_[hulf]_(?:nm|cm)_np\d+_(?:fr|ba|le|ri)_(?:bad|med|goo)_\d+"


def is_lists(folder: Path) -> bool:
    """Whether a folder holds lists of this form."""
    return folder.is_dir() and any(folder.glob("*_test_split1.txt"))


def read_lists(folder: Path, number: int) -> Lists:
    """The lists of a split; classes are in alphabetical order.

    Raises: MissingFileError if there are none; UserError with the line for a malformed one.
    """
    end = f"_test_split{number}.txt"
    files = {path.name.removesuffix(end): path for path in sorted(folder.glob(f"*{end}"))}
    if not files:
        raise MissingFileError(f"{folder}: no list <class>{end} there; {GET_LISTS}")
    classes = sorted(files)
    sides: dict[str, list[tuple[str, int]]] = {UNUSED: [], TRAIN: [], TEST: []}
    for label, name in enumerate(classes):
        for line_number, line in read_lines(files[name], GET_LISTS):
            clip, _, side = line.rpartition(" ")
            clip = clip.rstrip()
            if side not in sides or not clip.endswith(".avi") or "/" in clip or "\\" in clip:
                raise UserError(
                    f"{files[name]}, line {line_number}: {line!r} is not '<clip>.avi 1', or 2, or 0"
                )
            sides[side].append((f"{name}/{clip}", label))
    return Lists(classes, sides[TRAIN], sides[TEST], sides[UNUSED])


def source(name: str) -> str | None:
    """The class and the film of a clip, where its name has the form `<film>_<class>_<properties>`."""
    path = PurePosixPath(name)
    match = re.fullmatch(rf"(.+)_{re.escape(path.parent.name)}{PROPERTIES}", path.stem)
    return f"{path.parent.name}/{match[1]}" if match else None
