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
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor

from annotation.labels import ClipLayout, FrameModel, Smoother, label_clips
from annotation.overlay import Overlay
from annotation.segments import Steady, label_of
from dataset import padding_of, window_indices
from features.streams import Stream
from features.windows import joint_hop
from video.files import VideoError
from video.frames import resize_frames
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
        recent: frames up to this one as OpenCV has them, (H, W, 3) uint8 BGR, lost ones too
    """

    number: int
    arrived: float
    image: np.ndarray
    recent: tuple[np.ndarray, ...]

    def frames(self, count: int, stride: int) -> list[np.ndarray]:
        """The last `count` of every `stride`-th frame up to this one, RGB; the oldest stands in for older."""
        backs = [min(stride * back, len(self.recent) - 1) for back in reversed(range(count))]
        return [cv2.cvtColor(self.recent[-1 - back], cv2.COLOR_BGR2RGB) for back in backs]


class LiveVideo:
    """A camera or a stream, read by a thread of its own, which keeps the newest frame only.

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
        # A camera that is pulled out may raise one.
        with contextlib.suppress(cv2.error):
            self._read_to_end()
        with self._came:
            self._ended = True
            self._came.notify()
        self._capture.release()

    def _read_to_end(self) -> None:
        begun, first, waited = time.monotonic(), 0.0, 0.0
        while not self._stopped:
            asked = time.monotonic()
            if not self._capture.grab():
                break
            arrived = time.monotonic()
            if self._paced:
                second = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
                if self._number < 0:
                    begun, first = arrived, second
                else:
                    waited += arrived - asked
                # Who waits for its frames about as long as they last has a camera there.
                if waited < (second - first) / 2:
                    time.sleep(min(float(PATIENCE), max(0.0, second - first - (arrived - begun))))
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

    def remember(self, memory: int) -> None:
        """Keep as many frames up to the newest one from now on, for what sees several at once; first, one."""
        with self._came:
            self._recent = deque(self._recent, maxlen=memory)

    def newest(self, wait: float) -> Shot | None:
        """The newest frame, if one came since the last call or comes within `wait` seconds; else None."""
        with self._came:
            self._came.wait_for(lambda: self._ended or self._number > self._taken, wait)
            if self._number == self._taken:
                return None
            number, arrived = self._number, self._arrived
            recent = tuple(self._recent)
            self._taken = number
        return Shot(number, arrived, cv2.cvtColor(recent[-1], cv2.COLOR_BGR2RGB), recent)

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

    A clip is laid over the embeddings as in a file, and ends at the newest one; where a frame was lost, the
    embedding before it stands in. Only windows that clips need are encoded. An encoder that sees many frames
    at once takes longer than a frame lasts: it works beside, and until it has finished the label before
    holds.

    Args:
        model: what labels frames
        streams: of the model
        layout: how clips lie

    Attributes:
        memory: frames up to the newest one that a `Shot` must hold
        labelled: number of the frame that the last label is of
    """

    def __init__(self, model: FrameModel, streams: Sequence[Stream], layout: ClipLayout) -> None:
        self.model, self.streams, self.layout = model, streams, layout
        # Frames to an embedding.
        self._unit = layout.stride * joint_hop([stream.windows for stream in streams])
        longest = max(stream.windows.context + stream.live_frames for stream in streams)
        self.memory = layout.stride * (longest - 1) + 1
        slow = any(stream.windows.frames > 1 for stream in streams)
        self._beside = ThreadPoolExecutor(1) if slow else None
        self._coming: Future[tuple[Tensor, int]] | None = None
        # Of windows that were encoded, as far back as a clip reaches, by the number of the last frame.
        self._numbers: deque[int] = deque()
        self._embeddings: deque[Tensor] = deque()
        self.labelled = 0
        self._last: Tensor | None = None

    def label(self, shot: Shot) -> Tensor:
        """Class probabilities (C,) of a frame, later than those before it."""
        due = self._last is None or shot.number - self.labelled >= self.layout.every * self._unit
        needed = not self._numbers or shot.number - self._numbers[-1] >= self.layout.step * self._unit
        if self._beside is None:
            if due or needed:
                self._last, self.labelled = self._compute(shot, due)
        elif self._coming is None and (due or needed):
            self._coming = self._beside.submit(self._compute, shot, due)
        if self._coming is not None and (self._last is None or self._coming.done()):
            (self._last, self.labelled), self._coming = self._coming.result(), None
        assert self._last is not None
        return self._last

    def close(self) -> None:
        """Wait for what is computed beside."""
        if self._beside is not None:
            self._beside.shutdown()

    @torch.no_grad()
    def _compute(self, shot: Shot, due: bool) -> tuple[Tensor, int]:
        """The label where it is due, otherwise the one before, and the number of its frame; encodes it."""
        self._encode(shot)
        if not due and self._last is not None:
            return self._last, self.labelled
        return self._classify(shot.number), shot.number

    def _encode(self, shot: Shot) -> None:
        parts, hop = [], self._unit // self.layout.stride
        for stream in self.streams:
            frames = shot.frames(stream.windows.context + stream.live_frames, self.layout.stride)
            resized = resize_frames(frames, stream.img_dim, stream.resize)
            parts.append(stream.embed(resized[None].to(stream.device))[0])
        # As many as are new, and no more than the windows of the longest hop give.
        given = max(
            len(part) for stream, part in zip(self.streams, parts, strict=True) if stream.windows.hop == hop
        )
        # An embedding at the end of a window lacks what follows: it holds until it is in the middle of one.
        while self._numbers and self._numbers[-1] > shot.number - -(-given // 2) * self._unit:
            self._numbers.pop()
            self._embeddings.pop()
        last = self._numbers[-1] if self._numbers else -1
        for back in reversed(range(max(1, min((shot.number - last) // self._unit, given)))):
            self._numbers.append(shot.number - back * self._unit)
            # Of each other stream that of the frame in the middle of the hop, as near as its window reaches.
            self._embeddings.append(
                torch.cat(
                    [
                        part[-1 - min((back * hop + hop // 2) // stream.windows.hop, len(part) - 1)]
                        for stream, part in zip(self.streams, parts, strict=True)
                    ]
                )
            )
        begin = shot.number - self.layout.step * self._unit * (self.layout.sequence_length - 1)
        while len(self._numbers) > 1 and self._numbers[1] <= begin:
            self._numbers.popleft()
            self._embeddings.popleft()

    def _classify(self, number: int) -> Tensor:
        count = number // self._unit + 1
        clip = window_indices(count, self.layout.sequence_length, step=self.layout.step, start=count - 1)
        numbers = number - self._unit * (count - 1 - clip[0])
        held = np.searchsorted(np.array(self._numbers), numbers, side="right") - 1
        embeddings = torch.stack([self._embeddings[place] for place in np.maximum(held, 0).tolist()])
        padding = torch.from_numpy(padding_of(clip)).to(self.model.device)
        return label_clips(self.model, embeddings[None], padding)[0]


@dataclass(frozen=True)
class Chooser:
    """From probabilities to the label that is shown.

    Attributes:
        chosen: actions that are told apart, among all that the model knows
        min_probability: of an action; below it there is none
        lasting: keeps labels that are too short away
    """

    chosen: Sequence[int]
    min_probability: float
    lasting: Steady

    def choose(self, probabilities: np.ndarray, elapsed: float) -> tuple[np.ndarray, int]:
        """Probabilities of the chosen actions, and the label, `elapsed` seconds after the last frame."""
        row = probabilities[self.chosen]
        return row, self.lasting.add(label_of(row, self.min_probability), elapsed)


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
    chooser: Chooser,
    overlay: Overlay,
    log: Log,
    stop: Callable[[], bool],
) -> Iterator[np.ndarray]:
    """The newest frames with what they show, (H, W, 3) uint8 RGB, until the source ends or `stop` says so.

    Args:
        chooser: from probabilities to a label
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
        log.delays.append((shot.number - labels.labelled) / float(video.fps))
        log.times.append(now)
        row, label = chooser.choose(probabilities.numpy(), elapsed)
        log.probabilities.append(row)
        log.labels.append(label)
        yield overlay.draw(shot.image, row, label, note=str(log))
        log.latencies.append(time.monotonic() - shot.arrived)
