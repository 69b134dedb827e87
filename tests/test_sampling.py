from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dataset import FrameClips, Sampling, clip_indices, padding_of, window_indices
from features.encoder import difference_images
from features.streams import View, parse_streams
from features.windows import CHANGES, PHOTOGRAPHS
from splits.split import Clip
from training.batches import ClipBatches
from video.files import VideoError
from video.frames import SQUEEZE, resize_frames
from video.reader import check_length


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


def test_windows_of_nothing_are_refused():
    for wrong in ((10, 0, 2), (10, -1, 2), (10, 4, 0), (10, 4, -1)):
        count, length, step = wrong
        with pytest.raises(ValueError, match="must be positive"):
            window_indices(count, length, step=step)
    assert window_indices(5, 1, step=1).tolist() == [[0], [1], [2], [3], [4]]


def test_clips_in_numbers():
    assert clip_indices(1, 1).tolist() == [0]
    assert clip_indices(9, 5).tolist() == [0, 2, 4, 6, 8]
    assert clip_indices(5, 5).tolist() == [0, 1, 2, 3, 4]
    assert clip_indices(20, 5, view=0, views=2).tolist() == [1, 5, 9, 13, 17]
    assert clip_indices(20, 5, view=1, views=2).tolist() == [3, 7, 11, 15, 19]
    assert clip_indices(30, 3, view=1, views=3).tolist() == [5, 15, 25]
    for wrong in ((0, 4), (4, 0), (-1, 4), (4, -1)):
        with pytest.raises(ValueError, match="both must be positive"):
            clip_indices(*wrong)


def test_training_draws_every_step_and_start_alike():
    rng = np.random.default_rng(0)
    drawn = [tuple(clip_indices(12, 4, rng=rng)) for _ in range(3000)]
    seen = {clip: drawn.count(clip) for clip in set(drawn)}
    assert set(seen) == {
        tuple(range(start, start + 4 * step, step)) for step in (1, 2, 3) for start in range(12 - 3 * step)
    }
    for step, starts in ((1, 9), (2, 6), (3, 3)):
        counts = [count for clip, count in seen.items() if clip[1] - clip[0] == step]
        assert min(counts) > 0.5 * 1000 / starts
        assert max(counts) < 1.5 * 1000 / starts


def test_padding_is_the_first_frame_as_often_as_it_stands_in():
    assert padding_of(np.array([0, 0, 0, 1, 2])).tolist() == [True, True, False, False, False]
    assert padding_of(np.array([[0, 2], [0, 0]])).tolist() == [[False, False], [True, False]]
    assert padding_of(np.array([0])).tolist() == [False]


def test_only_training_mirrors_and_only_where_it_may():
    trained = Sampling(4, training=True)
    items = [(epoch, 0) for epoch in range(200)]
    mirrored = sum(trained.draw(item, 30)[2] for item in items)
    assert 70 <= mirrored <= 130
    for sampling in (replace(trained, flip=False), Sampling(4), Sampling(4, flip=False)):
        assert not any(sampling.draw(item, 30)[2] for item in items)


def test_what_an_item_draws_depends_on_the_seed():
    def drawn(seed):
        return [Sampling(4, training=True, seed=seed).draw((1, index), 30)[0].tolist() for index in range(5)]

    assert (
        drawn(0)
        == drawn(0)
        == [Sampling(4, training=True).draw((1, index), 30)[0].tolist() for index in range(5)]
    )
    assert drawn(0) != drawn(1)
    tested = [Sampling(4, seed=seed).draw((0, 0), 30)[0].tolist() for seed in (0, 1)]
    assert tested[0] == tested[1] == [0, 10, 19, 29]
    assert Sampling(4, views=2).draw((1, 7), 32)[0].tolist() == [6, 14, 22, 30], "the item's view"


def test_a_single_frame_is_no_clip_and_two_are(tmp_path):
    with pytest.raises(VideoError, match=f"{tmp_path}: a single frame"):
        check_length(tmp_path, 1)
    check_length(tmp_path, 2)


class Drawn:
    """A video of frames that are at hand."""

    def __init__(self, path, frames):
        self.path, self._frames = path, frames

    def count(self):
        return len(self._frames)

    def frames(self, indices):
        assert (np.diff(indices) > 0).all(), "each once, in order"
        return iter([self._frames[index] for index in indices])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("count", "stride"), [(30, 1), (30, 3), (31, 3), (7, 3), (2, 1)])
def test_items_are_the_frames_that_were_drawn_beside_those_before_them(tmp_path, training, count, stride):
    values = np.random.default_rng(0).integers(0, 256, (count, 1, 2, 1), dtype=np.uint8)
    frames = [np.broadcast_to(value, (8, 2, 3)).copy() for value in values]
    sampling = Sampling(5, training=training, frame_stride=stride)
    views = [View(PHOTOGRAPHS, SQUEEZE, 2), View(CHANGES, SQUEEZE, 2)]
    clips = FrameClips([Clip("a", 4, Drawn(tmp_path, frames))], sampling, views)
    kept = values[::stride, 0, :, 0].astype(int)
    flips = 0
    for epoch in range(8):
        parts, padding, label = clips[epoch, 0]
        indices, expected_padding, flipped = sampling.draw((epoch, 0), len(kept))
        assert label == 4
        assert padding.tolist() == expected_padding.tolist()
        before = kept[np.maximum(indices - 1, 0)]
        for (groups, places), seen in zip(parts, ([kept[indices]], [before, kept[indices]]), strict=True):
            windows = torch.cat(groups)[places]
            assert windows.shape == (5, len(seen), 3, 2, 2)
            for number, expected in enumerate(seen):
                columns = torch.from_numpy(expected[:, ::-1].copy() if flipped else expected)
                assert (windows[:, number] == columns[:, None, None]).all()
        flips += flipped
    assert (flips > 0) == training


def test_a_single_frame_is_refused_when_it_is_read(tmp_path):
    video = Drawn(tmp_path, [np.zeros((4, 4, 3), np.uint8)])
    clips = FrameClips([Clip("a", 0, video)], Sampling(3), [View(PHOTOGRAPHS, SQUEEZE, 2)])
    with pytest.raises(VideoError, match="a single frame"):
        clips[0, 0]


@pytest.mark.parametrize("size", [(61, 47), (20, 90), (32, 32)])
def test_frames_are_resized_as_by_pillow(size):
    """Bicubic with antialiasing, without which fine patterns turn into others."""
    frame = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    frame[::2] //= 4
    found = resize_frames([frame, frame[::-1].copy()], 16)
    for one, source in zip(found, (frame, frame[::-1]), strict=True):
        expected = np.asarray(Image.fromarray(source).resize((16, 16), Image.Resampling.BICUBIC))
        assert np.abs(one.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


def test_a_difference_reaches_from_black_to_white():
    frames = torch.tensor([0, 63, 64, 65, 128, 191, 192, 255], dtype=torch.uint8)
    windows = torch.stack([torch.full((8,), 128, dtype=torch.uint8), frames])[None]
    assert difference_images(windows)[0].tolist() == [[0, 0, 0, 2, 128, 254, 255, 255]]


def test_streams_out_of_words():
    assert parse_streams("rgb") == ("rgb",)
    assert parse_streams("diff,rgb") == ("diff", "rgb")
    assert parse_streams("rgb,i3d") == ("rgb", "i3d")


@given(
    clips=st.integers(1, 40),
    size=st.integers(1, 12),
    ranks=st.integers(1, 4),
    start=st.integers(0, 5),
    shuffle=st.booleans(),
)
def test_processes_share_every_batch(clips, size, ranks, start, shuffle):
    parts = [ClipBatches(clips, size, shuffle=shuffle, rank=rank, ranks=ranks) for rank in range(ranks)]
    whole = parts[0].whole()
    for part in parts:
        part.start = start
        assert part.whole() == whole
        assert len(part) == len(whole), "whatever the start"
    least = max(2, ranks) if shuffle else 1
    sizes = [len(batch) for batch in whole]
    assert sizes == [size] * (clips // size) * (size >= least) + [clips % size] * (clips % size >= least)
    shares = [list(part) for part in parts]
    if shuffle:
        assert {len(share) for share in shares} == {max(0, len(whole) - start)}, "each has its part of each"
        for batch, *pieces in zip(whole[start:], *shares, strict=True):
            assert sorted(batch) == sorted(item for piece in pieces for item in piece)
            assert max(map(len, pieces)) - min(map(len, pieces)) <= 1
    else:
        assert sorted(item for share in shares for batch in share for item in batch) == sorted(
            item for batch in whole[start:] for item in batch
        )
        assert all(batch for share in shares for batch in share)


def test_the_order_of_clips_is_another_in_each_epoch_and_for_each_seed():
    def order(seed, epoch, shuffle=True):
        batches = ClipBatches(30, 7, shuffle=shuffle, seed=seed)
        batches.epoch = epoch
        items = [item for batch in batches.whole() for item in batch]
        assert {number for number, _ in items} == {epoch}
        return [index for _, index in items]

    first = order(0, 0)
    assert first == order(0, 0)
    assert len({tuple(one) for one in (first, order(0, 1), order(1, 0), order(1, 1))}) == 4
    assert order(3, 2, shuffle=False) == list(range(30))
    fresh = ClipBatches(5, 2, shuffle=False)
    assert (fresh.epoch, fresh.start, fresh.rank, fresh.ranks) == (0, 0, 0, 1)
