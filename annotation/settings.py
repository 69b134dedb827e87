"""Flags of the commands that recognize actions in videos: which model, how frames are labeled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from annotation.overlay import OVERLAYS
from features.networks import encoder_spec, with_own_classes
from utils.flags import COUNT, NON_NEGATIVE, SHARE_BELOW_1, accepted_by, setting
from utils.process import UserError

DEFAULT_ENCODER = "i3d"


def check_own_classes(name: str) -> None:
    """Raises: UserError for an encoder whose own last layer names no actions."""
    spec = encoder_spec(name)
    if spec.categories is None and not spec.words:
        raise UserError(
            f"{name} has no last layer of its own that names actions; choose one of "
            f"{', '.join(with_own_classes())} or hf/<name> with a classifier, or name a trained model with "
            "--checkpoint_model"
        )


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model names actions."""

    checkpoint_model: Path | None = setting(
        None,
        "of this project or of the original; default: none, the encoder's own last layer names 400 actions "
        "(Kinetics-400)",
        Path,
    )
    encoder: str | None = setting(
        None,
        "network that names actions without --checkpoint_model; i3d (default, recommended) works offline; "
        "also torchvision's for video and hf/<name> with a classifier",
        accepted_by(check_own_classes),
    )
    encoder_weights: Path | None = setting(
        None, "file of other weights for it, as for train.py; default: the released ones", Path
    )

    def __post_init__(self) -> None:
        """Raises: UserError if flags do not go together."""
        if self.checkpoint_model and (self.encoder or self.encoder_weights):
            raise UserError(
                f"--checkpoint_model {self.checkpoint_model} has its own encoder; leave out --encoder and "
                "--encoder_weights"
            )

    @property
    def name(self) -> str:
        """What tables call the model."""
        weights = f"with {self.encoder_weights}" if self.encoder_weights else "as it was released"
        return str(self.checkpoint_model or f"{self.encoder or DEFAULT_ENCODER}, {weights}")


@dataclass(frozen=True, kw_only=True)
class BackendSettings(ModelSettings):
    """Which model names actions, and what runs it."""

    backend: str = setting(
        "torch",
        "torch (default); onnxruntime runs what export.py wrote, whose folder --checkpoint_model then names",
        choices=("torch", "onnxruntime"),
    )


@dataclass(frozen=True, kw_only=True)
class LabelSettings:
    """How frames are labeled."""

    img_dim: int | None = setting(
        None, "frame size in pixels for the encoder; default (recommended): the checkpoint's", COUNT,
        flags=("--img_dim", "--image_dim"),
    )  # fmt: skip
    sequence_length: int | None = setting(
        None, "embeddings of the clip that labels a frame; default (recommended): the checkpoint's", COUNT
    )
    only: str | None = setting(
        None,
        "choose among these actions, names between commas; probabilities stay those of all; any words for an "
        "encoder that reads them (X-CLIP); default: all",
    )
    min_probability: float = setting(
        0.0,
        "a frame whose most probable action has less shows no action; default 0; 0.2 suits the 400 of "
        "Kinetics",
        SHARE_BELOW_1,
    )
    change_cost: float | None = setting(
        None,
        "what a change of action must gain, in nats x seconds; default: the checkpoint's, else 0; 1 calms "
        "labels that flicker",
        NON_NEGATIVE,
    )
    no_cuts: bool = setting(False, "do not look for cuts; default: labels begin anew at each, but live")
    label_every: int = setting(
        10, "frames that share a label; 10 (default) is 0.4 s; 1 takes up to half as long again", COUNT
    )
    overlay: str = setting(
        "full",
        "full (default): three most probable actions and a timeline; minimal: the most probable action",
        choices=OVERLAYS,
    )
