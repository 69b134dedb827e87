"""Frames out of a video file or a folder of images.

Frames are uint8 arrays of shape (H, W, 3) in RGB order everywhere.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from fractions import Fraction
from multiprocessing.context import BaseContext
from pathlib import Path

import numpy as np

from video.files import VideoError, check_whole, frame_files
from video.opencv import MAX_PIXELS, av, cv2

MIN_FRAMES = 2  # a single frame shows no action
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


def _read_image(path: Path) -> np.ndarray:
    try:
        image = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        raise VideoError(f"{path}: a damaged image, or one of more than {MAX_PIXELS:,} pixels") from error
    if image is None:
        raise VideoError(f"{path}: not a readable image; extract the frames again")
    return image


class Video:
    """A video file, or a folder of numbered images as `extract_frames.py` makes them.

    Nothing is read before it is asked for. `frames` decodes from the start each time, on one core.

    Attributes:
        path: the file or folder
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._count: int | None = None

    def _open(self) -> cv2.VideoCapture:
        check_whole(self.path)
        # One decoding thread: several are no faster on clips of this size, and data workers fill the cores.
        capture = cv2.VideoCapture(str(self.path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
        if not capture.isOpened():
            raise VideoError(f"{self.path}: no video in this file that can be decoded; is it a video?")
        width, height = (
            int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)),
            int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT)),
        )
        if width * height > MAX_PIXELS:
            raise VideoError(
                f"{self.path}: frames of {width} x {height} pixels are too large; {MAX_PIXELS:,} are allowed"
            )
        return capture

    def fps(self) -> Fraction:
        """Frames per second of a video file; 30000/1001 is given exactly.

        Raises: MissingFileError or VideoError as `frames` does; VideoError also for a folder or a rate that
            makes no sense.
        """
        if self.path.is_dir():
            raise VideoError(f"{self.path}: a folder of frames has no frame rate; name a video file")
        capture = self._open()
        rate = capture.get(cv2.CAP_PROP_FPS)
        capture.release()
        if not 0 < rate <= 1000:
            raise VideoError(f"{self.path}: frame rate {rate} makes no sense; convert the file to mp4 first")
        return Fraction(rate).limit_denominator(1001)

    def times(self) -> list[Fraction] | None:
        """When each frame is shown, in seconds from the first; None where they come at a steady rate.

        Read off the packets, without decoding. A list may be longer than the frames that decode.

        Raises: MissingFileError or VideoError as `frames` does.
        """
        fps = self.fps()
        try:
            with av.open(str(self.path)) as container:
                stream = container.streams.video[0]
                stamps = sorted(
                    packet.pts * packet.time_base
                    for packet in container.demux(stream)
                    if packet.pts is not None and packet.time_base is not None and packet.size
                )
        except (av.FFmpegError, IndexError):  # OpenCV reads it all the same, and knows no times
            return None
        times = [time - stamps[0] for time in stamps]
        steady = all(abs(time - number / fps) <= 1 / (2 * fps) for number, time in enumerate(times))
        # Two at one time cannot be shown.
        if steady or len(set(times)) < len(times):
            return None
        return times

    def count(self) -> int:
        """Number of frames that decode, which the index of an AVI may overstate; found once, then kept.

        Raises: MissingFileError or VideoError as `frames` does.
        """
        if self._count is None:
            if self.path.is_dir():
                self._count = len(frame_files(self.path))
            else:
                capture = self._open()
                self._count = 0
                while capture.grab():
                    self._count += 1
                capture.release()
                if self._count == 0:
                    raise VideoError(f"{self.path}: not one frame decodes; copy or download it again")
        return self._count

    def size(self) -> int:
        """Bytes of the file, or images of the folder: what grows with the frames and is quick to tell."""
        return len(frame_files(self.path)) if self.path.is_dir() else self.path.stat().st_size

    def stated_count(self) -> int:
        """Number of frames as the file states it: quick, and in some files too many; see `count`.

        Raises: MissingFileError or VideoError as `frames` does.
        """
        if self.path.is_dir():
            return self.count()
        capture = self._open()
        stated = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        capture.release()
        return max(0, stated)

    def frames(self, indices: Sequence[int] | np.ndarray | None = None) -> Iterator[np.ndarray]:
        """Frames in order, (H, W, 3) uint8 RGB: all, or those of `indices`.

        Args:
            indices: ascending frame numbers from 0; a number that stands twice is given twice

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
            return
        capture = self._open()
        try:
            if indices is None:
                yield from self._all_frames(capture)
            else:
                yield from self._chosen_frames(capture, indices)
        finally:
            capture.release()

    def _all_frames(self, capture: cv2.VideoCapture) -> Iterator[np.ndarray]:
        read = 0
        while capture.grab():
            yield self._retrieve(capture, read)
            read += 1
        if read == 0:
            raise VideoError(f"{self.path}: not one frame decodes; copy or download it again")

    def _chosen_frames(
        self, capture: cv2.VideoCapture, indices: Sequence[int] | np.ndarray
    ) -> Iterator[np.ndarray]:
        at, frame = -1, NO_FRAME
        for index in indices:
            if index != at:
                # A grabbed frame is decoded but not converted to RGB, which is half of the work.
                while at < index:
                    if not capture.grab():
                        raise self._too_short(index, at + 1)
                    at += 1
                frame = self._retrieve(capture, at)
            yield frame

    def _retrieve(self, capture: cv2.VideoCapture, index: int) -> np.ndarray:
        ok, frame = capture.retrieve()
        if not ok:
            raise VideoError(f"{self.path}: frame {index} does not decode; copy or download the file again")
        return cv2.cvtColor(frame, cv2.COLOR_BGR2RGB, dst=frame)

    def _too_short(self, index: int, count: int) -> VideoError:
        return VideoError(
            f"{self.path}: frame {index} was asked for and only {count} decode; did the file change?"
        )


def check_length(path: Path, num_frames: int) -> None:
    """Refuse a video that shows no action.

    Raises: VideoError if it has a single frame.
    """
    if num_frames < MIN_FRAMES:
        raise VideoError(f"{path}: a single frame shows no action; remove the clip, or choose a longer one")
