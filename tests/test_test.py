import pytest
import torch

import test as test_script
import train
from conftest import data_flags, embed_frames, trained_in, ucf101_at
from dataset import clip_indices
from splits.datasets import Listed
from training.checkpoint import load_checkpoint
from video.frames import resize_frames


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory):
    """A checkpoint trained for an epoch on split 2 of the toy data, and what was printed."""
    folder = tmp_path_factory.mktemp("trained")
    done = trained_in(folder, toy, "--num_epochs", 1, "--split_number", 2)
    return folder / "out/ConvLSTM_1.pth", done


def flags(path, checkpoint):
    return [*data_flags(path), "--checkpoint_model", checkpoint, "--precision", "fp32", "--num_workers", 0]


def test_every_clip_counts_once_whatever_the_batches(call, toy, trained):
    path, training = trained
    figures = set()
    for batch_size in (1, 5, 16):
        done = call(test_script, *flags(toy, path), "--batch_size", batch_size)
        assert done.status == 0, done.err
        figures.add(done.out.split("test ")[1].splitlines()[0])
    assert len(figures) == 1
    # What training printed of the same epoch, on the same split.
    assert figures.pop().strip() in training.out
    checkpoint = load_checkpoint(path)
    test = Listed(ucf101_at(toy)).split(2).test
    correct = 0
    with torch.no_grad():
        for clip in test:
            frames = list(clip.video.frames())
            chosen = [frames[index] for index in clip_indices(len(frames), 8)]
            embeddings = embed_frames(checkpoint.encoder, resize_frames(chosen, 32))
            correct += int(checkpoint.head(embeddings[None]).argmax()) == clip.label
    assert f"{correct} of {len(test)} clips" in done.out


def test_the_embeddings_of_the_training_are_used(call, small, train_flags, tmp_path):
    places = ["--cache_path", tmp_path / "cache", "--num_epochs", 1, "--run_path", tmp_path / "run"]
    assert call(train, *train_flags(small), *places).status == 0
    done = call(test_script, "--checkpoint_model", "model_checkpoints/ConvLSTM_1.pth", "--precision", "fp32")
    assert done.status == 0, done.err
    assert "encoding" not in done.out
    assert [path.name for path in small.iterdir() if "embeddings" in path.name] == []


def test_shuffled_frames_are_told_and_are_no_silent_default(call, toy, trained):
    plain, mixed = (call(test_script, *flags(toy, trained[0]), *more) for more in ((), ("--shuffle_frames",)))
    assert plain.status == mixed.status == 0, mixed.err
    assert plain.out.split("test ")[1].splitlines()[0] != mixed.out.split("test ")[1].splitlines()[0]
    again = call(test_script, *flags(toy, trained[0]), "--shuffle_frames")
    assert again.out.splitlines()[0] == mixed.out.splitlines()[0], "the same order each time"
    assert "frames shuffled" in mixed.out


def test_another_split_than_the_trained_one_is_refused_unless_forced(call, toy, trained):
    other = [*flags(toy, trained[0]), "--split_number", 1]
    done = call(test_script, *other)
    assert done.status == 1
    assert "was trained on split 2" in done.one_line_error()
    done = call(test_script, *other, "--force")
    assert done.status == 0, done.err
    assert "seen in training on split 2" in done.out


def test_other_classes_than_the_trained_ones_are_refused(call, small, toy, trained):
    done = call(test_script, *flags(small, trained[0]))
    assert done.status == 1
    assert "was trained on other classes" in done.one_line_error()


def test_bad_input(call, toy, trained, tmp_path):
    done = call(test_script, *flags(toy, tmp_path / "gone.pth"))
    assert (done.status, "gone.pth" in done.one_line_error()) == (1, True)
    done = call(test_script, *flags(toy, trained[0]), "--sequence_length", 0)
    assert (done.status, "sequence_length" in done.one_line_error()) == (2, True)
    done = call(test_script)
    assert (done.status, "--checkpoint_model" in done.one_line_error()) == (2, True)
