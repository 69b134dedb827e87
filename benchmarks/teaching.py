"""How many moments must be labeled: those that the page asks about, against moments at random.

python3 benchmarks/teaching.py --folder runs/segments/split1   # videos as benchmarks/segments.py makes them

A label is the action of a second, or no action. Accuracy is that of all frames of videos whose moments are
never labeled. The page's answer is timed too: from a change to timelines of all videos.
"""

import csv
import time
from collections.abc import Callable
from pathlib import Path

import common
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from annotation.learner import Learner
from annotation.measures import Timeline
from features.encoder import Encoder
from splits.split import NO_ACTION
from splits.table import Span
from training.pictures import png
from training.report import markdown
from utils.device import choose_device
from utils.files import write_whole
from utils.process import run

COUNTS = (10, 15, 20, 30, 40, 50, 60, 80, 100, 120, 150, 180)
# Accuracies in % that labels are counted for.
GOALS = (80, 85, 90)


def folder_of(table: Path, side: str) -> tuple[Path, list[Span]]:
    """A folder with the videos of one side alone, and what they show."""
    with table.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == side]
    folder = table.parent.parent / f"teaching-{side}"
    folder.mkdir(exist_ok=True)
    for name in {row["video"] for row in rows}:
        if not (folder / name).exists():
            (folder / name).symlink_to((table.parent / name).resolve())
    return folder, [Span(row["video"], float(row["start"]), float(row["end"]), row["action"]) for row in rows]


def ready(folder: Path, encoder: Encoder) -> Learner:
    """A learner with all embeddings and no segment, whose threads have ended."""
    (folder / "segments.csv").unlink(missing_ok=True)
    learner = Learner(folder, encoder)
    learner.start()
    while not all(entry.ready or entry.problem for entry in learner.entries.values()):
        time.sleep(0.1)
    learner.close()
    return learner


def accuracy(learner: Learner, tested: Learner, truth: list[Span]) -> float:
    """Of all frames of the tested videos, in %."""
    recognizer, right, frames = learner.recognizer, 0, 0
    if recognizer is None:
        return 0.0
    # What it has not learned yet is wrong.
    labels = {name: number for number, name in enumerate(recognizer.classes)}
    others = {span.action for span in truth} - set(labels)
    labels |= {name: len(labels) + number for number, name in enumerate(sorted(others))}
    for name, entry in tested.entries.items():
        embedded = entry.embedded
        assert embedded
        found = recognizer.recognize(embedded, recognizer.probabilities(embedded))
        own = [(labels[span.action], (span.start, span.end)) for span in truth if span.video == name]
        line = Timeline.of(found, name, name, own)
        right, frames = right + int((line.truth == line.predicted).sum()), frames + len(line.truth)
    return 100 * right / frames


def label(learner: Learner, truth: list[Span], video: str, second: float) -> None:
    """Mark a moment as it is."""
    action = next(
        (each.action for each in truth if each.video == video and each.start <= second < each.end), NO_ACTION
    )
    learner.edit([], [learner.moment(video, second)._replace(action=action)])
    learner.train()


def curve(
    folder: Path,
    encoder: Encoder,
    truth: list[Span],
    seed: int,
    ask: bool,
    measured: Callable[[Learner], float],
) -> list[float]:
    """Accuracy for each of `COUNTS` labels, from none on; the first is of a moment at random."""
    learner = ready(folder, encoder)
    rng, names, found = np.random.default_rng(seed), sorted(learner.entries), list[float]()
    ends = np.array([learner.entries[name].edges[-1] for name in names])
    for count in tqdm(range(1, COUNTS[-1] + 1), f"draw {seed}", leave=False):
        if ask and count > 1:
            moment = learner.ask()
            label(learner, truth, moment["video"], moment["second"])
        else:
            place = int(rng.choice(len(names), p=ends / ends.sum()))
            label(learner, truth, names[place], float(rng.uniform(0, ends[place])))
        if count in COUNTS:
            found.append(measured(learner))
    return found


def redrawn(folder: Path, encoder: Encoder, truth: list[Span], videos: int) -> list[float]:
    """Seconds from each change to timelines of all videos, while segments of some videos are marked."""
    (folder / "segments.csv").unlink(missing_ok=True)
    learner, times = Learner(folder, encoder), list[float]()
    learner.start()
    while not all(entry.ready for entry in learner.entries.values()):
        time.sleep(0.01)
    learner.settle()
    for span in [each for each in truth if each.video in sorted(learner.entries)[:videos]]:
        begun = time.perf_counter()
        learner.edit([], [span])
        learner.settle()
        times.append(time.perf_counter() - begun)
    learner.close()
    return times


def picture(curves: dict[str, np.ndarray]) -> bytes:
    """Mean accuracy over labels, and all draws, as a PNG file."""
    matplotlib.use("agg")
    figure = Figure((7, 4), layout="constrained")
    axes = figure.add_subplot()
    for (name, found), color in zip(curves.items(), ("#0072b2", "#d55e00"), strict=True):
        axes.plot(COUNTS, found.mean(0), color=color, marker="o", label=name)
        axes.fill_between(COUNTS, found.min(0), found.max(0), color=color, alpha=0.15, linewidth=0)
    axes.set_xlabel("labeled moments")
    axes.set_ylabel("accuracy of all frames, %")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return png(figure)


def main() -> int:
    flags = common.parser(__doc__.split("\n")[0])
    flags.add_argument("--folder", type=Path, default=Path("runs/segments/split1"), help="with videos/")
    flags.add_argument("--draws", type=int, default=5, help="of moments at random; default 5")
    flags.add_argument("--picture", type=Path, default=Path("runs/teaching.png"))
    args = flags.parse_args()
    encoder = Encoder("i3d").to(choose_device(args.device)).prepare()
    (pool, marked), (held, truth) = (
        folder_of(args.folder / "videos/segments.csv", side) for side in ("train", "test")
    )
    tested = ready(held, encoder)

    def measured(learner: Learner) -> float:
        return accuracy(learner, tested, truth)

    found = {
        name: np.array([curve(pool, encoder, marked, seed, ask, measured) for seed in range(args.draws)])
        for name, ask in (("ask me", True), ("at random", False))
    }
    write_whole(args.picture, picture(found))
    print(common.machine(choose_device(args.device)))
    rows = [["labels", *map(str, COUNTS)]]
    rows += [[name, *(f"{value:.1f}" for value in each.mean(0))] for name, each in found.items()]
    print(f"\n{markdown(rows)}\n")
    rows = [["accuracy", *found, "saved"]]
    for goal in GOALS:
        needed = [np.interp(goal, np.maximum.accumulate(each.mean(0)), COUNTS) for each in found.values()]
        saved = 100 * (1 - needed[0] / needed[1])
        rows.append([f"{goal} %", *(f"{count:.0f} labels" for count in needed), f"{saved:.0f} %"])
    print(f"{markdown(rows)}\n")
    times, seconds = redrawn(held, encoder, truth, 3), sum(each.edges[-1] for each in tested.entries.values())
    head = ["changes", "videos", "minutes", "until timelines are new, median", "longest"]
    cells = [
        len(times),
        len(tested.entries),
        f"{seconds / 60:.1f}",
        f"{np.median(times):.2f} s",
        f"{max(times):.2f} s",
    ]
    print(markdown([head, list(map(str, cells))]))
    return 0


if __name__ == "__main__":
    run(main)
