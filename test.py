"""Test a checkpoint on a split of UCF-101.

python3 test.py --dataset_path data/UCF-101 --checkpoint_model model_checkpoints/ConvLSTM_20.pth
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cli
from checkpoint import load_checkpoint
from dataset import ClipBatches, Sampling
from engine import evaluate
from features import ClipSource
from ranks import Ranks
from splits import RANDOM, load_split


def get_args_parser() -> argparse.ArgumentParser:
    """The flags of test.py."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--checkpoint_model", type=Path, required=True, help="of this project or of the original"
    )
    cli.add_data_flags(parser)
    parser.set_defaults(frame_stride=None)
    cli.add_split_flag(
        parser,
        default=None,
        help="split whose test list is used; default: the one that the checkpoint was trained on",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="test on another split than the trained one all the same, most of whose clips it has seen",
    )
    parser.add_argument(
        "--sequence_length",
        type=cli.positive_int,
        help="frames of a clip; default (recommended): the checkpoint's",
    )
    parser.add_argument(
        "--img_dim",
        type=cli.positive_int,
        help="frame size in pixels; default (recommended): the checkpoint's",
    )
    parser.add_argument(
        "--batch_size", type=cli.positive_int, default=16, help="clips at once; changes speed only"
    )
    cli.add_device_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Test and print; returns the exit status."""
    args = get_args_parser().parse_args(argv)
    device = cli.choose_device(args.device)
    ranks = Ranks.from_environment(device)
    checkpoint = load_checkpoint(args.checkpoint_model)
    split_number = args.split_number or checkpoint.split_number or 1
    seen = ""
    if checkpoint.split_number not in (None, split_number):
        seen = f", most of whose clips it has seen in training on split {checkpoint.split_number}"
        if not args.force:
            raise ValueError(
                f"{args.checkpoint_model} was trained on split {checkpoint.split_number} and has seen most "
                f"of the test clips of split {split_number}; test it on its own split, or add --force to see "
                "a figure that says nothing"
            )
    seed = checkpoint.settings.get("seed", 0)
    split = load_split(args.dataset_path, args.split_path, split_number, seed=seed)
    if split_number == RANDOM:
        seen = ", a split that leaks"
    if missing := split.missing():
        cli.say(f"warning: {missing}")
    if split.classes != checkpoint.classes:
        raise ValueError(
            f"{args.split_path / 'classInd.txt'}: not the classes that the checkpoint was trained on"
        )
    if not split.test:
        raise ValueError(f"{args.dataset_path}: not one test clip of split {split_number} is there")

    model = checkpoint.model.to(device)
    model.encoder.prepare(cli.choose_dtype(args.precision, device), compile=args.compile)
    img_dim = args.img_dim or checkpoint.img_dim
    # Of the training, so that its cache serves the test too.
    args.frame_stride = args.frame_stride or checkpoint.settings.get("frame_stride", 1)
    source = ClipSource.from_flags(args, model, split.test, img_dim, flip=False, ranks=ranks)
    sampling = Sampling(args.sequence_length or checkpoint.sequence_length, frame_stride=args.frame_stride)
    batches = ClipBatches(len(split.test), args.batch_size, shuffle=False, rank=ranks.rank, ranks=ranks.size)
    loader = source.loader(split.test, sampling, batches)
    result = evaluate(model, source.forward, loader, device, description="testing", ranks=ranks)
    cli.say(f"split {split_number}: test {result}{seen}")
    ranks.close()
    return 0


if __name__ == "__main__":
    cli.run(main)
