"""How well segments of long videos are learned and found: videos joined from clips of UCF-101.

python3 benchmarks/segments.py                     # trained on segments, against trained on clips
python3 benchmarks/segments.py --segments 1 2 4 8  # that many labeled segments of each action, a video each

A video of the test has ten clips, one of training has one of each action. Between two clips is a second of
something else: gray, or a clip of two classes that nobody labels. Half of the borders are hard cuts, half are
cross-fades of a second. Videos of training come from the training list, those of the test from the test list.
"""

import csv
import itertools
import json
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import common
import numpy as np
from tqdm import tqdm

import train
from annotation.measures import Timeline, measures
from annotation.overlay import NONE
from annotation.recognizer import Recognizer
from splits.datasets import Listed
from splits.split import Clip, Split
from training.report import markdown
from utils.device import choose_device
from utils.files import csv_bytes, unused, write_whole
from utils.process import run
from video.reader import Video
from video.writer import write_video

FPS, CLIPS, FADE, NEAR = 25, 10, 25, 0.5
# The last two classes are what nobody labels.
UNLABELED = 2


def resized(video: Video, most: int | None = None) -> list[np.ndarray]:
    """Frames of a clip of 320 x 240."""
    frames = list(itertools.islice(video.frames(), most))
    assert frames[0].shape == (240, 320, 3), video.path
    return frames


def join(clips: Sequence[Clip], others: Sequence[Clip], path: Path, rng: np.random.Generator) -> list[list]:
    """Write clips in a row with pauses; returns start, end and class of each. A fade counts half to each."""
    rows: list[list] = []
    at = 0

    parts: list[tuple[list[np.ndarray], str]] = []
    for clip in clips:
        # A second by itself, and what the fades take of it.
        pause = [np.full((240, 320, 3), 128, np.uint8)] * 3 * FPS
        if rng.random() < 0.5:
            pause = resized(others[int(rng.integers(len(others)))].video, 3 * FPS)
        parts += [(resized(clip.video), clip.name.split("/")[0]), (pause, "")]
    fades = [FADE if rng.random() < 0.5 else 0 for _ in parts[:-1]]

    def frames() -> Iterator[np.ndarray]:
        nonlocal at
        tail: list[np.ndarray] = []
        for (part, label), before, after in zip(parts, [0, *fades], [*fades, 0], strict=True):
            if not label:
                part = part[: FPS + before + after]
            begin = at + before // 2
            for number, (old, new) in enumerate(zip(tail, part, strict=False)):
                share = (number + 0.5) / before
                yield ((1 - share) * old + share * new).astype(np.uint8)
                at += 1
            for frame in part[before : len(part) - after]:
                yield frame
                at += 1
            tail = part[len(part) - after :]
            if label:
                rows.append([path.name, begin / FPS, (at + after // 2) / FPS, label])

    write_video(path, frames(), Fraction(FPS))
    return rows


def actions_of(split: Split) -> list[str]:
    """The classes that are there, but the last two."""
    return [split.classes[label] for label in sorted({clip.label for clip in split.clips})][:-UNLABELED]


def make(listed: Listed, number: int, folder: Path, counts: tuple[int, int]) -> Path:
    """Draw the videos of a split and write their table; what is there already is used."""
    table = folder / "segments.csv"
    if table.is_file():
        return table
    split, rng, rows = listed.split(number), np.random.default_rng(number), []
    labeled = actions_of(split)
    folder.mkdir(parents=True, exist_ok=True)
    for side, clips, count in (("train", split.train, counts[0]), ("test", split.test, counts[1])):
        of_class: dict[str, list[Clip]] = {}
        for place in rng.permutation(len(clips)):
            of_class.setdefault(clips[place].name.split("/")[0], []).append(clips[place])
        others = [clip for name, own in of_class.items() if name not in labeled for clip in own]
        known = [clip for name in labeled for clip in of_class[name]]
        order = [known[place] for place in rng.permutation(len(known))]
        for video in tqdm(range(count), f"{side} videos", dynamic_ncols=True):
            part = order[video * CLIPS : (video + 1) * CLIPS]
            if side == "train":
                # One of each action, so that few videos are few labels of each.
                part = [of_class[name][video % len(of_class[name])] for name in rng.permutation(labeled)]
            made = join(part, others, folder / f"{side}{video:02d}.mp4", rng)
            rows += [[*row, side] for row in made]
    write_whole(table, csv_bytes([["video", "start", "end", "action", "split"], *rows]))
    return table


def evaluated(recognizer: Recognizer, table: Path, store: Path) -> list[Timeline]:
    """The test videos of a table with what a model finds in them."""
    with table.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    lines = []
    for name, own in itertools.groupby(rows, lambda row: row["video"]):
        labels = {each: label for label, each in enumerate(recognizer.classes)}
        spans = [(labels[row["action"]], (float(row["start"]), float(row["end"]))) for row in own]
        recognition = recognizer(table.parent / name, store=store)
        lines.append(Timeline.of(recognition, name, name, spans))
    return lines


def borders(lines: Sequence[Timeline]) -> float:
    """Median seconds from a true border to the nearest one that was found."""
    off = []
    for line in lines:
        true, found = (
            line.times[np.flatnonzero(np.diff(labels)) + 1] for labels in (line.truth, line.predicted)
        )
        off += [np.abs(found - edge).min() if len(found) else np.inf for edge in true]
    return float(np.median(off))


def far(lines: Sequence[Timeline]) -> tuple[float, float]:
    """Accuracy in % of frames, and of those of no action, more than half a second from a true border."""
    right, none = [], []
    for line in lines:
        edges = line.times[np.flatnonzero(np.diff(line.truth)) + 1]
        taken = np.abs(line.times[:-1, None] - edges).min(1) > NEAR
        right += (line.truth == line.predicted)[taken].tolist()
        none += (line.truth == line.predicted)[taken & (line.truth == NONE)].tolist()
    return 100 * float(np.mean(right)), 100 * float(np.mean(none))


def cells(name: str, lines: Sequence[Timeline]) -> list[str]:
    """A row of the table."""
    found = measures(lines)
    shown = ("frame accuracy", "frame accuracy of no action", "F1@10", "F1@50", "edit score", "mean mAP")
    texts = [f"{value:.1f}" for value in (*far(lines), *(found[each][0] for each in shown))]
    ends = found["frame accuracy"][1]
    return [name, *texts, f"{borders(lines):.2f} s", f"{ends[0]:.1f} to {ends[1]:.1f} %" if ends else ""]


def trained(flags: Sequence[object], folder: Path) -> Path:
    """Train with flags; returns the checkpoint."""
    words = ["--output_path", folder / "model", "--run_path", folder / "run", *flags]
    train.main([str(word) for word in words])
    report = json.loads((folder / "run" / "test" / "report.json").read_text())
    return Path(report["checkpoint"])


def few(table: Path, count: int) -> Path:
    """A table with the first training videos alone, each with one segment of each action, and the test's."""
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    kept = [row for row in rows if row["split"] == "test" or row["video"] < f"train{count:02d}"]
    path = table.with_name(f"segments-{count}.csv")
    write_whole(path, csv_bytes([list(rows[0]), *(list(row.values()) for row in kept)]))
    return path


def main() -> int:
    flags = common.parser(__doc__.split("\n")[0])
    flags.add_argument("--encoder", default="i3d")
    flags.add_argument("--models", nargs="+", default=["AttentiveProbe"])
    flags.add_argument("--splits", type=int, nargs="+", default=[1, 2, 3])
    flags.add_argument("--folder", type=Path, default=Path("runs/segments"), help="for videos and trainings")
    flags.add_argument("--videos", type=int, nargs=2, default=[24, 6], help="of training and of the test")
    flags.add_argument("--min_probability", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    flags.add_argument("--segments", type=int, nargs="+", help="of each action; default: all")
    flags.add_argument("--flags", default="", help="more flags of train.py for segments, in one word")
    args = flags.parse_args()
    listed, rows = Listed(common.data_settings(args.data)), []
    lines: dict[str, list[Timeline]] = {}
    for number in args.splits:
        folder = args.folder / f"split{number}"
        table = make(listed, number, folder / "videos", tuple(args.videos))
        for model in args.models:
            seen = ["--encoder", args.encoder, "--model", model]
            own = ["--dataset_path", table.parent, "--cache_path", folder / "embeddings", *args.flags.split()]
            for count in args.segments or [args.videos[0]]:
                taken = few(table, count) if args.segments else table
                path = trained([*seen, *own, "--segments", taken], unused(folder / f"{model}-segments"))
                found = evaluated(Recognizer.load(path), table, folder / "store")
                lines.setdefault(f"{model}, {count} segments of each action", []).extend(found)
            if args.segments:
                continue
            clips = [*common.data_flags(args), "--split_number", number]
            path = trained([*seen, *clips], unused(folder / f"{model}-clips"))
            only = ",".join(actions_of(listed.split(number)))
            for least in args.min_probability:
                recognizer = Recognizer.load(path, only=only, min_probability=least, change_cost=0.5)
                found = evaluated(recognizer, table, folder / "store")
                lines.setdefault(f"{model}, of clips, --min_probability {least}", []).extend(found)
    rows = [cells(name, found) for name, found in lines.items()]
    head = [
        *("trained on", f"frames, {NEAR} s off borders", "no action, same", "all frames", "no action"),
        *("F1@10", "F1@50", "edit", "mAP", "borders, median", "95 % interval of all frames"),
    ]
    print(common.machine(choose_device(args.device)))
    print(f"\n{args.encoder}, {len(next(iter(lines.values())))} test videos\n")
    print(markdown([head, *rows]))
    return 0


if __name__ == "__main__":
    run(main)
