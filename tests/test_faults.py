"""What goes wrong in a long run, made to happen: disks, clips, damaged checkpoints."""

import pytest
import torch

import test as test_script
import test_on_video
import train
from conftest import Script, run_script, save_untrained
from dataset import EmbeddingClips
from training.checkpoint import load_checkpoint, save_checkpoint


@pytest.mark.full_size
def test_a_full_disk_leaves_earlier_checkpoints_and_names_path_and_bytes(call, small, tmp_path):
    flags = ["--dataset_path", small / "UCF-101", "--split_path", small / "ucfTrainTestlist", "--img_dim", 32,
             "--precision", "fp32", "--encoder", "efficientnet_lite0", "--sequence_length", 8,
             "--latent_dim", 8, "--num_epochs", 1, "--output_path", tmp_path / "out"]  # fmt: skip
    assert call(train, *flags).status == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.pth")}
    done = Script("train.py", *flags, "--run_path", tmp_path / "run", file_limit=10_000_000).outcome()
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


def test_spoiled_files_end_well_or_in_one_line():
    done = run_script("tests/stress/fuzz.py", "--cases", 16, "--seed", 3)
    assert done.status == 0, done.out
    assert "16 cases, seed 3: 0 ended badly" in done.out


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_checkpoint_whose_logits_are_not_finite(call, small, train_flags, tmp_path, value):
    """Damaged in a way that no file format shows."""
    checkpoint = load_checkpoint(save_untrained(tmp_path / "x.pth"))
    with torch.no_grad():
        for parameter in checkpoint.head.output_layers.parameters():
            parameter.fill_(value)
    save_checkpoint(tmp_path / "x.pth", checkpoint)
    clip = small / "UCF-101/WalkLeft/v_WalkLeft_g01_c01.avi"
    done = call(test_on_video, "--video_path", clip, "--checkpoint_model", "x.pth", "--output", "x.mp4")
    assert (done.status, "logits are not finite" in done.one_line_error()) == (1, True)
    assert not (tmp_path / "x.mp4").exists()
    done = call(test_script, *train_flags(small)[:4], "--checkpoint_model", "x.pth", "--run_path", "run")
    assert (done.status, "logits are not finite" in done.one_line_error()) == (1, True)
