"""Long videos with a table of segments: read, learned, found, measured, and learned from again."""

import csv
import itertools
import json
from fractions import Fraction

import numpy as np
import pytest
import torch

import test as test_script
import test_on_video
import train
from annotation.labels import best_sequence, scores
from annotation.measures import Run, Timeline, edit_score, measures
from annotation.onnx_model import OnnxModel, export
from annotation.recognizer import Recognizer
from conftest import TRAIN_FLAGS
from dataset import sampled
from splits.datasets import DataSettings, open_listed
from splits.segments import SegmentedVideos, uncovered
from training.checkpoint import load_checkpoint
from training.recipe import balanced_weights
from utils.process import UserError
from video.writer import write_video

# What a second of each action looks like; anything else is gray.
COLORS = {"Rød, wave": (230, 30, 30), "jump": (30, 60, 230), "": (128, 128, 128), "other": (210, 210, 210)}
PLAN = [
    ("", 1.0),
    ("Rød, wave", 2.0),
    ("", 1.0),
    ("jump", 2.0),
    ("other", 1.0),
    ("Rød, wave", 1.6),
    ("jump", 1.4),
]
FLAGS = (
    "--model",
    "LinearProbe",
    "--sequence_length",
    2,
    "--learning_rate",
    0.1,
    "--num_epochs",
    40,
    "--batch_size",
    4,
)


def draw(path, plan, rng):
    """A video of colors; returns the rows of its segments."""
    rows, frames, at = [], [], 0.0
    for action, seconds in plan:
        count = round(25 * seconds)
        noise = rng.integers(-12, 12, (count, 1, 1, 3))
        frames += list(np.clip(np.full((count, 48, 64, 3), COLORS[action]) + noise, 0, 255).astype(np.uint8))
        if action in ("Rød, wave", "jump"):
            rows.append([path.name, f"{at:.2f}", f"{at + seconds:.2f}", action])
        at += seconds
    write_video(path, iter(frames), Fraction(25))
    return rows


def write_table(path, rows, head=("video", "start", "end", "action"), delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([head, *rows])
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Six videos in a folder, and their table without a split."""
    folder, rng, rows = tmp_path_factory.mktemp("videos"), np.random.default_rng(0), []
    for number in range(6):
        plan = [PLAN[place] for place in rng.permutation(len(PLAN))]
        rows += draw(folder / f"v{number}.mp4", plan, rng)
    return folder, write_table(folder / "segments.csv", rows)


def flags(videos, tmp_path):
    folder, table = videos
    data = ["--dataset_path", folder, "--segments", table, "--cache_path", tmp_path / "cache"]
    return [*data, *TRAIN_FLAGS[:-4], *FLAGS, "--precision", "fp32"]


def test_segments_are_learned_found_and_learned_from_again(call, videos, tmp_path):
    done = call(train, *flags(videos, tmp_path), "--run_path", "run", "--val_fraction", 0.3)
    assert done.status == 0, done.err
    assert "segments of 2 actions in 6 videos" in done.out
    assert "a change of action along a video costs" in done.out
    model = load_checkpoint(tmp_path / "model_checkpoints/best.pth")
    assert model.classes == ["Rød, wave", "jump", "no action"]
    assert model.change_cost is not None
    report = json.loads((tmp_path / "run/test/report.json").read_text())
    found = {name: value["percent"] for name, value in report["timelines"].items()}
    assert found["frame accuracy"] > 95
    assert found["frame accuracy of no action"] > 90
    assert found["F1@50"] > 95
    assert (tmp_path / "run/test/timelines.png").stat().st_size > 1000
    # The same table with its folds was kept; the one that was typed may change.
    checkpoint = ["--checkpoint_model", "model_checkpoints/best.pth", "--precision", "fp32"]
    tested = call(test_script, *checkpoint, "--run_path", "tested")
    assert tested.status == 0, tested.err
    again = json.loads((tmp_path / "tested/report.json").read_text())
    assert again["timelines"] == report["timelines"]
    assert again["test_clips_sha256"] == report["test_clips_sha256"]
    # A video that is labeled is a table to correct and to train on.
    folder, _ = videos
    made = tmp_path / "made"
    labeled = call(test_on_video, "--video_path", folder, *checkpoint, "--output", made)
    assert labeled.status == 0, labeled.err
    tables = [path.read_text().splitlines() for path in sorted(made.glob("*.segments.csv"))]
    assert len(tables) == 6
    rows = list(csv.reader(itertools.chain(tables[0][:1], *(lines[1:] for lines in tables))))
    assert {row[3] for row in rows[1:]} == {"Rød, wave", "jump"}
    table = write_table(tmp_path / "corrected.csv", rows[1:], rows[0])
    done = call(train, *flags((folder, table), tmp_path), "--output_path", "second", "--run_path", "run2")
    assert done.status == 0, done.err
    assert "frame accuracy" in done.out
    assert "encoding" not in done.out


def test_a_learned_background_is_no_action_live_and_exported(call, videos, tmp_path):
    assert call(train, *flags(videos, tmp_path), "--run_path", "run").status == 0
    model = load_checkpoint(tmp_path / "model_checkpoints/LinearProbe_40.pth")
    recognizer = Recognizer(model)
    assert recognizer.classes == ["Rød, wave", "jump"]
    probabilities = np.array([[0.2, 0.3, 0.5], [0.2, 0.6, 0.2]], np.float32)
    assert recognizer.scores(probabilities).argmax(1).tolist() == [2, 1]
    exported = tmp_path / "exported"
    export(model, exported)
    other = Recognizer(OnnxModel(exported))
    assert (other.background, other.change_cost) == (2, recognizer.change_cost)
    assert "no action" not in call(test_on_video, "--list_actions", "--checkpoint_model",
                                   "model_checkpoints/LinearProbe_40.pth").out.splitlines()  # fmt: skip


@pytest.mark.parametrize(
    ("delimiter", "head", "rows"),
    [
        (",", ("video", "start", "end", "action", "note"), [["v0.mp4", "1", "3.5", "jump", "x"]]),
        (";", ("Video", "Start", "End", "Action"), [["v0.mp4", "1,0", "3,5", "jump"]]),
        ("\t", ("action", "end", "start", "video"), [["jump", "0:00:03.5", "0:01", "v0.mp4"]]),
        (",", ("Behavior", "Media file name", "Start (s)", "Stop (s)"), [["jump", "/a/v0.mp4", "1", "3.5"]]),
        ("\t", ("video", "Begin Time - ss.msec", "End Time - ss.msec", "action"), [["v0", 1, 3.5, "jump"]]),
        (",", ("video", "start", "end", "action"), [["v0", "1", "2", "jump"], ["v0", "1.5", "3.5", "jump"]]),
    ],
)  # fmt: skip
def test_tables_in_other_forms(videos, tmp_path, delimiter, head, rows):
    others = [[str(cell).replace("v0", "v1") for cell in row] for row in rows]
    table = write_table(tmp_path / "x.csv", [*rows, *others], head, delimiter)
    listed = SegmentedVideos(DataSettings(dataset_path=videos[0], segments=table))
    assert [(each.start, each.end, each.action) for each in listed.found] == [(1, 3.5, "jump")] * 2
    assert listed.numbers == (1, 2)


def test_annotations_as_of_activitynet(videos, tmp_path):
    def entry(subset):
        return {"subset": subset, "annotations": [{"segment": [0.5, 2], "label": "jump"}]}

    database = {"v0": entry("training"), "v1": entry("validation"), "v2": entry("testing")}
    (tmp_path / "x.json").write_text(json.dumps({"database": database}))
    split = open_listed(DataSettings(dataset_path=videos[0], segments=tmp_path / "x.json")).split(1)
    assert [[clip.name for clip in side] for side in (split.train, split.val, split.test)] == [
        ["v0.mp4"], ["v1.mp4"], ["v2.mp4"],
    ]  # fmt: skip
    assert split.classes == ["jump", "no action"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "row 1: no column video"),
        ("video,start,end,action,fold\nv0.mp4,1,2,jump,9\n", "row 2: fold '9' is none of 1 to 5"),
        ("video,start,end,action\nv0.mp4,1,2,jump\nv0,3,4,jump\n", "v0.mp4 is v0 of row 3"),
        ("video,start,end,action\n", "no segment in it"),
        ("video,start,action\n", "row 1: no column end"),
        ("video,start,end,action\nv0.mp4,1,2,\n", "row 2: no action"),
        ("video,start,end,action\n\nv0.mp4,1,x,jump\n", "row 3: end 'x' is no time"),
        ("video,start,end,action\nv0.mp4,-1,2,jump\n", "row 2: start '-1' is no time"),
        ("video,start,end,action\nv0.mp4,3,2,jump\n", "row 2: it ends at 2, and starts at 3"),
        ("video,start,end,action\nv0.mp4,1,3,jump\nv0.mp4,2,4,run\n", "row 3: run overlaps jump of row 2"),
        ("video,start,end,action\ngone.mp4,1,3,jump\n", r"none of its 1 videos .* gone.mp4 \(row 2\)"),
        ("video,start,end,action,split\nv0.mp4,1,3,jump,some\n", "row 2: split 'some' is none of train, val"),
        ("video,start,end,action,split\nv0.mp4,1,3,jump,train\n", "no row has the split test"),
        (
            "video,start,end,action,split\nv0.mp4,1,3,jump,train\nv0.mp4,4,5,jump,test\n",
            "row 3: v0.mp4 has another split or group in row 2",
        ),
        (
            "video,start,end,action,split,group\nv0.mp4,1,3,jump,train,g\nv1.mp4,4,5,jump,test,g\n",
            "row 3: the group g is on two sides",
        ),
        ("video,start,end,action\nv0.mp4,1,3,jump\n", "all its segments are of one video or group"),
        ("video,start,end,action\nv0.mp4,1,3,jump\nv1.mp4,1,99,jump\n", "row 3: the segment ends at 99.00 s"),
    ],
)
def test_wrong_tables_are_one_line_with_the_row(call, videos, tmp_path, text, message):
    (tmp_path / "x.csv").write_text(text)
    done = call(train, *flags((videos[0], tmp_path / "x.csv"), tmp_path))
    assert done.status == 1
    with pytest.raises(UserError, match=message):
        raise UserError(done.one_line_error())


def test_videos_that_are_not_there_are_told_and_one_action_needs_something_beside_it(call, videos, tmp_path):
    rows = [[f"v{number}.mp4", 0, 10, "all of it"] for number in range(3)]
    table = write_table(tmp_path / "x.csv", [*rows, ["gone.mp4", 1, 2, "all of it"]])
    done = call(train, *flags((videos[0], table), tmp_path))
    assert "1 of the videos are not in" in done.out
    assert "gone.mp4 (row 5)" in done.out
    assert "training has one action, all of it, and nothing beside it" in done.one_line_error()


def test_small_tables_have_folds_and_sides_that_are_missing_are_taken_from_val(videos, tmp_path):
    rows = [[f"v{number}.mp4", 1, 2, ("jump", "run")[number % 2]] for number in range(6)]
    table = write_table(tmp_path / "x.csv", rows)
    listed = SegmentedVideos(DataSettings(dataset_path=videos[0], segments=table))
    assert sum(len(listed.split(number).test) for number in listed.numbers) == 6
    for given, other in (("train", "test"), ("test", "train")):
        sides = [[*row, given if number < 3 else "val"] for number, row in enumerate(rows)]
        write_table(table, sides, ("video", "start", "end", "action", "split"))
        listed = SegmentedVideos(DataSettings(dataset_path=videos[0], segments=table))
        assert [len(side) for side in (listed.split(1).train, listed.split(1).test)] == [3, 3]
        assert f"no {other} split, so val takes its place" in listed.describe()[0]


def test_an_action_that_is_nowhere_to_be_found_is_no_class_and_one_without_clips_no_weight(videos, tmp_path):
    rows = [*([f"v{number}.mp4", 1, 2, "jump"] for number in range(4)), ["gone.mp4", 1, 2, "ghost"]]
    table = write_table(tmp_path / "x.csv", rows)
    listed = SegmentedVideos(DataSettings(dataset_path=videos[0], segments=table))
    assert listed.split(1).classes == ["jump", "no action"]
    assert listed.split(1).missing() is None
    assert balanced_weights(np.array([0, 0, 1]), 3)[2] == 0


def test_a_group_of_videos_is_on_one_side(videos, tmp_path):
    rows = [[f"v{number}.mp4", 1, 2, "jump", f"g{number // 2}"] for number in range(6)]
    table = write_table(tmp_path / "x.csv", rows, ("video", "start", "end", "action", "group"))
    listed = SegmentedVideos(DataSettings(dataset_path=videos[0], segments=table))
    assert listed.numbers == (1, 2, 3)
    tested = [{clip.name for clip in listed.split(number).test} for number in listed.numbers]
    assert sorted(map(sorted, tested)) == [["v0.mp4", "v1.mp4"], ["v2.mp4", "v3.mp4"], ["v4.mp4", "v5.mp4"]]


def test_what_no_segment_covers_and_how_often_it_is_drawn():
    assert uncovered([(2, 3), (3, 5)], 9, 2) == [(0, 2), (5, 7), (7, 9)]
    assert uncovered([(2, 9.8)], 9, 2) == [(0, 2)], "a segment may end behind its video"
    labels = np.array([0] * 5 + [1] * 3 + [2] * 50)
    first, second = (sampled(labels, 2, epoch, 0) for epoch in (1, 2))
    assert np.bincount(labels[first]).tolist() == np.bincount(labels[second]).tolist() == [5, 3, 5]
    assert first.tolist() != second.tolist()
    assert balanced_weights(np.array([0, 0, 0, 1]), 3).tolist() == pytest.approx([2 / 3, 2, 0])


def test_classes_of_unequal_size_count_alike(call, small, train_flags, tmp_path):
    losses = []
    for weights in ("equal", "balanced"):
        run = tmp_path / weights
        (small / "UCF-101/WalkLeft/v_WalkLeft_g02_c01.avi").unlink(missing_ok=True)
        done = call(
            train, *train_flags(small), "--class_weights", weights, "--num_epochs", 1, "--run_path", run
        )
        assert done.status == 0, done.err
        with (run / "history.csv").open(newline="") as file:
            losses.append(next(csv.DictReader(file))["train_loss"])
    assert losses[0] != losses[1]


def test_the_best_sequence_is_that_of_all_sequences():
    rng = np.random.default_rng(0)
    for _ in range(20):
        probabilities = rng.dirichlet([0.5] * 3, 6)
        times, cost = np.cumsum([0, *rng.uniform(0.1, 1, 6)]), rng.uniform(0, 1)
        value, begins = scores(probabilities, 0.3), [0, 3]

        def worth(labels, value=value, times=times, cost=cost):
            gain = sum(
                value[place, label] * (times[place + 1] - times[place]) for place, label in enumerate(labels)
            )
            changes = sum(labels[place] != labels[place - 1] for place in (1, 2, 4, 5))
            return gain - cost * changes

        best = max(itertools.product(range(4), repeat=6), key=worth)
        found = best_sequence(value, times, cost, begins)
        assert worth([label if label >= 0 else 3 for label in found]) == pytest.approx(worth(best))
    assert best_sequence(scores(np.array([[0.9, 0.1], [0.4, 0.6]])), np.arange(3.0), 0, [0]).tolist() == [
        0,
        1,
    ]


def timeline(truth, predicted, scores=None):
    """One frame a second; capitals are labels, points are no action."""

    def labels(text):
        return np.array([-1 if letter == "." else ord(letter) - 65 for letter in text])

    def runs(text, scores):
        edges = [0, *(place for place in range(1, len(text)) if text[place] != text[place - 1]), len(text)]
        found = [(text[a], a, b) for a, b in itertools.pairwise(edges) if text[a] != "."]
        scores = scores or [1.0] * len(found)
        return [
            Run(ord(name) - 65, float(a), float(b), score)
            for (name, a, b), score in zip(found, scores, strict=True)
        ]

    times = np.arange(len(truth) + 1.0)
    return Timeline(
        truth, truth, times, labels(truth), labels(predicted), runs(truth, None), runs(predicted, scores)
    )


def test_the_measures_are_those_worked_out_by_hand():
    # True A 0-4, B 6-10; found A 0-2, B 2-3, B 6-10. B 2-3 overlaps nothing.
    one = timeline("AAAA..BBBB", "AAB...BBBB", [0.9, 0.8, 0.7])
    found = {name: value for name, (value, _) in measures([one]).items()}
    assert found["frame accuracy"] == pytest.approx(80)
    assert found["frame accuracy of actions"] == pytest.approx(75)
    assert found["frame accuracy of no action"] == pytest.approx(100)
    # A overlaps by 2 of 4 seconds.
    assert [found[name] for name in ("F1@10", "F1@25", "F1@50")] == pytest.approx([80, 80, 80])
    # A B B against A B: one of three is too many.
    assert found["edit score"] == pytest.approx(100 * 2 / 3)
    # A: right up to 0.5. B: the first is wrong, so the second has a precision of a half.
    assert found["mAP@0.5"] == pytest.approx((100 + 50) / 2)
    assert found["mAP@0.6"] == pytest.approx((0 + 50) / 2)
    assert edit_score([], []) == 100
    assert edit_score([0, 1, 2], [2, 1, 0]) == pytest.approx(100 / 3)
    two = timeline("..AA", "..AA")
    values = measures([one, two])
    assert values["frame accuracy"][0] == pytest.approx(100 * 12 / 14)
    low, high = values["frame accuracy"][1]
    assert (low, high) == pytest.approx((80, 100))
    # Nothing found, and nothing to be found.
    assert measures([timeline("AA..", "....")])["F1@10"][0] == 0
    assert measures([timeline("....", "....")])["frame accuracy"][0] == 100


def test_frames_get_the_labels_of_their_seconds():
    recognition = type(
        "R", (), {"times": np.arange(0, 2.04, 0.04), "labels": np.zeros(50, int), "segments": []}
    )()
    line = Timeline.of(recognition, "x", "x", [(1, (0.4, 1.2))])
    assert np.flatnonzero(line.truth == 1).tolist() == list(range(10, 30))
    assert torch.tensor(line.true_runs[0][1:3]).tolist() == pytest.approx([0.4, 1.2])
