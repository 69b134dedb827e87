"""Embeddings of frames on disk: fill a cache, check it, read it.

A cache is a folder of plain files:

    embeddings.npy   float16 (frames, views, D): all clips one after another. NumPy's own format, since any
                     tool can map it into memory and read single rows. View 0 is the frame, view 1 its mirror
                     image.
    index.jsonl      one line per clip: its name, its rows, their CRC-32, and size and time of its file
    key.json         what the embeddings depend on, in words; the folder's name ends in a hash of it

Several processes or machines fill shards of their own, embeddings-2of8.npy and index-2of8.jsonl for example.
All that stand in the folder are read as one: whoever collects shards copies their files into one folder.

float16 keeps 11 significant bits: a stored embedding is within 1/2048 of what the encoder gave. Rows are
written first and named in the index afterwards, so a clip is whole or not there, whenever the power goes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import cli
from dataset import DIFF_GAIN, GRAY
from encoders import Encoder
from files import write_whole
from pipeline import embed_ahead, read_ahead
from splits import WHOLE, Clip, Shard
from video import Video, VideoError

RESIZE = "torchvision bicubic antialias uint8, squeezed to a square"
# Bytes before the rows; NumPy pads the header of a .npy file to a multiple of 64, so that this one can grow.
HEADER = 256
# Seconds of work that a power cut may cost.
COMMIT_SECONDS = 3


class CacheError(ValueError):
    """A cache that cannot be used; the message names it and the next step."""


@dataclass(frozen=True)
class CacheKey:
    """All that changes an embedding. Another key is another cache, so that no stale one is ever used.

    Attributes:
        encoder: its name
        encoder_sha256: of its weights
        img_dim: height and width of the frames in pixels
        dtype: what the encoder computed in, and whether it was compiled
        flip: mirrored frames are kept too
        frame_stride: every how manieth frame is kept
        resize: how frames came to their size
        stream: what a frame was seen as, a key of `dataset.STREAMS`
    """

    encoder: str
    encoder_sha256: str
    img_dim: int
    dtype: str
    flip: bool = True
    frame_stride: int = 1
    resize: str = RESIZE
    stream: str = "rgb"

    @property
    def fields(self) -> dict[str, Any]:
        """The attributes by name; frames as they are need no word for it, as before there were others."""
        fields = asdict(self)
        if self.stream == "rgb":
            del fields["stream"]
        else:
            fields["stream"] += f": {DIFF_GAIN} x the change since the frame before, around {GRAY}"
        return fields

    @property
    def folder(self) -> str:
        """Name of the cache's folder: readable, and with a hash of the whole key."""
        text = json.dumps(self.fields, sort_keys=True)
        flip = "-flip" if self.flip else ""
        stride = f"-stride{self.frame_stride}" if self.frame_stride > 1 else ""
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        stream = f"-{self.stream}" if self.stream != "rgb" else ""
        encoder = self.encoder.replace("/", "-")
        return f"{encoder}-{self.img_dim}px-{self.dtype}{flip}{stride}{stream}-{digest}"


@dataclass(frozen=True)
class _Entry:
    """A line of an index: rows [row, row + frames) of the file; stride times as many frames of the video."""

    row: int
    frames: int
    size: int
    mtime_ns: int
    crc32: int

    @property
    def stamp(self) -> tuple[int, int]:
        """Size and time of the video that was encoded."""
        return self.size, self.mtime_ns


def _stamp(video: Video) -> tuple[int, int]:
    status = video.path.stat()
    return (0 if video.path.is_dir() else status.st_size), status.st_mtime_ns


class EmbeddingCache:
    """A cache of one key in a folder, open for reading; `fill` adds the clips that are missing.

    Args:
        path: folder of all caches of a data set
        key: which of them
        width: D
        shard: which files `fill` writes

    Raises: CacheError if the files do not fit together, OSError if the folder cannot be read or made.
    """

    def __init__(self, path: Path, key: CacheKey, width: int, shard: Shard = WHOLE) -> None:
        self.folder, self.key, self.width, self.shard = path / key.folder, key, width, shard
        self.views = 2 if key.flip else 1
        self._index = self.folder / f"index{shard.suffix}.jsonl"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"{self.folder}: cannot make this folder ({error.strerror}); name another with --cache_path, "
                "or use --cache off"
            ) from error
        self._rows: dict[Path, np.ndarray] = {}
        # Every version of every clip in every index, and of those the ones that the clips' files match.
        self._known: dict[tuple[str, tuple[int, int]], tuple[Path, _Entry]] = {}
        self._kept: dict[str, tuple[Path, _Entry]] = {}
        self._whole: set[tuple[Path, _Entry]] = set()
        self.read()

    def read(self) -> None:
        """Read the indices anew, to see what other processes have added.

        Raises: CacheError if the files do not fit together.
        """
        self._rows, self._known = {}, {}
        for index in sorted(self.folder.glob("index*.jsonl")):
            self._rows[index] = self._read_shard(index)

    def _read_shard(self, index: Path) -> np.ndarray:
        rows = 0
        for line in index.read_bytes().split(b"\n")[:-1]:  # a line without its end is not whole
            try:
                fields = json.loads(line)
                name, entry = fields.pop("clip"), _Entry(**fields)
                if not all(isinstance(value, int) for value in fields.values()) or entry.row < 0:
                    raise ValueError(line)
                self._known[name, entry.stamp] = index, entry
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CacheError(f"{index}: damaged; delete the folder, it is made again") from error
            rows = max(rows, entry.row + entry.frames)
        data = _data_of(index)
        shape = (rows, self.views, self.width)
        if not rows:
            return np.empty(shape, np.float16)
        length = data.stat().st_size if data.exists() else 0
        if length < HEADER + rows * self._row_bytes:
            raise CacheError(f"{data}: shorter than its index says; delete the folder, it is made again")
        return np.memmap(data, np.float16, "r", HEADER, shape)

    @property
    def _row_bytes(self) -> int:
        return 2 * self.views * self.width

    def missing(self, clips: Sequence[Clip]) -> list[Clip]:
        """The clips that are not kept, or whose file has changed since, sorted by name."""
        gone = []
        for clip in clips:
            found = self._known.get((clip.name, _stamp(clip.video)))
            if found is None:
                gone.append(clip)
            else:
                self._kept[clip.name] = found
        # Sorted, so that the cache is the same whichever split was first.
        return sorted(gone, key=lambda clip: clip.name)

    def fill(self, clips: Sequence[Clip], encoder: Encoder, *, threads: int) -> None:
        """Encode and keep what is missing of the shard's clips; a bar shows frames/s and the time left.

        Interrupted at any instant, it goes on where it was. A second process waits for the first.

        Raises: CacheError if the disk is too small; VideoError, after all other clips, for those that cannot
            be read; OSError if the cache cannot be written.
        """
        clips = self.shard.of(clips)
        if not self.missing(clips):
            return
        # Held by the process, not by the file: a killed one holds it no longer.
        lock = filelock.FileLock(self.folder / f"lock{self.shard.suffix}")
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            cli.say(f"another process fills {self.folder}; waiting for it")
            lock.acquire()
        try:
            self.read()
            missing = self.missing(clips)
            if missing:
                need = self._check_space(missing)
                try:
                    self._write(missing, encoder, threads)
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                        raise
                    raise CacheError(
                        f"{self.folder}: the disk became full ({error.strerror}), about {need:,.0f} bytes "
                        "were needed; what is encoded is kept; make room and start again, or name another "
                        "disk with --cache_path"
                    ) from error
        finally:
            lock.release()
            self.read()
            self.missing(clips)

    def _check_space(self, clips: Sequence[Clip]) -> float:
        # Opening all of 13,000 clips would take minutes: some tell how many frames a byte of video holds.
        some = clips[:: max(1, len(clips) // 200)]
        share = sum(clip.video.size() for clip in clips) / max(1, sum(clip.video.size() for clip in some))
        frames = sum(map(_stated_count, some)) * share / self.key.frame_stride
        # The other shards are filled meanwhile, perhaps on the same disk.
        need = frames * self._row_bytes * self.shard.count
        free = shutil.disk_usage(self.folder).free
        cli.say(
            f"encoding {len(clips):,} clips, about {frames:,.0f} frames, into {self.folder}: "
            f"{need / 1e9:.2f} GB needed, {free / 1e9:.1f} GB free"
        )
        # What a file system keeps for itself, and what the estimate is off by.
        if 1.05 * need + 1e8 > free:
            raise CacheError(
                f"{self.folder}: {need / 1e9:.2f} GB needed and {free / 1e9:.2f} GB free; make room, name "
                "another disk with --cache_path, keep fewer frames with --frame_stride 2, or use --cache off"
            )
        return need

    def _write(self, clips: Sequence[Clip], encoder: Encoder, threads: int) -> None:
        key = json.dumps(self.key.fields, indent=1, sort_keys=True) + "\n"
        write_whole(self.folder / "key.json", key.encode())
        videos = [clip.video for clip in clips]
        stamps = [_stamp(video) for video in videos]
        failures: list[str] = []
        data_path = _data_of(self._index)
        first = rows = len(self._rows.get(self._index, ()))
        lines: list[str] = []
        committed = started = time.monotonic()
        encoded = crc32 = 0
        with (
            data_path.open("r+b" if data_path.exists() else "w+b") as data,
            self._index.open("r+b" if self._index.exists() else "w+b") as index,
            tqdm(
                total=len(clips), desc="encoding", unit="clip", dynamic_ncols=True, disable=not cli.is_first()
            ) as bar,
            contextlib.closing(
                read_ahead(
                    videos, self.key.img_dim, self.key.frame_stride, threads, encoder.device, self.key.stream
                )
            ) as chunks,
        ):

            def back_to_whole_clips() -> None:
                data.seek(HEADER + first * self._row_bytes)
                data.truncate()

            def commit() -> None:
                data.flush()
                os.fsync(data.fileno())
                index.write("".join(lines).encode())
                index.flush()
                os.fsync(index.fileno())
                lines.clear()

            # What an interrupted run left behind the last whole line, and behind the last whole clip.
            index.truncate(index.read().rfind(b"\n") + 1)
            index.seek(0, os.SEEK_END)
            back_to_whole_clips()
            try:
                for number, item in embed_ahead(encoder, chunks, flip=self.key.flip):
                    if isinstance(item, np.ndarray):
                        if not (np.abs(item) <= np.finfo(np.float16).max).all():
                            raise CacheError(f"{videos[number].path}: an embedding does not fit into float16")
                        contents = item.astype(np.float16).tobytes()
                        data.write(contents)
                        crc32 = zlib.crc32(contents, crc32)
                        rows += len(item)
                        encoded += len(item)
                        continue
                    bar.update()
                    bar.set_postfix_str(f"{encoded / (time.monotonic() - started):.0f} frames/s")
                    if isinstance(item, Exception):
                        failures.append(str(item))
                        back_to_whole_clips()
                        rows, crc32 = first, 0
                        continue
                    entry = _Entry(first, rows - first, *stamps[number], crc32)
                    lines.append(json.dumps({"clip": clips[number].name, **asdict(entry)}) + "\n")
                    first, crc32 = rows, 0
                    if time.monotonic() - committed > COMMIT_SECONDS:
                        commit()
                        committed = time.monotonic()
            finally:
                back_to_whole_clips()
                data.seek(0)
                data.write(_npy_header((first, self.views, self.width)))
                commit()
        if failures:
            raise VideoError(
                f"{len(failures)} of {len(clips):,} clips cannot be read; the first: {failures[0]}"
            )

    def frames(self, clip: Clip) -> int:
        """Number of frames of a clip that are kept, as `missing` last found."""
        return self._kept[clip.name][1].frames

    def gather(self, clips: Sequence[Clip], frames: np.ndarray, flipped: np.ndarray) -> Tensor:
        """Embeddings (B, T, D) float32 of frames (B, T) of B clips, mirrored where `flipped` (B,) says so.

        Raises: CacheError if a clip's rows are not those that were written.
        """
        found = [self._kept[clip.name] for clip in clips]
        for clip, (index, entry) in zip(clips, found, strict=True):
            # All rows of a clip, but once for each process.
            if (index, entry) not in self._whole:
                rows = self._rows[index][entry.row : entry.row + entry.frames]
                if zlib.crc32(rows.tobytes()) != entry.crc32:
                    raise CacheError(
                        f"{_data_of(index)}: the embeddings of {clip.name} are damaged; delete the folder, "
                        "it is made again"
                    )
                self._whole.add((index, entry))
        numbers = np.array([entry.row for _, entry in found])[:, None] + frames
        views = np.broadcast_to(flipped[:, None].astype(int), numbers.shape)
        embeddings = np.empty((*numbers.shape, self.width), np.float16)
        for shard in {index for index, _ in found}:
            chosen = np.array([index == shard for index, _ in found])
            embeddings[chosen] = self._rows[shard][numbers[chosen], views[chosen]]
        return torch.from_numpy(embeddings).float()


def _data_of(index: Path) -> Path:
    return index.with_name(index.name.replace("index", "embeddings", 1)).with_suffix(".npy")


def _stated_count(clip: Clip) -> int:
    # An unreadable clip is told of when its turn comes.
    try:
        return clip.video.stated_count()
    except VideoError:
        return 0


def _npy_header(shape: tuple[int, ...]) -> bytes:
    """Header of a float16 .npy file, version 1.0, padded to `HEADER` bytes so that it can be rewritten."""
    fields = f"{{'descr': '<f2', 'fortran_order': False, 'shape': {shape}, }}"
    return (
        b"\x93NUMPY\x01\x00"
        + (HEADER - 10).to_bytes(2, "little")
        + fields.ljust(HEADER - 11).encode()
        + b"\n"
    )
