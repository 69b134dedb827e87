"""Train an action classifier on UCF-101: a frozen encoder, and an LSTM or another head over it.

    python3 train.py --dataset_path data/UCF-101 --split_path data/ucfTrainTestlist
    python3 train.py --encoder i3d                                      # sees motion, and needs no download
    python3 train.py --encoder efficientnet_lite0 --num_epochs 10       # the fastest, needs none either
    python3 train.py --split_number all                                 # all three splits, and their mean
    python3 train.py --model ActionBERT --pretrain 10                   # a Transformer, first without labels
    python3 train.py --dataset_path my_clips --encoder i3d              # any folder of class folders
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

import numpy as np
import torch

from pretrain import pretrain
from splits.datasets import ALL, DataSettings, Listed, open_listed
from splits.split import RANDOM
from training.checkpoint import Checkpoint, load_checkpoint
from training.learner import Learner
from training.loop import Part, Plan, fit
from training.masked import check_pretraining
from training.report import (
    Predictions,
    about,
    interval,
    markdown,
    predict_clips,
    summary,
    write_report,
)
from training.run import BEST, Run, hold_folder
from training.settings import (
    LAST,
    SIZES,
    TrainSettings,
    add_train_flags,
    check_run,
    with_earlier_settings,
)
from training.setup import Setup, build_model, choose_split, number_of_parameters
from utils.device import choose_device, seed_everything
from utils.files import unused
from utils.flags import read, typed
from utils.process import UserError, run, say
from utils.ranks import Ranks


def get_args_parser() -> argparse.ArgumentParser:
    """The flags of train.py."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_train_flags(parser)
    return parser


def set_up(
    settings: TrainSettings, listed: Listed, device: torch.device, ranks: Ranks, start: Checkpoint | None
) -> Setup:
    """Clips, model and embeddings of a training, and a new folder below runs where it does not go on.

    Raises: as `train`.
    """
    split = choose_split(listed, settings.clips.split_number, settings.loop.seed)
    model = start.model if start else build_model(settings, len(split.classes))
    if model.num_classes != len(split.classes):
        raise UserError(
            f"{settings.model.checkpoint_model or settings.output.output_path / LAST}: {model.num_classes} "
            f"classes, and the lists name {len(split.classes)}; name the lists that it was trained with"
        )
    if start and start.split_number not in (None, settings.clips.split_number):
        say(
            f"warning: {settings.model.checkpoint_model} was trained on split {start.split_number}, and "
            f"has seen most of the test clips of split {settings.clips.split_number}"
        )
    if start and sorted(start.classes) == sorted(split.classes):
        split = split.relabelled(start.classes)
    setup = Setup.build(settings, listed, split, model, device, ranks)
    if settings.output.resume:
        return setup
    name = f"{setup.name}-{settings.recipe_name}-seed{settings.loop.seed}"
    return setup.in_folder(unused(settings.output.run_path or Path("runs") / name), listed)


Tested = tuple[dict[str, Any], Predictions]


def train(setup: Setup, start: Checkpoint | None) -> Tested | None:
    """Train from the beginning, or on from `start` with --resume, and test what is best.

    Args:
        start: what last.pth holds, with --resume

    Returns: the report of the test, and what it is about, in the first process; None in the others.
    Raises: UserError or OSError for wrong data or files; process.Interrupted after a signal.
    """
    settings, ranks, model = setup.settings, setup.ranks, setup.source.model
    loop, output = settings.loop, settings.output
    assert output.run_path is not None
    training = setup.part(setup.clips, training=True)
    learner = Learner(model, settings.recipe, loop.num_epochs * len(training.order), loop.seed)
    progress = Run(
        output.output_path, setup.checkpoint(), learner, output.save_seconds, writes=ranks.rank == 0
    )
    say(
        f"training {progress.name} ({number_of_parameters(learner.trained):,} parameters) "
        f"on {len(setup.clips):,} clips, "
        + (f"validating on {len(setup.held_out):,}, " if setup.held_out else "")
        + f"testing on {len(setup.split.test):,}; {model.encoder.name} in "
        + f"{setup.source.computed_in} on {model.device}"
        + (f", {ranks.size} processes" if ranks.size > 1 else "")
    )
    if start is not None:
        progress.go_on(start, loop.num_epochs)
    else:
        progress.make_room()
        progress.save_last()
    if loop.pretrain and not progress.begun:
        before = setup.change("loop", num_epochs=loop.pretrain, pretrain=0, patience=None)
        folders = {
            "output_path": output.output_path / "pretrained",
            "run_path": output.run_path / "pretraining",
        }
        pretrain(before.change("output", **folders), resume=start is not None)
        progress.save_last()
    tests = {
        name: setup.part(clips, training=False)
        for name, clips in (("val", setup.held_out), ("test", setup.split.test))
        if clips
    }
    plan = Plan(
        training,
        loop.num_epochs,
        tests=tests,
        interval=output.checkpoint_interval,
        patience=loop.patience,
        keep=output.keep,
        note=leak_note(settings),
    )
    history = setup.history(output.run_path, progress.history, setup.name)
    with contextlib.closing(history) if history else contextlib.nullcontext():
        fit(progress, plan, ranks, history)
    if progress.epoch <= loop.num_epochs:
        say(f"ended after epoch {progress.epoch - 1}: no better one in {loop.patience} epochs")
    return test_best(progress, setup, tests["test"])


def leak_note(settings: TrainSettings) -> str:
    """What to say behind a test's figures."""
    return ", on a split that leaks" if settings.clips.split_number == RANDOM else ""


def test_best(progress: Run, setup: Setup, part: Part) -> Tested | None:
    """Test the file that the run recommends, on all processes, and write the report.

    Args:
        part: the test clips

    Returns: as `train`.
    """
    settings, ranks = setup.settings, setup.ranks
    path = progress.folder / BEST if progress.best else progress.path_of(progress.epoch - 1)
    checkpoint = load_checkpoint(path) if ranks.rank == 0 else None
    model = setup.source.model
    # The others need not see the file.
    saved = ranks.gather(
        (checkpoint.model.heads.state_dict(), checkpoint.temperature) if checkpoint else None
    )[0]
    assert saved is not None
    model.heads.load_state_dict(saved[0])
    model.temperature = saved[1]
    predictions = predict_clips(model, part, setup.split.classes, ranks=ranks)
    if checkpoint is None:
        return None
    assert settings.output.run_path is not None
    folder = settings.output.run_path / "test"
    described = about(checkpoint, path, setup.source, setup.testing, settings.clips.split_number)
    report = write_report(folder, predictions, described)
    how = f"best validation accuracy {progress.best[0]:.2f} %, " if progress.best else ""
    say(f"{how}epoch {checkpoint.epoch}, {path}: test {summary(report['figures'])}{leak_note(settings)}")
    say(f"report in {folder}")
    return report, predictions


def of_split(args: argparse.Namespace, number: int) -> argparse.Namespace:
    """The flags of one of several splits, with folders of its own."""
    run_path = args.run_path and args.run_path / f"split{number}"
    own = {"split_number": number, "output_path": args.output_path / f"split{number}", "run_path": run_path}
    return argparse.Namespace(**{**vars(args), **own})


def all_splits(parser: argparse.ArgumentParser, argv: list[str] | None, args: argparse.Namespace) -> Listed:
    """The data set that is named, with --resume that of the run. Raises: as `Listed`."""
    first = of_split(args, 1)
    if args.resume:
        last = check_run(first.output_path / LAST)
        first = with_earlier_settings(parser, argv, first, load_checkpoint(last))
    return open_listed(read(DataSettings, first))


def earlier_flags(
    parser: argparse.ArgumentParser, argv: list[str] | None, args: argparse.Namespace, first: Path
) -> tuple[argparse.Namespace, Checkpoint | None]:
    """The flags of the run in --output_path, and what its last.pth holds.

    Args:
        first: last.pth of the first split; a split whose turn had not come is trained as that one was

    Raises: MissingFileError if there is no run; else as `with_earlier_settings`.
    """
    check_run(first)
    last = args.output_path / LAST
    loaded = load_checkpoint(last if last.is_file() else first)
    earlier = with_earlier_settings(parser, argv, args, loaded)
    if last.is_file():
        return earlier, loaded
    before = earlier.run_path
    # Beside that of the first split, where `of_split` put that one.
    beside = before.with_name(f"split{args.split_number}") if before.name == first.parent.name else None
    own = {"split_number": args.split_number, "run_path": args.run_path or beside, "resume": False}
    return argparse.Namespace(**{**vars(earlier), **own}), None


def main(argv: list[str] | None = None) -> int:
    """Train, test and save; returns the exit status."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    ranks = Ranks.from_environment(device)
    with contextlib.closing(ranks):
        splits, listed = [args], None
        if args.split_number == ALL:
            # Once: drawn anew for the next split they might be others, with other clips.
            listed = all_splits(parser, argv, args)
            splits = [of_split(args, number) for number in listed.numbers]
        tested: list[Tested] = []
        for flags in splits:
            start: Checkpoint | None = None
            earlier: dict[str, Any] = {}
            if args.resume:
                flags, start = earlier_flags(parser, argv, flags, splits[0].output_path / LAST)
                earlier = {name: getattr(flags, name) for name in SIZES}
                # All have looked before the first one writes.
                ranks.wait()
            settings = TrainSettings.read(flags)
            if start is None and settings.model.checkpoint_model:
                start = load_checkpoint(settings.model.checkpoint_model)
                settings = settings.starting_from(start, typed(parser, argv, args) | earlier)
            if problem := settings.problem(ranks.size):
                parser.error(problem)
            if settings.loop.pretrain:
                check_pretraining(settings.model.model, settings.model.sequence_length)
            with hold_folder(settings.output.output_path, writes=ranks.rank == 0):
                seed_everything(settings.loop.seed)
                setup = set_up(settings, listed or open_listed(settings.data), device, ranks, start)
                done = train(setup, start if settings.output.resume else None)
                tested += [done] if done else []
        if len(tested) > 1:
            print(table_of_splits(tested))
    return 0


def table_of_splits(tested: Sequence[Tested]) -> str:
    """A Markdown table with a row: the accuracy on each split, their mean, and the interval of all clips."""
    reports = [report for report, _ in tested]
    right = np.concatenate([predictions.correct for _, predictions in tested])
    groups = [clip.group_or_name for _, predictions in tested for clip in predictions.clips]
    ends = interval(right, groups)
    top1 = [report["figures"]["top1_percent"] for report in reports]
    first = reports[0]
    numbers = [report["split_number"] for report in reports]
    streams = "" if first["streams"] == ["rgb"] else f", {' + '.join(first['streams'])}"
    cells = [
        f"{first['model']}, {first['encoder']}{streams}",
        f"{first['sequence_length']} of {first['img_dim']} px",
        *(f"{accuracy:.2f} %" for accuracy in top1),
        f"**{statistics.mean(top1):.2f} %**",
        f"{ends[0]:.1f} to {ends[1]:.1f} %" if ends else "",
    ]
    head = ["model", "frames", *(f"split {number}" for number in numbers), "mean", "95 % interval"]
    return markdown([head, cells])


if __name__ == "__main__":
    run(main)
