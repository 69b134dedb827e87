"""What goes wrong in a long run, made to happen: disks, clips, damaged checkpoints."""

import pytest

import train
from conftest import Script
from dataset import EmbeddingClips


def test_a_full_disk_leaves_earlier_checkpoints_and_names_path_and_bytes(call, small, train_flags, tmp_path):
    flags = [*train_flags(small), "--num_epochs", 1, "--output_path", tmp_path / "out"]
    assert call(train, *flags).status == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.pth")}
    done = Script("train.py", *flags, "--run_path", tmp_path / "run", file_limit=100_000).outcome()
    assert done.status == 1
    error = done.one_line_error()
    assert str(tmp_path / "out" / "ConvLSTM_1.pth") in error
    needed = int(error.split("cannot write ")[1].split(" bytes")[0].replace(",", ""))
    assert needed == pytest.approx(len(before["ConvLSTM_1.pth"]), rel=0.1)
    earlier = tmp_path / "out" / "earlier-1"
    assert {path.name: path.read_bytes() for path in earlier.iterdir()} == before
    assert not list((tmp_path / "out").glob(".*partial*"))


def test_a_clip_that_goes_while_training_is_not_needed_any_more(call, small, train_flags, monkeypatch):
    batch = EmbeddingClips.batch

    def removing(self, items):
        for clip in (small / "UCF-101").rglob("*.avi"):
            clip.unlink()
        return batch(self, items)

    monkeypatch.setattr(EmbeddingClips, "batch", removing)
    done = call(train, *train_flags(small), "--num_epochs", 2)
    assert done.status == 0, done.err
    assert "of 2 clips" in done.out
