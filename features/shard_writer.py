"""Writing embeddings to disk so that a clip is whole or not there, whenever the power goes."""

from __future__ import annotations

import json
import os
import time
import zlib
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from features.cache import HEADER, EmbeddingCache, Entry, rows_path

# Seconds of work that a power cut may cost.
COMMIT_SECONDS = 3


def npy_header(shape: tuple[int, ...]) -> bytes:
    """Header of a float16 .npy file, version 1.0, padded to `HEADER` bytes so that it can be rewritten."""
    fields = f"{{'descr': '<f2', 'fortran_order': False, 'shape': {shape}, }}"
    return (
        b"\x93NUMPY\x01\x00"
        + (HEADER - 10).to_bytes(2, "little")
        + fields.ljust(HEADER - 11).encode()
        + b"\n"
    )


class ShardWriter:
    """Appends clips to the rows and the index of a shard; whatever happens, both end after a whole clip.

    Args:
        cache: whose folder the files are in; it tells how many rows are whole
        index: of the shard
    """

    def __init__(self, cache: EmbeddingCache, index: Path) -> None:
        self._shape, self._row_bytes = (cache.views, cache.width), cache.row_bytes
        # The next clip begins at row `_first`, and has its rows up to `_end` so far.
        self._first = self._end = cache.rows(index)
        self._crc32 = 0
        self._lines: list[str] = []
        self._committed = time.monotonic()
        data = rows_path(index)
        self._data = data.open("r+b" if data.exists() else "w+b")
        self._index = index.open("r+b" if index.exists() else "w+b")
        # What an interrupted run left behind the last whole line, and behind the last whole clip.
        self._index.truncate(self._index.read().rfind(b"\n") + 1)
        self._index.seek(0, os.SEEK_END)
        self.drop_clip()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        with self._data, self._index:
            self.drop_clip()
            self._data.seek(0)
            self._data.write(npy_header((self._first, *self._shape)))
            self._commit()

    def add_rows(self, rows: np.ndarray) -> None:
        """Append embeddings (n, views, D) of the clip that is being written."""
        contents = rows.astype(np.float16).tobytes()
        self._data.write(contents)
        self._crc32 = zlib.crc32(contents, self._crc32)
        self._end += len(rows)

    def drop_clip(self) -> None:
        """Take back the rows of the clip that is being written."""
        self._end, self._crc32 = self._first, 0
        self._data.seek(HEADER + self._first * self._row_bytes)
        self._data.truncate()

    def end_clip(self, name: str, stamp: tuple[int, int]) -> None:
        """Name the clip that has been written in the index, and sync both files where that is due."""
        entry = Entry(self._first, self._end - self._first, *stamp, self._crc32)
        self._lines.append(json.dumps({"clip": name, **asdict(entry)}) + "\n")
        self._first, self._crc32 = self._end, 0
        if time.monotonic() - self._committed > COMMIT_SECONDS:
            self._commit()

    def _commit(self) -> None:
        self._data.flush()
        os.fsync(self._data.fileno())
        self._index.write("".join(self._lines).encode())
        self._index.flush()
        os.fsync(self._index.fileno())
        self._lines.clear()
        self._committed = time.monotonic()
