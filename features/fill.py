"""Each video is encoded once and kept; training and testing start from its embeddings. Fills the caches.

    python3 features.py --dataset_path data/UCF-101 --split_path data/ucfTrainTestlist     # fill it ahead
    python3 features.py --shard 1/8 ...                                # an eighth of it, on one machine of 8
    torchrun --nproc_per_node=4 features.py ...                         # all of it, on four devices

train.py and test.py fill what is missing by themselves. `cache` describes the files.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import filelock
import numpy as np
from tqdm import tqdm

from features.cache import CacheError, CacheKey, EmbeddingCache, file_stamp
from features.encoder import Encoder
from features.execution import Calibration, prepare_encoders
from features.pipeline import embed_ahead, read_ahead
from features.settings import CacheSettings, DeviceSettings, EncoderSettings, get_args_parser
from features.shard_writer import ShardWriter
from features.streams import Stream, encoder_stream, further_encoders, open_streams, pace, parse_streams
from splits.datasets import DataSettings, open_listed
from splits.split import WHOLE, Clip, Shard
from utils.device import choose_device, seed_everything
from utils.files import beside, write_whole
from utils.flags import read
from utils.process import UserError, is_first, say, warn
from utils.ranks import ALONE, Ranks
from video.files import VideoError


def fill(
    cache: EmbeddingCache,
    key: CacheKey,
    clips: Sequence[Clip],
    stream: Stream,
    *,
    threads: int = 1,
    shard: Shard = WHOLE,
) -> None:
    """Encode and keep what is missing of the shard's clips; a bar shows frames/s.

    Interrupted at any instant, it goes on where it was. A second process waits for the first. At the end,
    what was written is read again and compared.

    Raises: CacheError if the disk is too small, or gives back other bytes; VideoError, after all other
        clips, for those that cannot be read; OSError if the cache cannot be written.
    """
    clips = shard.part(clips)
    if not cache.missing(clips):
        return
    # Held by the process, not by the file: a killed one holds it no longer.
    lock = filelock.FileLock(cache.folder / f"lock{shard.suffix}")
    try:
        held = lock.acquire(blocking=False)
    except filelock.Timeout:
        say(f"another process fills {cache.folder}; waiting for it")
        held = lock.acquire()
    with held:
        cache.read()
        missing = cache.missing(clips)
        if not missing:
            return
        need = _check_space(cache, key, missing, shard)
        write_whole(
            cache.folder / "key.json", (json.dumps(key.fields, indent=1, sort_keys=True) + "\n").encode()
        )
        try:
            _encode_clips(cache, key, missing, stream, threads, shard)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise CacheError(
                f"{cache.folder}: the disk became full ({error.strerror}), about {need:,.0f} bytes were "
                "needed; what is encoded is kept; make room and start again, or name another disk with "
                "--cache_path"
            ) from error
        finally:
            cache.read()
        if damaged := cache.damaged(missing):
            raise CacheError(
                f"{cache.folder}: the disk does not give back what was written, for {damaged[0]}; delete the "
                "folder, and name another disk with --cache_path"
            )


def _stated_count(clip: Clip) -> int:
    # An unreadable clip is reported when its turn comes.
    try:
        return clip.video.stated_count()
    except VideoError:
        return 0


def _check_space(cache: EmbeddingCache, key: CacheKey, clips: Sequence[Clip], shard: Shard) -> float:
    """Bytes needed for the clips, by the frames that some of them state. Raises: CacheError if too many."""
    # Opening all of 13,000 clips would take minutes.
    some = clips[:: max(1, len(clips) // 200)]
    share = sum(clip.video.size() for clip in clips) / max(1, sum(clip.video.size() for clip in some))
    frames = sum(map(_stated_count, some)) * share / key.frame_stride
    # The other shards are filled meanwhile, perhaps on the same disk.
    need = frames / key.windows.hop * cache.row_bytes * shard.count
    free = shutil.disk_usage(cache.folder).free
    say(
        f"encoding {len(clips):,} clips, about {frames:,.0f} frames, into {cache.folder}: "
        f"{need / 1e9:.2f} GB needed, {free / 1e9:.1f} GB free"
    )
    # What a file system keeps for itself, and what the estimate is off by.
    if 1.05 * need + 1e8 > free:
        raise CacheError(
            f"{cache.folder}: {need / 1e9:.2f} GB needed and {free / 1e9:.2f} GB free; make room, name "
            "another disk with --cache_path, keep fewer frames with --frame_stride 2, or use --cache off"
        )
    return need


def _encode_clips(
    cache: EmbeddingCache, key: CacheKey, clips: Sequence[Clip], stream: Stream, threads: int, shard: Shard
) -> None:
    videos = [clip.video for clip in clips]
    stamps = [file_stamp(video) for video in videos]
    failures: list[str] = []
    damaged, lost = 0, 0
    started, encoded = time.monotonic(), 0
    with (
        ShardWriter(cache, cache.folder / f"index{shard.suffix}.jsonl") as writer,
        tqdm(
            total=len(clips), desc="encoding", unit="clip", dynamic_ncols=True, disable=not is_first()
        ) as bar,
        contextlib.closing(read_ahead(videos, stream, key.frame_stride, threads)) as pieces,
    ):
        for number, item in embed_ahead(stream, pieces, flip=key.flip):
            if isinstance(item, np.ndarray):
                if not (np.abs(item) <= np.finfo(np.float16).max).all():
                    raise CacheError(f"{videos[number].path}: an embedding does not fit into float16")
                writer.add_rows(item)
                encoded += key.windows.hop * len(item)
                continue
            bar.update()
            bar.set_postfix_str(f"{encoded / (time.monotonic() - started):.0f} frames/s")
            if isinstance(item, Exception):
                failures.append(str(item))
                # The others are encoded all the same, which may take hours.
                bar.write(f"cannot be read: {item}")
                writer.drop_clip()
            else:
                writer.end_clip(clips[number].name, stamps[number])
                damaged, lost = damaged + bool(videos[number].problems), lost + videos[number].lost
    if damaged:
        warn(
            f"{damaged:,} clips are damaged, of which {lost:,} frames did not decode; "
            "python3 dataset.py check names them"
        )
    if failures:
        raise VideoError(
            f"{len(failures)} of {len(clips):,} clips cannot be read; the first: {failures[0]}"
            + ("; python3 dataset.py check names them all" if len(failures) > 1 else "")
        )


def open_cache(
    path: Path,
    clips: Sequence[Clip],
    encoder: Encoder,
    img_dim: int,
    *,
    flip: bool,
    stream: str = "rgb",
    frame_stride: int = 1,
    threads: int = 1,
    ranks: Ranks = ALONE,
    shard: Shard | None = None,
) -> EmbeddingCache:
    """The cache of what `encoder` gives of `clips` in a stream, filled where something is missing.

    Without `flip`, one that keeps mirrored frames too is used where it is there.

    Args:
        path: folder of all caches of a data set
        ranks: processes that fill it together, each its share
        shard: fill this part only, and leave the rest to other machines

    Raises: as `EmbeddingCache` and `fill`; CacheError if the processes see different folders, UserError if
        the folder cannot be made, or for frames of another size than the encoder was quantised for.
    """
    own = encoder_stream(encoder, stream, img_dim)
    key = CacheKey(
        encoder.name, encoder.sha256(), img_dim, encoder.variant(own.view_name), True, frame_stride,
        own.resize.words, own.view_name, own.windows,
    )  # fmt: skip
    if not flip and not (path / key.folder).is_dir():
        key = replace(key, flip=False)
    folder = path / key.folder
    if not folder.is_dir():
        # Opens a quantised network, which a cache that is whole does without.
        encoder.check_side(own.view_name, img_dim)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot make this folder ({error.strerror}); name another with --cache_path, or use "
            "--cache off"
        ) from error
    cache = EmbeddingCache(folder, key.views, encoder.width)
    # Shards of an earlier run, of whatever number of processes, count. All look before any begins to fill.
    missing = bool(cache.missing(clips))
    ranks.wait()
    if missing:
        share = shard or Shard(ranks.rank + 1, ranks.size)
        fill(cache, key, clips, own, threads=threads, shard=share)
    ranks.wait()
    if ranks.size > 1:
        cache.read()
        if gone := cache.missing(clips):
            raise CacheError(
                f"{cache.folder}: {len(gone):,} clips that other processes encoded are not there; all "
                "machines must see one folder, name it with --cache_path"
            )
    return cache


def cache_folder(cache_path: Path | None, dataset_path: Path) -> Path:
    """The folder of all caches of a data set."""
    return cache_path or beside(dataset_path, "-embeddings")


def main(argv: list[str] | None = None) -> int:
    """Fill the cache; returns the exit status."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    if args.shard and "WORLD_SIZE" in os.environ:
        parser.error("--shard and torchrun both share the clips out; use one of them")
    data, kept = read(DataSettings, args), read(CacheSettings, args)
    seen, device_settings = read(EncoderSettings, args), read(DeviceSettings, args)
    if kept.cache == "off":
        raise UserError("--cache off leaves nothing to do here")
    device = choose_device(device_settings.device)
    # With the kernels of training, whose roundings the cache's key names.
    seed_everything(0)
    with contextlib.closing(Ranks.from_environment(device)) as ranks:
        listed = open_listed(data)
        split = listed.all_clips()
        if missing := split.missing():
            say(f"warning: {missing}")
        names = parse_streams(seen.streams)
        spec = pace(seen.encoder, names)
        encoder, further = Encoder(seen.encoder, state=seen.state()).to(device), further_encoders(names)
        opened = open_streams(encoder, further.to(device), names, seen.img_dim)
        clips, frame_stride = split.train, kept.frame_stride or spec.frame_stride
        folder = cache_folder(kept.cache_path, data.dataset_path)
        calibration = Calibration.on(
            clips, listed.never_tested(), folder, frame_stride, ranks, one_split=False
        )
        prepare_encoders(opened, device_settings, calibration)
        for own, stream in opened:
            cache = open_cache(
                folder,
                clips,
                own,
                stream.img_dim,
                flip=seen.mirrors(spec),
                stream=stream.name,
                frame_stride=frame_stride,
                threads=max(1, device_settings.num_workers),
                ranks=ranks,
                shard=args.shard,
            )
            say(f"{len(clips) - len(cache.missing(clips)):,} of {len(clips):,} clips in {cache.folder}")
    return 0
