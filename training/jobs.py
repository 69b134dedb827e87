"""Trainings and their tests in processes of their own, some side by side; what is finished is kept."""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import torch
from tqdm import tqdm

from training.checkpoint import Checkpoint, load_checkpoint
from training.settings import TrainSettings
from utils.files import json_bytes, write_whole
from utils.process import UserError, available_cores

ROOT = Path(__file__).resolve().parents[1]
# What train.py writes, in the folder of a job.
RUN = "run"
# Clips classified at once, and how often and how long at least, where that is timed.
CLIPS, REPEATS, LEAST_SECONDS = 16, 7, 0.2
BAR_SECONDS = 0.5
# One at a time is timed.
_timing = threading.Lock()


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
    def top1(self) -> float:
        """Accuracy in percent."""
        return float(self.report["figures"]["top1_percent"])

    @property
    def right(self) -> np.ndarray:
        """Whether each clip is named right (N,) bool."""
        return np.array([clip["correct"] == "1" for clip in self.predictions])

    @property
    def groups(self) -> list[str]:
        """The group of each clip."""
        return [clip["group"] for clip in self.predictions]


@dataclass(frozen=True)
class Training:
    """What a training by train.py left, besides its checkpoints.

    Attributes:
        test: of its last checkpoint, with --val_fraction of its best one
        others: other tests of that, by name
        history: a row for each epoch
        seconds: that the epochs took, those of the pretraining included, without tests and reading
        clips_per_second: that the head classifies from embeddings, in batches of `CLIPS`
        threads, side_by_side: that it computed with, and trainings at a time, which these figures hang on
    """

    test: Tested
    others: dict[str, Tested]
    history: list[dict[str, str]]
    seconds: float
    clips_per_second: float
    threads: int
    side_by_side: int

    @classmethod
    def read(cls, folder: Path, others: Sequence[str], job: Mapping[str, Any]) -> Self:
        """From the folder of a finished job, and what `read_job` gives."""
        history, before = (
            read_rows(folder / RUN / "history.csv"),
            folder / RUN / "pretraining" / "history.csv",
        )
        epochs = history + (read_rows(before) if before.exists() else [])
        seconds = sum(float(epoch["seconds"]) for epoch in epochs)
        tests = {name: Tested.read(folder / name) for name in others}
        return cls(
            Tested.read(folder / RUN / "test"), tests, history, seconds, float(job["clips_per_second"]),
            int(job["threads"]), int(job["side_by_side"]),
        )  # fmt: skip


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file by the names in its first one."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class Commands:
    """Runs commands of this repository, and ends those that run."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._lock, self._ended = threading.Lock(), False

    def run(self, *words: object, threads: int, log: Path, show: bool = False) -> str:
        """Run one to its end; returns what it printed, which `log` is written with meanwhile.

        Args:
            show: its progress bar

        Raises: UserError with its message if it fails.
        """
        texts = [str(word) for word in words]
        with log.open("w") as file:
            with self._lock:
                if self._ended:
                    raise UserError(f"{shlex.join(texts)}: not begun")
                process = subprocess.Popen(
                    [sys.executable, str(ROOT / texts[0]), *texts[1:]],
                    env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
                self._running.add(process)
            if show:
                _show_bar(process, log)
            status = process.wait()
            with self._lock:
                self._running.discard(process)
        printed = log.read_text(errors="replace")
        if status < 0:
            killed = signal.Signals(-status).name
            raise UserError(
                f"{shlex.join(texts)}: killed by {killed}, perhaps for lack of memory; lower --jobs ({log})"
            )
        if status:
            lines = printed.strip().splitlines()
            raise UserError(f"{shlex.join(texts)}: {lines[-1] if lines else f'status {status}'} ({log})")
        return printed

    def end(self) -> None:
        """End all that run, and begin no other."""
        with self._lock:
            self._ended = True
            for process in self._running:
                process.terminate()


def _show_bar(process: subprocess.Popen[str], log: Path) -> None:
    shown = False
    with log.open(errors="replace") as file:
        while process.poll() is None:
            bar = file.read().rsplit("\r", 1)[-1]
            if "%|" in bar:
                print(f"\r{bar}", end="", file=sys.stderr, flush=True)
                shown = True
            time.sleep(BAR_SECONDS)
    if shown:
        print(file=sys.stderr)


def classify_rate(checkpoint: Checkpoint, device: torch.device, threads: int) -> float:
    """Clips/s that the head classifies from embeddings, the median of some batches, on the device given."""
    model, before = checkpoint.model.to(device), torch.get_num_threads()
    shape = (CLIPS, checkpoint.sequence_length, model.width)
    embeddings = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    torch.set_num_threads(threads)
    seconds: list[float] = []
    with torch.no_grad():
        model.classify(embeddings).cpu()
        # A small head takes less than a millisecond, which says little alone.
        while len(seconds) < REPEATS or sum(seconds) < LEAST_SECONDS:
            started = time.perf_counter()
            # The copy waits for the device.
            model.classify(embeddings).cpu()
            seconds.append(time.perf_counter() - started)
    torch.set_num_threads(before)
    return CLIPS / statistics.median(seconds)


def asked(
    flags: Sequence[object], others: Mapping[str, Sequence[object]] = MappingProxyType({})
) -> dict[str, Any]:
    """What a job is asked for, as its file keeps it: settings of train.py, flags of other tests by name.

    Raises: as `TrainSettings.from_flags`.
    """
    return {
        "settings": TrainSettings.from_flags(flags).plain(),
        "others": {name: [str(flag) for flag in more] for name, more in others.items()},
    }


def read_job(folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """What is known of a finished job; None if there is none, and the folder may be used.

    Args:
        folder: of the job; its file stands beside it
        wanted: as `asked` gives it

    Raises: UserError if the job there has other settings, or the folder is none of a job.
    """
    path = folder.with_name(f"{folder.name}.json")
    if not path.is_file():
        if folder.exists():
            raise UserError(f"{folder} is there, and no training of a comparison; choose another --run_path")
        return None
    try:
        job = json.loads(path.read_text())
        before = {name: job[name] for name in wanted}
        done = job.get("clips_per_second")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: damaged, or of an earlier version; delete it and {folder}, or choose another --run_path"
        ) from error
    if before != dict(wanted):
        there, now = ({**one["settings"], "other tests": one["others"]} for one in (before, wanted))
        differ = [
            f"{name} {there.get(name)} there, {now.get(name)} now"
            for name in sorted({*there, *now})
            if there.get(name) != now.get(name)
        ]
        raise UserError(
            f"{folder} holds a training with other settings ({'; '.join(differ)}); choose another --run_path"
        )
    return job if done is not None else None


def train_once(
    flags: Sequence[object],
    folder: Path,
    threads: int,
    side_by_side: int,
    others: Mapping[str, Sequence[object]],
    commands: Commands,
) -> Training:
    """Run train.py, and test.py in other ways, unless that was done; the checkpoints are gone afterwards.

    Args:
        flags: without those that say where to write
        folder: for the run; what an interrupted one left there is done anew
        threads: to compute with
        side_by_side: trainings at a time
        others: flags of other tests by name, without those that say what is tested

    Raises: UserError with its message if it fails, or as `read_job`.
    """
    wanted = asked(flags, others)
    if job := read_job(folder, wanted):
        return Training.read(folder, list(others), job)
    path = folder.with_name(f"{folder.name}.json")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # First, so that what an interrupted one leaves is known to be ours.
    write_whole(path, json_bytes(wanted))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with tempfile.TemporaryDirectory() as checkpoints:
        where = ["--output_path", checkpoints, "--run_path", folder / RUN]
        commands.run("train.py", *flags, *where, threads=threads, log=folder / "train.log")
        test = Tested.read(folder / RUN / "test")
        checkpoint = Path(test.report["checkpoint"])
        for name, more in others.items():
            tested = ["--checkpoint_model", checkpoint, "--run_path", folder / name]
            commands.run("test.py", *more, *tested, threads=threads, log=folder / f"{name}.log")
        with _timing:
            rate = classify_rate(load_checkpoint(checkpoint), torch.device(test.report["device"]), threads)
    job = {**wanted, "clips_per_second": rate, "threads": threads, "side_by_side": side_by_side}
    write_whole(path, json_bytes(job))
    return Training.read(folder, list(others), job)


def train_all(
    jobs: Mapping[str, Sequence[object]],
    folder: Path,
    side_by_side: int = 1,
    others: Mapping[str, Sequence[object]] = MappingProxyType({}),
) -> dict[str, Training]:
    """`train_once` with the flags of each job, in a folder of its name, behind a bar."""
    threads, commands = max(1, available_cores() // side_by_side), Commands()
    results: dict[str, Training] = {}
    with ThreadPoolExecutor(side_by_side) as pool:
        futures = {
            pool.submit(train_once, flags, folder / name, threads, side_by_side, others, commands): name
            for name, flags in jobs.items()
        }
        try:
            for future in tqdm(as_completed(futures), total=len(jobs), unit="training", dynamic_ncols=True):
                results[futures[future]] = future.result()
        except BaseException:
            commands.end()
            pool.shutdown(cancel_futures=True)
            raise
    return {name: results[name] for name in jobs}
