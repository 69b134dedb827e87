"""A folder of class folders as a data set: its clips, their groups, and splits drawn from these.

    my_clips/Jump/holiday_1.mp4         a video, in any container that can be decoded
    my_clips/Jump/garden/0.jpg          or a folder of frames

Clips of a group are cut out of one video, so a group lies on one side of a split. Splits are kept as lists in
UCF-101's form, so that a test finds the very same when clips have come or gone.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from splits import hmdb51, ucf101
from splits.split import Lists, stratified_folds
from utils.files import json_bytes, write_whole
from utils.process import MissingFileError, UserError
from video.files import IMAGE_SUFFIXES, VIDEO_SUFFIXES

FOLDS = (1, 2, 3, 4, 5)
# In the folder of the lists: what tells them from UCF-101's.
ABOUT = "dataset.json"
LAYOUT = "clips lie in a folder for each class, as Jump/1.mp4 and Run/1.mp4"


def natural(name: str) -> list[tuple[int, int, str]]:
    """Key that sorts names as people do: numbers in them by size, 2 before 10, and letters in either case."""
    parts = re.split(r"(\d+)", name.casefold())
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts if part]


def source(name: str) -> str:
    """The group of a clip: as in HMDB-51 or UCF-101, or what is before its number, as in holiday_2."""
    path = PurePosixPath(name)
    group = ucf101.source(name) or re.sub(r"(?<=.)_\d+$", "", path.stem)
    return hmdb51.source(name) or f"{path.parent.name}/{group}"


def group_of(name: str, pattern: str) -> str:
    """The group of a clip by --group_pattern, the same in all classes: a person may do several actions.

    It is what the pattern's first brackets hold, or all that it finds, in the file's name without suffix.
    """
    stem = PurePosixPath(name).stem
    match = re.search(pattern, stem)
    group = match and match[1 if match.re.groups else 0]
    if not group:
        raise UserError(
            f"--group_pattern {pattern!r}: not found in {stem!r}, the name of {name}; widen it, as in "
            "'person[0-9]+|.+'; what its first brackets hold is the group, if it has any"
        )
    return group


def visible(folder: Path) -> list[Path]:
    """What is in a folder and not hidden, in natural order."""
    entries = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return sorted(entries, key=lambda path: (natural(path.name), path.name))


def class_folders(dataset_path: Path) -> list[Path]:
    """The class folders in natural order. Raises: MissingFileError if there is none."""
    if not dataset_path.is_dir():
        raise MissingFileError(f"{dataset_path}: no such folder; name the data set with --dataset_path")
    folders = [path for path in visible(dataset_path) if path.is_dir()]
    if not folders:
        raise MissingFileError(f"{dataset_path}: no class folders there; {LAYOUT}")
    return folders


def clip_names(folder: Path) -> Iterator[tuple[str, Path]]:
    """Names, as lists write them, and paths of the clips in a class folder, in natural order.

    A folder of frames is named as a video would be, with .avi. Raises: MissingFileError for a broken link.
    """
    for path in visible(folder):
        if path.is_symlink() and not path.exists():
            raise MissingFileError(
                f"{path}: a link to what is not there, {path.readlink()}; mend or delete it"
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
        for folder in visible(dataset_path)
        if folder.is_dir()
        for path in visible(folder)
        if path.suffix.lower() in VIDEO_SUFFIXES or path.is_dir()
    }


def scan(dataset_path: Path) -> dict[str, list[str]]:
    """The names of the clips of each class. Raises: UserError for what cannot be trained on or listed."""
    folders = class_folders(dataset_path)
    if len(folders) < 2:
        raise UserError(f"{dataset_path}: {folders[0].name} is the only class folder; {LAYOUT}")
    classes, spellings = {}, dict[str, str]()
    for folder in folders:
        # But 1_1 is not 11.
        plain = re.sub(r"[\s_-]+", "_", unicodedata.normalize("NFKC", folder.name).casefold())
        plain = re.sub(r"(?<!\d)_|_(?!\d)", "", plain) or folder.name
        if (other := spellings.setdefault(plain, folder.name)) != folder.name:
            raise UserError(
                f"{folder}: {folder.name} and {other} look like one class in two spellings; put the clips "
                "into one folder, or give the classes other names"
            )
        clips = dict(clip_names(folder))
        if not clips:
            raise UserError(
                f"{folder}: no clips in this class folder, of {', '.join(VIDEO_SUFFIXES)}; {LAYOUT}; name "
                "the folder of the class folders with --dataset_path, or delete the empty one"
            )
        videos = {path.stem for path in clips.values() if not path.is_dir()}
        for name, path in clips.items():
            if path.is_dir() and path.name in videos:
                raise UserError(f"{path}: frames of a video that is there too; keep one of the two")
            # Control characters, line breaks among them, and bytes that are no UTF-8.
            control = any(unicodedata.category(character) in ("Cc", "Cs") for character in name)
            if control or "\\" in name or name.split("/")[0] != folder.name.strip():
                raise UserError(f"{str(path)!r}: a control character, backslash or outer space; rename it")
        classes[folder.name] = list(clips)
    return classes


@dataclass(frozen=True)
class Folds:
    """Splits of a folder of class folders: the clips of each class, and the fold that tests each, from 1."""

    clips: dict[str, list[str]]
    fold: dict[str, int]

    @property
    def numbers(self) -> tuple[int, ...]:
        """Numbers of the splits."""
        return FOLDS[: max(self.fold.values())]

    def balance(self) -> str:
        """How many clips the folds test, and which classes are not in all of them, in words."""
        sizes = Counter(self.fold.values()).values()
        folds_of = {name: {self.fold[clip] for clip in clips} for name, clips in self.clips.items()}
        absent = [name for name, folds in folds_of.items() if len(folds) < len(self.numbers)]
        more = (
            f", and {len(absent):,} of the classes, the first {absent[0]}, are not in all" if absent else ""
        )
        return f"they test {min(sizes):,} to {max(sizes):,} clips each{more}"

    def lists(self, number: int) -> Lists:
        """What is trained on and tested in a split."""
        sides: tuple[list[tuple[str, int]], list[tuple[str, int]]] = [], []
        for label, clips in enumerate(self.clips.values()):
            for name in clips:
                sides[self.fold[name] == number].append((name, label))
        return Lists(list(self.clips), *sides)


def draw_folds(dataset_path: Path, group_of_clip: Callable[[str], str | None] = source) -> Folds:
    """Five folds over groups, or as many as a class has groups; the same for the same names.

    Each class has about as many clips in each fold.

    Raises: UserError if a class lies in one fold.
    """
    classes, group_of = scan(dataset_path), dict[str, str]()
    for name, clips in classes.items():
        group_of |= {clip: group_of_clip(clip) or clip for clip in clips}
        if len(clips) < 2:
            raise UserError(
                f"{dataset_path / name}: it has {len(clips)} clip, and a class takes 2 or more; add some"
            )
        if len(groups := {group_of[clip] for clip in clips}) < 2:
            group = groups.pop().removeprefix(f"{name}/")
            raise UserError(
                f"{dataset_path / name}: all its clips ({len(clips)}) are of one group, {group!r}; add clips "
                "out of another video, or say what tells it: --group_pattern '.+' takes each clip for its own"
            )
    count = min(len(FOLDS), max(len({group_of[clip] for clip in clips}) for clips in classes.values()))
    names = [clip for clips in classes.values() for clip in clips]
    labels = [label for label, clips in enumerate(classes.values()) for _ in clips]
    drawn = stratified_folds(labels, [group_of[name] for name in names], count)
    fold = dict(zip(names, drawn, strict=True))
    for name, clips in classes.items():
        if len({fold[clip] for clip in clips}) < 2:
            raise UserError(
                f"{dataset_path / name}: all its groups fall into one fold, since they are of other classes "
                "too; add clips of another group, or narrow --group_pattern"
            )
    return Folds(classes, fold)


def write_lists(folder: Path, folds: Folds, group_pattern: str | None) -> None:
    """Keep the lists of all folds in a folder. Raises: OSError if they cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"classInd": "".join(f"{label} {name}\n" for label, name in enumerate(folds.clips, 1))}
    for number in folds.numbers:
        lists = folds.lists(number)
        texts[f"trainlist{number:02d}"] = "".join(f"{name} {label + 1}\n" for name, label in lists.train)
        texts[f"testlist{number:02d}"] = "".join(f"{name}\n" for name, _ in lists.test)
    for name, text in texts.items():
        write_whole(folder / f"{name}.txt", text.encode())
    write_whole(folder / ABOUT, json_bytes({"dataset": "folder", "group_pattern": group_pattern}))


def read_pattern(folder: Path) -> str | None:
    """The --group_pattern that lists were drawn with. Raises: UserError for a file that is damaged."""
    try:
        pattern = json.loads((folder / ABOUT).read_text(encoding="utf-8"))["group_pattern"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / ABOUT}: damaged; train anew, or name other lists") from error
    return None if pattern is None else str(pattern)
