"""A video is labelled shot by shot."""

import itertools

import numpy as np
import torch
from PIL import Image

from annotation.labels import ClipLayout, label_frames, read_windows
from annotation.pretrained import untrained
from video.reader import Video
from video.shots import SHORTEST, Shots


def scene(seed, count, height=48, width=64):
    """Frames with colours of their own, in which something moves and the light changes a little."""
    random = np.random.default_rng(seed)
    ground = random.integers(0, 200, 3)
    y, x = np.mgrid[:height, :width]
    for number in range(count):
        frame = np.broadcast_to(ground, (height, width, 3)).copy()
        frame[(y - 20) ** 2 + (x - 2 * number % width) ** 2 < 80] = 220
        yield (frame + number // 4 + random.integers(0, 4, frame.shape)).clip(0, 255).astype(np.uint8)


def first_frames(frames, **settings):
    finder = Shots(**settings)
    return [number for number, frame in enumerate(frames) if finder.begins(frame)]


def test_cuts_are_found_and_nothing_else():
    frames = [*scene(1, 40), *scene(2, 25), *scene(3, 60)]
    assert first_frames(frames) == [40, 65]
    assert first_frames(frames, find=False) == []


def test_a_slow_change_of_light_is_no_cut():
    assert first_frames(np.full((30, 40, 3), level, np.uint8) for level in range(256)) == []


def test_a_shot_is_no_shorter_than_so_many_frames():
    flicker = [frame for seed in range(60) for frame in scene(seed, 1)]
    cuts = first_frames(flicker)
    assert cuts
    assert all(length >= SHORTEST for length in np.diff([0, *cuts]))


def labelled(path, *, shots=True, stride=1):
    model = untrained("tiny_video").model
    streams = model.open_streams(24)
    batches = read_windows(Video(path), streams, stride, shots=shots)
    parts = list(label_frames(model, streams, batches, ClipLayout(6, stride=stride)))
    return [frame.image for part in parts for frame in part.frames], torch.cat(
        [part.probabilities for part in parts]
    )


def test_each_shot_is_labelled_as_if_it_were_a_video(tmp_path):
    parts = [list(scene(1, 150)), list(scene(2, 25)), list(scene(3, 61))]
    all_of_them = list(itertools.chain(*parts))
    for number, frames in enumerate([*parts, all_of_them]):
        (tmp_path / str(number)).mkdir()
        for place, frame in enumerate(frames):
            Image.fromarray(frame).save(tmp_path / str(number) / f"{place}.png")
    for stride in (1, 2):
        alone = [labelled(tmp_path / str(number), stride=stride) for number in range(3)]
        frames, joined = labelled(tmp_path / "3", stride=stride)
        assert all(np.array_equal(*pair) for pair in zip(frames, all_of_them, strict=True))
        assert torch.allclose(joined, torch.cat([rows for _, rows in alone]), atol=1e-6)
        _, across = labelled(tmp_path / "3", shots=False, stride=stride)
        assert len(across) == 236
        assert (across - joined).abs().max() > 1e-3
