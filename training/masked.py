"""Masked-frame pretraining: a model learns from clips without labels what comes between their frames.

Spans of frames are hidden, and the head has to tell from the others what they were, in two ways: by
regression, and by picking the right frame among all hidden ones of the batch. The two losses are those of
masked frame modelling in HERO (Li et al., EMNLP 2020, section 3.2); the contrastive one is InfoNCE (van den
Oord et al., 2018), on masked frames first in CBT (Sun et al., 2019). Spans rather than single frames, as in
SpanBERT (Joshi et al., TACL 2020): the neighbours of a single frame give it away.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import MODELS, Head
from training.classifier import Classifier
from training.learner import Learner
from training.recipe import Recipe
from utils.process import UserError
from utils.ranks import ALONE, Ranks

MASKED_SHARE = 0.5
MEAN_SPAN = 6
TEMPERATURE = 0.1


def span_mask(batch: int, length: int, device: torch.device) -> Tensor:
    """Which frames are hidden: (B, T) bool; about `MASKED_SHARE` of them, in spans of about `MEAN_SPAN`.

    A chain of two states that begins in its stationary distribution; some frame of each clip is hidden, and
    some is not. Random numbers are PyTorch's for the CPU, so that each device draws the same.
    """
    leave = 1 / MEAN_SPAN
    enter = leave * MASKED_SHARE / (1 - MASKED_SHARE)
    chance = torch.rand(batch, length)
    masked = chance < MASKED_SHARE
    for place in range(1, length):
        before = masked[:, place - 1]
        masked[:, place] = torch.where(before, chance[:, place] >= leave, chance[:, place] < enter)
    anywhere = torch.randint(length, (batch,))
    clips = torch.arange(batch)
    masked[clips, anywhere] = True
    masked[clips, (anywhere + length // 2) % length] = False
    return masked.to(device)


def check_pretraining(model: str, sequence_length: int | None) -> None:
    """Refuse to pretrain where nothing can be learned.

    Raises: UserError if no frame sees another in the model's heads, or clips are of a single frame.
    """
    able = [name for name, head in MODELS.items() if head.read is not Head.read]
    if model not in able:
        raise UserError(
            f"{model} sees each frame by itself and cannot tell one from the others; --pretrain is for "
            f"{', '.join(able)}"
        )
    if sequence_length is not None and sequence_length < 2:
        raise UserError(
            f"--sequence_length {sequence_length} leaves no frame to tell a hidden one from; pretrain with 2 "
            "or more"
        )


class MaskedFrames(nn.Module):
    """What is trained in pretraining: the heads, a vector that stands for a hidden frame, and predictors.

    Args:
        model: on its device
        ranks: whose hidden frames a frame is told from
    """

    def __init__(self, model: Classifier, ranks: Ranks = ALONE) -> None:
        super().__init__()
        self._ranks = ranks
        self.heads, self.widths = model.heads, model.widths
        widths = dict(zip(self.heads, self.widths, strict=True))
        hidden = {stream: head.hidden_dim for stream, head in self.heads.items() if isinstance(head, Head)}
        # Standardised, all dimensions of an embedding count alike.
        self.targets = nn.ModuleDict(
            {stream: nn.BatchNorm1d(width, affine=False) for stream, width in widths.items()}
        )
        self.masks = nn.ParameterDict({stream: torch.zeros(width) for stream, width in widths.items()})
        self.predictors = nn.ModuleDict(
            {
                stream: nn.Sequential(nn.Linear(hidden[stream], width), nn.GELU(), nn.Linear(width, width))
                for stream, width in widths.items()
            }
        )
        self.to(model.encoder.device)

    def own_state(self) -> dict[str, Tensor]:
        """Its tensors without those of the heads."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("heads.")}

    def forward(self, embeddings: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of the hidden frames (M,), and whether each is picked (M,) bool, of all streams.

        Args:
            embeddings: (B, T, S D)
            padding: (B, T) bool; padding is never hidden
        """
        losses, picked = [], []
        hidden = span_mask(len(padding), padding.shape[1], padding.device) & ~padding
        parts = embeddings.split(self.widths, dim=-1)
        for (stream, head), part in zip(self.heads.items(), parts, strict=True):
            targets = self.targets[stream](part.flatten(0, 1)).unflatten(0, padding.shape)[hidden]
            shown = torch.where(hidden[..., None], self.masks[stream], part)
            assert isinstance(head, Head)
            predicted = self.predictors[stream](head.read(shown, padding)[1][hidden])
            regression = F.mse_loss(predicted, targets, reduction="none").mean(dim=1)
            candidates, first = self._ranks.gather_rows(targets)
            similarity = F.normalize(predicted, dim=1) @ F.normalize(candidates, dim=1).T / TEMPERATURE
            right = first + torch.arange(len(targets), device=similarity.device)
            losses.append(regression + F.cross_entropy(similarity, right, reduction="none"))
            picked.append(similarity.argmax(dim=1) == right)
        return torch.cat(losses), torch.cat(picked)


class MaskedLearner(Learner):
    """A `Learner` that needs no labels.

    Args:
        masked: what is trained
    """

    unit = "hidden frames"
    # What only the labels train has no part in it.
    uses_all = False

    def __init__(
        self, model: Classifier, masked: MaskedFrames, recipe: Recipe, steps: int, seed: int
    ) -> None:
        super().__init__(model, recipe, steps, seed, masked)
        self.masked = masked

    def losses(
        self, forward: Callable[..., Any], embeddings: Tensor, padding: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, int]:
        """Sum of the losses of the hidden frames, how many are picked, and how many there are."""
        losses, picked = forward(embeddings, padding)
        return losses.sum(), picked.sum(), len(losses)

    def state_dict(self) -> dict[str, Any]:
        """As `Learner.state_dict`, and what the model has no part in."""
        return {**super().state_dict(), "masked": self.masked.own_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the `state_dict` is from."""
        super().load_state_dict(state)
        self.masked.load_state_dict(state["masked"], strict=False)
