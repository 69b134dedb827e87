"""Clips, a split of them into training and test, and what is held out of training."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np

from utils.process import UserError
from video.reader import Video

# What a frame shows that no segment covers.
NO_ACTION = "no action"


@dataclass(frozen=True)
class Clip:
    """A clip that is there."""

    name: str  # as the lists name it, `<Class>/<file>.avi`
    label: int  # from 0, by the order of the classes
    video: Video  # its file or its folder of frames
    source: str | None = None  # the video that it is cut out of, if the name tells
    span: tuple[float, float] | None = None  # seconds of the video that are the clip; None for all of it

    @property
    def title(self) -> str:
        """Its name, and the seconds of the video that it is."""
        return f"{self.name}, {self.span[0]:.2f} to {self.span[1]:.2f} s" if self.span else self.name

    @property
    def group(self) -> str:
        """What must lie on one side of a split: the source. Raises: UserError if the name does not tell."""
        if self.source is None:
            raise UserError(f"{self.name}: the name does not tell its group; say where with --group_pattern")
        return self.source

    @property
    def group_or_name(self) -> str:
        """The source; a clip whose name tells none is one of its own."""
        return self.source or self.name


@dataclass(frozen=True)
class Lists:
    """Names and labels in the lists of a split, whether the clips are there or not; `unused` by the split."""

    classes: list[str]
    train: list[tuple[str, int]]
    test: list[tuple[str, int]]
    unused: list[tuple[str, int]] = field(default_factory=list)

    def stems(self) -> set[str]:
        """All names without their suffix, `<Class>/<file>`: a clip may be a video or a folder of frames."""
        return {name.rsplit(".", 1)[0] for name, _ in self.train + self.test + self.unused}


@dataclass(frozen=True)
class Split:
    """The clips of a split that are there, in the order of the lists, which name `listed` clips.

    `val` are held out of training by the lists themselves.
    """

    classes: list[str]
    train: list[Clip]
    test: list[Clip]
    listed: int
    val: list[Clip] = field(default_factory=list)

    @property
    def clips(self) -> list[Clip]:
        """All of them."""
        return self.train + self.val + self.test

    def relabeled(self, classes: list[str]) -> Self:
        """The same clips with labels in another order of the same classes."""
        labels = [classes.index(name) for name in self.classes]
        train, val, test = (
            [replace(clip, label=labels[clip.label]) for clip in clips]
            for clips in (self.train, self.val, self.test)
        )
        return replace(self, classes=classes, train=train, val=val, test=test)

    def missing(self) -> str | None:
        """One line that counts what the lists name and is not there; None if all is."""
        if len(self.clips) == self.listed:
            return None
        there, every = len({clip.label for clip in self.clips}), len(self.classes)
        more = f" (the head names all {every}; --dataset folder takes {there})" if there < every else ""
        return (
            f"{len(self.clips):,} of {self.listed:,} listed clips found, {there} of {every} classes; "
            f"going on with those{more}"
        )


def check_number(number: int | str, numbers: Sequence[int]) -> None:
    """Raises: UserError for the number of a split that is none of `numbers`."""
    if number not in numbers:
        *most, last = map(str, numbers)
        choice = f"{', '.join(most)}{' or ' * bool(most)}{last}"
        raise UserError(f"split number {number} does not exist; choose {choice}")


def stratified_folds(labels: Sequence[int | str], groups: Sequence[str], count: int) -> list[int]:
    """A fold for each item, from 1: groups stay together, labels are spread; the same for the same items.

    scikit-learn's StratifiedGroupKFold, or GroupKFold where no label has as many items as there are folds.
    """
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

    enough = count <= max(Counter(labels).values())
    folds = StratifiedGroupKFold(count, shuffle=True, random_state=0) if enough else GroupKFold(count)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a label may have fewer items than there are folds
        drawn = list(folds.split(groups, labels, groups))
    fold = {place: number for number, (_, tested) in enumerate(drawn, 1) for place in tested.tolist()}
    return [fold[place] for place in range(len(labels))]


def names_sha256(clips: Sequence[Clip]) -> str:
    """SHA-256 of the clips' titles in their order, in hexadecimal digits."""
    return hashlib.sha256("\n".join(clip.title for clip in clips).encode()).hexdigest()


def hold_out(clips: Sequence[Clip], fraction: float, seed: int) -> tuple[list[Clip], list[Clip]]:
    """Training and validation clips: of each class about `fraction` of its groups, whole, and at least one.

    Raises: UserError if a name does not tell its group, or no group of a class can be held out.
    """
    groups: dict[int, set[str]] = {}
    for clip in clips:
        groups.setdefault(clip.label, set()).add(clip.group)
    held: set[str] = set()
    for label, names in groups.items():
        distinct = sorted(names)
        number = min(len(distinct) - 1, max(1, round(fraction * len(distinct))))
        drawn = np.random.default_rng([seed, label]).choice(distinct, number, replace=False).tolist()
        for group in [*drawn, *distinct]:
            # A group may be of several classes, each of which keeps one to train on.
            whole = any(group in other and other <= held | {group} for other in groups.values())
            if len(names & held) < number and not whole:
                held.add(group)
        if not names & held:
            raise UserError(
                f"the group {distinct[0]} is the only one of its class in training, or the only one left of "
                "another class, so none can be held out; add clips, or leave out --val_fraction"
            )
    return [clip for clip in clips if clip.group not in held], [clip for clip in clips if clip.group in held]
