"""A run's folder: what shows its course, with no display and nobody looking."""

import csv
import signal

import cv2
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_run import stop_after

import train
from conftest import ROOT, run_script

FLAGS = ("--num_epochs", 3, "--batch_size", 2, "--latent_dim", 8, "--val_fraction", 0.5)


def rows(folder):
    with (folder / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def scalars(folder, tag):
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_all_files_are_there_without_a_display(call, small, train_flags, tmp_path):
    done = call(train, *train_flags(small), *FLAGS, "--checkpoint_interval", 2)
    assert done.status == 0, done.err
    folder = tmp_path / "runs/ConvLSTM-tiny-32px-split1-default-seed0"
    assert f"figures and curves in {folder.relative_to(tmp_path)}" in done.out
    epochs = rows(folder)
    assert [one["epoch"] for one in epochs] == ["1", "2", "3"]
    assert [bool(one["test_loss"]) for one in epochs] == [False, True, True]
    assert all(float(one["clips_per_second"]) > 0 for one in epochs)
    for name, tag in (("train_loss", "loss/train"), ("val_accuracy", "accuracy/val")):
        expected = [(int(one["epoch"]), pytest.approx(float(one[name]), rel=1e-5)) for one in epochs]
        assert scalars(folder, tag) == expected
    assert {"learning_rate", "clips_per_second", "loss/test"} <= set(
        EventAccumulator(str(folder)).Reload().Tags()["scalars"]
    )
    picture = cv2.imread(str(folder / "curves.png"))
    assert min(picture.shape[:2]) > 200
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20
    assert (folder / "test/report.json").is_file()


def test_a_second_run_leaves_the_first_ones_folder_alone(call, small, train_flags, tmp_path):
    for _ in range(2):
        done = call(train, *train_flags(small), *FLAGS, "--run_path", "mine")
        assert done.status == 0, done.err
    assert len(rows(tmp_path / "mine")) == len(rows(tmp_path / "mine-2")) == 3


def test_a_resumed_run_goes_on_in_its_folder(call, small, train_flags, tmp_path, monkeypatch):
    whole = call(train, *train_flags(small), *FLAGS, "--output_path", "whole", "--run_path", "whole-run")
    assert whole.status == 0, whole.err
    with monkeypatch.context() as patch:
        # Two batches and a validation in the first epoch: here in the second.
        stop_after(patch, 5, signal.SIGTERM)
        done = call(train, *train_flags(small), *FLAGS, "--output_path", "cut", "--run_path", "cut-run")
    assert done.status == 128 + signal.SIGTERM
    assert len(rows(tmp_path / "cut-run")) < 3
    done = call(train, "--resume", "--output_path", "cut")
    assert done.status == 0, done.err
    assert not (tmp_path / "cut-run-2").exists()

    def figures(name):
        return [{**one, "clips_per_second": "", "seconds": ""} for one in rows(tmp_path / name)]

    assert figures("cut-run") == figures("whole-run")
    assert scalars(tmp_path / "cut-run", "loss/train") == scalars(tmp_path / "whole-run", "loss/train")


def test_a_folder_that_cannot_be_written_is_one_line(call, small, train_flags, tmp_path):
    (tmp_path / "file").touch()
    done = call(train, *train_flags(small), *FLAGS, "--run_path", tmp_path / "file" / "run")
    assert done.status == 1
    assert "file" in done.one_line_error()


def test_help_needs_no_display():
    done = run_script("train.py", "--help", cwd=ROOT, MPLBACKEND="TkAgg", DISPLAY="")
    assert done.status == 0, done.err
    assert "--recipe" in done.out
