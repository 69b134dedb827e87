"""How accurate the recipe is, and what each part of it is worth.

    python3 benchmarks/accuracy.py test           # the test list: recipes and a linear probe, several seeds
    python3 benchmarks/accuracy.py ablation       # held-out groups: one part changed at a time
    python3 benchmarks/accuracy.py order          # toy data: the pairs that only the order of frames tells
    python3 benchmarks/accuracy.py order --actions sequences --encoder i3d

Settings are compared on groups held out of the training list, never on the test list: who chooses by the
test list tests no more. Each training is train.py in a process of its own; several run side by side, one
thread each.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import common
import numpy as np
from sklearn.linear_model import LogisticRegression
from toy_motions import KINDS, ORDER_PAIRS

from features.cache import CachedClips
from models import MODELS
from splits.datasets import Listed
from splits.split import Clip
from training.jobs import Tested, Training, train_all
from training.report import interval, markdown
from training.settings import TrainSettings
from training.setup import Setup, build_model, choose_split
from utils.device import choose_device
from utils.files import beside
from utils.process import available_cores, run
from utils.ranks import ALONE

ROOT = common.ROOT

# The default recipe with one part changed.
ABLATION: dict[str, list[object]] = {
    "default": [],
    "learning rate 1e-4": ["--learning_rate", 1e-4],
    "learning rate 1e-3": ["--learning_rate", 1e-3],
    "constant learning rate, no warm-up": ["--schedule", "constant", "--warmup", 0],
    "no warm-up": ["--warmup", 0],
    "weight decay 1": ["--weight_decay", 1],
    "no label smoothing": ["--label_smoothing", 0],
    "no dropout": ["--dropout", 0],
    "mixup 0.4": ["--mixup", 0.4],
    "gradients not cut": ["--clip_norm", 0],
}
# Clips of a video of UCF-101 that have nearly all of its frames together.
SEVERAL = 4


def mean_pooled(clips: list[Clip], caches: Sequence[CachedClips]) -> np.ndarray:
    """The mean embedding of all frames of each clip, its streams side by side (N, S D)."""
    return np.concatenate(
        [
            np.stack(
                [
                    cache.gather([clip], np.arange(cache.count(clip))[None], np.zeros(1, bool)).mean(1)[0]
                    for clip in clips
                ]
            )
            for cache in caches
        ],
        axis=1,
    )


def linear_probe(flags: Sequence[object]) -> tuple[list[Clip], np.ndarray]:
    """scikit-learn's logistic regression on mean-pooled embeddings: test clips, and probabilities (N, C).

    Args:
        flags: of train.py, whose embeddings it reads
    """
    settings = TrainSettings.from_flags(flags)
    listed = Listed(settings.data)
    split = choose_split(listed, settings.clips.split_number, 0)
    model, device = build_model(settings, len(split.classes)), choose_device(settings.device.device)
    caches = Setup.build(settings, listed, split, model, device, ALONE).source.kept
    probe = LogisticRegression(max_iter=10_000)
    probe.fit(mean_pooled(split.train, caches), [clip.label for clip in split.train])
    probabilities = np.zeros((len(split.test), len(split.classes)))
    probabilities[:, probe.classes_] = probe.predict_proba(mean_pooled(split.test, caches))
    return split.test, probabilities


def right_of(runs: Sequence[Training], other: str = "") -> np.ndarray:
    """Whether each run has each test clip right: (runs, N)."""
    return np.array([(run.others[other] if other else run.test).right for run in runs])


def row(name: str, right: np.ndarray, groups: list[str], extra: Sequence[str] = ()) -> list[str]:
    """A row of the table of tests; the interval is that of the mean over the seeds."""
    seeds = 100 * right.mean(1)
    ends = interval(right.mean(0), groups)
    assert ends is not None
    spread = f"{seeds.min():.1f} to {seeds.max():.1f}" if len(seeds) > 1 else "one solution"
    return [name, f"{seeds.mean():.1f} %", spread, f"{ends[0]:.1f} to {ends[1]:.1f} %", *extra]


def test(args: argparse.Namespace, data: list[object], epochs: Sequence[int]) -> None:
    """Recipes and the linear probe on the test list."""
    clips, probabilities = linear_probe([*data, *args.model_flags])
    probe = probabilities.argmax(1) == [clip.label for clip in clips]
    groups = [clip.group for clip in clips]
    kinds = [
        (recipe, number)
        for recipe, numbers in (("default", epochs), ("original", epochs[-1:]))
        for number in numbers
    ]
    jobs = {
        f"{recipe}-{number}-{seed}": [
            *data,
            *args.model_flags,
            *("--recipe", recipe, "--num_epochs", number, "--seed", seed),
        ]
        for recipe, number in kinds
        for seed in range(args.seeds)
    }
    # What test.py has no use for are the flags of the encoder.
    several = [*data[: data.index("--encoder")], "--clips", SEVERAL, "--num_workers", 1]
    runs = train_all(jobs, args.folder, available_cores(), {"several": several})
    table = [row("logistic regression on the mean of all frames", probe[None], groups)]
    for recipe, number in kinds:
        mine = [runs[f"{recipe}-{number}-{seed}"] for seed in range(args.seeds)]
        for other, views in (("", 1), ("several", SEVERAL)):
            reports = [(run.others[other] if other else run.test).report for run in mine]
            loss = statistics.mean(report["figures"]["loss_nats"] for report in reports)
            name = f"{args.model}, {recipe} recipe, {number} epochs, --clips {views}"
            table.append(row(name, right_of(mine, other), groups, [f"{loss:.2f}"]))
    head = ["what", "top-1, mean", "seeds", "95 % interval", "loss, nats"]
    title = f"Split {args.split_number}, {args.encoder} at {args.img_dim} px, {args.streams}, "
    print_table(f"{title}{len(clips)} test clips, {args.seeds} seeds", head, table)


def ablation(args: argparse.Namespace, data: list[object], epochs: int) -> None:
    """One part of the recipe changed at a time, each seed with other groups held out."""
    chosen = {name: flags for name, flags in ABLATION.items() if not args.only or name in args.only}
    held = [*data, *args.model_flags, "--val_fraction", 1 / 3, "--num_epochs", epochs]
    jobs = {
        f"{name}-{seed}": [*held, "--seed", seed, *flags]
        for name, flags in chosen.items()
        for seed in range(args.seeds)
    }
    runs = train_all(jobs, args.folder, available_cores())
    table = []
    for name in chosen:
        ends = [runs[f"{name}-{seed}"].history[-1] for seed in range(args.seeds)]
        accuracy = [float(end["val_accuracy"]) for end in ends]
        default = [float(runs[f"default-{seed}"].history[-1]["val_accuracy"]) for seed in range(args.seeds)]
        change = [one - other for one, other in zip(accuracy, default, strict=True)]
        error = statistics.stdev(change) / len(change) ** 0.5
        loss = statistics.mean(float(end["val_loss"]) for end in ends)
        table.append(
            [
                name,
                f"{statistics.mean(accuracy):.1f} %",
                f"{min(accuracy):.1f} to {max(accuracy):.1f}",
                "" if name == "default" else f"{statistics.mean(change):+.1f} ± {error:.1f}",
                f"{loss:.2f}",
            ]
        )
    head = ["recipe", "top-1, mean", "seeds", "against the default, ± standard error", "loss, nats"]
    title = f"A third of the training groups of split {args.split_number} held out, {args.model}, "
    title += f"{args.encoder} at {args.img_dim} px, {args.streams}"
    print_table(f"{title}, {epochs} epochs, {args.seeds} seeds", head, table)


def order(args: argparse.Namespace, data: list[object], epochs: int) -> None:
    """The toy pairs that only the order of frames tells apart: which of the two a clip of either is.

    A guess is right in half of the cases. Each model is tested with the frames in their order, and out of it.
    """
    clips, probabilities = linear_probe(data)
    labels = {clip.name.split("/")[0]: clip.label for clip in clips}
    jobs = {
        f"{model}-{seed}": [*data, "--model", model, "--num_epochs", epochs, "--seed", seed]
        for model in MODELS
        for seed in range(args.seeds)
    }
    shuffled = [*data[: data.index("--encoder")], "--shuffle_frames", "--num_workers", 1]
    runs = train_all(jobs, args.folder, available_cores(), {"shuffled": shuffled})
    table = []
    for pair in ORDER_PAIRS:
        if not set(pair) <= set(labels):
            continue
        mine = [index for index, clip in enumerate(clips) if clip.name.split("/")[0] in pair]
        two = probabilities[mine][:, [labels[name] for name in pair]]
        probe = 100 * np.mean(
            two.argmax(1) == [pair.index(clips[index].name.split("/")[0]) for index in mine]
        )
        head = [" / ".join(pair), str(len(mine))]
        table.append([*head, "logistic regression", f"{probe:.1f} %", ""])
        for model in MODELS:
            of_model = [runs[f"{model}-{seed}"] for seed in range(args.seeds)]
            cells = []
            for other in ("", "shuffled"):
                seeds = np.array(
                    [told_apart(run.others[other] if other else run.test, pair) for run in of_model]
                )
                cells.append(f"{seeds.mean():.1f} % ({seeds.min():.1f} to {seeds.max():.1f})")
            table.append([*head, model, *cells])
    head = ["pair", "test clips", "model", "frames in order", "frames shuffled"]
    title = f"Order of frames, toy data ({args.actions}), {args.encoder} at {args.img_dim} px"
    print_table(f"{title}, {epochs} epochs, {args.seeds} seeds", head, table)


def told_apart(tested: Tested, pair: tuple[str, str]) -> float:
    """Of the clips of two classes, how many percent have the higher probability of the two for their own."""
    rows = [row for row in tested.predictions if row["label"] in pair]
    right = [max(pair, key=lambda name: float(row[name])) == row["label"] for row in rows]
    return 100 * statistics.mean(right)


def print_table(title: str, head: list[str], table: list[list[str]]) -> None:
    rows = [[*cells, *[""] * (len(head) - len(cells))] for cells in table]
    print(f"\n### {title}\n\n{markdown([head, *rows])}\n")


def main() -> int:
    """Train, test, and print a table; returns the exit status."""
    flags = common.data_parser(__doc__.split("\n")[0])
    flags.add_argument("--device", default="auto", help="of train.py")
    flags.add_argument("what", choices=("test", "ablation", "order"))
    flags.add_argument("--encoder", default="efficientnet_lite0")
    flags.add_argument("--model", default="ConvLSTM")
    flags.add_argument("--streams", default="rgb")
    flags.add_argument("--img_dim", type=int, default=None, help="default: 224, and 112 for order")
    flags.add_argument("--split_number", type=int, default=1)
    flags.add_argument("--seeds", type=int, default=5)
    flags.add_argument("--num_epochs", type=int, nargs="+", default=[20])
    flags.add_argument("--actions", choices=KINDS, default="single", help="of the toy data, for order")
    flags.add_argument("--only", nargs="+", help="rows of the ablation, the default among them")
    flags.add_argument("--cache_path", type=Path, help="default: beside the data set, as train.py")
    args = flags.parse_args()
    toy = args.what == "order"
    args.img_dim = args.img_dim or (112 if toy else 224)
    args.model_flags = ["--model", args.model, "--streams", args.streams]
    print(common.machine(choose_device(args.device)))
    with common.folder_for_logs() as folder:
        args.folder = folder / "runs"
        if toy:
            args.data = folder / "toy"
            drawing = [sys.executable, "data/make_toy_actions.py", "--output_path", str(args.data)]
            drawing += ["--actions", args.actions]
            subprocess.run(drawing, cwd=ROOT, check=True)
        args.cache_path = args.cache_path or beside(args.data / "UCF-101", "-embeddings")
        data: list[object] = ["--dataset_path", args.data / "UCF-101", "--cache_path", args.cache_path]
        data += ["--split_path", args.data / "ucfTrainTestlist", "--split_number", args.split_number]
        data += ["--encoder", args.encoder, "--img_dim", args.img_dim, "--num_workers", 1]
        data += ["--device", args.device]
        if toy:
            order(args, [*data, "--no_flip", "--sequence_length", 16], args.num_epochs[-1])
        elif args.what == "test":
            test(args, data, args.num_epochs)
        else:
            ablation(args, data, args.num_epochs[-1])
    return 0


if __name__ == "__main__":
    run(main)
