"""Train an action classifier on UCF-101: a frozen ImageNet encoder, and an LSTM or another head over it.

    python3 train.py --dataset_path data/UCF-101 --split_path data/ucfTrainTestlist
    python3 train.py --encoder efficientnet_lite0 --num_epochs 10       # needs no download, and fits a laptop
    python3 train.py --split_number all                                 # all three splits, and their mean
    python3 train.py --model ActionBERT --pretrain 10                   # a Transformer, first without labels
    python3 train.py --resume                                           # goes on where the last run stopped
    torchrun --nproc_per_node=4 train.py ...                            # the same training, on four devices

The data set may be the videos, or the frames that extract_frames.py made of them.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cli
from checkpoint import load_checkpoint
from dataset import parse_streams
from encoders import encoder_spec
from experiment import train
from models import MODELS
from ranks import Ranks
from recipe import add_recipe_flags, fill_from_recipe
from report import markdown
from run import LAST, only_one, with_earlier_settings
from splits import ALL, RANDOM, SPLIT_NUMBERS


def get_args_parser() -> argparse.ArgumentParser:
    """The flags of train.py."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    cli.add_data_flags(parser)
    cli.add_encoder_flags(parser, check_encoder=encoder_spec, check_streams=parse_streams)

    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        choices=tuple(MODELS),
        default="ConvLSTM",
        help="what names the action; ConvLSTM (default) is the original's, ActionBERT a Transformer, "
        "ConvClassifier and MeanPool are baselines that do not see the order of frames",
    )
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

    clips.add_argument(
        "--label_fraction",
        type=cli.positive_share,
        default=1.0,
        help="share of each class's training clips whose label is used; 1 (default) uses all, 0.1 shows what "
        "--pretrain is worth where labels are few",
    )

    training = parser.add_argument_group("training")
    training.add_argument(
        "--pretrain",
        type=cli.non_negative_int,
        default=0,
        help="passes over the training clips before, without labels: spans of frames are hidden and told "
        "from the others; for ConvLSTM and ActionBERT; 0 (default) does none, 10 is best for some hundred "
        "clips, and many more do harm",
    )
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
        help="folder for <model>_<epoch>.pth, best.pth and last.pth",
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
        help="keep the newest so many <model>_<epoch>.pth only; default: all, about 65 MB each",
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
    streams = "" if first["streams"] == ["rgb"] else f", {' + '.join(first['streams'])}"
    cells = [
        f"{first['model']}, {first['encoder']}{streams}",
        f"{first['sequence_length']} of {first['img_dim']} px",
        *(f"{accuracy:.2f} %" for accuracy in top1),
        f"**{statistics.mean(top1):.2f} %**",
    ]
    head = ["model", "frames", *(f"split {number}" for number in numbers), "mean"]
    return markdown([head, cells])


if __name__ == "__main__":
    cli.run(main)
