"""Train an action classifier on UCF-101: a frozen ImageNet encoder, and an LSTM over its embeddings.

    python3 train.py --dataset_path data/UCF-101 --split_path data/ucfTrainTestlist
    python3 train.py --encoder efficientnet_lite0 --num_epochs 10       # needs no download, and fits a laptop
    python3 train.py --resume                                           # goes on where the last run stopped
    torchrun --nproc_per_node=4 train.py ...                            # the same training, on four devices

The data set may be the videos, or the frames that extract_frames.py made of them.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import cli
from checkpoint import Checkpoint, load_checkpoint
from dataset import ClipBatches, Sampling
from engine import LossError, evaluate, train_one_epoch
from features import ClipSource
from models import ENCODERS, ConvLSTM
from ranks import Ranks
from run import BEST, LAST, Run, only_one
from splits import RANDOM, Clip, Split, hold_out, load_split, siblings

# The flags that decide the numbers of a training.
SETTINGS = (
    *("encoder", "img_dim", "no_flip", "frame_stride", "cache", "precision", "compile"),
    *("latent_dim", "checkpoint_model", "split_number", "val_fraction", "sequence_length"),
    *("num_epochs", "batch_size", "learning_rate", "patience", "seed"),
)


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
    cli.add_split_flag(clips, default=1, help="official split; papers quote 1, or the mean of 1, 2 and 3")
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
        help="passes over the training clips; 20 is enough with the default learning rate",
    )
    training.add_argument(
        "--batch_size",
        type=cli.positive_int,
        default=16,
        help="clips of a step, of all devices together; 16 as the original, 2 at least (BatchNorm)",
    )
    training.add_argument(
        "--learning_rate",
        type=cli.positive_float,
        default=5e-4,
        help="of AdamW at the start, falling to 0 as a cosine; the original's 1e-5 was meant for 200 epochs",
    )
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


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def with_earlier_settings(
    parser: argparse.ArgumentParser, argv: list[str] | None, args: argparse.Namespace, loaded: Checkpoint
) -> argparse.Namespace:
    """The flags of the run that wrote `loaded`, but for those given now that change no number.

    Raises: ValueError that lists the flags given now that disagree.
    """
    untyped = object()
    typed = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), untyped))))
    given = {name: value for name, value in typed.items() if value is not untyped}
    before, last = loaded.settings, args.output_path / LAST
    if missing := [name for name in SETTINGS if name not in before]:
        raise ValueError(f"{last}: it does not say --{missing[0]}; begin again without --resume")
    differ = [
        f"--{name} {given[name]} (there {before[name]})"
        for name in SETTINGS
        if name in given and _plain(given[name]) != before[name]
    ]
    if differ:
        raise ValueError(
            f"{last} was trained with other flags: {', '.join(differ)}; leave them out, or begin again "
            "without --resume"
        )
    paths = {name: Path(before[name]) for name in ("dataset_path", "split_path") if name not in given}
    return argparse.Namespace(**{**vars(args), **{name: before[name] for name in SETTINGS}, **paths})


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
    """Train and save; returns the exit status."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    device = cli.choose_device(args.device)
    ranks = Ranks.from_environment(device)
    with contextlib.ExitStack() as held:
        held.callback(ranks.close)
        loaded = None
        if args.resume:
            last = args.output_path / LAST
            if not last.is_file():
                raise FileNotFoundError(f"{last}: there is no run to go on with; begin one without --resume")
            loaded = load_checkpoint(last)
            args = with_earlier_settings(parser, argv, args, loaded)
        if args.batch_size < max(2, ranks.size):
            parser.error(
                f"--batch_size {args.batch_size} is too small: BatchNorm cannot train on a single clip, "
                f"and each process needs one; take {max(2, ranks.size)} or more"
            )
        if args.patience and not args.val_fraction:
            parser.error("--patience looks at validation clips; hold some out with --val_fraction 0.1")
        cli.seed_everything(args.seed)
        if ranks.rank == 0:
            cli.make_writable_folder(args.output_path)
            held.enter_context(only_one(args.output_path))
        train(args, device, ranks, loaded)
    return 0


def train(args: argparse.Namespace, device: torch.device, ranks: Ranks, loaded: Checkpoint | None) -> None:
    """Train as the flags say, from the beginning or on from `loaded`.

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
    train_loader = source.loader(clips, training, order)
    loaders = {
        name: source.loader(some, testing, ClipBatches(len(some), args.batch_size, shuffle=False, **share))
        for name, some in (("val", held_out), ("test", split.test))
    }

    settings = {name: _plain(getattr(args, name)) for name in (*SETTINGS, "dataset_path", "split_path")}
    settings["clips"] = hashlib.sha256("\n".join(clip.name for clip in clips).encode()).hexdigest()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.num_epochs * len(order))
    checkpoint = Checkpoint(
        model, split.classes, args.img_dim, args.sequence_length, args.split_number, 0, settings
    )
    run = Run(args.output_path, checkpoint, optimizer, scheduler, args.save_seconds)
    forward = ranks.parallel(model, source.forward)
    cli.say(
        f"training {run.name} ({sum(map(torch.Tensor.numel, trained)):,} parameters) "
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

    with cli.Deferred() as signals:

        def stop() -> bool:
            stopping = ranks.any(signals.signum is not None)
            if ranks.rank == 0:
                run.save_last() if stopping else run.save_if_due()
            return stopping

        def evaluated(name: str) -> dict[str, float]:
            # Alone, a signal is heard in between; several processes must do the same number of steps.
            heard = stop if ranks.size == 1 else lambda: False
            result = evaluate(
                model, source.forward, loaders[name], device, description=name, ranks=ranks, stop=heard
            )
            if result is None:
                raise stopped()
            leak = ", on a split that leaks" if (args.split_number, name) == (RANDOM, "test") else ""
            cli.say(f"epoch {run.epoch} of {args.num_epochs}: {name} {result}{leak}")
            return {f"{name}_loss": result.loss, f"{name}_accuracy": result.accuracy}

        def stopped() -> cli.Interrupted:
            cli.say(f"stopped in epoch {run.epoch} after {run.tally.batches} batches; go on with --resume")
            return cli.Interrupted(signals.signum or signal.SIGTERM)

        while run.epoch <= args.num_epochs and not run.out_of_patience(args.patience):
            description = f"epoch {run.epoch} of {args.num_epochs}"
            order.epoch, order.start = run.epoch, run.tally.batches
            try:
                whole = train_one_epoch(
                    forward, train_loader, optimizer, scheduler, device,
                    description=description, tally=run.tally, ranks=ranks, stop=stop,
                )  # fmt: skip
            except LossError as error:
                names = ", ".join(clips[index].name for _, index in order.whole()[error.batch])
                raise ValueError(
                    f"{description}, batch {error.batch + 1}: {error}; the checkpoints in "
                    f"{args.output_path} are from before; the clips were {names}"
                ) from error
            if not whole:
                raise stopped()
            cli.say(f"{description}: train {run.tally}")
            figures = {"train_loss": run.tally.loss, "train_accuracy": run.tally.accuracy}
            if held_out:
                figures |= evaluated("val")
            if run.epoch % args.checkpoint_interval == 0 or run.epoch == args.num_epochs:
                figures |= evaluated("test")
                if ranks.rank == 0:
                    cli.say(f"saved {run.save_epoch(keep=args.keep)}")
            run.end_epoch(figures, write=ranks.rank == 0)
        if ranks.rank == 0:
            run.save_last()
    if run.best:
        cli.say(
            f"best validation accuracy {run.best[0]:.2f} % after epoch {run.best[1]}, in {run.folder / BEST}"
        )
    if run.epoch <= args.num_epochs:
        cli.say(f"ended after epoch {run.epoch - 1}: no better one in {args.patience} epochs")


if __name__ == "__main__":
    cli.run(main)
