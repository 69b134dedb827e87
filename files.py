"""Files that are whole or not there at all."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden file beside `path` to write to; at the end it is synced to disk and takes the name.

    If the end is not reached it is removed, and `path` stays as it was.
    """
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix.lower()}")
    try:
        yield partial
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, contents: bytes | memoryview) -> None:
    """Write a file through `replacing`.

    Raises: OSError that names the path and the bytes needed if the disk is full or the file too large.
    """
    try:
        with replacing(path) as partial:
            partial.write_bytes(contents)
    except OSError as error:
        raise OSError(
            f"{path}: cannot write {len(contents):,} bytes ({error.strerror or error}); what was there "
            "before is untouched; make room, or choose another folder"
        ) from error


def csv_bytes(rows: Iterable[Iterable[object]]) -> bytes:
    """Rows as the bytes of a CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def json_bytes(value: object) -> bytes:
    """A plain value as the bytes of a JSON file that people can read."""
    return (json.dumps(value, indent=1) + "\n").encode()
