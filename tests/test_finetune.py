"""An encoder that is trained further: what is read, what is trained, and what is kept."""

import contextlib
import csv
import json
import random
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from test_ranks import torchrun

import export as export_script
import test as test_script
import test_on_video
import train
from conftest import KILLS, TINY_VIDEO, Script, data_flags, ucf101_at
from dataset import EmbeddingClips, FrameClips, Sampling, fill_store
from features.encoder import Encoder
from features.folding import BATCHNORMS
from features.store import Store
from models import build_head
from splits.datasets import Listed
from splits.split import Clip
from training.checkpoint import load_checkpoint
from training.recipe import RECIPES, Optimization
from utils.process import UserError
from video.reader import Video
from video.writer import write_video

FP32 = ["--precision", "fp32"]


def frame_clips(folder, video, encoder, length, **options):
    """Clips of frames of a single video."""
    clip = Clip("A/x.mp4", 1, Video(video), **options)
    store = Store(folder, Encoder(encoder, img_dim=24).prepare("fp32"), cuts=bool(options))
    store.embed("A/x", clip.video)
    return FrameClips(EmbeddingClips(store, [clip], Sampling(length, seed=3)), flip=False)


def numbers(window):
    """Numbers of the frames of a window of a gray video, whose frame i has the value 3 i."""
    return (window.float().mean((1, 2, 3)) / 3).round().int().tolist()


@pytest.mark.parametrize(
    ("encoder", "frames", "length", "windows", "padded"),
    [
        ("tiny", 30, 5, [1] * 5, 0),
        ("tiny", 3, 5, [1] * 3, 2),
        ("tiny_video", 30, 3, [12], 0),
        ("tiny_video", 30, 1, [8], 0),
        ("tiny_video", 40, 6, [16, 8], 0),
        ("tiny_video", 32, 10, [16, 16], 2),
        ("tiny_video", 5, 4, [8], 2),
    ],
)
def test_a_clip_of_frames_is_what_gives_its_embeddings(
    gray_video, tmp_path, encoder, frames, length, windows, padded
):
    clips = frame_clips(tmp_path / "store", gray_video(count=frames), encoder, length)
    begins = set()
    for epoch in range(20):
        cut, places, padding, label = clips[epoch, 0]
        assert [len(window) for window in cut] == windows
        assert (label, padding.tolist()) == (1, [True] * padded + [False] * (length - padded))
        shown = [numbers(window) for window in cut]
        hop = 1 if encoder == "tiny" else 4
        first = [shown[window][hop * row] for window, row in places]
        steps = set(np.diff(first[padded:]).tolist())
        assert len(steps) <= 1, "embeddings are evenly spread"
        assert encoder == "tiny" or steps <= {hop}, "those of a video follow each other"
        assert len({at for at in first[: padded + 1]}) == 1, "the first one is repeated"
        begins.add(first[0])
    assert len(begins) > 3 or padded


def test_batches_of_clips_are_put_together_by_the_length_of_their_windows(gray_video, tmp_path):
    long, short = (
        frame_clips(tmp_path / str(count), gray_video(f"{count}.mp4", count), "tiny_video", 6)
        for count in (40, 15)
    )
    items = [long[0, 0], short[0, 0], long[1, 0]]
    windows, rows, padding, labels = long.collate(items)
    assert [tuple(alike.shape[:2]) for alike in windows] == [(2, 8), (3, 16)]
    shown = [frame for alike in windows for window in alike for frame in numbers(window)[::4]]
    for row, (cut, places, hidden, label) in enumerate(items):
        assert [shown[at] for at in rows[row]] == [numbers(cut[window])[4 * at] for window, at in places]
        assert (padding[row].tolist(), labels[row]) == (hidden.tolist(), label)


def test_a_segment_is_read_where_it_lies(gray_video, tmp_path):
    clips = frame_clips(tmp_path / "store", gray_video(count=80), "tiny_video", 4, span=(2.0, 3.0))
    for epoch in range(10):
        (window,), *_ = clips[epoch, 0]
        first, *_, last = numbers(window)
        assert 48 <= first <= last <= 76
        assert last - first == 15


def test_clips_are_mirrored_and_cropped_somewhere(tmp_path):
    slope = np.broadcast_to(np.arange(0, 240, 2, dtype=np.uint8)[None, :, None], (90, 120, 3))
    write_video(tmp_path / "x.mp4", [slope] * 8, 25)
    clips = frame_clips(tmp_path / "store", tmp_path / "x.mp4", "tiny", 4)
    clips.flip = True
    signs, begins = [], set()
    for epoch in range(40):
        (window, *others), *_ = clips[epoch, 0]
        row = window[0, 0, 12].int()
        assert all((other[0, 0, 12].int() - row).abs().max() <= 3 for other in others), "all frames alike"
        signs.append(bool(row[-1] > row[0]))
        begins.add(int(row.min()))
    assert 8 < sum(signs) < 32
    assert len(begins) > 3


@pytest.mark.parametrize(
    ("name", "blocks", "last"),
    [
        ("resnet18", 5, "7."),
        ("i3d", 12, "layers.Mixed_5c"),
        ("efficientnet_lite0", 7, ("blocks.6", "conv_head")),
        ("timm/vit_tiny_patch16_224", 12, ("blocks.11", "norm", "fc_norm")),
    ],
)
def test_gradients_reach_the_last_blocks_and_nothing_else(name, blocks, last):
    encoder = Encoder(name, pretrained=False, img_dim=None if "vit" in name else 32)
    layout, side = encoder.windows, encoder.img_dim
    windows = torch.randint(0, 256, (2, layout.least, 3, side, side), dtype=torch.uint8)
    norms = {id(each) for part in encoder.modules() if isinstance(part, BATCHNORMS)
             for each in part.parameters()}  # fmt: skip
    for count in (1, None):
        trained = {id(each) for each, _ in encoder.unfreeze(count)}
        encoder.zero_grad()
        encoder.train()
        assert not any(part.training for part in encoder.modules() if isinstance(part, BATCHNORMS))
        before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
        encoder(windows).square().sum().backward()
        for key, parameter in encoder.feature_extractor.named_parameters():
            wanted = (count is None or key.startswith(last)) and id(parameter) not in norms
            wanted = wanted and not key.startswith("last_layer")
            assert (id(parameter) in trained) == wanted, key
            assert (parameter.grad is not None) == wanted, key
        after = encoder.state_dict()
        assert all(torch.equal(tensor, after[key]) for key, tensor in before.items()), "statistics too"
    with pytest.raises(UserError, match=f"take {blocks} at most"):
        encoder.unfreeze(blocks + 1)


@pytest.mark.parametrize("name", ["i3d", "r3d_18", "s3d", "resnet18", "timm/vit_tiny_patch16_224"])
def test_gradients_in_bfloat16_are_those_in_float32(name):
    torch.manual_seed(0)
    encoder = Encoder(name, pretrained=False, img_dim=None if "vit" in name else 64)
    windows = torch.randint(0, 256, (4, encoder.windows.least, 3, *[encoder.img_dim] * 2), dtype=torch.uint8)
    gradients = []
    for precision in ("fp32", "bf16"):
        encoder.prepare(precision)
        trained = encoder.unfreeze(1)
        encoder.zero_grad()
        encoder(windows).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter, _ in trained])
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() <= 0.2 * one.norm()


def test_learning_rates_fall_from_block_to_block_of_a_transformer():
    encoder = Encoder("timm/vit_tiny_patch16_224", pretrained=False)
    head, _ = build_head("LinearProbe", encoder.width, 3)
    trained = encoder.unfreeze()
    rates = {id(each): rate for each, rate in trained}
    network = encoder.feature_extractor
    assert rates[id(network.norm.weight)] == 1
    for depth in range(12):
        assert rates[id(network.blocks[depth].norm1.weight)] == pytest.approx(0.75 ** (12 - depth))
    assert rates[id(network.pos_embed)] == pytest.approx(0.75**13)
    optimization = Optimization(head, RECIPES["default"], 10, encoder=trained)
    by_id = {id(each): group["initial_lr"] for group in optimization.optimizer.param_groups
             for each in group["params"]}  # fmt: skip
    assert by_id[id(head.output.weight)] == 3e-4
    assert by_id[id(network.norm.weight)] == pytest.approx(3e-5)
    assert all(rate == 1 for _, rate in Encoder("resnet18", pretrained=False, img_dim=32).unfreeze())


def test_frames_are_encoded_as_when_frozen():
    for name in ("tiny", "tiny_video", "efficientnet_lite0"):
        encoder = Encoder(name, img_dim=32).prepare("fp32")
        windows = torch.randint(0, 256, (3, encoder.windows.frames, 3, 32, 32), dtype=torch.uint8)
        assert torch.allclose(encoder(windows), encoder.embed(windows), atol=1e-4)


def named(path):
    """The most likely action of each frame in a table."""
    with path.open(newline="") as file:
        return [row["name1"] for row in csv.DictReader(file)]


@pytest.mark.parametrize("name", ["tiny", "tiny_video"])
def test_a_finetuned_encoder_is_in_the_checkpoint_and_used_everywhere(
    call, small, train_flags, tmp_path, name
):
    flags = [*train_flags(small), "--encoder", name, "--finetune", "--num_epochs", 2, "--run_path", "run"]
    done = call(train, *flags, "--learning_rate", "1e-3,1e-2", "--cache_path", tmp_path / "cache")
    assert done.status == 0, done.err
    assert "finetuning" in done.out
    assert "epoch 3 of 4" in done.out
    assert not (tmp_path / "run/embeddings").exists()
    path = tmp_path / "model_checkpoints/ConvLSTM_4.pth"
    before, after = (Encoder(name).state_dict(), load_checkpoint(path).encoder.state_dict())
    moved = {key for key, tensor in before.items() if not torch.equal(tensor, after[key])}
    assert moved == {"feature_extractor.mix.weight", "feature_extractor.mix.bias"}
    frozen = load_checkpoint(tmp_path / "model_checkpoints/ConvLSTM_2.pth").encoder
    assert frozen.pretrained
    report = json.loads((tmp_path / "run/test/report.json").read_text())
    tested = call(test_script, "--checkpoint_model", path, "--precision", "fp32", "--run_path", "tested")
    assert tested.status == 0, tested.err
    assert "encoding" not in tested.out, "what the training has tested is kept"
    assert json.loads((tmp_path / "tested/report.json").read_text())["figures"] == report["figures"]
    clip = small / "UCF-101/WalkLeft/v_WalkLeft_g01_c01.avi"
    shown = call(test_on_video, "--video_path", clip, "--checkpoint_model", path, *FP32, "--output", "x.mp4")
    assert shown.status == 0, shown.err
    if find_spec("onnxruntime"):
        assert call(export_script, "--checkpoint_model", path, "--output", "exported").status == 0
        exported = ["--checkpoint_model", "exported", "--backend", "onnxruntime"]
        done = call(test_on_video, "--video_path", clip, *exported, *FP32, "--output", "y.mp4")
        assert done.status == 0, done.err
        assert named(tmp_path / "y.mp4.csv") == named(tmp_path / "x.mp4.csv")
    # Trained further, from the trained encoder.
    again = call(train, *flags[:-1], "again", "--checkpoint_model", path, "--output_path", "second")
    assert again.status == 0, again.err
    assert "epoch 2 of 2" in again.out
    with (tmp_path / "again/history.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 2


def test_validation_takes_the_frozen_encoder_where_finetuning_spoils_it(call, toy, train_flags, tmp_path):
    flags = [*train_flags(toy), "--finetune", "--num_epochs", 3, "--val_fraction", 0.3, "--run_path", "run"]
    done = call(train, *flags, "--model", "LinearProbe", "--learning_rate", "1e-3,30")
    assert done.status == 0, done.err
    best = load_checkpoint(tmp_path / "model_checkpoints/best.pth")
    assert best.epoch <= 3
    assert best.encoder.pretrained
    report = json.loads((tmp_path / "run/test/report.json").read_text())
    assert report["epoch"] == best.epoch


def state_of(path):
    contents = torch.load(path, weights_only=True)
    return contents["head"] | contents["encoder_state"]


def of_environment(mark):
    """Processes that were started with a mark in their environment; those they forked have it too."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


def test_killed_and_resumed_it_ends_with_the_same_weights_and_leaves_no_process(small, train_flags, tmp_path):
    flags = [*train_flags(small), "--num_epochs", 3, "--batch_size", 2, "--cache_path", tmp_path / "cache"]
    flags += ["--finetune", "--val_fraction", 0.3, "--learning_rate", "1e-3,1e-2", "--num_workers", 1]
    whole = Script("train.py", *flags, "--output_path", tmp_path / "whole", "--run_path", tmp_path / "run")
    assert whole.outcome().status == 0
    begin = ["train.py", *flags, "--output_path", tmp_path / "cut", "--run_path", tmp_path / "cut-run"]
    resume, last = ["train.py", "--resume", "--output_path", tmp_path / "cut"], tmp_path / "cut/last.pth"
    mark, rng = f"mark-{tmp_path}", random.Random(1)

    def wait_until(happened):
        deadline = time.monotonic() + 60
        while not happened() and time.monotonic() < deadline:
            time.sleep(0.05)

    for epoch in [3 + kill % 3 for kill in range(1, KILLS)]:
        running = Script(*(resume if last.is_file() else begin), MARK=mark)
        wait_until(lambda epoch=epoch: last.is_file() and load_checkpoint(last).epoch >= epoch)
        time.sleep(rng.uniform(0, 0.5))
        running.kill()
        running.outcome()
        wait_until(lambda: not of_environment(mark))
        assert not of_environment(mark)
    done = Script(*(resume if last.is_file() else begin)).outcome()
    assert done.status == 0, done.err
    expected, found = state_of(tmp_path / "whole/last.pth"), state_of(last)
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert Script(*resume).outcome().status == 0, "what is ended can be tested again"


@pytest.mark.full_size
def test_two_processes_train_as_one(call, small, tmp_path):
    flags = [*data_flags(small), "--encoder", "efficientnet_lite0", "--img_dim", 32, "--precision", "fp32"]
    flags += ["--sequence_length", 4, "--num_epochs", 1, "--batch_size", 4, "--finetune", 2, "--model",
              "LinearProbe", "--cache_path", tmp_path / "cache", "--learning_rate", "1e-3,1e-3"]  # fmt: skip
    places = ["--output_path", tmp_path / "two", "--run_path", tmp_path / "run2"]
    torchrun("train.py", *flags, *places)
    done = call(train, *flags, "--output_path", tmp_path / "one", "--run_path", tmp_path / "run1")
    assert done.status == 0, done.err
    two, one = (state_of(tmp_path / name / "LinearProbe_2.pth") for name in ("two", "one"))
    started = Encoder("efficientnet_lite0", img_dim=32).state_dict()
    # Adam's first steps have the sign of a gradient, which rounding decides where it is nearly nothing.
    moved, apart = (
        sum(float((one[name] - other[name]).double().square().sum()) for name in started) ** 0.5
        for other in (started, two)
    )
    assert apart < 0.02 * moved


def test_segments_are_finetuned_on_too(call, tmp_path, gray_video):
    rows = ["video,start,end,action,split"]
    for number, side in enumerate(("train", "train", "test")):
        gray_video(f"v{number}.mp4", 75)
        rows += [f"v{number}.mp4,0,1,dark,{side}", f"v{number}.mp4,2,3,bright,{side}"]
    (tmp_path / "segments.csv").write_text("\n".join(rows) + "\n")
    flags = ["--dataset_path", tmp_path, "--segments", tmp_path / "segments.csv", "--encoder", "tiny_video"]
    flags += ["--precision", "fp32", "--model", "LinearProbe", "--num_epochs", 1, "--finetune"]
    done = call(train, *flags, "--cache_path", tmp_path / "cache")
    assert done.status == 0, done.err
    assert "epoch 2 of 2" in done.out


def test_what_does_not_go_is_told_in_a_line(call, small, train_flags):
    flags = [*train_flags(small), "--num_epochs", 1]
    error = call(train, *flags, "--finetune", 9).one_line_error()
    assert "--finetune 9: tiny has fewer blocks; take 1 at most" in error
    assert not list(small.rglob("*.npy")), "before anything is encoded"
    assert call(train, *flags).status == 0
    error = call(train, "--resume", "--finetune").one_line_error()
    assert "keeps its encoder as it is; train it further" in error
    cache = next((small / "UCF-101-embeddings").iterdir())
    error = call(train, "--dataset_path", cache, "--finetune").one_line_error()
    assert "has embeddings; name the folder of their videos" in error


def test_frames_encode_to_what_is_stored(small, tmp_path):
    split = Listed(ucf101_at(small)).split(1)
    encoder = Encoder("tiny", img_dim=24).prepare("fp32")
    store = Store(tmp_path, encoder, stride=2)
    fill_store(store, split.train, 2)
    clips = EmbeddingClips(store, split.train, Sampling(5, training=True, flip=False, seed=3))
    frames = FrameClips(clips, flip=False)
    # In the middle, as the store has it.
    frames.resize = encoder.resize
    items = [(epoch, index) for epoch in range(4) for index in range(4)]
    windows, rows, padding, labels = frames.collate([frames[item] for item in items])
    encoded = torch.cat([encoder.embed(alike).flatten(0, 1) for alike in windows])[rows]
    embeddings, same_padding, same_labels = clips.batch(items)
    assert torch.allclose(encoded, embeddings, atol=2e-3)
    assert torch.equal(padding, same_padding)
    assert torch.equal(labels, same_labels)


def test_windows_are_as_long_as_what_is_trained_on(call, small, train_flags, tmp_path):
    flags = [*train_flags(small), "--encoder", "tiny_video", "--num_epochs", 1]
    for length, window in ((1, 8), (8, 16)):
        places = ["--output_path", tmp_path / str(length), "--run_path", tmp_path / f"run{length}"]
        done = call(train, *flags, *places, "--finetune", "--sequence_length", length)
        assert done.status == 0, done.err
        path = tmp_path / str(length) / "ConvLSTM_2.pth"
        encoder = load_checkpoint(path).encoder
        assert (encoder.windows.frames, encoder.finetuned) == (window, True)
        assert encoder.resized(32).windows == encoder.windows
        tested = call(test_script, "--checkpoint_model", path, "--precision", "fp32")
        assert "encoding" not in tested.out
        assert tested.out.split("test ")[1].splitlines()[0] in done.out
    frozen = call(train, *flags, "--output_path", tmp_path / "frozen")
    assert frozen.status == 0, frozen.err
    assert load_checkpoint(tmp_path / "frozen/ConvLSTM_1.pth").encoder.windows == TINY_VIDEO.windows


def test_a_run_from_a_checkpoint_is_resumed_though_that_was_moved(call, small, train_flags, tmp_path):
    flags = [*train_flags(small), "--num_epochs", 2]
    assert call(train, *flags, "--model", "ActionBERT", "--latent_dim", 16).status == 0
    start = ["--checkpoint_model", "model_checkpoints/ActionBERT_2.pth"]
    done = call(train, *data_flags(small), *start, "--precision", "fp32", "--num_epochs", 2, "--finetune")
    assert done.status == 0, done.err
    assert "epoch 2 of 2" in done.out, "its head knows the actions"
    assert (tmp_path / "model_checkpoints/earlier-1/ActionBERT_2.pth").is_file()
    again = call(train, "--resume")
    assert again.status == 0, again.err
    assert "encoding" not in again.out
    # What pretrain.py has made knows no action.
    contents = torch.load(tmp_path / "model_checkpoints/earlier-1/ActionBERT_2.pth", weights_only=True)
    contents["settings"]["pretrained_on"] = "x"
    torch.save(contents, tmp_path / "pretrained.pth")
    start = ["--checkpoint_model", "pretrained.pth", "--output_path", "second"]
    done = call(train, *data_flags(small), *start, "--precision", "fp32", "--num_epochs", 2, "--finetune")
    assert done.status == 0, done.err
    assert "epoch 4 of 4" in done.out


def test_networks_that_assert_in_place_of_checkpointing_are_trained_too():
    encoder = Encoder("timm/dla46_c", pretrained=False, img_dim=64)
    trained = encoder.unfreeze(1)
    encoder.train()
    encoder(torch.zeros(2, 1, 3, 64, 64, dtype=torch.uint8)).sum().backward()
    assert all(parameter.grad is not None for parameter, _ in trained)
