"""The loop of a training: epochs, tests, saving, and a good end when a signal comes."""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Callable, Sequence

import cli
from dataset import ClipBatches
from engine import Batches, LossError, evaluate, train_one_epoch
from history import History
from ranks import Ranks
from run import Run
from splits import RANDOM, Clip


class Trainer:
    """Trains a run to its end.

    Args:
        run: where it stands
        args: the flags of train.py
        ranks: processes that train together
        order: the training batches, and `clips` what they name
        loaders: of "train", "test", and "val" where clips are held out
        history: in the first process, what shows the course of the run
    """

    def __init__(
        self,
        run: Run,
        args: argparse.Namespace,
        ranks: Ranks,
        order: ClipBatches,
        clips: Sequence[Clip],
        loaders: dict[str, Batches],
        history: History | None,
    ) -> None:
        self.run, self.args, self.ranks, self.history = run, args, ranks, history
        self.order, self.clips, self.loaders = order, clips, loaders
        self.model, self.device = run.checkpoint.model, run.checkpoint.model.encoder.device
        self.forward = ranks.parallel(self.model, self.model.classify)
        self._first = ranks.rank == 0

    def fit(self) -> None:
        """Train from where the run stands.

        Raises: ValueError that names the clips if the loss is no number any more; cli.Interrupted after a
            signal, when all is saved.
        """
        with cli.Deferred() as signals:
            while self.run.epoch <= self.args.num_epochs and not self.run.out_of_patience(self.args.patience):
                self._epoch(lambda: self._stop(signals), signals)
            if self._first:
                self.run.save_last()

    def _stop(self, signals: cli.Deferred) -> bool:
        stopping = self.ranks.any(signals.signum is not None)
        if self._first:
            self.run.save_last() if stopping else self.run.save_if_due()
        return stopping

    def _stopped(self, signals: cli.Deferred) -> cli.Interrupted:
        cli.say(
            f"stopped in epoch {self.run.epoch} after {self.run.tally.batches} batches; go on with --resume"
        )
        return cli.Interrupted(signals.signum or signal.SIGTERM)

    def _epoch(self, stop: Callable[[], bool], signals: cli.Deferred) -> None:
        run, args = self.run, self.args
        description = f"epoch {run.epoch} of {args.num_epochs}"
        self.order.epoch, self.order.start = run.epoch, run.tally.batches
        started, before = time.perf_counter(), run.tally.clips
        try:
            whole = train_one_epoch(
                self.forward, self.loaders["train"], run.learner, self.device,
                epoch=run.epoch, description=description, tally=run.tally, ranks=self.ranks, stop=stop,
            )  # fmt: skip
        except LossError as error:
            names = ", ".join(self.clips[index].name for _, index in self.order.whole()[error.batch])
            raise ValueError(
                f"{description}, batch {error.batch + 1}: {error}; the checkpoints in "
                f"{args.output_path} are from before; the clips were {names}"
            ) from error
        if not whole:
            raise self._stopped(signals)
        cli.say(f"{description}: train {run.tally}")
        figures = {
            "train_loss": run.tally.loss,
            "train_accuracy": run.tally.accuracy,
            "learning_rate": run.learner.learning_rate,
        }
        if run.tally.clips > before:
            figures["clips_per_second"] = (run.tally.clips - before) / (time.perf_counter() - started)
        # What is tested and saved is the average of the weights.
        with run.learner.averaged():
            tested = self._tested(signals)
        if tested is None:
            stop()
            raise self._stopped(signals)
        run.end_epoch(figures | tested, write=self._first)
        if self.history is not None:
            self.history.write(run.history)

    def _tested(self, signals: cli.Deferred) -> dict[str, float] | None:
        run, args = self.run, self.args
        due = run.epoch % args.checkpoint_interval == 0 or run.epoch == args.num_epochs
        figures: dict[str, float] = {}
        for name in ("val", "test"):
            if name not in self.loaders or (name == "test" and not due):
                continue
            result = evaluate(
                self.model, self.loaders[name], self.device, description=name, ranks=self.ranks,
                # Alone, a signal is heard in between; several processes must do the same number of steps.
                stop=(lambda: signals.signum is not None) if self.ranks.size == 1 else lambda: False,
            )  # fmt: skip
            if result is None:
                return None
            leak = ", on a split that leaks" if (args.split_number, name) == (RANDOM, "test") else ""
            cli.say(f"epoch {run.epoch} of {args.num_epochs}: {name} {result}{leak}")
            figures |= {f"{name}_loss": result.loss, f"{name}_accuracy": result.accuracy}
        if self._first:
            run.keep_best(figures)
            if due:
                cli.say(f"saved {run.save_epoch(keep=args.keep)}")
        return figures
