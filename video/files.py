"""Which files are videos or frames, and whether they are whole."""

from __future__ import annotations

import glob
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from utils.process import MissingFileError, UserError

VIDEO_SUFFIXES = (
    *(".avi", ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".vob"),
    *(".flv", ".wmv", ".asf", ".3gp", ".ogv"),
)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


class VideoError(UserError):
    """A video file or a folder of frames that cannot be used; the message names it and the next step."""


def printable(name: str | Path) -> str:
    """A name in one line that every terminal can show: control characters and broken bytes are escaped."""
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in str(name))


def frame_files(folder: Path) -> list[Path]:
    """The images of a folder in the order of the numbers that are their names. Raises: VideoError."""
    files = [entry for entry in folder.iterdir() if entry.suffix.lower() in IMAGE_SUFFIXES]
    strays = [file.name for file in files if not file.stem.isdecimal()]
    if strays:
        raise VideoError(f"{folder / strays[0]}: frames must be named by their number, as 0.jpg")
    if not files:
        raise VideoError(f"{folder}: no frames in this folder; run extract_frames.py again")
    return sorted(files, key=lambda file: int(file.stem))


def video_files(folder: Path) -> list[Path]:
    """The video files in a folder and in those below it, sorted; hidden ones are left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in VIDEO_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def find_videos(names: Iterable[str | Path]) -> list[Path]:
    """Videos by name: files, and those in folders and in patterns, each once.

    A file that is named is taken as it is. Raises: MissingFileError if a folder or a pattern has none.
    """
    videos: dict[Path, None] = {}
    for name in names:
        path = Path(name)
        some = [path]
        if path.is_dir():
            some = video_files(path)
        elif not path.exists() and glob.has_magic(str(name)):
            # Path.glob takes no pattern that begins at the root.
            some = sorted(map(Path, glob.glob(str(name), recursive=True)))  # noqa: PTH207
        if not some:
            raise MissingFileError(f"{name}: no videos there, which end in {', '.join(VIDEO_SUFFIXES)}")
        videos.update(dict.fromkeys(some))
    return list(videos)


def stated_size(path: Path) -> int:
    """Bytes that a file states in its header, without decoding; its size where it states nothing.

    AVI states the size of its one RIFF chunk, and MP4 that of each of its boxes. It may be wrong, as where it
    was written into a pipe. Raises: MissingFileError; VideoError if it is empty or cannot be read.
    """
    if not path.is_file():
        raise MissingFileError(f"{printable(path)}: no such video file; check the path")
    size = path.stat().st_size
    if size == 0:
        raise VideoError(f"{printable(path)}: the file is empty; copy or download it again")
    try:
        with path.open("rb") as file:
            header = file.read(12)
            if header[:4] == b"RIFF" and len(header) == 12:
                return struct.unpack("<I", header[4:8])[0] + 8
            if header[4:8] == b"ftyp":
                return _mp4_size(file, size)
    except OSError as error:
        raise VideoError(f"{printable(path)}: cannot be read ({error.strerror or error})") from error
    return size


def _mp4_size(file: BinaryIO, size: int) -> int:
    """Bytes that the top-level boxes of an MP4 file state in all (ISO/IEC 14496-12, 4.2)."""
    position = 0
    while position < size:
        file.seek(position)
        header = file.read(16)
        if len(header) < 8:
            return position + 8
        length = struct.unpack(">I", header[:4])[0]
        if length == 1 and len(header) == 16:
            length = struct.unpack(">Q", header[8:])[0]
        if length < 8:  # 0 means to the end of the file; others are no box, and the decoder shall judge
            return size
        position += length
    return position
