"""compare.py: several trainings, and what is written about them."""

import csv
import json
import re
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import pytest
import torch

import compare
from conftest import Outcome, Script, make_small
from training import jobs
from training.checkpoint import Checkpoint
from training.classifier import Classifier
from training.comparison import fill, job_name
from training.run import hold_folder
from utils.process import Interrupted

FLAGS = ["--img_dim", 32, "--sequence_length", 8, "--num_epochs", 1, "--precision", "fp32"]


def rows_of(folder):
    with (folder / "compare.csv").open(newline="") as file:
        return list(csv.DictReader(file))


ENCODERS = ["efficientnet_lite0", "efficientnet_lite0 --streams rgb,diff"]
MODELS = ["MeanPool", "ActionBERT --latent_dim 16 --pretrain 1"]


@dataclass(frozen=True)
class Compared:
    """A comparison that has ended: its flags but for the models, its folder, the data, what it printed."""

    flags: list[object]
    folder: Path
    data: Path
    done: Outcome


@pytest.fixture(scope="module")
def compared(toy, tmp_path_factory):
    path = tmp_path_factory.mktemp("compared")
    data, folder = make_small(toy, path / "small"), path / "compare"
    flags = ["--dataset_path", data / "UCF-101", "--split_path", data / "ucfTrainTestlist", *FLAGS]
    flags += ["--encoders", *ENCODERS, "--seeds", 1, "--split_number", 1, "--jobs", 2]
    done = Script("compare.py", *flags, "--models", *MODELS, "--run_path", folder).outcome()
    return Compared(flags, folder, data, done)


@pytest.mark.xdist_group("compared")
def test_encoders_and_models_are_compared_on_a_cache_each(compared):
    folder, done = compared.folder, compared.done
    assert done.status == 0, done.err
    text = (folder / "compare.md").read_text()
    assert "1 split, 2 test clips, 1 seed" in text
    rows = rows_of(folder)
    assert [(row["encoder"], row["model"]) for row in rows] == [
        (encoder, model) for encoder in ENCODERS for model in MODELS
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
    assert not list(folder.rglob("*.pth")), "checkpoints are not kept"
    assert len(list((compared.data / "UCF-101-embeddings").iterdir())) == 2, "a cache for each stream"


@pytest.mark.xdist_group("compared")
def test_what_is_finished_is_kept(call, compared, tmp_path):
    folder = tmp_path / "compare"
    shutil.copytree(compared.folder, folder)
    flags = [*compared.flags, "--run_path", folder]
    names = [job_name(encoder, "MeanPool", "split1", "seed0") for encoder in ENCODERS]
    report, path = folder / names[0] / "run/test/report.json", folder / f"{names[1]}.json"
    before, first = report.stat().st_mtime_ns, rows_of(folder)[0]
    # As if it had been interrupted.
    job = json.loads(path.read_text())
    path.write_text(json.dumps({name: job[name] for name in ("settings", "others")}))
    left = path.with_suffix("") / "run/curves.png"
    left.write_bytes(b"half")
    done = call(compare, *flags, "--models", *MODELS[:1])
    assert done.status == 0, done.err
    rows = rows_of(folder)
    assert [row["encoder"] for row in rows] == ENCODERS
    assert rows[0] == first
    assert report.stat().st_mtime_ns == before
    assert left.stat().st_size > 100
    done = call(compare, *flags, "--models", "MeanPool", "--num_epochs", 2)
    assert done.status == 2
    assert "num_epochs 1 there, 2 now" in done.one_line_error()
    # The same settings in other words.
    done = call(compare, "--num_epochs=1", *flags, "--models", "MeanPool", "--encoders", ENCODERS[0])
    assert done.status == 0, done.err
    assert "1 training kept from before" in done.out
    # Times of another --jobs are other times.
    path.write_text(json.dumps({**json.loads(path.read_text()), "side_by_side": 99}))
    assert call(compare, *flags, "--models", "MeanPool").status == 0
    assert rows_of(folder)[0]["training, s"] == ""
    report_path = path.with_suffix("") / "run/test/report.json"
    written = json.loads(report_path.read_text())
    for name, what in (("test_clips_sha256", "clips of split 1"), ("encoder_sha256", "weights of eff")):
        report_path.write_text(json.dumps({**written, name: "another"}))
        done = call(compare, *flags, "--models", *MODELS)
        assert what in done.one_line_error()
    path.write_text("{")
    done = call(compare, *flags, "--models", "MeanPool")
    assert "damaged, or of an earlier version" in done.one_line_error()
    filling = folder / f"{job_name('filling', ENCODERS[0])}.json"
    whole = filling.read_bytes()
    filling.write_text("{")
    done = call(compare, *flags, "--models", "MeanPool", "--encoders", ENCODERS[0])
    assert f"{filling}: damaged; delete it" in done.one_line_error()
    filling.write_bytes(whole)
    with hold_folder(folder):
        done = call(compare, *flags, "--models", "MeanPool", "--encoders", ENCODERS[0])
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
