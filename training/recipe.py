"""What decides how a head is trained: optimizer, schedule and what is done against overfitting.

`RECIPES["default"]` is the outcome of benchmarks/accuracy.py, whose table stands in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
from dataclasses import MISSING, dataclass, fields, replace

from utils.flags import NON_NEGATIVE, POSITIVE, SHARE_BELOW_1, setting


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of a training; those with a help text are flags too.

    Attributes:
        optimizer: "adamw" (Loshchilov and Hutter, ICLR 2019) or "adam" (Kingma and Ba, ICLR 2015)
        schedule: "cosine": the learning rate falls to 0 as one (Loshchilov and Hutter, ICLR 2017); "constant"
        learning_rate: the highest
        warmup: share of all steps in which the learning rate rises to it (Goyal et al., 2017)
        weight_decay: of matrices; biases and BatchNorm have none
        label_smoothing: probability that is spread over all classes (Szegedy et al., CVPR 2016)
        dropout: probability, before the last layer of a head (Srivastava et al., JMLR 2014)
        mixup: alpha of the Beta distribution that clips are mixed by (Zhang et al., ICLR 2018); 0 mixes none
        clip_norm: longest gradient (Pascanu et al., ICML 2013); 0 leaves it as it is
        norm_momentum: share of a batch in BatchNorm's running statistics
    """

    optimizer: str
    norm_momentum: float
    schedule: str = setting(MISSING, "of the learning rate after the warm-up", choices=("cosine", "constant"))
    learning_rate: float = setting(MISSING, "the highest of the schedule", POSITIVE)
    warmup: float = setting(
        MISSING, "share of all steps in which the learning rate rises to it", SHARE_BELOW_1
    )
    weight_decay: float = setting(MISSING, "pulls the matrices to 0", NON_NEGATIVE)
    label_smoothing: float = setting(MISSING, "probability spread over all classes", SHARE_BELOW_1)
    dropout: float = setting(
        MISSING, "share of the head's last hidden numbers that a step leaves out", SHARE_BELOW_1
    )
    mixup: float = setting(MISSING, "alpha of mixup, which blends clips; 0 blends none", NON_NEGATIVE)
    clip_norm: float = setting(MISSING, "longest gradient of a step; 0 leaves all as they are", NON_NEGATIVE)


RECIPES = {
    "default": Recipe(
        optimizer="adamw",
        schedule="cosine",
        learning_rate=3e-4,
        warmup=0.1,
        weight_decay=0.01,
        label_smoothing=0.1,
        dropout=0.5,
        mixup=0.0,
        clip_norm=1.0,
        norm_momentum=0.1,
    ),
    "original": Recipe(
        optimizer="adam",
        schedule="constant",
        learning_rate=1e-5,
        warmup=0.0,
        weight_decay=0.0,
        label_smoothing=0.0,
        dropout=0.0,
        mixup=0.0,
        clip_norm=0.0,
        norm_momentum=0.01,
    ),
}


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """Add --recipe, and a flag for each of its settings that is worth one."""
    group = parser.add_argument_group("recipe")
    group.add_argument(
        "--recipe",
        choices=tuple(RECIPES),
        default="default",
        help="default (recommended) is what benchmarks/accuracy.py found; original is Adam at 1e-5 without "
        "schedule, for comparison",
    )
    for entry in fields(Recipe):
        if entry.metadata:
            values = ", ".join(f"{getattr(recipe, entry.name)} in {key}" for key, recipe in RECIPES.items())
            group.add_argument(
                f"--{entry.name}",
                type=entry.metadata["type"],
                choices=entry.metadata["choices"],
                help=f"{entry.metadata['help']}; {values}",
            )


def read_recipe(args: argparse.Namespace) -> Recipe:
    """The recipe of --recipe, with what other flags say."""
    given = {entry.name: getattr(args, entry.name, None) for entry in fields(Recipe)}
    return replace(
        RECIPES[args.recipe], **{name: value for name, value in given.items() if value is not None}
    )
