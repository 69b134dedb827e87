"""Trainings and their tests in processes of their own, some side by side; what is finished is kept."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import runpy
import shlex
import shutil
import statistics
import sys
import tempfile
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
from utils.files import json_bytes, write_whole
from utils.process import UserError, available_cores

ROOT = Path(__file__).resolve().parents[1]
# In the folder of a job: its flags, and once it is finished what no report has.
JOB = "job.json"
# What train.py writes there.
RUN = "run"
# Clips classified at once, and how often, where that is timed.
CLIPS, REPEATS = 16, 7


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

    @classmethod
    def read(cls, folder: Path, others: Sequence[str], clips_per_second: float) -> Self:
        """From the folder of a finished job."""
        history, before = (
            read_rows(folder / RUN / "history.csv"),
            folder / RUN / "pretraining" / "history.csv",
        )
        epochs = history + (read_rows(before) if before.exists() else [])
        seconds = sum(float(epoch["seconds"]) for epoch in epochs)
        tests = {name: Tested.read(folder / name) for name in others}
        return cls(Tested.read(folder / RUN / "test"), tests, history, seconds, clips_per_second)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file by the names in its first one."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _run_here(words: list[str], log: str, threads: int) -> None:
    """Be one of this repository's commands, in a process that has just begun."""
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), number)
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    sys.argv = [str(ROOT / words[0]), *words[1:]]
    sys.path.insert(0, str(ROOT))
    runpy.run_path(sys.argv[0], run_name="__main__")


def run_command(*words: object, threads: int) -> str:
    """Run one of this repository's commands in a process of its own; returns what it printed.

    The process is forked from one that has loaded what takes seconds.

    Raises: UserError with its message if it fails.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["train", "test", "features.fill"])
    texts = [str(word) for word in words]
    with tempfile.NamedTemporaryFile(prefix="action-recognition-", suffix=".log") as log:
        process = server.Process(target=_run_here, args=(texts, log.name, threads))
        process.start()
        try:
            process.join()
        finally:
            process.terminate()
        printed = Path(log.name).read_text(errors="replace")
    if process.exitcode:
        lines = printed.strip().splitlines()
        reason = lines[-1] if lines else f"status {process.exitcode}"
        raise UserError(f"{shlex.join(texts)}: {reason}")
    return printed


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


def finished(folder: Path, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """What is known of the finished job in a folder; None if there is none, and the folder may be used.

    Raises: UserError if the job there has other flags than `asked`, or the folder is none of a job.
    """
    if not folder.exists():
        return None
    path = folder / JOB
    if not path.is_file():
        raise UserError(
            f"{folder} is there, and holds no training of a comparison; choose another --run_path"
        )
    job: dict[str, Any] = json.loads(path.read_text())
    if {name: job.get(name) for name in asked} != dict(asked):
        raise UserError(f"{folder} holds a training with other flags; choose another --run_path")
    return job if "clips_per_second" in job else None


def train_once(
    flags: Sequence[object], folder: Path, threads: int, others: Mapping[str, Sequence[object]]
) -> Training:
    """Run train.py, and test.py in other ways, unless that was done; the checkpoints are gone afterwards.

    Args:
        flags: without those that say where to write
        folder: for the run; what an interrupted one left there is done anew
        others: flags of other tests by name, without those that say what is tested

    Raises: UserError with its message if it fails, or as `finished`.
    """
    asked: dict[str, Any] = {
        "flags": [str(flag) for flag in flags],
        "others": {name: [str(flag) for flag in more] for name, more in others.items()},
    }
    if job := finished(folder, asked):
        return Training.read(folder, list(others), job["clips_per_second"])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_whole(folder / JOB, json_bytes(asked))
    with tempfile.TemporaryDirectory() as checkpoints:
        printed = run_command(
            "train.py", *flags, "--output_path", checkpoints, "--run_path", folder / RUN, threads=threads
        )
        write_whole(folder / "train.log", printed.encode())
        test = Tested.read(folder / RUN / "test")
        checkpoint = Path(test.report["checkpoint"])
        for name, more in others.items():
            tested = ["--checkpoint_model", checkpoint, "--run_path", folder / name]
            run_command("test.py", *more, *tested, threads=threads)
        rate = classify_rate(load_checkpoint(checkpoint), torch.device(test.report["device"]), threads)
    write_whole(folder / JOB, json_bytes({**asked, "clips_per_second": rate}))
    return Training.read(folder, list(others), rate)


def train_all(
    jobs: Mapping[str, Sequence[object]],
    folder: Path,
    side_by_side: int = 1,
    others: Mapping[str, Sequence[object]] = MappingProxyType({}),
) -> dict[str, Training]:
    """`train_once` with the flags of each job, in a folder of its name, behind a bar."""
    threads = max(1, available_cores() // side_by_side)
    results: dict[str, Training] = {}
    with ThreadPoolExecutor(side_by_side) as pool:
        futures = {
            pool.submit(train_once, flags, folder / name, threads, others): name
            for name, flags in jobs.items()
        }
        try:
            for future in tqdm(as_completed(futures), total=len(jobs), unit="training", dynamic_ncols=True):
                results[futures[future]] = future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {name: results[name] for name in jobs}
