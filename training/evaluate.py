"""What a model says of clips, and how often it is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from training.batches import Batches
from training.classifier import Classifier
from utils.ranks import ALONE, Ranks


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
        return self.loss_sum / max(1, self.clips)

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy in percent."""
        return 100 * self.correct / max(1, self.clips)

    def add(self, loss_sum: float, correct: float, clips: float) -> None:
        """Count a batch."""
        self.loss_sum += loss_sum
        self.correct += int(correct)
        self.clips += int(clips)
        self.batches += 1

    def __str__(self) -> str:
        counts = f"{self.correct:,} of {self.clips:,} {self.unit}"
        return f"loss {self.loss:.3f} nats, accuracy {self.accuracy:.2f} % ({counts})"


def progress_bar(batches: Batches, description: str, ranks: Ranks, start: int = 0) -> tqdm:
    """A bar over batches, in the first process; `start` of them have been before."""
    return tqdm(
        batches, desc=description, unit="batch", initial=start, dynamic_ncols=True, disable=ranks.rank > 0
    )


@torch.no_grad()
def predict(
    model: Classifier,
    batches: Batches,
    *,
    description: str,
    ranks: Ranks = ALONE,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Tensor, Tensor] | None:
    """Logits of the clips in this process's part of the batches.

    Args:
        model: has `classify`; it is put into eval mode
        stop: asked after each batch; True ends it there

    Returns: logits (N, C) and labels (N,), on the CPU; None if it was ended.
    """
    model.eval()
    logits, labels = [torch.empty(0, model.num_classes)], [torch.empty(0, dtype=torch.int64)]
    for embeddings, padding, batch_labels in progress_bar(batches, description, ranks):
        logits.append(model.classify(embeddings, padding).float().cpu())
        labels.append(batch_labels)
        if stop():
            return None
    return torch.cat(logits), torch.cat(labels)


def tally(logits: Tensor, labels: Tensor, ranks: Ranks, device: torch.device) -> Tally:
    """Loss and top-1 accuracy, every clip counted once, whichever process has it.

    Args:
        logits, labels: of this process's clips, (N, C) and (N,)
        device: where processes add up
    """
    loss_sum = F.cross_entropy(logits, labels, reduction="sum")
    correct = (logits.argmax(1) == labels).sum()
    figures = torch.stack([loss_sum, correct, torch.tensor(len(labels))]).to(device)
    loss, right, clips = ranks.sum(figures).tolist()
    return Tally(loss, int(right), int(clips))
