"""Frames out of a video file or a folder of images: uint8 arrays of shape (H, W, 3) in RGB order."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from multiprocessing.context import BaseContext
from pathlib import Path

import numpy as np

from video.decoder import (
    Damage,
    Decoder,
    Frame,
    frame_rate,
    open_file,
    packet_times,
    stated_end,
    stated_frames,
)  # fmt: skip
from video.files import VideoError, frame_files, printable, stated_size
from video.opencv import MAX_PIXELS, av, cv2

MIN_FRAMES = 2  # a single frame shows no action
# Seconds that are sooner decoded than searched, and by which the time of a frame may be off.
NEAR, SAME = 2.0, 2e-3
NO_FRAMES = "not one frame decodes; copy or download it again"
NO_FRAME: np.ndarray = np.empty((0, 0, 3), np.uint8)


def worker_context() -> BaseContext:
    """How to start processes that decode video.

    Not by fork: a copy of a process that holds FFmpeg or OpenMP threads waits forever for them when it cleans
    up. The fork server has no threads; it loads the heavy libraries once, so that its copies start at once.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["av", "cv2", "numpy", "torch", "tqdm"])
    return context


def end_with_parent(_: int = 0) -> None:
    """Have a process of `worker_context` end when the one that started it does, be it killed.

    By itself it does not: its parent is the fork server, which waits for it in turn.
    """

    def wait() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _read_image(path: Path) -> np.ndarray:
    name = printable(path)
    try:
        # OpenCV itself opens no file whose name is not UTF-8.
        image = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        raise VideoError(f"{name}: a damaged image, or one of more than {MAX_PIXELS:,} pixels") from error
    if image is None:
        raise VideoError(f"{name}: not a readable image; extract the frames again")
    return image


def nothing(_: Frame) -> None:
    """What is done with each frame where nobody watches; a lambda could not be sent to another process."""


class Video:
    """A video file, or a folder of numbered images as `extract_frames.py` makes them.

    Nothing is read before it is asked for. `frames` decodes from the start each time, on one core.

    Attributes:
        path: the file or folder
        name: the path as it is shown
        lost: frames that did not decode the last time that all were read
        problems: what was wrong with it then, in sentences
        end: when its last frame ended then, in seconds from the first
        begin: when the first frame that was read is shown, in seconds of the clock of the file and its sound
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, printable(path)
        self.lost, self.problems, self.end = 0, list[str](), Fraction(0)
        self.begin: Fraction | None = None
        # Called with each frame that `timed_frames` gives.
        self.watch: Callable[[Frame], object] = nothing
        self._count: int | None = None
        self._fps: Fraction | None = None
        self._packets, self._length = 0, Fraction(0)

    def fps(self) -> Fraction:
        """Frames per second of a video file, exactly: as stated where the times of its frames agree.

        Raises: MissingFileError or VideoError as `frames` does, and for a folder or a rate without sense.
        """
        if self._fps is not None:
            return self._fps
        if self.path.is_dir():
            raise VideoError(f"{self.name}: a folder of frames has no frame rate; name a video file")
        check_whole(self.path)
        container, stream = open_file(self.path)
        with container:
            times = packet_times(container, stream)
            self._packets, rate = len(times), frame_rate(times, stream)
            self._length = times[-1] - times[0] if times else Fraction(0)
        if rate is None or not 0 < rate <= 1000:
            said = f"{float(rate or 0):g}"
            raise VideoError(f"{self.name}: frame rate {said} makes no sense; convert the file to mp4 first")
        self._fps = rate.limit_denominator(1001)
        return self._fps

    def length(self) -> Fraction:
        """Seconds of a video file, by the times of its packets. Raises: as `fps`."""
        fps = self.fps()
        return self._length + 1 / fps

    def count(self) -> int:
        """Number of frames that decode, which an index may overstate; counted once. Raises: as `frames`."""
        if self._count is None:
            if self.path.is_dir():
                self._count = len(frame_files(self.path))
            else:
                with self._decode() as decoder:
                    self._count = sum(1 for _ in decoder)
                    self._take_stock(decoder.damage)
                if self._count == 0:
                    raise VideoError(f"{self.name}: {NO_FRAMES}")
        return self._count

    def size(self) -> int:
        """Bytes of the file, or images of the folder: what grows with the frames and is quick to tell."""
        return len(frame_files(self.path)) if self.path.is_dir() else self.path.stat().st_size

    def stated_count(self) -> int:
        """Number of frames as the file states it, or of its packets once `fps` is known: quick, may be wrong.

        Returns: 0 if it states nothing, or nonsense. Raises: as `frames`.
        """
        if self.path.is_dir():
            return self.count()
        if self._packets:
            return self._packets
        check_whole(self.path)
        container, stream = open_file(self.path)
        with container:
            if stream.frames:
                return stated_frames(stream, self.path)
            seconds = stream.duration and stream.time_base and stream.duration * stream.time_base
            seconds = seconds or Fraction(container.duration or 0, 10**6)
            return max(0, round(seconds * (stream.average_rate or 0)))

    def frames(self, indices: Sequence[int] | np.ndarray | None = None) -> Iterator[np.ndarray]:
        """Frames in order, (H, W, 3) uint8 RGB: all, or those of the ascending `indices`, which may repeat.

        Of all, a frame that does not decode is left out, and counted in `lost` at the end.

        Raises: MissingFileError if there is no such file; VideoError if it is truncated, is no video, has no
            frame, or ends before an index.
        """
        if self.path.is_dir():
            files = frame_files(self.path)
            wanted = range(len(files)) if indices is None else indices
            previous, frame = -1, NO_FRAME
            for index in wanted:
                if index >= len(files):
                    raise self._too_short(index, len(files))
                if index != previous:
                    previous, frame = index, _read_image(files[index])
                yield frame
        elif indices is None:
            yield from (frame.image for frame in self.timed_frames())
        else:
            yield from self._chosen_frames(indices)

    def timed_frames(self) -> Iterator[Frame]:
        """All frames with their times; as `frames` else. Images are taken to come 25 a second."""
        if self.path.is_dir():
            for number, still in enumerate(self.frames()):
                timed = Frame(still, Fraction(number, 25))
                self.watch(timed)
                yield timed
            return
        read = 0
        with self._decode() as decoder:
            for coded, ticks in decoder:
                image = self._image(decoder, coded)
                if image is not None:
                    self.begin = decoder.begin
                    read += 1
                    frame = Frame(image, ticks * decoder.damage.tick)
                    self.watch(frame)
                    yield frame
            self._take_stock(decoder.damage)
        if read == 0:
            raise VideoError(f"{self.name}: {NO_FRAMES}")

    def frames_from(self, second: float, times: np.ndarray | None = None) -> Iterator[Frame]:
        """Frames of a file from that on which is shown at a second, searched where the file allows it.

        Args:
            times: of all frames, if they are known: what a search finds must be one of them

        Raises: as `frames`.
        """
        yielded = False
        for search in (True, False) if second > NEAR else (False,):
            for frame in self._frames_from(second, times, search):
                yielded = True
                yield frame
            if yielded:
                return

    def _frames_from(self, second: float, times: np.ndarray | None, search: bool) -> Iterator[Frame]:
        """As `frames_from`; none where the search goes wrong."""
        with self._decode() as decoder:
            if search and not decoder.seek(second):
                return
            shown: tuple[av.VideoFrame, Fraction] | None = None
            for number, (coded, ticks) in enumerate(decoder):
                at = ticks * decoder.damage.tick
                if search and number == 0:
                    known = times is None or np.abs(times - float(at)).min() < SAME
                    if at > second + SAME or not known:
                        return
                # A second is seldom a fraction.
                if float(at) <= second + 1e-6:
                    shown = coded, at
                    continue
                for each, when in ([shown] if shown else []) + [(coded, at)]:
                    image = self._image(decoder, each)
                    if image is not None:
                        yield Frame(image, when)
                shown = None
            if shown and (image := self._image(decoder, shown[0])) is not None:
                yield Frame(image, shown[1])

    def _take_stock(self, damage: Damage) -> None:
        self.lost, self.problems = damage.lost(), damage.problems()
        self.end = (damage.shown_until() - damage.first) * damage.tick

    def _decode(self) -> contextlib.closing[Decoder]:
        check_whole(self.path)
        return contextlib.closing(Decoder(self.path))

    def _chosen_frames(self, indices: Sequence[int] | np.ndarray) -> Iterator[np.ndarray]:
        at, frame = -1, NO_FRAME
        with self._decode() as decoder:
            coded_frames = iter(decoder)
            for index in indices:
                if index != at:
                    # Conversion to RGB is half of the work, and left out for those between.
                    while at < index:
                        pair = next(coded_frames, None)
                        if pair is None:
                            raise self._too_short(index, at + 1)
                        coded, at = pair[0], at + 1
                    image = self._image(decoder, coded)
                    if image is None:
                        raise VideoError(f"{self.name}: frame {index} does not decode; copy the file again")
                    frame = image
                yield frame

    def _image(self, decoder: Decoder, coded: av.VideoFrame) -> np.ndarray | None:
        try:
            return decoder.image(coded)
        except VideoError as error:
            raise VideoError(f"{self.name}: {error}") from error

    def _too_short(self, index: int, count: int) -> VideoError:
        return VideoError(f"{self.name}: frame {index} of only {count} was asked for; did the file change?")


def check_whole(path: Path) -> None:
    """Cheap look at a video file's size and header, since decoders read up to a cut without complaint.

    A file that was cut off is shorter than it states, and so are its frames.

    Raises: MissingFileError if there is no such file, VideoError if it is empty or was cut off.
    """
    stated, size = stated_size(path), path.stat().st_size
    if stated > size and not _has_all_frames(path):
        of = f"{size:,} bytes of {stated:,}"
        raise VideoError(f"{printable(path)}: the file is truncated, {of}; copy or download it again")


def _has_all_frames(path: Path) -> bool:
    """Whether as many frames come as the header of a file states, or until the end that it states."""
    try:
        container, stream = open_file(path)
    except VideoError:
        return False
    with container:
        if stream.frames > path.stat().st_size:  # nonsense, of what was written into a pipe
            return True
        times = packet_times(container, stream)
        if not times or (stream.frames and len(times) >= stream.frames):
            return bool(times)
        # Of an AVI without an index the end is found by reading it.
        end = None if container.format.name == "avi" else stated_end(container, stream, path)
        usual = (times[-1] - times[0]) / max(1, len(times) - 1)
        return times[-1] + Fraction(3, 2) * usual > end if end else not stream.frames


def check_length(path: Path, num_frames: int) -> None:
    """Refuse a video that shows no action. Raises: VideoError if it has a single frame."""
    if num_frames < MIN_FRAMES:
        raise VideoError(f"{path}: a single frame shows no action; remove the clip, or choose a longer one")
