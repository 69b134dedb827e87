"""A step of training: optimizer, schedule and what is done against overfitting, as the recipe says.

Augmentation works on embeddings, so a cached epoch stays as fast as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import Head
from training.classifier import Classifier
from training.recipe import Recipe


def learning_rate_factor(step: int, steps: int, warmup: float, *, cosine: bool) -> float:
    """What the learning rate is multiplied by in a step, from 0: up in a line, then down as a cosine."""
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    if not cosine:
        return 1.0
    return 0.5 + 0.5 * math.cos(math.pi * (step - rising) / max(1, steps - rising))


class Learner:
    """The trained parts of a model, and all that changes them.

    Args:
        model: on its device; the dropout and the BatchNorms of its heads are set as the recipe says
        recipe: how to train it
        steps: of the whole training
        seed: of dropout and mixup
        trained: what is trained; by default the heads of the model

    Attributes:
        forward: a part of `trained` that gives what `losses` needs
        unit: what `losses` counts
    """

    unit = "clips"
    # Whether `forward` has a use for every parameter.
    uses_all = True

    def __init__(
        self, model: Classifier, recipe: Recipe, steps: int, seed: int = 0, trained: nn.Module | None = None
    ) -> None:
        self.model, self.recipe, self.seed = model, recipe, seed
        # What the last training ended with is no part of this one.
        model.temperature = 1.0
        self.trained = trained or model.heads
        self.forward: Callable[..., Any] = model.classify if trained is None else trained.forward
        for module in self.trained.modules():
            if isinstance(module, Head):
                module.dropout.p = recipe.dropout
            elif isinstance(module, nn.BatchNorm1d):
                module.momentum = recipe.norm_momentum
        self.parameters = list(self.trained.parameters())
        matrices = [parameter for parameter in self.parameters if parameter.ndim > 1]
        others = [parameter for parameter in self.parameters if parameter.ndim <= 1]
        kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[recipe.optimizer]
        self.optimizer = kind(
            [
                {"params": matrices, "weight_decay": recipe.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=recipe.learning_rate,
            fused=True,
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: learning_rate_factor(step, steps, recipe.warmup, cosine=recipe.schedule == "cosine"),
        )

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return float(self.scheduler.get_last_lr()[0])

    def begin_batch(self, epoch: int, batch: int, rank: int) -> None:
        """Seed all random numbers by the place of a batch alone, so that a resumed run draws the same."""
        seed = np.random.SeedSequence([self.seed, epoch, batch, rank]).generate_state(1, np.uint64)[0]
        torch.manual_seed(int(seed))

    def augment(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, T, S D) and labels (B,), made harder: embeddings, and probabilities (B, C)."""
        from torchvision.transforms import v2

        num_classes = self.model.num_classes
        if not self.recipe.mixup:
            return embeddings, F.one_hot(labels, num_classes).float()
        # The class mixes images, (B, channels, height, width).
        mix = v2.MixUp(alpha=self.recipe.mixup, num_classes=num_classes)
        mixed, targets = mix(embeddings[:, None], labels)
        return mixed[:, 0], targets

    def losses(
        self, forward: Callable[..., Tensor], embeddings: Tensor, padding: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, int]:
        """The loss of a batch, which is augmented first.

        Args:
            forward: gives logits (B, C) of embeddings (B, T, S D) and padding (B, T)

        Returns: the sum of the clips' losses, how many clips are classified right, and how many there are.
        """
        embeddings, targets = self.augment(embeddings, labels)
        # A blend with a whole clip has no padding, and which clip is blended with which is unknown.
        logits = forward(embeddings, padding & (not self.recipe.mixup))
        return self.loss(logits, targets), (logits.argmax(1) == targets.argmax(1)).sum(), len(labels)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Sum of the clips' cross-entropies in nats: logits (B, C), probabilities (B, C) -> ()."""
        return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=self.recipe.label_smoothing)

    def step(self, loss: Tensor) -> None:
        """One step down the gradient of `loss`."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.recipe.clip_norm:
            nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_norm)
        self.optimizer.step()
        self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """All that it takes to go on, but for the model's own weights."""
        return {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the `state_dict` is from."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
