"""Compare encoders and heads: train each pair on all splits with several seeds, and write a table.

    python3 compare.py --encoders efficientnet_lite0 i3d --models ConvLSTM AttentiveProbe --seeds 3
    python3 compare.py --encoders i3d --models "ActionBERT --num_epochs 40" --dataset_path my_clips

Flags that are not its own go to train.py. Below --run_path it writes rows.csv, a row for each training, and
from that compare.md and compare.png. Rows that are there are not done again.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

import train
from features.networks import encoder_spec
from models import MODELS, check_model
from splits.datasets import ALL, DataSettings, open_listed
from training.pictures import png
from training.report import interval, markdown
from utils.files import csv_bytes, make_writable_folder, write_whole
from utils.flags import COUNT, Parser, read, typed
from utils.process import UserError, run

# Flags of train.py that are set here for each training.
OWN = ("encoder", "model", "seed", "output_path", "run_path", "resume")
COLUMNS = (
    *("encoder", "model", "split", "seed", "flags", "top1_percent", "loss_nats", "clips", "parameters"),
    *("seconds", "correct", "groups"),
)

Row = dict[str, str]


def get_args_parser() -> Parser:
    """The flags of compare.py."""
    parser = Parser(
        description=__doc__.split("\n")[0],
        epilog="Other flags are those of train.py; see its --help.",
    )
    parser.add_argument(
        "--encoders", nargs="+", default=["efficientnet_lite0", "i3d"],
        help='encoders to compare; default: efficientnet_lite0 i3d; quotes take flags: "i3d --img_dim 112"',
    )  # fmt: skip
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), help="heads to compare; default: all; quotes take flags"
    )
    parser.add_argument("--seeds", type=COUNT, default=3, help="trainings of each pair and split; default 3")
    parser.add_argument("--run_path", type=Path, default=Path("runs/compare"), help="folder for results")
    return parser


def check_entry(entry: str, name: str) -> list[str]:
    """Name and flags of train.py of an entry. Raises: UserError for a wrong one."""
    try:
        words = shlex.split(entry) or [""]
        (encoder_spec if name == "encoders" else check_model)(words[0])
    except ValueError as error:
        raise UserError(f"--{name} {entry!r}: {error}") from error
    parser = train.get_args_parser()
    given = typed(parser, words[1:], parser.parse_args(words[1:]))
    if own := [flag for flag in (*OWN, "split_number") if flag in given]:
        raise UserError(f"--{name} {entry!r}: --{own[0]} is set here for each training; leave it out")
    return words


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV file by their columns."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def train_once(encoder: str, model: str, split: int, seed: int, flags: Sequence[str], folder: Path) -> Row:
    """Run train.py in this process; returns its row. Its log and report are kept, its checkpoints are not."""
    name = "-".join(f"{encoder}-{model}-split{split}-seed{seed}".replace("--", "").replace("/", "-").split())
    run_path = folder / name
    shutil.rmtree(run_path, ignore_errors=True)
    run_path.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as checkpoints, (run_path / "train.log").open("w") as log:
        words = [
            *flags, "--encoder", *shlex.split(encoder), "--model", *shlex.split(model),
            "--split_number", str(split), "--seed", str(seed),
            "--output_path", checkpoints, "--run_path", str(run_path / "run"),
        ]  # fmt: skip
        with contextlib.redirect_stdout(log):
            train.main(words)
    report = json.loads((run_path / "run" / "test" / "report.json").read_text())
    clips = read_rows(run_path / "run" / "test" / "predictions.csv")
    seconds = sum(float(epoch["seconds"]) for epoch in read_rows(run_path / "run" / "history.csv"))
    values = (
        encoder, model, split, seed, shlex.join(flags), report["figures"]["top1_percent"],
        report["figures"]["loss_nats"], len(clips), report["trained_parameters"], f"{seconds:.1f}",
        "".join(clip["correct"] for clip in clips),
        " ".join(clip["group"].replace(" ", "_") for clip in clips),
    )  # fmt: skip
    return {column: str(value) for column, value in zip(COLUMNS, values, strict=True)}


def summarize(rows: Sequence[Row]) -> tuple[float, list[float], tuple[float, float] | None]:
    """Of a pair's rows: mean accuracy in percent, that of each seed, and the 95 % interval by groups."""
    by_seed, right, groups = defaultdict(list), defaultdict(list), dict[str, list[str]]()
    for row in rows:
        by_seed[row["seed"]].append(float(row["top1_percent"]))
        right[row["split"]].append(np.array(list(row["correct"])) == "1")
        groups[row["split"]] = row["groups"].split(" ")
    means = [float(np.mean(values)) for values in by_seed.values()]
    pooled = np.concatenate([np.mean(values, axis=0) for values in right.values()])
    return float(np.mean(means)), means, interval(pooled, list(itertools.chain(*groups.values())))


def write_results(folder: Path, rows: Sequence[Row], command: str) -> str:
    """Write compare.md and compare.png from the rows; returns the table."""
    pairs: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        pairs[row["encoder"], row["model"]].append(row)
    splits = sorted({row["split"] for row in rows})
    table = [[
        *("encoder", "model", "top-1, mean", *(f"split {number}" for number in splits)),
        *("seeds", "95 % interval", "loss, nats", "trained parameters", "training, s"),
    ]]  # fmt: skip
    figure = Figure((9, 0.34 * len(pairs) + 1.8), layout="constrained")
    axes, encoders = figure.add_subplot(), list(dict.fromkeys(row["encoder"] for row in rows))
    for place, ((encoder, model), own) in enumerate(pairs.items()):
        mean, seeds, ends = summarize(own)
        of_split = [[float(row["top1_percent"]) for row in own if row["split"] == each] for each in splits]
        table.append([
            *(encoder, model, f"{mean:.1f} %", *(f"{np.mean(values):.1f}" for values in of_split)),
            f"{min(seeds):.1f} to {max(seeds):.1f}",
            f"{ends[0]:.1f} to {ends[1]:.1f} %" if ends else "",
            f"{np.mean([float(row['loss_nats']) for row in own]):.2f}",
            f"{int(own[0]['parameters']):,}", f"{np.median([float(row['seconds']) for row in own]):.3g}",
        ])  # fmt: skip
        height, color = len(pairs) - place, f"C{encoders.index(encoder) % 10}"
        if ends:
            axes.plot(ends, [height] * 2, color=color, alpha=0.35, linewidth=5, solid_capstyle="butt")
        axes.plot(seeds, [height] * len(seeds), "o", color=color, alpha=0.6, markersize=5)
        axes.plot(mean, height, "|", color="black", markersize=13, markeredgewidth=2)
    axes.yaxis.tick_right()
    axes.set_yticks(range(len(pairs), 0, -1), [f"{model}, {encoder}" for encoder, model in pairs])
    axes.set_xlabel("top-1 on the test clips, %: each seed, mean, 95 % interval over groups", loc="left")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    write_whole(folder / "compare.md", f"{markdown(table)}\n\n`{command}`\n".encode())
    write_whole(folder / "compare.png", png(figure))
    return markdown(table)


def main(argv: list[str] | None = None) -> int:
    """Train, compare, write; returns the exit status."""
    parser = get_args_parser()
    args, flags = parser.parse_known_args(argv)
    if "WORLD_SIZE" in os.environ:
        parser.error("trainings go one after the other; run this without torchrun")
    training = train.get_args_parser()
    common = training.parse_args(flags)
    if own := [flag for flag in OWN if flag in typed(training, flags, common)]:
        parser.error(f"--{own[0]} is set here for each training; leave it out")
    for name in ("encoders", "models"):
        for entry in getattr(args, name):
            check_entry(entry, name)
    every = "split_number" not in typed(training, flags, common) or common.split_number == ALL
    data = read(DataSettings, common)
    splits = open_listed(data, quiet=True).numbers if every else (common.split_number,)
    folder, path = args.run_path, args.run_path / "rows.csv"
    make_writable_folder(folder, advice="choose another --run_path")
    rows = read_rows(path) if path.is_file() else []
    if any(set(row) != set(COLUMNS) for row in rows):
        raise UserError(f"{path}: damaged, or of another version; choose another --run_path")
    keys = list(itertools.product(args.encoders, args.models, map(str, splits), map(str, range(args.seeds))))
    done = {(row["encoder"], row["model"], row["split"], row["seed"]): row for row in rows}
    others = {done[key]["flags"] for key in keys if key in done} - {shlex.join(flags)}
    if others:
        raise UserError(f"{path} has trainings with other flags ({min(others)}); choose another --run_path")
    bar = tqdm([key for key in keys if key not in done], "comparing", unit="training", dynamic_ncols=True)
    for encoder, model, split, seed in bar:
        rows.append(train_once(encoder, model, int(split), int(seed), flags, folder))
        done[encoder, model, split, seed] = rows[-1]
        write_whole(path, csv_bytes([COLUMNS, *([row[column] for column in COLUMNS] for row in rows)]))
    command = shlex.join(["python3", "compare.py", *(argv if argv is not None else sys.argv[1:])])
    print(f"{write_results(folder, [done[key] for key in keys], command)}\n\nwritten to {folder}")
    return 0


if __name__ == "__main__":
    run(main)
