import csv
import json
from fractions import Fraction
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from annotation.labels import Labelled, Smoother
from annotation.segments import NONE, Steady, label_of, segments, steady, write_tables
from video.decoder import Frame

tables = st_numpy.arrays(
    np.float64, st.tuples(st.integers(1, 60), st.integers(1, 4)), elements=st.floats(0, 1)
)


@given(tables)
def test_segments_cover_every_frame_once_and_neighbours_differ(probabilities):
    found = segments(probabilities, probabilities.argmax(1))
    frames = [number for one in found for number in range(one.first, one.last + 1)]
    assert frames == list(range(len(probabilities)))
    assert all(one.label != other.label for one, other in pairwise(found))
    for one in found:
        rows = probabilities[one.first : one.last + 1]
        assert (rows.argmax(1) == one.label).all()
        assert one.probability == pytest.approx(rows[:, one.label].mean())


def frames_at(times):
    return [Frame(np.empty((0, 0, 3), np.uint8), Fraction(time)) for time in times]


def smoothed(probabilities, seconds, cuts=(7,)):
    parts = torch.from_numpy(probabilities).float().split(cuts[0])
    frames = iter(frames_at(Fraction(number, 25) for number in range(len(probabilities))))
    labelled = [Labelled(list(islice(frames, len(part))), part) for part in parts]
    return torch.cat([part.probabilities for part in Smoother(seconds).smooth(labelled)]).numpy()


@given(tables, st.sampled_from([1, 5, 60]))
def test_smoothing_looks_back_only_and_not_at_how_frames_come_in(probabilities, cut):
    probabilities = probabilities + 0.01
    probabilities /= probabilities.sum(1, keepdims=True)
    found = smoothed(probabilities, 0.5, (cut,))
    assert np.allclose(found, smoothed(probabilities, 0.5), atol=1e-6)
    assert np.allclose(found.sum(1), 1, atol=1e-5)
    assert np.allclose(smoothed(probabilities, 0), probabilities, atol=1e-6)
    half = len(probabilities) // 2
    if half:
        assert np.allclose(found[:half], smoothed(probabilities[:half], 0.5), atol=1e-6)


@pytest.mark.parametrize("seconds", [0.4, 1.0, 2.0])
def test_a_new_action_has_63_percent_of_the_weight_after_the_time_constant(seconds):
    probabilities = np.repeat([[1.0, 0.0], [0.0, 1.0]], 50, axis=0)
    found = smoothed(probabilities, seconds)
    assert found[49, 1] == 0
    assert found[49 + round(25 * seconds), 1] == pytest.approx(1 - np.exp(-1), abs=0.01)


def test_tables_say_what_happens_when(tmp_path):
    probabilities = np.repeat([[0.9, 0.1], [0.2, 0.8]], [30, 20], axis=0)
    classes, found = ["Bow", "Run, fast"], segments(probabilities, probabilities.argmax(1))
    labels = probabilities.argmax(1)
    files = write_tables(
        tmp_path / "x.mp4", probabilities, labels, found, classes, Fraction(25), {"video": "x"}
    )
    assert [path.name for path in files] == ["x.mp4.json", "x.mp4.csv"]
    about = json.loads(files[0].read_text())
    assert (about["video"], about["frames"], about["fps"]) == ("x", 50, "25")
    assert [(one["action"], one["start_seconds"], one["end_seconds"]) for one in about["segments"]] == [
        ("Bow", 0, 1.2),
        ("Run, fast", 1.2, 2),
    ]
    assert [one["mean_probability"] for one in about["segments"]] == [0.9, 0.8]
    with files[1].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 50
    assert rows[30] == {
        "frame": "30",
        "second": "1.2",
        "action": "Run, fast",
        "Bow": "0.200000",
        "Run, fast": "0.800000",
    }


def test_tables_keep_times_that_are_not_even(tmp_path):
    probabilities = np.repeat([[0.9, 0.1], [0.2, 0.8]], [2, 3], axis=0)
    times = [Fraction(0), Fraction(1, 2), Fraction(3, 4), Fraction(2)]
    files = write_tables(
        tmp_path / "x.mp4",
        probabilities,
        probabilities.argmax(1),
        segments(probabilities, probabilities.argmax(1)),
        ["a", "b"],
        Fraction(25),
        {},
        times,
    )
    found = json.loads(files[0].read_text())["segments"]
    assert [(one["start_seconds"], one["end_seconds"]) for one in found] == [(0, 0.75), (0.75, 2.08)]
    with files[1].open(newline="") as file:
        assert [float(row["second"]) for row in csv.DictReader(file)] == [0, 0.5, 0.75, 2, 2.04]


def test_no_action_is_a_segment_and_named_so(tmp_path):
    probabilities = np.repeat([[0.9, 0.1], [0.3, 0.25], [0.2, 0.7]], 10, axis=0)
    labels = np.array([label_of(row, 0.4) for row in probabilities])
    assert labels.tolist() == [0] * 10 + [NONE] * 10 + [1] * 10
    found = segments(probabilities, labels)
    assert [round(segment.probability, 6) for segment in found] == [0.9, 0.3, 0.7]
    files = write_tables(tmp_path / "x", probabilities, labels, found, ["a", "b"], Fraction(25), {})
    assert [segment["action"] for segment in json.loads(files[0].read_text())["segments"]] == [
        "a", "no action", "b"
    ]  # fmt: skip
    with files[1].open(newline="") as file:
        assert [row["action"] for row in csv.DictReader(file)][9:11] == ["a", "no action"]


def settled(labels, seconds, begins=()):
    rows = ((number, label, number in begins, 0.1) for number, label in enumerate(labels))
    found = list(steady(rows, seconds))
    assert [row for row, _ in found] == list(range(len(labels)))
    return [label for _, label in found]


def test_what_is_too_short_has_the_label_before_it():
    assert settled([0] * 5 + [1] * 2 + [0] * 5, 0.3) == [0] * 12
    assert settled([0] * 5 + [1] * 3 + [0] * 5, 0.3) == [0] * 5 + [1] * 3 + [0] * 5
    assert settled([0] * 5 + [NONE] * 3, 0.3) == [0] * 5 + [NONE] * 3
    assert settled([0] * 5 + [1] * 2, 0.3) == [0] * 7, "at the end"
    assert settled([], 0.3) == []


def test_a_label_that_is_gone_does_not_hold_while_others_take_turns():
    assert settled([0] * 5 + [NONE, NONE, 1, 1, 1] * 4, 0.5) == [0] * 5 + [1] * 20
    assert settled([0] * 5 + [1, 2] * 4 + [3] * 5, 0.3)[5:8] == [1] * 3


def test_at_a_cut_labels_begin_anew_however_short_the_shot():
    assert settled([0] * 5 + [1] * 2 + [2] * 5, 0.5, begins=(0, 5, 7)) == [0] * 5 + [1] * 2 + [2] * 5
    assert settled([0] * 5 + [1] * 2 + [2] * 2, 0.5, begins=(0, 7)) == [0] * 7 + [2] * 2


@given(st.lists(st.integers(-1, 2), max_size=40), st.integers(0, 6))
def test_no_run_but_the_first_is_shorter_than_asked_for(labels, least):
    found = settled(labels, least / 10)
    if least <= 1:
        assert found == labels
    ends = [place for place in range(1, len(found)) if found[place] != found[place - 1]]
    assert all(end - start >= least for start, end in pairwise([*ends, len(found)]))
    assert all(
        label in labels[max(0, place - least) : place + least + 1] for place, label in enumerate(found)
    )


def test_frames_that_come_unevenly_count_by_their_time():
    """Ten frames in a second, then one a second: it is time that makes a label last, and weighs it."""
    rows = [(0, 0, True, 0.1)] + [(n, 0, False, 0.1) for n in range(1, 10)] + [(10, 1, False, 1.0)] * 2
    assert [label for _, label in steady(rows, 0.9)] == [0] * 10 + [1] * 2
    assert [label for _, label in steady([*rows[:10], *[(10, 1, False, 0.1)] * 5], 0.9)] == [0] * 15
    times = [0, 1, 2, Fraction(21, 10)]
    part = Labelled(frames_at(times), torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]))
    (found,) = Smoother(1).smooth([part])
    expected = [0, 0, 1 - np.exp(-1), 1 - np.exp(-1.1)]
    assert found.probabilities[:, 1].tolist() == pytest.approx(expected, abs=1e-6)


def test_live_a_label_follows_once_the_one_before_has_been_away():
    lasting = Steady(0.3)
    shown = [lasting.add(label, 0.1) for label in [0, 0, 1, 1, 0, 1, 2, 1, 1]]
    assert shown == [0, 0, 0, 0, 0, 0, 0, 1, 1]


def test_smoothing_begins_anew_at_a_cut():
    frames = frames_at(Fraction(number, 25) for number in range(15))
    parts = [
        Labelled(frames[:5], torch.tensor([[1.0, 0.0]] * 5), begins=True),
        Labelled(frames[5:10], torch.tensor([[0.0, 1.0]] * 5), begins=True),
        Labelled(frames[10:], torch.tensor([[1.0, 0.0]] * 5)),
    ]
    found = [part.probabilities for part in Smoother(1).smooth(parts)]
    assert torch.equal(found[1], parts[1].probabilities)
    assert 0.1 < found[2][-1, 0] < 0.3
