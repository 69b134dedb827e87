"""Which embeddings make a clip, batches of clips, and the lists that name them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from conftest import ROOT, ucf101_at
from dataset import (
    EmbeddingClips,
    Sampling,
    batch_items,
    clip_indices,
    fill_store,
    padding_of,
    store_name,
    window_indices,
)
from extract_frames import extract_all
from features.encoder import Encoder
from features.store import Store
from splits.datasets import DataSettings, Listed
from splits.ucf101 import read_classes
from video.frames import resize_frames

lengths = st.integers(1, 60)


@given(num_frames=st.integers(1, 400), length=lengths, seed=st.integers(0, 2**32))
def test_training_clips_are_evenly_stepped_and_inside(num_frames, length, seed):
    indices = clip_indices(num_frames, length, rng=np.random.default_rng(seed))
    assert indices.shape == (length,)
    assert 0 <= indices.min() <= indices.max() < num_frames
    steps = set(np.diff(indices).tolist())
    if num_frames >= length > 1:
        assert len(steps) == 1
        assert 1 <= steps.pop() <= num_frames // length
    else:
        assert steps <= {0, 1}


@given(num_frames=st.integers(1, 400), length=lengths)
def test_test_clips_reach_from_the_first_frame_to_the_last(num_frames, length):
    indices = clip_indices(num_frames, length)
    assert indices.shape == (length,)
    assert indices[-1] == (num_frames - 1 if length > 1 or num_frames < length else 0)
    assert indices[0] == 0
    if num_frames >= length > 1:
        gaps = np.diff(indices)
        assert gaps.min() >= 1
        assert gaps.max() - gaps.min() <= 1


def test_training_draws_every_step_and_start_alike():
    rng = np.random.default_rng(0)
    drawn = [tuple(clip_indices(12, 4, rng=rng)) for _ in range(3000)]
    seen = {clip: drawn.count(clip) for clip in set(drawn)}
    assert set(seen) == {
        tuple(range(start, start + 4 * step, step)) for step in (1, 2, 3) for start in range(12 - 3 * step)
    }
    for step, starts in ((1, 9), (2, 6), (3, 3)):
        counts = [count for clip, count in seen.items() if clip[1] - clip[0] == step]
        assert 0.5 * 1000 / starts < min(counts) <= max(counts) < 1.5 * 1000 / starts


def test_short_clips_repeat_the_first_frame_in_front_which_is_padding():
    assert clip_indices(3, 5).tolist() == [0, 0, 0, 1, 2]
    assert clip_indices(3, 5, rng=np.random.default_rng(0)).tolist() == [0, 0, 0, 1, 2]
    assert padding_of(np.array([[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]])).tolist() == [
        [True, True, False, False, False],
        [False] * 5,
    ]
    for wrong in ((0, 4), (4, 0), (-1, 4)):
        with pytest.raises(ValueError, match="both must be positive"):
            clip_indices(*wrong)


@given(count=st.integers(1, 80), length=st.integers(1, 12), step=st.integers(1, 5), start=st.integers(0, 79))
def test_windows_frame_by_frame(count, length, step, start):
    start = min(start, count - 1)
    found = window_indices(count, length, step=step, start=start)
    assert found.shape == (count - start, length)
    for frame, window in enumerate(found.tolist(), start):
        if count < length:
            assert window == [max(place - (length - count), 0) for place in range(length)]
        else:
            stride = min(step, count // length)
            span = stride * (length - 1)
            first = min(max(frame - span // 2, 0), count - 1 - span)
            assert window == [first + stride * place for place in range(length)]


@given(frames=st.integers(1, 60), length=lengths, training=st.booleans(), shuffle=st.booleans())
def test_padding_and_shuffling_keep_what_a_clip_consists_of(frames, length, training, shuffle):
    plain = Sampling(length, training=training)
    indices, padding, mirrored = replace(plain, shuffle=shuffle).draw((0, 3), frames)
    straight, same_padding, same_mirrored = plain.draw((0, 3), frames)
    assert mirrored == same_mirrored
    assert (padding == same_padding).all()
    assert padding.sum() == max(0, length - frames)
    assert sorted(indices[~padding]) == sorted(straight[~padding])
    if shuffle and min(length, frames) > 8:
        assert (indices != straight).any()


def test_only_training_mirrors_and_draws_by_seed_epoch_and_index():
    trained = Sampling(4, training=True)
    items = [(epoch, 0) for epoch in range(200)]
    assert 70 <= sum(trained.draw(item, 30)[2] for item in items) <= 130
    for sampling in (replace(trained, flip=False), Sampling(4)):
        assert not any(sampling.draw(item, 30)[2] for item in items)
    drawn = [
        [replace(trained, seed=seed).draw((epoch, index), 30)[0].tolist() for index in range(5)]
        for seed, epoch in ((0, 1), (0, 1), (1, 1), (0, 2))
    ]
    assert drawn[0] == drawn[1]
    assert len({str(each) for each in drawn}) == 3


@given(num_clips=st.integers(2, 50), batch_size=st.integers(2, 20), epoch=st.integers(0, 5))
def test_batches_hold_every_clip_once(num_clips, batch_size, epoch):
    tests = [index for batch in batch_items(num_clips, batch_size) for _, index in batch]
    assert tests == list(range(num_clips))
    drawn = batch_items(num_clips, batch_size, epoch=epoch, seed=0)
    assert all(len(batch) > 1 for batch in drawn), "BatchNorm cannot train on one"
    seen = [index for batch in drawn for _, index in batch]
    assert {number for batch in drawn for number, _ in batch} <= {epoch}
    assert len(set(seen)) == len(seen) == num_clips - (num_clips % batch_size == 1)


@pytest.mark.parametrize("name", ["tiny", "tiny_video"])
def test_batches_are_rows_of_the_store(small, tmp_path, name):
    split = Listed(ucf101_at(small)).split(1)
    encoder = Encoder(name, img_dim=24).prepare("fp32")
    store = Store(tmp_path, encoder, stride=2, flip=True)
    fill_store(store, split.train, 2)
    sampling = Sampling(5, training=True, seed=3)
    clips = EmbeddingClips(store, split.train, sampling)
    items = [(epoch, index) for epoch in range(4) for index in range(4)]
    embeddings, padding, labels = clips.batch(items)
    assert (embeddings.shape, embeddings.dtype) == ((16, 5, encoder.width), torch.float32)
    assert labels.tolist() == [split.train[index].label for _, index in items]
    mirrored = 0
    for row, item in enumerate(items):
        kept = np.load(tmp_path / f"{store_name(split.train[item[1]])}.npy")
        indices, hidden, flipped = sampling.draw(item, kept.shape[1])
        mirrored += flipped
        assert np.array_equal(embeddings[row].numpy(), kept[int(flipped), indices].astype(np.float32))
        assert padding[row].tolist() == hidden.tolist()
    assert 2 < mirrored < 14


def test_two_clips_of_one_name_are_refused(small, tmp_path):
    split = Listed(ucf101_at(small)).split(1)
    clip = split.train[0]
    other = replace(clip, name=clip.name.replace(".avi", ".mp4"), video=split.train[1].video)
    with pytest.raises(ValueError, match="another clip has this name with another ending"):
        fill_store(Store(tmp_path, Encoder("tiny").prepare("fp32")), [clip, other], 1)


@pytest.mark.parametrize("size", [(61, 47), (20, 90), (32, 32)])
def test_frames_are_resized_as_by_pillow(size):
    """Bicubic with antialiasing, without which fine patterns turn into others."""
    frame = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    frame[::2] //= 4
    found = resize_frames([frame, frame[::-1].copy()], 16)
    for one, source in zip(found, (frame, frame[::-1]), strict=True):
        expected = np.asarray(Image.fromarray(source).resize((16, 16), Image.Resampling.BICUBIC))
        assert np.abs(one.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


def test_split_of_videos_and_of_extracted_frames_agree(small, tmp_path):
    extract_all(small / "UCF-101", quality=95, workers=2)
    frames = DataSettings(dataset_path=small / "UCF-101-frames", split_path=small / "ucfTrainTestlist")
    splits = [Listed(ucf101_at(small)).split(1), Listed(frames).split(1)]
    assert [clip.name for clip in splits[0].train] == [clip.name for clip in splits[1].train]
    arrays = []
    for number, split in enumerate(splits):
        store = Store(tmp_path / str(number), Encoder("tiny", img_dim=32).prepare("fp32"))
        fill_store(store, split.train, 2)
        arrays.append(store.array(store_name(split.train[0])))
    assert arrays[0].shape == arrays[1].shape
    # The one came through JPEG.
    assert np.abs(arrays[0] - arrays[1]).mean() < 0.02


def test_the_official_lists(subset):
    classes = read_classes(subset / "ucfTrainTestlist/classInd.txt")
    assert classes == read_classes(ROOT / "data/ucf101_classes.txt")
    # Alphabetical order has these the other way round.
    assert classes.index("Hammering") == 34
    assert classes.index("HammerThrow") == 35
    split = Listed(ucf101_at(subset)).split(1)
    assert split.missing() == (
        "391 of 13,320 listed clips found, 10 of 101 classes; going on with those (the head names all 101; "
        "--dataset folder takes 10)"
    )
    assert (len(split.train), len(split.test)) == (283, 108)
    assert all(classes[clip.label] == clip.name.split("/")[0] for clip in split.train + split.test)
