"""torchrun with two processes on a CPU."""

import re
import subprocess
import sys
from itertools import chain

import pytest

import train
from conftest import ROOT, Script, free_port
from dataset import batch_items
from training.checkpoint import load_checkpoint
from utils.ranks import Ranks


def torchrun(*command, processes=2):
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={processes}",
        "--standalone",
    ]
    words = [*launcher, *map(str, command)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("seed", [None, 1])
def test_the_parts_of_all_processes_are_the_batches_of_one(seed):
    for clips, size, ranks in ((23, 4, 2), (9, 6, 3), (8, 16, 5), (5, 4, 2)):
        alone = batch_items(clips, size, epoch=3, seed=seed)
        parts = [
            batch_items(clips, size, epoch=3, seed=seed, ranks=Ranks(rank, ranks)) for rank in range(ranks)
        ]
        if seed is None:
            assert sorted(chain(*chain(*parts))) == [(3, index) for index in range(clips)], "every clip once"
        else:
            together = [sorted(chain(*batch)) for batch in zip(*parts, strict=True)]
            assert together == [sorted(batch) for batch in alone if len(batch) >= 2 * ranks]
            assert all(len(part) > 1 for part in chain(*parts)), "BatchNorm needs two clips"


def figures(output):
    return [float(text) for text in re.findall(r"loss (\S+) nats", output)]


@pytest.mark.full_size
def test_training_on_two_processes_is_nearly_training_on_one(call, small, tmp_path):
    """Videos shared, the same losses, and every test clip counted once; LinearProbe has no BatchNorm."""
    data = ["--dataset_path", small / "UCF-101", "--split_path", small / "ucfTrainTestlist"]
    encoder = ["--encoder", "efficientnet_lite0", "--img_dim", 32, "--precision", "fp32"]
    flags = [*data, *encoder, "--sequence_length", 8, "--num_epochs", 2, "--batch_size", 4]
    flags += ["--recipe", "original", "--learning_rate", "5e-3", "--model", "LinearProbe"]
    two = torchrun("train.py", *flags, "--output_path", tmp_path / "two", "--cache_path", tmp_path / "cache",
                   "--run_path", tmp_path / "run2")  # fmt: skip
    assert two.count("encoding 6 videos") == 1
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 6
    one = call(train, *flags, "--output_path", tmp_path / "one", "--cache_path", tmp_path / "cache").out
    assert "encoding" not in one
    assert "of 2 clips" in two
    assert figures(two) == pytest.approx(figures(one), abs=0.002)
    ours, theirs = (load_checkpoint(tmp_path / name / "LinearProbe_2.pth").head for name in ("two", "one"))
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (one - other).abs().max() < 2e-3
    path = tmp_path / "two/LinearProbe_2.pth"
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    first, second = (
        Script("test.py", *data, "--checkpoint_model", path, "--cache_path", tmp_path / "cache",
               "--precision", "fp32", "--run_path", tmp_path / "tested", RANK=rank, LOCAL_RANK=rank, **place)
        for rank in "01"
    )  # fmt: skip
    done = first.outcome()
    assert done.status == second.outcome().status == 0, done.err
    assert done.out.split("accuracy ")[1][:7] == two.split("test loss")[-1].split("accuracy ")[1][:7]
