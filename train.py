"""Train an action classifier on UCF-101: a frozen ImageNet encoder, and an LSTM over its embeddings.

    python3 train.py --dataset_path data/UCF-101 --split_path data/ucfTrainTestlist
    python3 train.py --encoder efficientnet_lite0 --num_epochs 10       # needs no download, and fits a laptop
    python3 train.py --split_number all                                 # all three splits, and their mean
    python3 train.py --resume                                           # goes on where the last run stopped
    torchrun --nproc_per_node=4 train.py ...                            # the same training, on four devices

The data set may be the videos, or the frames that extract_frames.py made of them.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import cli
from checkpoint import Checkpoint, load_checkpoint
from dataset import ClipBatches, Sampling
from features import ClipSource
from history import History, unused_folder
from models import ENCODERS, ConvLSTM
from ranks import Ranks
from recipe import Learner, add_recipe_flags, fill_from_recipe, recipe_of
from report import about, predict_clips, summary, write_report
from run import BEST, LAST, Run, only_one, settings_of, with_earlier_settings
from splits import ALL, RANDOM, SPLIT_NUMBERS, Clip, Split, hold_out, load_split, names_sha256, siblings
from trainer import Trainer


def get_args_parser() -> argparse.ArgumentParser:
    """The flags of train.py."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    cli.add_data_flags(parser)
    cli.add_encoder_flags(parser, ENCODERS)

    model = parser.add_argument_group("model")
    model.add_argument(
        "--latent_dim",
        type=cli.positive_int,
        default=512,
        help="width that embeddings are projected to; 512 as the original",
    )
    model.add_argument(
        "--checkpoint_model",
        type=Path,
        help="start from this checkpoint's weights; its encoder and sizes then hold, not the flags",
    )

    clips = parser.add_argument_group("clips")
    cli.add_split_flag(
        clips,
        default=1,
        choices=(*SPLIT_NUMBERS, ALL, RANDOM),
        help="official split; papers quote 1 (default), or the mean of all three, which all gives",
    )
    clips.add_argument(
        "--val_fraction",
        type=cli.fraction,
        default=0.0,
        help="share of each class's groups to hold out of the training list for best.pth and --patience; 0 "
        "(default) trains on all, as papers do; 0.1 where settings are chosen, since the test list must not",
    )
    clips.add_argument(
        "--sequence_length",
        type=cli.positive_int,
        default=40,
        help="frames of a clip; 40 (the original's) covers the 7 s of most UCF-101 clips at every 4th frame",
    )
    clips.add_argument("--channels", type=int, choices=(3,), default=3, help="3: the encoders take RGB only")

    training = parser.add_argument_group("training")
    training.add_argument(
        "--num_epochs",
        type=cli.positive_int,
        default=20,
        help="passes over the training clips; 20 is enough with the default recipe",
    )
    training.add_argument(
        "--batch_size",
        type=cli.positive_int,
        default=16,
        help="clips of a step, of all devices together; 16 as the original, 2 at least (BatchNorm)",
    )
    add_recipe_flags(training)
    training.add_argument(
        "--patience",
        type=cli.positive_int,
        help="end when the validation accuracy has not risen for so many epochs; 5 is safe; default: never",
    )
    training.add_argument(
        "--seed",
        type=cli.non_negative_int,
        default=0,
        help="the same seed gives the same numbers on the same machine",
    )

    output = parser.add_argument_group("output")
    output.add_argument(
        "--output_path",
        type=Path,
        default=Path("model_checkpoints"),
        help="folder for ConvLSTM_<epoch>.pth, best.pth and last.pth",
    )
    output.add_argument(
        "--run_path",
        type=Path,
        help="folder for what shows the course of the training: history.csv, curves.png, TensorBoard's "
        "events, and the report of the test; default: runs/<model>-<encoder>-..., numbered if it is there",
    )
    output.add_argument(
        "--checkpoint_interval",
        type=cli.positive_int,
        default=5,
        help="epochs between checkpoints, each with a test; the last epoch is always saved and tested",
    )
    output.add_argument(
        "--keep",
        type=cli.positive_int,
        help="keep the newest so many ConvLSTM_<epoch>.pth only; default: all, about 65 MB each",
    )
    output.add_argument(
        "--save_seconds",
        type=cli.non_negative_float,
        default=60,
        help="how much work a power cut may cost: last.pth (200 MB) is written when it is so old; 60 "
        "(default) costs 1 %% of the time; SIGINT and SIGTERM save whatever its age",
    )
    output.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run whose last.pth is in --output_path; its settings hold, so no other flag is "
        "needed",
    )
    cli.add_device_flags(parser)
    return parser


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


def build_model(args: argparse.Namespace, num_classes: int) -> ConvLSTM:
    """A new model, or that of --checkpoint_model.

    Raises: as `ConvLSTM` and `load_checkpoint`; ValueError if the checkpoint knows other classes.
    """
    if not args.checkpoint_model:
        return ConvLSTM(num_classes, encoder=args.encoder, latent_dim=args.latent_dim)
    model = load_checkpoint(Path(args.checkpoint_model)).model
    if model.config["num_classes"] != num_classes:
        raise ValueError(
            f"{args.checkpoint_model}: {model.config['num_classes']} classes, and the lists name "
            f"{num_classes}; name the lists that it was trained with"
        )
    return model


def main(argv: list[str] | None = None) -> int:
    """Train, test and save; returns the exit status."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    device = cli.choose_device(args.device)
    ranks = Ranks.from_environment(device)
    with contextlib.closing(ranks):
        runs = [args]
        if args.split_number == ALL:
            runs = [of_split(args, number) for number in SPLIT_NUMBERS]
        if args.resume and not (runs[0].output_path / LAST).is_file():
            raise FileNotFoundError(
                f"{runs[0].output_path / LAST}: there is no run to go on with; begin one without --resume"
            )
        found = []
        for one in runs:
            loaded = None
            if args.resume:
                # A split whose turn had not come is trained as the first one was.
                last = one.output_path / LAST
                loaded = load_checkpoint(last if last.is_file() else runs[0].output_path / LAST)
                earlier = with_earlier_settings(parser, argv, one, loaded)
                if last.is_file():
                    one = earlier
                else:
                    loaded = None
                    one = argparse.Namespace(
                        **{**vars(earlier), "split_number": one.split_number, "run_path": one.run_path}
                    )
            fill_from_recipe(one)
            if one.batch_size < max(2, ranks.size):
                parser.error(
                    f"--batch_size {one.batch_size} is too small: BatchNorm cannot train on a single clip, "
                    f"and each process needs one; take {max(2, ranks.size)} or more"
                )
            if one.patience and not one.val_fraction:
                parser.error("--patience looks at validation clips; hold some out with --val_fraction 0.1")
            with contextlib.ExitStack() as held:
                if ranks.rank == 0:
                    cli.make_writable_folder(one.output_path)
                    held.enter_context(only_one(one.output_path))
                cli.seed_everything(one.seed)
                found.append(train(one, device, ranks, loaded))
        if len(runs) > 1 and ranks.rank == 0:
            print(table_of_splits(found))
    return 0


def of_split(args: argparse.Namespace, number: int) -> argparse.Namespace:
    """The flags of one of several splits, with folders of its own."""
    one = argparse.Namespace(**vars(args))
    one.split_number, one.output_path = number, args.output_path / f"split{number}"
    one.run_path = args.run_path and args.run_path / f"split{number}"
    return one


def table_of_splits(reports: Sequence[dict[str, Any]]) -> str:
    """A Markdown table with a row: the accuracy on each split, and their mean."""
    top1 = [report["figures"]["top1_percent"] for report in reports]
    first = reports[0]
    numbers = [report["split_number"] for report in reports]
    cells = [
        f"{first['model']}, {first['encoder']}",
        f"{first['sequence_length']} of {first['img_dim']} px",
        *(f"{accuracy:.2f} %" for accuracy in top1),
        f"**{statistics.mean(top1):.2f} %**",
    ]
    head = ["model", "frames", *(f"split {number}" for number in numbers), "mean"]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), cells))


def train(
    args: argparse.Namespace, device: torch.device, ranks: Ranks, loaded: Checkpoint | None
) -> dict[str, Any]:
    """Train as the flags say, from the beginning or on from `loaded`, and test what is best.

    Returns: the report, in the first process; nothing in the others.
    Raises: ValueError or OSError for wrong data or files; cli.Interrupted after a signal.
    """
    split = choose_split(args)
    clips: list[Clip] = split.train
    held_out: list[Clip] = []
    if args.val_fraction:
        clips, held_out = hold_out(split.train, args.val_fraction, args.seed)
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
    loaders = {"train": source.loader(clips, training, order)}
    for name, some in (("val", held_out), ("test", split.test)):
        if some:
            batches = ClipBatches(len(some), args.batch_size, shuffle=False, **share)
            loaders[name] = source.loader(some, testing, batches)

    learner = Learner(model, recipe_of(args), args.num_epochs * len(order), args.seed)
    name = f"{type(model).__name__}-{model.encoder.name}-{args.img_dim}px-split{args.split_number}"
    if not loaded:
        args.run_path = unused_folder(args.run_path or Path("runs") / f"{name}-{args.recipe}-seed{args.seed}")
    settings = settings_of(args)
    settings["clips"] = names_sha256(clips)
    checkpoint = Checkpoint(
        model, split.classes, args.img_dim, args.sequence_length, args.split_number, 0, settings
    )
    run = Run(args.output_path, checkpoint, learner, args.save_seconds)
    cli.say(
        f"training {run.name} ({sum(map(torch.Tensor.numel, learner.parameters)):,} parameters) "
        + f"on {len(clips):,} clips, "
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
        if run.epoch > args.num_epochs:
            cli.say(f"{args.output_path / LAST}: all {args.num_epochs} epochs are trained already")
        else:
            cli.say(f"going on in epoch {run.epoch} after {run.tally.batches} of {len(order)} batches")
    elif ranks.rank == 0:
        run.make_room()
        run.save_last()
    with contextlib.ExitStack() as held:
        history = None
        if ranks.rank == 0:
            history = held.enter_context(contextlib.closing(History(args.run_path, run.history, name)))
            cli.say(f"figures and curves in {args.run_path}")
        Trainer(run, args, ranks, order, clips, loaders, history).fit()
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


if __name__ == "__main__":
    cli.run(main)
