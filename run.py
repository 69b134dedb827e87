"""A training run that may be stopped at any instant: what it consists of, and its files in a folder.

<Model>_<epoch>.pth     every few epochs: model and settings
best.pth                the epoch with the best validation accuracy, where clips are held out for that
last.pth                where the run stands, with all that it takes to go on
"""

from __future__ import annotations

import argparse
import re
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import filelock

from checkpoint import Checkpoint, CheckpointError, save_checkpoint
from engine import Tally
from pretrain import Pretrainer
from recipe import RECIPE_FLAGS, Learner
from splits import ALL

LAST, BEST = "last.pth", "best.pth"
# The flags that decide the numbers of a training.
SETTINGS = (
    *("encoder", "encoder_weights", "streams", "img_dim", "no_flip", "frame_stride", "cache", "precision"),
    *("compile", "model", "latent_dim", "checkpoint_model", "split_number", "val_fraction", "label_fraction"),
    *("sequence_length", "pretrain", "num_epochs", "batch_size", "patience", "seed"),
    *RECIPE_FLAGS,
)
# Where things are; they may move.
PATHS = ("dataset_path", "split_path", "run_path")


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a checkpoint keeps of the flags, as plain values."""
    return {name: _plain(getattr(args, name)) for name in (*SETTINGS, *PATHS)}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def with_earlier_settings(
    parser: argparse.ArgumentParser, argv: list[str] | None, args: argparse.Namespace, loaded: Checkpoint
) -> argparse.Namespace:
    """The flags of the run that wrote `loaded`, but for those given now that change no number.

    Raises: ValueError that lists the flags given now that disagree.
    """
    untyped = object()
    typed = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), untyped))))
    # Where all splits are trained, each run has its own.
    given = {name: value for name, value in typed.items() if value is not untyped and value != ALL}
    before, last = loaded.settings, args.output_path / LAST
    if missing := [name for name in SETTINGS if name not in before]:
        raise ValueError(f"{last}: it does not say --{missing[0]}; begin again without --resume")
    differ = [
        f"--{name} {given[name]} (there {before[name]})"
        for name in SETTINGS
        if name in given and _plain(given[name]) != before[name]
    ]
    if differ:
        raise ValueError(
            f"{last} was trained with other flags: {', '.join(differ)}; leave them out, or begin again "
            "without --resume"
        )
    paths = {name: Path(before[name]) for name in PATHS if name in before and name not in given}
    return argparse.Namespace(**{**vars(args), **{name: before[name] for name in SETTINGS}, **paths})


def only_one(folder: Path) -> filelock.FileLock:
    """Hold the output folder of a training.

    Raises: ValueError if another one runs there.
    """
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise ValueError(f"{folder}: another training writes there; choose another --output_path") from None
    return lock


class Run:
    """Where a training stands, and its files.

    Args:
        folder: for the files; it exists
        checkpoint: the model on its device, and what each file says about it
        learner: of the model
        save_seconds: how much training a power cut may cost
        pretrainer: of the same model, where it is pretrained first
        pretrain_epochs: for how long

    Attributes:
        pretraining: whether that is in progress; then epoch, tally and history are of it
        epoch: the one in progress, from 1
        tally: figures of it so far
        history: figures of the epochs before, by name
        best: the highest validation accuracy in percent and its epoch; None before the first
    """

    def __init__(
        self,
        folder: Path,
        checkpoint: Checkpoint,
        learner: Learner,
        save_seconds: float,
        pretrainer: Pretrainer | None = None,
        pretrain_epochs: int = 0,
    ) -> None:
        self.folder, self.checkpoint, self.save_seconds = folder, checkpoint, save_seconds
        self.pretrainer, self.pretrain_epochs, self._trainer = pretrainer, pretrain_epochs, learner
        self.name = checkpoint.model.name
        self._begin(pretraining=pretrainer is not None)
        self.best: tuple[float, int] | None = None
        self._saved = time.monotonic()

    def _begin(self, *, pretraining: bool) -> None:
        self.pretraining, self.epoch = pretraining, 1
        self.history: list[dict[str, float]] = []
        self.tally = Tally(unit="hidden frames" if pretraining else "clips")

    @property
    def learner(self) -> Learner:
        """What trains the model at present."""
        if not self.pretraining:
            return self._trainer
        assert self.pretrainer is not None
        return self.pretrainer

    def make_room(self) -> None:
        """Move the files of an earlier run into <folder>/earlier-<n>, so that none is overwritten."""
        earlier = [path for path in self.folder.glob("*.pth") if self._is_ours(path)]
        if not earlier:
            return
        number = 1
        while (self.folder / f"earlier-{number}").exists():
            number += 1
        aside = self.folder / f"earlier-{number}"
        aside.mkdir()
        for path in earlier:
            path.rename(aside / path.name)
        print(f"{len(earlier)} checkpoints of an earlier run moved to {aside}")

    def _is_ours(self, path: Path) -> bool:
        return path.name in (LAST, BEST) or self._epoch_of(path) is not None

    def _epoch_of(self, path: Path) -> int | None:
        match = re.fullmatch(rf"{self.name}_(\d+)\.pth", path.name)
        return int(match[1]) if match else None

    def save_last(self) -> None:
        """Write last.pth: the middle of the epoch, or its beginning."""
        training = {
            "pretraining": self.pretraining,
            "learner": self.learner.state_dict(),
            "epoch": self.epoch,
            "tally": asdict(self.tally),
            "history": self.history,
            "best": self.best,
        }
        whole = replace(self.checkpoint, epoch=0 if self.pretraining else self.epoch - 1, training=training)
        save_checkpoint(self.folder / LAST, whole)
        self._saved = time.monotonic()

    def save_if_due(self) -> None:
        """Write last.pth if the last time is so long ago that the work since should not be lost."""
        if time.monotonic() - self._saved >= self.save_seconds:
            self.save_last()

    def go_on(self, loaded: Checkpoint) -> None:
        """Stand where the run stood that wrote `loaded`, whose weights the model has.

        Raises: CheckpointError if it cannot go on from there.
        """
        training = loaded.training
        try:
            if training is None:
                raise CheckpointError(
                    f"{self.folder / LAST} does not hold what training needs to go on; train without --resume"
                )
            self._begin(pretraining=training["pretraining"])
            self.learner.load_state_dict(training["learner"])
            self.epoch, self.tally = int(training["epoch"]), Tally(**training["tally"])
            self.history, self.best = list(training["history"]), training["best"]
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.folder / LAST}: damaged; begin again without --resume, which moves it aside"
            ) from error

    def path_of(self, epoch: int) -> Path:
        """The file of an epoch."""
        return self.folder / f"{self.name}_{epoch}.pth"

    def save_epoch(self, *, keep: int | None) -> Path:
        """Write <Model>_<epoch>.pth, and remove all but the newest `keep` of them."""
        path = self.path_of(self.epoch)
        save_checkpoint(path, replace(self.checkpoint, epoch=self.epoch))
        if keep is not None:
            numbered = [(epoch, one) for one in self.folder.glob("*.pth") if (epoch := self._epoch_of(one))]
            for _, old in sorted(numbered)[:-keep]:
                old.unlink()
        return path

    def keep_best(self, figures: dict[str, float]) -> None:
        """Write best.pth if the epoch in progress, whose weights the model has, is the best so far.

        Args:
            figures: by name; `val_accuracy` in percent where clips are held out
        """
        if self._is_best(figures):
            save_checkpoint(self.folder / BEST, replace(self.checkpoint, epoch=self.epoch))

    def _is_best(self, figures: dict[str, float]) -> bool:
        accuracy = figures.get("val_accuracy")
        return accuracy is not None and (self.best is None or accuracy > self.best[0])

    def end_epoch(self, figures: dict[str, float], *, write: bool) -> None:
        """Note the figures of the epoch, and begin the next.

        Args:
            figures: as for `keep_best`
            write: write last.pth where it is due; one of several processes does
        """
        if self._is_best(figures):
            self.best = (figures["val_accuracy"], self.epoch)
        self.history.append({"epoch": self.epoch, **figures})
        self.epoch, self.tally = self.epoch + 1, Tally(unit=self.tally.unit)
        if self.pretraining and self.epoch > self.pretrain_epochs:
            self._begin(pretraining=False)
        if write:
            self.save_if_due()

    def out_of_patience(self, patience: int | None) -> bool:
        """Whether `patience` epochs have ended since the best one."""
        return patience is not None and self.best is not None and self.epoch - 1 - self.best[1] >= patience
