"""Embeddings on disk: a folder of plain files that any program can read.

    encoder.json            what made them: encoder, SHA-256 of its weights, pixels, precision
    <class>/<clip>.npy      float16 (V, K, D): the embeddings of a video; view 1 is of its mirror image
    <class>/<clip>.json     what they stand for: frames, frame rate, hop, stride, the frames at which windows
                            begin anew, and size and time of the video file

A pair is written beside and renamed, the json last, so it is whole or not there. Existing entries that fit
are skipped, so an interrupted run can be restarted, and processes or machines can share the work.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import shutil
import threading
import time
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from features.embed import Embedded, embed_video
from features.encoder import Encoder
from features.workers import pool_of_cores
from utils.files import beside, json_bytes, make_writable_folder, write_whole
from utils.process import UserError, is_first, say, warn
from utils.ranks import ALONE, Ranks
from video.files import VideoError
from video.reader import Video

# Flags that decide an embedding, by their entry in encoder.json.
FLAGS = {
    "encoder": "--encoder",
    "encoder_sha256": "--encoder_weights",
    "img_dim": "--img_dim",
    "precision": "--precision",
}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What NumPy raises for a damaged array.
UNREADABLE = (OSError, ValueError, SyntaxError, tokenize.TokenError)


class StoreError(UserError):
    """Embeddings on disk that cannot be used; the message names the folder and the next step."""


def describe(encoder: Encoder) -> dict[str, Any]:
    """What encoder.json holds of an encoder that is prepared."""
    return {
        "encoder": encoder.name,
        "encoder_sha256": encoder.sha256(),
        "img_dim": encoder.img_dim,
        "precision": encoder.precision,
    }


def default_folder(root: Path | None, dataset_path: Path, encoder: Encoder, stride: int) -> Path:
    """The folder of a data set's embeddings: <root>/<encoder>-<pixels>px-...; other flags, another folder.

    Args:
        root: of all of them; by default <dataset_path>-embeddings
    """
    name = encoder.name.replace("/", "-")[-80:]
    words = [name, f"{encoder.img_dim}px", encoder.precision, encoder.sha256()[:8]]
    return (root or beside(dataset_path, "-embeddings")) / "-".join(
        [*words, f"stride{stride}"] if stride > 1 else words
    )


def file_stamp(video: Video) -> tuple[int, int]:
    """Size in bytes and time in ns of a video file; a folder of frames has no size."""
    status = video.path.stat()
    return (0 if video.path.is_dir() else status.st_size), status.st_mtime_ns


@dataclass(frozen=True)
class Entry:
    """A video in the store: `embeddings` is K, the number along the video, `views` is V."""

    embeddings: int
    views: int
    frames: int
    lost_frames: int


class Store:
    """A folder of embeddings of one encoder.

    Args:
        folder: made where it is not there
        encoder: prepared
        stride: every stride-th frame is encoded
        flip: mirrored frames are wanted too
        cuts: windows begin anew at cuts, as it is for long videos
        advice: what to do where the folder cannot be used

    Raises: StoreError if what is in the folder was made with other flags, UserError if it cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        encoder: Encoder,
        *,
        stride: int = 1,
        flip: bool = False,
        cuts: bool = False,
        advice: str = "name another folder with --cache_path",
    ) -> None:
        self.folder, self.encoder, self.stride, self.flip, self.cuts = folder, encoder, stride, flip, cuts
        self.advice = advice
        self.width = encoder.width
        self._arrays: dict[str, np.ndarray] = {}
        # What json files hold that were read; other processes may add some, and change none.
        self._about: dict[str, dict[str, Any]] = {}
        about, path = describe(encoder), folder / "encoder.json"
        if path.is_file():
            try:
                before = json.loads(path.read_text())
                differ = [name for name in FLAGS if before[name] != about[name]]
            except (ValueError, KeyError, TypeError) as error:
                raise StoreError(f"{path}: damaged; delete the folder, it is made again") from error
            if differ:
                raise StoreError(
                    f"{folder}: its embeddings are of {FLAGS[differ[0]]} {before[differ[0]]}, not "
                    f"{about[differ[0]]}; {advice}"
                )
            return
        make_writable_folder(folder, advice=advice)
        write_whole(path, json_bytes(about))

    def entry(self, name: str, video: Video) -> Entry | None:
        """What is kept of a video; None if it is not there, not whole, of another time or stride."""
        about = self._read(name)
        if about is None or (about["size"], about["mtime_ns"]) != file_stamp(video):
            return None
        if about["stride"] != self.stride or (
            about["cuts"] != self.cuts and (self.cuts or len(about["begins"]) > 1)
        ):
            return None
        entry = Entry(*(int(about[each.name]) for each in fields(Entry)))
        return None if self.flip and entry.views < 2 else entry

    def check_stride(self, names: Iterable[str]) -> None:
        """Raises: StoreError if embeddings are there that another --frame_stride made."""
        for name in names:
            about = self._read(name)
            if about and about["stride"] != self.stride:
                raise StoreError(
                    f"{self.folder / name}.npy is there with --frame_stride {about['stride']}, not "
                    f"{self.stride}; {self.advice}"
                )

    def _read(self, name: str) -> dict[str, Any] | None:
        if name in self._about:
            return self._about[name]
        try:
            about = json.loads((self.folder / f"{name}.json").read_bytes())
            size = (self.folder / f"{name}.npy").stat().st_size
            # NumPy's header is 128 bytes long for such shapes.
            whole = size == 128 + 2 * about["views"] * about["embeddings"] * self.width
            if not (whole and about["stride"] and about["begins"]):
                return None
            self._about[name] = about
            return about
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def load(self, name: str, video: Video) -> Embedded | None:
        """The embeddings of a video; None where `entry` is."""
        if self.entry(name, video) is None:
            return None
        about = self._read(name) or {}
        known = {each.name: about[each.name] for each in fields(Embedded) if each.name in about}
        known |= {"embeddings": self.array(name), "fps": about["fps"] and Fraction(about["fps"])}
        return Embedded(**known)

    def array(self, name: str) -> np.ndarray:
        """The embeddings (V, K, D) of a name that has an entry, mapped from the file."""
        array = self._arrays.get(name)
        if array is None:
            try:
                array = np.load(self.folder / f"{name}.npy", mmap_mode="r")
            except UNREADABLE as error:
                raise StoreError(f"{self.folder / name}.npy: damaged; delete it, it is made again") from error
            if len(self._arrays) >= 512:
                self._arrays.clear()
            self._arrays[name] = array
        return array

    def save(self, name: str, video: Video, stamp: tuple[int, int], embedded: Embedded) -> None:
        """Write the pair of a video. Raises: UserError if it cannot be written."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        views, count, _ = embedded.embeddings.shape
        about = asdict(replace(embedded, embeddings=np.empty(0))) | {
            "video": video.name, "embeddings": count, "views": views,
            "fps": embedded.fps and str(embedded.fps), "size": stamp[0], "mtime_ns": stamp[1],
        }  # fmt: skip
        contents = io.BytesIO()
        np.save(contents, embedded.embeddings)
        self._arrays.pop(name, None)
        self._about.pop(name, None)
        write_whole(path.with_name(f"{path.name}.npy"), contents.getbuffer(), sync=False)
        write_whole(path.with_name(f"{path.name}.json"), json_bytes(about), sync=False)

    def embed(self, name: str, video: Video, *, map: Callable[..., Iterable[Any]] = map) -> Embedded:
        """Encode a video and keep the result. Raises: as `embed_video` and `save`."""
        stamp = file_stamp(video)
        embedded = embed_video(
            video, self.encoder, stride=self.stride, flip=self.flip, cuts=self.cuts, map=map
        )
        self.save(name, video, stamp, embedded)
        return embedded

    def fill(self, videos: Mapping[str, Video], *, threads: int, ranks: Ranks = ALONE) -> dict[str, str]:
        """Encode what is missing of some videos, a video a thread, the longest first; a bar shows frames/s.

        Interrupted at any instant, it goes on where it was. Of several processes each takes its share first,
        then whatever is missing.

        Args:
            videos: by name, `<class>/<clip>`

        Returns: why a video could not be read, by name; the others are encoded all the same.
        Raises: StoreError if the disk is too small; what is encoded is kept.
        """
        missing = sorted(name for name, video in videos.items() if self.entry(name, video) is None)
        # All have looked before the first one writes.
        ranks.wait()
        failures: dict[str, str] = {}
        if missing:
            self._check_space(videos, missing)
            share = missing[ranks.rank :: ranks.size]
            failures = self._encode(videos, share, threads)
            rest = [name for name in reversed(missing) if name not in failures]
            rest = [name for name in rest if self.entry(name, videos[name]) is None] if ranks.size > 1 else []
            failures |= self._encode(videos, rest, threads)
        ranks.wait()
        gathered = [item for part in ranks.gather(failures) for item in part.items()]
        return dict(sorted(gathered))

    def _check_space(self, videos: Mapping[str, Video], missing: list[str]) -> None:
        need, free = self._need(videos, missing), shutil.disk_usage(self.folder).free
        say(f"encoding {len(missing):,} videos into {self.folder}, about {max(1, need / 1e6):,.0f} MB")
        # What a file system keeps for itself, and what the estimate is off by.
        if 1.05 * need + 1e8 > free:
            raise StoreError(
                f"{self.folder}: about {max(1, need / 1e6):,.0f} MB needed, {free / 1e6:,.0f} MB free; make "
                f"room, {self.advice}, or encode fewer frames with --frame_stride 2"
            )

    def _need(self, videos: Mapping[str, Video], missing: list[str]) -> float:
        """Bytes of the embeddings of videos, by the frames that some of them state."""
        # Opening all of 13,000 would take minutes.
        some = missing[:: max(1, len(missing) // 100)]
        frames = 0
        for name in some:
            try:
                frames += videos[name].stated_count()
            except (VideoError, OSError):
                continue  # reported when its turn comes
        share = sum(videos[name].size() for name in missing) / max(
            1, sum(videos[name].size() for name in some)
        )
        embeddings = share * frames / self.stride / self.encoder.windows.hop
        return embeddings * 2 * self.width * (2 if self.flip else 1)

    def _encode(self, videos: Mapping[str, Video], names: list[str], threads: int) -> dict[str, str]:
        if not names:
            return {}
        failures: dict[str, str] = {}
        damaged, lost, frames, stopped, started = 0, 0, 0, threading.Event(), time.monotonic()

        def until_stopped(function: Callable[..., Any], items: Iterable[Any]) -> Iterator[Any]:
            for item in builtins.map(function, items):
                if stopped.is_set():
                    raise InterruptedError
                yield item

        def encode(name: str) -> Embedded | None:
            # Another process may have done it meanwhile.
            if stopped.is_set() or self.entry(name, videos[name]) is not None:
                return None
            return self.embed(name, videos[name], map=until_stopped)

        pool = pool_of_cores(threads)
        longest_first = sorted(names, key=lambda name: -videos[name].size())
        bar = tqdm(
            total=len(names), desc="encoding", unit="video", dynamic_ncols=True, disable=not is_first()
        )
        try:
            waiting = {pool.submit(encode, name): name for name in longest_first}
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    name = waiting.pop(future)
                    try:
                        if (done := future.result()) is not None:
                            frames += done.frames
                            damaged, lost = damaged + bool(done.problems), lost + done.lost_frames
                    except UserError as error:
                        if isinstance(error.__cause__, OSError) and error.__cause__.errno in FULL:
                            left = [*waiting.values(), name]
                            raise StoreError(
                                f"{self.folder}: the disk became full; what is encoded is kept, and "
                                f"{len(left):,} of {len(names):,} videos are missing, about "
                                f"{self._need(videos, left) / 1e9:.2f} GB; make room and start again, or "
                                f"{self.advice}"
                            ) from error
                        failures[name] = str(error)
                        bar.write(f"cannot be read: {error}")
                    except OSError as error:
                        failures[name] = f"{videos[name].name}: {error.strerror or error}"
                    bar.update()
                    bar.set_postfix_str(f"{frames / (time.monotonic() - started):.0f} frames/s")
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            bar.close()
        if damaged:
            warn(
                f"{damaged:,} videos are damaged, {lost:,} of their frames did not decode; "
                "python3 dataset.py check names them"
            )
        return failures


def find_stores(root: Path) -> list[Path]:
    """The folders of embeddings in a folder."""
    return sorted(path.parent for path in root.glob("*/encoder.json"))


def damaged_pairs(folder: Path) -> tuple[int, list[str]]:
    """How many videos a folder of embeddings holds, and the names of those whose arrays are not whole."""
    wrong, paths = [], sorted(folder.rglob("*.npy"))
    for path in paths:
        try:
            about = json.loads(path.with_suffix("").with_name(path.stem + ".json").read_bytes())
            array = np.load(path)
            good = array.shape[:2] == (about["views"], about["embeddings"]) and np.isfinite(array).all()
        except (*UNREADABLE, KeyError, TypeError):
            good = False
        if not good:
            wrong.append(os.fspath(path.relative_to(folder).with_suffix("")))
    return len(paths), wrong
