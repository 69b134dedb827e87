"""A copy of a video with its labels drawn on: the second pass over its frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np

from annotation.overlay import Overlay
from annotation.recognizer import Recognition
from features.workers import ahead
from utils.files import make_writable_folder
from video.reader import Video
from video.writer import write_video


def write_annotated(
    recognition: Recognition,
    video: Video,
    output: Path,
    *,
    overlay: str = "full",
    paint: Callable[[np.ndarray, int], np.ndarray] = lambda image, _: image,
    progress: Callable[[], object] = lambda: None,
) -> None:
    """Write a video with its labels on every frame; its sound and the times of its frames stay.

    Args:
        recognition: of the video
        output: .mp4 or .gif
        paint: what is to be done with a frame of a number before labels are drawn
        progress: called after each frame

    Raises: VideoError if it cannot be read any more, UserError or OSError if the output cannot be written.
    """
    make_writable_folder(output.parent)
    # Where on the clock of the file the picture begins.
    next(video.timed_frames())
    drawing = Overlay(recognition.classes, len(recognition.labels), overlay)
    times: list[Fraction] = []

    def drawn() -> Iterator[np.ndarray]:
        last = len(recognition.labels) - 1
        for number, frame in enumerate(ahead(video.timed_frames())):
            row = min(number, last)
            times.append(frame.second)
            progress()
            image = paint(frame.image, row)
            yield drawing.draw(image, recognition.probabilities[row], int(recognition.labels[row]))
        times.append(video.end)

    write_video(output, drawn(), recognition.fps, times=times, sound=video.path, begin=video.begin)
