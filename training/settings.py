"""Flags of a training, in groups: those of train.py, most of which pretrain.py has too."""

from __future__ import annotations

from argparse import ArgumentTypeError
from dataclasses import dataclass
from pathlib import Path

from models import MODELS, check_model
from splits.datasets import ALL, split_number
from splits.folder import FOLDS
from training.recipe import RECIPES
from utils.flags import COUNT, NATURAL, POSITIVE, SHARE_BELOW_1, accepted_by, setting


def learning_rates(text: str) -> tuple[float, ...]:
    """One learning rate, or two with a comma between: the head's and the encoder's."""
    rates = tuple(map(POSITIVE, text.split(",")))
    if len(rates) > 2:
        raise ArgumentTypeError(f"{text} does not fit: it takes the head's rate and the encoder's, no more")
    return rates


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What names the action."""

    model: str = setting(
        "ConvLSTM",
        f"head; ConvLSTM (default) is the original's, LinearProbe is recommended with i3d; all: "
        f"{', '.join(MODELS)}",
        accepted_by(check_model),
    )
    latent_dim: int = setting(
        512, "width that embeddings are projected to; 512 (default) as the original", COUNT
    )
    sequence_length: int | None = setting(
        None, "embeddings of a clip; default: what suits the encoder, 40 for images as the original", COUNT
    )
    checkpoint_model: Path | None = setting(
        None, "start from this checkpoint, pretrain.py's for example; its encoder, model and sizes hold", Path
    )
    channels: int = setting(3, "3: encoders take RGB only; accepted as the original's", int, choices=(3,))


@dataclass(frozen=True, kw_only=True)
class ClipSettings:
    """Which clips are trained on."""

    split_number: int | str = setting(
        1,
        "official split, 1 to 3, or fold of a folder, 1 to 5; papers quote 1 (default) or the mean of all",
        split_number,
        choices=(*FOLDS, ALL),
    )
    val_fraction: float = setting(
        0.0,
        "share of each class's groups to hold out for best.pth, --patience and calibration; 0 (default) "
        "trains on all; 0.1 where settings are chosen",
        SHARE_BELOW_1,
    )


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How long and in what steps."""

    num_epochs: int = setting(
        20, "passes over the training clips; 20 (default) suits the default recipe", COUNT
    )
    batch_size: int = setting(
        16, "clips of a step, of all devices together; 16 (default) as the original", COUNT
    )
    seed: int = setting(0, "the same seed gives the same numbers on the same machine; default 0", NATURAL)
    recipe: str = setting(
        "default",
        "default (recommended): AdamW, warm-up, cosine, label smoothing, dropout; original: Adam at 1e-5 "
        "without any of it",
        choices=tuple(RECIPES),
    )
    class_weights: str = setting(
        "equal",
        "equal (default): each clip counts alike; balanced: each class does, for classes of unequal size",
        choices=("equal", "balanced"),
    )
    learning_rate: tuple[float, ...] | None = setting(
        None,
        "highest learning rate; default: the recipe's, 3e-4; lower it if the loss diverges; 3e-4,1e-5 sets "
        "the encoder's too, by default a tenth",
        learning_rates,
    )


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """Whether the encoder is trained too."""

    finetune: int | None = setting(
        None,
        "after the epochs over embeddings train the encoder too, for as many over frames; N: only its last "
        "N blocks; default: it stays frozen",
        COUNT,
        alone=0,
    )


@dataclass(frozen=True, kw_only=True)
class StopSettings:
    """When training ends before its last epoch."""

    patience: int | None = setting(
        None,
        "end when the validation accuracy has not risen for so many epochs; default: never; 5 is safe",
        COUNT,
    )


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """What is written, and where."""

    output_path: Path = setting(
        Path("model_checkpoints"), "folder for <model>_<epoch>.pth, best.pth and last.pth", Path
    )
    run_path: Path | None = setting(
        None,
        "folder for history.csv, curves.png, TensorBoard's events and the test report; default: "
        "runs/<model>-<encoder>-..., numbered",
        Path,
    )
    checkpoint_interval: int = setting(
        5, "epochs between checkpoints, each with a test; default 5; the last epoch is always saved", COUNT
    )
    resume: bool = setting(False, "go on with the run whose last.pth is in --output_path; its settings hold")
