"""How much a head learns from few labels, against logistic regression on the mean embedding.

python3 benchmarks/few_labels.py --cache_path ...
python3 benchmarks/few_labels.py --cache_path ... --held_out --models "MeanPool --learning_rate 1e-3"

Of each class some groups of the training list have labels, drawn anew for each draw and split. Settings are
chosen with --held_out: it tests on the training clips that were not drawn, never on the test list.
"""

import argparse
import functools
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from multiprocessing import get_context
from pathlib import Path

import common
import numpy as np
import torch
from accuracy import mean_pooled
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

from models import MODELS
from splits.datasets import DataSettings, Listed
from splits.split import Clip, Split
from training.learner import Learner
from training.loop import Part
from training.masked import MaskedFrames, MaskedLearner
from training.recipe import Recipe
from training.report import markdown
from training.settings import TrainSettings, add_train_flags
from training.setup import ClipSource, Setup, build_model, choose_split
from utils.device import seed_everything
from utils.flags import typed
from utils.process import available_cores
from utils.ranks import ALONE

PROBE = "logistic regression"


@dataclass(frozen=True)
class Task:
    """A training on few labels.

    Attributes:
        model: of `models.MODELS`, with flags of train.py; `PROBE` for logistic regression
        groups: of each class whose labels are used
        split, draw: which ones
    """

    model: str
    groups: int
    split: int
    draw: int


def draw_groups(clips: Sequence[Clip], groups: int, draw: int) -> tuple[list[Clip], list[Clip]]:
    """Clips of some groups of each class, and all others."""
    names: dict[int, list[str]] = {}
    for clip in clips:
        names.setdefault(clip.label, []).append(clip.group)
    chosen: set[str] = set()
    for label, of_class in names.items():
        distinct = sorted(set(of_class))
        rng = np.random.default_rng([draw, label])
        chosen.update(rng.permutation(distinct)[:groups].tolist())
    return [clip for clip in clips if clip.group in chosen], [
        clip for clip in clips if clip.group not in chosen
    ]


def run_epochs(learner: Learner, part: Part, epochs: int) -> None:
    """As `loop.train_epoch`, without anything around it."""
    for epoch in range(1, epochs + 1):
        part.order.epoch = epoch
        learner.trained.train()
        for number, (embeddings, padding, labels) in enumerate(part.batches):
            learner.begin_batch(epoch, number, 0)
            loss, _, count = learner.losses(learner.forward, embeddings, padding, labels)
            learner.step(loss / max(1, count))


# Of a worker: flags of train.py for all, whether training groups are tested, steps of a training, and the
# clips with their embeddings.
_flags: list[str]
_held_out: bool
_steps: int
_setup: Setup | None


def _start(flags: list[str], held_out: bool, steps: int) -> None:
    global _flags, _held_out, _steps, _setup
    _flags, _held_out, _steps, _setup = flags, held_out, steps, None
    torch.set_num_threads(1)


def settings_of(task: Task) -> TrainSettings:
    """Settings of train.py."""
    parser = argparse.ArgumentParser()
    add_train_flags(parser)
    name, *own = shlex.split("MeanPool" if task.model == PROBE else task.model)
    words = [*_flags, "--model", name, *own, "--split_number", str(task.split), "--seed", str(task.draw)]
    return TrainSettings.read(parser.parse_args(words))


@functools.cache
def split_of(data: DataSettings, number: int) -> Split:
    """A split; what is missing of it is told once."""
    return choose_split(Listed(data), number, seed=0)


def set_up(task: Task) -> Setup:
    """The split of a task, a new model, and the embeddings of all clips."""
    global _setup
    settings = settings_of(task)
    seed_everything(task.draw)
    split = split_of(settings.data, task.split)
    model = build_model(settings, len(split.classes))
    if _setup is None:
        _setup = Setup.build(settings, Listed(settings.data), split, model, torch.device("cpu"), ALONE)
    source = ClipSource(model, _setup.source.img_dim, _setup.source.kept, 0)
    assert settings.model.sequence_length
    testing = replace(_setup.testing, sequence_length=settings.model.sequence_length)
    training = replace(testing, training=True, flip=_setup.training.flip, seed=task.draw)
    return replace(_setup, settings=settings, split=split, source=source, testing=testing, training=training)


def accuracy(task: Task) -> float:
    """Percent of the clips that are named right."""
    setup = set_up(task)
    clips, others = draw_groups(setup.split.train, task.groups, task.draw)
    tested = others if _held_out else setup.split.test
    if task.model == PROBE:
        probe = LogisticRegression(max_iter=10_000)
        kept = list(setup.source.kept)
        probe.fit(mean_pooled(clips, kept), [clip.label for clip in clips])
        named = probe.predict(mean_pooled(tested, kept))
        return 100 * float(np.mean(named == [clip.label for clip in tested]))
    loop, recipe, model = setup.settings.loop, setup.settings.recipe, setup.source.model
    if loop.pretrain:
        part = setup.part(setup.split.train, training=True)
        masked = MaskedFrames(model)
        steps = loop.pretrain * len(part.order)
        run_epochs(MaskedLearner(model, masked, recipe, steps, task.draw), part, loop.pretrain)
    part = setup.part(clips, training=True)
    epochs = -(-_steps // len(part.order))
    run_epochs(Learner(model, recipe, epochs * len(part.order), task.draw), part, epochs)
    model.eval()
    with torch.no_grad():
        right = [
            model.classify(embeddings, padding).argmax(1) == labels
            for embeddings, padding, labels in setup.part(tested, training=False).batches
        ]
    return 100 * float(torch.cat(right).float().mean())


def main() -> None:
    parser = common.parser(__doc__.split("\n")[0])
    parser.add_argument("--encoders", nargs="+", default=["efficientnet_lite0", "i3d"])
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="with flags of train.py in quotes")
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 2, 4, 8], help="of each class")
    parser.add_argument("--draws", type=int, default=5, help="for each split")
    parser.add_argument("--cache_path", type=Path, help="of train.py; default: beside the data set")
    parser.add_argument("--held_out", action="store_true", help="test on training groups that are not drawn")
    parser.add_argument(
        "--steps", type=int, default=400, help="of each training: few clips make short epochs"
    )
    args = parser.parse_args()
    data = common.data_settings(args.data)
    kept = {"latent_dim", "sequence_length", "pretrain", *(entry.name for entry in fields(Recipe))}
    for model in args.models:
        check = argparse.ArgumentParser()
        add_train_flags(check)
        words = shlex.split(model)[1:]
        if other := set(typed(check, words, check.parse_args(words))) - kept:
            parser.error(f"--models {model!r}: --{min(other)} is the same for all here, or has no effect")
    flags = ["--dataset_path", str(data.dataset_path), "--split_path", str(data.split_path)]
    flags += ["--cache_path", str(args.cache_path)] if args.cache_path else []
    rows = [
        ["encoder", "model", *(f"{groups} group{'s'[: groups > 1]} of a class" for groups in args.groups)]
    ]
    for encoder in args.encoders:
        own = [*flags, "--encoder", *shlex.split(encoder)]
        # Workers have a core each, which is too little to encode with.
        subprocess.run([sys.executable, common.ROOT / "features.py", *own], stdout=sys.stderr, check=True)
        own += ["--num_workers", "1"]
        models = [PROBE, *args.models]
        tasks = [
            Task(model, groups, split, draw)
            for model in models
            for groups in args.groups
            for split in Listed(data).numbers
            for draw in range(args.draws)
        ]
        context = get_context("forkserver")
        with ProcessPoolExecutor(
            available_cores(), context, _start, (own, args.held_out, args.steps)
        ) as pool:
            bar = tqdm(pool.map(accuracy, tasks), encoder, len(tasks), unit="training", dynamic_ncols=True)
            found = dict(zip(tasks, bar, strict=True))
        for model in models:
            cells = []
            for groups in args.groups:
                mine = {task: right for task, right in found.items() if task.groups == groups}
                probe = [right for task, right in mine.items() if task.model == PROBE]
                right = [value for task, value in mine.items() if task.model == model]
                cell = f"{statistics.mean(right):.1f} %"
                if model != PROBE:
                    gains = [one - other for one, other in zip(right, probe, strict=True)]
                    error = statistics.stdev(gains) / len(gains) ** 0.5
                    cell += f" ({statistics.mean(gains):+.1f} ± {error:.1f})"
                cells.append(cell)
            rows.append([encoder, model, *cells])
        print(markdown(rows), file=sys.stderr)
    tested = "training groups that were not drawn" if args.held_out else "the test clips"
    title = f"three splits, {args.draws} draws each, on {tested}; in brackets the gain over {PROBE}"
    print(common.machine(torch.device("cpu")))
    print(f"\n### Few labels, {title}, ± standard error\n\n{markdown(rows)}\n")


if __name__ == "__main__":
    main()
