"""What the web page takes: which inputs, how long a video, how much work for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from annotation.overlay import OVERLAYS
from utils.flags import COUNT, POSITIVE, setting
from utils.process import UserError
from video.decoder import Frame
from video.files import VIDEO_SUFFIXES, VideoError
from video.reader import Video

# Of a frame: 4K. Larger ones would keep everybody waiting.
MAX_PIXELS = 4096 * 2304
MAX_FPS = 60
# For what does not grow with a video.
SPARE_SECONDS = 60
MAX_COST = 3.0
# Characters of the names of actions, and of what a user typed in a message.
MAX_NAMES, ECHOED = 20_000, 200
# Videos that a page offers.
EXAMPLES = 8


@dataclass(frozen=True, kw_only=True)
class PageSettings:
    """What the page takes."""

    examples: Path = setting(
        Path("data/toy-actions/UCF-101"),
        f"folder of videos to pick from, the first of each of its folders, {EXAMPLES} at most; default: the "
        "toy data",
        Path,
    )
    max_megabytes: int = setting(100, "of an upload; 100 (default) is some minutes of HD", COUNT)
    keep_megabytes: int = setting(
        2000, "of uploads and results at a time, default 2000; beyond, nothing more is taken", COUNT
    )
    max_seconds: int = setting(120, "of a video; 120 (default) takes half a minute on 2 cores", COUNT)
    max_slowness: float = setting(
        10.0,
        "times its length, and a minute, that a video may take before it is given up; default 10; raise it "
        "for a slow encoder",
        POSITIVE,
    )
    max_waiting: int = setting(40, "users in the queue, default 40; more are asked to come back", COUNT)


def check_inputs(inputs: Sequence[Any], files: Path, examples: int) -> None:
    """Refuse what the page itself would not send, before Gradio looks at it, which fetches what is a URL.

    Args:
        inputs: an upload or the number of an example, overlay, cost of a change, names of actions
        files: folder of the uploads
        examples: how many there are

    Raises: UserError in one sentence.
    """
    if len(inputs) != 4 or inputs[0] is None:
        raise UserError("choose a video first; send it, the overlay, the cost of a change and the actions")
    video, overlay, change_cost, only = inputs
    if isinstance(video, dict):
        _check_upload(video.get("path"), video.get("url"), files)
    elif type(video) is not int or not 0 <= video < examples:
        raise UserError(
            f"example {str(video)[:ECHOED]}: there are {examples}, counted from 0, and nothing is fetched "
            "from elsewhere"
        )
    if overlay not in OVERLAYS:
        raise UserError(f"overlay {str(overlay)[:ECHOED]}: choose one of {', '.join(OVERLAYS)}")
    if type(change_cost) not in (int, float) or not 0 <= change_cost <= MAX_COST:
        raise UserError(
            f"cost of a change {str(change_cost)[:ECHOED]}: choose a number from 0 to {MAX_COST:g}"
        )
    if not isinstance(only, str) or len(only) > MAX_NAMES or len(max(only.split(","), key=len)) > ECHOED:
        raise UserError(f"only {str(only)[:ECHOED]}: write fewer names of actions, between commas")


def _check_upload(path: Any, url: Any, files: Path) -> None:
    # Clients say where an upload can be had from the page.
    is_elsewhere = url is not None and unquote(str(url)).partition("/gradio_api/file=")[2] != path
    if not isinstance(path, str) or "\0" in path or is_elsewhere or not (
        Path(path).resolve().is_relative_to(files)
    ):  # fmt: skip
        raise UserError("not an upload; nothing is fetched from elsewhere, send the video itself")
    name = Path(path).name[:ECHOED]
    if Path(path).suffix.lower() not in VIDEO_SUFFIXES:
        raise UserError(f"{name}: not a video, which end in {', '.join(VIDEO_SUFFIXES)}")
    if not Path(path).is_file():
        raise UserError(f"{name}: this upload has been deleted; send it again")


class WatchedVideo(Video):
    """A video that ends in an error when it takes too much time, or is too long or too large.

    Args:
        path: the file
        settings: of the page
        progress: called with how many frames have been read, and how many there are in both passes

    Raises: MissingFileError or VideoError as `Video.frames`; VideoError if it is too long or its frames are
        too large, by what the file states and by what comes.
    """

    def __init__(self, path: Path, settings: PageSettings, progress: Callable[[int, int], object]) -> None:
        super().__init__(path)
        self._settings, self._progress, self._read = settings, progress, 0
        length = float(self.length())
        self._check(length <= settings.max_seconds, f"{length:.0f} seconds are too long for this page")
        self._seconds = SPARE_SECONDS + settings.max_slowness * length
        self._begun = time.monotonic()
        # It may claim any frame rate, and hold more frames for a second than anybody films.
        self._most = 2 * settings.max_seconds * min(MAX_FPS, max(1, round(self.fps()))) + 1
        self.watch = self._watch
        next(self.frames())
        self._read = 0

    def _watch(self, frame: Frame) -> None:
        self._read += 1
        self._progress(self._read, 2 * self.stated_count())
        height, width, _ = frame.image.shape
        self._check(height * width <= MAX_PIXELS, f"frames of {width} x {height} pixels are too large")
        is_long = frame.second > self._settings.max_seconds or self._read > self._most
        self._check(not is_long, "more frames than the file states, too many for this page")
        is_slow = time.monotonic() - self._begun > self._seconds
        self._check(not is_slow, f"it takes more than {self._seconds:.0f} seconds, and others wait")

    def _check(self, good: bool, problem: str) -> None:
        if not good:
            longest = self._settings.max_seconds
            raise VideoError(f"{self.path}: {problem}; cut it to {longest} seconds, or make it 4K or smaller")
