"""A training as the flags of train.py say: its clips, its model, its run and its report."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import cli
from checkpoint import Checkpoint, load_checkpoint
from dataset import ClipBatches, Sampling, parse_streams
from features import ClipSource, encoder_state
from history import History, unused_folder
from models import Classifier
from pretrain import MaskedFrames, Pretrainer
from ranks import Ranks
from recipe import Learner, recipe_of
from report import about, predict_clips, summary, write_report
from run import BEST, LAST, Run, settings_of
from splits import RANDOM, Clip, Split, hold_out, load_split, names_sha256, siblings, some_labels
from trainer import Part, Trainer


def choose_split(args: argparse.Namespace) -> Split:
    """The split that the flags name; warns of what is missing, and of a split that leaks.

    Raises: as `load_split`; ValueError if there are too few clips.
    """
    split = load_split(args.dataset_path, args.split_path, args.split_number, seed=args.seed)
    if missing := split.missing():
        cli.say(f"warning: {missing}")
    if args.split_number == RANDOM:
        cli.say(
            f"warning: this random split leaks: {siblings(split):,} of {len(split.test):,} test clips are "
            "cut out of a video that training has seen; do not compare its accuracy with another split's"
        )
    if len(split.train) < 2 or not split.test:
        raise ValueError(
            f"{args.dataset_path}: {len(split.train)} training and {len(split.test)} test clips of split "
            f"{args.split_number} are there; it takes 2 and 1 at least"
        )
    return split


def build_model(args: argparse.Namespace, num_classes: int) -> Classifier:
    """A new model, or that of --checkpoint_model; --img_dim becomes what it was trained at, if not given.

    Raises: as `Classifier` and `load_checkpoint`; ValueError if the checkpoint knows other classes.
    """
    if not args.checkpoint_model:
        model = Classifier(
            args.model,
            num_classes,
            encoder=args.encoder,
            streams=parse_streams(args.streams),
            state=encoder_state(args),
            latent_dim=args.latent_dim,
            sequence_length=args.sequence_length,
        )
        args.img_dim = args.img_dim or model.encoder.spec.input_size
        return model
    checkpoint = load_checkpoint(Path(args.checkpoint_model))
    if checkpoint.model.num_classes != num_classes:
        raise ValueError(
            f"{args.checkpoint_model}: {checkpoint.model.num_classes} classes, and the lists name "
            f"{num_classes}; name the lists that it was trained with"
        )
    args.img_dim = args.img_dim or checkpoint.img_dim
    return checkpoint.model


def train(
    args: argparse.Namespace, device: torch.device, ranks: Ranks, loaded: Checkpoint | None
) -> dict[str, Any]:
    """Train as the flags say, from the beginning or on from `loaded`, and test what is best.

    Returns: the report, in the first process; nothing in the others.
    Raises: ValueError or OSError for wrong data or files; cli.Interrupted after a signal.
    """
    split = choose_split(args)
    unlabelled: list[Clip] = split.train
    held_out: list[Clip] = []
    if args.val_fraction:
        unlabelled, held_out = hold_out(split.train, args.val_fraction, args.seed)
    clips = some_labels(unlabelled, args.label_fraction, args.seed)
    model = (loaded.model if loaded else build_model(args, len(split.classes))).to(device)
    model.encoder.prepare(cli.choose_dtype(args.precision, device), compile=args.compile)
    testing = Sampling(args.sequence_length, frame_stride=args.frame_stride)
    training = replace(testing, training=True, flip=not args.no_flip, seed=args.seed)
    source = ClipSource.from_flags(
        args, model, split.train + split.test, args.img_dim, flip=training.flip, ranks=ranks
    )
    share = {"rank": ranks.rank, "ranks": ranks.size}
    order = ClipBatches(len(clips), args.batch_size, shuffle=True, seed=args.seed, **share)
    if not len(order):
        raise ValueError(f"{len(clips)} training clips are too few for {ranks.size} processes; add some")
    parts: dict[str, Part] = {"train": (order, clips)}
    loaders = {"train": source.loader(clips, training, order)}
    pretrainer, recipe = None, recipe_of(args)
    if args.pretrain:
        several = ClipBatches(len(unlabelled), args.batch_size, shuffle=True, seed=args.seed, **share)
        parts["pretraining"] = several, unlabelled
        loaders["pretraining"] = source.loader(unlabelled, training, several)
        masked = MaskedFrames(model)
        pretrainer = Pretrainer(model, masked, recipe, args.pretrain * len(several), args.seed)
    for name, some in (("val", held_out), ("test", split.test)):
        if some:
            batches = ClipBatches(len(some), args.batch_size, shuffle=False, **share)
            loaders[name] = source.loader(some, testing, batches)

    learner = Learner(model, recipe, args.num_epochs * len(order), args.seed)
    name = f"{model.name}-{model.encoder.name.replace('/', '-')}-{args.img_dim}px-split{args.split_number}"
    if not loaded:
        args.run_path = unused_folder(args.run_path or Path("runs") / f"{name}-{args.recipe}-seed{args.seed}")
    settings = settings_of(args)
    settings["clips"] = names_sha256(clips)
    checkpoint = Checkpoint(
        model, split.classes, args.img_dim, args.sequence_length, args.split_number, 0, settings
    )
    run = Run(args.output_path, checkpoint, learner, args.save_seconds, pretrainer, args.pretrain)
    cli.say(
        f"training {run.name} ({sum(map(torch.Tensor.numel, learner.parameters)):,} parameters) "
        + f"on {len(clips):,} clips, "
        + (f"after {args.pretrain} epochs on {len(unlabelled):,} without labels, " if args.pretrain else "")
        + (f"validating on {len(held_out):,}, " if held_out else "")
        + f"testing on {len(split.test):,}; {model.encoder.name} in {model.encoder.dtype} on {device}"
        + (f", {ranks.size} processes" if ranks.size > 1 else "")
    )
    if loaded:
        if loaded.settings.get("clips") != settings["clips"]:
            raise ValueError(
                f"{args.dataset_path}: not the clips that {args.output_path / LAST} was trained on; "
                "put them back, or begin again without --resume"
            )
        run.go_on(loaded)
        if run.epoch > args.num_epochs and not run.pretraining:
            cli.say(f"{args.output_path / LAST}: all {args.num_epochs} epochs are trained already")
        else:
            phase = "the pretraining's " if run.pretraining else ""
            cli.say(f"going on in {phase}epoch {run.epoch} after {run.tally.batches} batches")
    elif ranks.rank == 0:
        run.make_room()
        run.save_last()

    def history(pretraining: bool) -> History:
        folder, title = args.run_path, name
        if pretraining:
            folder, title = folder / "pretraining", f"{name}, pretraining"
        cli.say(f"figures and curves in {folder}")
        return History(folder, run.history, title)

    shown = history if ranks.rank == 0 else None
    Trainer(run, args, ranks, parts["train"], loaders, parts.get("pretraining"), shown).fit()
    if run.epoch <= args.num_epochs:
        cli.say(f"ended after epoch {run.epoch - 1}: no better one in {args.patience} epochs")
    report = {}
    if ranks.rank == 0:
        report = test_best(run, source, split, testing, args)
    ranks.wait()
    return report


def test_best(
    run: Run, source: ClipSource, split: Split, sampling: Sampling, args: argparse.Namespace
) -> dict[str, Any]:
    """Test the file that the run recommends, and write the report; returns it."""
    path = run.folder / BEST
    how = f"best validation accuracy {run.best[0]:.2f} %, " if run.best else ""
    if not run.best:
        path = run.path_of(run.epoch - 1)
    checkpoint = load_checkpoint(path)
    model = checkpoint.model.to(source.model.encoder.device)
    batches = ClipBatches(len(split.test), args.batch_size, shuffle=False)
    loader = source.loader(split.test, sampling, batches)
    predictions = predict_clips(model, loader, batches, split.test, split.classes)
    report = write_report(
        args.run_path / "test", predictions, about(checkpoint, path, source, sampling, args.split_number)
    )
    leak = ", on a split that leaks" if args.split_number == RANDOM else ""
    cli.say(f"{how}epoch {checkpoint.epoch}, {path}: test {summary(report['figures'])}{leak}")
    cli.say(f"report in {args.run_path / 'test'}")
    return report
