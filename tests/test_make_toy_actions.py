import make_toy_actions as toys
import numpy as np
import pytest

from conftest import ucf101_at
from splits.datasets import Listed


def test_layout_is_that_of_ucf101(toy):
    for number in (1, 2, 3):
        split = Listed(ucf101_at(toy)).split(number)
        assert split.classes == list(toys.ACTIONS)
        assert split.missing() is None
        assert len(split.train) + len(split.test) == 64
        assert not {clip.group[-4:] for clip in split.train} & {clip.group[-4:] for clip in split.test}, (
            "it leaks"
        )
        assert {clip.label for clip in split.test} == set(range(8))
    video = split.train[0].video
    assert video.fps() == 25
    assert next(video.frames()).shape == (240, 320, 3)


@pytest.mark.parametrize(("one", "other"), toys.ORDER_PAIRS)
def test_order_pairs_are_the_same_frames_run_backwards(one, other):
    first, second = toys.draw_clip(one, 0, 3, 1), toys.draw_clip(other, 0, 3, 1)
    assert np.array_equal(first, second[::-1])
    assert not np.array_equal(first, second)


def test_groups_and_actions_look_different():
    one, group, action = (
        toys.draw_clip(name, 0, number, 1)[20].astype(int)
        for name, number in (("Wave", 1), ("Wave", 2), ("Bow", 1))
    )
    assert np.abs(one - group).mean() > 10
    assert np.abs(one - action).mean() > 0.5


def test_the_same_seed_draws_the_same_files(call, tmp_path):
    files = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert call(toys, "--output_path", tmp_path / name, "--groups", 4, "--seed", seed).status == 0
        paths = sorted((tmp_path / name).rglob("*.*"))
        files.append([(path.relative_to(tmp_path / name), path.read_bytes()) for path in paths])
    assert len(files[0]) == 32 + 7
    assert files[0] == files[1] != files[2]


def test_nothing_is_overwritten(call, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    done = call(toys, "--output_path", tmp_path / "full")
    assert (done.status, "not empty" in done.one_line_error()) == (1, True)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    done = call(toys, "--groups", 2)
    assert (done.status, "--groups 2" in done.one_line_error()) == (2, True)
