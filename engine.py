"""One training epoch and one evaluation; the figures they give."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from ranks import ALONE, Ranks

# Inputs of a model and labels (B,).
Batches = Iterable[tuple[Tensor, Tensor]]
Forward = Callable[[Tensor], Tensor]


class LossError(ValueError):
    """The loss of a batch is no finite number; nothing was trained on it.

    Attributes:
        batch: which of the epoch, from 0
    """

    def __init__(self, loss: float, batch: int) -> None:
        super().__init__(f"the loss became {loss}; train with a smaller --learning_rate")
        self.batch = batch


@dataclass
class Tally:
    """Figures over the clips seen so far, of all processes, counted clip by clip.

    Attributes:
        loss_sum: sum of the clips' cross-entropies, in nats
        correct: clips whose highest logit is their label
        clips: clips seen
        batches: batches seen
    """

    loss_sum: float = 0.0
    correct: int = 0
    clips: int = 0
    batches: int = 0

    @property
    def loss(self) -> float:
        """Mean cross-entropy of a clip, in nats."""
        return self.loss_sum / self.clips

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy in percent."""
        return 100 * self.correct / self.clips

    def add(self, loss_sum: float, correct: float, clips: float) -> None:
        """Count a batch."""
        self.loss_sum += loss_sum
        self.correct += int(correct)
        self.clips += int(clips)
        self.batches += 1

    def __str__(self) -> str:
        counts = f"{self.correct:,} of {self.clips:,} clips"
        return f"loss {self.loss:.3f} nats, accuracy {self.accuracy:.2f} % ({counts})"


def _bar(batches: Batches, description: str, ranks: Ranks, start: int = 0) -> tqdm:
    return tqdm(
        batches, desc=description, unit="batch", initial=start, dynamic_ncols=True, disable=ranks.rank > 0
    )


def train_one_epoch(
    forward: nn.Module,
    batches: Batches,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    device: torch.device,
    *,
    description: str,
    tally: Tally,
    ranks: Ranks = ALONE,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Train once on each batch; the schedule steps with the batches.

    Args:
        forward: gives the logits (B, C) of a batch; from `Ranks.parallel`
        tally: counts on; its `batches` are those that the epoch has had before
        stop: asked after each batch; True ends the epoch there

    Returns: whether the epoch came to its end.
    Raises: LossError if the loss is no longer a finite number.
    """
    forward.train()
    bar = _bar(batches, description, ranks, tally.batches)
    for inputs, labels in bar:
        inputs, labels = inputs.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        logits = forward(inputs)
        loss_sum = F.cross_entropy(logits, labels, reduction="sum")
        correct = (logits.argmax(1) == labels).sum()
        # One look for all figures: on an accelerator each waits for all work before it.
        total, right, clips = ranks.sum([loss_sum.item(), correct.item(), len(labels)])
        if not math.isfinite(total):
            raise LossError(total / clips, tally.batches)
        optimizer.zero_grad(set_to_none=True)
        # The mean over the clips of all processes, whose gradients are averaged.
        (loss_sum * (ranks.size / clips)).backward()
        optimizer.step()
        scheduler.step()
        tally.add(total, right, clips)
        bar.set_postfix_str(f"loss {tally.loss:.3f}, accuracy {tally.accuracy:.1f} %")
        if stop():
            return False
    return True


@torch.no_grad()
def evaluate(
    model: nn.Module,
    forward: Forward,
    batches: Batches,
    device: torch.device,
    *,
    description: str,
    ranks: Ranks = ALONE,
    stop: Callable[[], bool] = lambda: False,
) -> Tally | None:
    """Loss and top-1 accuracy, every clip counted once, whichever process has it.

    Args:
        forward: gives the logits (B, C) of a batch; a part of `model`, which is put into eval mode
        stop: asked after each batch; True ends the evaluation there

    Returns: the figures; None if it was ended.
    """
    model.eval()
    tally = Tally()
    bar = _bar(batches, description, ranks)
    for inputs, labels in bar:
        inputs, labels = inputs.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        logits = forward(inputs)
        loss_sum = F.cross_entropy(logits, labels, reduction="sum").item()
        tally.add(loss_sum, (logits.argmax(1) == labels).sum().item(), len(labels))
        bar.set_postfix_str(f"loss {tally.loss:.3f}, accuracy {tally.accuracy:.1f} %")
        if stop():
            return None
    sums = ranks.sum([tally.loss_sum, tally.correct, tally.clips])
    return Tally(sums[0], int(sums[1]), int(sums[2]), tally.batches)
