"""Train an action classifier: a frozen encoder, whose embeddings are kept, and a small head over them.

    python3 train.py --dataset_path data/UCF-101 --split_path data/ucfTrainTestlist
    python3 train.py --encoder i3d --model LinearProbe                  # recommended; needs no download
    python3 train.py --encoder efficientnet_lite0                       # the fastest, needs none either
    python3 train.py --split_number all                                 # all three splits, and their mean
    python3 train.py --dataset_path my_clips --encoder i3d              # any folder of class folders
    python3 train.py --encoder i3d --finetune 2                         # then the encoder's last blocks too
    python3 train.py --resume                                           # goes on where the last run stopped
    torchrun --nproc_per_node=4 train.py ...                            # the same on four devices

The data set may be the videos, or the frames that extract_frames.py made of them.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from annotation.recognizer import Recognizer
from annotation.timelines import USUAL_COST, best_cost, report_timelines
from dataset import EmbeddingClips, FrameClips, Sampling, batch_items, fill_store, sampled, with_background
from features.encoder import Encoder
from features.settings import DeviceSettings, EncoderSettings, StoreSettings, read_state
from features.store import Store, default_folder
from models import Head, build_head
from splits.datasets import ALL, AnyListed, DataSettings, open_listed
from splits.segments import KEPT, SegmentedVideos
from splits.split import NO_ACTION, Clip, Split, hold_out, names_sha256
from training.calibration import fit_temperature
from training.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from training.pictures import curves
from training.recipe import Optimization, balanced_weights, read_recipe
from training.report import (
    Predictions,
    about,
    interval,
    markdown,
    number_of_parameters,
    predict,
    predict_logits,
    summary,
    write_report,
)
from training.settings import (
    ClipSettings,
    FinetuneSettings,
    LoopSettings,
    ModelSettings,
    OutputSettings,
    StopSettings,
)
from utils.device import choose_device, choose_dtype, seed_everything
from utils.files import make_writable_folder, unused, write_whole
from utils.flags import Parser, add_flags, read, typed
from utils.process import MissingFileError, UserError, run, say
from utils.ranks import Ranks
from video.reader import end_with_parent, worker_context

LAST, BEST = "last.pth", "best.pth"
# What a training began with, if it trains the encoder too.
FIRST = "first.pth"
# Clips that an epoch draws from each segment of a long video.
DRAWS = 3
GROUPS = (
    *(DataSettings, StoreSettings, EncoderSettings, ModelSettings, ClipSettings, LoopSettings),
    *(FinetuneSettings, StopSettings, OutputSettings, DeviceSettings),
)
# Flags that may change when a run is resumed: where things are and what computes, nothing of the recipe.
MAY_DIFFER = (
    *("dataset_path", "split_path", "cache_path", "output_path", "run_path", "device", "num_workers"),
    *("channels", "checkpoint_interval", "resume", "segments"),
)


# Flags that are taken from --checkpoint_model, unless they are typed.
SIZES = ("img_dim", "sequence_length", "frame_stride", "no_flip")


def get_args_parser() -> Parser:
    """The flags of train.py."""
    parser = Parser(description=__doc__.split("\n")[0])
    for group in GROUPS:
        add_flags(parser, group, without=("flip",))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Train, test and save; returns the exit status."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    given = typed(parser, argv, args)
    if problem := check_flags(args):
        parser.error(problem)
    device, first = choose_device(args.device), args.output_path / "split1" / LAST
    with contextlib.closing(Ranks.from_environment(device)) as ranks, resume_hint(args):
        if args.resume and "split_number" not in given and first.is_file():
            if (args.output_path / LAST).is_file():
                raise UserError(
                    f"{args.output_path} has a run of one split and one of all; add --split_number all to go "
                    "on with the latter, or its number for the other"
                )
            args.split_number = ALL
        if args.split_number != ALL:
            train(args, given, None, device, ranks)
            return 0
        if args.resume and not first.is_file():
            raise MissingFileError(f"{first}: there is no run to go on with; begin one without --resume")
        before = resumed(args, given, load_checkpoint(first), first) if args.resume else args
        # Once: folds drawn anew for the next split might be others, with other clips.
        listed = open_listed(read(DataSettings, before))
        tested = []
        for number in listed.numbers:
            own, known = argparse.Namespace(**vars(args)), given
            own.split_number, own.output_path = number, args.output_path / f"split{number}"
            own.run_path = args.run_path and args.run_path / f"split{number}"
            if args.resume and not same_run(first, own.output_path / LAST):
                # Its turn had not come: trained as the first one was.
                own = resumed(own, given, load_checkpoint(first), first)
                own.split_number, own.resume = number, False
                known = {name: getattr(own, name) for name in SIZES} | given
                if own.run_path and "run_path" not in given:
                    name = own.run_path.name.replace("split1", f"split{number}")
                    own.run_path = own.run_path.with_name(name)
            tested.append(train(own, known, listed, device, ranks))
        reports = [each for each in tested if each is not None]
        if reports:
            table = table_of_splits(reports)
            write_whole(args.output_path / "splits.md", f"{table}\n".encode())
            print(table)
    return 0


@contextlib.contextmanager
def resume_hint(args: argparse.Namespace) -> Iterator[None]:
    """Print the command that resumes a training that is interrupted."""
    started = time.time()
    try:
        yield
    except KeyboardInterrupt:
        pattern = f"split*/{LAST}" if args.split_number == ALL else LAST
        written = [path for path in args.output_path.glob(pattern) if path.stat().st_mtime >= started]
        number = f" --split_number {ALL}" if args.split_number == ALL else ""
        if written or args.resume:
            say(f"to go on: python3 train.py --resume --output_path {args.output_path}{number}")
        else:
            say("no epoch was finished: it begins again with the same command; embeddings are kept")
        raise


def same_run(first: Path, other: Path) -> bool:
    """Whether the last checkpoint of another split is there and was trained with the flags of the first."""
    if not other.is_file():
        return False
    one, two = (load_checkpoint(path).settings for path in (first, other))
    names = {*one, *two} - {*MAY_DIFFER, "split_number", "clips"}
    return all(one.get(name) == two.get(name) for name in names)


def resumed(
    args: argparse.Namespace, given: dict[str, Any], loaded: Checkpoint, path: Path
) -> argparse.Namespace:
    """The flags of the run that wrote the checkpoint `path`, but for typed ones that may differ.

    Raises: UserError that lists typed flags that disagree.
    """
    before = dict(loaded.settings)
    # As runs kept it that knew no rate of the encoder.
    if isinstance(before.get("learning_rate"), float):
        before["learning_rate"] = (before["learning_rate"],)
    if "finetune" in given and before.get("finetune") is None:
        raise UserError(
            f"{path}: this run keeps its encoder as it is; train it further in another folder, with "
            f"--checkpoint_model {path} --finetune --output_path <folder>"
        )
    differ = [
        f"--{name} {_typed(before[name])}, not {_typed(value)}"
        for name, value in given.items()
        if name not in MAY_DIFFER and name in before and value != ALL and _plain(value) != before[name]
    ]
    if differ:
        raise UserError(
            f"{path} was trained with {'; '.join(differ)}; leave the flags out, or start a new run without "
            "--resume"
        )
    flags = argparse.Namespace(**vars(args))
    for name in vars(args):
        # Of segments the table that the run has kept.
        kept = name == "segments" or (name.endswith("_path") and name not in given)
        if name in before and (name not in MAY_DIFFER or kept):
            value = before[name]
            is_path = name.endswith("_path") or name in ("encoder_weights", "checkpoint_model", "segments")
            setattr(flags, name, Path(value) if is_path and value else value)
    flags.output_path = args.output_path
    return flags


def _typed(value: Any) -> str:
    """A value as it is typed behind a flag."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


Tested = tuple[dict[str, Any], Predictions]
# A batch: epoch and index of each clip.
Items = list[tuple[int, int]]


class FrameModel(nn.Module):
    """An encoder and a head that are trained together."""

    def __init__(self, encoder: Encoder, head: Head) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, windows: list[Tensor], rows: Tensor, padding: Tensor) -> Tensor:
        """Logits (B, C) of a batch as `FrameClips.collate` makes it."""
        embeddings = torch.cat([self.encoder(alike).flatten(0, 1) for alike in windows])
        return self.head(embeddings[rows], padding)


def train(
    args: argparse.Namespace,
    given: dict[str, Any],
    listed: AnyListed | None,
    device: torch.device,
    ranks: Ranks,
) -> Tested | None:
    """Train on one split, from the beginning or on from last.pth, and test the best epoch.

    Args:
        args: all flags
        given: those that were typed
        listed: the data set, where it is open already

    Returns: the report of the test and what it is about, in the first process.
    Raises: UserError or OSError for wrong data, flags or files.
    """
    last = args.output_path / LAST
    start: Checkpoint | None = None
    if args.resume:
        if not last.is_file():
            raise MissingFileError(f"{last}: there is no run to go on with; begin one without --resume")
        start = load_checkpoint(last)
        if start.training is None:
            raise CheckpointError(f"{last}: not what training needs to go on; train without --resume")
        args = resumed(args, given, start, last)
    elif args.checkpoint_model:
        start = load_checkpoint(args.checkpoint_model)
        take_sizes(args, given, start)
    with contextlib.ExitStack() as opened:
        if ranks.rank == 0:
            make_writable_folder(args.output_path)
            try:
                opened.enter_context(filelock.FileLock(args.output_path / ".lock").acquire(blocking=False))
            except filelock.Timeout:
                raise UserError(
                    f"{args.output_path}: another training writes there; choose another --output_path"
                ) from None
        seed_everything(args.seed)
        return fit(args, start, listed or open_listed(read(DataSettings, args)), device, ranks)


class Part(NamedTuple):
    """A part of the training: over embeddings, or over frames.

    Attributes:
        optimization: of what is trained
        module: its logits, by what `read` gives but the labels
        read: reads batches of items
        finetuned: the encoder is trained too
    """

    optimization: Optimization
    module: nn.Module
    read: Callable[[list[Items]], Iterable[Any]]
    finetuned: bool


@contextlib.contextmanager
def damage(path: Path) -> Iterator[None]:
    """Raises: CheckpointError for what a file that was changed makes Python raise."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: damaged; begin again without --resume, which moves it aside"
        ) from error


class Standing(NamedTuple):
    """Where a run stands, as last.pth keeps it.

    Attributes:
        optimization: state of the optimizer and the schedule
        history: figures of each epoch
        best: validation accuracy, negative loss and number of the best epoch; None without validation
    """

    optimization: dict[str, dict]
    history: list[dict[str, float]]
    best: tuple[float, float, int] | None

    @classmethod
    def of(cls, kept: Any, path: Path) -> Standing:
        """What last.pth has. Raises: CheckpointError if that is damaged."""
        with damage(path):
            return cls(kept["optimization"], list(kept["history"]), kept["best"])


def frame_reader(frames: FrameClips, workers: int, *, pin: bool) -> Callable[[list[Items]], Iterable[Any]]:
    """A function that reads batches of items in processes, which are started once."""
    batches: list[Items] = []
    loader = DataLoader(
        frames, batch_sampler=batches, collate_fn=frames.collate, num_workers=workers, pin_memory=pin,
        multiprocessing_context=worker_context(), worker_init_fn=end_with_parent, persistent_workers=True,
    )  # fmt: skip

    def read(wanted: list[Items]) -> Iterable[Any]:
        batches[:] = wanted
        return loader

    return read


def take_sizes(args: argparse.Namespace, given: dict[str, Any], start: Checkpoint) -> None:
    """Set the flags to what holds for a checkpoint that training starts from.

    Raises: UserError if a given flag asks for another model than the file has.
    """
    theirs = {"encoder": start.encoder.name, "model": start.model, "latent_dim": start.sizes["latent_dim"]}
    for name, value in theirs.items():
        if given.get(name, value) != value:
            raise UserError(
                f"{args.checkpoint_model}: --{name} {given[name]} is not what this checkpoint was trained "
                f"with ({value}); leave the flag out"
            )
    before = start.encoder.img_dim, start.sequence_length, start.frame_stride
    sizes = {name: given.get(name) or value for name, value in zip(SIZES, before, strict=False)}
    if "no_flip" not in given:
        sizes["no_flip"] = start.settings.get("no_flip", False)
    vars(args).update(theirs | sizes)


def fit(
    args: argparse.Namespace, start: Checkpoint | None, listed: AnyListed, device: torch.device, ranks: Ranks
) -> Tested | None:
    """The training itself, from its data to its test; arguments and errors as `train`."""
    # Data.
    split = choose_split(listed, args.split_number)
    if start and len(start.classes) != len(split.classes):
        raise UserError(
            f"{args.checkpoint_model or args.output_path / LAST}: {len(start.classes)} classes, and the "
            f"lists name {len(split.classes)}; name the lists that it was trained with"
        )
    if start and start.split_number not in (None, args.split_number):
        say(
            f"warning: {args.checkpoint_model} was trained on split {start.split_number}, and has seen most "
            f"of the test clips of split {args.split_number}"
        )
    if start and sorted(start.classes) == sorted(split.classes):
        split = split.relabeled(start.classes)
    if args.val_fraction:
        kept, held_out = hold_out(split.train, args.val_fraction, args.seed)
        split = replace(split, train=kept, val=split.val + held_out)

    # Encoder and head.
    if start:
        encoder, head, model, sizes = start.encoder, start.head, start.model, start.sizes
        if args.img_dim not in (None, encoder.img_dim):
            encoder = encoder.resized(args.img_dim)
        length = args.sequence_length
    else:
        state = read_state(args.encoder, args.encoder_weights)
        encoder, model = Encoder(args.encoder, state=state, img_dim=args.img_dim), args.model
        spec = encoder.spec
        length = args.sequence_length or (spec.segment_length if args.segments else spec.sequence_length)
        head, sizes = build_head(
            model, encoder.width, len(split.classes), latent_dim=args.latent_dim, sequence_length=length
        )
    # What an earlier training ended with is no part of this one.
    head.to(device).temperature = 1.0

    # Epochs over embeddings, and behind them those over frames.
    finetune = args.finetune is not None
    standing = Standing.of(start.training, args.output_path / LAST) if args.resume and start else None
    history = standing.history if standing else []
    knows = start and "pretrained_on" not in start.settings and sorted(start.classes) == sorted(split.classes)
    frozen_epochs = 0 if finetune and knows else args.num_epochs
    if standing and start:
        frozen_epochs = start.settings.get("frozen_epochs", args.num_epochs)
    epochs = frozen_epochs + args.num_epochs * finetune

    # Embeddings, computed once and kept.
    if finetune and args.precision == "auto":
        args.precision = "bf16" if choose_dtype("auto", device) == torch.bfloat16 else "fp32"
    if finetune:
        # So that frames are encoded as they are trained on.
        encoder.shorten(length * encoder.windows.hop)
    encoder.to(device).prepare(args.precision)
    if args.finetune:
        encoder.check_blocks(args.finetune)
    spec, stride = encoder.spec, args.frame_stride or encoder.spec.frame_stride
    flip = read(EncoderSettings, args).mirrors(spec)

    def stored(
        encoder: Encoder, clips: Sequence[Clip], folder: Path | None = None, *, flip: bool = False
    ) -> Store:
        """A store with the embeddings of some clips; by default it is kept for other commands."""
        kept = default_folder(args.cache_path, listed.data.dataset_path, encoder, stride)
        store = Store(folder or kept, encoder, stride=stride, flip=flip, cuts=bool(args.segments))
        fill_store(store, clips, args.num_workers, ranks)
        return store

    # Once the encoder is trained, its first embeddings still tell which frames there are.
    first, has_tuned = encoder, len(history) > frozen_epochs
    if has_tuned:
        first = load_checkpoint(args.output_path / FIRST).encoder.to(device).prepare(args.precision)
    store = stored(first, split.clips, flip=flip)
    background = None
    if isinstance(listed, SegmentedVideos):
        background = split.classes.index(NO_ACTION)
        split = with_background(split, store, listed)
    clips, held_out, testing = split.train, split.val, Sampling(length)
    if args.patience and not held_out:
        raise UserError("--patience looks at validation clips; hold some out with --val_fraction 0.1")
    # A segment is long beside the clips that are drawn from it.
    drawn = clips * DRAWS if args.segments else clips
    training = EmbeddingClips(store, drawn, Sampling(length, training=True, flip=flip, seed=args.seed))
    frames = FrameClips(training, flip=not args.no_flip) if finetune else None
    sides = {"val": held_out, "test": split.test}
    tests = {name: EmbeddingClips(store, side, testing) for name, side in sides.items()}

    # Optimizer, and what was before.
    taken = sampled(training.labels, background, 1, args.seed)
    steps = len(batch_items(taken, args.batch_size, seed=args.seed, ranks=ranks))
    if not steps:
        raise UserError(f"{len(clips)} training clips are too few for {ranks.size} processes; add some")
    weights = None
    if args.class_weights == "balanced":
        weights = balanced_weights(training.labels[taken], len(split.classes)).to(device)
    recipe = read_recipe(args.recipe, args.learning_rate)

    def begin(finetuned: bool) -> Part:
        """The part of the training over embeddings, or the one over frames."""
        if not finetuned or frames is None:
            optimization = Optimization(head, recipe, args.num_epochs * steps, weights)
            return Part(optimization, ranks.parallel(head, device), partial(map, training.batch), False)
        trained = encoder.unfreeze(args.finetune or None)
        optimization = Optimization(head, recipe, args.num_epochs * steps, weights, trained)
        size, whole = sum(each.numel() for each, _ in trained), number_of_parameters(encoder)
        say(f"finetuning {size:,} of the {whole:,} parameters of {encoder.name}, and the head")
        return Part(
            optimization,
            ranks.parallel(FrameModel(encoder, head), device),
            frame_reader(frames, args.num_workers, pin=device.type == "cuda"),
            True,
        )

    short = encoder.name.replace("/", "-")[-80:]
    title = f"{model}-{short}-{encoder.img_dim}px-split{args.split_number}"
    if not args.resume:
        kind = args.recipe + "-finetuned" * finetune
        run_path = args.run_path or Path("runs") / f"{title}-{kind}-seed{args.seed}"
        args.run_path = ranks.gather(unused(run_path))[0]
        if ranks.rank == 0:
            # Lists that were drawn are kept: drawn anew they might be others.
            listed.keep(args.run_path / "lists")
            move_earlier_files(args.output_path)
        if args.segments:
            args.segments = args.run_path / "lists" / KEPT
        else:
            args.split_path, args.dataset = listed.path or args.run_path / "lists", listed.name
    args.img_dim, args.frame_stride, args.sequence_length = encoder.img_dim, stride, length
    # What auto has become here, so that a run that goes on does not take another one.
    args.precision = encoder.kind
    settings = {name: _plain(value) for name, value in vars(args).items()}
    settings |= {"clips": names_sha256(clips), "frozen_epochs": frozen_epochs}
    if args.segments and ranks.rank == 0:
        settings["table"] = sha256(args.segments.read_bytes()).hexdigest()
    best = standing.best if standing else None
    if standing:
        assert start
        if start.settings.get("clips") != settings["clips"]:
            raise UserError(
                f"{listed.data.dataset_path}: not the clips that {args.output_path / LAST} was trained on; "
                "put them back, or begin again without --resume"
            )
        say(f"going on after epoch {len(history)} of {epochs}")

    def checkpoint(epoch: int, training: dict[str, Any] | None = None) -> Checkpoint:
        return Checkpoint(
            encoder, head, model, sizes, split.classes, length, stride, args.split_number, epoch, settings,
            training, change_cost=USUAL_COST if args.segments else None,
        )  # fmt: skip

    @contextlib.contextmanager
    def encoded(names: list[str]) -> Iterator[dict[str, EmbeddingClips]]:
        """Clips to test on, as the encoder encodes them after this epoch."""
        if not part.finetuned or not names:
            yield tests
            return
        encoder.eval().prepare(args.precision)
        # Embeddings of an epoch are kept for its tests alone.
        with ranks.common_folder(args.run_path / "embeddings") as folder:
            now = stored(encoder, [clip for name in names for clip in sides[name]], folder)
            yield {name: EmbeddingClips(now, sides[name], testing) for name in names}

    if finetune and not standing and ranks.rank == 0:
        save_checkpoint(args.output_path / FIRST, checkpoint(0))

    part = begin(finetune and len(history) >= frozen_epochs)
    # A part that is to begin has no state yet.
    if standing and part.finetuned == has_tuned:
        with damage(args.output_path / LAST):
            part.optimization.load_state_dict(standing.optimization)

    # The loop.
    on = f"{len(clips):,} clips"
    if background is not None:
        pieces = sum(clip.label == background for clip in clips)
        on = f"{len(clips) - pieces:,} segments and {pieces:,} pieces of no action ({len(taken):,} draws)"
    say(
        f"training {model} ({number_of_parameters(head):,} parameters) on {on}, "
        + (f"validating on {len(held_out):,}, " if held_out else "")
        + f"testing on {len(split.test):,}; {encoder.name} in {encoder.precision} on {device}"
        + (f", {ranks.size} processes" if ranks.size > 1 else "")
        + f"; figures and curves in {args.run_path}"
    )
    board = SummaryWriter(str(args.run_path), purge_step=len(history) + 1) if ranks.rank == 0 else None
    path = args.output_path / f"{model}_{epochs}.pth"
    for epoch in range(len(history) + 1, epochs + 1):
        if finetune and epoch == frozen_epochs + 1 and not part.finetuned:
            part = begin(True)
        # The encoder has its turn all the same.
        since = max(best[2], frozen_epochs * finetune) if best else epoch
        if args.patience and epoch - 1 - since >= args.patience:
            say(f"ended after epoch {epoch - 1}: no better one in {args.patience} epochs")
            break
        started, named = time.perf_counter(), f"epoch {epoch} of {epochs}"
        part.module.train()
        totals = np.zeros(3)  # sum of losses, right, clips
        taken = sampled(training.labels, background, epoch, args.seed)
        batches = batch_items(taken, args.batch_size, epoch=epoch, seed=args.seed, ranks=ranks)
        with tqdm(
            part.read(batches), named, len(batches), unit="batch", dynamic_ncols=True, disable=ranks.rank > 0
        ) as bar:
            for number, (*inputs, labels) in enumerate(bar):
                # Random numbers depend on the place of a batch alone, so that a resumed run draws the same.
                entropy = np.random.SeedSequence([args.seed, epoch, number, ranks.rank])
                torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
                labels = labels.to(device, non_blocking=True)
                # An encoder takes its windows, which are a list, to its device itself.
                logits = part.module(
                    *(
                        each if isinstance(each, list) else each.to(device, non_blocking=True)
                        for each in inputs
                    )
                )
                loss = part.optimization.loss(logits, labels)
                right = (logits.argmax(1) == labels).sum()
                figures = ranks.sum(
                    torch.stack([loss.detach(), right, loss.new_tensor(len(labels))])
                ).tolist()
                if not math.isfinite(figures[0]):
                    names = ", ".join(drawn[index].name for _, index in batches[number])
                    raise UserError(
                        f"{named}, batch {number + 1}: the loss became {figures[0]}; train with a smaller "
                        f"--learning_rate; the checkpoints in {args.output_path} are from before; the clips "
                        f"were {names}"
                    )
                # The mean over the clips of all processes, whose gradients are averaged.
                part.optimization.step(loss * (ranks.size / figures[2]))
                totals += figures
                bar.set_postfix_str(
                    f"loss {totals[0] / totals[2]:.3f}, accuracy {100 * totals[1] / totals[2]:.1f} %"
                )
        seconds = time.perf_counter() - started
        row = {
            "epoch": epoch, "train_loss": totals[0] / totals[2],
            "train_accuracy": 100 * totals[1] / totals[2],
            "learning_rate": part.optimization.learning_rate, "seconds": seconds,
            "clips_per_second": totals[2] / seconds,
        }  # fmt: skip
        say(f"{named}: train loss {row['train_loss']:.3f} nats, accuracy {row['train_accuracy']:.2f} %")

        # Tests, best and last checkpoint.
        head.temperature = 1.0
        due = epoch % args.checkpoint_interval == 0 or epoch in (frozen_epochs, epochs)
        parts = [name for name, side in sides.items() if side and (due or name == "val")]
        with encoded(parts) as now:
            for name in parts:
                logits, labels = predict_logits(head, now[name], device, ranks=ranks)
                test_loss = float(nn.functional.cross_entropy(logits, labels))
                accuracy = 100 * float((logits.argmax(1) == labels).float().mean())
                row |= {f"{name}_loss": test_loss, f"{name}_accuracy": accuracy}
                say(f"{named}: {name} loss {test_loss:.3f} nats, accuracy {accuracy:.2f} %")
                if name == "val":
                    head.temperature = fit_temperature(logits, labels)
                    score = row["val_accuracy"], -row["val_loss"]
                    # Of equally accurate epochs the one with the least loss.
                    if best is None or score > best[:2]:
                        best = (*score, epoch)
                        if ranks.rank == 0:
                            save_checkpoint(args.output_path / BEST, checkpoint(epoch))
                    temperature, head.temperature = head.temperature, 1.0
        if held_out:
            head.temperature = temperature
        history.append({name: float(value) for name, value in row.items()})
        if ranks.rank == 0:
            now_standing = Standing(part.optimization.state_dict(), history, best)
            if due:
                path = args.output_path / f"{model}_{epoch}.pth"
                save_checkpoint(path, checkpoint(epoch))
                say(f"saved {path}")
            save_checkpoint(args.output_path / LAST, checkpoint(epoch, now_standing._asdict()))
            assert board
            write_history(args.run_path, history, board)
    if board:
        board.close()
        # Once: drawing takes as long as an epoch of a small head.
        write_whole(args.run_path / "curves.png", curves(history, title))

    # The test of the best epoch, or of the last one.
    path = args.output_path / BEST if best else path
    if not path.is_file() and ranks.rank == 0:
        save_checkpoint(path, checkpoint(len(history)))
    ranks.wait()
    chosen = load_checkpoint(path) if ranks.rank == 0 else None
    whole = chosen.encoder.state_dict() if chosen and finetune else None
    trained = ranks.gather((chosen.head.state_dict(), chosen.head.temperature, whole) if chosen else None)[0]
    assert trained is not None
    head.load_state_dict(trained[0])
    head.temperature = trained[1]
    if trained[2]:
        encoder.load_state_dict(trained[2])
        encoder.eval().prepare(args.precision)
        store = stored(encoder, split.test + (held_out if background is not None else []))
        tests["test"] = EmbeddingClips(store, split.test, testing)
    predictions = predict(head, tests["test"], split.classes, device, ranks=ranks)
    if chosen is None:
        return None
    recognizer = None
    if background is not None:
        recognizer = Recognizer(replace(chosen, encoder=encoder, head=head))
        chosen.change_cost = best_cost(recognizer, store, held_out) if held_out else USUAL_COST
        recognizer.change_cost = chosen.change_cost
        numbered = args.output_path / f"{model}_{chosen.epoch}.pth"
        for file in {path, numbered} if numbered.is_file() else {path}:
            save_checkpoint(file, chosen)
    described = about(chosen, path, encoder, args.split_number)
    if recognizer:
        described["timelines"] = report_timelines(args.run_path / "test", recognizer, store, split.test)
    report = write_report(args.run_path / "test", predictions, described)
    how = f"best validation accuracy {best[0]:.2f} %, " if best else ""
    say(f"{how}epoch {chosen.epoch}, {path}: test {summary(report['figures'])}")
    say(f"report in {args.run_path / 'test'}")
    say(f"next: python3 test_on_video.py --video_path x.avi --checkpoint_model {path}")
    return report, predictions


def check_flags(args: argparse.Namespace) -> str | None:
    """Why the flags do not go together, in a line; None if they do."""
    least = 2 * int(os.environ.get("WORLD_SIZE", "1"))
    if args.batch_size < least:
        return (
            f"--batch_size {args.batch_size} is too small: BatchNorm cannot train on a single clip in a "
            f"process; take {least} or more"
        )
    if (args.dataset_path / "encoder.json").is_file():
        return (
            f"{args.dataset_path} has embeddings; name the folder of their videos, which training needs too"
        )
    if args.finetune is None and len(args.learning_rate or ()) > 1 and not args.resume:
        return "--learning_rate has a rate for the encoder, which stays frozen; add --finetune"
    if args.finetune is not None and args.precision == "int8":
        return "--finetune trains the encoder, which 8-bit integers cannot; take --precision auto"
    if args.patience and not args.val_fraction and not args.segments:
        return "--patience looks at validation clips; hold some out with --val_fraction 0.1"
    return None


def choose_split(listed: AnyListed, number: int) -> Split:
    """The split to train on; says what is missing. Raises: UserError if there are too few clips."""
    split = listed.split(number)
    if missing := split.missing():
        say(f"warning: {missing}")
    # Beside the segments there is what none of them covers.
    least = 1 if listed.data.segments else 2
    if len(split.train) < least or not split.test:
        raise UserError(
            f"{listed.data.dataset_path}: {len(split.train)} training and {len(split.test)} test clips of "
            f"split {number} found; at least {least} and 1 are needed"
        )
    return split


def move_earlier_files(folder: Path) -> None:
    """Move the checkpoints of an earlier run into <folder>/earlier-<n>, so that none is overwritten."""
    ours = re.compile(r"(\w+_\d+|last|best|first)\.pth")
    earlier = [path for path in folder.glob("*.pth") if ours.fullmatch(path.name)]
    if earlier:
        aside = unused(folder / "earlier", first="-1")
        aside.mkdir()
        for path in earlier:
            path.rename(aside / path.name)
        say(f"{len(earlier)} checkpoint{'s' * (len(earlier) != 1)} of an earlier run moved to {aside}")


def write_history(folder: Path, history: Sequence[dict[str, float]], board: SummaryWriter) -> None:
    """Write history.csv anew, and the last epoch for TensorBoard."""
    names = list(dict.fromkeys(name for epoch in history for name in epoch))
    for name in names[1:]:
        if name in history[-1]:
            part, _, quantity = name.partition("_")
            tag = f"{quantity}/{part}" if part in ("train", "val", "test") else name
            board.add_scalar(tag, history[-1][name], int(history[-1]["epoch"]))
    board.flush()
    text = io.StringIO()
    rows = csv.DictWriter(text, names, lineterminator="\n")
    rows.writeheader()
    rows.writerows({**epoch, "epoch": int(epoch["epoch"])} for epoch in history)
    write_whole(folder / "history.csv", text.getvalue().encode())


def table_of_splits(tested: Sequence[Tested]) -> str:
    """A Markdown row: the accuracy on each split, their mean, and the interval over all clips."""
    reports = [report for report, _ in tested]
    right = np.concatenate([predictions.correct for _, predictions in tested])
    groups = [clip.group_or_name for _, predictions in tested for clip in predictions.clips]
    ends = interval(right, groups)
    top1 = [report["figures"]["top1_percent"] for report in reports]
    first, splits = reports[0], [f"split {report['split_number']}" for report in reports]
    cells = [
        f"{first['model']}, {first['encoder']}",
        f"{first['sequence_length']} at {first['img_dim']} px",
        *(f"{accuracy:.2f} %" for accuracy in top1),
        f"**{statistics.mean(top1):.2f} %**",
        f"{ends[0]:.1f} to {ends[1]:.1f} %" if ends else "",
    ]
    return markdown([["model", "embeddings", *splits, "mean", "95 % interval"], cells])


if __name__ == "__main__":
    run(main)
