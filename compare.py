"""Train several models on one cache, several seeds each, and compare them in a table and a picture.

    python3 compare.py --encoder efficientnet_lite0 --num_epochs 20
    python3 compare.py --models ConvLSTM "ActionBERT --pretrain 10" --seeds 3 --encoder efficientnet_lite0

Flags that are not its own go to train.py, for all models or, within quotes, for one. Everything is written
to a folder below runs: compare.md, compare.csv, compare.png, and a folder for each training.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from utils.flags import COUNT, flags_first
from utils.process import UserError, available_cores, run

HERE = Path(__file__).resolve().parent
# Clips classified at once, and how often, where that is timed.
CLIPS, REPEATS = 16, 7


def get_args_parser() -> argparse.ArgumentParser:
    """The flags of compare.py."""
    parser = argparse.ArgumentParser(
        # A short --seed is train.py's, not the beginning of --seeds.
        allow_abbrev=False,
        description=__doc__.split("\n")[0],
        epilog="Other flags are those of train.py; see its --help.",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        help='what to compare; default: all. Quotes take flags for one model: "ActionBERT --pretrain 10"',
    )
    parser.add_argument(
        "--seeds",
        type=COUNT,
        default=5,
        help="trainings of each; 5 (default) show how far chance alone moves a figure",
    )
    parser.add_argument(
        "--jobs",
        type=COUNT,
        default=1,
        help="trainings side by side, which share the cores; 1 (default) tells the time of a single one",
    )
    parser.add_argument(
        "--run_path",
        type=Path,
        default=Path("runs/compare"),
        help="folder for what is written, numbered if it is there",
    )
    return parser


flags_first(__name__, get_args_parser)

import numpy as np
import torch
from tqdm import tqdm

from models import MODELS
from training.checkpoint import Checkpoint, load_checkpoint
from training.pictures import png
from training.report import interval, markdown
from utils.files import csv_bytes, unused, write_whole


@dataclass(frozen=True)
class Tested:
    """What a test left.

    Attributes:
        report: as report.json has it
        predictions: a row for each clip
    """

    report: dict[str, Any]
    predictions: list[dict[str, str]]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """From the folder of a test's report."""
        report = json.loads((folder / "report.json").read_text())
        return cls(report, read_rows(folder / "predictions.csv"))

    @property
    def right(self) -> np.ndarray:
        """Whether each clip is named right (N,) bool."""
        return np.array([clip["correct"] == "1" for clip in self.predictions])


@dataclass(frozen=True)
class Training:
    """What a training by train.py left, besides its checkpoints.

    Attributes:
        test: of its last checkpoint
        others: other tests of that, by name
        history: a row for each epoch
        seconds: that the epochs took, those of the pretraining included, without tests and reading
        clips_per_second: that the head classifies from embeddings, in batches of `CLIPS`
    """

    test: Tested
    others: dict[str, Tested]
    history: list[dict[str, str]]
    seconds: float
    clips_per_second: float


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file by the names in its first one."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run_command(*words: object, threads: int) -> None:
    """Run one of this repository's commands.

    Raises: UserError with its message if it fails.
    """
    done = subprocess.run(
        [sys.executable, str(HERE / str(words[0])), *map(str, words[1:])],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        line = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"status {done.returncode}"
        raise UserError(f"{shlex.join(map(str, words))}: {line}")


def classify_rate(checkpoint: Checkpoint, device: torch.device, threads: int) -> float:
    """Clips/s that the head classifies from embeddings, the median of some batches, on the device given."""
    model, before = checkpoint.model.to(device), torch.get_num_threads()
    shape = (CLIPS, checkpoint.sequence_length, model.width)
    embeddings = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    torch.set_num_threads(threads)
    seconds = []
    with torch.no_grad():
        model.classify(embeddings).cpu()
        for _ in range(REPEATS):
            started = time.perf_counter()
            # The copy waits for the device.
            model.classify(embeddings).cpu()
            seconds.append(time.perf_counter() - started)
    torch.set_num_threads(before)
    return CLIPS / statistics.median(seconds)


def train_once(
    flags: Sequence[object], folder: Path, threads: int, others: Mapping[str, Sequence[object]]
) -> Training:
    """Run train.py, and test.py in other ways; the checkpoints are gone afterwards.

    Args:
        flags: without those that say where to write
        folder: for the run
        others: flags of other tests by name, without those that say what is tested

    Raises: UserError with its message if it fails.
    """
    with tempfile.TemporaryDirectory() as checkpoints:
        run_command("train.py", *flags, "--output_path", checkpoints, "--run_path", folder, threads=threads)
        test = Tested.read(folder / "test")
        path = Path(test.report["checkpoint"])
        for name, more in others.items():
            tested = ["--checkpoint_model", path, "--run_path", folder / name]
            run_command("test.py", *more, *tested, threads=threads)
        rate = classify_rate(load_checkpoint(path), torch.device(test.report["device"]), threads)
    history, before = read_rows(folder / "history.csv"), folder / "pretraining" / "history.csv"
    epochs = history + (read_rows(before) if before.exists() else [])
    seconds = sum(float(epoch["seconds"]) for epoch in epochs)
    return Training(test, {name: Tested.read(folder / name) for name in others}, history, seconds, rate)


def train_all(
    jobs: Mapping[str, Sequence[object]],
    folder: Path,
    side_by_side: int = 1,
    others: Mapping[str, Sequence[object]] = MappingProxyType({}),
) -> dict[str, Training]:
    """`train_once` with the flags of each job, in a folder of its name."""
    threads = max(1, available_cores() // side_by_side)
    results: dict[str, Training] = {}
    with ThreadPoolExecutor(side_by_side) as pool:
        futures = {
            name: pool.submit(train_once, flags, folder / name, threads, others)
            for name, flags in jobs.items()
        }
        try:
            for name, future in tqdm(futures.items(), unit="training", dynamic_ncols=True):
                results[name] = future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return results


HEAD = (
    "model",
    "top-1, mean",
    "seeds",
    "95 % interval",
    "loss, nats",
    "trained parameters",
    "training, s",
    "clips/s",
)


def row(name: str, trainings: Sequence[Training]) -> list[str]:
    """A row of the table; the interval is that of the mean over the seeds, by groups of clips."""
    top1 = [training.test.report["figures"]["top1_percent"] for training in trainings]
    right = np.mean([training.test.right for training in trainings], axis=0)
    ends = interval(right, [clip["group"] for clip in trainings[0].test.predictions])
    loss = statistics.mean(training.test.report["figures"]["loss_nats"] for training in trainings)
    return [
        name,
        f"{statistics.mean(top1):.1f} %",
        f"{min(top1):.1f} to {max(top1):.1f}",
        f"{ends[0]:.1f} to {ends[1]:.1f} %" if ends else "",
        f"{loss:.2f}",
        f"{trainings[0].test.report['trained_parameters']:,}",
        f"{statistics.median(training.seconds for training in trainings):.3g}",
        f"{statistics.median(training.clips_per_second for training in trainings):,.0f}",
    ]


def picture(results: dict[str, list[Training]], title: str) -> bytes:
    """Top-1 of each model, every seed a dot, as the bytes of a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure((8, 0.5 * len(results) + 1.6), layout="constrained")
    axes = figure.add_subplot()
    for place, (name, trainings) in enumerate(reversed(results.items())):
        top1 = [training.test.report["figures"]["top1_percent"] for training in trainings]
        axes.plot(top1, [place] * len(top1), "o", color="#4878a8", alpha=0.5, markersize=6)
        axes.plot(statistics.mean(top1), place, "|", color="#c8553d", markersize=18, markeredgewidth=2)
        axes.text(1.01, place, name, transform=axes.get_yaxis_transform(), va="center", fontsize=9)
    axes.set_yticks([])
    axes.set_ylim(-0.6, len(results) - 0.4)
    axes.set_xlabel("top-1 on the test clips, %: each seed, and the mean")
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return png(figure)


def run_name(entry: str, seed: int) -> str:
    """The folder of a training: the model and its flags in a word, and the seed."""
    return f"{entry.replace(' --', '-').replace(' ', '')}-seed{seed}".replace("/", "-")


def main(argv: list[str] | None = None) -> int:
    """Train, compare, write; returns the exit status."""
    parser = get_args_parser()
    args, flags = parser.parse_known_args(argv)
    args.models = args.models or list(MODELS)
    for entry in args.models:
        if not entry.split() or entry.split()[0] not in MODELS:
            parser.error(f"--models {entry!r}: no such model; choose from {', '.join(MODELS)}")
    if own := [flag for flag in ("--model", "--seed", "--output_path", "--resume") if flag in flags]:
        parser.error(f"{own[0]} is set here for each training; leave it out")
    folder = unused(args.run_path)
    seeds = range(args.seeds)
    jobs: dict[str, list[object]] = {
        run_name(entry, seed): [*flags, "--model", *shlex.split(entry), "--seed", seed]
        for entry in args.models
        for seed in seeds
    }
    print(f"{len(jobs)} trainings into {folder}", flush=True)
    trained = train_all(jobs, folder, args.jobs)
    results = {entry: [trained[run_name(entry, seed)] for seed in seeds] for entry in args.models}
    rows = [list(HEAD), *(row(entry, trainings) for entry, trainings in results.items())]
    first = trained[next(iter(jobs))].test.report
    title = (
        f"{first['encoder']} at {first['img_dim']} px, split {first['split_number']}, "
        f"{first['figures']['clips']:,} test clips, {args.seeds} seeds"
    )
    command = shlex.join(["python3", "compare.py", *(argv if argv is not None else sys.argv[1:])])
    table = markdown(rows)
    write_whole(folder / "compare.md", f"{title}\n\n{table}\n\n`{command}`\n".encode())
    write_whole(folder / "compare.csv", csv_bytes(rows))
    write_whole(folder / "compare.png", picture(results, title))
    print(f"{title}\n\n{table}\n\nwritten to {folder}")
    return 0


if __name__ == "__main__":
    run(main)
