"""Train an action classifier on UCF-101: a frozen ImageNet encoder, and an LSTM over its embeddings.

    python3 train.py --dataset_path data/UCF-101 --split_path data/ucfTrainTestlist
    python3 train.py --encoder efficientnet_lite0 --num_epochs 10       # needs no download, and fits a laptop

The data set may be the videos, or the frames that extract_frames.py made of them.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

import cli
from checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from dataset import SPLIT_NUMBERS, ClipBatches, Sampling, load_split
from engine import evaluate, train_one_epoch
from features import ClipSource
from models import ENCODERS, ConvLSTM


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
    clips.add_argument(
        "--split_number",
        type=int,
        choices=SPLIT_NUMBERS,
        default=1,
        help="official split; papers quote 1, or all",
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
        help="clips of a step; 16 as the original, 2 at least (BatchNorm)",
    )
    training.add_argument(
        "--learning_rate",
        type=cli.positive_float,
        default=5e-4,
        help="of AdamW at the start, falling to 0 as a cosine; the original's 1e-5 was meant for 200 epochs",
    )
    training.add_argument(
        "--seed",
        type=cli.non_negative_int,
        default=0,
        help="the same seed gives the same numbers on the same machine",
    )

    output = parser.add_argument_group("output")
    output.add_argument(
        "--output_path", type=Path, default=Path("model_checkpoints"), help="folder for ConvLSTM_<epoch>.pth"
    )
    output.add_argument(
        "--checkpoint_interval",
        type=cli.positive_int,
        default=5,
        help="epochs between checkpoints, each with a test; the last epoch is always saved and tested",
    )
    cli.add_device_flags(parser)
    return parser


def make_room(folder: Path, pattern: str) -> None:
    """Move the checkpoints of an earlier run into `folder`/earlier-<n>, so that none is overwritten."""
    earlier = sorted(folder.glob(pattern))
    if not earlier:
        return
    number = 1
    while (folder / f"earlier-{number}").exists():
        number += 1
    aside = folder / f"earlier-{number}"
    aside.mkdir()
    for path in earlier:
        path.rename(aside / path.name)
    print(f"{len(earlier)} checkpoints of an earlier run moved to {aside}")


def main(argv: list[str] | None = None) -> int:
    """Train and save; returns the exit status."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    if args.batch_size < 2:
        parser.error("--batch_size 1 is too small: BatchNorm cannot train on a single clip, take 2 or more")
    device = cli.choose_device(args.device)
    cli.seed_everything(args.seed)
    cli.make_writable_folder(args.output_path)

    split = load_split(args.dataset_path, args.split_path, args.split_number)
    if missing := split.missing():
        print(f"warning: {missing}")
    if len(split.train) < 2 or not split.test:
        raise ValueError(
            f"{args.dataset_path}: {len(split.train)} training and {len(split.test)} test clips of split "
            f"{args.split_number} are there; it takes 2 and 1 at least"
        )
    if args.checkpoint_model:
        model = load_checkpoint(args.checkpoint_model).model
        if model.config["num_classes"] != len(split.classes):
            raise ValueError(
                f"{args.checkpoint_model}: {model.config['num_classes']} classes, and the lists name "
                f"{len(split.classes)}; name the lists that it was trained with"
            )
    else:
        model = ConvLSTM(len(split.classes), encoder=args.encoder, latent_dim=args.latent_dim)
    model.to(device)
    model.encoder.prepare(cli.choose_dtype(args.precision, device), compile=args.compile)
    testing = Sampling(args.sequence_length, frame_stride=args.frame_stride)
    training = replace(testing, training=True, flip=not args.no_flip, seed=args.seed)
    source = ClipSource.from_flags(args, model, split.train + split.test, args.img_dim, flip=training.flip)
    train_batches = ClipBatches(len(split.train), args.batch_size, shuffle=True, seed=args.seed)
    test_batches = ClipBatches(len(split.test), args.batch_size, shuffle=False)
    train_loader = source.loader(split.train, training, train_batches)
    test_loader = source.loader(split.test, testing, test_batches)

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.num_epochs * len(train_batches))
    name = type(model).__name__
    print(
        f"training {name} ({sum(map(torch.Tensor.numel, trained)):,} parameters) on {len(split.train):,} "
        f"clips, testing on {len(split.test):,}; {model.encoder.name} in {model.encoder.dtype} on {device}"
    )
    make_room(args.output_path, f"{name}_*.pth")
    for epoch in range(1, args.num_epochs + 1):
        train_batches.epoch = epoch
        description = f"epoch {epoch} of {args.num_epochs}"
        print(
            f"{description}: train",
            train_one_epoch(
                model, source.forward, train_loader, optimizer, scheduler, device, description=description
            ),
        )
        if epoch % args.checkpoint_interval == 0 or epoch == args.num_epochs:
            print(
                f"{description}: test",
                evaluate(model, source.forward, test_loader, device, description="testing"),
            )
            path = args.output_path / f"{name}_{epoch}.pth"
            save_checkpoint(
                path,
                Checkpoint(
                    model, split.classes, args.img_dim, args.sequence_length, args.split_number, epoch
                ),
            )
            print(f"saved {path}")
    return 0


if __name__ == "__main__":
    cli.run(main)
