"""Temperatures and calibration errors."""

import csv
import json

import cv2
import numpy as np
import pytest
import torch

import export
import test as test_script
import train
from annotation.onnx_model import OnnxModel
from conftest import trained_in
from splits.split import Clip
from training import report
from training.calibration import Reliability, fit_temperature, with_temperature
from training.checkpoint import load_checkpoint
from video.reader import Video


def drawn(temperature, clips=20_000, classes=5):
    """Logits, and labels that are drawn by their probabilities at some temperature."""
    numbers = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(clips, classes, generator=numbers)
    labels = torch.multinomial((logits / temperature).softmax(1), 1, generator=numbers)[:, 0]
    return logits, labels


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_is_the_one_that_labels_were_drawn_with(temperature):
    logits, labels = drawn(temperature)
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(temperature, rel=0.05)
    before = Reliability.of(logits.softmax(1).numpy(), labels.numpy()).error
    after = Reliability.of((logits / found).softmax(1).numpy(), labels.numpy()).error
    assert after < 0.01
    assert after < before or temperature == 1


@pytest.mark.parametrize("clips", [10, 100])
def test_clips_that_are_all_right_do_not_ask_for_certainty(clips):
    labels = torch.arange(clips) % 4
    logits = torch.nn.functional.one_hot(labels, 4).float()
    probability = (logits / fit_temperature(logits, labels)).softmax(1).max(1).values
    assert probability.mean().item() == pytest.approx((clips + 1) / (clips + 2), abs=1e-3)


def test_classes_that_no_clip_shows_do_not_make_it_unsure():
    logits, labels = drawn(1.0, clips=200)
    never = torch.full((len(logits), 96), -40.0)
    found = fit_temperature(torch.cat([logits, never], dim=1), labels)
    assert found == pytest.approx(fit_temperature(logits, labels), rel=1e-3)


def test_answers_no_better_than_chance_are_not_sure():
    logits = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    wrong = (logits.argmax(1) + 1) % 5
    assert (logits / fit_temperature(logits, wrong)).softmax(1).max(1).values.mean() < 0.25


def test_there_may_be_nothing_to_fit():
    assert fit_temperature(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)) == 1
    assert fit_temperature(torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64)) == 1


def test_a_temperature_can_be_put_on_probabilities_and_taken_off():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain, scaled = logits.softmax(1).numpy(), (logits / 2.5).softmax(1).numpy()
    assert np.allclose(with_temperature(plain, 2.5), scaled)
    assert np.allclose(with_temperature(scaled, 1 / 2.5), plain)
    certain = np.array([[1.0, 0.0]])
    assert np.allclose(with_temperature(certain, 1.5), certain)


def test_the_calibration_error_by_hand():
    """Of four answers at 0.9 three are right, of two at 0.6 none: (4 x 0.15 + 2 x 0.6) / 6."""
    probabilities = np.array([[0.9, 0.1]] * 4 + [[0.4, 0.6]] * 2)
    found = Reliability.of(probabilities, np.array([0, 0, 0, 1, 0, 0]), bins=10)
    assert found.error == pytest.approx(0.3)
    assert found.counts.tolist() == [0, 0, 0, 0, 0, 2, 0, 0, 4, 0]
    assert found.accuracy[8] == pytest.approx(0.75)
    assert Reliability.of(np.ones((3, 1)), np.zeros(3, int)).error == 0


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory):
    """The last checkpoint of a training that holds groups out."""
    folder = tmp_path_factory.mktemp("trained")
    trained_in(folder, toy, "--num_epochs", 2, "--learning_rate", "1e-3", "--val_fraction", 0.3)
    return folder / "out/ConvLSTM_2.pth"


def test_a_temperature_from_held_out_groups_is_in_the_checkpoint_and_used(call, trained, toy, tmp_path):
    checkpoint = load_checkpoint(trained)
    temperature = checkpoint.head.temperature
    assert temperature != 1
    data = ["--dataset_path", toy / "UCF-101", "--checkpoint_model", trained, "--run_path", tmp_path / "t"]
    done = call(test_script, *data, "--precision", "fp32")
    assert done.status == 0, done.err
    figures = json.loads((tmp_path / "t/report.json").read_text())["figures"]
    assert "calibration error" not in done.out, "of 16 clips it is chance"
    with (tmp_path / "t/predictions.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    probabilities = np.array([row[5:] for row in rows[1:]], float)
    labels = np.array([rows[0][5:].index(row[2]) for row in rows[1:]])
    for applied, name in (
        (1, "calibration_error_percent"),
        (1 / temperature, "calibration_error_without_temperature_percent"),
    ):
        error = Reliability.of(with_temperature(probabilities, applied), labels).error
        assert figures[name] == pytest.approx(100 * error)


def test_an_exported_model_has_the_temperature(call, trained, tmp_path):
    pytest.importorskip("onnxruntime")
    assert call(export, "--checkpoint_model", trained, "--output", tmp_path / "onnx").status == 0
    checkpoint, exported = load_checkpoint(trained), OnnxModel(tmp_path / "onnx")
    clips = torch.randn(3, checkpoint.sequence_length, checkpoint.encoder.width)
    with torch.no_grad():
        assert torch.allclose(exported.head.classify(clips), checkpoint.head.classify(clips), atol=1e-3)


def test_the_most_certain_mistakes_are_shown(trained):
    folder = trained.parent.parent / "run/test"
    report = json.loads((folder / "report.json").read_text())
    picture = cv2.imread(str(folder / "mistakes.png"))
    assert picture.shape[0] == 180 * min(12, len(report["mistakes"]))


def test_training_from_a_checkpoint_begins_without_its_temperature(call, trained, toy, train_flags, tmp_path):
    def losses(path):
        flags = ["--checkpoint_model", path, "--num_epochs", 1, "--run_path", tmp_path / path.stem]
        done = call(train, *train_flags(toy), *flags, "--output_path", tmp_path / f"out-{path.stem}")
        assert done.status == 0, done.err
        return (tmp_path / path.stem / "history.csv").read_text().splitlines()[1].split(",")[1]

    contents = torch.load(trained, weights_only=True)
    torch.save({**contents, "temperature": 1.0}, tmp_path / "plain.pth")
    assert losses(trained) == losses(tmp_path / "plain.pth")


def test_a_clip_that_is_gone_costs_no_report(tmp_path):
    clips = [Clip("a/x.avi", 0, Video(tmp_path / "gone.avi")), Clip("b/y.avi", 1, Video(tmp_path / "y.avi"))]
    predictions = report.Predictions(["a", "b"], clips, np.array([[0.2, 0.8], [0.3, 0.7]]))
    about = {"model": "LinearProbe", "encoder": "tiny", "split_number": 1, "temperature": 1.0}
    report.write_report(tmp_path, predictions, about)
    assert json.loads((tmp_path / "report.json").read_text())["mistakes"][0]["clip"] == "a/x.avi"
    assert (tmp_path / "mistakes.png").is_file()
