"""The figures and files of a test, against scikit-learn on what predictions.csv holds."""

import csv
import io
import json

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn import metrics

import test as test_script
from conftest import data_flags, trained_in
from splits.split import Clip
from splits.ucf101 import source
from training import pictures, report
from training.pictures import confusion_matrix
from video.reader import Video

CLASSES = ["Archery", "Bowling", "Diving", "Fencing", "Lunges", "Mixing", "Rowing"]


def clips_of(labels, groups):
    names = [
        f"{CLASSES[label]}/v_{CLASSES[label]}_g{group:02d}_c{number:02d}.avi"
        for number, (label, group) in enumerate(zip(labels, groups, strict=True))
    ]
    return [Clip(name, label, Video(name), source(name)) for name, label in zip(names, labels, strict=True)]


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def tested(toy, tmp_path_factory):
    """Three epochs on the toy data, and tests of the last one, of clips in order and out of order."""
    folder = tmp_path_factory.mktemp("tested")
    trained_in(folder, toy, "--num_epochs", 3, "--learning_rate", "1e-3")
    flags = [*map(str, data_flags(toy)), "--checkpoint_model", str(folder / "out/ConvLSTM_3.pth")]
    flags += ["--precision", "fp32"]
    test_script.main([*flags, "--run_path", str(folder / "one")])
    test_script.main([*flags, "--run_path", str(folder / "shuffled"), "--shuffle_frames"])
    return folder


@pytest.mark.parametrize("name", ["run/test", "one", "shuffled"])
def test_figures_are_scikit_learns_on_the_predictions_that_are_written(tested, name):
    folder = tested / name
    written = json.loads((folder / "report.json").read_text())
    rows = read(folder / "predictions.csv")
    classes = list(rows[0])[5:]
    labels = np.array([classes.index(row["label"]) for row in rows])
    probabilities = np.array([[float(row[one]) for one in classes] for row in rows])
    assert len({row["clip"] for row in rows}) == len(rows) == 16, "every test clip once"
    assert np.allclose(probabilities.sum(1), 1)
    said = probabilities.argmax(1)
    assert [row["predicted"] for row in rows] == [classes[label] for label in said]
    found = written["figures"]
    assert found["clips"] == 16
    assert found["top1_percent"] == pytest.approx(100 * metrics.accuracy_score(labels, said))
    top5 = metrics.top_k_accuracy_score(labels, probabilities, k=5, labels=range(8))
    assert found["top5_percent"] == pytest.approx(100 * top5)
    assert found["loss_nats"] == pytest.approx(metrics.log_loss(labels, probabilities, labels=range(8)))
    balanced = metrics.balanced_accuracy_score(labels, said)
    assert found["mean_class_accuracy_percent"] == pytest.approx(100 * balanced)
    per_class = read(folder / "classes.csv")
    assert sum(int(row["correct"]) for row in per_class) == (labels == said).sum()
    sure = [one["probability"] for one in written["mistakes"]]
    assert sure == sorted(sure, reverse=True)
    assert {one["clip"] for one in written["mistakes"]} == {r["clip"] for r in rows if r["correct"] == "0"}


def test_a_test_of_the_checkpoint_gives_what_training_said_and_another_order_another(tested):
    def figures(name):
        return json.loads((tested / name / "report.json").read_text())["figures"]

    assert figures("run/test") == figures("one")
    assert figures("one")["loss_nats"] != figures("shuffled")["loss_nats"]


def test_everything_to_repeat_the_test_is_there(tested):
    written = json.loads((tested / "shuffled/report.json").read_text())
    assert written["frames_shuffled"] is True
    assert len(written["checkpoint_sha256"]) == len(written["encoder_sha256"]) == 64
    assert written["training"]["seed"] == 0
    assert written["versions"]["torch"]


@pytest.mark.parametrize("name", ["confusion.png", "reliability.png", "mistakes.png"])
def test_pictures_are_there(tested, name):
    for folder in ("run/test", "one"):
        picture = cv2.imread(str(tested / folder / name))
        assert min(picture.shape[:2]) > 200
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20, "something is drawn"


@settings(max_examples=30, deadline=None)
@given(
    labels=st.lists(st.integers(0, 6), min_size=1, max_size=40),
    seed=st.integers(0, 1000),
)
def test_figures_of_any_predictions(labels, seed, tmp_path_factory):
    """Classes that are never tested, a single group, everything right: all have a report."""
    rng = np.random.default_rng(seed)
    clips = clips_of(labels, rng.integers(1, 4, len(labels)))
    probabilities = rng.dirichlet(np.ones(7), len(labels))
    predictions = report.Predictions(CLASSES, clips, probabilities)
    found = report.figures(predictions)
    assert found["correct"] == sum(probabilities.argmax(1) == labels)
    ends = found["top1_interval95_percent"]
    assert (ends is None) == (len({clip.group for clip in clips}) == 1)
    if ends is not None:
        assert 0 <= ends[0] <= found["top1_percent"] + 1e-9
        assert found["top1_percent"] - 1e-9 <= ends[1] <= 100


def test_the_interval_knows_that_clips_of_a_group_stand_or_fall_together():
    correct = np.repeat([True, False], 100)
    by_clip = report.interval(correct, [str(index) for index in range(200)])
    by_group = report.interval(correct, [str(index // 20) for index in range(200)])
    # The standard error of a share of one half: of 200 clips, and of 10 groups.
    assert by_clip[1] - by_clip[0] == pytest.approx(100 * 2 * 1.96 * 0.5 / 200**0.5, rel=0.1)
    assert by_group[1] - by_group[0] == pytest.approx(100 * 2 * 1.96 * 0.5 / 10**0.5, rel=0.1)


def test_where_all_are_right_the_interval_still_has_a_width():
    groups = [str(index // 5) for index in range(100)]
    low, high = report.interval(np.ones(100, bool), groups)
    # 20 groups: less often right than this, all would be right in fewer than one case of 40.
    assert (low, high) == (pytest.approx(100 * 0.025 ** (1 / 20)), 100)
    assert report.interval(np.zeros(100, bool), groups) == (0, pytest.approx(100 - low))


def test_a_picture_of_101_classes_has_room_for_their_names(tmp_path):
    classes = [f"ActionNumber{number}" for number in range(101)]
    clips = [Clip(f"{name}/v_{name}_g01_c01.avi", label, Video(name)) for label, name in enumerate(classes)]
    probabilities = np.full((101, 101), 0.001) + 0.9 * np.eye(101)
    probabilities /= probabilities.sum(1, keepdims=True)
    about = {"model": "ConvLSTM", "encoder": "tiny", "split_number": 1}
    about |= {"temperature": 1.0}
    report.write_report(tmp_path, report.Predictions(classes, clips, probabilities), about)
    assert cv2.imread(str(tmp_path / "confusion.png")).shape[0] > 101 * 20
    assert not (tmp_path / "mistakes.png").exists()


def test_pictures_of_very_many_classes_show_the_worst(monkeypatch):
    monkeypatch.setattr(pictures, "PICTURED_CLASSES", 30)
    names, labels = [f"class {number}" for number in range(10_000)], np.arange(10_000)
    predicted = labels.copy()
    predicted[5000:5010] = 0
    contents = confusion_matrix(names, labels, predicted, "title")
    assert max(Image.open(io.BytesIO(contents)).size) < 1_500
