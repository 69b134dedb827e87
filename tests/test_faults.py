"""What goes wrong in a long run, made to happen: disks, workers, caches, clips, memory."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import dataset
import test as test_script
import test_on_video
import train
from conftest import ROOT, Outcome, Script, run_script, save_untrained, ucf101_at
from features import fill
from features.cache import CacheError
from features.encoder import Encoder
from features.shard_writer import ShardWriter
from splits.datasets import load_split
from splits.split import Shard
from training import evaluate
from training.checkpoint import load_checkpoint, save_checkpoint


def limited(limit, script, *flags):
    """Run a command that may write no file of more than `limit` bytes, as on a disk that is full then."""
    return Script(script, *flags, file_limit=limit).outcome()


@pytest.fixture
def lite0(small):
    """Flags that train on a data set with a real encoder, for commands in processes of their own."""
    data = ["--dataset_path", small / "UCF-101", "--split_path", small / "ucfTrainTestlist"]
    sizes = ["--img_dim", 32, "--precision", "fp32"]
    return [*data, "--encoder", "efficientnet_lite0", *sizes]


TRAIN = ("--sequence_length", 8, "--latent_dim", 8, "--num_epochs", 1)


@pytest.mark.full_size
def test_a_full_disk_leaves_earlier_checkpoints_and_names_path_and_bytes(call, lite0, tmp_path):
    flags = [*lite0, *TRAIN, "--output_path", tmp_path / "out"]
    assert call(train, *flags).status == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.pth")}
    done = limited(10_000_000, "train.py", *flags)
    assert done.status == 1
    error = done.one_line_error()
    assert str(tmp_path / "out" / "last.pth") in error
    needed = int(error.split("cannot write ")[1].split(" bytes")[0].replace(",", ""))
    assert needed == pytest.approx(len(before["last.pth"]), rel=0.8)
    earlier = tmp_path / "out" / "earlier-1"
    assert {path.name: path.read_bytes() for path in earlier.iterdir()} == before
    assert not list((tmp_path / "out").glob("*.partial*")) + list((tmp_path / "out").glob(".*.partial*"))


def test_a_full_disk_keeps_what_is_encoded_and_the_cache_goes_on(call, lite0, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert call(fill, *lite0, "--cache_path", whole).status == 0
    (rows,) = whole.glob("*/embeddings.npy")
    done = limited(rows.stat().st_size * 2 // 3, "features.py", *lite0, "--cache_path", cut)
    assert done.status == 1
    error = done.one_line_error()
    assert str(cut) in error
    assert "bytes were needed" in error
    done = call(fill, *lite0, "--cache_path", cut)
    assert done.status == 0, done.err
    for path in rows.parent.iterdir():
        assert (cut / rows.parent.name / path.name).read_bytes() == path.read_bytes(), path.name


def descendants(pid):
    children = [
        int(stat.parent.name)
        for stat in Path("/proc").glob("[0-9]*/stat")
        if (fields := stat.read_text().rsplit(")", 1)[1].split()) and int(fields[1]) == pid
    ]
    return children + [one for child in children for one in descendants(child)]


def test_a_dead_worker_ends_in_one_line(lite0, tmp_path):
    flags = [*lite0, *TRAIN, "--cache", "off", "--num_workers", 1, "--num_epochs", 500]
    command = [sys.executable, "train.py", *map(str, flags), "--output_path", str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # The worker is the forkserver's child.
    deadline = time.monotonic() + 60
    while not (workers := [two for one in descendants(process.pid) for two in descendants(one)]):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(2)
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    done = Outcome(process.returncode, out, err)
    assert done.status == 1
    assert "--num_workers" in done.one_line_error()


def test_a_damaged_cache_is_noticed_and_names_the_clip(call, small, train_flags, tmp_path):
    flags = [*train_flags(small), *TRAIN, "--cache_path", tmp_path / "cache"]
    assert call(train, *flags).status == 0
    (path,) = (tmp_path / "cache").glob("*/embeddings.npy")
    checking = ["check", *train_flags(small)[:4], "--cache_path", tmp_path / "cache"]
    done = call(dataset, *checking)
    assert done.status == 0, done.out
    assert f"{path.parent}: 6 clips read" in done.out
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    done = call(dataset, *checking)
    assert done.status == 1
    (fault,) = [line for line in done.out.splitlines() if line.startswith("fault")]
    assert "1 clips are damaged, the first WalkRight/v_WalkRight_g03_c01.avi" in fault
    assert str(path.parent) in fault


def test_a_disk_that_gives_back_other_bytes_is_noticed_when_filling_ends(small, tmp_path, monkeypatch):
    clips = load_split(ucf101_at(small), 1).train
    add_rows = ShardWriter.add_rows

    def spoiled(self, rows):
        add_rows(self, rows)
        self._data.seek(-2, 1)
        self._data.write(b"\x11\x22")

    monkeypatch.setattr(ShardWriter, "add_rows", spoiled)
    with pytest.raises(CacheError, match=r"does not give back what was written, for WalkLeft/v_WalkLeft_g02"):
        fill.open_cache(tmp_path, clips, Encoder("tiny"), 32, flip=False)


@pytest.mark.parametrize("cache", ["disk", "off"])
def test_a_clip_that_goes_while_training(call, small, train_flags, tmp_path, monkeypatch, cache):
    """With the cache it is not needed any more; without it the error names it."""
    clip = small / "UCF-101/WalkLeft/v_WalkLeft_g02_c01.avi"
    add = evaluate.Tally.add

    def removing(self, *figures):
        add(self, *figures)
        clip.unlink(missing_ok=True)

    monkeypatch.setattr(evaluate.Tally, "add", removing)
    done = call(train, *train_flags(small), *TRAIN, "--num_epochs", 2, "--cache", cache)
    if cache == "disk":
        assert done.status == 0, done.err
    else:
        assert done.status == 1
        assert clip.name in done.one_line_error()
        assert load_checkpoint(tmp_path / "model_checkpoints/last.pth").training is not None


def test_a_test_clip_that_goes_while_training_is_not_needed_either(
    call, small, train_flags, tmp_path, monkeypatch
):
    clip = small / "UCF-101/WalkLeft/v_WalkLeft_g01_c01.avi"
    add = evaluate.Tally.add

    def removing(self, *figures):
        add(self, *figures)
        clip.unlink(missing_ok=True)

    monkeypatch.setattr(evaluate.Tally, "add", removing)
    done = call(train, *train_flags(small), *TRAIN, "--num_epochs", 2)
    assert done.status == 0, done.err
    assert "of 2 clips" in done.out


def test_shards_are_read_as_one_and_miss_nothing(call, small, train_flags, tmp_path, monkeypatch):
    data = train_flags(small)[:4]
    encoder = ["--encoder", "tiny", "--img_dim", 32, "--precision", "fp32"]
    for number, count in ((1, 2), (2, 2)):
        done = call(
            fill, *data, *encoder, "--shard", f"{number}/{count}", "--cache_path", tmp_path / str(number)
        )
        assert done.status == 0, done.err
        assert "3 of 6 clips" in done.out
    (first,), (second,) = (tmp_path / "1").iterdir(), (tmp_path / "2").iterdir()
    for path in second.glob("*2of2*"):
        path.rename(first / path.name)
    done = call(train, *train_flags(small), *TRAIN, "--cache_path", tmp_path / "1")
    assert done.status == 0, done.err
    assert "encoding" not in done.out
    alone = call(train, *train_flags(small), *TRAIN, "--cache_path", tmp_path / "alone")
    assert [line for line in alone.out.splitlines() if "nats" in line] == [
        line for line in done.out.splitlines() if "nats" in line
    ]
    for wrong in ("3/2", "0/2", "x"):
        done = call(fill, *data, "--shard", wrong)
        assert (done.status, wrong in done.one_line_error()) == (2, True)


def test_shards_share_the_clips_whatever_their_order(small):
    clips = load_split(ucf101_at(small), 1).train
    parts = [Shard(number, 3).part(order) for number in (1, 2, 3) for order in (clips, clips[::-1])]
    assert parts[::2] == parts[1::2]
    assert sorted(clip.name for part in parts[::2] for clip in part) == sorted(clip.name for clip in clips)


def test_spoiled_files_end_well_or_in_one_line():
    done = run_script("tests/stress/fuzz.py", "--cases", 24, "--seed", 3)
    assert done.status == 0, done.out
    assert "24 cases, seed 3: 0 ended badly" in done.out


def test_an_embedding_index_that_lies_is_refused(small, tmp_path):
    folder = tmp_path / "cache"
    encoder = Encoder("tiny")
    clips = load_split(ucf101_at(small), 1).train
    cache = fill.open_cache(folder, clips, encoder, 32, flip=False)
    index = cache.folder / "index.jsonl"
    line = index.read_text().splitlines()[0]
    for wrong in ('"row": -5', '"row": 1e3', '"row": "0"', '"row": 99999999999999999999'):
        index.write_text(line.replace('"row": 0', wrong) + "\n")
        with pytest.raises(CacheError, match="delete the folder"):
            fill.open_cache(folder, clips, encoder, 32, flip=False)
    assert np.load(cache.folder / "embeddings.npy").dtype == np.float16


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_checkpoint_whose_answers_are_no_numbers(call, small, train_flags, tmp_path, value):
    """Damaged in a way that no file format shows."""
    checkpoint = load_checkpoint(save_untrained(tmp_path / "x.pth", ("rgb",)))
    with torch.no_grad():
        for parameter in checkpoint.model.heads["rgb"].output_layers.parameters():
            parameter.fill_(value)
    save_checkpoint(tmp_path / "x.pth", checkpoint)
    clip = small / "UCF-101/WalkLeft/v_WalkLeft_g01_c01.avi"
    done = call(test_on_video, "--video_path", clip, "--checkpoint_model", "x.pth", "--output", "x.mp4")
    assert done.status == 1
    assert "answers are no numbers" in done.one_line_error()
    assert not (tmp_path / "x.mp4").exists()
    done = call(test_script, *train_flags(small)[:4], "--checkpoint_model", "x.pth", "--run_path", "run")
    assert done.status == 1
    assert "answers are no numbers" in done.one_line_error()
