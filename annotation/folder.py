"""The folder of a web page: how long its files stay, and what pages left behind that were killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import filelock

PREFIX = "action-recognition-"
# A running page holds it.
LOCK = "lock"


@contextlib.contextmanager
def page_folder() -> Iterator[Path]:
    """A folder for uploads and results that is deleted at the end; until then all temporary files lie in it.

    What pages left that were killed is deleted first.
    """
    folder = Path(tempfile.mkdtemp(prefix=PREFIX)).resolve()
    before = tempfile.tempdir
    with filelock.FileLock(folder / LOCK):
        remove_left(folder)
        tempfile.tempdir = str(folder)
        try:
            yield folder
        finally:
            tempfile.tempdir = before
            shutil.rmtree(folder, ignore_errors=True)


def remove_left(beside: Path) -> None:
    """Delete the folders beside one that belong to its owner and that no running page holds."""
    for folder in beside.parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError, filelock.Timeout):
            is_own = not folder.is_symlink() and folder.stat().st_uid == beside.stat().st_uid
            if folder != beside and is_own and (folder / LOCK).is_file():
                with filelock.FileLock(folder / LOCK).acquire(blocking=False):
                    shutil.rmtree(folder, ignore_errors=True)


def no_room(folder: Path, megabytes: int, more: int = 0) -> str | None:
    """A sentence if `more` bytes and what the files in a folder take on the disk are above a limit."""
    used = more
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # gone meanwhile
            # A file of a single byte takes a block.
            used += 512 * path.stat().st_blocks
    if used <= megabytes * 2**20:
        return None
    return (
        f"the page has room for {megabytes} MB of videos at a time, which are taken; try again when older "
        "ones are deleted, or a smaller video"
    )


def remove_strays(folder: Path) -> None:
    """Delete uploads that were begun and not ended: Gradio gives those that were a folder each."""
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if path.is_file() and path.name != LOCK:
                path.unlink()


def sweep(folder: Path, seconds: float) -> None:
    """Delete what has not changed for some seconds in a page's folder: files, and folders that are empty.

    Gradio's `delete_cache` knows its own copies of results, not the files that they are copied from.
    """
    for root, folders, names in os.walk(folder, topdown=False):
        for path in (Path(root) / name for name in (*names, *folders) if name != LOCK):
            with contextlib.suppress(OSError):  # not empty, or gone by itself
                if time.time() - path.stat().st_mtime > seconds:
                    path.rmdir() if path.is_dir() else path.unlink()
