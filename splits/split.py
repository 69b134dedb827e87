"""Clips, splits of them into training and test, and parts of them that are held out or shared out."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import numpy as np

from utils.process import UserError
from video.reader import Video, check_whole

RANDOM = "random"
# The original's share of test clips in its random split.
RANDOM_TEST = 0.2


@dataclass(frozen=True)
class Clip:
    """A clip of the data set that is there.

    Attributes:
        name: as the lists name it, `<Class>/<file>.avi`
        label: from 0, by the order of the classes
        video: its file or its folder of frames
        source: what it is cut out of, as the data set tells: clips of one source show the same scene; None
            where the name does not tell
    """

    name: str
    label: int
    video: Video
    source: str | None = None

    @property
    def group(self) -> str:
        """The source, for what must not lie on both sides of a split.

        Raises: UserError if the name does not tell.
        """
        if self.source is None:
            raise UserError(
                f"{self.name}: the name does not tell its group, as v_<Class>_g01_c01.avi does; without "
                "groups no clips can be held out; --group_pattern says where in a name it stands"
            )
        return self.source

    @property
    def group_or_name(self) -> str:
        """The source; a clip whose name tells none is one of its own."""
        return self.source or self.name


@dataclass(frozen=True)
class Lists:
    """What the lists of a split name, whether it is there or not.

    Attributes:
        classes: class names, by label
        train, test: names and labels
        unused: those that the split leaves out
    """

    classes: list[str]
    train: list[tuple[str, int]]
    test: list[tuple[str, int]]
    unused: list[tuple[str, int]] = field(default_factory=list)

    @property
    def entries(self) -> list[tuple[str, int]]:
        """All that is trained on or tested."""
        return self.train + self.test

    def stems(self) -> set[str]:
        """All names without their suffix, `<Class>/<file>`: a clip may be a video or a folder of frames."""
        return {name.rsplit(".", 1)[0] for name, _ in self.entries + self.unused}


@dataclass(frozen=True)
class Split:
    """The clips of one split that are there, and how many the lists name.

    Attributes:
        classes: class names, by label
        train, test: clips in the order of the lists
        listed: number of clips that both lists name
    """

    classes: list[str]
    train: list[Clip]
    test: list[Clip]
    listed: int

    def relabelled(self, classes: list[str]) -> Self:
        """The same clips with labels in another order of the same classes."""
        labels = [classes.index(name) for name in self.classes]
        train, test = (
            [replace(clip, label=labels[clip.label]) for clip in clips] for clips in (self.train, self.test)
        )
        return replace(self, classes=classes, train=train, test=test)

    def missing(self) -> str | None:
        """One line that counts what the lists name and is not there; None if all is."""
        present = len(self.train) + len(self.test)
        if present == self.listed:
            return None
        labels = {clip.label for clip in self.train + self.test}
        return (
            f"{present:,} of {self.listed:,} listed clips found, "
            f"{len(labels)} of {len(self.classes)} classes; going on with those"
        )


def find_clips(
    dataset_path: Path, source: Callable[[str], str | None], entries: Sequence[tuple[str, int]]
) -> list[Clip]:
    """Those of the listed clips that are there, as a video or else as a folder of frames.

    Args:
        source: what a clip is cut out of, by its name
        entries: names and labels

    Raises: VideoError for a video that is empty or truncated.
    """
    clips = []
    for name, label in entries:
        path = dataset_path / name
        if path.is_file():
            check_whole(path)
        elif not (path := path.with_suffix("")).is_dir():
            continue
        clips.append(Clip(name, label, Video(path), source(name)))
    return clips


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

    Raises: UserError if a name does not tell its group, or a class has a single group, or none that can be
        held out without those of another class.
    """
    groups: dict[int, set[str]] = {}
    for clip in clips:
        groups.setdefault(clip.label, set()).add(clip.group)
    held: set[str] = set()
    for label, names in groups.items():
        distinct = sorted(names)
        if len(distinct) < 2:
            raise UserError(
                f"the group {distinct[0]} is the only one of its class in training, so none can be held out; "
                "add clips, or leave out --val_fraction"
            )
        number = min(len(distinct) - 1, max(1, round(fraction * len(distinct))))
        drawn = np.random.default_rng([seed, label]).choice(distinct, number, replace=False).tolist()
        for group in [*drawn, *distinct]:
            # A group may be of several classes, each of which keeps one to train on.
            whole = any(group in other and other <= held | {group} for other in groups.values())
            if len(names & held) < number and not whole:
                held.add(group)
        if not names & held:
            raise UserError(
                f"the groups {distinct[0]} and {distinct[1]} cannot be held out, since another class has no "
                "others; add clips, or leave out --val_fraction"
            )
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

        Raises: UserError if it is anything else.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(f"shard {text!r} does not exist; write 1/8 for the first of eight")
        return cls(int(match[1]), int(match[2]))

    @property
    def suffix(self) -> str:
        """What the names of its files end in."""
        return "" if self.count == 1 else f"-{self.number}of{self.count}"

    def part(self, clips: Sequence[Clip]) -> list[Clip]:
        """The clips that fall to it; depends on nothing but their names."""
        return sorted(clips, key=lambda clip: clip.name)[self.number - 1 :: self.count]


WHOLE = Shard()
