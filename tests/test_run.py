"""Training that is stopped, killed and gone on with; train.py and run.py together."""

import os
import signal
import time

import numpy as np
import pytest
import torch

import train
from conftest import Script, ucf101_at
from splits.datasets import load_split
from splits.split import hold_out, random_split, siblings
from training.checkpoint import Checkpoint, load_checkpoint
from training.classifier import Classifier
from training.learner import Learner
from training.recipe import RECIPES
from training.run import Run, hold_folder

EPOCHS = ("--num_epochs", 3, "--batch_size", 2, "--latent_dim", 8)


def flags_of(train_flags, small, folder):
    return [*train_flags(small), *EPOCHS, "--output_path", folder]


def weights(path):
    return torch.load(path, weights_only=True)["state"]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def whole(call, small, train_flags, tmp_path):
    """A run of three epochs in one go."""
    done = call(train, *flags_of(train_flags, small, tmp_path / "whole"))
    assert done.status == 0, done.err
    return tmp_path / "whole"


def stop_after(monkeypatch, batches, signum, owner=Classifier, name="classify"):
    """Have the process get a signal after so many batches."""
    whole, seen = getattr(owner, name), []

    def counted(self, *inputs):
        seen.append(self)
        if len(seen) == batches:
            os.kill(os.getpid(), signum)
        return whole(self, *inputs)

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("batches", [1, 2, 3, 5])
def test_a_stopped_run_goes_on_to_the_same_weights(
    call, small, train_flags, tmp_path, whole, monkeypatch, batches, signum
):
    """After a batch in the middle of an epoch, the last one of an epoch, and one of an evaluation."""
    folder = tmp_path / "stopped"
    flags = [*flags_of(train_flags, small, folder), "--checkpoint_interval", 1]
    with monkeypatch.context() as patch:
        stop_after(patch, batches, signum)
        done = call(train, *flags)
    assert done.status == 128 + signum, done.err
    assert "go on with --resume" in done.out
    assert not (folder / "ConvLSTM_3.pth").exists()
    done = call(train, "--resume", "--output_path", folder)
    assert done.status == 0, done.err
    assert same(weights(folder / "ConvLSTM_3.pth"), weights(whole / "ConvLSTM_3.pth"))
    ours, theirs = (load_checkpoint(path / "last.pth").training["history"] for path in (folder, whole))
    assert [one["train_loss"] for one in ours] == [one["train_loss"] for one in theirs]


def test_a_second_signal_ends_at_once(call, small, train_flags, tmp_path, whole, monkeypatch):
    folder = tmp_path / "stopped"

    def twice(self, embeddings, padding=None):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "classify", twice)
        done = call(train, *flags_of(train_flags, small, folder))
    assert (done.status, "--resume" in done.out) == (128 + signal.SIGINT, False)
    # What was saved before is whole, and goes on.
    assert call(train, "--resume", "--output_path", folder).status == 0
    assert same(weights(folder / "ConvLSTM_3.pth"), weights(whole / "ConvLSTM_3.pth"))


@pytest.mark.full_size
def test_killed_at_random_instants_the_weights_are_the_same(call, toy, tmp_path):
    """As a user would see it: SIGKILL, and --resume in a new process, until it is done."""
    rng = np.random.default_rng(0)
    data = ["--dataset_path", toy / "UCF-101", "--split_path", toy / "ucfTrainTestlist"]
    model = ["--encoder", "efficientnet_lite0", "--img_dim", 32, "--sequence_length", 8, "--latent_dim", 8]
    flags = [*data, *model, "--num_epochs", 4, "--save_seconds", 0, "--cache_path", tmp_path / "cache"]

    assert call(train, *flags, "--output_path", tmp_path / "whole").status == 0
    folder, kills = tmp_path / "killed", 0
    for _ in range(20):
        flags_now = ["--resume", "--output_path", folder, "--cache_path", tmp_path / "cache"]
        if not (folder / "last.pth").exists():
            flags_now = [*flags, "--output_path", folder]
        process = Script("train.py", *flags_now)
        # Two kills on the way, when training has begun; then to the end.
        stamp = time.monotonic()
        before = (folder / "last.pth").stat().st_mtime_ns if (folder / "last.pth").exists() else 0
        while kills < 2 and process.running() and time.monotonic() - stamp < 60:
            last = folder / "last.pth"
            if last.exists() and last.stat().st_mtime_ns != before:
                time.sleep(float(rng.uniform(0, 1.5)))
                process.kill()
                kills += 1
                break
            time.sleep(0.02)
        done = process.outcome()
        if done.status == 0:
            break
        assert done.status == -signal.SIGKILL, done.err
    assert kills == 2
    assert same(weights(folder / "ConvLSTM_4.pth"), weights(tmp_path / "whole/ConvLSTM_4.pth"))


def test_flags_that_disagree_are_listed(call, whole, tmp_path):
    done = call(train, "--resume", "--output_path", whole, "--batch_size", 3, "--seed", 4, "--num_epochs", 3)
    assert done.status == 1
    error = done.one_line_error()
    assert "--batch_size 3 (there 2)" in error
    assert "--seed 4 (there 0)" in error
    assert "num_epochs" not in error
    done = call(train, "--resume", "--output_path", whole)
    assert (done.status, "all 3 epochs are trained" in done.out) == (0, True)
    done = call(train, "--resume", "--output_path", tmp_path / "empty")
    assert (done.status, "no run to go on with" in done.one_line_error()) == (1, True)


def test_other_clips_than_before_are_refused(call, small, train_flags, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 1, signal.SIGTERM)
        assert call(train, *flags_of(train_flags, small, tmp_path / "out")).status == 143
    (small / "UCF-101/WalkLeft/v_WalkLeft_g02_c01.avi").unlink()
    done = call(train, "--resume", "--output_path", tmp_path / "out")
    assert done.status == 1
    assert "not the clips" in done.one_line_error()


def test_a_second_training_in_a_folder_is_refused_while_the_first_runs(call, small, train_flags, whole):
    with hold_folder(whole):
        done = call(train, *flags_of(train_flags, small, whole))
    assert done.status == 1
    assert "another training" in done.one_line_error()


def test_validation_picks_the_best_and_ends_without_patience(call, toy, train_flags, tmp_path):
    flags = [*train_flags(toy), "--latent_dim", 8, "--val_fraction", 0.2, "--learning_rate", "1e-12"]
    done = call(train, *flags, "--num_epochs", 9, "--patience", 2, "--output_path", tmp_path / "out")
    assert done.status == 0, done.err
    # Nothing is learned at this rate but BatchNorm's statistics, so one of the first epochs stays the best.
    last = load_checkpoint(tmp_path / "out/last.pth")
    history = last.training["history"]
    accuracies = [one["val_accuracy"] for one in history]
    best = max(history, key=lambda one: (one["val_accuracy"], -one["val_loss"]))["epoch"]
    assert len(accuracies) == min(9, best + 2)
    assert load_checkpoint(tmp_path / "out/best.pth").epoch == best
    assert f"best validation accuracy {max(accuracies):.2f} %, epoch {best}, " in done.out
    done = call(train, *flags, "--num_epochs", 9, "--patience", 2, "--val_fraction", 0)
    assert (done.status, "--val_fraction" in done.one_line_error()) == (2, True)


def test_of_epochs_with_equal_accuracy_the_least_loss_is_the_best(tmp_path):
    model = Classifier("MeanPool", 2, encoder="tiny")
    run = Run(
        tmp_path, Checkpoint(model, ["a", "b"], 32, 8, None, 0), Learner(model, RECIPES["default"], 1), 1e9,
        writes=False,
    )  # fmt: skip
    for accuracy, loss, best in ((50, 0.9, 1), (90, 0.8, 2), (90, 0.7, 3), (90, 0.75, 3), (80, 0.1, 3)):
        run.end_epoch({"val_accuracy": accuracy, "val_loss": loss})
        assert run.best == (90 if best > 1 else 50, best)
    assert run.out_of_patience(2)
    assert not run.out_of_patience(3)


def test_only_the_newest_checkpoints_are_kept(call, small, train_flags, tmp_path):
    flags = flags_of(train_flags, small, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/resnet_1.pth").write_text("somebody else's")
    assert call(train, *flags, "--checkpoint_interval", 1, "--keep", 2).status == 0
    names = {path.name for path in (tmp_path / "out").glob("*.pth")}
    assert names - {"resnet_1.pth"} == {"ConvLSTM_2.pth", "ConvLSTM_3.pth", "last.pth"}
    assert "resnet_1.pth" in names, "only the run's own files are moved or removed"


def test_held_out_groups_are_whole_and_of_every_class(toy):
    clips = load_split(ucf101_at(toy), 1).train
    trained, held = hold_out(clips, 0.2, seed=3)
    assert sorted(clip.name for clip in trained + held) == sorted(clip.name for clip in clips)
    assert not {clip.group for clip in trained} & {clip.group for clip in held}
    assert {clip.label for clip in trained} == {clip.label for clip in held} == {clip.label for clip in clips}
    assert hold_out(clips, 0.2, seed=3) == (trained, held)
    assert hold_out(clips, 0.2, seed=4) != (trained, held)


def test_the_random_split_leaks_and_says_so(call, subset, toy, train_flags, tmp_path):
    split = random_split(
        load_split(ucf101_at(subset), 1),
        0,
    )
    assert len(split.test) == round(0.2 * 391)
    assert siblings(split) > 0.4 * len(split.test)
    assert siblings(load_split(ucf101_at(subset), 1)) == 0
    flags = [*train_flags(toy), "--latent_dim", 8, "--split_number", "random", "--num_epochs", 1]
    done = call(train, *flags)
    assert done.status == 0, done.err
    assert "leaks: 0 of 13 test clips" in done.out
    assert "on a split that leaks" in done.out


def test_a_loss_that_is_no_number_stops_and_names_the_clips(call, small, train_flags, tmp_path):
    done = call(train, *flags_of(train_flags, small, tmp_path / "out"), "--learning_rate", "1e30")
    assert done.status == 1
    error = done.one_line_error()
    assert "the loss became" in error
    assert "_g02_c01.avi" in error or "_g03_c01.avi" in error
    kept = load_checkpoint(tmp_path / "out/last.pth")
    assert all(tensor.isfinite().all() for tensor in kept.model.state_dict().values())
