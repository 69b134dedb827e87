"""Frames out of a video file or a folder of images.

Frames are uint8 arrays of shape (H, W, 3) in RGB order everywhere.
"""

from __future__ import annotations

import multiprocessing
import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import BinaryIO

import numpy as np

from opencv import MAX_PIXELS, av, cv2

VIDEO_SUFFIXES = (".avi", ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".mpg", ".mpeg")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
NO_FRAME: np.ndarray = np.empty((0, 0, 3), np.uint8)


def worker_context() -> BaseContext:
    """How to start processes that decode video.

    Not by fork: a copy of a process that holds FFmpeg or OpenMP threads waits forever for them when it cleans
    up. The fork server has no threads; it loads the heavy libraries once, so that its copies start at once.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["av", "cv2", "numpy", "torch", "torchvision.transforms.v2", "tqdm"])
    return context


class VideoError(ValueError):
    """A video file or a folder of frames that cannot be used; the message names it and the next step."""


def frame_files(folder: Path) -> list[Path]:
    """The images of a folder in the order of the numbers they are named by (`0.jpg`, `1.jpg`, ...).

    Raises: VideoError if the folder holds no image, or an image whose name is not a number.
    """
    files = [entry for entry in folder.iterdir() if entry.suffix.lower() in IMAGE_SUFFIXES]
    strays = [file.name for file in files if not file.stem.isdecimal()]
    if strays:
        raise VideoError(
            f"{folder / strays[0]}: frames must be named by their number, as 0.jpg; extract them again"
        )
    if not files:
        raise VideoError(f"{folder}: no frames in this folder; run extract_frames.py again")
    return sorted(files, key=lambda file: int(file.stem))


def video_files(folder: Path) -> list[Path]:
    """The video files in a folder and in those below it, sorted; none where there is no such folder."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)


def check_whole(path: Path) -> None:
    """Cheap look at a video file's size and header, without decoding.

    AVI states the size of its one RIFF chunk, and MP4 that of each of its boxes, so a file that was cut off
    shows here. Decoders read such a file without complaint up to the cut.

    Raises: FileNotFoundError if there is no such file, VideoError if it is empty or shorter than it states.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such video file; check the path")
    size = path.stat().st_size
    if size == 0:
        raise VideoError(f"{path}: the file is empty; copy or download it again")
    with path.open("rb") as file:
        header = file.read(12)
        stated = size
        if header[:4] == b"RIFF" and len(header) == 12:
            stated = struct.unpack("<I", header[4:8])[0] + 8
        elif header[4:8] == b"ftyp":
            stated = _mp4_size(file, size)
    if stated > size:
        raise VideoError(
            f"{path}: the file is truncated, {size:,} bytes of {stated:,}; copy or download it again"
        )


def _mp4_size(file: BinaryIO, size: int) -> int:
    """Bytes that the top-level boxes of an MP4 file state in all (ISO/IEC 14496-12, 4.2)."""
    position = 0
    while position < size:
        file.seek(position)
        header = file.read(16)
        if len(header) < 8:
            return position + 8
        length = struct.unpack(">I", header[:4])[0]
        if length == 1 and len(header) == 16:
            length = struct.unpack(">Q", header[8:])[0]
        if length == 0:  # to the end of the file
            return size
        if length < 8:  # not a box: the decoder shall judge
            return size
        position += length
    return position


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

        Raises: FileNotFoundError or VideoError as `frames` does; VideoError also for a folder or a rate that
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

        Raises: FileNotFoundError or VideoError as `frames` does.
        """
        fps = self.fps()
        try:
            with av.open(str(self.path)) as container:
                stream = container.streams.video[0]
                found = sorted(
                    packet.pts * packet.time_base
                    for packet in container.demux(stream)
                    if packet.pts is not None and packet.time_base is not None and packet.size
                )
        except (av.FFmpegError, IndexError):  # OpenCV reads it all the same, and knows no times
            return None
        times = [time - found[0] for time in found]
        steady = all(abs(time - number / fps) <= 1 / (2 * fps) for number, time in enumerate(times))
        # Two at one time cannot be shown.
        if steady or len(set(times)) < len(times):
            return None
        return times

    def count(self) -> int:
        """Number of frames that decode, which the index of an AVI may overstate; found once, then kept.

        Raises: FileNotFoundError or VideoError as `frames` does.
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

        Raises: FileNotFoundError or VideoError as `frames` does.
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

        Raises: FileNotFoundError if there is no such file; VideoError if it is truncated, is no video, has no
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
