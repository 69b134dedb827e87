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
import os
import shlex
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training.comparison import Filling, Plan, fill, make_plan
from training.jobs import Training, train_all
from training.pictures import png
from training.report import interval, markdown
from training.run import hold_folder
from utils.files import csv_bytes, write_whole
from utils.flags import COUNT
from utils.process import MissingFileError, UserError, run


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


def row(cell: Cell, filling: Filling | None, *, timed: bool) -> list[str]:
    """A row of the table; the seconds and clips/s are medians.

    Args:
        filling: of the cache; None where it was filled before
        timed: whether seconds and clips/s are told
    """
    seeds, ends, first = cell.by_seed(), cell.interval(), cell.all[0].test.report
    loss = statistics.mean(training.test.report["figures"]["loss_nats"] for training in cell.all)
    times = ["", ""]
    if timed:
        times = [
            f"{statistics.median(training.seconds for training in cell.all):.3g}",
            f"{statistics.median(training.clips_per_second for training in cell.all):,.0f}",
        ]
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
        "" if filling is None else f"{filling.seconds:.0f}{'' if filling.whole else ' for a part'}",
        *times,
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
    # Long labels leave the axes narrower than this text.
    axes.set_xlabel(
        "top-1 on the test clips, %: each seed, the mean, and its 95 % interval over groups", loc="left"
    )
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return png(figure)


def train_cells(args: argparse.Namespace, planned: Plan) -> list[Cell]:
    """Train each pair of encoder and model that is not finished.

    Raises: as `train_all`; UserError if one that is kept was tested on other clips, or its encoder had other
        weights.
    """
    kept = f", {planned.kept} of which are finished" if planned.kept else ""
    print(f"{len(planned.jobs)} trainings into {args.run_path}{kept}", flush=True)
    trained = train_all(dict(planned.jobs.values()), args.run_path, args.jobs)
    by_place = {place: trained[name] for place, (name, _) in planned.jobs.items()}
    weights: dict[str, object] = {}
    for (encoder, _, number, _), training in by_place.items():
        report = training.test.report
        own = [report["encoder_sha256"], report["further_sha256"]]
        for what, same in (
            (f"clips of split {number}", report["test_clips_sha256"] == planned.test_clips[number]),
            (f"weights of {encoder}", weights.setdefault(encoder, own) == own),
        ):
            if not same:
                raise UserError(
                    f"{args.run_path}: a training that is kept there saw other {what}; choose another "
                    "--run_path"
                )
    return [
        Cell(
            encoder, model,
            {
                number: [by_place[encoder, model, number, seed] for seed in range(args.seeds)]
                for number in planned.numbers
            },
        )
        for encoder, model in planned.pairs
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Train, compare, write; returns the exit status."""
    parser = get_args_parser()
    args, flags = parser.parse_known_args(argv)
    if "WORLD_SIZE" in os.environ:
        parser.error("torchrun and --jobs both share the trainings out; use --jobs")
    try:
        planned = make_plan(args.encoders, args.models, args.seeds, args.run_path, flags)
    except MissingFileError:
        raise
    except UserError as error:
        parser.error(str(error))
    folder, started = args.run_path, time.monotonic()
    with hold_folder(folder, flag="--run_path"):
        filling = {encoder: fill(encoder, words, folder) for encoder, words in planned.fills.items()}
        cells = train_cells(args, planned)
        clips = sum(len(of_split[0].test.predictions) for of_split in cells[0].trainings.values())
        counts = f"{_many(len(planned.numbers), 'split')}, {_many(clips, 'test clip')}"
        title = f"{counts}, {_many(args.seeds, 'seed')}"
        if planned.kept:
            title += f", {_many(planned.kept, 'training')} kept from before"
        # Those of another --jobs are other times.
        timed = len({(one.threads, one.side_by_side) for cell in cells for one in cell.all}) == 1
        rows = [head(planned.numbers)]
        rows += [row(cell, filling.get(cell.encoder), timed=timed) for cell in cells]
        command = shlex.join(["python3", "compare.py", *(argv if argv is not None else sys.argv[1:])])
        table = markdown(rows)
        write_whole(folder / "compare.md", f"{title}\n\n{table}\n\n`{command}`\n".encode())
        write_whole(folder / "compare.csv", csv_bytes(rows))
        write_whole(folder / "compare.png", picture(cells, title))
    print(f"### {title}\n\n{table}\n\nwritten to {folder} in {time.monotonic() - started:,.0f} s")
    return 0


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


if __name__ == "__main__":
    run(main)
