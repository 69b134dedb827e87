"""What a training is asked for: the flags of train.py and pretrain.py, in groups."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from features.settings import CacheSettings, DeviceSettings, EncoderSettings
from features.streams import pace, parse_streams
from models import check_model
from splits.datasets import ALL, DataSettings, split_number
from splits.folder import FOLDS
from splits.split import RANDOM
from training.checkpoint import Checkpoint
from training.recipe import Recipe, add_recipe_flags, read_recipe
from utils.flags import (
    COUNT,
    NATURAL,
    NON_NEGATIVE,
    POSITIVE_SHARE,
    SHARE_BELOW_1,
    accepted_by,
    add_flags,
    read,
    setting,
    typed,
)
from utils.process import MissingFileError, UserError

LAST = "last.pth"
# Where things are; they may move between a run and its --resume.
PATHS = ("dataset_path", "split_path", "run_path")
# What changes no number of a training either.
FREE = (
    *("cache_path", "device", "num_workers", "channels", "output_path", "checkpoint_interval", "keep"),
    *("save_seconds", "resume"),
)
# What holds of a checkpoint that training starts from, where no flag says otherwise.
SIZES = ("img_dim", "sequence_length", "frame_stride", "no_flip", "flip")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What names the action."""

    model: str = setting(
        "ConvLSTM",
        "what names the action; ConvLSTM (default) is the original's, ActionBERT a Transformer, "
        "AttentiveProbe the usual head over encoders of videos, NormalizedProbe the one where labels are "
        "few, ConvClassifier and MeanPool are baselines; these four do not see the order of frames",
        accepted_by(check_model),
    )
    latent_dim: int = setting(512, "width that embeddings are projected to; 512 as the original", COUNT)
    sequence_length: int | None = setting(
        None,
        "embeddings of a clip; default (recommended): 40 for encoders of photographs, as the original, which "
        "covers the 7 s of most UCF-101 clips at every 4th frame; what the encoder's entry says for those of "
        "videos, 16 for i3d",
        COUNT,
    )
    checkpoint_model: Path | None = setting(
        None,
        "start from this checkpoint's weights, those of pretrain.py for example; its encoder, model and "
        "sizes hold then",
        Path,
    )
    channels: int = setting(3, "3: the encoders take RGB only", int, choices=(3,))


@dataclass(frozen=True, kw_only=True)
class ClipSettings:
    """Which clips are trained on."""

    split_number: int | str = setting(
        1,
        "official split, 1 to 3, or fold of a folder without lists, 1 to 5; papers quote 1 (default), or the "
        "mean of all splits, which all gives; random, a fifth of all clips as in the original, leaks and is "
        "for comparison only",
        split_number,
        choices=(*FOLDS, ALL, RANDOM),
    )
    val_fraction: float = setting(
        0.0,
        "share of each class's groups to hold out of the training list for best.pth, --patience and the "
        "temperature that makes probabilities right; 0 (default) trains on all, as papers do; 0.1 where "
        "settings are chosen, since the test list must not",
        SHARE_BELOW_1,
    )
    label_fraction: float = setting(
        1.0,
        "share of each class's training clips whose label is used; 1 (default) uses all, 0.1 shows what "
        "--pretrain is worth where labels are few",
        POSITIVE_SHARE,
    )


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How long and in what steps."""

    pretrain: int = setting(
        0,
        "passes over the training clips before, without labels, as pretrain.py does it; 0 (default) does "
        "none, 10 is best for some hundred clips, and many more do harm",
        NATURAL,
    )
    num_epochs: int = setting(
        20, "passes over the training clips; 20 is enough with the default recipe", COUNT
    )
    batch_size: int = setting(
        16,
        "clips of a step, of all devices together; 16 as the original, 2 at least (BatchNorm)",
        COUNT,
    )
    patience: int | None = setting(
        None,
        "end when the validation accuracy has not risen for so many epochs; 5 is safe; default: never",
        COUNT,
    )
    seed: int = setting(0, "the same seed gives the same numbers on the same machine", NATURAL)


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """What is written, and where."""

    output_path: Path = setting(
        Path("model_checkpoints"), "folder for <model>_<epoch>.pth, best.pth and last.pth", Path
    )
    run_path: Path | None = setting(
        None,
        "folder for what shows the course of the training: history.csv, curves.png, TensorBoard's events, "
        "and the report of the test; default: runs/<model>-<encoder>-..., numbered if it is there",
        Path,
    )
    checkpoint_interval: int = setting(
        5, "epochs between checkpoints, each with a test; the last epoch is always saved and tested", COUNT
    )
    keep: int | None = setting(
        None, "keep the newest so many <model>_<epoch>.pth only; default: all, about 65 MB each", COUNT
    )
    save_seconds: float = setting(
        60.0,
        "how much work a power cut may cost: last.pth (200 MB) is written when it is so old; 60 (default) "
        "costs 1 %% of the time; SIGINT and SIGTERM save whatever its age",
        NON_NEGATIVE,
    )
    resume: bool = setting(
        False,
        "go on with the run whose last.pth is in --output_path; its settings hold, so no other flag is "
        "needed",
    )


@dataclass(frozen=True)
class TrainSettings:
    """All of them.

    Attributes:
        recipe_name: of the recipe that `recipe` began as
    """

    data: DataSettings
    cache: CacheSettings
    encoder: EncoderSettings
    model: ModelSettings
    clips: ClipSettings
    loop: LoopSettings
    output: OutputSettings
    device: DeviceSettings
    recipe_name: str
    recipe: Recipe

    @classmethod
    def read(cls, args: argparse.Namespace) -> Self:
        """Out of the flags that `add_train_flags` added, and the encoder's defaults."""
        groups: dict[str, Any] = {name: read(group, args) for name, group in GROUPS.items()}
        spec = pace(args.encoder, parse_streams(args.streams))
        settings = cls(**groups, recipe_name=args.recipe, recipe=read_recipe(args))
        settings = settings.change("model", sequence_length=args.sequence_length or spec.sequence_length)
        return settings.change("cache", frame_stride=args.frame_stride or spec.frame_stride)

    @classmethod
    def from_flags(cls, words: Iterable[object]) -> Self:
        """Out of flags as they are typed. Raises: SystemExit, having said why, for wrong ones."""
        parser = argparse.ArgumentParser()
        add_train_flags(parser)
        return cls.read(parser.parse_args([str(word) for word in words]))

    def change(self, group: str, **values: Any) -> Self:
        """The same with other values in one of the groups."""
        return replace(self, **{group: replace(getattr(self, group), **values)})

    def problem(self, processes: int) -> str | None:
        """Why the settings do not go together, in a line; None if they do."""
        least = max(2, processes)
        if self.loop.batch_size < least:
            return (
                f"--batch_size {self.loop.batch_size} is too small: BatchNorm cannot train on a single "
                f"clip, and each process needs one; take {least} or more"
            )
        if self.loop.patience and not self.clips.val_fraction:
            return "--patience looks at validation clips; hold some out with --val_fraction 0.1"
        return None

    def plain(self) -> dict[str, Any]:
        """What a checkpoint keeps: all that decides a number, and paths, as plain values by name."""
        flat = {name: value for group in GROUPS for name, value in asdict(getattr(self, group)).items()}
        flat |= {"recipe": self.recipe_name, **asdict(self.recipe)}
        return {name: _plain(value) for name, value in flat.items() if name not in FREE}

    def starting_from(self, start: Checkpoint, given: Mapping[str, Any]) -> Self:
        """The settings of a training that begins with the model of --checkpoint_model.

        Args:
            start: what that file holds; its encoder, model, streams, sizes and --no_flip hold
            given: values of the flags that were typed, by name; of sizes of clips these hold

        Raises: UserError if a typed flag asks for another model than the file has.
        """
        model = start.model
        theirs = {
            "encoder": model.encoder.name,
            "streams": ",".join(model.streams),
            "model": model.name,
            "latent_dim": model.config["latent_dim"],
            "encoder_weights": None,
        }
        differ = [name for name in theirs if name in given and given[name] != theirs[name]]
        if differ:
            raise UserError(
                f"{self.model.checkpoint_model}: --{differ[0]} {given[differ[0]]} is not what this "
                f"checkpoint was trained with ({theirs[differ[0]] or 'it holds its weights'}); leave the "
                "flag out"
            )
        sizes = {"img_dim": start.img_dim, "sequence_length": start.sequence_length}
        sizes["frame_stride"] = start.frame_stride
        values = theirs | {name: given.get(name) or size for name, size in sizes.items()}
        # One that is typed takes the place of either.
        for name, other in (("no_flip", "flip"), ("flip", "no_flip")):
            before = start.settings.get(name, False) and other not in given
            values[name] = given.get(name, before)
        changed = self
        for group in ("encoder", "model", "cache"):
            own = {name: value for name, value in values.items() if hasattr(getattr(self, group), name)}
            changed = changed.change(group, **own)
        return changed


GROUPS: dict[str, type] = {
    "data": DataSettings,
    "cache": CacheSettings,
    "encoder": EncoderSettings,
    "model": ModelSettings,
    "clips": ClipSettings,
    "loop": LoopSettings,
    "output": OutputSettings,
    "device": DeviceSettings,
}


def add_train_flags(parser: argparse.ArgumentParser, *, without: Sequence[str] = (), **defaults: Any) -> None:
    """Add the flags of a training, but for some; `defaults` are of those that have others here."""
    for group in GROUPS.values():
        add_flags(parser, group, without=without, **defaults)
    add_recipe_flags(parser)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def check_run(last: Path) -> Path:
    """The last.pth of a run. Raises: MissingFileError if there is none."""
    if not last.is_file():
        raise MissingFileError(f"{last}: there is no run to go on with; begin one without --resume")
    return last


def with_earlier_settings(
    parser: argparse.ArgumentParser, argv: list[str] | None, args: argparse.Namespace, loaded: Checkpoint
) -> argparse.Namespace:
    """The flags of the run that wrote `loaded`, but for those typed now that change no number.

    Raises: UserError that lists the flags typed now that disagree.
    """
    before, last = loaded.settings, args.output_path / LAST
    decisive = [name for name in vars(args) if name not in (*FREE, *PATHS)]
    missing = [name for name in decisive if name not in before]
    if missing:
        raise UserError(f"{last}: of a version without --{missing[0]}; begin again without --resume")
    # Where all splits are trained, each run has its own.
    given = {name: value for name, value in typed(parser, argv, args).items() if value != ALL}
    differ = [
        f"--{name} {given[name]} (there {before[name]})"
        for name in decisive
        if name in given and _plain(given[name]) != before[name]
    ]
    if differ:
        raise UserError(
            f"{last} was trained with other flags: {', '.join(differ)}; leave them out, or begin again "
            "without --resume"
        )
    paths = {name: Path(before[name]) for name in PATHS if before.get(name) and name not in given}
    files = {name: Path(before[name]) for name in ("encoder_weights", "checkpoint_model") if before.get(name)}
    return argparse.Namespace(**{**vars(args), **{name: before[name] for name in decisive}, **paths, **files})
