"""A training run that may be stopped at any instant: where it stands, and its files in a folder.

<Model>_<epoch>.pth     every few epochs: model and settings
best.pth                the epoch with the best validation accuracy, where clips are held out for that
last.pth                where the run stands, with all that it takes to go on
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import filelock

from training.checkpoint import Checkpoint, CheckpointError, save_checkpoint
from training.evaluate import Tally
from training.learner import Learner
from training.settings import LAST
from utils.files import make_writable_folder, unused
from utils.process import UserError, say

BEST = "best.pth"


@contextlib.contextmanager
def hold_folder(folder: Path, *, writes: bool = True, flag: str = "--output_path") -> Iterator[None]:
    """Make the output folder of a training, and keep others out of it.

    Args:
        writes: whether this process does so; one of several does
        flag: that names the folder

    Raises: UserError if the folder cannot be written, or another training runs there.
    """
    if not writes:
        yield
        return
    make_writable_folder(folder)
    try:
        held = filelock.FileLock(folder / ".lock").acquire(blocking=False)
    except filelock.Timeout:
        raise UserError(f"{folder}: another training writes there; choose another {flag}") from None
    with held:
        yield


class Run:
    """Where a training stands, and its files.

    Args:
        folder: for the files; it exists
        checkpoint: the model on its device, and what each file holds besides
        learner: of the model
        save_seconds: how much training a power cut may cost
        writes: whether this process writes the files; one of several does

    Attributes:
        epoch: the one in progress, from 1
        tally: figures of it so far
        history: figures of the epochs before, by name
        best: the highest validation accuracy in percent and its epoch, of equal ones that of the least
            validation loss; None before the first
        temperature: of the model as it is, where clips are held out
    """

    def __init__(
        self,
        folder: Path,
        checkpoint: Checkpoint,
        learner: Learner,
        save_seconds: float,
        *,
        writes: bool = True,
    ) -> None:
        self.folder, self.checkpoint, self.learner = folder, checkpoint, learner
        self.save_seconds, self.writes = save_seconds, writes
        self.name = checkpoint.model.name
        self.epoch, self.tally = 1, Tally(unit=learner.unit)
        self.history: list[dict[str, float]] = []
        self.best: tuple[float, int] | None = None
        self.temperature = 1.0
        self._saved = time.monotonic()

    def make_room(self) -> None:
        """Move the files of an earlier run into <folder>/earlier-<n>, so that none is overwritten."""
        earlier = [path for path in self.folder.glob("*.pth") if self._is_ours(path)]
        if not (self.writes and earlier):
            return
        aside = unused(self.folder / "earlier", first="-1")
        aside.mkdir()
        for path in earlier:
            path.rename(aside / path.name)
        say(f"{len(earlier)} checkpoints of an earlier run moved to {aside}")

    def _is_ours(self, path: Path) -> bool:
        return path.name in (LAST, BEST) or self._epoch_of(path) is not None

    def _epoch_of(self, path: Path) -> int | None:
        match = re.fullmatch(rf"{self.name}_(\d+)\.pth", path.name)
        return int(match[1]) if match else None

    @property
    def begun(self) -> bool:
        """Whether a batch has been trained on."""
        return self.epoch > 1 or self.tally.batches > 0

    def _now(self, epoch: int, training: dict[str, Any] | None = None) -> Checkpoint:
        return replace(self.checkpoint, epoch=epoch, training=training, temperature=self.temperature)

    def save_last(self) -> None:
        """Write last.pth: the middle of the epoch, or its beginning."""
        if not self.writes:
            return
        training = {
            "learner": self.learner.state_dict(),
            "epoch": self.epoch,
            "tally": asdict(self.tally),
            "history": self.history,
            "best": self.best,
        }
        whole = self._now(self.epoch - 1, training)
        save_checkpoint(self.folder / LAST, whole)
        self._saved = time.monotonic()

    def save_if_due(self) -> None:
        """Write last.pth if the last time is so long ago that the work since should not be lost."""
        if time.monotonic() - self._saved >= self.save_seconds:
            self.save_last()

    def go_on(self, loaded: Checkpoint, num_epochs: int, title: str = "") -> None:
        """Stand where the run stood that wrote `loaded`, whose weights the model has, and say so.

        Args:
            num_epochs: of the whole training
            title: what stands before the number of an epoch

        Raises: UserError for other clips than it was trained on; CheckpointError if it cannot go on.
        """
        training, last = loaded.training, self.folder / LAST
        if training is None:
            raise CheckpointError(f"{last}: not what training needs to go on; train without --resume")
        # Before pretraining was a run of its own, it was a part of this one.
        if training.get("pretraining"):
            raise CheckpointError(
                f"{last}: stopped in pretraining by an earlier version; begin again without --resume"
            )
        if loaded.settings.get("clips") != self.checkpoint.settings["clips"]:
            raise UserError(
                f"{self.checkpoint.settings['dataset_path']}: not the clips that {last} was trained on; "
                "put them back, or begin again without --resume"
            )
        try:
            self.learner.load_state_dict(training["learner"])
            self.epoch, self.tally = int(training["epoch"]), Tally(**training["tally"])
            self.history, self.best = list(training["history"]), training["best"]
            self.temperature = loaded.temperature
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{last}: damaged; begin again without --resume, which moves it aside"
            ) from error
        if self.epoch > num_epochs:
            say(f"{last}: all {num_epochs} epochs are trained already")
        elif self.begun:
            say(f"going on in {title}epoch {self.epoch} after {self.tally.batches} batches")

    def path_of(self, epoch: int) -> Path:
        """The file of an epoch."""
        return self.folder / f"{self.name}_{epoch}.pth"

    def save_epoch(self, *, keep: int | None) -> None:
        """Write <Model>_<epoch>.pth, and remove all but the newest `keep` of them."""
        if not self.writes:
            return
        path = self.path_of(self.epoch)
        save_checkpoint(path, self._now(self.epoch))
        say(f"saved {path}")
        if keep is not None:
            numbered = [
                (epoch, path) for path in self.folder.glob("*.pth") if (epoch := self._epoch_of(path))
            ]
            for _, old in sorted(numbered)[:-keep]:
                old.unlink()

    def end_epoch(self, figures: dict[str, float]) -> None:
        """Note the figures of the epoch, keep its weights if they are the best so far, and begin the next.

        Args:
            figures: by name; `val_accuracy` in percent and `val_loss` in nats where clips are held out
        """
        if "val_accuracy" in figures and self._is_best(figures):
            self.best = (figures["val_accuracy"], self.epoch)
            if self.writes:
                save_checkpoint(self.folder / BEST, self._now(self.epoch))
        self.history.append({"epoch": self.epoch, **figures})
        self.epoch, self.tally = self.epoch + 1, Tally(unit=self.tally.unit)
        self.save_if_due()

    def _is_best(self, figures: dict[str, float]) -> bool:
        if self.best is None:
            return True
        accuracy, epoch = self.best
        # Strong embeddings are all named right after an epoch, when the head has hardly learned.
        loss = self.history[epoch - 1]["val_loss"]
        return (figures["val_accuracy"], -figures["val_loss"]) > (accuracy, -loss)

    def out_of_patience(self, patience: int | None) -> bool:
        """Whether `patience` epochs have ended since the best one."""
        return patience is not None and self.best is not None and self.epoch - 1 - self.best[1] >= patience
