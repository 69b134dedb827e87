"""compare.py: several trainings, and what is written about them."""

import csv
import re

import cv2
import pytest
import torch

import compare
from training.checkpoint import Checkpoint
from training.classifier import Classifier


def test_models_are_compared_on_one_cache(call, small, tmp_path):
    data = ["--dataset_path", small / "UCF-101", "--split_path", small / "ucfTrainTestlist"]
    flags = ["--encoder", "efficientnet_lite0", "--img_dim", 32, "--sequence_length", 8, "--num_epochs", 1]
    models = ["--models", "MeanPool", "ActionBERT --latent_dim 16 --pretrain 1", "--seeds", 1]
    done = call(compare, *data, *flags, *models)
    assert done.status == 0, done.err
    folder = tmp_path / "runs/compare"
    text = (folder / "compare.md").read_text()
    assert "2 test clips, 1 seeds" in text
    with (folder / "compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["MeanPool", "ActionBERT --latent_dim 16 --pretrain 1"]
    for row in rows:
        assert f"| {row['model']} | {row['top-1, mean']} |" in text
        assert re.fullmatch(r"\d+\.\d %", row["top-1, mean"])
        assert float(row["training, s"]) > 0
        assert int(row["clips/s"].replace(",", "")) > 0
    # 1280 weights and a bias for each of two classes.
    assert rows[0]["trained parameters"] == "2,562"
    assert min(cv2.imread(str(folder / "compare.png")).shape[:2]) > 100
    assert not list(tmp_path.rglob("*.pth")), "checkpoints are not kept"
    assert len(list((small / "UCF-101-embeddings").iterdir())) == 1, "one cache"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--models", "GoogleNet"], "no such model"),
        (["--models", ""], "no such model"),
        (["--seed", "3"], "is set here"),
    ],
)
def test_wrong_flags_end_in_one_line(call, flags, reason):
    done = call(compare, *flags)
    assert done.status == 2
    assert reason in done.one_line_error()


def test_what_train_py_says_is_passed_on(call, tmp_path):
    done = call(compare, "--models", "MeanPool", "--seeds", 1, "--split_path", tmp_path / "nothing")
    assert done.status == 1
    assert "nothing" in done.one_line_error()


def test_the_head_is_timed_on_the_device_of_the_training(monkeypatch):
    seen = []
    model = Classifier("MeanPool", 2, encoder="tiny")
    monkeypatch.setattr(model, "to", lambda device: seen.append(device) or model)
    rate = compare.classify_rate(Checkpoint(model, ["a", "b"], 32, 8, None, 0), torch.device("cpu", 0), 1)
    assert rate > 0
    assert seen == [torch.device("cpu", 0)]
