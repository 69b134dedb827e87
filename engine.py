"""One training epoch and one evaluation; the figures they give."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from models import Classifier
from ranks import ALONE, Ranks
from recipe import Learner

# Embeddings (B, T, S D) float32, which frames are padding (B, T) bool, and labels (B,).
Batches = Iterable[tuple[Tensor, Tensor, Tensor]]


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
        clips: clips seen, or whatever is counted instead
        batches: batches seen
        unit: what is counted
    """

    loss_sum: float = 0.0
    correct: int = 0
    clips: int = 0
    batches: int = 0
    unit: str = "clips"

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
        counts = f"{self.correct:,} of {self.clips:,} {self.unit}"
        return f"loss {self.loss:.3f} nats, accuracy {self.accuracy:.2f} % ({counts})"


def _bar(batches: Batches, description: str, ranks: Ranks, start: int = 0) -> tqdm:
    return tqdm(
        batches, desc=description, unit="batch", initial=start, dynamic_ncols=True, disable=ranks.rank > 0
    )


def train_one_epoch(
    forward: nn.Module,
    batches: Batches,
    learner: Learner,
    device: torch.device,
    *,
    epoch: int,
    description: str,
    tally: Tally,
    ranks: Ranks = ALONE,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Train once on each batch; the schedule steps with the batches.

    Args:
        forward: what `learner.losses` calls; from `Ranks.parallel`
        epoch: which, from 1; random numbers depend on it
        tally: counts on; its `batches` are those that the epoch has had before. Its figures are of what was
            trained on: clips as they were augmented, with smoothed labels
        stop: asked after each batch; True ends the epoch there

    Returns: whether the epoch came to its end.
    Raises: LossError if the loss is no longer a finite number.
    """
    forward.train()
    bar = _bar(batches, description, ranks, tally.batches)
    for batch in bar:
        learner.begin_batch(epoch, tally.batches, ranks.rank)
        loss_sum, correct, count = learner.losses(
            forward, *(part.to(device, non_blocking=True) for part in batch)
        )
        # One look for all figures: on an accelerator each waits for all work before it.
        total, right, items = ranks.sum([loss_sum.item(), correct.item(), count])
        if not math.isfinite(total):
            raise LossError(total / items, tally.batches)
        # The mean over the items of all processes, whose gradients are averaged.
        learner.step(loss_sum * (ranks.size / items))
        tally.add(total, right, items)
        bar.set_postfix_str(f"loss {tally.loss:.3f}, accuracy {tally.accuracy:.1f} %")
        if stop():
            return False
    return True


@torch.no_grad()
def predict(
    model: Classifier,
    batches: Batches,
    device: torch.device,
    *,
    description: str,
    ranks: Ranks = ALONE,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Tensor, Tensor] | None:
    """What a model says of clips, in their order, of those that this process has.

    Args:
        model: has `classify`; it is put into eval mode
        stop: asked after each batch; True ends it there

    Returns: logits (N, C) and labels (N,), on the CPU; None if it was ended.
    """
    model.eval()
    said, named = [torch.empty(0, model.num_classes)], [torch.empty(0, dtype=torch.int64)]
    for embeddings, padding, labels in _bar(batches, description, ranks):
        inputs = embeddings.to(device, non_blocking=True), padding.to(device, non_blocking=True)
        said.append(model.classify(*inputs).float().cpu())
        named.append(labels)
        if stop():
            return None
    return torch.cat(said), torch.cat(named)


def evaluate(
    model: Classifier,
    batches: Batches,
    device: torch.device,
    *,
    description: str,
    ranks: Ranks = ALONE,
    stop: Callable[[], bool] = lambda: False,
) -> Tally | None:
    """Loss and top-1 accuracy, every clip counted once, whichever process has it; else as `predict`.

    Returns: the figures; None if it was ended.
    """
    predicted = predict(model, batches, device, description=description, ranks=ranks, stop=stop)
    if predicted is None:
        return None
    logits, labels = predicted
    loss_sum = F.cross_entropy(logits, labels, reduction="sum").item()
    correct = (logits.argmax(1) == labels).sum().item()
    loss, right, clips = ranks.sum([loss_sum, correct, len(labels)])
    return Tally(loss, int(right), int(clips))
