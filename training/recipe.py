"""What decides how a head is trained: optimizer, schedule, and regularization.

`RECIPES["default"]` was chosen on held-out groups of the training lists; see docs/benchmarks.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import Head


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of a training.

    Attributes:
        optimizer: "adamw" (Loshchilov and Hutter, ICLR 2019) or "adam" (Kingma and Ba, ICLR 2015)
        learning_rate: the highest
        encoder_rate: the same of an encoder that is trained too; None for a tenth
        cosine: it falls to 0 as a cosine (Loshchilov and Hutter, ICLR 2017); else it is constant
        warmup: share of all steps in which it rises linearly (Goyal et al., 2017)
        weight_decay: of matrices; biases and BatchNorm have none
        label_smoothing: probability that is spread over all classes (Szegedy et al., CVPR 2016)
        dropout: probability, before the last layer of a head (Srivastava et al., JMLR 2014)
        clip_norm: longest gradient (Pascanu et al., ICML 2013); 0 for no limit
        norm_momentum: share of a batch in BatchNorm's running statistics
    """

    optimizer: str = "adamw"
    learning_rate: float = 3e-4
    encoder_rate: float | None = None
    cosine: bool = True
    warmup: float = 0.1
    weight_decay: float = 0.01
    label_smoothing: float = 0.1
    dropout: float = 0.5
    clip_norm: float = 1.0
    norm_momentum: float = 0.1


RECIPES = {
    "default": Recipe(),
    "original": Recipe(
        optimizer="adam", learning_rate=1e-5, cosine=False, warmup=0, weight_decay=0, label_smoothing=0,
        dropout=0, clip_norm=0, norm_momentum=0.01,
    ),
}  # fmt: skip


def read_recipe(name: str, rates: Sequence[float] | None) -> Recipe:
    """The recipe of --recipe, with the one or two learning rates of --learning_rate if that is set."""
    if not rates:
        return RECIPES[name]
    return replace(RECIPES[name], learning_rate=rates[0], encoder_rate=rates[1] if len(rates) > 1 else None)


def balanced_weights(labels: np.ndarray, classes: int) -> Tensor:
    """Weights (C,) of the classes by which each has the same part in the loss; 0 for one without a clip."""
    counts = np.bincount(labels, minlength=classes)
    weights = len(labels) / (np.count_nonzero(counts) * counts.clip(1))
    return torch.from_numpy(np.where(counts > 0, weights, 0)).float()


class Optimization:
    """Optimizer and schedule of a training.

    Args:
        module: what is trained, on its device; its dropout and BatchNorms are set as the recipe says
        steps: of the whole training
        weights: of the classes in the loss, (C,); by default all count alike
        encoder: its parameters that are trained too, each with its share of the encoder's learning rate
    """

    def __init__(
        self,
        module: nn.Module,
        recipe: Recipe,
        steps: int,
        weights: Tensor | None = None,
        encoder: Sequence[tuple[nn.Parameter, float]] = (),
    ) -> None:
        self.recipe, self.weights = recipe, weights
        for part in module.modules():
            if isinstance(part, Head):
                part.dropout.p = recipe.dropout
            elif isinstance(part, nn.BatchNorm1d):
                part.momentum = recipe.norm_momentum
        encoder_rate = recipe.encoder_rate or recipe.learning_rate / 10
        rates = [(each, recipe.learning_rate) for each in module.parameters()]
        rates += [(each, encoder_rate * share) for each, share in encoder]
        self.parameters = [each for each, _ in rates]
        # The head's come first.
        alike: dict[tuple[float, float], list[nn.Parameter]] = {}
        for each, rate in rates:
            alike.setdefault((rate, recipe.weight_decay if each.ndim > 1 else 0.0), []).append(each)
        groups = [
            {"params": parameters, "lr": rate, "weight_decay": decay}
            for (rate, decay), parameters in alike.items()
        ]
        kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[recipe.optimizer]
        self.optimizer = kind(groups, lr=recipe.learning_rate, fused=True)
        rising = round(recipe.warmup * steps)

        def factor(step: int) -> float:
            if step < rising:
                return (step + 1) / rising
            if not recipe.cosine:
                return 1.0
            return 0.5 + 0.5 * math.cos(math.pi * (step - rising) / max(1, steps - rising))

        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        return float(self.scheduler.get_last_lr()[0])

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Sum of the clips' cross-entropies in nats: logits (B, C), labels (B,) -> ()."""
        smoothing = self.recipe.label_smoothing
        return F.cross_entropy(logits, labels, self.weights, reduction="sum", label_smoothing=smoothing)

    def step(self, loss: Tensor) -> None:
        """One step down the gradient of `loss`."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.recipe.clip_norm:
            nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_norm)
        self.optimizer.step()
        self.scheduler.step()

    def state_dict(self) -> dict[str, dict]:
        """All that it takes to go on."""
        return {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """Go on where the `state_dict` is from."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
