"""Whether it pays to train the encoder too: 2 N epochs over embeddings, or N and then N more over frames.

python3 benchmarks/finetuning.py
python3 benchmarks/finetuning.py --encoder i3d --sequence_length 2 --groups 1 2 --draws 3

Each training is one of train.py with its defaults. With --groups some groups of each class have labels, drawn
anew for each draw and split.
"""

import argparse
import csv
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import numpy as np
import torch
from few_labels import draw
from tqdm import tqdm

from splits.datasets import Listed
from training.report import interval, markdown
from utils.files import beside
from utils.process import UserError, run


def tested(
    args: argparse.Namespace, lists: Path, number: int, words: list[object]
) -> tuple[list[tuple[str, int]], float]:
    """Group of each test clip, and whether a training names it right; accuracy behind its frozen epochs."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, common.ROOT / "train.py", *common.data_flags(args), "--split_path", lists,
            "--encoder", args.encoder, "--img_dim", args.img_dim, "--sequence_length", args.sequence_length,
            "--model", args.model, "--split_number", number, "--precision", "bf16",
            "--checkpoint_interval", 1000, "--output_path", folder, "--run_path", f"{folder}/run", *words,
        ]  # fmt: skip
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"train.py: {done.stderr.strip().splitlines()[-1]}")
        with (Path(folder) / "run/test/predictions.csv").open(newline="") as file:
            found = [(row["group"], int(row["correct"])) for row in csv.DictReader(file)]
        with (Path(folder) / "run/history.csv").open(newline="") as file:
            accuracies = [row["test_accuracy"] for row in csv.DictReader(file)]
        return found, float(next(filter(None, accuracies)))


def stores(args: argparse.Namespace) -> set[Path]:
    """Folders of embeddings."""
    folder = args.cache_path or beside(args.data / "UCF-101", "-embeddings")
    return set(folder.iterdir()) if folder.is_dir() else set()


def cell(values: np.ndarray, groups: list[str]) -> str:
    """A mean in percent, and its 95 % interval over groups."""
    ends = interval(values, groups) if values.any() else None
    mean = 100 * float(values.mean())
    return f"{mean:.1f} %" + (f" ({ends[0]:.1f} to {ends[1]:.1f})" if ends else "")


def main() -> int:
    """Train both ways on each split and draw, and print a table; returns the exit status."""
    flags = common.parser(__doc__.split("\n")[0])
    flags.add_argument("--encoder", default="efficientnet_lite0")
    flags.add_argument("--model", default="LinearProbe")
    flags.add_argument("--img_dim", type=int, default=112)
    flags.add_argument("--sequence_length", type=int, default=8)
    flags.add_argument(
        "--groups", type=int, nargs="+", default=[0], help="of each class; 0 (default) for all"
    )
    flags.add_argument("--draws", type=int, default=1, help="of groups, for each split")
    flags.add_argument("--num_epochs", type=int, default=10, help="N")
    args = flags.parse_args()
    listed, official = Listed(common.data_settings(args.data)), args.data / "ucfTrainTestlist"
    ways: dict[str, list[object]] = {
        "frozen": ["--num_epochs", 2 * args.num_epochs],
        "finetuned": ["--num_epochs", args.num_epochs, "--finetune"],
    }
    behind = f"behind the first {args.num_epochs}"
    rows = [["labeled groups of a class", "clips", "frozen", behind, "finetuned", "gain", "minutes of each"]]
    for groups in args.groups:
        right: dict[str, list[int]] = {way: [] for way in ways}
        minutes: dict[str, list[float]] = {way: [] for way in ways}
        names, clips, firsts = list[str](), list[int](), list[float]()
        places = [(number, seed) for number in listed.numbers for seed in range(args.draws)]
        for number, seed in tqdm(places, f"{groups or 'all'} groups"):
            train = listed.split(number).train
            train = draw(train, groups, None, [number, seed]) if groups else train
            clips.append(len(train))
            with tempfile.TemporaryDirectory() as folder:
                lists = Path(shutil.copytree(official, Path(folder) / "lists"))
                lines = [f"{clip.name} {clip.label + 1}\n" for clip in train]
                (lists / f"trainlist{number:02d}.txt").write_text("".join(lines))
                for way, words in ways.items():
                    kept, started = stores(args), time.monotonic()
                    found, first = tested(args, lists, number, [*words, "--seed", seed])
                    minutes[way].append((time.monotonic() - started) / 60)
                    # Embeddings of a trained encoder, made last, are of use to its test alone.
                    if way == "finetuned":
                        new = stores(args) - kept
                        shutil.rmtree(max(new, key=lambda store: (store / "encoder.json").stat().st_mtime))
                    right[way] += [correct for _, correct in found]
            names += [group for group, _ in found]
            firsts.append(first)
        arrays = {way: np.array(values) for way, values in right.items()}
        gain = cell(arrays["finetuned"] - arrays["frozen"], names).replace(" %", "", 1)
        took = ", ".join(f"{statistics.median(values):.1f}" for values in minutes.values())
        of = f"{statistics.mean(clips):.0f}"
        cells = [cell(arrays["frozen"], names), f"{statistics.mean(firsts):.1f} %"]
        rows.append([str(groups or "all"), of, *cells, cell(arrays["finetuned"], names), gain, took])
    print(common.machine(torch.device("cpu")))
    print(
        f"\n### {args.encoder} at {args.img_dim} px, {args.sequence_length} embeddings, {args.model}, "
        f"{len(listed.numbers)} splits, {args.draws} draws of labels; 95 % intervals over groups\n\n"
        f"{markdown(rows)}\n"
    )
    return 0


if __name__ == "__main__":
    run(main)
