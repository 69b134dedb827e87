"""Test a checkpoint on a split of UCF-101.

python3 test.py --dataset_path data/UCF-101 --checkpoint_model model_checkpoints/ConvLSTM_20.pth
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cli
from checkpoint import Checkpoint, load_checkpoint
from dataset import ClipBatches, Sampling
from features import ClipSource
from history import unused_folder
from ranks import Ranks
from report import about, predict_clips, summary, write_report
from splits import RANDOM, SPLIT_NUMBERS, load_split

SHOWN_MISTAKES = 5


def get_args_parser() -> argparse.ArgumentParser:
    """The flags of test.py."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--checkpoint_model", type=Path, required=True, help="of this project or of the original"
    )
    cli.add_data_flags(parser)
    # The checkpoint's holds.
    parser.set_defaults(frame_stride=None)
    cli.add_split_flag(
        parser,
        default=None,
        choices=(*SPLIT_NUMBERS, RANDOM),
        help="split whose test list is used; default: the one that the checkpoint was trained on",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="test on another split than the trained one all the same, most of whose clips it has seen",
    )
    parser.add_argument(
        "--clips",
        type=cli.positive_int,
        default=1,
        help="clips of each video, whose probabilities are averaged; 1 (default) is spread over the whole "
        "video and as accurate as more",
    )
    parser.add_argument(
        "--shuffle_frames",
        action="store_true",
        help="put the frames of each clip out of order, to see whether the model takes notice of it",
    )
    parser.add_argument(
        "--run_path",
        type=Path,
        help="folder for the report, whose files there are replaced; default: test-<checkpoint> in the "
        "folder of its training, numbered if it is there",
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


def default_folder(checkpoint: Checkpoint, path: Path) -> Path:
    """Beside the other figures of the training that a checkpoint is from, where it tells."""
    return unused_folder(Path(checkpoint.settings.get("run_path") or "runs") / f"test-{path.stem}")


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
    if args.shuffle_frames:
        seen += ", frames shuffled"
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
    args.frame_stride = args.frame_stride or checkpoint.frame_stride
    source = ClipSource.from_flags(args, model, split.test, img_dim, flip=False, ranks=ranks)
    sampling = Sampling(
        args.sequence_length or checkpoint.sequence_length,
        frame_stride=args.frame_stride,
        views=args.clips,
        shuffle=args.shuffle_frames,
    )
    batches = ClipBatches(len(split.test), args.batch_size, shuffle=False, rank=ranks.rank, ranks=ranks.size)
    loader = source.loader(split.test, sampling, batches)
    predictions = predict_clips(
        model, loader, batches, split.test, split.classes, views=args.clips, ranks=ranks
    )
    if ranks.rank == 0:
        folder = args.run_path or default_folder(checkpoint, args.checkpoint_model)
        report = write_report(
            folder, predictions, about(checkpoint, args.checkpoint_model, source, sampling, split_number)
        )
        print(f"split {split_number}: test {summary(report['figures'])}{seen}")
        for mistake in report["mistakes"][:SHOWN_MISTAKES]:
            print(
                f"  {mistake['clip']}: taken for {mistake['taken_for']}, {100 * mistake['probability']:.1f} %"
            )
        print(f"report in {folder}")
    ranks.close()
    return 0


if __name__ == "__main__":
    cli.run(main)
