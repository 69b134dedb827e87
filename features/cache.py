"""Embeddings of videos on disk: what a cache consists of, and reading it; `fill` adds what is missing.

A cache is a folder of plain files:

    embeddings.npy   float16 (rows, views, D): all clips one after another. NumPy's own format, since any
                     tool can map it into memory and read single rows. A row is an embedding, of a frame or
                     of some, as its encoder sees; view 0 is of the video, view 1 of its mirror image.
    index.jsonl      one line per clip: its name, its rows, their CRC-32, and size and time of its file
    key.json         what the embeddings depend on, in words; the folder's name ends in a hash of it

Several processes or machines fill shards of their own, embeddings-2of8.npy and index-2of8.jsonl for example.
All that stand in the folder are read as one: whoever collects shards copies their files into one folder.

float16 keeps 11 significant bits: a stored embedding is within 1/2048 of what the encoder gave. Rows are
written first and named in the index afterwards, so a clip is whole or not there, whenever the power goes.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from features.encoder import DIFF_GAIN, GRAY
from features.windows import PHOTOGRAPHS, Windows
from splits.split import Clip
from utils.process import UserError
from video.frames import SQUEEZE
from video.reader import Video

# Bytes before the rows; NumPy pads the header of a .npy file to a multiple of 64, so that this one can grow.
HEADER = 256


class CacheError(UserError):
    """A cache that cannot be used; the message names it and the next step."""


@dataclass(frozen=True)
class CacheKey:
    """All that changes an embedding. Another key is another cache, so that no stale one is ever used.

    Attributes:
        encoder: its name
        encoder_sha256: of its weights
        img_dim: height and width of the frames in pixels
        dtype: what the encoder computed in, as `encoder.computation` has it
        flip: mirrored frames are kept too
        frame_stride: every N-th frame is kept
        resize: how frames came to their size
        stream: what a frame was seen as, one of `encoder.STREAMS`
        windows: how the encoder goes along a video
    """

    encoder: str
    encoder_sha256: str
    img_dim: int
    dtype: str
    flip: bool = True
    frame_stride: int = 1
    resize: str = SQUEEZE.words
    stream: str = "rgb"
    windows: Windows = PHOTOGRAPHS

    @property
    def views(self) -> int:
        """Kept side by side: what an encoder makes of a window, and of its mirror image."""
        return 2 if self.flip else 1

    @property
    def fields(self) -> dict[str, Any]:
        """The attributes by name; what is as it was before there was another has no entry."""
        fields = asdict(self)
        del fields["windows"]
        if self.windows.frames > 1:
            fields["windows"] = self.windows.words
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
        # A folder's whole path would be too long for a name.
        encoder = self.encoder.replace("/", "-")[-80:]
        return f"{encoder}-{self.img_dim}px-{self.dtype}{flip}{stride}{stream}-{digest}"


@dataclass(frozen=True)
class Entry:
    """A line of an index: rows [row, row + frames) hold a clip, whose file had this size and time.

    Its name is from when each row was of a frame.
    """

    row: int
    frames: int
    size: int
    mtime_ns: int
    crc32: int


# Rows that go to an accelerator at once.
COPIED = 2**14


@dataclass(frozen=True)
class _Shard:
    """Rows (rows, views, D) of one file, mapped into memory.

    Attributes:
        copies: of the rows, on accelerators
    """

    path: Path
    rows: np.ndarray
    copies: dict[torch.device, Tensor] = field(default_factory=dict, compare=False)

    def copy_to(self, device: torch.device) -> None:
        """Have a copy of all rows on a device, if there is none yet."""
        if device not in self.copies:
            copy = torch.empty(self.rows.shape, dtype=torch.float16, device=device)
            for start in range(0, len(self.rows), COPIED):
                some = self.rows[start : start + COPIED]
                # PyTorch takes mapped pages only if they may be written.
                copy[start : start + len(some)] = torch.from_numpy(np.array(some)).to(device)
            self.copies[device] = copy

    def take(self, numbers: np.ndarray, views: np.ndarray, device: torch.device | None) -> Tensor:
        """Rows (..., D) by their numbers and views, from the copy on a device, or from the file."""
        if device is None:
            return torch.from_numpy(self.rows[numbers, views])
        return self.copies[device][tuple(torch.tensor(part, device=device) for part in (numbers, views))]

    def damaged(self, entry: Entry) -> bool:
        """Whether the rows of a clip are not those that were written."""
        rows = self.rows[entry.row : entry.row + entry.frames]
        return len(rows) < entry.frames or zlib.crc32(rows.tobytes()) != entry.crc32


def file_stamp(video: Video) -> tuple[int, int]:
    """Size in bytes and time in ns of a video file; a folder of frames has no size."""
    status = video.path.stat()
    return (0 if video.path.is_dir() else status.st_size), status.st_mtime_ns


def rows_path(index: Path) -> Path:
    """The file whose rows an index names."""
    return index.with_name(index.name.replace("index", "embeddings", 1)).with_suffix(".npy")


def _read_index(index: Path) -> Iterator[tuple[str, Entry]]:
    """Clip names and entries; a last line that is not whole is left out. Raises: CacheError if damaged."""
    for line in index.read_bytes().split(b"\n")[:-1]:
        try:
            fields = json.loads(line)
            name, entry = fields.pop("clip"), Entry(**fields)
            if not all(isinstance(value, int) for value in fields.values()) or entry.row < 0:
                raise ValueError(line)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CacheError(f"{index}: damaged; delete the folder, it is made again") from error
        yield name, entry


class CachedClips:
    """The embeddings of some clips, to be read.

    Args:
        places: the shard and the entry of each clip, by its name
        width: D
        device: whose memory they are read from; from the files without one
    """

    def __init__(
        self, places: dict[str, tuple[_Shard, Entry]], width: int, device: torch.device | None = None
    ) -> None:
        self.width, self._places, self._device = width, places, device
        self._shards = list({shard.path: shard for shard, _ in places.values()}.values())
        if device is not None:
            for shard in self._shards:
                shard.copy_to(device)

    def count(self, clip: Clip) -> int:
        """Number of embeddings of a clip."""
        return self._places[clip.name][1].frames

    def gather(self, clips: Sequence[Clip], indices: np.ndarray, flipped: np.ndarray) -> Tensor:
        """Embeddings (B, T, D) float16 out of B clips, by number (B, T), mirrored where `flipped` (B,)."""
        places = [self._places[clip.name] for clip in clips]
        numbers = np.array([entry.row for _, entry in places])[:, None] + indices
        views = np.broadcast_to(flipped[:, None].astype(int), numbers.shape)
        embeddings = torch.empty(*numbers.shape, self.width, dtype=torch.float16, device=self._device)
        for shard in {shard.path: shard for shard, _ in places}.values():
            chosen = np.flatnonzero([other.path == shard.path for other, _ in places])
            taken = shard.take(numbers[chosen], views[chosen], self._device)
            embeddings[torch.from_numpy(chosen).to(self._device)] = taken
        return embeddings

    def needs(self, device: torch.device) -> int:
        """Bytes that `on_device` will take there."""
        return sum(shard.rows.nbytes for shard in self._shards if device not in shard.copies)

    def on_device(self, device: torch.device) -> CachedClips:
        """The same in an accelerator's memory, with all that lies in the same files."""
        return CachedClips(self._places, self.width, device)


class EmbeddingCache:
    """The clips that a cache holds, as its indices tell when it is opened or read anew.

    Args:
        folder: of the files; there may be none yet
        views: 2 where mirrored frames are kept too
        width: D

    Raises: CacheError if the files do not fit together.
    """

    def __init__(self, folder: Path, views: int, width: int) -> None:
        self.folder, self.views, self.width = folder, views, width
        self.read()

    def read(self) -> None:
        """Read the indices anew, to see what has been added.

        Raises: CacheError if the files do not fit together.
        """
        # A clip that has changed stands there more than once.
        self._places: dict[tuple[str, int, int], tuple[_Shard, Entry]] = {}
        self._rows: dict[Path, int] = {}
        for index in sorted(self.folder.glob("index*.jsonl")):
            entries = list(_read_index(index))
            rows = max((entry.row + entry.frames for _, entry in entries), default=0)
            self._rows[index] = rows
            shard = _Shard(rows_path(index), self._map(rows_path(index), rows))
            for name, entry in entries:
                self._places[name, entry.size, entry.mtime_ns] = shard, entry

    @property
    def row_bytes(self) -> int:
        """Of one embedding, with its views."""
        return 2 * self.views * self.width

    def _map(self, path: Path, rows: int) -> np.ndarray:
        shape = (rows, self.views, self.width)
        if not rows:
            return np.empty(shape, np.float16)
        length = path.stat().st_size if path.exists() else 0
        if length < HEADER + rows * self.row_bytes:
            raise CacheError(f"{path}: shorter than its index says; delete the folder, it is made again")
        return np.memmap(path, np.float16, "r", HEADER, shape)

    def rows(self, index: Path) -> int:
        """Number of rows that an index names."""
        return self._rows.get(index, 0)

    def _place(self, clip: Clip) -> tuple[_Shard, Entry] | None:
        return self._places.get((clip.name, *file_stamp(clip.video)))

    def missing(self, clips: Sequence[Clip]) -> list[Clip]:
        """The clips that are not kept, or whose file has changed since, sorted by name.

        Sorted, so that the cache is the same whichever split was first.
        """
        return sorted((clip for clip in clips if self._place(clip) is None), key=lambda clip: clip.name)

    def view(self, clips: Sequence[Clip]) -> CachedClips:
        """The embeddings of clips that are all kept.

        Raises: CacheError if one is not.
        """
        places = {clip.name: place for clip in clips if (place := self._place(clip)) is not None}
        if gone := [clip for clip in clips if clip.name not in places]:
            raise CacheError(f"{self.folder}: {len(gone):,} clips are not there, the first {gone[0].name}")
        return CachedClips(places, self.width)

    def __len__(self) -> int:
        return len(self._places)

    def damaged(self, clips: Sequence[Clip] | None = None) -> list[str]:
        """Names of the clips, all by default, whose rows are not those that were written; reads them all."""
        places = self._places
        keys = places if clips is None else [(clip.name, *file_stamp(clip.video)) for clip in clips]
        return sorted({key[0] for key in keys if key in places and places[key][0].damaged(places[key][1])})


def check_caches(path: Path) -> Iterator[tuple[Path, int, list[str]]]:
    """Every cache in a folder, with the number of its clips and the names of those that are damaged.

    Raises: CacheError if one's files do not fit together.
    """
    for key_path in sorted(path.glob("*/key.json")):
        rows = next(iter(sorted(key_path.parent.glob("embeddings*.npy"))), None)
        try:
            shape = np.load(rows, mmap_mode="r").shape if rows else (0, 1, 1)
            _, views, width = shape
        except (ValueError, EOFError, OSError) as error:
            raise CacheError(f"{rows}: damaged; delete the folder, it is made again") from error
        cache = EmbeddingCache(key_path.parent, views, width)
        yield cache.folder, len(cache), cache.damaged()
