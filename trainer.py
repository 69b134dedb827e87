"""The loop of a training: epochs, tests, saving, and a good end when a signal comes."""

from __future__ import annotations

import argparse
import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence

from torch import nn

import cli
from dataset import ClipBatches
from engine import Batches, LossError, evaluate, train_one_epoch
from history import History
from ranks import Ranks
from run import Run
from splits import RANDOM, Clip

# Batches of clips, and the clips.
Part = tuple[ClipBatches, Sequence[Clip]]


class Trainer:
    """Trains a run to its end.

    Args:
        run: where it stands
        args: the flags of train.py
        ranks: processes that train together
        training: the training batches and the clips that they name
        loaders: of "train", "test", "val" where clips are held out, "pretraining" where that comes first
        pretraining: as `training`, without labels
        history: makes what shows the course of the run, or of the pretraining; in the first process
    """

    def __init__(
        self,
        run: Run,
        args: argparse.Namespace,
        ranks: Ranks,
        training: Part,
        loaders: dict[str, Batches],
        pretraining: Part | None,
        history: Callable[[bool], History] | None,
    ) -> None:
        self.run, self.args, self.ranks, self.history = run, args, ranks, history
        self.training, self.pretraining, self.loaders = training, pretraining, loaders
        self.model, self.device = run.checkpoint.model, run.checkpoint.model.encoder.device
        self._first = ranks.rank == 0

    def fit(self) -> None:
        """Train from where the run stands.

        Raises: ValueError that names the clips if the loss is no number any more; cli.Interrupted after a
            signal, when all is saved.
        """
        run, args = self.run, self.args
        with cli.Deferred() as signals:
            if run.pretraining:
                assert run.pretrainer is not None
                masked = run.pretrainer.masked
                with self._shown() as history:
                    # What only the labels train has no part in it.
                    forward = self.ranks.parallel(masked, masked.forward, uses_all=False)
                    while run.pretraining:
                        self._epoch(forward, signals, history)
            with self._shown() as history:
                forward = self.ranks.parallel(self.model, self.model.classify)
                while run.epoch <= args.num_epochs and not run.out_of_patience(args.patience):
                    self._epoch(forward, signals, history)
            if self._first:
                run.save_last()

    @contextlib.contextmanager
    def _shown(self) -> Iterator[History | None]:
        if self.history is None:
            yield None
        else:
            with contextlib.closing(self.history(self.run.pretraining)) as history:
                yield history

    def _stop(self, signals: cli.Deferred) -> bool:
        stopping = self.ranks.any(signals.signum is not None)
        if self._first:
            self.run.save_last() if stopping else self.run.save_if_due()
        return stopping

    def _stopped(self, signals: cli.Deferred) -> cli.Interrupted:
        phase = "the pretraining's " if self.run.pretraining else ""
        cli.say(
            f"stopped in {phase}epoch {self.run.epoch} after {self.run.tally.batches} batches; go on "
            "with --resume"
        )
        return cli.Interrupted(signals.signum or signal.SIGTERM)

    def _epoch(self, forward: nn.Module, signals: cli.Deferred, history: History | None) -> None:
        run, args = self.run, self.args

        def stop() -> bool:
            return self._stop(signals)

        description = f"epoch {run.epoch} of {args.num_epochs}"
        order, clips = self.training
        loader = self.loaders["train"]
        if run.pretraining:
            description = f"pretraining, epoch {run.epoch} of {args.pretrain}"
            assert self.pretraining is not None
            order, clips = self.pretraining
            loader = self.loaders["pretraining"]
        order.epoch, order.start = run.epoch, run.tally.batches
        started, before = time.perf_counter(), run.tally.clips
        try:
            whole = train_one_epoch(
                forward, loader, run.learner, self.device,
                epoch=run.epoch, description=description, tally=run.tally, ranks=self.ranks, stop=stop,
            )  # fmt: skip
        except LossError as error:
            names = ", ".join(clips[index].name for _, index in order.whole()[error.batch])
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
        figures["seconds"] = time.perf_counter() - started
        if run.tally.clips > before:
            figures["clips_per_second"] = (run.tally.clips - before) / figures["seconds"]
        if run.pretraining:
            if history is not None:
                history.write([*run.history, {"epoch": run.epoch, **figures}])
            run.end_epoch(figures, write=self._first)
            return
        # What is tested and saved is the average of the weights.
        with run.learner.averaged():
            tested = self._tested(signals)
        if tested is None:
            stop()
            raise self._stopped(signals)
        run.end_epoch(figures | tested, write=self._first)
        if history is not None:
            history.write(run.history)

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
