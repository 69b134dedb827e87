"""Masked-frame pretraining: what is hidden, that it is learned, and that a run may stop in it."""

import csv
import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_run import same, stop_after, weights

import pretrain
import train
from training import masked as masked_module
from training.classifier import Classifier
from training.evaluate import Tally
from training.masked import MaskedFrames, MaskedLearner, span_mask
from training.recipe import RECIPES
from training.run import Run, hold_folder


@given(batch=st.integers(1, 20), length=st.integers(2, 60), seed=st.integers(0, 2**31))
def test_of_every_clip_some_frames_are_hidden_and_some_are_not(batch, length, seed):
    torch.manual_seed(seed)
    mask = span_mask(batch, length, torch.device("cpu"))
    assert mask.shape == (batch, length)
    assert mask.any(dim=1).all()
    assert not mask.all(dim=1).any()


def test_half_of_the_frames_are_hidden_in_spans():
    torch.manual_seed(0)
    mask = span_mask(400, 200, torch.device("cpu"))
    assert mask.float().mean().item() == pytest.approx(masked_module.MASKED_SHARE, abs=0.02)
    begins = (mask[:, 1:] & ~mask[:, :-1]).sum().item()
    assert mask.sum().item() / begins == pytest.approx(masked_module.MEAN_SPAN, rel=0.1)


def moving_clips(count, numbers):
    """Clips whose embedding turns at a steady pace: the frames beside a hidden one tell what it is."""
    pace = torch.rand(count, 1, 1, generator=numbers) * 0.4 + 0.1
    start = torch.rand(count, 1, 24, generator=numbers) * 6
    return (start + pace * torch.arange(12)[None, :, None]).sin().repeat(1, 1, 2)


@pytest.mark.parametrize(("name", "sizes"), [("ConvLSTM", {"hidden_dim": 32}), ("ActionBERT", {"layers": 1})])
def test_hidden_frames_are_learned_from_the_others(name, sizes):
    torch.manual_seed(0)
    numbers = torch.Generator().manual_seed(1)
    model = Classifier(name, 3, encoder="tiny", latent_dim=64, sequence_length=12, **sizes)
    recipe = replace(RECIPES["default"], learning_rate=3e-3)
    learner = MaskedLearner(model, MaskedFrames(model), recipe, 300, 0)
    padding = torch.zeros(16, 12, dtype=torch.bool)
    shares = []
    learner.masked.train()
    for number in range(300):
        learner.begin_batch(1, number, 0)
        loss, found, count = learner.losses(
            learner.masked, moving_clips(16, numbers), padding, torch.zeros(16, dtype=torch.int64)
        )
        learner.step(loss / count)
        shares.append(found.item() / count)
    # About 90 are hidden in a batch: a guess finds one in 90.
    assert sum(shares[:10]) / 10 < 0.03
    assert sum(shares[-10:]) / 10 > 0.05


def test_padding_is_never_hidden_nor_looked_at():
    torch.manual_seed(0)
    model = Classifier("ActionBERT", 3, encoder="tiny", latent_dim=16, sequence_length=12).eval()
    masked = MaskedFrames(model).eval()
    embeddings, padding = torch.randn(4, 12, 48), torch.zeros(4, 12, dtype=torch.bool)
    padding[:, :9] = True
    changed = embeddings.clone()
    changed[:, :9] = 7

    def losses(clips):
        torch.manual_seed(3)
        return masked(clips, padding)[0]

    assert torch.allclose(losses(embeddings), losses(changed), atol=1e-5)
    assert len(losses(embeddings)) <= 4 * 3


FLAGS = ("--model", "ActionBERT", "--latent_dim", 16, "--pretrain", 2, "--num_epochs", 2, "--batch_size", 2)


def test_a_run_that_stops_while_pretraining_goes_on_to_the_same_weights(
    call, small, train_flags, tmp_path, monkeypatch
):
    flags = [*train_flags(small), *FLAGS, "--run_path", tmp_path / "run"]
    whole = call(train, *flags, "--output_path", tmp_path / "whole")
    assert whole.status == 0, whole.err
    assert "pretraining, epoch 2 of 2" in whole.out
    assert "hidden frames" in whole.out
    with (tmp_path / "run/pretraining/history.csv").open(newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]
    wanted = weights(tmp_path / "whole/ActionBERT_2.pth")
    for batches in (1, 3):
        folder = tmp_path / f"stopped{batches}"
        with monkeypatch.context() as patch:
            stop_after(patch, batches, signal.SIGTERM, MaskedFrames, "forward")
            done = call(train, *flags, "--output_path", folder)
        assert done.status == 128 + signal.SIGTERM, done.err
        assert "stopped in pretraining, epoch" in done.out
        done = call(train, "--resume", "--output_path", folder)
        assert done.status == 0, done.err
        assert "going on in pretraining, epoch" in done.out
        assert same(weights(folder / "ActionBERT_2.pth"), wanted)
    plain = call(train, *flags, "--pretrain", 0, "--output_path", tmp_path / "plain")
    assert plain.status == 0, plain.err
    assert not same(weights(tmp_path / "plain/ActionBERT_2.pth"), wanted), "pretraining leaves its mark"


def test_models_that_see_single_frames_cannot_be_pretrained(call, small, train_flags):
    done = call(train, *train_flags(small), "--model", "MeanPool", "--pretrain", 1)
    assert done.status == 1
    assert "ConvLSTM, ActionBERT" in done.one_line_error()


@pytest.mark.parametrize("fraction", [0, 1.1, -1])
def test_a_share_of_the_labels_is_above_none(call, small, train_flags, fraction):
    done = call(train, *train_flags(small), "--label_fraction", fraction)
    assert done.status == 2
    assert "--label_fraction" in done.one_line_error()


def test_few_labels_are_spread_over_the_classes(toy):
    from conftest import ucf101_at
    from splits.datasets import load_split
    from splits.split import some_labels

    clips = load_split(ucf101_at(toy), 1).train
    few = some_labels(clips, 0.25, seed=1)
    assert {clip.label for clip in few} == {clip.label for clip in clips}
    assert len(few) == pytest.approx(len(clips) / 4, abs=4)
    assert few == some_labels(clips, 0.25, seed=1) != some_labels(clips, 0.25, seed=2)
    assert some_labels(clips, 1.0, seed=1) == clips
    assert len(some_labels(clips, 0.001, seed=1)) == 8, "at least one of each class"


def test_pretraining_by_itself_is_what_train_py_does_first(call, small, train_flags, tmp_path):
    flags = [*train_flags(small), "--model", "ActionBERT", "--latent_dim", 16, "--batch_size", 2]
    both = call(train, *flags, "--pretrain", 2, "--num_epochs", 1, "--output_path", tmp_path / "both")
    assert both.status == 0, both.err
    done = call(pretrain, *flags, "--num_epochs", 2, "--output_path", tmp_path / "before")
    assert done.status == 0, done.err
    path = tmp_path / "before/ActionBERT_2.pth"
    assert f"--checkpoint_model {path}" in done.out
    assert same(weights(path), weights(tmp_path / "both/pretrained/ActionBERT_2.pth"))
    data = train_flags(small)
    start = ["--checkpoint_model", path, "--batch_size", 2, "--num_epochs", 1]
    after = call(train, *data, *start, "--output_path", tmp_path / "after")
    assert after.status == 0, after.err
    assert same(weights(tmp_path / "after/ActionBERT_1.pth"), weights(tmp_path / "both/ActionBERT_1.pth"))
    report = json.loads(next(tmp_path.glob("runs/ActionBERT*/test/report.json")).read_text())
    assert report["training"]["model"] == "ActionBERT"
    again = call(pretrain, "--resume", "--output_path", tmp_path / "before")
    assert (again.status, "all 2 epochs are trained already" in again.out) == (0, True)
    assert call(pretrain, *flags, "--split_number", "all").status == 2


def test_clips_of_one_frame_hide_none(call, small, train_flags):
    done = call(train, *train_flags(small), "--sequence_length", 1, "--model", "ActionBERT", "--pretrain", 1)
    assert done.status == 1
    assert "--sequence_length 1" in done.one_line_error()


def test_clips_per_second_are_of_clips(call, small, train_flags, tmp_path):
    """Not of the hidden frames that the losses are counted by."""
    done = call(train, *train_flags(small), *FLAGS, "--run_path", tmp_path / "run")
    assert done.status == 0, done.err
    for path in (tmp_path / "run/pretraining/history.csv", tmp_path / "run/history.csv"):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                assert float(row["clips_per_second"]) * float(row["seconds"]) == pytest.approx(4)


def test_what_cannot_be_pretrained_is_told_before_anything_is_written(call, small, train_flags, tmp_path):
    for wrong in (["--model", "MeanPool"], ["--model", "ActionBERT", "--sequence_length", 1]):
        for command in ([train, "--pretrain", 1], [pretrain]):
            done = call(command[0], *train_flags(small), *wrong, *command[1:])
            assert done.status == 1
            done.one_line_error()
    assert not list(tmp_path.glob("model_checkpoints/**/*.pth"))
    assert not (small / "UCF-101-embeddings").exists()


def test_two_pretrainings_do_not_write_to_one_folder(call, small, train_flags, tmp_path):
    flags = [*train_flags(small), "--model", "ActionBERT", "--latent_dim", 16]
    with hold_folder(tmp_path / "out/pretrained"):
        for done in (
            call(train, *flags, "--pretrain", 1, "--output_path", tmp_path / "out"),
            call(pretrain, *flags, "--output_path", tmp_path / "out/pretrained"),
        ):
            assert done.status == 1
            assert "another training writes there" in done.one_line_error()
    with hold_folder(tmp_path / "out/pretrained"):
        pass  # it is let go of


def test_a_signal_at_the_end_of_pretraining_is_heard(call, small, train_flags, tmp_path, monkeypatch):
    flags = [*train_flags(small), *FLAGS, "--run_path", tmp_path / "run"]
    save_epoch, sent = Run.save_epoch, []

    def signalled(self, **options):
        save_epoch(self, **options)
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))

    monkeypatch.setattr(Run, "save_epoch", signalled)
    done = call(train, *flags, "--output_path", tmp_path / "out")
    assert done.status == 128 + signal.SIGTERM
    assert "stopped in pretraining" in done.out
    assert not list((tmp_path / "out").glob("ActionBERT_*.pth"))
    done = call(train, "--resume", "--output_path", tmp_path / "out")
    assert done.status == 0, done.err


def test_batches_in_which_nothing_is_hidden_do_no_harm():
    assert Tally(unit="hidden frames").loss == Tally().accuracy == 0
