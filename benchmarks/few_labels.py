"""How much a head learns from few labels, against logistic regression on the mean embedding.

python3 benchmarks/few_labels.py --cache_path ...
python3 benchmarks/few_labels.py --cache_path ... --held_out --models "MeanPool --learning_rate 1e-3"

Of each class some groups of the training list have labels, drawn anew for each draw and split. Settings are
chosen with --held_out: draws and tests are then of the groups that no split tests, so what is chosen has seen
no test clip of any.
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
from sklearn.preprocessing import normalize
from tqdm import tqdm

from models import MODELS, check_model
from splits.datasets import DataSettings, Listed
from splits.split import Clip, Split
from training.comparison import filling_flags, words_of
from training.learner import Learner
from training.loop import Part
from training.masked import MaskedFrames, MaskedLearner, check_pretraining
from training.recipe import Recipe
from training.report import markdown
from training.settings import TrainSettings, add_train_flags
from training.setup import ClipSource, Setup, build_model, choose_split
from utils.device import seed_everything
from utils.flags import COUNT, typed
from utils.process import UserError, available_cores, run
from utils.ranks import ALONE

PROBE = "logistic regression"
# What scikit-learn does, and the length that it gives to each mean embedding; None leaves it as it is.
PROBES = {PROBE: None, f"{PROBE}, one length": 30.0}


@dataclass(frozen=True)
class Task:
    """A training on few labels.

    Attributes:
        model: of `models.MODELS`, with flags of train.py, or of `PROBES`
        groups: of each class whose labels are used
        split, draw: which ones
    """

    model: str
    groups: int
    split: int
    draw: int


def draw_groups(
    clips: Sequence[Clip], groups: int, seed: Sequence[int], *, rest: bool = False
) -> tuple[list[Clip], list[Clip]]:
    """Clips of some groups of each class, and all others.

    Args:
        rest: whether others must be left of each class

    Raises: UserError if a class has too few groups.
    """
    names: dict[int, list[str]] = {}
    for clip in clips:
        names.setdefault(clip.label, []).append(clip.group)
    chosen: set[str] = set()
    for label, of_class in names.items():
        distinct = sorted(set(of_class))
        if groups + rest > len(distinct):
            raise UserError(
                f"--groups {groups}: there is a class with {len(distinct)} groups to draw from; take fewer"
            )
        rng = np.random.default_rng([*seed, label])
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
    name, *own = shlex.split("MeanPool" if task.model in PROBES else task.model)
    words = [*_flags, "--model", name, *own, "--split_number", task.split, "--seed", task.draw]
    return TrainSettings.from_flags(words)


@functools.cache
def split_of(data: DataSettings, number: int) -> Split:
    """A split; what is missing of it is told once."""
    return choose_split(Listed(data), number, seed=0)


@functools.cache
def never_tested(data: DataSettings) -> set[str]:
    """Names of the clips that no split tests."""
    return Listed(data).never_tested()


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
    train, tested = setup.split.train, setup.split.test
    if _held_out:
        names = never_tested(setup.settings.data)
        pool = [clip for clip in train if clip.name in names]
        clips, tested = draw_groups(pool, task.groups, [task.draw], rest=True)
        unseen = {clip.name for clip in tested}
        train = [clip for clip in train if clip.name not in unseen]
    else:
        clips, _ = draw_groups(train, task.groups, [task.split, task.draw])
    if task.model in PROBES:
        probe = LogisticRegression(max_iter=10_000)
        kept, length = list(setup.source.kept), PROBES[task.model]
        seen, shown = (mean_pooled(some, kept) for some in (clips, tested))
        if length:
            seen, shown = length * normalize(seen), length * normalize(shown)
        named = probe.fit(seen, [clip.label for clip in clips]).predict(shown)
        return 100 * float(np.mean(named == [clip.label for clip in tested]))
    loop, recipe, model = setup.settings.loop, setup.settings.recipe, setup.source.model
    if loop.pretrain:
        part = setup.part(train, training=True)
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


def main() -> int:
    """Train on each draw, test, and print a table; returns the exit status."""
    parser = common.data_parser(__doc__.split("\n")[0])
    quoted = "with flags of train.py in quotes"
    parser.add_argument("--encoders", nargs="+", default=["efficientnet_lite0", "i3d"], help=quoted)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help=f"{quoted}; default: all")
    parser.add_argument("--groups", type=COUNT, nargs="+", default=[1, 2, 4, 8], help="of each class")
    parser.add_argument(
        "--draws", type=COUNT, default=5, help="for each split; three times as many with --held_out"
    )
    parser.add_argument("--cache_path", type=Path, help="of train.py; default: beside the data set")
    parser.add_argument(
        "--held_out",
        action="store_true",
        help="draw among the groups that no split tests, four of each class in UCF-101, and test the "
        "others of them",
    )
    parser.add_argument(
        "--steps", type=COUNT, default=400, help="of each training: few clips make short epochs"
    )
    args = parser.parse_args()
    data = common.data_settings(args.data)
    kept = {"latent_dim", "sequence_length", "pretrain", *(entry.name for entry in fields(Recipe))}
    for model in args.models:
        check = argparse.ArgumentParser()
        add_train_flags(check)
        name, *words = words_of(model)
        check_model(name)
        given = typed(check, words, check.parse_args(words))
        if other := set(given) - kept:
            parser.error(f"--models {model!r}: --{min(other)} is the same for all here, or has no effect")
        if given.get("pretrain"):
            check_pretraining(name, given.get("sequence_length"))
    flags = ["--dataset_path", str(data.dataset_path), "--split_path", str(data.split_path)]
    flags += ["--cache_path", str(args.cache_path)] if args.cache_path else []
    rows = [
        ["encoder", "model", *(f"{groups} group{'s'[: groups > 1]} of a class" for groups in args.groups)]
    ]
    encoder_flags = {encoder: [*flags, "--encoder", *words_of(encoder)] for encoder in args.encoders}
    fills = {encoder: filling_flags(own) for encoder, own in encoder_flags.items()}
    for encoder, own in encoder_flags.items():
        # Workers have a core each, which is too little to encode with.
        filling = [sys.executable, str(common.ROOT / "features.py"), *fills[encoder]]
        if status := subprocess.run(filling, stdout=sys.stderr, check=False).returncode:
            return status
        own += ["--num_workers", "1"]
        models = [*PROBES, *args.models]
        splits = Listed(data).numbers
        draws = [(split, draw) for split in splits for draw in range(args.draws)]
        if args.held_out:
            draws = [(splits[0], draw) for draw in range(len(draws))]
        tasks = [Task(model, groups, *place) for model in models for groups in args.groups for place in draws]
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
    where = f"{len(splits)} splits, {args.draws} draws each, on the test clips"
    if args.held_out:
        where = f"{len(draws)} draws among the groups that no split tests"
    title = f"{where}; in brackets the gain over {PROBE}, ± standard error over draws"
    print(common.machine(torch.device("cpu")))
    print(f"\n### Few labels, {title}\n\n{markdown(rows)}\n")
    return 0


if __name__ == "__main__":
    run(main)
