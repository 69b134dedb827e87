"""The folder of a web page: how much is in it, how long that stays, and what earlier pages left behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import filelock

from utils.process import UserError

PREFIX = "action-recognition-"
MEGABYTE = 2**20
# A running page holds the lock on it.
HELD = "held"


def _files(folder: Path) -> Iterator[Path]:
    """Files, and folders after what is in them; what goes away meanwhile is no error."""
    for root, folders, names in os.walk(folder, topdown=False):
        yield from (Path(root) / name for name in (*names, *folders))


def remove_left(beside: Path) -> None:
    """Delete the folders beside one that belong to its owner and are held by no running page."""
    for folder in beside.parent.glob(f"{PREFIX}*"):
        held = folder / HELD
        with contextlib.suppress(OSError, filelock.Timeout):
            is_own = not folder.is_symlink() and folder.stat().st_uid == beside.stat().st_uid
            if folder == beside or not is_own or not held.is_file():
                continue
            with filelock.FileLock(held).acquire(blocking=False):
                shutil.rmtree(folder, ignore_errors=True)


class Room:
    """A folder for uploads and results that goes with the page; to be entered.

    Entering it deletes what pages left that were killed. Until it is left, all temporary files lie there.

    Args:
        limit: bytes that may lie there

    Attributes:
        folder: all of it
        files: the part that `sweep` keeps empty
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def __enter__(self) -> Self:
        while True:
            self.folder = Path(tempfile.mkdtemp(prefix=PREFIX)).resolve()
            self._lock = filelock.FileLock(self.folder / HELD)
            with contextlib.suppress(OSError, filelock.Timeout):
                self._lock.acquire(blocking=False)
                # Another page that starts may have taken it for one that is left, before it was locked.
                if (self.folder / HELD).exists():
                    break
        self.files = self.folder / "files"
        self.files.mkdir()
        remove_left(self.folder)
        self._before, tempfile.tempdir = tempfile.tempdir, str(self.folder)
        return self

    def __exit__(self, *_: object) -> None:
        tempfile.tempdir = self._before
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._lock.release()

    def check(self, more: int = 0) -> None:
        """See whether there is room.

        Args:
            more: bytes that are still to come

        Raises: UserError if there is not.
        """
        used = 0
        for path in _files(self.folder):
            with contextlib.suppress(OSError):
                # What lies on the disk: a file of one byte takes a block, and so does its folder.
                used += 512 * path.stat().st_blocks
        if used + more > self.limit:
            raise UserError(
                f"the page has room for {self.limit // MEGABYTE} MB of videos at a time, which are taken; "
                "try again when older ones are deleted, or a smaller video"
            )

    def sweep(self, seconds: float) -> None:
        """Delete what has not changed for some seconds: files, and folders that are empty.

        Gradio's `delete_cache` knows its own copies of results, not the files that they are copied from.
        """
        for path in _files(self.files):
            with contextlib.suppress(OSError):  # in use, not empty, or gone by itself
                if time.time() - path.stat().st_mtime > seconds:
                    path.rmdir() if path.is_dir() else path.unlink()

    def remove_strays(self) -> None:
        """Delete uploads that were begun and not ended: Gradio gives those that were a folder each."""
        for path in list(self.files.glob("*")):
            with contextlib.suppress(OSError):
                if path.is_file():
                    path.unlink()
