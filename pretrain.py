"""Pretrain a head without labels: it learns what comes between the frames of the training clips.

    python3 pretrain.py --model ActionBERT --encoder efficientnet_lite0
    python3 train.py --checkpoint_model model_checkpoints/pretrained/ActionBERT_10.pth

`train.py --pretrain 10` does both. For ConvLSTM and ActionBERT, where labels are few.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from splits.datasets import ALL, open_listed
from training.checkpoint import load_checkpoint
from training.loop import Plan, fit
from training.masked import MaskedFrames, MaskedLearner, check_pretraining
from training.run import Run, hold_folder
from training.settings import LAST, TrainSettings, add_train_flags, check_run, with_earlier_settings
from training.setup import Setup, build_model, choose_split, number_of_parameters
from utils.device import choose_device, seed_everything
from utils.files import unused
from utils.process import run, say
from utils.ranks import Ranks

# Before the number of an epoch.
TITLE = "pretraining, "


def get_args_parser() -> argparse.ArgumentParser:
    """The flags of pretrain.py."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_train_flags(
        parser,
        without=("pretrain", "patience", "label_fraction", "checkpoint_model", "channels"),
        output_path=Path("model_checkpoints/pretrained"),
        num_epochs=10,
    )
    return parser


def pretrain(setup: Setup, *, resume: bool) -> Path:
    """Pretrain the model of a setup, from the beginning or on from last.pth where that is there.

    Returns: the file of the last epoch, for --checkpoint_model; the model has its weights.
    Raises: as `hold_folder`, `Run.go_on` and `fit`.
    """
    settings, ranks, model = setup.settings, setup.ranks, setup.source.model
    loop, output = settings.loop, settings.output
    assert output.run_path is not None
    masked = MaskedFrames(model, ranks)
    part = setup.part(setup.unlabelled, training=True)
    learner = MaskedLearner(model, masked, settings.recipe, loop.num_epochs * len(part.order), loop.seed)
    progress = Run(
        output.output_path, setup.checkpoint(), learner, output.save_seconds, writes=ranks.rank == 0
    )
    with hold_folder(output.output_path, writes=ranks.rank == 0):
        last = output.output_path / LAST
        goes_on = resume and last.is_file()
        # All have looked before the first one writes.
        ranks.wait()
        if goes_on:
            loaded = load_checkpoint(last)
            model.heads.load_state_dict(loaded.model.heads.state_dict())
            progress.go_on(loaded, loop.num_epochs, TITLE)
        else:
            progress.make_room()
            progress.save_last()
        say(
            f"pretraining {progress.name} ({number_of_parameters(learner.trained):,} parameters) on "
            f"{len(setup.unlabelled):,} clips without labels"
        )
        plan = Plan(part, loop.num_epochs, TITLE, interval=output.checkpoint_interval, keep=output.keep)
        history = setup.history(output.run_path, progress.history, f"{setup.name}, pretraining")
        with contextlib.closing(history) if history else contextlib.nullcontext():
            fit(progress, plan, ranks, history)
    return progress.path_of(loop.num_epochs)


def main(argv: list[str] | None = None) -> int:
    """Pretrain and save; returns the exit status."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    if args.split_number == ALL:
        parser.error("--split_number all: pretrain on one split at a time, since each tests on other clips")
    device = choose_device(args.device)
    with contextlib.closing(Ranks.from_environment(device)) as ranks:
        if args.resume:
            last = check_run(args.output_path / LAST)
            args = with_earlier_settings(parser, argv, args, load_checkpoint(last))
        settings = TrainSettings.read(args)
        if problem := settings.problem(ranks.size):
            parser.error(problem)
        check_pretraining(settings.model.model, settings.model.sequence_length)
        seed_everything(settings.loop.seed)
        listed = open_listed(settings.data)
        split = choose_split(listed, settings.clips.split_number, settings.loop.seed)
        model = build_model(settings, len(split.classes))
        setup = Setup.build(settings, listed, split, model, device, ranks)
        if not args.resume:
            folder = args.run_path or Path("runs") / f"{setup.name}-pretraining-seed{settings.loop.seed}"
            setup = setup.in_folder(unused(folder), listed)
        path = pretrain(setup, resume=args.resume)
        say(f"train from here with --checkpoint_model {path}")
    return 0


if __name__ == "__main__":
    run(main)
