"""Accuracy: what only the order of frames tells, and calibration.

    python3 benchmarks/accuracy.py order          # toy data: the pairs that only the order of frames tells
    python3 benchmarks/accuracy.py order --encoders i3d
    python3 benchmarks/accuracy.py calibration    # the error of probabilities, with and without temperature

Encoders and heads side by side are compared by compare.py. Settings are chosen on groups held out of the
training lists, never on test clips.
"""

import argparse
import csv
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import common
import numpy as np
from make_toy_actions import ORDER_PAIRS
from tqdm import tqdm

import test as test_script
import train
from models import MODELS
from training.report import markdown
from utils.device import choose_device
from utils.process import run


def trained(words: Sequence[object], *tests: Sequence[object]) -> list[tuple[dict, list[dict[str, str]]]]:
    """Report and predictions of train.py's test, and of others of the same checkpoint by test.py."""
    with tempfile.TemporaryDirectory() as folder:
        here, found = Path(folder), []
        train.main([*map(str, words), "--output_path", folder, "--run_path", f"{folder}/run"])
        path = json.loads((here / "run/test/report.json").read_text())["checkpoint"]
        for number, more in enumerate(tests):
            flags = [*map(str, more), "--checkpoint_model", path, "--run_path", f"{folder}/{number}"]
            test_script.main(flags)
        for tested in (here / "run/test", *(here / str(number) for number in range(len(tests)))):
            with (tested / "predictions.csv").open(newline="") as file:
                found.append((json.loads((tested / "report.json").read_text()), list(csv.DictReader(file))))
        return found


def told_apart(rows: list[dict[str, str]], pair: tuple[str, str]) -> float:
    """Percent of the clips of two classes whose own class is the more probable of the two."""
    some = [row for row in rows if row["label"] in pair]
    right = [max(pair, key=lambda name: float(row[name])) == row["label"] for row in some]
    return 100 * statistics.mean(right)


def order(args: argparse.Namespace) -> list[list[str]]:
    """Pairs of classes that only the order of frames tells apart; a guess is right in half of the cases."""
    rows = [["pair", "encoder", "model", "frames in order", "frames shuffled"]]
    with tempfile.TemporaryDirectory() as folder:
        toy = common.draw_toy(Path(folder))
        data = ["--dataset_path", toy / "UCF-101", "--split_path", toy / "ucfTrainTestlist"]
        for encoder in args.encoders:
            sizes = ["--sequence_length", 16, "--no_flip"]
            sizes += ["--img_dim", 112] if encoder == "efficientnet_lite0" else []
            for model in tqdm(args.models, encoder):
                runs = [
                    trained([*data, "--encoder", encoder, *sizes, "--model", model, "--num_epochs",
                             args.num_epochs, "--seed", seed], [*data, "--shuffle_frames"])
                    for seed in range(args.seeds)
                ]  # fmt: skip
                for pair in ORDER_PAIRS:
                    if any(row["label"] in pair for row in runs[0][0][1]):
                        cells = [[told_apart(run[which][1], pair) for run in runs] for which in (0, 1)]
                        shown = [f"{np.mean(one):.1f} % ({min(one):.0f} to {max(one):.0f})" for one in cells]
                        rows.append([" / ".join(pair), encoder, model, *shown])
    return rows


def calibration(args: argparse.Namespace) -> list[list[str]]:
    """The calibration error of test clips, the temperature fitted on held-out groups."""
    rows = [["encoder", "model", "split", "top-1", "temperature", "error without it", "error with it"]]
    for encoder in args.encoders:
        for model in tqdm(args.models, encoder):
            for split in args.splits:
                reports = [
                    trained([*common.data_flags(args), "--encoder", encoder, "--model", model,
                             "--split_number", split, "--seed", seed, "--val_fraction", 0.3,
                             "--num_epochs", args.num_epochs])[0][0]
                    for seed in range(args.seeds)
                ]  # fmt: skip
                figures = [report["figures"] for report in reports]
                after, before = (
                    statistics.mean(each[f"calibration_error{which}_percent"] for each in figures)
                    for which in ("", "_without_temperature")
                )
                top1 = statistics.mean(each["top1_percent"] for each in figures)
                temperature = statistics.median(report["temperature"] for report in reports)
                cells = [f"{top1:.1f} %", f"{temperature:.2f}", f"{before:.1f} %", f"{after:.1f} %"]
                rows.append([encoder, model, str(split), *cells])
    return rows


def main() -> int:
    """Train, test, and print a table; returns the exit status."""
    flags = common.parser(__doc__.split("\n")[0])
    flags.add_argument("what", choices=("order", "calibration"))
    flags.add_argument("--encoders", nargs="+", default=["efficientnet_lite0"])
    flags.add_argument("--models", nargs="+", default=list(MODELS))
    flags.add_argument("--splits", type=int, nargs="+", default=[1, 2, 3])
    flags.add_argument("--seeds", type=int, default=3)
    flags.add_argument("--num_epochs", type=int, default=20)
    args = flags.parse_args()
    rows = {"order": order, "calibration": calibration}[args.what](args)
    print(common.machine(choose_device(args.device)))
    print(
        f"\n### {args.what.capitalize()}, {args.seeds} seeds, {args.num_epochs} epochs\n\n{markdown(rows)}\n"
    )
    return 0


if __name__ == "__main__":
    run(main)
