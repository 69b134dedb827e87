import errno
import json
import os
import re
import threading
import time
from collections import namedtuple
from functools import partial
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
from PIL import Image

from features import fill as fill_module
from features import shard_writer
from features.cache import CacheError, CacheKey, EmbeddingCache
from features.encoder import Encoder
from features.fill import fill
from features.pipeline import embed_ahead
from features.streams import encoder_stream
from splits.split import WHOLE, Clip, Shard
from video.files import VideoError
from video.frames import resize_frames
from video.reader import Video

WIDTH = 48


@pytest.fixture
def encoder():
    return encoder_stream(Encoder("tiny"), "rgb", 16)


@pytest.fixture
def clips(small):
    paths = sorted((small / "UCF-101").glob("*/*.avi"))
    return [Clip(f"{path.parent.name}/{path.name}", 0, Video(path)) for path in paths]


def cache_of(path, *, flip=False, frame_stride=1, shard=WHOLE):
    key = CacheKey("tiny", "ab", 16, "float32", flip=flip, frame_stride=frame_stride)
    (path / key.folder).mkdir(parents=True, exist_ok=True)
    cache = EmbeddingCache(path / key.folder, key.views, WIDTH)
    return cache, partial(fill, cache, key, shard=shard)


def all_rows(cache, clip):
    kept = cache.view([clip])
    return kept.gather([clip], np.arange(kept.count(clip))[None], np.array([False]))[0]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_becomes_full_is_told_as_that_and_the_cache_goes_on(
    clips, encoder, tmp_path, monkeypatch, code
):
    sync, full = os.fsync, True

    def syncing(descriptor):
        if full and Path(f"/proc/self/fd/{descriptor}").readlink().name == "embeddings.npy":
            raise OSError(code, os.strerror(code))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", syncing)
    cache, fill_cache = cache_of(tmp_path)
    need = sum(clip.video.count() for clip in clips) * 2 * WIDTH
    with pytest.raises(CacheError) as caught:
        fill_cache(clips, encoder, threads=1)
    message = f"{cache.folder}: the disk became full ({os.strerror(code)}), about {need:,} bytes were needed"
    assert str(caught.value).startswith(message)
    full = False
    fill_cache(clips, encoder, threads=1)
    assert cache.missing(clips) == []
    assert len(all_rows(cache, clips[0])) == clips[0].video.count()


def test_another_error_of_the_disk_stays_what_it_is(clips, encoder, tmp_path, monkeypatch):
    sync = os.fsync

    def syncing(descriptor):
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == "embeddings.npy":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", syncing)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        cache_of(tmp_path)[1](clips, encoder, threads=1)


def test_who_waits_for_another_process_says_so_and_then_goes_on(clips, encoder, tmp_path, capsys):
    cache, fill_cache = cache_of(tmp_path)
    words = f"another process fills {cache.folder}; waiting for it"
    filling = threading.Thread(target=fill_cache, args=(clips, encoder), kwargs={"threads": 1}, daemon=True)
    printed, deadline = "", time.monotonic() + 10
    with filelock.FileLock(cache.folder / "lock"):
        filling.start()
        while words not in printed and time.monotonic() < deadline:
            time.sleep(0.01)
            printed += capsys.readouterr().out
        assert printed == words + "\n"
        assert filling.is_alive()
        assert not list(cache.folder.glob("*.npy"))
    filling.join(20)
    assert not filling.is_alive()
    assert cache.missing(clips) == []
    # Whoever need not wait, and whoever finds all there, does not say so.
    other, fill_other = cache_of(tmp_path / "other")
    fill_other(clips, encoder, threads=1)
    with filelock.FileLock(cache.folder / "lock"):
        fill_cache(clips, encoder, threads=1)
    assert "another process" not in capsys.readouterr().out
    with filelock.FileLock(other.folder / "lock", timeout=0):
        pass


def test_what_the_other_process_filled_meanwhile_is_not_encoded_again(
    clips, encoder, tmp_path, capsys, monkeypatch
):
    (first, fill_first), (second, fill_second) = cache_of(tmp_path), cache_of(tmp_path)
    assert second.missing(clips)
    fill_first(clips, encoder, threads=1)
    monkeypatch.setattr(fill_module, "embed_ahead", None)
    capsys.readouterr()
    fill_second(clips, encoder, threads=1)
    assert second.missing(clips) == []
    assert capsys.readouterr().out == ""
    assert torch.equal(all_rows(second, clips[0]), all_rows(first, clips[0]))


usage = namedtuple("usage", "total used free")


@pytest.mark.parametrize(
    ("flip", "stride", "shard"),
    [(False, 1, WHOLE), (True, 1, WHOLE), (False, 3, WHOLE), (False, 1, Shard(1, 2))],
)
def test_as_much_space_is_asked_for_as_the_rows_take(
    clips, encoder, tmp_path, monkeypatch, capsys, flip, stride, shard
):
    mine = shard.part(clips)
    frames = sum(clip.video.stated_count() for clip in mine) / stride
    need = frames * (4 if flip else 2) * WIDTH * shard.count
    free = 1e8 + 1.05 * need
    monkeypatch.setattr(fill_module.shutil, "disk_usage", lambda _: usage(10**12, 0, free - 10))
    cache, fill_cache = cache_of(tmp_path, flip=flip, frame_stride=stride, shard=shard)
    with pytest.raises(CacheError, match=r"GB needed and 0.10 GB free; make room") as caught:
        fill_cache(clips, encoder, threads=1)
    assert str(cache.folder) in str(caught.value)
    assert not list(cache.folder.glob("*.npy"))
    monkeypatch.setattr(fill_module.shutil, "disk_usage", lambda _: usage(10**12, 0, free + 10))
    fill_cache(clips, encoder, threads=1)
    assert cache.missing(mine) == []
    assert f"encoding {len(mine)} clips, about {frames:,.0f} frames, into {cache.folder}: " in (
        capsys.readouterr().out
    )
    if shard is WHOLE and stride == 1:
        (rows,) = cache.folder.glob("*.npy")
        assert rows.stat().st_size == pytest.approx(need, abs=300), "and so much they take"


class Stated:
    """A video that is never decoded: bytes and frames as they are said to be."""

    def __init__(self, path, size, frames, opened):
        self.path, self._size, self._frames, self._opened = path, size, frames, opened

    def size(self):
        return self._size

    def stated_count(self):
        self._opened.append(self)
        if not self._frames:
            raise VideoError("cannot be read")
        return self._frames


def test_the_space_for_many_clips_is_told_from_some(encoder, tmp_path, monkeypatch):
    (tmp_path / "x").touch()
    monkeypatch.setattr(fill_module.shutil, "disk_usage", lambda _: usage(0, 0, 0))

    def needed(*videos):
        """GB, told from how many videos, where these have so many bytes and frames."""
        opened = []
        clips = [
            Clip(f"{number:04d}", 0, Stated(tmp_path / "x", size, frames, opened))
            for number, (size, frames) in enumerate(videos)
        ]
        with pytest.raises(CacheError) as caught:
            cache_of(tmp_path)[1](clips, encoder, threads=1)
        return float(re.search(r"([\d.]+) GB needed", str(caught.value))[1]), len(opened)

    gigabytes = 2 * WIDTH * 1e6 / 1e9  # of a million frames
    assert needed(*[(1000, 10**6)] * 1000) == (pytest.approx(1000 * gigabytes, abs=0.01), 200)
    # Frames take as many bytes in all videos, and some videos are longer.
    found, opened = needed(*[(1000 * number, 10**6 * number) for number in (1, 2, 3)] * 300)
    assert found == pytest.approx(1800 * gigabytes, rel=0.01)
    assert 200 <= opened <= 300, "it does not open all"
    assert needed((1000, 10**6)) == (pytest.approx(gigabytes, abs=0.01), 1)
    # Of those that cannot be opened nothing is known, nor of empty ones.
    assert needed((1000, 10**6), (1000, 0)) == (pytest.approx(gigabytes, abs=0.01), 2)
    assert needed((0, 0)) == (0, 1)


def test_embeddings_that_float16_cannot_hold_are_refused(clips, encoder, tmp_path, monkeypatch):
    for wrong in (65536.0, -65536.0, np.inf, -np.inf, np.nan):

        def spoiled(*args, wrong=wrong, **options):
            for number, item in embed_ahead(*args, **options):
                if isinstance(item, np.ndarray) and number == 1:
                    item[-1, -1, -1] = wrong
                yield number, item

        monkeypatch.setattr(fill_module, "embed_ahead", spoiled)
        cache, fill_cache = cache_of(tmp_path / str(wrong))
        with pytest.raises(CacheError, match="does not fit into float16") as caught:
            fill_cache(clips, encoder, threads=1)
        assert str(clips[1].video.path) in str(caught.value)
        assert [clip.name for clip in clips if clip not in cache.missing(clips)] == [clips[0].name]

    def largest(*args, **options):
        for number, item in embed_ahead(*args, **options):
            if isinstance(item, np.ndarray):
                item[:] = 65504
            yield number, item

    monkeypatch.setattr(fill_module, "embed_ahead", largest)
    cache, fill_cache = cache_of(tmp_path / "largest")
    fill_cache(clips, encoder, threads=1)
    assert (all_rows(cache, clips[0]) == 65504).all()


@pytest.mark.parametrize(("seconds", "expected"), [(0, [0, 1, 2, 3, 4, 5]), (60, [0] * 6)])
def test_clips_are_named_in_the_index_every_few_seconds(
    clips, encoder, tmp_path, monkeypatch, seconds, expected
):
    """What is named there survives a power cut; all the rest is encoded again."""
    cache, fill_cache = cache_of(tmp_path)
    named = []

    def watched(*args, **options):
        for number, item in embed_ahead(*args, **options):
            if item is None:
                named.append((cache.folder / "index.jsonl").read_bytes().count(b"\n"))
            yield number, item

    monkeypatch.setattr(shard_writer, "COMMIT_SECONDS", seconds)
    monkeypatch.setattr(fill_module, "embed_ahead", watched)
    fill_cache(clips, encoder, threads=1)
    assert named == expected
    assert (cache.folder / "index.jsonl").read_bytes().count(b"\n") == 6


def test_an_interrupted_first_run_leaves_a_cache_that_goes_on(clips, encoder, tmp_path):
    whole, fill_whole = cache_of(tmp_path / "whole")
    fill_whole(clips, encoder, threads=1)
    line = (whole.folder / "index.jsonl").read_text().splitlines()[0]
    for number, (index, data) in enumerate([("", b""), (line[:30], b"\0" * 400), (line, b"\0" * 9999)]):
        cache, fill_cache = cache_of(tmp_path / str(number))
        (cache.folder / "index.jsonl").write_text(index)
        (cache.folder / "embeddings.npy").write_bytes(data)
        cache, fill_cache = cache_of(tmp_path / str(number))
        assert len(cache.missing(clips)) == len(clips), "a line without its end is not whole"
        fill_cache(clips, encoder, threads=1)
        for name in ("index.jsonl", "embeddings.npy"):
            assert (cache.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_a_second_fill_adds_behind_the_first(clips, encoder, tmp_path):
    cache, fill_cache = cache_of(tmp_path, flip=True)
    fill_cache(clips[3:], encoder, threads=1)
    before = (cache.folder / "embeddings.npy").read_bytes()
    fill_cache(clips, encoder, threads=1)
    after = (cache.folder / "embeddings.npy").read_bytes()
    assert after[256 : len(before)] == before[256:]
    index = [json.loads(line) for line in (cache.folder / "index.jsonl").read_text().splitlines()]
    assert [entry["clip"] for entry in index] == [clip.name for clip in clips[3:] + clips[:3]]
    row = 0
    for entry in index:
        assert entry["row"] == row
        row += entry["frames"]
    assert np.load(cache.folder / "embeddings.npy", mmap_mode="r").shape == (row, 2, WIDTH)
    # Each clip's own frames, mirrored where that is asked for, in one call.
    frames = np.array([[0, 5, 2], [7, 7, 1], [3, 0, 0]])
    chosen, flipped = [clips[4], clips[0], clips[2]], np.array([True, False, True])
    found = cache.view(clips).gather(chosen, frames, flipped)
    assert (found.shape, found.dtype) == ((3, 3, WIDTH), torch.float16)
    for one, clip, numbers, mirrored in zip(found, chosen, frames, flipped, strict=True):
        images = resize_frames(list(clip.video.frames()), 16)[numbers]
        expected = encoder.embed((images.flip(-1) if mirrored else images)[:, None])[:, 0]
        assert torch.allclose(one.float(), expected, rtol=2**-10, atol=1e-4)


def test_what_fits_is_read_from_the_device(clips, encoder, tmp_path, monkeypatch):
    """On a CPU, which counts as a device of its own here."""
    cache, fill_cache = cache_of(tmp_path, flip=True)
    fill_cache(clips[2:], encoder, threads=1, shard=Shard(1, 2))
    fill_cache(clips[2:], encoder, threads=1, shard=Shard(2, 2))
    fill_cache(clips, encoder, threads=1)
    kept, device = cache.view(clips), torch.device("cpu")
    files = list(cache.folder.glob("embeddings*.npy"))
    assert len(files) == 3
    assert kept.needs(device) == sum(path.stat().st_size - 256 for path in files)
    monkeypatch.setattr("features.cache.COPIED", 7)
    there = kept.on_device(device)
    assert cache.view(clips[:3]).needs(device) == 0, "it is there already"
    frames = np.array([[0, 5, 2], [7, 7, 1], [3, 0, 0], [1, 1, 1]])
    for chosen in ([clips[4], clips[0], clips[2], clips[4]], [clips[0]] * 4):
        asked = chosen, frames, np.array([True, False, True, False])
        assert torch.equal(there.gather(*asked), kept.gather(*asked))
    # The file, not what is mapped of it, is out of reach then.
    for path in cache.folder.glob("embeddings*.npy"):
        path.unlink()
    assert torch.equal(there.gather(*asked), kept.gather(*asked))


def test_caches_of_earlier_versions_are_found_again():
    key = CacheKey("tiny", "ab", 32, "float32")
    assert key.folder == "tiny-32px-float32-flip-3c99449173e6"
    assert CacheKey("a/b", "ab", 32, "bfloat16", flip=False).folder == "a-b-32px-bfloat16-3b6eee111ea6"
    diff = CacheKey("tiny", "ab", 32, "float32", frame_stride=2, stream="diff")
    assert diff.folder == "tiny-32px-float32-flip-stride2-diff-9c8894862e06"
    assert "stream" not in key.fields
    assert diff.fields["stream"] == "diff: 2 x the change since the frame before, around 128"


def test_a_folder_of_frames_is_known_by_its_time_alone(encoder, tmp_path):
    folder = tmp_path / "clips" / "A" / "one"
    folder.mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (20, 20), (80 * number, 0, 0)).save(folder / f"{number}.png")
    clips = [Clip("A/one.avi", 0, Video(folder))]
    cache, fill_cache = cache_of(tmp_path)
    fill_cache(clips, encoder, threads=1)
    (entry,) = [json.loads(line) for line in (cache.folder / "index.jsonl").read_text().splitlines()]
    assert (entry["size"], entry["mtime_ns"], entry["frames"]) == (0, folder.stat().st_mtime_ns, 3)
    os.utime(folder, (1, 1))
    assert cache.missing(clips) == clips


def test_a_bar_counts_clips_and_frames(clips, encoder, tmp_path, capsys, monkeypatch):
    cache_of(tmp_path)[1](clips, encoder, threads=1)
    assert re.search(r"encoding: 100%.* 6/6 .*, [1-9]\d* frames/s", capsys.readouterr().err)
    # Of several processes one shows it.
    monkeypatch.setenv("RANK", "1")
    cache_of(tmp_path / "other")[1](clips, encoder, threads=1)
    assert capsys.readouterr() == ("", "")
