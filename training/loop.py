"""The loop of a training: epochs of batches, tests, saving, and a good end when a signal comes."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from splits.split import Clip
from training.batches import Batches, ClipBatches
from training.calibration import fit_temperature
from training.evaluate import predict, progress_bar, tally
from training.history import History
from training.run import Run
from utils.process import Deferred, Interrupted, UserError, say
from utils.ranks import Ranks


@dataclass(frozen=True)
class Part:
    """Clips to train or to test on.

    Attributes:
        clips: all of them, on whichever process
        order: which make a batch
        batches: the embeddings that `order` names
    """

    clips: Sequence[Clip]
    order: ClipBatches
    batches: Batches


@dataclass(frozen=True)
class Plan:
    """How a training goes.

    Attributes:
        training: what to train on
        num_epochs: passes over it
        title: what stands before the number of an epoch
        tests: what to test on, by name; "val" after each epoch, others when the epoch is saved
        interval: epochs between those that are saved
        patience: epochs without a better validation accuracy after which it ends; None: never
        keep: the newest so many files of epochs are kept; None: all
        note: about the tests
    """

    training: Part
    num_epochs: int
    title: str = ""
    tests: dict[str, Part] | None = None
    interval: int = 1
    patience: int | None = None
    keep: int | None = None
    note: str = ""


def fit(run: Run, plan: Plan, ranks: Ranks, history: History | None) -> None:
    """Train from where the run stands to its end.

    Args:
        history: shows the course of the run; in the first process

    Raises: UserError that names the clips if the loss is no number any more; Interrupted after a signal,
        when all is saved.
    """
    learner = run.learner
    forward = ranks.parallel(learner.trained, learner.forward, uses_all=learner.uses_all)
    with Deferred() as signals:
        while run.epoch <= plan.num_epochs and not run.out_of_patience(plan.patience):
            description = f"{plan.title}epoch {run.epoch} of {plan.num_epochs}"
            figures = train_epoch(run, plan.training, forward, ranks, signals, description)
            due = run.epoch % plan.interval == 0 or run.epoch == plan.num_epochs
            for name, part in (plan.tests or {}).items():
                if name == "val" or due:
                    figures |= test(run, name, part, ranks, signals, description, plan.note)
            if due:
                run.save_epoch(keep=plan.keep)
            run.end_epoch(figures)
            if history is not None:
                history.write(run.history)
        run.save_last()
        # One that came after the last batch.
        if ranks.sum(torch.tensor([float(signals.signum or 0)], device=learner.model.device)).item():
            raise stopped(run, signals, f"{plan.title}epoch {run.epoch}")


def train_epoch(
    run: Run, part: Part, forward: nn.Module, ranks: Ranks, signals: Deferred, description: str
) -> dict[str, float]:
    """Train once on each batch that the epoch has still to come; the schedule steps with the batches.

    Returns: the epoch's figures by name, of clips as they were augmented, with smoothed labels.
    Raises: as `fit`.
    """
    learner, tally, first = run.learner, run.tally, run.tally.batches
    part.order.epoch, part.order.start = run.epoch, first
    started = time.perf_counter()
    forward.train()
    bar = progress_bar(part.batches, description, ranks, first)
    for embeddings, padding, labels in bar:
        learner.begin_batch(run.epoch, tally.batches, ranks.rank)
        loss_sum, correct, count = learner.losses(
            forward, embeddings, padding, labels.to(embeddings.device, non_blocking=True)
        )
        # One look for all figures: on an accelerator each waits for all work before it.
        figures = torch.stack(
            [loss_sum.detach(), correct, *loss_sum.new_tensor([count, signals.signum or 0])]
        )
        total, right, items, signalled = ranks.sum(figures).tolist()
        if not math.isfinite(total):
            names = ", ".join(part.clips[index].name for _, index in part.order.whole()[tally.batches])
            raise UserError(
                f"{description}, batch {tally.batches + 1}: the loss became {total}; train with a smaller "
                f"--learning_rate; the checkpoints in {run.folder} are from before; the clips were {names}"
            )
        # The mean over the items of all processes, whose gradients are averaged.
        learner.step(loss_sum * (ranks.size / max(1, items)))
        tally.add(total, right, items)
        bar.set_postfix_str(f"loss {tally.loss:.3f}, accuracy {tally.accuracy:.1f} %")
        if signalled:
            raise stopped(run, signals, description)
        run.save_if_due()
    say(f"{description}: train {tally}")
    seconds = time.perf_counter() - started
    figures_by_name = {"train_loss": tally.loss, "train_accuracy": tally.accuracy}
    figures_by_name |= {"learning_rate": learner.learning_rate, "seconds": seconds}
    if clips := sum(map(len, part.order.whole()[first:])):
        figures_by_name["clips_per_second"] = clips / seconds
    return figures_by_name


def test(
    run: Run, name: str, part: Part, ranks: Ranks, signals: Deferred, description: str, note: str
) -> dict[str, float]:
    """Loss and accuracy of the model as it is on other clips, by name.

    On those that are held out, "val", the run's temperature is fitted too.

    Raises: Interrupted after a signal.
    """
    model = run.learner.model
    predicted = predict(
        model, part.batches, description=name, ranks=ranks,
        # Alone, a signal is heard in between; several processes must do the same number of steps.
        stop=(lambda: signals.signum is not None) if ranks.size == 1 else lambda: False,
    )  # fmt: skip
    if predicted is None:
        raise stopped(run, signals, description)
    result = tally(*predicted, ranks, model.device)
    if name == "val":
        logits, labels = zip(*ranks.gather(predicted), strict=True)
        run.temperature = fit_temperature(torch.cat(logits), torch.cat(labels))
    say(f"{description}: {name} {result}{note if name == 'test' else ''}")
    return {f"{name}_loss": result.loss, f"{name}_accuracy": result.accuracy}


def stopped(run: Run, signals: Deferred, description: str) -> Interrupted:
    """Save where the run stands, and say so; returns what to raise."""
    run.save_last()
    say(f"stopped in {description} after {run.tally.batches} batches; go on with --resume")
    return Interrupted(signals.signum or signal.SIGTERM)
