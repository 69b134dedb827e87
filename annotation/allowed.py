"""What the web page takes: which inputs, how long a video, how much work and memory for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np

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
MAX_SMOOTH = 3.0
# Of what a user typed, in a message; names of actions are far shorter.
ECHOED = 200
MAX_NAMES = 20_000


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
    max_seconds: int = setting(120, "of a video; 120 (default) takes half a minute on 2 cores", COUNT)
    max_slowness: float = setting(
        10.0,
        "times its length, and a minute, that a video may take before it is given up; default 10; raise it "
        "for a slow encoder",
        POSITIVE,
    )
    max_waiting: int = setting(40, "users in the queue, default 40; more are asked to come back", COUNT)


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= ECHOED else f"{text[:ECHOED]}..."


def check_inputs(name: str, given: Sequence[Any], files: Path, examples: int) -> None:
    """Refuse what the page itself would not send.

    Args:
        name: of what is called, annotate or example
        given: the upload or the number of an example, overlay, seconds to average over, names of actions
        files: folder of the uploads
        examples: how many there are

    Raises: UserError in one sentence.
    """
    if name not in ("annotate", "example") or len(given) != 4:
        raise UserError("send a video or the number of an example, the overlay, the seconds and the actions")
    first, overlay, smooth, only = given
    if name == "annotate":
        _check_upload(first, files)
    elif type(first) is not int or not 0 <= first < examples:
        raise UserError(
            f"example {_shown(first)}: there are {examples}, from 0 to {examples - 1}; choose one"
        )
    if overlay not in OVERLAYS:
        raise UserError(f"overlay {_shown(overlay)}: choose one of {', '.join(OVERLAYS)}")
    if type(smooth) not in (int, float) or not 0 <= smooth <= MAX_SMOOTH:
        raise UserError(f"average over {_shown(smooth)}: choose a number of seconds from 0 to {MAX_SMOOTH:g}")
    if not isinstance(only, str):
        raise UserError(f"only {_shown(only)}: write names of actions between commas, or nothing for all")
    longest = max(only.split(","), key=len)
    if len(only) > MAX_NAMES or len(longest) > ECHOED:
        raise UserError(
            f"only {_shown(longest)}: names of {len(only):,} characters are too many; write fewer"
        )


def _check_upload(file: Any, files: Path) -> None:
    if file is None:
        raise UserError("choose a video first")
    given, url = (file.get("path"), file.get("url")) if isinstance(file, dict) else (file, None)
    try:
        path = Path(str(given)).resolve()
        is_upload = isinstance(given, str) and path.is_relative_to(files)
        is_there = is_upload and path.is_file()
    except (OSError, ValueError):  # no path at all
        path, is_upload, is_there = Path(), False, False
    # Clients say where an upload can be had from the page.
    is_elsewhere = url is not None and unquote(str(url)).partition("/gradio_api/file=")[2] != given
    if not is_upload or is_elsewhere:
        raise UserError(
            f"{_shown(url if is_elsewhere else given)}: not an upload; nothing is fetched from elsewhere, "
            "send the video itself"
        )
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        raise UserError(f"{_shown(path.name)}: not a video, which end in {', '.join(VIDEO_SUFFIXES)}")
    if not is_there:
        raise UserError(f"{_shown(path.name)}: this upload has been deleted; send it again")


class WatchedVideo(Video):
    """A video that ends in an error when it takes too much time, or is too long or too large.

    Args:
        path: the file
        settings: of the page
        watch: called with each frame that is read

    Raises: MissingFileError or VideoError as `Video.frames`; VideoError if it is too long or its frames are
        too large, by what the file states.
    """

    def __init__(self, path: Path, settings: PageSettings, watch: Callable[[], object]) -> None:
        super().__init__(path)
        self._longest, self._slowness, self._told = settings.max_seconds, settings.max_slowness, watch
        length, self._begun, self._read = float(self.length()), time.monotonic(), 0
        self._check_length(length)
        self._seconds = SPARE_SECONDS + self._slowness * length
        # It may claim any frame rate, and hold more frames for a second than anybody films.
        self._most = self._longest * min(MAX_FPS, max(1, round(self.fps())))
        self._check_size(next(self.frames()))
        self.watch = self._watch

    def _watch(self, frame: Frame) -> None:
        self._told()
        self.check_time()
        self._check_length(float(frame.second))
        self._check_size(frame.image)
        # Each pass counts anew.
        self._read = self._read + 1 if frame.second else 1
        if self._read > self._most:
            raise VideoError(f"{self.path}: more than the {self._most:,} frames allowed; cut it shorter")

    def check_time(self) -> None:
        """See whether there is time left. Raises: VideoError if there is not."""
        if time.monotonic() - self._begun > self._seconds:
            raise VideoError(
                f"{self.path}: it takes more than {self._seconds:.0f} seconds, {self._slowness:g} times "
                f"its length and {SPARE_SECONDS}, and others wait; cut it shorter, or make it smaller"
            )

    def _check_length(self, seconds: float) -> None:
        if seconds > self._longest:
            raise VideoError(
                f"{self.path}: {seconds:.0f} seconds are too long for this page; cut it to {self._longest}"
            )

    def _check_size(self, image: np.ndarray) -> None:
        if image.shape[0] * image.shape[1] > MAX_PIXELS:
            raise VideoError(
                f"{self.path}: frames of {image.shape[1]} x {image.shape[0]} pixels are too large for this "
                "page; make it 4K or smaller"
            )
