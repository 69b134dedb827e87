"""From settings to clips, a model and their embeddings: what train.py and pretrain.py begin with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from dataset import FrameClips, Sampling
from features.cache import CachedClips
from features.encoder import INT8
from features.execution import Calibration, prepare_encoders
from features.fill import cache_folder, open_cache
from features.near_copies import find_near_copies
from features.settings import CacheSettings, DeviceSettings
from features.streams import open_streams, pace, parse_streams
from splits.datasets import Listed
from splits.split import RANDOM, Clip, Split, hold_out, names_sha256, siblings, some_labels
from training.batches import Batches, ClipBatches, EmbeddingClips, EncodedClips, frame_loader
from training.checkpoint import Checkpoint
from training.classifier import Classifier
from training.history import History
from training.loop import Part
from training.settings import TrainSettings
from utils.files import csv_bytes, write_whole
from utils.process import UserError, say
from utils.ranks import ALONE, Ranks

# In the folder of a run.
LISTS, NEAR_COPIES = "lists", "near_copies.csv"


class ClipSource:
    """Where the embeddings of a command's clips come from: the cache, or the encoder anew in each epoch.

    Args:
        model: on its device, its encoder prepared
        img_dim: height and width of the frames in pixels
        kept: the embeddings of all clips, for each stream; none decodes and encodes clips when they are
            asked for
        workers: processes that decode where there is no cache
    """

    def __init__(self, model: Classifier, img_dim: int, kept: Sequence[CachedClips], workers: int) -> None:
        self.model, self.img_dim, self.kept, self.workers = model, img_dim, kept, workers

    @classmethod
    def open(
        cls,
        model: Classifier,
        clips: Sequence[Clip],
        img_dim: int,
        cache: CacheSettings,
        dataset_path: Path,
        workers: int,
        *,
        flip: bool,
        ranks: Ranks = ALONE,
    ) -> Self:
        """As the settings ask for; fills the cache with `clips`. Raises: as `open_cache`."""
        kept: list[CachedClips] = []
        if cache.cache == "disk":
            folder = cache_folder(cache.cache_path, dataset_path)
            stride = cache.frame_stride or pace(model.encoder.name, model.streams).frame_stride
            kept = [
                open_cache(
                    folder, clips, encoder, stream.img_dim, flip=flip, stream=stream.name,
                    frame_stride=stride, threads=max(1, workers), ranks=ranks,
                ).view(clips)
                for encoder, stream in open_streams(model.encoder, model.further, model.streams, img_dim)
            ]  # fmt: skip
        return cls(model, img_dim, kept, workers)

    @property
    def computed_in(self) -> str:
        """What the first stream's encoder is computed in, as `Encoder.variant`."""
        return self.model.encoder.variant(self.model.open_streams(self.img_dim)[0].view_name)

    def batches(self, clips: Sequence[Clip], sampling: Sampling, order: ClipBatches) -> Batches:
        """Embeddings of what `order` names of `clips`."""
        device, streams = self.model.device, self.model.open_streams(self.img_dim)
        if self.kept:
            layouts = [stream.windows for stream in streams]
            return EmbeddingClips(self.kept, layouts, clips, sampling, order, device)
        frames = FrameClips(clips, sampling, [stream.view for stream in streams])
        loader = frame_loader(frames, order, workers=self.workers, pin_memory=device.type == "cuda")
        return EncodedClips(loader, streams)


def choose_split(listed: Listed, split_number: int | str, seed: int) -> Split:
    """The split to train on; warns of what is missing, and of a split that leaks.

    Raises: as `load_split`; UserError if there are too few clips.
    """
    split = listed.split(split_number, seed=seed)
    if missing := split.missing():
        say(f"warning: {missing}")
    if split_number == RANDOM:
        say(
            f"warning: this random split leaks: {siblings(split):,} of {len(split.test):,} test clips are "
            "cut out of a video that training has seen; do not compare its accuracy with another split's"
        )
    if len(split.train) < 2 or not split.test:
        raise UserError(
            f"{listed.data.dataset_path}: {len(split.train)} training and {len(split.test)} test clips of "
            f"split {split_number} are there; it takes 2 and 1 at least"
        )
    return split


def build_model(settings: TrainSettings, num_classes: int) -> Classifier:
    """A new model. Raises: as `Classifier`."""
    return Classifier(
        settings.model.model,
        num_classes,
        encoder=settings.encoder.encoder,
        streams=parse_streams(settings.encoder.streams),
        state=settings.encoder.state(),
        latent_dim=settings.model.latent_dim,
        sequence_length=settings.model.sequence_length,
    )


def prepare(
    model: Classifier,
    settings: DeviceSettings,
    device: torch.device,
    *,
    img_dim: int | None = None,
    calibration: Calibration | None = None,
) -> Classifier:
    """The model on its device, its encoders as fast as that allows. Raises: as `prepare_encoders`.

    Args:
        img_dim: of the frames that it will see, in pixels, where it may be quantised
        calibration: what it may be quantised on
    """
    model = model.to(device)
    opened = open_streams(model.encoder, model.further, model.streams, img_dim)
    prepare_encoders(opened, settings, calibration)
    return model


@dataclass(frozen=True)
class Setup:
    """What a training works on.

    Attributes:
        settings: of the training
        ranks: processes that train together
        split: of the data set
        unlabelled: its training clips without those that are held out
        held_out: groups of clips to choose settings by
        clips: those of `unlabelled` whose label is used
        source: embeddings of all of them
        testing, training: which frames make a clip
        name: of the run: model, encoder, split
    """

    settings: TrainSettings
    ranks: Ranks
    split: Split
    unlabelled: list[Clip]
    held_out: list[Clip]
    clips: list[Clip]
    source: ClipSource
    testing: Sampling
    training: Sampling
    name: str

    @classmethod
    def build(
        cls,
        settings: TrainSettings,
        listed: Listed,
        split: Split,
        model: Classifier,
        device: torch.device,
        ranks: Ranks,
    ) -> Self:
        """As the settings say; fills the cache.

        Args:
            listed: what the split was chosen from

        Raises: as `hold_out` and `ClipSource.open`.
        """
        seed, fraction = settings.loop.seed, settings.clips.val_fraction
        unlabelled, held_out = hold_out(split.train, fraction, seed) if fraction else (split.train, [])
        img_dim = settings.encoder.img_dim or model.encoder.spec.input_size
        settings = settings.change("encoder", img_dim=img_dim)
        flip = settings.encoder.mirrors(pace(model.encoder.name, model.streams))
        sequence_length, frame_stride = settings.model.sequence_length, settings.cache.frame_stride
        assert sequence_length
        assert frame_stride
        random = settings.clips.split_number == RANDOM
        calibration = Calibration.on(
            split.train, set() if random else listed.never_tested(),
            cache_folder(settings.cache.cache_path, settings.data.dataset_path), frame_stride, ranks,
            one_split=True,
        )  # fmt: skip
        if settings.cache.cache == "off":
            calibration = replace(calibration, by_itself=False)
        prepare(model, settings.device, device, img_dim=img_dim, calibration=calibration)
        for own in model.encoders():
            if own.engine != INT8:
                # A checkpoint holds what it was trained with.
                own.quantized.clear()
        # What auto has become here, so that a run that goes on does not take another one.
        settings = settings.change("device", engine=model.encoder.engine.split("-")[0])
        testing = Sampling(sequence_length, frame_stride=frame_stride)
        source = ClipSource.open(
            model, split.train + split.test, img_dim, settings.cache, settings.data.dataset_path,
            settings.device.num_workers, flip=flip, ranks=ranks,
        )  # fmt: skip
        encoder = model.encoder.name.replace("/", "-")[-80:]
        return cls(
            settings, ranks, split, unlabelled, held_out,
            some_labels(unlabelled, settings.clips.label_fraction, seed), source, testing,
            replace(testing, training=True, flip=flip, seed=seed),
            f"{model.name}-{encoder}-{img_dim}px-split{settings.clips.split_number}",
        )  # fmt: skip

    def change(self, group: str, **values: Any) -> Self:
        """The same with other values in a group of the settings."""
        return replace(self, settings=self.settings.change(group, **values))

    def in_folder(self, run_path: Path, listed: Listed) -> Self:
        """The same with a folder for what shows its course.

        Lists that were drawn from clips are kept there, and which test clips are nearly training clips.

        Args:
            listed: what the split was chosen from; drawn anew by now it might be another, with other clips

        Raises: OSError if they cannot be written.
        """
        lists = run_path / LISTS
        if self.ranks.rank == 0:
            listed.keep(lists)
            if self.source.kept:
                self._tell_near_copies(run_path / NEAR_COPIES)
        paths = {"split_path": listed.path or lists, "dataset": listed.name}
        return self.change("output", run_path=run_path).change("data", **paths)

    def _tell_near_copies(self, path: Path) -> None:
        pairs = find_near_copies(self.source.kept[0], self.split.train, self.split.test)
        if not pairs:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [[pair.test.name, pair.train.name, f"{pair.cosine:.4f}"] for pair in pairs]
        write_whole(path, csv_bytes([["test_clip", "training_clip", "cosine"], *rows]))
        first = pairs[0]
        elsewhere = sum(pair.test.label != pair.train.label for pair in pairs)
        other = f"; {elsewhere:,} under another class" if elsewhere else ""
        say(
            f"warning: {len(pairs):,} of {len(self.split.test):,} test clips are nearly the same as a "
            f"training clip (copies, or one scene{other}): {first.test.name} as {first.train.name}, cosine "
            f"{first.cosine:.3f}; all in {path}"
        )

    def part(self, clips: Sequence[Clip], *, training: bool) -> Part:
        """Clips as a loop takes them, shared by the processes.

        Raises: UserError if there are too few to train on.
        """
        loop, ranks = self.settings.loop, self.ranks
        order = ClipBatches(
            len(clips), loop.batch_size, shuffle=training, seed=loop.seed, rank=ranks.rank, ranks=ranks.size
        )
        if not len(order):
            raise UserError(f"{len(clips)} training clips are too few for {ranks.size} processes; add some")
        sampling = self.training if training else self.testing
        return Part(clips, order, self.source.batches(clips, sampling, order))

    def checkpoint(self) -> Checkpoint:
        """What each file of the run holds, but for the epoch."""
        settings = self.settings
        return Checkpoint(
            self.source.model, self.split.classes, self.source.img_dim, self.testing.sequence_length,
            settings.clips.split_number, 0, {**settings.plain(), "clips": names_sha256(self.clips)},
        )  # fmt: skip

    def history(self, folder: Path, epochs: list[dict[str, float]], title: str) -> History | None:
        """What shows the course of the run, in the first process."""
        if self.ranks.rank:
            return None
        say(f"figures and curves in {folder}")
        return History(folder, epochs, title)


def number_of_parameters(module: nn.Module) -> int:
    """Numbers in the parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())
