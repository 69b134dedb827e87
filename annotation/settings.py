"""Flags of the commands that name actions in videos: which model, how frames are labelled, what is served."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from annotation.overlay import OVERLAYS
from annotation.pretrained import check_own_classes, untrained
from features.networks import encoder_spec
from features.settings import given_weights
from training.checkpoint import Checkpoint, load_checkpoint
from utils.flags import COUNT, NON_NEGATIVE, POSITIVE, SHARE_BELOW_1, accepted_by, setting
from utils.process import UserError, say

DEFAULT_ENCODER = "i3d"
# Videos that a page offers.
EXAMPLES = 8


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model names actions."""

    checkpoint_model: Path | None = setting(
        None,
        "of this project or of the original; without one the encoder's own last layer names 400 actions "
        "(Kinetics-400)",
        Path,
    )
    encoder: str | None = setting(
        None,
        "without --checkpoint_model, the network that names actions: i3d (default, recommended) works "
        "offline; also r3d_18, mc3_18, r2plus1d_18, s3d, mvit_v1_b, mvit_v2_s, swin3d_t, swin3d_s, swin3d_b",
        accepted_by(check_own_classes),
    )
    encoder_weights: Path | None = setting(
        None,
        "file with other weights for it, as for train.py; default (recommended): the released ones",
        Path,
    )

    @property
    def encoder_name(self) -> str:
        """The network that names actions where there is no checkpoint."""
        return self.encoder or DEFAULT_ENCODER

    @property
    def name(self) -> str:
        """What tables call the model."""
        weights = f"with {self.encoder_weights}" if self.encoder_weights else "as it was released"
        return str(self.checkpoint_model or f"{self.encoder_name}, {weights}")

    def load(self) -> Checkpoint:
        """The model. Raises: as `load_checkpoint`, `given_weights` and `untrained`."""
        if self.checkpoint_model:
            return load_checkpoint(self.checkpoint_model)
        name = self.encoder_name
        checkpoint = untrained(name, given_weights(name, self.encoder_weights))
        say(
            f"no --checkpoint_model: {name} names the {len(checkpoint.classes)} actions that it was trained "
            "on, which --list_actions of test_on_video.py prints"
        )
        return checkpoint

    def own_classes(self) -> list[str] | None:
        """What it names without a checkpoint; None with one."""
        own = encoder_spec(self.encoder_name).categories
        return own() if own and not (self.checkpoint_model or self.encoder_weights) else None

    def __post_init__(self) -> None:
        """Raises: UserError if flags do not go together."""
        if self.checkpoint_model and (self.encoder or self.encoder_weights):
            raise UserError(
                f"--checkpoint_model {self.checkpoint_model} has its own encoder; leave out --encoder and "
                "--encoder_weights"
            )


@dataclass(frozen=True, kw_only=True)
class BackendSettings(ModelSettings):
    """Which model labels frames, and what runs it."""

    backend: str = setting(
        "torch",
        "onnxruntime runs what export.py wrote, whose folder --checkpoint_model then names, on the CPU; "
        "torch (default) is faster where the hardware has bf16, and 15 %% slower where it has not",
        choices=("torch", "onnxruntime"),
    )


@dataclass(frozen=True, kw_only=True)
class LabelSettings:
    """How frames are labelled, and what is drawn."""

    img_dim: int | None = setting(
        None,
        "frame size in pixels for the encoder; default (recommended): the checkpoint's",
        COUNT,
        flags=("--img_dim", "--image_dim"),
    )
    sequence_length: int | None = setting(
        None,
        "embeddings of the clip that decides a frame's label; default (recommended): the checkpoint's",
        COUNT,
    )
    window_step: int | None = setting(
        None,
        "embeddings from one of the clip to the next, of those that the checkpoint was trained on: with its "
        "--frame_stride 4 and an encoder of photographs, 2 is every 8th frame; default (recommended): 2 for "
        "those, the middle of what training draws on UCF-101, and 1 for encoders of videos",
        COUNT,
    )
    only: str | None = setting(
        None,
        "names of actions between commas: frames show the most probable one of these; probabilities stay "
        "those among all that the model knows, small where a video shows something else; default: all",
    )
    min_probability: float = setting(
        0.0,
        "frames whose most probable action has less show no action; 0 (default) names one always; "
        "0.2 is good for the 400 actions of Kinetics",
        SHARE_BELOW_1,
    )
    min_seconds: float = setting(
        0.0,
        "of what is shown: what is shorter, an action or none, is taken for what was before in the shot; 0 "
        "(default) shows each, 0.5 calms labels that flicker",
        NON_NEGATIVE,
    )
    no_cuts: bool = setting(
        False,
        "take the whole video for one shot; default (recommended): what is before a cut says nothing of what "
        "is behind it; live, cuts are not looked for",
    )
    label_every: int = setting(
        10,
        "frames that share a label, that of the clip around their middle, as nearly as embeddings that stand "
        "for several frames allow; 10, or 0.4 s at 25 fps, is as often as one can read; 1 takes up to half "
        "as long again",
        COUNT,
    )
    overlay: str = setting(
        "full",
        "full (default): the three most probable actions and a timeline below the picture; minimal: the most "
        "probable one",
        choices=OVERLAYS,
    )
    smooth: float = setting(
        0.0,
        "average probabilities over so many seconds of the past; 0 (default) shows each as it is, 1 calms "
        "labels that flicker",
        NON_NEGATIVE,
    )


@dataclass(frozen=True, kw_only=True)
class PageSettings:
    """What the page takes."""

    examples: Path = setting(
        Path("data/toy-actions/UCF-101"),
        f"folder of videos to pick from, the first of each of its folders, {EXAMPLES} at most; default: "
        "the toy data, where it has been drawn",
        Path,
    )
    max_megabytes: int = setting(100, "of an upload; 100 (default) is some minutes of HD", COUNT)
    max_seconds: int = setting(
        120, "of a video; 120 (default) takes half a minute of work on 2 cores, and others wait", COUNT
    )
    max_slowness: float = setting(
        10.0,
        "times its length that the work on a video may take, and a minute besides, before it is given up for "
        "those that wait; 10 (default) is ample for i3d on 2 cores, raise it for a slower encoder",
        POSITIVE,
    )
    max_waiting: int = setting(40, "users in the queue; more are asked to come back", COUNT)
