import make_toy_actions as toys
import numpy as np
import pytest
import toy_motions

from conftest import ucf101_at
from splits.datasets import load_split
from splits.ucf101 import read_classes


def test_layout_is_that_of_ucf101(toy):
    for number in (1, 2, 3):
        split = load_split(ucf101_at(toy), number)
        assert split.missing() is None
        assert len(split.train) + len(split.test) == 64
        groups = [{clip.name.split("_g")[1][:2] for clip in side} for side in (split.train, split.test)]
        assert not groups[0] & groups[1], "a group on both sides of a split leaks"
        assert {clip.label for clip in split.test} == set(range(8))
    assert read_classes(toy / "ucfTrainTestlist/classInd.txt") == list(toy_motions.ACTIONS)
    video = split.train[0].video
    assert video.fps() == 25
    assert next(video.frames()).shape == (240, 320, 3)


@pytest.mark.parametrize(("one", "other"), toy_motions.ORDER_PAIRS)
def test_order_pairs_are_the_same_frames_run_backwards(one, other):
    first, second = toys.draw_clip(one, 0, 3, 1), toys.draw_clip(other, 0, 3, 1)
    assert len(first) == len(second)
    assert all(np.array_equal(a, b) for a, b in zip(first, reversed(second), strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_groups_and_actions_look_different():
    frames = [toys.draw_clip("Wave", 0, group, 1)[10] for group in (1, 2)] + [
        toys.draw_clip("Bow", 0, 1, 1)[20]
    ]
    assert np.abs(frames[0].astype(int) - frames[1]).mean() > 10
    assert np.abs(frames[0].astype(int) - frames[2]).mean() > 0.5


def test_the_same_seed_draws_the_same_files(call, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert call(toys, "--output_path", tmp_path / name, "--groups", 4, "--seed", seed).status == 0
    files = {
        name: {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*.*")}
        for name in "abc"
    }
    assert len(files["a"]) == 32 + 7
    assert files["a"] == files["b"] != files["c"]


def test_nothing_is_overwritten(call, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    done = call(toys, "--output_path", tmp_path / "full")
    assert (done.status, "not empty" in done.one_line_error()) == (1, True)
    done = call(toys, "--groups", 2)
    assert (done.status, "--groups 2" in done.one_line_error()) == (2, True)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_sequences_are_longer_and_have_lists_of_their_own(call, tmp_path):
    flags = ["--output_path", tmp_path / "toy", "--groups", 4, "--actions", "sequences"]
    assert call(toys, *flags).status == 0
    split = load_split(ucf101_at(tmp_path / "toy"), 1)
    assert split.classes == list(toy_motions.SEQUENCES)
    assert min(clip.video.count() for clip in split.test) >= 160


def test_a_sequence_begins_with_one_action_and_ends_with_the_other():
    frames = toys.draw_clip("WaveThenSquat", 0, 1, 1)
    rows = [np.flatnonzero(np.abs(frame.astype(int) - frames[0]).max((1, 2)) > 60) for frame in frames]
    # Where a squat is, the head comes down: more of the picture changes than an arm's wave does.
    changed = np.array([len(each) for each in rows])
    assert changed[len(changed) // 2 + 10 :].max() > 1.3 * changed[: len(changed) // 2 - 10].max()
