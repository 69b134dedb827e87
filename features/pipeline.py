"""Many videos through an encoder: decoded ahead in threads, encoded in full batches across clips."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from features.streams import Cutter, Stream
from features.windows import Cut
from features.workers import count_workers, in_worker, stay_on
from video.files import VideoError
from video.reader import Video

# Frames that a thread decodes at once, and how many such chunks of a video it may be ahead.
CHUNK, AHEAD = 32, 8

T = TypeVar("T")

# The number of a video, and some of its windows, or None at its end, or what made it end.
Pieces = tuple[int, Cut | Exception | None]
# The same with embeddings (n, views, D) of these windows.
Rows = tuple[int, np.ndarray | Exception | None]


class Prefetch(Iterator[T]):
    """Runs an iterator in a thread of its own, at most `depth` items ahead of who asks.

    It starts at once. Errors of the iterator are raised where its items are asked for. OpenCV, PyTorch and
    FFmpeg leave the interpreter to others while they work, so threads of this kind do run side by side.
    """

    def __init__(self, items: Iterable[T], depth: int) -> None:
        self._queue: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(iter(items),), daemon=True)
        self._thread.start()

    def _run(self, items: Iterator[T]) -> None:
        try:
            stay_on(1)
            for item in items:
                if not self._put(True, item):
                    break
            else:
                self._put(False, StopIteration())
        except Exception as error:
            self._put(False, error)
        finally:
            if isinstance(items, Generator):
                items.close()

    def _put(self, good: bool, item: Any) -> bool:
        while not self._stopped.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put((good, item), timeout=0.1)
                return True
        return False

    def __next__(self) -> T:
        if self._stopped.is_set():
            raise StopIteration
        good, item = self._queue.get()
        if good:
            return item
        self._stopped.set()
        raise item

    def close(self) -> None:
        """Stop the thread and wait for it; further items are lost."""
        self._stopped.set()
        self._thread.join()


class _Reader:
    """Windows of a video, read on some frames at a time when it is told to."""

    def __init__(self, video: Video, stride: int, stream: Stream) -> None:
        self._pieces = self._read(video, stride, Cutter([stream]))
        self.ready: deque[Cut | Exception | None] = deque()

    @staticmethod
    def _read(video: Video, stride: int, cutter: Cutter) -> Iterator[Cut | Exception | None]:
        kept = (frame for number, frame in enumerate(video.frames()) if number % stride == 0)
        try:
            while frames := list(islice(kept, CHUNK)):
                yield from cutter.read(frames)[0]
            yield from cutter.end()[0]
            yield None
        except (VideoError, OSError) as error:
            yield error

    def read(self) -> None:
        self.ready.extend(islice(self._pieces, 1))

    def wants_more(self) -> bool:
        frames = sum(
            piece.windows.shape[0] * piece.windows.shape[1] for piece in self.ready if isinstance(piece, Cut)
        )
        return not self.ready or (frames < AHEAD * CHUNK and isinstance(self.ready[-1], Cut))


def read_in_turns(videos: Sequence[Video], stream: Stream, stride: int, threads: int) -> Generator[Pieces]:
    """Windows of many videos in order, decoded by `threads` threads some hundred frames at a time.

    Memory does not grow with the videos.

    Args:
        stride: every N-th frame is read

    Yields: for each video its windows, some at a time, then None or an error.
    """
    waiting = iter(videos)
    readers: deque[_Reader] = deque()

    def take_turn() -> None:
        # More videos than threads, so that none waits for another's.
        readers.extend(
            _Reader(video, stride, stream) for video in islice(waiting, threads + 4 - len(readers))
        )
        idle = deque(reader for reader in readers if reader.wants_more())

        def read_one(_: int) -> None:
            try:
                reader = idle.popleft()
            except IndexError:  # the others have what is left
                return
            reader.read()
            if reader.wants_more():
                idle.append(reader)

        list(pool.map(read_one, range(AHEAD * (threads + 1))))

    with ThreadPoolExecutor(threads, initializer=stay_on, initargs=(1,)) as pool:
        for number in range(len(videos)):
            more = True
            while more:
                if not readers or not readers[0].ready:
                    take_turn()
                item = readers[0].ready.popleft()
                yield number, item
                more = isinstance(item, Cut)
            readers.popleft()


def read_ahead(videos: Sequence[Video], stream: Stream, stride: int, threads: int) -> Prefetch[Pieces]:
    """`read_in_turns`, while an encoder computes."""
    return Prefetch(read_in_turns(videos, stream, stride, threads), threads * AHEAD)


class Batches:
    """Windows on their way through an encoder in full batches, and what each batch consists of.

    Args:
        stream: its encoder, on its device
        flip: mirrored windows are encoded too
    """

    def __init__(self, stream: Stream, flip: bool) -> None:
        self._stream, self._flip, self._size = stream, flip, stream.batch_size
        self._on_cpu = stream.device.type == "cpu"
        # One is filled while others are computed.
        self._buffers = 1 + (count_workers() if self._on_cpu else 1)
        self._rooms: dict[torch.Size, deque[Tensor]] = {}
        self._room = torch.empty(0)
        self._used = 0
        self._parts: list[tuple[int, tuple[int, int, int] | Exception | None]] = []
        self._encoded: deque[tuple[Callable[[], Tensor] | None, list]] = deque()

    def add(self, number: int, piece: Cut | Exception | None) -> Iterator[Rows]:
        """Take windows of a video, or what made it end; what is ready is given out."""
        if not isinstance(piece, Cut):
            self._parts.append((number, piece))
            return
        windows = piece.tensor()
        if self._used and windows.shape[1:] != self._room.shape[1:]:
            yield from self._flush()
        while len(windows):
            if not self._used:
                self._room = self._buffer(windows)
            count = min(self._size - self._used, len(windows))
            self._room[self._used : self._used + count] = windows[:count]
            self._parts.append((number, (count, piece.skip, piece.count)))
            self._used, windows = self._used + count, windows[count:]
            if self._used == self._size:
                yield from self._flush()

    def _buffer(self, windows: Tensor) -> Tensor:
        """Room for a batch of windows like these, in the layout that they come in and networks want."""
        if windows.shape[1:] not in self._rooms:
            length, channels, height, width = windows.shape[1:]
            shape = (self._size, length, height, width, channels)
            pinned = self._stream.device.type == "cuda"
            rooms = [torch.zeros(shape, dtype=torch.uint8, pin_memory=pinned) for _ in range(self._buffers)]
            self._rooms[windows.shape[1:]] = deque(room.permute(0, 1, 4, 2, 3) for room in rooms)
        rooms_of_shape = self._rooms[windows.shape[1:]]
        rooms_of_shape.rotate()
        return rooms_of_shape[0]

    def end(self) -> Iterator[Rows]:
        """Encode what is left, and give out all."""
        yield from self._flush()
        while self._encoded:
            yield from self._give_out()

    def _flush(self) -> Iterator[Rows]:
        """Encode what there is; the buffer that is filled next must have been read.

        What stands in the rest of the batch is encoded too, but for windows that differ in length: they make
        most batches short.
        """
        layout = self._stream.windows
        batch = self._room[: self._used] if layout.least < layout.frames else self._room
        self._encoded.append((self._encode(batch) if self._used else None, self._parts))
        self._used, self._parts = 0, []
        while len(self._encoded) >= self._buffers:
            yield from self._give_out()

    def _encode(self, batch: Tensor) -> Callable[[], Tensor]:
        """What waits for embeddings (N, K, views, D) on the CPU."""
        if self._on_cpu:
            return in_worker(self._embed, batch).result
        embeddings = self._embed(batch.to(self._stream.device, non_blocking=True))
        # Behind this batch in its stream, and before the next: waiting for it does not wait for that one.
        copied = embeddings.to("cpu", non_blocking=True)
        ready = torch.accelerator.current_stream().record_event()

        def wait() -> Tensor:
            ready.synchronize()
            return copied

        return wait

    def _embed(self, windows: Tensor) -> Tensor:
        views = [windows, windows.flip(-1)] if self._flip else [windows]
        return torch.stack([self._stream.embed(view) for view in views], dim=2)

    def _give_out(self) -> Iterator[Rows]:
        """What the oldest batch holds."""
        wait, contents = self._encoded.popleft()
        rows = wait().numpy() if wait else np.empty(0)
        start = 0
        for number, part in contents:
            if isinstance(part, tuple):
                windows, skip, count = part
                kept = rows[start : start + windows, skip : skip + count]
                yield number, kept.reshape(-1, *kept.shape[2:])
                start += windows
            else:
                yield number, part


def embed_ahead(stream: Stream, pieces: Iterable[Pieces], *, flip: bool) -> Iterator[Rows]:
    """Embeddings of what `read_ahead` gives, in batches across the borders of clips.

    Every batch has the same size, the last one filled up: compiled networks and autotuned kernels want it,
    and an embedding does not depend on where a run was interrupted. The next batches are computed while the
    rows of the last one are given out.

    Yields: as `read_ahead`, with float32 (n, views, D) in place of windows; view 1 is of mirrored frames.
    """
    batches = Batches(stream, flip)
    for number, piece in pieces:
        yield from batches.add(number, piece)
    yield from batches.end()
