"""How well frames of untrimmed video are labeled: test clips in a row, with a second of gray between them.

python3 benchmarks/untrimmed.py --checkpoint_model split1/ActionBERT_20.pth --min_probability 0.5
python3 benchmarks/untrimmed.py --only kinetics --min_probability 0.1         # without training

The clips are those of the test list of split 1, in a seeded order, in videos of about a minute. Frames within
half a second of a border are not counted among those of actions; gray is right where it shows no action. A
border is as far off as the nearest one that was found.
"""

import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import common
import numpy as np
from tqdm import tqdm
from untrained import with_names

from annotation.overlay import NO_ACTION
from annotation.recognizer import Recognizer
from annotation.settings import BackendSettings, LabelSettings
from features.settings import DeviceSettings
from splits.datasets import Listed
from splits.split import Clip
from utils.device import choose_device, seed_everything
from utils.flags import add_flags, read
from video.reader import Video
from video.writer import write_video

FPS, GRAY, MINUTE, NEAR = 25, 128, 60, 0.5
# Frames of gray between two clips.
PAUSE = FPS


def join(clips: list[Clip], path: Path) -> list[str]:
    """Write clips in a row; returns the class of each frame."""
    truth: list[str] = []

    def frames() -> Iterator[np.ndarray]:
        for place, clip in enumerate(clips):
            shape = (240, 320, 3)
            if place:
                truth.extend([NO_ACTION] * PAUSE)
                yield from itertools.repeat(np.full(shape, GRAY, np.uint8), PAUSE)
            for frame in clip.video.frames():
                truth.append(clip.name.split("/")[0])
                yield frame

    write_video(path, frames(), Fraction(FPS))
    return truth


def videos(clips: list[Clip]) -> Iterator[list[Clip]]:
    """Clips of a video each."""
    part: list[Clip] = []
    for clip in clips:
        part.append(clip)
        if sum(each.video.count() + PAUSE for each in part) >= MINUTE * FPS:
            yield part
            part = []
    if part:
        yield part


def borders(labels: list[str]) -> np.ndarray:
    """First frames of another label."""
    return np.array([place for place in range(1, len(labels)) if labels[place] != labels[place - 1]])


def main() -> None:
    flags = common.parser(__doc__.split("\n")[0])
    for group in (BackendSettings, LabelSettings):
        add_flags(flags, group)
    args = flags.parse_args()
    seed_everything(0)
    settings, backend = read(LabelSettings, args), read(BackendSettings, args)
    device = choose_device(args.device)
    split = Listed(common.data_settings(args.data)).split(1)
    clips = [split.test[place] for place in np.random.default_rng(0).permutation(len(split.test))]
    called = {name: [name] for name in split.classes}
    if settings.only == "kinetics":
        clips, called = with_names(clips)
        settings = replace(settings, only=",".join(itertools.chain(*called.values())))
    computed = DeviceSettings(device=args.device, precision=args.precision)
    recognizer = Recognizer.open(backend, settings, computed)
    known = {name: label for label, names in called.items() for name in names} | {NO_ACTION: NO_ACTION}
    right, blank, off = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for part in tqdm(list(videos(clips)), unit="video", dynamic_ncols=True):
            truth = join(part, Path(folder) / "x.mp4")
            recognition = recognizer(Path(folder) / "x.mp4")
            found = [known[recognition.name(label)] for label in recognition.labels.tolist()]
            assert len(found) == len(truth) == Video(Path(folder) / "x.mp4").count()
            edges, seen = borders(truth), borders(found)
            for frame, (label, answer) in enumerate(zip(truth, found, strict=True)):
                if label == NO_ACTION:
                    blank.append(answer == NO_ACTION)
                elif np.abs(edges - frame).min() > NEAR * FPS:
                    right.append(answer == label)
            off += [np.abs(seen - edge).min() / FPS if len(seen) else float("inf") for edge in edges]
    print(common.machine(device))
    common.table(
        f"Untrimmed, {backend.name}, {len(clips)} clips of {len({clip.label for clip in clips})} classes, "
        f"{(len(right) + len(blank)) / FPS / 60:.0f} minutes that count",
        [
            ("frames of actions with the right label", f"{100 * np.mean(right):.1f} %"),
            ("frames of gray without an action", f"{100 * np.mean(blank):.1f} %"),
            ("how far off a border is, median", f"{np.median(off):.2f} s"),
        ],
    )


if __name__ == "__main__":
    main()
