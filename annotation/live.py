"""A camera or a stream as it comes: the newest frame, and what the frames up to it show.

Nothing waits for the future, and nothing queues up: while a frame is worked on, those that come and are
not the newest any more are lost.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from annotation.labels import FrameModel, Smoother, label_clips
from annotation.overlay import Overlay
from dataset import padding_of, window_indices
from video.files import VideoError
from video.frames import resize_frames, stream_images
from video.opencv import cv2

SCHEMES = ("http", "https", "rtmp", "rtp", "rtsp", "rtsps", "srt", "tcp", "udp")
# Seconds without a frame after which a stream has ended.
PATIENCE = 10
# What a source without a frame rate is taken to have, in frames/s.
USUAL_FPS = 25
# Frames whose latency and rate are shown.
RECENT = 25


def is_live(name: str) -> bool:
    """Whether a --video_path is the number of a camera or the address of a stream, and not a file."""
    scheme, separator, _ = name.partition("://")
    if separator:
        return scheme in SCHEMES
    return name.isdecimal() and not Path(name).exists()


@dataclass(frozen=True)
class Shot:
    """A frame as it came.

    Attributes:
        number: how many came before it, lost ones counted
        arrived: when it came, in seconds of `time.monotonic`
        image: (H, W, 3) uint8 RGB
        before: the frame that motion is seen against, as `image`
    """

    number: int
    arrived: float
    image: np.ndarray
    before: np.ndarray


class LiveVideo:
    """A camera or a stream, read by a thread of its own, which keeps the newest frame only.

    Args:
        name: the number of a camera, or the address of a stream
        stride: how many frames before a frame the one stands that motion is seen against

    Attributes:
        fps: frames per second, as the source states them, or `USUAL_FPS`

    Raises: VideoError if there is no such camera, or no stream.
    """

    def __init__(self, name: str, stride: int = 1) -> None:
        if name.isdecimal():
            system = cv2.CAP_V4L2 if sys.platform == "linux" else cv2.CAP_ANY
            self._capture = cv2.VideoCapture(int(name), system)
        else:
            limits = [
                *(cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, 1000 * PATIENCE),
                *(cv2.CAP_PROP_READ_TIMEOUT_MSEC, 1000 * PATIENCE),
                # More than one would decode as many frames late.
                *(cv2.CAP_PROP_N_THREADS, 1),
            ]
            self._capture = cv2.VideoCapture(name, cv2.CAP_FFMPEG, limits)
        if not self._capture.isOpened():
            what = "no such camera, or it is in use" if name.isdecimal() else "no stream at this address"
            raise VideoError(f"{name}: {what}; cameras count from 0, streams are like rtsp://host/path")
        stated = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = Fraction(stated if 1 <= stated <= 240 else USUAL_FPS).limit_denominator(1001)
        # Recordings behind an address come as fast as the network brings them.
        self._recording = not name.isdecimal() and self._capture.get(cv2.CAP_PROP_FRAME_COUNT) > 0
        self._came = threading.Condition()
        self._recent: deque[np.ndarray] = deque(maxlen=stride + 1)
        self._number, self._arrived, self._taken = -1, 0.0, -1
        self._ended = self._stopped = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        # A camera that is pulled out may raise one.
        with contextlib.suppress(cv2.error):
            self._read_to_end()
        with self._came:
            self._ended = True
            self._came.notify()
        self._capture.release()

    def _read_to_end(self) -> None:
        begun = time.monotonic()
        while not self._stopped and self._capture.grab():
            if self._recording:
                ahead = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000 - (time.monotonic() - begun)
                time.sleep(max(0.0, ahead))
            arrived = time.monotonic()
            good, image = self._capture.retrieve()
            if not good:
                break
            if self._recent and image.shape != self._recent[0].shape:
                # Streams may change their size when the network is slow.
                image = cv2.resize(image, self._recent[0].shape[1::-1], interpolation=cv2.INTER_AREA)
            with self._came:
                self._recent.append(image)
                self._number += 1
                self._arrived = arrived
                self._came.notify()

    def newest(self, wait: float) -> Shot | None:
        """The newest frame, if one came since the last call or comes within `wait` seconds; else None."""
        with self._came:
            self._came.wait_for(lambda: self._ended or self._number > self._taken, wait)
            if self._number == self._taken:
                return None
            number, arrived = self._number, self._arrived
            image, before = self._recent[-1], self._recent[0]
            self._taken = number
        return Shot(number, arrived, *(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB) for bgr in (image, before)))

    def ended(self) -> bool:
        """Whether nothing more comes, and nothing has come since the last frame that was taken."""
        with self._came:
            return self._ended and self._number == self._taken

    def close(self) -> None:
        """Stop reading; a source that hangs is left to itself."""
        self._stopped = True
        self._thread.join(1)


class LiveLabels:
    """What frames show by the frames up to them, whichever of them were lost.

    A window is laid over frame numbers as in a file, and ends at the newest frame; where a frame was lost,
    the one before it stands in. Only frames that windows need are encoded.

    Args:
        model: what labels frames
        img_dim: frame size for the encoder in pixels
        sequence_length: frames of a window
        step: frames from one of the window to the next
        every: frames that share a label, the first one's
    """

    def __init__(self, model: FrameModel, img_dim: int, sequence_length: int, step: int, every: int) -> None:
        self.model, self.img_dim, self.sequence_length = model, img_dim, sequence_length
        self.step, self.every = step, every
        # Of frames that were encoded, as far back as a window reaches.
        self._numbers: deque[int] = deque()
        self._embeddings: deque[Tensor] = deque()
        self._last: tuple[int, Tensor] | None = None

    @torch.no_grad()
    def label(self, shot: Shot) -> Tensor:
        """Class probabilities (C,) of a frame, later than those before it."""
        due = self._last is None or shot.number - self._last[0] >= self.every
        if due or shot.number - self._numbers[-1] >= self.step:
            self._encode(shot)
        if due or self._last is None:
            self._last = shot.number, self._classify(shot.number)
        return self._last[1]

    def _encode(self, shot: Shot) -> None:
        resized = resize_frames([shot.before, shot.image], self.img_dim)
        images = stream_images(resized[1:], resized[:1], self.model.streams)
        self._numbers.append(shot.number)
        self._embeddings.append(self.model.embed(images.to(self.model.device))[0])
        begin = shot.number - self.step * (self.sequence_length - 1)
        while len(self._numbers) > 1 and self._numbers[1] <= begin:
            self._numbers.popleft()
            self._embeddings.popleft()

    def _classify(self, number: int) -> Tensor:
        window = window_indices(number + 1, self.sequence_length, step=self.step, start=number)
        held = np.searchsorted(np.array(self._numbers), window[0], side="right") - 1
        clip = torch.stack([self._embeddings[place] for place in np.maximum(held, 0).tolist()])
        padding = torch.from_numpy(padding_of(window)).to(self.model.device)
        return label_clips(self.model, clip[None], padding)[0]


@dataclass
class Log:
    """What became of the frames of a live video.

    Attributes:
        times: when each frame that was shown came, in seconds from the first
        probabilities: of each, (C,)
        latencies: seconds from when each came to when it had been shown
        lost: frames that were not shown, since a newer one was there
    """

    times: list[Fraction] = field(default_factory=list)
    probabilities: list[np.ndarray] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    lost: int = 0

    def rate(self) -> float:
        """Frames shown per second, lately."""
        recent = self.times[-RECENT:]
        return (len(recent) - 1) / float(recent[-1] - recent[0]) if len(recent) > 1 else 0.0

    def __str__(self) -> str:
        recent: Sequence[float] = self.latencies[-RECENT:] or [0.0]
        return f"{self.rate():.1f} frames/s, {1000 * statistics.median(recent):.0f} ms"


def watch(
    video: LiveVideo,
    labels: LiveLabels,
    smoother: Smoother,
    overlay: Overlay,
    log: Log,
    stop: Callable[[], bool],
) -> Iterator[np.ndarray]:
    """The newest frames with what they show, (H, W, 3) uint8 RGB, until the source ends or `stop` says so.

    Args:
        log: is filled; a frame has been shown when the next is asked for
    """
    begun = 0.0
    while not stop() and not video.ended():
        # So short that a signal is noticed.
        shot = video.newest(0.1)
        if shot is None:
            continue
        begun = begun or shot.arrived
        log.lost = shot.number - len(log.times)
        now = Fraction(shot.arrived - begun).limit_denominator(90_000)
        elapsed = float(now - log.times[-1]) if log.times else 0.0
        probabilities = smoother.add(labels.label(shot), elapsed)
        log.times.append(now)
        log.probabilities.append(probabilities.numpy())
        yield overlay.draw(shot.image, log.probabilities[-1], note=str(log))
        log.latencies.append(time.monotonic() - shot.arrived)
