import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import ROOT, ucf101_at
from dataset import FrameClips, Sampling, clip_indices, window_indices
from extract_frames import extract_all
from features.encoder import difference_images
from features.streams import View, parse_streams
from features.windows import PHOTOGRAPHS
from splits.datasets import DataSettings, load_split
from splits.ucf101 import read_classes
from training.batches import ClipBatches, frame_loader
from video.frames import SQUEEZE, resize_frames

lengths = st.integers(1, 60)


def views(img_dim):
    return [View(PHOTOGRAPHS, SQUEEZE, img_dim)]


def frames_of(item):
    """The frames (T, 3, H, W) of an item that photographs are encoded of."""
    ((groups, places),) = item[0]
    return torch.cat(groups)[places, 0]


@given(num_frames=st.integers(1, 400), length=lengths, seed=st.integers(0, 2**32))
def test_training_clips_are_evenly_stepped_and_inside(num_frames, length, seed):
    indices = clip_indices(num_frames, length, rng=np.random.default_rng(seed))
    assert indices.shape == (length,)
    assert indices.min() >= 0
    assert indices.max() < num_frames
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


def test_training_reaches_every_step_and_both_ends():
    rng = np.random.default_rng(0)
    drawn = [clip_indices(50, 16, rng=rng) for _ in range(500)]
    assert {int(indices[1] - indices[0]) for indices in drawn} == {1, 2, 3}
    assert min(indices[0] for indices in drawn) == 0
    assert max(indices[-1] for indices in drawn) == 49


def test_short_clips_repeat_the_first_frame_in_front():
    assert clip_indices(3, 5).tolist() == [0, 0, 0, 1, 2]
    assert clip_indices(3, 5, rng=np.random.default_rng(0)).tolist() == [0, 0, 0, 1, 2]
    for wrong in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="positive"):
            clip_indices(*wrong)


@given(num_frames=st.integers(1, 300), length=lengths, step=st.integers(1, 6))
def test_windows_hold_their_frame_and_stay_inside(num_frames, length, step):
    windows = window_indices(num_frames, length, step=step)
    assert windows.shape == (num_frames, length)
    assert windows.min() >= 0
    assert windows.max() < num_frames
    assert (np.diff(windows, axis=1) >= 0).all()
    frames = np.arange(num_frames)
    if length > step:
        reach = step // 2 + 1  # a frame between two of the window counts as held
        assert (windows[:, 0] - reach <= frames).all()
        middle = frames[(windows[:, 0] > 0) & (windows[:, -1] < num_frames - 1)]
        assert (abs(windows[middle].mean(axis=1) - middle) <= step).all()


def test_split_of_videos_and_of_extracted_frames_agree(small):
    extract_all(small / "UCF-101", quality=95, workers=2)
    videos = load_split(ucf101_at(small), 1)
    frames = load_split(
        DataSettings(dataset_path=small / "UCF-101-frames", split_path=small / "ucfTrainTestlist"), 1
    )
    assert videos.missing() is frames.missing() is None
    assert [clip.name for clip in videos.train] == [clip.name for clip in frames.train]
    assert len(videos.train) == 4
    assert len(videos.test) == 2
    for index in (0, 3):
        items = [FrameClips(split.train, Sampling(6), views(32))[0, index] for split in (videos, frames)]
        first, second = map(frames_of, items)
        assert items[0][2] == items[1][2] == index // 2
        assert first.shape == (6, 3, 32, 32)
        # The one came through JPEG.
        assert (first.float() - second.float()).abs().mean() < 2


def test_missing_clips_are_counted_in_one_line(small):
    (small / "UCF-101/WalkLeft/v_WalkLeft_g02_c01.avi").unlink()
    shutil.rmtree(small / "UCF-101/WalkRight")
    split = load_split(ucf101_at(small), 1)
    assert split.missing() == "2 of 6 listed clips found, 1 of 2 classes; going on with those"
    shutil.rmtree(small / "UCF-101/WalkLeft")
    with pytest.raises(
        FileNotFoundError, match=r"none of the 6 .* expected for example .*v_WalkLeft_g02_c01.avi"
    ):
        load_split(ucf101_at(small), 1)


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("trainlist01.txt", "WalkLeft/v_x.avi", "line 5"),
        ("trainlist01.txt", "WalkLeft/v_x.avi one", "label one"),
        ("trainlist01.txt", "WalkLeft/v_x.avi 2", "label 2"),
        ("trainlist01.txt", "Fly/v_Fly_g01_c01.avi 1", "Fly is not in classInd"),
        ("trainlist01.txt", "../WalkLeft/v_x.avi 1", "line 5"),
        ("testlist01.txt", "../v_x.avi", "line 3"),
        ("testlist01.txt", "/etc/passwd.avi", "line 3"),
        ("testlist01.txt", "WalkLeft\\v_x.avi", "line 3"),
        ("testlist01.txt", "WalkLeft/v_x.avi 1", "line 3"),
        ("classInd.txt", "4 Jump", "line 3"),
        ("classInd.txt", "3 WalkLeft", "twice"),
        ("classInd.txt", "3 ../etc", "line 3"),
    ],
)
def test_malformed_lists_name_the_line(small, file, line, message):
    path = small / "ucfTrainTestlist" / file
    path.write_text(path.read_text().rstrip() + f"\n{line}\n")
    with pytest.raises(ValueError, match=message):
        load_split(ucf101_at(small), 1)


def test_a_class_folder_that_no_list_knows(small):
    (small / "UCF-101" / "Fly").mkdir()
    with pytest.raises(ValueError, match="Fly is not in"):
        load_split(ucf101_at(small), 1)
    with pytest.raises(ValueError, match="split number 4"):
        load_split(ucf101_at(small), 4)


def test_clips_depend_on_seed_epoch_and_index_alone(small):
    clips = load_split(ucf101_at(small), 1).train
    sampling = Sampling(5, training=True, seed=3)
    here, there = (FrameClips(clips, sampling, views(16)) for _ in range(2))
    there[9, 1]
    assert (frames_of(here[7, 1]) == frames_of(there[7, 1])).all()
    assert (frames_of(here[7, 1]) != frames_of(here[8, 1])).any()
    batches = ClipBatches(len(clips), 2, shuffle=True, seed=3)
    batches.epoch = 7
    for workers in (0, 2):
        loader = frame_loader(here, batches, workers=workers)
        for items, keys in zip(loader, batches, strict=True):
            for item, key in zip(items, keys, strict=True):
                assert (frames_of(item) == frames_of(there[key])).all()
                assert item[2] == clips[key[1]].label


def test_flips_mirror_half_of_the_clips_whole(small):
    clips = load_split(ucf101_at(small), 1).train
    sampling = Sampling(4, training=True)
    plain, flipped = (
        FrameClips(clips, each, views(16)) for each in (replace(sampling, flip=False), sampling)
    )
    mirrored = 0
    for epoch in range(40):
        straight, maybe = frames_of(plain[epoch, 0]), frames_of(flipped[epoch, 0])
        if (straight == maybe).all():
            continue
        assert (straight.flip(-1) == maybe).all()
        mirrored += 1
    assert 8 <= mirrored <= 32


@given(num_clips=st.integers(2, 50), batch_size=st.integers(2, 20), epoch=st.integers(0, 5))
def test_batches_hold_every_clip_once(num_clips, batch_size, epoch):
    tests = [index for batch in ClipBatches(num_clips, batch_size, shuffle=False) for _, index in batch]
    assert tests == list(range(num_clips))
    batches = ClipBatches(num_clips, batch_size, shuffle=True)
    batches.epoch = epoch
    drawn = list(batches)
    assert len(drawn) == len(batches)
    assert all(len(batch) > 1 for batch in drawn)
    seen = [index for batch in drawn for _, index in batch]
    assert len(set(seen)) == len(seen) == num_clips - (num_clips % batch_size == 1)


def test_resize_squeezes_to_a_square_and_keeps_uint8():
    frames = [np.full((24, 32, 3), value, np.uint8) for value in (0, 128, 255)]
    resized = resize_frames(frames, 10)
    assert resized.shape == (3, 3, 10, 10)
    assert [int(frame.float().mean()) for frame in resized] == [0, 128, 255]


def test_the_official_lists(subset):
    classes = read_classes(subset / "ucfTrainTestlist/classInd.txt")
    assert classes == read_classes(ROOT / "data/ucf101_classes.txt")
    # Alphabetical order has these the other way round.
    assert classes.index("Hammering") == 34
    assert classes.index("HammerThrow") == 35
    split = load_split(ucf101_at(subset), 1)
    assert split.missing() == "391 of 13,320 listed clips found, 10 of 101 classes; going on with those"
    assert (len(split.train), len(split.test)) == (283, 108)
    assert all(classes[clip.label] == clip.name.split("/")[0] for clip in split.train + split.test)


@given(num_frames=st.integers(1, 400), length=st.integers(1, 60), views=st.integers(2, 6))
def test_several_clips_of_a_video_lie_between_each_other(num_frames, length, views):
    clips = np.stack([clip_indices(num_frames, length, view=view, views=views) for view in range(views)])
    assert clips.shape == (views, length)
    assert 0 <= clips.min() <= clips.max() < num_frames
    assert (np.diff(clips) >= 0).all()
    if num_frames >= length:
        # Frame by frame, the first clip's comes first, the next clip's after it.
        assert (np.diff(clips.T.ravel()) >= 0).all()
    if num_frames >= views * length:
        assert len(np.unique(clips)) == views * length


@given(frames=st.integers(1, 60), length=st.integers(1, 60), training=st.booleans(), shuffle=st.booleans())
def test_padding_and_shuffling_keep_what_a_clip_consists_of(frames, length, training, shuffle):
    plain = Sampling(length, training=training)
    indices, padding, mirrored = replace(plain, shuffle=shuffle).draw((0, 3), frames)
    straight, same_padding, same_mirrored = plain.draw((0, 3), frames)
    assert mirrored == same_mirrored
    assert (padding == same_padding).all()
    assert padding.sum() == max(0, length - frames)
    assert not padding[padding.sum() :].any(), "padding stands in front"
    assert sorted(indices[~padding]) == sorted(straight[~padding])
    assert len(set(indices[~padding].tolist())) == min(length, frames)
    if shuffle and min(length, frames) > 8:
        assert (indices != straight).any()


def test_a_difference_shows_what_has_changed():
    before = torch.full((1, 3, 4, 4), 100, dtype=torch.uint8)
    frames = before.clone()
    frames[..., 0, 0], frames[..., 1, 1], frames[..., 2, 2] = 110, 80, 255
    images = difference_images(torch.stack([before, frames], dim=1))[:, 0]
    assert images.dtype == torch.uint8
    assert images[0, 0, 3, 3] == 128, "nothing has"
    assert images[0, 0, 0, 0] == 128 + 2 * 10
    assert images[0, 0, 1, 1] == 128 - 2 * 20
    assert images[0, 0, 2, 2] == 255, "as far as it goes"


@pytest.mark.parametrize("text", ["flow", "rgb,", "", "rgb,rgb", "rgb, diff"])
def test_wrong_streams_are_told(text):
    with pytest.raises(ValueError, match="stream"):
        parse_streams(text)
