"""compare.py: several trainings, and what is written about them."""

import csv
import json
import re
import signal
import subprocess
import time

import cv2
import pytest
import torch

import compare
from conftest import Script
from training import jobs
from training.checkpoint import Checkpoint
from training.classifier import Classifier
from training.comparison import fill
from training.run import hold_folder
from utils.process import Interrupted

FLAGS = ["--img_dim", 32, "--sequence_length", 8, "--num_epochs", 1, "--precision", "fp32"]


def rows_of(folder):
    with (folder / "compare.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_encoders_and_models_are_compared_on_a_cache_each(call, small, tmp_path):
    data = ["--dataset_path", small / "UCF-101", "--split_path", small / "ucfTrainTestlist"]
    names = ["--encoders", "efficientnet_lite0", "efficientnet_lite0 --streams rgb,diff"]
    names += ["--models", "MeanPool", "ActionBERT --latent_dim 16 --pretrain 1"]
    done = call(compare, *data, *FLAGS, *names, "--seeds", 1, "--split_number", 1, "--jobs", 2)
    assert done.status == 0, done.err
    folder = tmp_path / "runs/compare"
    text = (folder / "compare.md").read_text()
    assert "1 split, 2 test clips, 1 seed" in text
    rows = rows_of(folder)
    assert [(row["encoder"], row["model"]) for row in rows] == [
        (encoder, model) for encoder in names[1:3] for model in names[4:]
    ]
    for row in rows:
        assert f"| {row['model']} | {row['top-1, mean']} |" in text
        assert re.fullmatch(r"\d+\.\d %", row["top-1, mean"])
        assert float(row["top-1, mean"][:-2]) == pytest.approx(float(row["split 1"]), abs=0.06)
        assert row["trained on"] == "ImageNet"
        assert float(row["training, s"]) > 0
        assert int(row["clips/s"].replace(",", "")) > 0
    assert float(rows[0]["filling, s"]) > 0
    assert re.fullmatch(r"\d+ for a part", rows[2]["filling, s"]), "rgb was kept when diff was encoded"
    assert "encoding:" in done.err, "a bar"
    # 1280 weights and a bias for each of two classes, and both again for a second stream.
    assert (rows[0]["trained parameters"], rows[2]["trained parameters"]) == ("2,562", "5,124")
    assert min(cv2.imread(str(folder / "compare.png")).shape[:2]) > 100
    assert not list(tmp_path.rglob("*.pth")), "checkpoints are not kept"
    assert len(list((small / "UCF-101-embeddings").iterdir())) == 2, "a cache for each stream"


def test_what_is_finished_is_kept(call, small, tmp_path):
    data = ["--dataset_path", small / "UCF-101", "--split_path", small / "ucfTrainTestlist", *FLAGS]
    flags = [*data, "--encoders", "efficientnet_lite0", "--seeds", 1, "--split_number", 1]
    done = call(compare, *flags, "--models", "MeanPool,ConvClassifier", "--jobs", 2)
    assert done.status == 0, done.err
    folder = tmp_path / "runs/compare"
    report = folder / "efficientnet_lite0-MeanPool-split1-seed0/run/test/report.json"
    before, first = report.stat().st_mtime_ns, rows_of(folder)[0]
    # As if it had been interrupted.
    path = folder / "efficientnet_lite0-ConvClassifier-split1-seed0.json"
    job = json.loads(path.read_text())
    path.write_text(json.dumps({name: job[name] for name in ("settings", "others")}))
    left = path.with_suffix("") / "run/curves.png"
    left.write_bytes(b"half")
    done = call(compare, *flags, "--models", "MeanPool", "ConvClassifier", "--jobs", 2)
    assert done.status == 0, done.err
    rows = rows_of(folder)
    assert [row["model"] for row in rows] == ["MeanPool", "ConvClassifier"]
    assert rows[0] == first
    assert report.stat().st_mtime_ns == before
    assert left.stat().st_size > 100
    done = call(compare, *flags, "--models", "MeanPool", "--num_epochs", 2)
    assert done.status == 2
    assert "num_epochs 1 there, 2 now" in done.one_line_error()
    # The same settings in other words.
    done = call(compare, "--num_epochs=1", *flags, "--models", "MeanPool")
    assert done.status == 0, done.err
    assert "1 training kept from before" in done.out
    # Times of another --jobs are other times.
    path.write_text(json.dumps({**json.loads(path.read_text()), "side_by_side": 99}))
    assert (
        call(compare, *flags[:-4], "--seeds", 2, "--split_number", 1, "--models", "ConvClassifier").status
        == 0
    )
    assert rows_of(folder)[0]["training, s"] == ""
    report_path = path.with_suffix("") / "run/test/report.json"
    written = json.loads(report_path.read_text())
    for name, what in (("test_clips_sha256", "clips of split 1"), ("encoder_sha256", "weights of eff")):
        report_path.write_text(json.dumps({**written, name: "another"}))
        done = call(compare, *flags, "--models", "MeanPool,ConvClassifier")
        assert what in done.one_line_error()
    path.write_text("{")
    done = call(compare, *flags, "--models", "ConvClassifier")
    assert "damaged, or of an earlier version" in done.one_line_error()
    with hold_folder(folder):
        done = call(compare, *flags, "--models", "MeanPool")
    assert "another --run_path" in done.one_line_error()
    assert report.stat().st_mtime_ns == before


def test_sigterm_ends_the_trainings_too(small, tmp_path):
    data = ["--dataset_path", small / "UCF-101", "--split_path", small / "ucfTrainTestlist", *FLAGS[:-4]]
    flags = ["--encoders", "efficientnet_lite0", "--models", "MeanPool", "--seeds", 1, "--split_number", 1]
    flags += ["--num_epochs", 100_000, "--run_path", tmp_path / "compare"]
    process = Script("compare.py", *data, *flags)
    log = tmp_path / "compare/efficientnet_lite0-MeanPool-split1-seed0/train.log"
    ends = time.monotonic() + 120
    while not (log.exists() and "epoch 1 of" in log.read_text()):
        assert time.monotonic() < ends
        time.sleep(0.2)
    process._process.terminate()
    done = process.outcome()
    assert done.status == 128 + signal.SIGTERM
    before = log.stat().st_size
    time.sleep(1)
    assert log.stat().st_size == before, "nothing trains any more"


def test_filling_that_is_interrupted_leaves_no_process(monkeypatch, tmp_path):
    pid = tmp_path / "pid"
    text = f"import os, time\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)\n"
    (tmp_path / "features.py").write_text(text)
    monkeypatch.setattr(jobs, "ROOT", tmp_path)

    def interrupt(*_):
        raise Interrupted(signal.SIGTERM)

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 2)
    try:
        with pytest.raises(Interrupted):
            fill("i3d", [], tmp_path)
    finally:
        signal.signal(signal.SIGALRM, before)
    ends = time.monotonic() + 20
    state = ["ps", "-o", "stat=", "-p", pid.read_text()]
    # A zombie has ended.
    while subprocess.run(state, capture_output=True, text=True, check=False).stdout.strip()[:1] not in "Z":
        assert time.monotonic() < ends
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--models", "GoogleNet"], "unknown model 'GoogleNet'"),
        (["--models", ""], "unknown model ''"),
        (["--encoders", "i3d,r5d"], "unknown encoder 'r5d'"),
        (["--seed", "3"], "is set here"),
        (["--encoder", "i3d"], "is set here"),
        (["--encoder=i3d"], "is set here"),
        (["--resu"], "is set here"),
        (["--models", "MeanPool --encoder i3d"], "is set here"),
        (["--encoders", "i3d --split_number 1"], "is set here"),
        (["--models", "MeanPool --nope 3"], "--nope"),
        (["--models", "MeanPool --x 'a"], "No closing quotation"),
        (["--models", "MeanPool --pretrain 3"], "cannot tell one from the others"),
        (["--models", "MeanPool,MeanPool"], "twice"),
        (["--split_number", "random"], "listed"),
        (["--num_epochs", "0"], "num_epochs"),
    ],
)
def test_wrong_flags_end_in_one_line(call, small, flags, reason):
    data = ["--dataset_path", small / "UCF-101", "--split_path", small / "ucfTrainTestlist"]
    done = call(compare, *data, *flags)
    assert done.status == 2
    assert reason in done.one_line_error()


def test_lists_that_are_not_there_are_told(call, tmp_path):
    done = call(compare, "--models", "MeanPool", "--seeds", 1, "--split_path", tmp_path / "nothing")
    assert done.status == 1
    assert "nothing" in done.one_line_error()


def test_the_head_is_timed_on_the_device_of_the_training(monkeypatch):
    seen = []
    model = Classifier("MeanPool", 2, encoder="tiny")
    monkeypatch.setattr(model, "to", lambda device: seen.append(device) or model)
    rate = jobs.classify_rate(Checkpoint(model, ["a", "b"], 32, 8, None, 0), torch.device("cpu", 0), 1)
    assert rate > 0
    assert seen == [torch.device("cpu", 0)]
