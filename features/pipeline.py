"""Many frames through the encoder: decoded ahead in threads, encoded in full batches across clips."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from features.encoder import Encoder
from video.files import VideoError
from video.frames import StreamReader, resize_frames
from video.reader import Video

# Frames that a decoding thread hands over at once, and how many such chunks of a video it may be ahead.
CHUNK, AHEAD = 32, 8

T = TypeVar("T")

# The number of a video, and some of its frames, or None at its end, or what made it end.
Frames = tuple[int, Tensor | Exception | None]


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


class OneAhead(Iterator[T]):
    """Gets the next item of an iterator in a thread, from when it is told that a core is free for that."""

    def __init__(self, items: Iterable[T]) -> None:
        self._items, self._pool = iter(items), ThreadPoolExecutor(1)
        self._next: Future[T] | None = None

    def start(self) -> None:
        """Begin to get the next item, if that has not begun."""
        self._next = self._next or self._pool.submit(next, self._items)

    def __next__(self) -> T:
        self.start()
        assert self._next is not None
        coming, self._next = self._next, None
        return coming.result()

    def close(self) -> None:
        """Wait for the item under way; further items are lost."""
        self._pool.shutdown()


class _Reader:
    """A video's resized frames, read on a chunk at a time when it is told to."""

    def __init__(self, video: Video, img_dim: int, stride: int, stream: str) -> None:
        self._chunks = self._read(video, img_dim, stride, StreamReader((stream,)))
        self.ready: deque[Tensor | Exception | None] = deque()

    @staticmethod
    def _read(
        video: Video, img_dim: int, stride: int, seen: StreamReader
    ) -> Iterator[Tensor | Exception | None]:
        kept = (frame for number, frame in enumerate(video.frames()) if number % stride == 0)
        try:
            while frames := list(islice(kept, CHUNK)):
                yield seen.read(resize_frames(frames, img_dim))
            yield None
        except (VideoError, OSError) as error:
            yield error

    def read(self) -> None:
        self.ready.extend(islice(self._chunks, 1))

    def wants_more(self) -> bool:
        return not self.ready or (len(self.ready) < AHEAD and isinstance(self.ready[-1], Tensor))


def read_in_turns(
    videos: Sequence[Video], img_dim: int, stride: int, threads: int, stream: str = "rgb"
) -> Generator[Frames]:
    """Resized frames of many videos in order, decoded by `threads` threads some hundred frames at a time.

    Nothing is decoded while the frames so far are in use: an encoder on the CPU keeps all cores busy, and a
    thread that takes one of them from it lets all others wait. Memory does not grow with the videos.

    Yields: for each video its frames, some (n, 3, img_dim, img_dim) uint8 at a time, then None or an error.
    """
    waiting = iter(videos)
    readers: deque[_Reader] = deque()

    def take_turn() -> None:
        # More videos than threads, so that none waits for another's.
        readers.extend(
            _Reader(video, img_dim, stride, stream) for video in islice(waiting, threads + 4 - len(readers))
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

    with ThreadPoolExecutor(threads) as pool:
        for number in range(len(videos)):
            more = True
            while more:
                if not readers or not readers[0].ready:
                    take_turn()
                item = readers[0].ready.popleft()
                yield number, item
                more = isinstance(item, Tensor)
            readers.popleft()


def read_ahead(
    videos: Sequence[Video],
    img_dim: int,
    stride: int,
    threads: int,
    device: torch.device,
    stream: str = "rgb",
) -> Generator[Frames] | Prefetch[Frames]:
    """`read_in_turns` for an encoder on `device`: an accelerator leaves the cores free to read meanwhile."""
    frames = read_in_turns(videos, img_dim, stride, threads, stream)
    return frames if device.type == "cpu" else Prefetch(frames, threads * AHEAD)


def _overlaps(device: torch.device) -> bool:
    """Whether a batch is computed while this process does something else."""
    return device.type != "cpu"


def _buffer(encoder: Encoder, frames: Tensor) -> Tensor:
    """Room for a batch of frames like these, in the layout that they come in and the network wants."""
    layout = {"memory_format": torch.channels_last, "pin_memory": encoder.device.type == "cuda"}
    shape = (encoder.batch_size, *frames.shape[1:])
    return torch.empty(shape, dtype=torch.uint8, **layout).zero_()  # type: ignore[call-overload]


def _encode(encoder: Encoder, batch: Tensor, flip: bool) -> tuple[Tensor, torch.Event | None]:
    """Embeddings (N, views, D) of a batch on their way to the CPU, and what tells that they are there."""
    frames = batch.to(encoder.device, non_blocking=True)
    views = [frames, frames.flip(-1)] if flip else [frames]
    embeddings = torch.stack([encoder.embed(view) for view in views], dim=1)
    if encoder.device.type == "cpu":
        return embeddings, None
    # Behind this batch in its stream, and before the next: waiting for it does not wait for that one.
    copied = embeddings.to("cpu", non_blocking=True)
    return copied, torch.accelerator.current_stream().record_event()


def embed_ahead(
    encoder: Encoder, chunks: Iterable[Frames], *, flip: bool
) -> Iterator[tuple[int, np.ndarray | Exception | None]]:
    """Embeddings of what `read_ahead` gives, in batches across the borders of clips.

    Every batch has the same size, the last one filled up: compiled networks and autotuned kernels want it,
    and an embedding does not depend on where a run was interrupted. An accelerator computes the next batch
    while the rows of the last one are given out.

    Yields: as `read_ahead`, with float32 (n, views, D) in place of frames; view 1 is of the mirrored frames.
    """
    buffers: list[Tensor] = []
    turn = used = 0
    parts: list[tuple[int, int | Exception | None]] = []
    encoded: deque[tuple[tuple[Tensor, torch.Event | None] | None, list]] = deque()

    def give_out() -> Iterator[tuple[int, np.ndarray | Exception | None]]:
        batch, contents = encoded.popleft()
        rows = np.empty(0)
        if batch is not None:
            if batch[1] is not None:
                batch[1].synchronize()
            rows = batch[0].numpy()
        start = 0
        for number, part in contents:
            if isinstance(part, int):
                yield number, rows[start : start + part]
                start += part
            else:
                yield number, part

    for number, chunk in chunks:
        if not isinstance(chunk, Tensor):
            parts.append((number, chunk))
            continue
        if not buffers:
            buffers = [_buffer(encoder, chunk) for _ in range(2 if _overlaps(encoder.device) else 1)]
        while len(chunk):
            batch = buffers[turn]
            count = min(len(batch) - used, len(chunk))
            batch[used : used + count] = chunk[:count]
            parts.append((number, count))
            used, chunk = used + count, chunk[count:]
            if used == len(batch):
                encoded.append((_encode(encoder, batch, flip), parts))
                turn, used, parts = (turn + 1) % len(buffers), 0, []
                # The buffer that is filled next must have been read.
                if len(encoded) == len(buffers):
                    yield from give_out()
    encoded.append((_encode(encoder, buffers[turn], flip) if used else None, parts))
    while encoded:
        yield from give_out()
