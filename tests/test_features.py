import itertools
import json
import os
import shutil
import time
from collections import namedtuple
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import test as test_script
import train
from conftest import Script, embed_frames, ucf101_at
from dataset import FrameClips, Sampling
from features import fill, pipeline
from features.cache import CacheError, CacheKey, EmbeddingCache
from features.encoder import Encoder
from features.fill import open_cache
from features.pipeline import Prefetch, embed_ahead, read_ahead
from features.streams import encoder_stream
from features.windows import Windows
from splits.datasets import load_split
from training.batches import ClipBatches, EmbeddingClips, EncodedClips, frame_loader
from training.classifier import Classifier
from video.files import VideoError
from video.frames import resize_frames
from video.reader import Video


@pytest.fixture
def encoder():
    return Encoder("tiny")


def clips_of(path, number=1):
    split = load_split(ucf101_at(path), number)
    return split.train + split.test


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


@pytest.mark.parametrize("streams", [("rgb",), ("diff",), ("rgb", "diff")])
def test_cached_clips_are_what_the_encoder_gives(small, tmp_path, streams):
    """For every start, step and flip that training draws, to the tolerance of float16."""
    clips = clips_of(small)
    model = Classifier("MeanPool", 2, encoder="tiny", streams=streams)
    # The longer clips are longer than any video: padding is told of alike.
    for stride, length in ((1, 6), (3, 6), (3, 30)):
        sampling = Sampling(length, training=True, seed=4, frame_stride=stride)
        caches = [
            open_cache(
                tmp_path / "cache", clips, model.encoder, 32, flip=True, stream=stream, frame_stride=stride
            )
            for stream in streams
        ]
        batches = ClipBatches(len(clips), 4, shuffle=True)
        opened = model.open_streams(32)
        frames = FrameClips(clips, sampling, [stream.view for stream in opened])
        anew = EncodedClips(frame_loader(frames, batches, workers=0), opened)
        seen = 0
        for batches.epoch in range(3):
            kept = [cache.view(clips) for cache in caches]
            layouts = [stream.windows for stream in opened]
            cached = EmbeddingClips(kept, layouts, clips, sampling, batches, model.device)
            for batch, expected in zip(cached, anew, strict=True):
                assert batch[0].dtype == torch.float32
                assert torch.allclose(batch[0], expected[0], rtol=2**-10, atol=1e-4)
                assert torch.equal(batch[1], expected[1])
                assert torch.equal(batch[2], expected[2])
                assert batch[1].any(dim=1).all() == (length == 30)
                seen += len(batch[2])
        assert seen == 18


def test_training_has_the_same_losses_with_and_without_cache(call, small, train_flags, tmp_path):
    flags = [*train_flags(small), "--num_epochs", 3, "--batch_size", 3, "--recipe", "original"]
    losses = []
    for cache in (("--cache", "off"), (), ()):
        done = call(train, *flags, *cache)
        assert done.status == 0, done.err
        lines = [line for line in done.out.splitlines() if "nats" in line]
        losses.append([float(line.split("loss ")[1].split()[0]) for line in lines])
    assert losses[0] == pytest.approx(losses[1], abs=0.01)
    assert losses[1] == losses[2], "the second run from the cache is the first one's twin"
    assert (small / "UCF-101-embeddings").is_dir(), "beside the data set"


def test_any_tool_can_read_it(small, encoder, tmp_path):
    clips = clips_of(small)
    folder = open_cache(tmp_path, clips, encoder, 32, flip=True).folder
    rows = np.load(folder / "embeddings.npy", mmap_mode="r")
    assert rows.dtype == np.float16
    index = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    assert [entry["clip"] for entry in index] == sorted(clip.name for clip in clips)
    assert rows.shape == (sum(entry["frames"] for entry in index), 2, 48)
    clip = next(clip for clip in clips if clip.name == index[2]["clip"])
    frames = resize_frames(list(clip.video.frames()), 32)
    mine = rows[index[2]["row"] : index[2]["row"] + index[2]["frames"]]
    assert np.allclose(mine[:, 0], embed_frames(encoder, frames), rtol=2**-10, atol=1e-4)
    assert np.allclose(mine[:, 1], embed_frames(encoder, frames.flip(-1)), rtol=2**-10, atol=1e-4)
    key = json.loads((folder / "key.json").read_text())
    assert key["encoder_sha256"] == encoder.sha256()
    assert key["resize"] == "torchvision bicubic antialias uint8, squeezed to a square"


def test_every_part_of_the_key_makes_another_cache():
    key = CacheKey("tiny", "ab", 32, "float32")
    changes = {"encoder": "other", "encoder_sha256": "cd", "img_dim": 33, "dtype": "bfloat16", "flip": False}
    changes |= {"frame_stride": 2, "resize": "nearest", "stream": "diff"}
    changes |= {"windows": Windows(64, 8, 32)}
    assert set(changes) == set(key.__dataclass_fields__)
    folders = {replace(key, **{name: value}).folder for name, value in changes.items()}
    assert len(folders | {key.folder}) == len(changes) + 1


def test_other_weights_are_another_cache(small, encoder, tmp_path):
    clips = clips_of(small)
    first = open_cache(tmp_path, clips, encoder, 32, flip=True)
    state = encoder.state_dict()
    state["feature_extractor.mix.weight"] += 1
    encoder.load_state_dict(state)
    second = open_cache(tmp_path, clips, encoder, 32, flip=True)
    assert first.folder != second.folder


def test_a_plain_run_uses_a_cache_that_has_both_views(small, encoder, tmp_path):
    clips = clips_of(small)
    both = open_cache(tmp_path, clips, encoder, 32, flip=True)
    assert open_cache(tmp_path, clips, encoder, 32, flip=False).folder == both.folder
    alone = open_cache(tmp_path / "other", clips, encoder, 32, flip=False)
    assert alone.views == 1
    size = (alone.folder / "embeddings.npy").stat().st_size - 256
    assert 2 * size == (both.folder / "embeddings.npy").stat().st_size - 256


def test_a_changed_clip_is_encoded_anew_and_the_others_are_not(small, encoder, tmp_path, monkeypatch):
    clips = clips_of(small)
    cache = open_cache(tmp_path, clips, encoder, 32, flip=False)
    before = cache.view(clips).gather(clips[:1], np.array([[0, 1]]), np.array([False]))
    path = clips[0].video.path
    shutil.copy(clips[1].video.path, path)
    os.utime(path, (1, 1))
    encoded = []
    monkeypatch.setattr(
        fill, "read_ahead", lambda videos, *rest: encoded.extend(videos) or read_ahead(videos, *rest)
    )
    clips = clips_of(small)
    cache = open_cache(tmp_path, clips, encoder, 32, flip=False)
    assert [video.path for video in encoded] == [path]
    after = cache.view(clips).gather(clips[:2], np.array([[0, 1], [0, 1]]), np.array([False, False]))
    assert torch.equal(after[0], after[1])
    assert not torch.equal(after[0], before[0])
    assert cache.missing(clips) == []


def test_embeddings_do_not_depend_on_batches_or_threads(small, encoder):
    videos = [clip.video for clip in clips_of(small)]
    expected = [embed_frames(encoder, resize_frames(list(video.frames()), 32)).numpy() for video in videos]
    # An accelerator's frames are read in a thread.
    for threads, device in itertools.product((1, 3, 10), (torch.device("cpu"), torch.device("cuda"))):
        parts = {number: [] for number in range(len(videos))}
        ended = []
        stream = replace(encoder_stream(encoder, "rgb", 32), device=device)
        pieces = read_ahead(videos, stream, 1, threads)
        for number, item in embed_ahead(encoder_stream(encoder, "rgb", 32), pieces, flip=False):
            parts[number].append(item) if item is not None else ended.append(number)
        assert ended == list(range(len(videos)))
        for number, values in enumerate(expected):
            assert np.allclose(np.concatenate(parts[number])[:, 0], values, atol=1e-5)


def test_unreadable_clips_stop_the_run_after_the_others(call, small, train_flags, encoder, tmp_path):
    clips = clips_of(small)
    bad = clips[1].video.path
    data = bad.read_bytes()
    bad.write_text("no video")
    with pytest.raises(VideoError, match=f"1 of 6 clips cannot be read; the first: .*{bad.name}"):
        open_cache(tmp_path / "cache", clips, encoder, 32, flip=True)
    done = call(train, *train_flags(small), "--num_epochs", 1)
    assert done.status == 1
    assert bad.name in done.one_line_error()
    bad.write_bytes(data)
    cache = open_cache(tmp_path / "cache", clips, encoder, 32, flip=True)
    assert cache.missing(clips) == []
    assert len(np.load(cache.folder / "embeddings.npy", mmap_mode="r")) == sum(
        clip.video.count() for clip in clips
    )


def test_a_clip_that_breaks_off_leaves_no_rows(small, encoder, tmp_path, monkeypatch):
    clips = clips_of(small)

    def broken(videos, *rest):
        for number, item in read_ahead(videos, *rest):
            if number == 2 and item is None:
                yield number, VideoError("broke off")
            else:
                yield number, item

    whole = open_cache(tmp_path / "whole", clips, encoder, 32, flip=True)
    monkeypatch.setattr(fill, "read_ahead", broken)
    with pytest.raises(VideoError, match="broke off"):
        open_cache(tmp_path / "cache", clips, encoder, 32, flip=True)
    cache = EmbeddingCache(tmp_path / "cache" / whole.folder.name, 2, 48)
    assert len(cache.missing(clips)) == 1
    third = sorted(clip.name for clip in clips)[2]
    others = [clip for clip in clips if clip.name != third]
    part, all_clips = cache.view(others), whole.view(clips)
    for clip in others:
        which = ([clip], np.arange(part.count(clip))[None], np.array([True]))
        assert torch.equal(part.gather(*which), all_clips.gather(*which))
    with pytest.raises(CacheError, match="1 clips are not there"):
        cache.view(clips)


def test_damaged_caches_say_so(small, encoder, tmp_path):
    clips = clips_of(small)
    folder = open_cache(tmp_path, clips, encoder, 32, flip=True).folder
    data = (folder / "embeddings.npy").read_bytes()
    (folder / "embeddings.npy").write_bytes(data[:-100])
    with pytest.raises(CacheError, match="shorter than its index says"):
        open_cache(tmp_path, clips, encoder, 32, flip=True)
    (folder / "embeddings.npy").write_bytes(data)
    (folder / "index.jsonl").write_text("nonsense\n")
    with pytest.raises(CacheError, match="damaged"):
        open_cache(tmp_path, clips, encoder, 32, flip=True)


def test_the_space_is_checked_and_the_need_printed(call, small, train_flags, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(fill.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**6))
    done = call(fill, *feature_flags(small, train_flags))
    assert done.status == 1
    assert "--cache_path" in done.one_line_error()
    assert "GB needed" in done.out


def test_a_folder_that_cannot_be_made(call, small, train_flags, tmp_path):
    (tmp_path / "file").touch()
    done = call(train, *train_flags(small), "--num_epochs", 1, "--cache_path", tmp_path / "file" / "cache")
    assert (done.status, "--cache_path" in done.one_line_error()) == (1, True)


def feature_flags(path, train_flags):
    flags = list(map(str, train_flags(path)))
    at = flags.index("--sequence_length")
    return flags[:at] + flags[at + 2 :]


def test_the_command_fills_what_training_then_uses(call, small, train_flags, monkeypatch, tmp_path):
    done = call(fill, *feature_flags(small, train_flags), "--cache_path", tmp_path / "there")
    assert done.status == 0, done.err
    assert "6 clips in" in done.out
    monkeypatch.setattr(fill, "read_ahead", None)
    trained = call(train, *train_flags(small), "--num_epochs", 1, "--cache_path", tmp_path / "there")
    assert trained.status == 0, trained.err
    monkeypatch.undo()
    wrong = call(fill, *feature_flags(small, train_flags), "--cache", "off")
    assert (wrong.status, "off" in wrong.one_line_error()) == (1, True)


def test_testing_uses_the_cache_too(call, small, train_flags, monkeypatch, tmp_path):
    assert call(train, *train_flags(small), "--num_epochs", 1).status == 0
    monkeypatch.setattr(fill, "read_ahead", None)
    data = [
        "--dataset_path",
        small / "UCF-101",
        "--split_path",
        small / "ucfTrainTestlist",
        "--precision",
        "fp32",
    ]
    done = call(test_script, *data, "--checkpoint_model", tmp_path / "model_checkpoints/ConvLSTM_1.pth")
    assert done.status == 0, done.err


def lite0_flags(path, cache_path):
    return [
        *(
            "--dataset_path",
            path / "UCF-101",
            "--split_path",
            path / "ucfTrainTestlist",
            "--cache_path",
            cache_path,
        ),
        *("--encoder", "efficientnet_lite0", "--img_dim", 32),
    ]


def test_killed_and_resumed_is_byte_identical_to_one_go(toy, tmp_path):
    """SIGKILL at random instants of filling, the lock, rows and index lines half-written included."""
    whole = Script("features.py", *lite0_flags(toy, tmp_path / "whole")).outcome()
    assert whole.status == 0, whole.err
    (expected,) = (tmp_path / "whole").iterdir()
    rng = np.random.default_rng(0)
    kills = 0
    for _ in range(3):
        process = Script("features.py", *lite0_flags(toy, tmp_path / "killed"))
        deadline = time.monotonic() + 60
        rows = tmp_path / "killed" / expected.name / "embeddings.npy"
        before = rows.stat().st_size if rows.exists() else 0
        while process.running() and time.monotonic() < deadline:
            if rows.exists() and rows.stat().st_size != before:
                break
            time.sleep(0.01)
        time.sleep(float(rng.uniform(0, 1)))
        if process.running():
            process.kill()
            kills += 1
        process.outcome()
    again = Script("features.py", *lite0_flags(toy, tmp_path / "killed")).outcome()
    assert again.status == 0, again.err
    assert kills >= 1
    assert files(tmp_path / "killed" / expected.name) == files(expected)


def test_two_processes_on_one_cache_do_no_harm(toy, tmp_path):
    pair = [Script("features.py", *lite0_flags(toy, tmp_path / "both")) for _ in range(2)]
    done = [script.outcome() for script in pair]
    assert [one.status for one in done] == [0, 0]
    assert sum("frames, into" in one.out for one in done) == 1, "one of them fills"
    (folder,) = (tmp_path / "both").iterdir()
    index = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    assert len({entry["clip"] for entry in index}) == len(index) == 64


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no bf16")
@pytest.mark.parametrize("name", ["efficientnet_lite0"])
def test_bf16_folded_and_stored_embeddings_are_close_to_fp32(subset, tmp_path, name):
    videos = [Video(path) for path in sorted((subset / "UCF-101").glob("*/*.avi"))[::80]]
    encoder = Encoder(name)
    exact = torch.cat(
        [embed_frames(encoder, resize_frames(list(video.frames(range(0, 24, 8))), 112)) for video in videos]
    )
    encoder.prepare(torch.float32)
    frames = torch.cat([resize_frames(list(video.frames(range(0, 24, 8))), 112) for video in videos])
    assert torch.allclose(embed_frames(encoder, frames), exact, rtol=1e-3, atol=1e-4), (
        "folding changes nothing"
    )
    encoder.prepare(torch.bfloat16)
    stored = embed_frames(encoder, frames).half().float()
    cosine = F.cosine_similarity(exact, stored)
    # Dark frames have small embeddings, of which rounding is a larger part.
    assert cosine.min() > 0.98
    assert cosine.mean() > 0.997


def test_prefetch_hands_on_items_errors_and_the_end():
    assert list(Prefetch(range(100), 3)) == list(range(100))

    def broken():
        yield 1
        raise ValueError("stop here")

    reader = Prefetch(broken(), 2)
    assert next(reader) == 1
    with pytest.raises(ValueError, match="stop here"):
        next(reader)
    taken = []
    endless = Prefetch((taken.append(number) or number for number in iter(int, 1)), 4)
    next(endless)
    endless.close()
    count = len(taken)
    time.sleep(0.05)
    assert len(taken) == count <= 7


@pytest.mark.parametrize("workers", [1, 2])
def test_the_next_batches_are_begun_before_the_rows_of_the_last_are_given_out(small, monkeypatch, workers):
    monkeypatch.setattr(pipeline, "count_workers", lambda: workers)
    stream, events = encoder_stream(Encoder("tiny"), "rgb", 32), []
    videos = [clip.video for clip in clips_of(small)]
    plain = list(embed_ahead(stream, read_ahead(videos, stream, 1, 2), flip=True))
    encode = pipeline.Batches._encode

    def noted(batches, batch):
        events.append(("begun", batch.data_ptr()))
        return encode(batches, batch)

    monkeypatch.setattr(pipeline.Batches, "_encode", noted)
    overlapped = []
    for item in embed_ahead(stream, read_ahead(videos, stream, 1, 2), flip=True):
        events.append(("rows", None))
        overlapped.append(item)
    assert [kind for kind, _ in events[: workers + 2]] == [*["begun"] * (workers + 1), "rows"]
    buffers = [pointer for kind, pointer in events if kind == "begun"]
    assert len(set(buffers)) == workers + 1
    for place in range(len(buffers) - workers):
        assert len(set(buffers[place : place + workers + 1])) == workers + 1, (
            "none is filled while it is read"
        )
    assert len(plain) == len(overlapped)
    for (number, rows), (same_number, same_rows) in zip(plain, overlapped, strict=True):
        assert number == same_number
        assert np.array_equal(rows, same_rows) if isinstance(rows, np.ndarray) else rows is same_rows
