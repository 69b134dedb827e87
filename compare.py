"""Train heads on encoders, on each split with several seeds, and compare them in a table and a picture.

    python3 compare.py                                                     # what works without a download
    python3 compare.py --encoders "efficientnet_lite0 --streams rgb,diff" i3d --models ConvLSTM,MeanPool
    python3 compare.py --models ConvLSTM "ActionBERT --pretrain 10" --split_number 1 --num_epochs 10

Flags that are not its own go to train.py, for all or, within quotes, for one encoder or model. Everything is
written to a folder: compare.md, compare.csv, compare.png, and a folder for each training. Called again, it
goes on with what is missing there.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from features.settings import CacheSettings, DeviceSettings, EncoderSettings
from splits.datasets import ALL, DataSettings, Listed
from training.settings import add_train_flags
from utils.flags import COUNT, flags_first, read, typed
from utils.process import UserError, available_cores, run

# Set here for each training.
OWN = ("--encoder", "--model", "--seed", "--output_path", "--resume")


def get_args_parser() -> argparse.ArgumentParser:
    """The flags of compare.py."""
    parser = argparse.ArgumentParser(
        # A short --seed is train.py's, not the beginning of --seeds.
        allow_abbrev=False,
        description=__doc__.split("\n")[0],
        epilog="Other flags are those of train.py; see its --help.",
    )
    parser.add_argument(
        "--encoders",
        nargs="+",
        default=["efficientnet_lite0", "i3d"],
        help="what to compare; default: efficientnet_lite0 i3d, which need no download. Quotes take flags "
        'for one encoder: "efficientnet_lite0 --streams rgb,diff"',
    )
    parser.add_argument(
        "--models",
        nargs="+",
        help='heads to compare; default: all. Quotes take flags for one: "ActionBERT --pretrain 10"',
    )
    parser.add_argument(
        "--seeds",
        type=COUNT,
        default=3,
        help="trainings of each; 3 (default) tell a chance from a habit, 5 show how far chance alone moves a "
        "figure",
    )
    parser.add_argument(
        "--jobs",
        type=COUNT,
        default=1,
        help="trainings side by side, which share the cores; 1 (default) tells the time of a single one, as "
        "many as there are cores take the least time in all",
    )
    parser.add_argument(
        "--run_path",
        type=Path,
        default=Path("runs/compare"),
        help="folder for what is written; trainings that are finished there are kept, and not done again",
    )
    return parser


flags_first(__name__, get_args_parser)

import numpy as np

from features.networks import encoder_spec
from models import MODELS, check_model
from training.jobs import Training, run_command, train_all
from training.pictures import png
from training.report import interval, markdown
from utils.files import csv_bytes, json_bytes, make_writable_folder, write_whole

COLORS = ("#4878a8", "#c8803d", "#5a9a5a", "#8a5fa8", "#a85f5f", "#777777")


@dataclass(frozen=True)
class Cell:
    """An encoder and a model, trained on each split with each seed.

    Attributes:
        encoder, model: as typed, with flags of their own
        trainings: by split, a list over the seeds
    """

    encoder: str
    model: str
    trainings: dict[int | str, list[Training]]

    @property
    def all(self) -> list[Training]:
        """All its trainings."""
        return [training for of_split in self.trainings.values() for training in of_split]

    def by_seed(self) -> list[float]:
        """The mean accuracy over the splits in percent, for each seed."""
        splits = list(self.trainings.values())
        return [
            statistics.mean(of_split[seed].test.top1 for of_split in splits) for seed in range(len(splits[0]))
        ]

    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the mean over seeds, by groups of the test clips of all splits."""
        right = [
            np.mean([training.test.right for training in of_split], axis=0)
            for of_split in self.trainings.values()
        ]
        groups = [group for of_split in self.trainings.values() for group in of_split[0].test.groups]
        return interval(np.concatenate(right), groups)


def head(numbers: Iterable[int | str]) -> list[str]:
    """The first row of the table."""
    return [
        *("encoder", "trained on", "model", "top-1, mean"),
        *(f"split {number}" for number in numbers),
        *("seeds", "95 % interval", "loss, nats", "trained parameters"),
        *("filling, s", "training, s", "clips/s"),
    ]


def row(cell: Cell, filling: float | None) -> list[str]:
    """A row of the table; the seconds and clips/s are medians.

    Args:
        filling: seconds that the cache took to fill; None where it was filled before
    """
    seeds, ends, first = cell.by_seed(), cell.interval(), cell.all[0].test.report
    loss = statistics.mean(training.test.report["figures"]["loss_nats"] for training in cell.all)
    return [
        cell.encoder,
        first["encoder_trained_on"],
        cell.model,
        f"{statistics.mean(seeds):.1f} %",
        *(
            f"{statistics.mean(training.test.top1 for training in of_split):.1f}"
            for of_split in cell.trainings.values()
        ),
        f"{min(seeds):.1f} to {max(seeds):.1f}",
        f"{ends[0]:.1f} to {ends[1]:.1f} %" if ends else "",
        f"{loss:.2f}",
        f"{first['trained_parameters']:,}",
        "" if filling is None else f"{filling:.0f}",
        f"{statistics.median(training.seconds for training in cell.all):.3g}",
        f"{statistics.median(training.clips_per_second for training in cell.all):,.0f}",
    ]


def picture(cells: Sequence[Cell], title: str) -> bytes:
    """Top-1 of each cell, every seed a dot and the interval a line, as the bytes of a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure((9, 0.34 * len(cells) + 1.8), layout="constrained")
    axes = figure.add_subplot()
    encoders = list(dict.fromkeys(cell.encoder for cell in cells))
    for place, cell in enumerate(reversed(cells)):
        color, seeds = COLORS[encoders.index(cell.encoder) % len(COLORS)], cell.by_seed()
        if ends := cell.interval():
            axes.plot(ends, [place, place], "-", color=color, alpha=0.35, linewidth=5, solid_capstyle="butt")
        axes.plot(seeds, [place] * len(seeds), "o", color=color, alpha=0.6, markersize=5)
        axes.plot(statistics.mean(seeds), place, "|", color="black", markersize=13, markeredgewidth=2)
        label = f"{cell.model}, {cell.encoder}"
        axes.text(1.01, place, label, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    axes.set_yticks([])
    axes.set_ylim(-0.6, len(cells) - 0.4)
    axes.set_xlabel("top-1 on the test clips, %: each seed, the mean, and its 95 % interval over groups")
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return png(figure)


def job_name(*parts: object) -> str:
    """The folder of a training: encoder, model and their flags in a word, split and seed."""
    return "-".join(str(part).replace(" --", "-").replace(" ", "").replace("/", "-") for part in parts)


def entries(texts: Iterable[str]) -> list[str]:
    """What --encoders or --models name; commas part those without flags of their own."""
    parted = [[text] if " " in text else text.split(",") for text in texts]
    return [" ".join(entry.split()) for group in parted for entry in group]


def fill(encoder: str, flags: Sequence[str], folder: Path, threads: int) -> float | None:
    """Fill the cache of an encoder, unless that was done; the seconds it took, None if it was filled before.

    Args:
        encoder: as typed, with flags of its own
        flags: of train.py for all

    Raises: UserError if features.py fails, or as `finished`.
    """
    parser = argparse.ArgumentParser(prog="compare.py", add_help=False)
    add_train_flags(parser)
    words = [*flags, "--encoder", *shlex.split(encoder)]
    args = parser.parse_args(words)
    groups = (DataSettings, CacheSettings, EncoderSettings, DeviceSettings)
    names = {entry.name for group in groups for entry in fields(group)}
    given = {name: value for name, value in typed(parser, words, args).items() if name in names}
    if args.cache == "off":
        return None
    asked = [word for name, value in given.items() for word in _flag(name, value)]
    path = folder / f"{job_name('filling', encoder)}.json"
    if path.is_file() and (job := json.loads(path.read_text()))["flags"] == asked:
        return job["seconds"]
    started = time.monotonic()
    printed = run_command("features.py", *asked, threads=threads)
    seconds = time.monotonic() - started if "encoding:" in printed else None
    write_whole(path, json_bytes({"flags": asked, "seconds": seconds}))
    return seconds


def _flag(name: str, value: object) -> list[str]:
    return [f"--{name}"] if value is True else [f"--{name}", str(value)]


def split_numbers(flags: Sequence[str]) -> list[int | str]:
    """The splits to train on: those of --split_number, all where it is not there."""
    parser = argparse.ArgumentParser(prog="compare.py", add_help=False)
    add_train_flags(parser, split_number=ALL)
    args = parser.parse_args(flags)
    return list(Listed(read(DataSettings, args)).numbers) if args.split_number == ALL else [args.split_number]


def train_cells(
    args: argparse.Namespace,
    flags: Sequence[str],
    numbers: Sequence[int | str],
    pairs: Sequence[tuple[str, str]],
) -> list[Cell]:
    """Train each pair of encoder and model that is not finished. Raises: as `train_all`."""
    jobs: dict[tuple[str, str, int | str, int], list[object]] = {
        (encoder, model, number, seed): [
            *(*flags, "--encoder", *shlex.split(encoder), "--model", *shlex.split(model)),
            *("--split_number", number, "--seed", seed),
        ]
        for encoder, model in pairs
        for number in numbers
        for seed in range(args.seeds)
    }
    names = {place: job_name(*place[:2], f"split{place[2]}", f"seed{place[3]}") for place in jobs}
    print(f"{len(jobs)} trainings into {args.run_path}", flush=True)
    trained = train_all({names[place]: words for place, words in jobs.items()}, args.run_path, args.jobs)
    return [
        Cell(
            encoder, model,
            {
                number: [trained[names[encoder, model, number, seed]] for seed in range(args.seeds)]
                for number in numbers
            },
        )
        for encoder, model in pairs
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Train, compare, write; returns the exit status."""
    parser = get_args_parser()
    args, flags = parser.parse_known_args(argv)
    if own := [flag for flag in OWN if flag in flags]:
        parser.error(f"{own[0]} is set here for each training; leave it out")
    encoders, models = entries(args.encoders), entries(args.models or MODELS)
    for name, known, texts in (("encoders", encoder_spec, encoders), ("models", check_model, models)):
        try:
            for text in texts:
                known(text.partition(" ")[0])
        except UserError as error:
            parser.error(f"--{name}: {error}")
    numbers, folder = split_numbers(flags), args.run_path
    if "--split_number" in flags:
        place = flags.index("--split_number")
        flags = flags[:place] + flags[place + 2 :]
    make_writable_folder(folder)
    started = time.monotonic()
    filling = {encoder: fill(encoder, flags, folder, available_cores()) for encoder in encoders}
    cells = train_cells(args, flags, numbers, [(encoder, model) for encoder in encoders for model in models])
    rows = [head(numbers), *(row(cell, filling[cell.encoder]) for cell in cells)]
    clips = sum(len(of_split[0].test.predictions) for of_split in cells[0].trainings.values())
    title = f"{len(numbers)} splits, {clips:,} test clips, {args.seeds} seeds"
    command = shlex.join(["python3", "compare.py", *(argv if argv is not None else sys.argv[1:])])
    table = markdown(rows)
    write_whole(folder / "compare.md", f"{title}\n\n{table}\n\n`{command}`\n".encode())
    write_whole(folder / "compare.csv", csv_bytes(rows))
    write_whole(folder / "compare.png", picture(cells, title))
    print(f"{title}\n\n{table}\n\nwritten to {folder} in {time.monotonic() - started:,.0f} s")
    return 0


if __name__ == "__main__":
    run(main)
