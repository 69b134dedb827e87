"""A camera or a stream as it comes: the newest frame, and what the frames up to it show.

Nothing waits for the future, and nothing queues up: while a frame is worked on, those that come and are
not the newest any more are lost.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor

from annotation.labels import label_clips
from annotation.overlay import NONE, Overlay
from annotation.recognizer import Recognition, Recognizer
from dataset import padding_of, window_indices
from video.files import VideoError
from video.frames import resize_frames
from video.opencv import cv2

SCHEMES = ("http", "https", "rtmp", "rtp", "rtsp", "rtsps", "srt", "tcp", "udp")
# Seconds without a frame after which a stream has ended; frames/s of a source that states none; frames whose
# latency and rate are shown.
PATIENCE, USUAL_FPS, RECENT = 10, 25, 25


def is_live(name: str) -> bool:
    """Whether a --video_path is the number of a camera or the address of a stream, and not a file."""
    scheme, separator, _ = name.partition("://")
    if separator:
        return scheme in SCHEMES
    return name.isdecimal() and not Path(name).exists()


@dataclass(frozen=True)
class LiveFrame:
    """A frame as it came.

    Attributes:
        number: how many came before it, lost ones counted
        arrived: when it came, in seconds of `time.monotonic`
        recent: frames up to this one, lost ones too, (H, W, 3) uint8 RGB
    """

    number: int
    arrived: float
    recent: tuple[np.ndarray, ...]

    def frames(self, count: int, stride: int) -> list[np.ndarray]:
        """The last `count` of every `stride`-th frame up to this one; the oldest stands in for older ones."""
        backs = [min(stride * back, len(self.recent) - 1) for back in reversed(range(count))]
        return [self.recent[-1 - back] for back in backs]


class LiveVideo:
    """A camera or a stream, read by a thread of its own, which keeps the newest frames only.

    Args:
        name: the number of a camera, or the address of a stream

    Attributes:
        fps: frames per second, as the source states them, or `USUAL_FPS`

    Raises: VideoError if there is no such camera, or no stream.
    """

    def __init__(self, name: str) -> None:
        if name.isdecimal():
            system = cv2.CAP_V4L2 if sys.platform == "linux" else cv2.CAP_ANY
            self._capture = cv2.VideoCapture(int(name), system)
        else:
            wait = 1000 * PATIENCE
            limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, wait, cv2.CAP_PROP_READ_TIMEOUT_MSEC, wait]
            # More than one thread would decode as many frames late.
            self._capture = cv2.VideoCapture(name, cv2.CAP_FFMPEG, [*limits, cv2.CAP_PROP_N_THREADS, 1])
        if not self._capture.isOpened():
            what = "no such camera, or it is in use" if name.isdecimal() else "no stream at this address"
            raise VideoError(f"{name}: {what}; cameras count from 0, streams are like rtsp://host/path")
        stated = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = Fraction(stated if 1 <= stated <= 240 else USUAL_FPS).limit_denominator(1001)
        # Recordings behind an address come as fast as the network brings them, whether they state a length
        # or not. A playlist is of what is live, unless it states one.
        web = name.startswith(("http://", "https://")) and not urlsplit(name).path.endswith(".m3u8")
        self._paced = web or (not name.isdecimal() and self._capture.get(cv2.CAP_PROP_FRAME_COUNT) > 0)
        self._came = threading.Condition()
        self._recent: deque[np.ndarray] = deque(maxlen=1)
        self._number, self._arrived, self._taken = -1, 0.0, -1
        self._ended = self._stopped = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        begun, first, waited = None, 0.0, 0.0
        # A camera that is pulled out may raise one.
        with contextlib.suppress(cv2.error):
            while not self._stopped:
                asked = time.monotonic()
                if not self._capture.grab():
                    break
                arrived, second = time.monotonic(), self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
                if begun is None:
                    begun, first = arrived, second
                elif self._paced:
                    waited += arrived - asked
                    # Who waits for its frames about as long as they last has a camera there.
                    if waited < (second - first) / 2:
                        time.sleep(min(float(PATIENCE), max(0.0, second - first - (arrived - begun))))
                arrived = time.monotonic()
                good, image = self._capture.retrieve()
                if not good:
                    break
                image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
                if self._recent and image.shape != self._recent[0].shape:
                    # Streams may change their size when the network is slow.
                    image = cv2.resize(image, self._recent[0].shape[1::-1], interpolation=cv2.INTER_AREA)
                with self._came:
                    self._recent.append(image)
                    self._number, self._arrived = self._number + 1, arrived
                    self._came.notify()
        with self._came:
            self._ended = True
            self._came.notify()
        self._capture.release()

    def remember(self, memory: int) -> None:
        """Keep as many frames up to the newest one from now on, for what sees several at once; first, one."""
        with self._came:
            self._recent = deque(self._recent, maxlen=memory)

    def newest(self, wait: float) -> LiveFrame | None:
        """The newest frame, if one came since the last call or comes within `wait` seconds; else None."""
        with self._came:
            self._came.wait_for(lambda: self._ended or self._number > self._taken, wait)
            if self._number == self._taken:
                return None
            self._taken = self._number
            return LiveFrame(self._number, self._arrived, tuple(self._recent))

    def ended(self) -> bool:
        """Whether nothing more comes, and nothing has come since the last frame that was taken."""
        with self._came:
            return self._ended and self._number == self._taken

    def close(self) -> None:
        """Stop reading; a source that hangs is left to itself."""
        self._stopped = True
        self._thread.join(1)


class LiveLabels:
    """What frames show by the frames up to them, whichever of them were dropped.

    A clip ends at the newest embedding; where a frame was dropped, the one before it stands in. A video
    encoder takes longer than a frame lasts: it works beside, and meanwhile the last label holds.

    Args:
        recognizer: what labels frames
        fps: of the source

    Attributes:
        memory: frames up to the newest one that a `LiveFrame` must hold
        labeled: number of the frame that the last label is of
    """

    def __init__(self, recognizer: Recognizer, fps: Fraction) -> None:
        self.encoder, self.classify = recognizer.encoder, recognizer.head.classify
        self.stride, self.layout = recognizer.stride(fps), recognizer.layout(fps)
        # Frames to an embedding.
        self._unit = self.stride * self.encoder.windows.hop
        self.memory = self.stride * (self.encoder.live_frames - 1) + 1
        self._beside = ThreadPoolExecutor(1) if self.encoder.windows.frames > 1 else None
        self._coming: Future[tuple[Tensor, int]] | None = None
        # Embeddings, as far back as a clip reaches, each with the number of its last frame.
        self._held: deque[tuple[int, Tensor]] = deque()
        self.labeled = 0
        self._last: Tensor | None = None

    def label(self, frame: LiveFrame) -> Tensor:
        """Class probabilities (C,) of a frame, later than those before it."""
        # What works beside changes what is held.
        if self._coming is None:
            due = self._last is None or frame.number - self.labeled >= self.layout.every * self._unit
            needed = not self._held or frame.number - self._held[-1][0] >= self.layout.step * self._unit
            if self._beside and (due or needed):
                self._coming = self._beside.submit(self._compute, frame, due)
            elif due or needed:
                self._last, self.labeled = self._compute(frame, due)
        if self._coming is not None and (self._last is None or self._coming.done()):
            (self._last, self.labeled), self._coming = self._coming.result(), None
        assert self._last is not None
        return self._last

    def close(self) -> None:
        """Wait for what is computed beside."""
        if self._beside is not None:
            self._beside.shutdown()

    @torch.no_grad()
    def _compute(self, frame: LiveFrame, due: bool) -> tuple[Tensor, int]:
        """The label where it is due, otherwise the one before, and the number of its frame; encodes it."""
        resized = resize_frames(
            frame.frames(self.encoder.live_frames, self.stride), self.encoder.img_dim, self.encoder.resize
        )
        embeddings = self.encoder.embed(resized[None])[0]
        # An embedding at the end of a window lacks what follows: it holds until it is in the middle of one.
        middle = frame.number - math.ceil(len(embeddings) / 2) * self._unit
        while self._held and self._held[-1][0] > middle:
            self._held.pop()
        new = (frame.number - (self._held[-1][0] if self._held else -1)) // self._unit
        for back in reversed(range(max(1, min(new, len(embeddings))))):
            self._held.append((frame.number - back * self._unit, embeddings[-1 - back]))
        begin = frame.number - self.layout.step * self._unit * (self.layout.sequence_length - 1)
        while len(self._held) > 1 and self._held[1][0] <= begin:
            self._held.popleft()
        if not due and self._last is not None:
            return self._last, self.labeled
        count = frame.number // self._unit + 1
        clip = window_indices(count, self.layout.sequence_length, step=self.layout.step, start=count - 1)
        wanted = frame.number - self._unit * (count - 1 - clip[0])
        numbers = np.array([number for number, _ in self._held])
        rows = (np.searchsorted(numbers, wanted, side="right") - 1).clip(min=0)
        clips = torch.stack([self._held[row][1] for row in rows.tolist()])[None]
        padding = torch.from_numpy(padding_of(clip)).to(clips.device)
        return label_clips(self.classify, clips, padding, self.encoder.dtype)[0], frame.number


class LiveSequence:
    """The best sequence of labels so far, as `best_sequence` without what follows.

    Args:
        recognizer: its settings tell what fits, and what a change costs
    """

    def __init__(self, recognizer: Recognizer) -> None:
        self._recognizer = recognizer
        self._total: np.ndarray | None = None

    def add(self, probabilities: Tensor, elapsed: float) -> tuple[np.ndarray, int]:
        """Probabilities (C,) of actions and label of a frame, `elapsed` seconds after the one before."""
        row = probabilities.numpy()[None]
        scores, cost = self._recognizer.scores(row)[0], self._recognizer.change_cost
        if self._total is None:
            self._total = scores
        else:
            self._total = np.maximum(self._total - self._total.max(), -cost) + scores * elapsed
        label = int((self._total if cost else scores).argmax())
        return row[0, self._recognizer.chosen], NONE if label == len(scores) - 1 else label


@dataclass
class Log:
    """What became of the frames of a live video.

    Attributes:
        times: when each frame that was shown came, in seconds from the first
        probabilities, labels: of each, (C,) and the label
        latencies: seconds from when each came to when it had been shown
        delays: seconds from the frame that its label is of to itself
        lost: frames that were not shown, since a newer one was there
    """

    times: list[Fraction] = field(default_factory=list)
    probabilities: list[np.ndarray] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    delays: list[float] = field(default_factory=list)
    lost: int = 0

    def recognition(self, classes: list[str], fps: Fraction) -> Recognition:
        """What all frames showed."""
        times = np.array([*map(float, self.times), float(self.times[-1] + 1 / fps)])
        return Recognition(classes, np.stack(self.probabilities), np.array(self.labels), times, fps)

    def __str__(self) -> str:
        """Frames shown per second and their latency, lately."""
        times, latencies = self.times[-RECENT:], self.latencies[-RECENT:] or [0.0]
        rate = (len(times) - 1) / float(times[-1] - times[0]) if len(times) > 1 else 0.0
        return f"{rate:.1f} frames/s, {1000 * statistics.median(latencies):.0f} ms"


def watch(
    video: LiveVideo, recognizer: Recognizer, log: Log, stop: Callable[[], bool]
) -> Iterator[np.ndarray]:
    """The newest frames with what they show, (H, W, 3) uint8 RGB, until the source ends or `stop` says so.

    Args:
        log: is filled; a frame has been shown when the next is asked for
    """
    labels, sequence = LiveLabels(recognizer, video.fps), LiveSequence(recognizer)
    overlay, begun = Overlay(recognizer.classes, 0, recognizer.settings.overlay), 0.0
    video.remember(labels.memory)
    with contextlib.closing(labels):
        while not stop() and not video.ended():
            # So short that a signal is noticed.
            frame = video.newest(0.1)
            if frame is None:
                continue
            begun = begun or frame.arrived
            log.lost = frame.number - len(log.times)
            now = Fraction(frame.arrived - begun).limit_denominator(90_000)
            elapsed = float(now - log.times[-1]) if log.times else 0.0
            row, label = sequence.add(labels.label(frame), elapsed)
            log.delays.append((frame.number - labels.labeled) / float(video.fps))
            log.times.append(now)
            log.probabilities.append(row)
            log.labels.append(label)
            yield overlay.draw(frame.recent[-1].copy(), row, label, note=str(log))
            log.latencies.append(time.monotonic() - frame.arrived)
