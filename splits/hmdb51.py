"""HMDB-51: its official splits, as in test_train_splits.rar (Kuehne et al., ICCV 2011): one list a class.

testTrainMulti_7030_splits/brush_hair_test_split1.txt
    April_09_brush_hair_u_nm_np1_ba_goo_0.avi 1             clip; 1 trains, 2 tests, 0 does neither
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from splits.split import Lists
from splits.ucf101 import read_lines
from utils.process import MissingFileError, UserError

GET_LISTS = "run data/download_hmdb51.sh, name its folder testTrainMulti_7030_splits with --split_path"
# What a name says behind film and class: part of the body, camera motion, number of people, view, quality.
PROPERTIES = r"_[hulf]_(?:nm|cm)_np\d+_(?:fr|ba|le|ri)_(?:bad|med|goo)_\d+"


def read_lists(folder: Path, number: int) -> Lists:
    """The lists of a split; classes are sorted. Raises: MissingFileError; UserError for a wrong line."""
    end = f"_test_split{number}.txt"
    files = sorted(folder.glob(f"*{end}"), key=lambda path: path.name.removesuffix(end))
    if not files:
        raise MissingFileError(f"{folder}: no list <class>{end} there; {GET_LISTS}")
    classes = [path.name.removesuffix(end) for path in files]
    sides: dict[str, list[tuple[str, int]]] = {"0": [], "1": [], "2": []}
    for label, path in enumerate(files):
        for line_number, line in read_lines(path, GET_LISTS):
            clip, _, side = line.rpartition(" ")
            clip = clip.rstrip()
            if side not in sides or not clip.endswith(".avi") or "/" in clip or "\\" in clip:
                raise UserError(f"{path}, line {line_number}: {line!r} is not '<clip>.avi 1', or 2, or 0")
            sides[side].append((f"{classes[label]}/{clip}", label))
    return Lists(classes, sides["1"], sides["2"], sides["0"])


def source(name: str) -> str | None:
    """The class and the film of a clip, where its name has the form `<film>_<class>_<properties>`."""
    path = PurePosixPath(name)
    match = re.fullmatch(rf"(.+)_{re.escape(path.parent.name)}{PROPERTIES}", path.stem)
    return f"{path.parent.name}/{match[1]}" if match else None
