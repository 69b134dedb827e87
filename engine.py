"""One training epoch and one evaluation; the figures they give."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from models import ConvLSTM

# Inputs of a model and labels (B,).
Batches = Iterable[tuple[Tensor, Tensor]]
Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Result:
    """Figures over the clips of an epoch or an evaluation, counted clip by clip.

    Attributes:
        loss: mean cross-entropy of a clip, in nats
        correct: clips whose highest logit is their label
        clips: clips seen
    """

    loss: float
    correct: int
    clips: int

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy in percent."""
        return 100 * self.correct / self.clips

    def __str__(self) -> str:
        counts = f"{self.correct:,} of {self.clips:,} clips"
        return f"loss {self.loss:.3f} nats, accuracy {self.accuracy:.2f} % ({counts})"


class _Tally:
    """Counts clips as their logits come in, and shows the count at the end of a bar."""

    def __init__(self) -> None:
        self.loss_sum, self.correct, self.clips = 0.0, 0, 0

    def add(self, loss: float, logits: Tensor, labels: Tensor) -> None:
        self.loss_sum += loss * len(labels)
        self.correct += int((logits.argmax(1) == labels).sum())
        self.clips += len(labels)

    def show(self, bar: tqdm) -> None:
        result = self.result()
        bar.set_postfix_str(f"loss {result.loss:.3f}, accuracy {result.accuracy:.1f} %")

    def result(self) -> Result:
        return Result(self.loss_sum / self.clips, self.correct, self.clips)


def train_one_epoch(
    model: ConvLSTM,
    forward: Forward,
    batches: Batches,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    device: torch.device,
    *,
    description: str,
) -> Result:
    """Train once on each batch; the schedule steps with the batches.

    Args:
        forward: gives the logits (B, C) of a batch: `model` itself of frames, `model.classify` of embeddings

    Raises: ValueError if the loss is no longer a finite number.
    """
    model.train()
    tally = _Tally()
    bar = tqdm(batches, desc=description, unit="batch", dynamic_ncols=True)
    for inputs, labels in bar:
        inputs, labels = inputs.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        logits = forward(inputs)
        loss = F.cross_entropy(logits, labels)
        # Once: on an accelerator each look at the loss waits for all work before it.
        value = loss.item()
        if not math.isfinite(value):
            raise ValueError(f"the loss became {value}; train with a smaller --learning_rate")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        scheduler.step()
        tally.add(value, logits, labels)
        tally.show(bar)
    return tally.result()


@torch.no_grad()
def evaluate(
    model: ConvLSTM, forward: Forward, batches: Batches, device: torch.device, *, description: str
) -> Result:
    """Loss and top-1 accuracy over batches as in `train_one_epoch`, every clip counted once."""
    model.eval()
    tally = _Tally()
    bar = tqdm(batches, desc=description, unit="batch", dynamic_ncols=True)
    for inputs, labels in bar:
        inputs, labels = inputs.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        logits = forward(inputs)
        tally.add(F.cross_entropy(logits, labels).item(), logits, labels)
        tally.show(bar)
    return tally.result()
