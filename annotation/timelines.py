"""Whole videos with known segments against what a model finds in them: measures, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from tqdm import tqdm

from annotation.measures import Timeline, measures
from annotation.overlay import NONE, PALETTE, hex_color
from annotation.recognizer import Recognizer
from dataset import load_videos
from features.embed import Embedded
from features.store import Store
from splits.split import Clip
from training.pictures import png
from utils.files import write_whole
from utils.process import say

# Costs of a change that are tried on held-out videos, in nats x seconds; and that without any.
COSTS, USUAL_COST = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0), 0.5
# Videos of the picture.
PICTURED = 40
SHOWN = ("frame accuracy", "F1@50", "edit score", "mean mAP")


class _Known:
    """Videos with their embeddings, segments and probabilities."""

    def __init__(self, recognizer: Recognizer, store: Store, clips: Sequence[Clip]) -> None:
        self.recognizer, self.clips = recognizer, clips
        self.videos: dict[str, Embedded] = load_videos(store, clips)
        bar = tqdm(self.videos.items(), "labeling", unit="video", leave=False, dynamic_ncols=True)
        self.probabilities = {name: recognizer.probabilities(video) for name, video in bar}

    def timelines(self) -> list[Timeline]:
        """Each video with its true segments and those that are found."""
        found = []
        for name, video in self.videos.items():
            own = [clip for clip in self.clips if clip.name == name]
            # By the recognizer's numbers of its actions.
            places = {label: place for place, label in enumerate(self.recognizer.chosen)}
            labeled = [(places.get(clip.label, NONE), clip.span) for clip in own if clip.span]
            recognition = self.recognizer.recognize(video, self.probabilities[name])
            found.append(Timeline.of(recognition, name, own[0].group_or_name, labeled))
        return found


def picture(lines: Sequence[Timeline], classes: Sequence[str]) -> bytes:
    """Of each video, 40 at most, the true segments above those that were found, as a PNG file."""
    lines, colors = lines[:PICTURED], [hex_color(color) for color in PALETTE]
    figure = Figure((12, 1.2 + 0.55 * len(lines)), layout="constrained")
    axes = figure.add_subplot()
    for row, line in enumerate(lines):
        for runs, top in ((line.true_runs, row), (line.predicted_runs, row + 0.4)):
            axes.barh(top, line.times[-1], 0.34, color="#eeeeee", align="edge")
            for run in runs:
                color, hatch = colors[run.label % len(colors)], "//" * (run.label // len(colors))
                length = run.end - run.start
                axes.barh(top, length, 0.34, run.start, align="edge", color=color, hatch=hatch, ec="white")
    axes.set_yticks([row + 0.37 for row in range(len(lines))], [line.name for line in lines], fontsize=7)
    axes.set_ylim(len(lines), -0.1)
    axes.set_xlabel("seconds; of each video the true segments above, those that were found below")
    axes.spines[["top", "right", "left"]].set_visible(False)
    handles = [
        Patch(facecolor=colors[label % len(colors)], hatch="//" * (label // len(colors)), label=name)
        for label, name in enumerate(classes)
    ]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1), fontsize=7, frameon=False)
    return png(figure)


def best_cost(recognizer: Recognizer, store: Store, clips: Sequence[Clip]) -> float:
    """The cost of a change with the best frame accuracy and F1@50 on videos, the smallest of equal ones.

    Args:
        clips: their segments, with labels as the model's
    """
    known, scores = _Known(recognizer, store, clips), []
    for cost in COSTS:
        recognizer.change_cost = cost
        found = measures(known.timelines(), intervals=False)
        scores.append(found["frame accuracy"][0] + found["F1@50"][0])
    chosen = COSTS[int(np.argmax(scores))]
    say(f"a change of action along a video costs {chosen:g}, best on {len(known.videos):,} held-out videos")
    return chosen


def report_timelines(
    folder: Path, recognizer: Recognizer, store: Store, clips: Sequence[Clip]
) -> dict[str, object]:
    """Measure how well segments are found, print it, and draw timelines.png; returns the measures.

    Raises: OSError if the picture cannot be written.
    """
    lines = _Known(recognizer, store, clips).timelines()
    found = measures(lines)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "timelines.png", picture(lines, recognizer.classes))
    texts = []
    for name in SHOWN:
        value, ends = found[name]
        texts.append(f"{name} {value:.1f} %" + (f" ({ends[0]:.1f} to {ends[1]:.1f})" if ends else ""))
    say(f"{len(lines):,} test videos: {', '.join(texts)}; {folder / 'timelines.png'}")
    return {name: {"percent": value, "interval95_percent": ends} for name, (value, ends) in found.items()}
