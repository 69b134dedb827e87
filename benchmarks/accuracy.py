"""How accurate the recipe is, and what each part of it is worth.

    python3 benchmarks/accuracy.py test           # the test list: recipes and a linear probe, several seeds
    python3 benchmarks/accuracy.py ablation       # held-out groups: one part changed at a time
    python3 benchmarks/accuracy.py order          # toy data: the pairs that only the order of frames tells

Settings are compared on groups held out of the training list, never on the test list: who chooses by the
test list tests no more. Each training is train.py in a process of its own; several run side by side, one
thread each.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import common
import numpy as np
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

import cli
from cache import EmbeddingCache
from encoders import Encoder
from features import open_cache
from report import interval
from splits import Clip, load_split

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
    "frame dropout 0.3": ["--frame_dropout", 0.3],
    "mixup 0.4": ["--mixup", 0.4],
    "gradients not cut": ["--clip_norm", 0],
    "BatchNorm momentum 0.01": ["--norm_momentum", 0.01],
    "BatchNorm frozen after 40 %": ["--norm_freeze", 0.4],
    "average of the weights": ["--ema", 0.05],
}
K = TypeVar("K")
# Clips of a video of UCF-101 that have nearly all of its frames together.
SEVERAL = 4

PAIRS = (("WalkLeft", "WalkRight"), ("SitDown", "StandUp"))


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def command(*words: object) -> None:
    """Run one of the commands, on a single thread: several run side by side."""
    done = subprocess.run(
        [sys.executable, *map(str, words), "--num_workers", "1"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])


def train(flags: list[object], folder: Path, clips: int) -> dict[str, Any]:
    """Run train.py, and test.py with several clips of each video; returns what they wrote."""
    data = flags[: flags.index("--encoder")]
    command("train.py", *flags, "--output_path", folder / "out", "--run_path", folder / "run")
    report = json.loads((folder / "run/test/report.json").read_text())
    several = folder / "several"
    if clips > 1:
        checkpoint = ["--checkpoint_model", report["checkpoint"], "--clips", clips]
        command("test.py", *data, *checkpoint, "--run_path", several)
    for path in (folder / "out").glob("*.pth"):
        path.unlink()
    return {
        "report": report,
        "history": rows(folder / "run/history.csv"),
        "clips": rows(folder / "run/test/predictions.csv"),
        "several": rows(several / "predictions.csv") if clips > 1 else [],
        "several_report": json.loads((several / "report.json").read_text()) if clips > 1 else {},
    }


def train_all(jobs: dict[K, list[object]], clips: int = 1) -> dict[K, dict[str, Any]]:
    """`train` with the flags of each job, as many side by side as there are cores."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(cli.available_cores()) as pool:
        futures = {
            key: pool.submit(train, flags, Path(folder) / str(number), clips)
            for number, (key, flags) in enumerate(jobs.items())
        }
        return {key: future.result() for key, future in tqdm(futures.items(), unit="training")}


def mean_pooled(clips: list[Clip], cache: EmbeddingCache) -> np.ndarray:
    """The mean embedding of all frames of each clip (N, D)."""
    whole = [
        cache.gather([clip], np.arange(cache.frames(clip))[None], np.zeros(1, bool)).mean(1)[0].numpy()
        for clip in clips
    ]
    return np.stack(whole)


def linear_probe(args: argparse.Namespace) -> tuple[list[Clip], np.ndarray]:
    """scikit-learn's logistic regression on mean-pooled embeddings: the test clips, and what is right."""
    split = load_split(args.data / "UCF-101", args.data / "ucfTrainTestlist", args.split_number)
    device = cli.choose_device(args.device)
    encoder = Encoder(args.encoder).to(device)
    encoder.prepare(cli.choose_dtype("auto", device))
    every = split.train + split.test
    cache = open_cache(args.cache_path, every, encoder, args.img_dim, flip=not args.no_flip, threads=2)
    probe = LogisticRegression(max_iter=10_000)
    probe.fit(mean_pooled(split.train, cache), [clip.label for clip in split.train])
    said = probe.predict(mean_pooled(split.test, cache))
    return split.test, said == np.array([clip.label for clip in split.test])


def right_of(runs: Sequence[dict[str, Any]], part: str = "clips") -> np.ndarray:
    """Whether each run has each test clip right: (runs, N)."""
    return np.array([[clip["correct"] == "1" for clip in run[part]] for run in runs])


def row(name: str, right: np.ndarray, groups: list[str], extra: Sequence[str] = ()) -> list[str]:
    """A row of the table of tests; the interval is that of the mean over the seeds."""
    seeds = 100 * right.mean(1)
    ends = interval(right.mean(0), groups)
    assert ends is not None
    spread = f"{seeds.min():.1f} to {seeds.max():.1f}" if len(seeds) > 1 else "one solution"
    return [name, f"{seeds.mean():.1f} %", spread, f"{ends[0]:.1f} to {ends[1]:.1f} %", *extra]


def test(args: argparse.Namespace, data: list[object], epochs: Sequence[int]) -> None:
    """Recipes and the linear probe on the test list."""
    clips, probe = linear_probe(args)
    groups = [clip.group for clip in clips]
    jobs = {
        (recipe, number, seed): [*data, "--recipe", recipe, "--num_epochs", number, "--seed", seed]
        for recipe, numbers in (("default", epochs), ("original", epochs[-1:]))
        for number in numbers
        for seed in range(args.seeds)
    }
    runs = train_all(jobs, SEVERAL)
    table = [row("logistic regression on the mean of all frames", probe[None], groups)]
    for recipe, number, _ in [key for key in jobs if key[2] == 0]:
        mine = [runs[recipe, number, seed] for seed in range(args.seeds)]
        for part, report, views in (("clips", "report", 1), ("several", "several_report", SEVERAL)):
            loss = statistics.mean(run[report]["figures"]["loss_nats"] for run in mine)
            name = f"ConvLSTM, {recipe} recipe, {number} epochs, --clips {views}"
            table.append(row(name, right_of(mine, part), groups, [f"{loss:.2f}"]))
    head = ["what", "top-1, mean", "seeds", "95 % interval", "loss, nats"]
    title = f"Split {args.split_number}, {args.encoder} at {args.img_dim} px, {len(clips)} test clips"
    print_table(f"{title}, {args.seeds} seeds", head, table)


def ablation(args: argparse.Namespace, data: list[object], epochs: int) -> None:
    """One part of the recipe changed at a time, each seed with other groups held out."""
    chosen = {name: flags for name, flags in ABLATION.items() if not args.only or name in args.only}
    held = [*data, "--val_fraction", 1 / 3, "--num_epochs", epochs]
    jobs = {
        (name, seed): [*held, "--seed", seed, *flags]
        for name, flags in chosen.items()
        for seed in range(args.seeds)
    }
    runs = train_all(jobs)
    table = []
    for name in chosen:
        ends = [runs[name, seed]["history"][-1] for seed in range(args.seeds)]
        accuracy = [float(end["val_accuracy"]) for end in ends]
        default = [float(runs["default", seed]["history"][-1]["val_accuracy"]) for seed in range(args.seeds)]
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
    title = f"A third of the training groups of split {args.split_number} held out, {args.encoder} at "
    print_table(f"{title}{args.img_dim} px, {epochs} epochs, {args.seeds} seeds", head, table)


def order(args: argparse.Namespace, data: list[object], epochs: int) -> None:
    """The toy pairs that only the order of frames tells apart, among the clips of a pair."""
    clips, probe = linear_probe(args)
    jobs = {seed: [*data, "--num_epochs", epochs, "--seed", seed] for seed in range(args.seeds)}
    right = right_of(list(train_all(jobs).values()))
    table = []
    for pair in PAIRS:
        mine = np.array([clip.name.split("/")[0] in pair for clip in clips])
        seeds = 100 * right[:, mine].mean(1)
        table.append(
            [
                " / ".join(pair),
                str(mine.sum()),
                f"{100 * probe[mine].mean():.1f} %",
                f"{seeds.mean():.1f} % ({seeds.min():.1f} to {seeds.max():.1f})",
            ]
        )
    head = ["pair", "test clips", "logistic regression on mean-pooled frames", "ConvLSTM"]
    print_table(f"Order of frames, toy data, {epochs} epochs, {args.seeds} seeds", head, table)


def print_table(title: str, head: list[str], table: list[list[str]]) -> None:
    print(f"\n### {title}\n")
    for cells in (head, ["---"] * len(head), *table):
        print("| " + " | ".join([*cells, *[""] * (len(head) - len(cells))]) + " |")


def main() -> None:
    flags = common.parser(__doc__.split("\n")[0])
    flags.add_argument("what", choices=("test", "ablation", "order"))
    flags.add_argument("--encoder", default="efficientnet_lite0")
    flags.add_argument("--img_dim", type=int, default=None, help="default: 224, and 112 for order")
    flags.add_argument("--split_number", type=int, default=1)
    flags.add_argument("--seeds", type=int, default=5)
    flags.add_argument("--num_epochs", type=int, nargs="+", default=[20])
    flags.add_argument("--only", nargs="+", help="rows of the ablation, the default among them")
    flags.add_argument("--cache_path", type=Path, help="default: beside the data set, as train.py")
    args = flags.parse_args()
    toy = args.what == "order"
    args.img_dim = args.img_dim or (112 if toy else 224)
    args.no_flip = toy
    print(common.machine(cli.choose_device(args.device)))
    with tempfile.TemporaryDirectory() as folder:
        if toy:
            args.data = Path(folder) / "toy"
            drawing = [sys.executable, "data/make_toy_actions.py", "--output_path", str(args.data)]
            subprocess.run(drawing, cwd=ROOT, check=True)
        args.cache_path = args.cache_path or cli.beside(args.data / "UCF-101", "-embeddings")
        data: list[object] = ["--dataset_path", args.data / "UCF-101", "--cache_path", args.cache_path]
        data += ["--split_path", args.data / "ucfTrainTestlist", "--split_number", args.split_number]
        data += ["--encoder", args.encoder, "--img_dim", args.img_dim]
        if toy:
            order(args, [*data, "--no_flip", "--sequence_length", 16], args.num_epochs[-1])
        elif args.what == "test":
            test(args, data, args.num_epochs)
        else:
            ablation(args, data, args.num_epochs[-1])


if __name__ == "__main__":
    main()
