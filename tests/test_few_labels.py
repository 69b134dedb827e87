"""benchmarks/few_labels.py: which labels are drawn, what is tested, and the table."""

import sys

import pytest

from conftest import ROOT
from splits.split import Clip
from splits.ucf101 import source
from utils.process import UserError
from video.reader import Video

sys.path.append(str(ROOT / "benchmarks"))

import few_labels


def clips_of(groups):
    """Two clips of each group of two classes."""
    names = [
        (f"{name}/v_{name}_g{group:02d}_c{number:02d}.avi", label)
        for label, name in enumerate(("Jump", "Walk"))
        for group in range(1, groups + 1)
        for number in (1, 2)
    ]
    return [Clip(name, label, Video(name), source(name)) for name, label in names]


def test_whole_groups_of_each_class_are_drawn():
    clips = clips_of(6)
    drawn, rest = few_labels.draw_groups(clips, 2, [1, 0])
    assert [clip.label for clip in drawn] == [0] * 4 + [1] * 4
    assert not {clip.group for clip in drawn} & {clip.group for clip in rest}
    assert sorted(clip.name for clip in drawn + rest) == sorted(clip.name for clip in clips)
    assert few_labels.draw_groups(clips, 2, [1, 0]) == (drawn, rest)


def test_each_split_and_draw_has_others():
    clips = clips_of(20)
    drawn = {
        tuple(clip.name for clip in few_labels.draw_groups(clips, 2, [split, draw])[0])
        for split in (1, 2, 3)
        for draw in range(5)
    }
    assert len(drawn) == 15


def test_as_many_groups_as_there_are_can_be_drawn_and_one_less_where_some_are_tested():
    clips = clips_of(4)
    assert few_labels.draw_groups(clips, 4, [0])[1] == []
    assert len(few_labels.draw_groups(clips, 3, [0], rest=True)[1]) == 4
    for groups, rest in ((5, False), (4, True)):
        with pytest.raises(UserError, match=f"--groups {groups}: .* 4 groups"):
            few_labels.draw_groups(clips, groups, [0], rest=rest)


def test_a_table_of_heads_on_groups_that_no_split_tests(call, small, tmp_path):
    command = [few_labels, "--data", small, "--cache_path", tmp_path / "cache", "--held_out"]
    encoder = "efficientnet_lite0 --img_dim 32 --precision fp32 --sequence_length 8"
    command += ["--encoders", encoder, "--draws", 1, "--steps", 4]
    done = call(*command, "--models", "NormalizedProbe --learning_rate 1e-2", "--groups", 1)
    assert done.status == 0, done.err
    rows = [line.strip("| ").split(" | ") for line in done.out.splitlines() if line.startswith("|")]
    assert rows[0] == ["encoder", "model", "1 group of a class"]
    names = ["logistic regression", "logistic regression, one length", "NormalizedProbe --learning_rate 1e-2"]
    assert [row[1] for row in rows[2:]] == names
    assert "3 draws among the groups that no split tests" in done.out
    # Of the two groups that no split tests one is drawn, and the two clips of the other are tested.
    for row in rows[2:]:
        assert float(row[2].split(" %")[0]) in (0, 16.7, 33.3, 50, 66.7, 83.3, 100)
    for model, reason in (
        ("NoHead", "unknown model 'NoHead'"),
        ("MeanPool 'x", "No closing quotation"),
        ("MeanPool --pretrain 2", "cannot tell one from the others"),
    ):
        done = call(*command, "--models", model)
        assert done.status == 1
        assert reason in done.one_line_error()
