"""Files that are whole or not there at all."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from utils.process import UserError


def shortened(name: str, room: int = 20) -> str:
    """A file's name, cut where needed so that `room` more bytes fit behind it, of the 255 that may be."""
    while len(os.fsencode(name)) > 255 - room:
        name = name[:-1]
    return name


@contextlib.contextmanager
def replacing(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """A hidden file beside `path` to write to, which takes its name at the end, or else is removed.

    Args:
        sync: wait for the disk; False for what can be made again
    """
    unique = f"{os.getpid()}-{threading.get_ident()}"
    partial = path.with_name(f".{shortened(path.stem, 60)}.{unique}.partial{path.suffix.lower()}")

    def wait_for_disk(written: Path) -> None:
        descriptor = os.open(written, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    try:
        yield partial
        if sync:
            wait_for_disk(partial)
        partial.replace(path)
        if sync:
            wait_for_disk(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, contents: bytes | memoryview, *, sync: bool = True) -> None:
    """Write a file through `replacing`. Raises: UserError if the disk is full or the file too large."""
    try:
        with replacing(path, sync=sync) as partial:
            partial.write_bytes(contents)
    except OSError as error:
        raise UserError(
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


def beside(path: Path, suffix: str) -> Path:
    """<path><suffix>, beside a folder; a link to the folder is not followed."""
    # Absolute, so that "." has a name too.
    path = Path(os.path.abspath(path))  # noqa: PTH100 - Path.resolve would follow the link
    return path.with_name(path.name + suffix)


def unused(path: Path, suffix: str = "", *, first: str = "") -> Path:
    """<path><first><suffix> if nothing is there, else <path>-2<suffix>, <path>-3<suffix>, ..."""
    number, free = 1, path.with_name(path.name + first + suffix)
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}{suffix}")
    return free


def make_writable_folder(folder: Path, *, advice: str = "choose another one") -> None:
    """Make an output folder, and see that a file can be written there. Raises: UserError with `advice`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: cannot write here ({error.strerror or error}); {advice}") from error
