"""Cuts in a video are found, and nothing else."""

import numpy as np

from video.shots import SHORTEST, Shots


def scene(seed, count, height=48, width=64):
    """Frames with colors of their own, in which something moves and the light changes a little."""
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
    cuts = first_frames(frame for seed in range(60) for frame in scene(seed, 1))
    assert cuts
    assert all(length >= SHORTEST for length in np.diff([0, *cuts]))
