"""A folder of class folders as a data set of its own: its clips, their groups, and splits drawn from these.

    my_clips/Jump/holiday_1.mp4         a video, in any container that can be decoded
    my_clips/Jump/garden/0.jpg          or a folder of frames

Clips of a group are cut out of one video, so a group lies on one side of a split: its folds are drawn over
groups. They are kept as lists in UCF-101's form, so that a test finds the very same when clips have come or
gone.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from splits import hmdb51, ucf101
from splits.split import Lists
from utils.files import json_bytes, write_whole
from utils.process import MissingFileError, UserError
from video.files import IMAGE_SUFFIXES, VIDEO_SUFFIXES

FOLDS = (1, 2, 3, 4, 5)
# In the folder of the lists: where they are from, and what tells them from UCF-101's.
ABOUT = "dataset.json"
LAYOUT = "clips lie in a folder for each class, as Jump/1.mp4 and Run/1.mp4"


def natural(name: str) -> list[tuple[int, int, str]]:
    """Key that sorts names as people do: numbers in them by size, 2 before 10, and letters in either case."""
    parts = re.split(r"(\d+)", name.casefold())
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts if part]


def source(name: str) -> str:
    """The group of a clip: by HMDB-51's or UCF-101's names, or what is before a number, or the clip itself.

    v_Jump_g01_c02 is of v_Jump_g01, and holiday_2 of holiday; the class goes with it.
    """
    path = PurePosixPath(name)
    stem = re.fullmatch(r"(.+)_\d+", path.stem)
    other = f"{path.parent.name}/{ucf101.source(name) or (stem[1] if stem else path.stem)}"
    return hmdb51.source(name) or other


def visible_folders(path: Path) -> list[Path]:
    """The folders in a folder that are not hidden."""
    return [entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")]


def class_folders(dataset_path: Path) -> list[Path]:
    """The folders in a data set that are not hidden, in natural order.

    Raises: MissingFileError if there is no such folder, or none in it.
    """
    if not dataset_path.is_dir():
        raise MissingFileError(f"{dataset_path}: no such folder; name the data set with --dataset_path")
    folders = visible_folders(dataset_path)
    if not folders:
        raise MissingFileError(f"{dataset_path}: no class folders there; {LAYOUT}")
    return sorted(folders, key=lambda path: (natural(path.name), path.name))


def clip_names(folder: Path) -> Iterator[tuple[str, Path]]:
    """Names, as lists write them, and paths of the clips in a class folder, in natural order.

    A folder of frames is named as a video would be, with .avi. Raises: MissingFileError for a broken link.
    """
    for path in sorted(folder.iterdir(), key=lambda path: (natural(path.name), path.name)):
        if path.name.startswith("."):
            continue
        if path.is_symlink() and not path.exists():
            raise MissingFileError(
                f"{path}: a link to {path.readlink()}, which is not there; delete or mend it"
            )
        if path.is_dir():
            if any(file.suffix.lower() in IMAGE_SUFFIXES for file in path.iterdir()):
                yield f"{folder.name}/{path.name}.avi", path
        elif path.suffix.lower() in VIDEO_SUFFIXES:
            yield f"{folder.name}/{path.name}", path


def stems(dataset_path: Path) -> set[str]:
    """Names without their suffix, `<Class>/<file>`, of the videos and folders in the class folders."""
    return {
        f"{folder.name}/{path.name if path.is_dir() else path.stem}"
        for folder in visible_folders(dataset_path)
        for path in folder.iterdir()
        if not path.name.startswith(".") and (path.suffix.lower() in VIDEO_SUFFIXES or path.is_dir())
    }


def strays(dataset_path: Path) -> list[str]:
    """Names of the files in class folders that are not read, since they do not end as videos do."""
    return [
        f"{folder.name}/{path.name}"
        for folder in class_folders(dataset_path)
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".") and path.suffix.lower() not in VIDEO_SUFFIXES and path.is_file()
    ]


def scan(dataset_path: Path) -> tuple[list[str], list[list[str]]]:
    """Class names, and the names of the clips of each.

    Raises: MissingFileError if there is no such folder, or no class folder in it; UserError for a single
        class, one in two spellings, one without clips, a clip as a video and as frames, or a name that no
        list can hold.
    """
    folders = class_folders(dataset_path)
    if len(folders) < 2:
        raise UserError(
            f"{dataset_path}: {folders[0].name} is the only class folder, and it takes two classes at least; "
            f"{LAYOUT}"
        )
    spellings: dict[str, Path] = {}
    clips = []
    for folder in folders:
        # But 1_1 is not 11.
        plain = re.sub(r"[\s_-]+", "_", unicodedata.normalize("NFKC", folder.name).casefold())
        plain = re.sub(r"(?<!\d)_|_(?!\d)", "", plain) or folder.name
        if other := spellings.get(plain):
            raise UserError(
                f"{folder}: {folder.name} and {other.name} look like one class in two spellings; put the "
                "clips into one folder, or give the classes other names"
            )
        spellings[plain] = folder
        clips.append(_clips_of(folder))
    return [folder.name for folder in folders], clips


def _clips_of(folder: Path) -> list[str]:
    found = dict(clip_names(folder))
    if not found:
        if any(path.suffix.lower() in VIDEO_SUFFIXES for path in folder.glob("*/*")):
            raise UserError(
                f"{folder}: no clips in this class folder, but videos in the folders in it; {LAYOUT}; name "
                "the folder of the class folders with --dataset_path"
            )
        raise UserError(
            f"{folder}: no clips in this class folder, of {', '.join(VIDEO_SUFFIXES)}; {LAYOUT}; put some "
            "there, or delete the folder"
        )
    videos = {path.stem: path for path in found.values() if not path.is_dir()}
    for name, path in found.items():
        if path.is_dir() and path.name in videos:
            raise UserError(
                f"{path}: the frames of {videos[path.name].name}, which is there too; keep one of the two"
            )
        # Control characters, line breaks among them, and bytes that are no UTF-8.
        control = any(unicodedata.category(character) in ("Cc", "Cs") for character in name)
        if control or "\\" in name or name.split("/")[0] != folder.name.strip():
            raise UserError(
                f"{str(path)!r}: a name with a line break or another control character, a backslash, or a "
                "space around the class; rename it"
            )
    return list(found)


def group_of(name: str, pattern: str) -> str:
    """The group of a clip by --group_pattern, the same in all classes: a person may do several actions.

    The pattern is looked for in the clip's file name without its suffix; the group is what its first
    brackets hold, or all of it where it has none.

    Raises: UserError where it is not in the name.
    """
    path = PurePosixPath(name)
    match = re.search(pattern, path.stem)
    group = match and match[1 if match.re.groups else 0]
    if not group:
        raise UserError(
            f"--group_pattern {pattern!r}: not found in {path.stem!r}, the name of {name}; widen it, as in "
            "'person[0-9]+|.+'; what its first brackets hold is the group, if it has any"
        )
    return group


@dataclass(frozen=True)
class Folds:
    """Splits of a folder of class folders.

    Attributes:
        classes: names in natural order
        clips: names of the clips of each class
        fold: of each clip, by its name: the split that tests it, from 1
    """

    classes: list[str]
    clips: list[list[str]]
    fold: Mapping[str, int]

    @property
    def numbers(self) -> tuple[int, ...]:
        """Of the splits."""
        return FOLDS[: max(self.fold.values())]

    def balance(self) -> str:
        """How many clips the folds test, and which classes are not in all of them, in words."""
        sizes = Counter(self.fold.values())
        text = f"they test {min(sizes.values()):,} to {max(sizes.values()):,} clips each"
        absent = [
            name
            for name, names in zip(self.classes, self.clips, strict=True)
            if len({self.fold[clip] for clip in names}) < len(self.numbers)
        ]
        if absent:
            text += f", and not each of them has {len(absent):,} of the classes, the first {absent[0]}"
        return text

    def lists(self, number: int) -> Lists:
        """What is trained on and tested in a split."""
        entries = [(name, label) for label, names in enumerate(self.clips) for name in names]
        return Lists(
            self.classes,
            [entry for entry in entries if self.fold[entry[0]] != number],
            [entry for entry in entries if self.fold[entry[0]] == number],
        )


def draw_folds(dataset_path: Path, group_of_clip: Callable[[str], str | None] = source) -> Folds:
    """Five folds over groups, or as many as a class has groups; the same for the same names.

    Groups are dealt out, those of several classes first and then those of each class, the largest first, to
    the fold that has the fewest clips of their classes.

    Args:
        group_of_clip: by its name

    Raises: as `scan` and `group_of_clip`; UserError for a class with one group, or whose groups all fall
        into one fold.
    """
    classes, clips_by_class = scan(dataset_path)
    by_class: list[dict[str, list[str]]] = []
    for name, names in zip(classes, clips_by_class, strict=True):
        groups: dict[str, list[str]] = defaultdict(list)
        for clip in names:
            groups[group_of_clip(clip) or clip].append(clip)
        if len(groups) < 2:
            group = next(iter(groups)).removeprefix(f"{name}/")
            names_differ = len({PurePosixPath(clip).stem for clip in names}) > 1
            further = (
                ", or say which part of a name tells the video: --group_pattern '.+' takes each clip for one "
                "of its own"
            )
            raise UserError(
                f"{dataset_path / name}: all its clips ({len(names)}) are of one group, {group!r}, and a "
                "group lies on one side of a split; add clips out of another video" + further * names_differ
            )
        by_class.append(groups)
    count = min(len(FOLDS), max(map(len, by_class)))
    clips_of: dict[str, Counter[int]] = defaultdict(Counter)
    for label, groups in enumerate(by_class):
        for group, names in groups.items():
            clips_of[group][label] += len(names)
    shared = sorted(group for group, of_label in clips_of.items() if len(of_label) > 1)
    own = np.zeros((len(classes), count), int)
    chosen: dict[str, int] = {}

    def cost(group: str, number: int) -> tuple[int, int, int]:
        of_label = clips_of[group]
        # A class must not be in one fold alone.
        alone = sum(
            all(chosen.get(other) == number for other in by_class[label] if other != group)
            for label in of_label
        )
        same = sum(clips * int(own[label, number]) for label, clips in of_label.items())
        return alone, same, int(own[:, number].sum())

    parts = [(len(classes), shared), *((label, sorted(groups)) for label, groups in enumerate(by_class))]
    for seed, names in parts:
        order = np.random.default_rng([0, seed]).permutation(names).tolist()
        for group in sorted(order, key=lambda group: -clips_of[group].total()):
            if group not in chosen:
                chosen[group] = min(range(count), key=lambda number: cost(group, number))
                for label, clips in clips_of[group].items():
                    own[label, chosen[group]] += clips
    for name, of_fold in zip(classes, own, strict=True):
        if np.count_nonzero(of_fold) < 2:
            raise UserError(
                f"{dataset_path / name}: its groups share clips with those of other classes so that all fall "
                "into one fold; add clips of another group, or narrow --group_pattern"
            )
    fold = {
        clip: chosen[group] + 1 for groups in by_class for group, names in groups.items() for clip in names
    }
    return Folds(classes, clips_by_class, fold)


def write_lists(folder: Path, folds: Folds, group_pattern: str | None) -> None:
    """Keep the lists of all folds in a folder. Raises: OSError if they cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    classes = "".join(f"{label} {name}\n" for label, name in enumerate(folds.classes, 1))
    write_whole(folder / "classInd.txt", classes.encode())
    for number in folds.numbers:
        lists = folds.lists(number)
        train = "".join(f"{name} {label + 1}\n" for name, label in lists.train)
        write_whole(folder / f"trainlist{number:02d}.txt", train.encode())
        write_whole(
            folder / f"testlist{number:02d}.txt", "".join(f"{name}\n" for name, _ in lists.test).encode()
        )
    write_whole(folder / ABOUT, json_bytes({"dataset": "folder", "group_pattern": group_pattern}))


def is_lists(folder: Path) -> bool:
    """Whether a folder holds what `write_lists` wrote."""
    return (folder / ABOUT).is_file()


def read_pattern(folder: Path) -> str | None:
    """The --group_pattern that lists were drawn with. Raises: UserError for a file that is damaged."""
    try:
        pattern = json.loads((folder / ABOUT).read_text(encoding="utf-8"))["group_pattern"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / ABOUT}: damaged; train anew, or name other lists") from error
    return None if pattern is None else str(pattern)


def linked_outside(dataset_path: Path, folds: Folds) -> list[str]:
    """Names of the clips that lie elsewhere, since they or their class folders are links."""
    inside = dataset_path.resolve()
    linked = {name for name in folds.classes if (dataset_path / name).is_symlink()}
    return [
        clip
        for name, clips in zip(folds.classes, folds.clips, strict=True)
        for clip in clips
        if (name in linked or (dataset_path / clip).is_symlink())
        and not (dataset_path / clip).resolve().is_relative_to(inside)
    ]


def list_numbers(folder: Path) -> tuple[int, ...]:
    """Of the splits whose lists are kept in a folder."""
    return tuple(number for number in FOLDS if (folder / f"testlist{number:02d}.txt").is_file())
