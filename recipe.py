"""How the head is trained: optimizer, schedule and what is done against overfitting.

`RECIPES["default"]` is the outcome of benchmarks/accuracy.py, whose table stands in benchmarks/README.md.
Augmentation works on embeddings, so a cached epoch stays as fast as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

import cli
from models import Classifier, Head


@dataclass(frozen=True)
class Recipe:
    """Settings of a training; each is a flag of its name too.

    Attributes:
        optimizer: "adamw" (Loshchilov and Hutter, ICLR 2019) or "adam" (Kingma and Ba, ICLR 2015)
        schedule: "cosine": the learning rate falls to 0 as one (Loshchilov and Hutter, ICLR 2017); "constant"
        learning_rate: the highest
        warmup: share of all steps in which the learning rate rises to it (Goyal et al., 2017)
        weight_decay: of matrices; biases and BatchNorm have none
        label_smoothing: probability that is spread over all classes (Szegedy et al., CVPR 2016)
        dropout: probability, before the last layer of a head (Srivastava et al., JMLR 2014)
        frame_dropout: probability that a frame's embedding is left out, that is, zero
        mixup: alpha of the Beta distribution that clips are mixed by (Zhang et al., ICLR 2018); 0 mixes none
        clip_norm: longest gradient (Pascanu et al., ICML 2013); 0 leaves it as it is
        norm_momentum: share of a batch in BatchNorm's running statistics
        norm_freeze: share of all steps after which BatchNorm computes with its running statistics, as it does
            in testing: those of 16 clips are mostly noise (Jacob et al., CVPR 2018, section 3.2); 1: never
        ema: how far back the average of the weights looks, as a share of all steps (Polyak and Juditsky,
            1992); 0 averages none
    """

    optimizer: str
    schedule: str
    learning_rate: float
    warmup: float
    weight_decay: float
    label_smoothing: float
    dropout: float
    frame_dropout: float
    mixup: float
    clip_norm: float
    norm_momentum: float
    norm_freeze: float
    ema: float


RECIPES = {
    "default": Recipe(
        optimizer="adamw",
        schedule="cosine",
        learning_rate=3e-4,
        warmup=0.1,
        weight_decay=0.01,
        label_smoothing=0.1,
        dropout=0.5,
        frame_dropout=0.0,
        mixup=0.0,
        clip_norm=1.0,
        norm_momentum=0.1,
        norm_freeze=1.0,
        ema=0.0,
    ),
    "original": Recipe(
        optimizer="adam",
        schedule="constant",
        learning_rate=1e-5,
        warmup=0.0,
        weight_decay=0.0,
        label_smoothing=0.0,
        dropout=0.0,
        frame_dropout=0.0,
        mixup=0.0,
        clip_norm=0.0,
        norm_momentum=0.01,
        norm_freeze=1.0,
        ema=0.0,
    ),
}

# Flags that take the recipe's value where they are not given: their type or choices, and what they are.
_FLAGS: dict[str, tuple[dict[str, Any], str]] = {
    "optimizer": ({"choices": ("adamw", "adam")}, "adamw decays the weights apart from the gradient"),
    "schedule": ({"choices": ("cosine", "constant")}, "of the learning rate after the warm-up"),
    "learning_rate": ({"type": cli.positive_float}, "the highest of the schedule"),
    "warmup": ({"type": cli.fraction}, "share of all steps in which the learning rate rises to it"),
    "weight_decay": ({"type": cli.non_negative_float}, "pulls the matrices to 0"),
    "label_smoothing": ({"type": cli.fraction}, "probability spread over all classes"),
    "dropout": ({"type": cli.fraction}, "share of the head's last hidden numbers that a step leaves out"),
    "frame_dropout": ({"type": cli.fraction}, "share of a clip's frames that a step leaves out"),
    "mixup": ({"type": cli.non_negative_float}, "alpha of mixup, which blends clips; 0 blends none"),
    "clip_norm": ({"type": cli.non_negative_float}, "longest gradient of a step; 0 leaves all as they are"),
    "norm_momentum": ({"type": cli.fraction}, "share of a batch in BatchNorm's running statistics"),
    "norm_freeze": ({"type": cli.share}, "share of all steps after which those statistics stay; 1: never"),
    "ema": ({"type": cli.fraction}, "span of the weights' moving average in shares of all steps; 0: none"),
}
# Those, and the one that they depend on.
RECIPE_FLAGS = ("recipe", *_FLAGS)


def add_recipe_flags(group: Any) -> None:
    """Add --recipe, and a flag for each of its settings, to a parser or a group of one."""
    group.add_argument(
        "--recipe",
        choices=tuple(RECIPES),
        default="default",
        help="default (recommended) is what benchmarks/accuracy.py found; original is Adam at 1e-5 without "
        "schedule, for comparison",
    )
    for name, (kind, help) in _FLAGS.items():
        values = ", ".join(f"{getattr(recipe, name)} in {key}" for key, recipe in RECIPES.items())
        group.add_argument(f"--{name}", **kind, help=f"{help}; {values}")


def fill_from_recipe(args: argparse.Namespace) -> None:
    """Give the flags that were not given the values of --recipe."""
    for name, value in asdict(RECIPES[args.recipe]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def recipe_of(args: argparse.Namespace) -> Recipe:
    """What the flags say, after `fill_from_recipe`."""
    return Recipe(**{name: getattr(args, name) for name in _FLAGS})


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
        learning_rate: of the next step
    """

    def __init__(
        self, model: Classifier, recipe: Recipe, steps: int, seed: int = 0, trained: nn.Module | None = None
    ) -> None:
        self.model, self.recipe, self.steps, self.seed = model, recipe, steps, seed
        self.trained = trained or model.heads
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
        self._average: dict[str, Tensor] = {}

    def _numbers(self) -> Iterator[tuple[str, Tensor]]:
        """Trained parameters and BatchNorm's running statistics."""
        for name, tensor in self.trained.state_dict().items():
            if tensor.is_floating_point():
                yield name, tensor

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return float(self.scheduler.get_last_lr()[0])

    def begin_batch(self, epoch: int, batch: int, rank: int) -> None:
        """Get ready for a batch, after `train()`.

        All random numbers are seeded by its place alone, so that a resumed run draws the same.
        """
        if self.scheduler.last_epoch >= self.recipe.norm_freeze * self.steps:
            for module in self.trained.modules():
                if isinstance(module, nn.BatchNorm1d):
                    module.eval()
        seed = np.random.SeedSequence([self.seed, epoch, batch, rank]).generate_state(1, np.uint64)[0]
        torch.manual_seed(int(seed))

    def augment(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, T, S D) and labels (B,), made harder: embeddings, and probabilities (B, C)."""
        recipe, num_classes = self.recipe, self.model.num_classes
        if recipe.frame_dropout:
            kept = torch.rand(embeddings.shape[:2], device=embeddings.device) >= recipe.frame_dropout
            embeddings = embeddings * kept[..., None]
        if not recipe.mixup:
            return embeddings, F.one_hot(labels, num_classes).float()
        # The class mixes images, (B, channels, height, width).
        mixed, targets = v2.MixUp(alpha=recipe.mixup, num_classes=num_classes)(embeddings[:, None], labels)
        return mixed[:, 0], targets

    def losses(
        self, forward: Callable[..., Tensor], embeddings: Tensor, padding: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, int]:
        """What is to become smaller, over a batch as it was augmented.

        Args:
            forward: gives logits (B, C) of embeddings (B, T, S D) and padding (B, T)

        Returns: the sum of the clips' losses, how many clips are named right, and how many clips there are.
        """
        embeddings, targets = self.augment(embeddings, labels)
        # A blend with a whole clip has no padding; which clip is blended with which is not told.
        logits = forward(embeddings, padding & (not self.recipe.mixup))
        return self.loss(logits, targets), (logits.argmax(1) == targets.argmax(1)).sum(), len(labels)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Sum of the clips' cross-entropies in nats: logits (B, C), probabilities (B, C) -> ()."""
        return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=self.recipe.label_smoothing)

    def step(self, loss: Tensor) -> None:
        """One step down the gradient of `loss`."""
        if self.recipe.ema and not self._average:
            self._average = {name: tensor.clone() for name, tensor in self._numbers()}
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.recipe.clip_norm:
            nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_norm)
        self.optimizer.step()
        self.scheduler.step()
        if self.recipe.ema:
            done = self.scheduler.last_epoch
            # Early on a short average: the first weights are random.
            decay = min(math.exp(-1 / (self.recipe.ema * self.steps)), (1 + done) / (10 + done))
            names, tensors = zip(*self._numbers(), strict=True)
            torch._foreach_lerp_([self._average[name] for name in names], list(tensors), 1 - decay)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """In here the model has the averaged weights, which are those to test and to save."""
        current = {name: tensor.clone() for name, tensor in self._numbers()} if self._average else {}
        self.trained.load_state_dict(self._average, strict=False)
        try:
            yield
        finally:
            self.trained.load_state_dict(current, strict=False)

    def state_dict(self) -> dict[str, Any]:
        """All that it takes to go on, but for the model's own weights."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "average": dict(self._average),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the `state_dict` is from."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        device = self.model.encoder.device
        self._average = {name: tensor.to(device) for name, tensor in state["average"].items()}
