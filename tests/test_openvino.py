"""Frozen encoders that OpenVINO computes, in floating point and quantised to 8-bit integers."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

import export as export_script
import extract_features
import features.execution
import features.fill as fill_script
import test as test_script
import train
from features import networks
from features.encoder import INT8, OPENVINO, Encoder
from training.checkpoint import load_checkpoint
from utils.device import choose_dtype
from utils.process import UserError

pytest.importorskip("openvino", reason="OpenVINO is not installed")


@pytest.mark.parametrize(
    ("name", "side", "lengths", "stream"),
    [
        ("tiny", 32, (1,), "rgb"),
        ("tiny", 32, (2,), "diff"),
        ("i3d", 32, (16, 24, 64), "rgb"),
    ],
)
def test_its_embeddings_are_those_of_pytorch(name, side, lengths, stream):
    encoder = Encoder(name, pretrained=name != "i3d")
    windows = [
        torch.randint(0, 256, (count, length, 3, side, side), dtype=torch.uint8)
        for count, length in zip((3, 1, 2), lengths, strict=False)
    ]
    encoder.prepare(torch.float32)
    expected = [encoder.embed(some, stream) for some in windows]
    encoder.prepare(torch.float32, engine=OPENVINO)
    for some, of_pytorch in zip(windows, expected, strict=True):
        given = encoder.embed(some, stream)
        assert given.shape == of_pytorch.shape
        assert torch.allclose(given, of_pytorch, atol=1e-3 * float(of_pytorch.abs().max()))
    assert encoder.variant() == "openvino-float32"


def test_two_networks_are_converted_at_once():
    """By threads of their own, as in a model with two encoders."""
    encoders = [Encoder("tiny"), Encoder("resnet18", pretrained=False)] * 2
    windows = torch.randint(0, 256, (2, 1, 3, 32, 32), dtype=torch.uint8)
    expected = [encoder.embed(windows) for encoder in encoders]
    for encoder in encoders:
        encoder.prepare(torch.float32, engine=OPENVINO)
    with ThreadPoolExecutor(4) as pool:
        given = list(pool.map(lambda encoder: encoder.embed(windows), encoders))
    for one, other in zip(given, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-3 * float(other.abs().max()))


def test_a_network_that_reckons_with_one_length_is_told():
    encoder = Encoder("tiny_video")
    encoder.prepare(torch.float32, engine=OPENVINO)
    with pytest.raises(UserError, match=r"OpenVINO cannot take tiny_video .*; use --engine torch"):
        encoder.embed(torch.zeros(1, 16, 3, 24, 24, dtype=torch.uint8))


@pytest.mark.parametrize("stream", ["rgb", "diff"])
def test_quantised_it_is_nearly_the_same(stream):
    encoder = Encoder("resnet18", pretrained=False)
    length = 2 if stream == "diff" else 1
    windows = torch.randint(0, 256, (8, length, 3, 64, 64), dtype=torch.uint8)
    expected = encoder.embed(windows, stream)[:, 0]
    seen = windows.permute(0, 1, 3, 4, 2).contiguous()
    encoder.quantized[stream] = encoder.quantize(stream, [window[None].numpy() for window in seen])
    encoder.prepare(torch.float32, engine=INT8)
    given = encoder.embed(windows, stream)[:, 0]
    assert not torch.equal(given, expected)
    assert torch.cosine_similarity(given, expected).min() > 0.98
    digest = encoder.quantized[stream].sha256
    assert encoder.variant(stream) == f"openvino-int8-{digest[:12]}-float32"
    # Whatever the process has made before.
    assert encoder.quantize(stream, [window[None].numpy() for window in seen]).sha256 == digest
    with pytest.raises(ValueError, match="quantised for frames of 64 pixels, not 32"):
        encoder.embed(windows[..., :32, :32], stream)


def test_a_training_keeps_the_quantised_network_and_a_test_uses_it(call, toy, train_flags, tmp_path):
    flags = [*train_flags(toy), "--num_epochs", 1, "--cache_path", tmp_path / "cache", "--precision", "int8"]
    first = call(train, *flags)
    assert first.status == 0, first.err
    assert "quantising tiny for 32 px on 16 training clips" in first.out
    (kept,) = (tmp_path / "cache/quantized").iterdir()
    chosen = torch.load(kept, weights_only=True)["clips"]
    tested = "".join((toy / f"ucfTrainTestlist/testlist0{split}.txt").read_text() for split in (1, 2, 3))
    assert not [name for name in chosen if name in tested]
    checkpoint = load_checkpoint(tmp_path / "model_checkpoints/ConvLSTM_1.pth")
    network = checkpoint.model.encoder.quantized["rgb"]
    assert kept.stem.endswith(network.sha256[:12])
    assert checkpoint.settings["engine"] == "openvino"
    # Another split has the same network, and so the same cache.
    second = call(train, *flags, "--split_number", 2, "--output_path", "second")
    assert second.status == 0, second.err
    assert ("quantising" in second.out, "encoding" in second.out) == (False, False)
    # On another machine, where the checkpoint is all there is.
    shutil.rmtree(tmp_path / "cache")
    done = call(test_script, "--checkpoint_model", "model_checkpoints/ConvLSTM_1.pth", "--run_path", "again",
                "--cache_path", tmp_path / "other")  # fmt: skip
    assert done.status == 0, done.err
    (run,) = (path for path in (tmp_path / "runs").iterdir() if "split1" in path.name)
    before, after = (
        json.loads((path / "report.json").read_text()) for path in (run / "test", tmp_path / "again")
    )
    assert before["encoder_computed_in"] == after["encoder_computed_in"] == checkpoint_variant(network)
    assert before["figures"] == after["figures"]
    done = call(test_script, "--checkpoint_model", "model_checkpoints/ConvLSTM_1.pth", "--engine", "torch")
    assert done.status == 0, done.err
    assert "warning: tiny was quantised for training; here PyTorch computes it" in done.out
    # It takes frames of one size; nothing is begun with others.
    for script, more in ((test_script, []), (train, train_flags(toy)[:4])):
        done = call(script, *more, "--checkpoint_model", "model_checkpoints/ConvLSTM_1.pth", "--img_dim", 48,
                    "--cache_path", "third")  # fmt: skip
        assert "quantised for frames of 32 pixels, not 48; leave out --img_dim" in done.one_line_error()
    assert not (tmp_path / "third").exists()
    # What goes on from it without that network holds it no longer.
    done = call(train, *train_flags(toy)[:4], "--checkpoint_model", "model_checkpoints/ConvLSTM_1.pth",
                "--engine", "torch", "--num_epochs", 1, "--output_path", "plain")  # fmt: skip
    assert done.status == 0, done.err
    assert load_checkpoint(tmp_path / "plain/ConvLSTM_1.pth").model.encoder.quantized == {}
    contents = torch.load("model_checkpoints/ConvLSTM_1.pth", weights_only=True)
    contents["quantized"][0]["rgb"]["weights"][100] += 1
    torch.save(contents, "damaged.pth")
    damaged = call(test_script, "--checkpoint_model", "damaged.pth").one_line_error()
    assert "damaged.pth: damaged; its quantised network is not the one that was written" in damaged
    done = call(export_script, "--checkpoint_model", "model_checkpoints/ConvLSTM_1.pth")
    assert done.status == 0, done.err
    assert "warning: tiny was quantised for training; the exported model computes it in fp32" in done.out


def checkpoint_variant(network):
    dtype = choose_dtype("auto", torch.device("cpu"))
    return f"openvino-int8-{network.sha256[:12]}-{str(dtype).removeprefix('torch.')}"


def test_auto_quantises_what_loses_nothing_by_it(call, toy, train_flags, tmp_path, monkeypatch):
    flags = [*train_flags(toy), "--num_epochs", 1, "--cache_path", tmp_path / "cache", "--precision", "auto"]
    plain = call(train, *flags)
    assert plain.status == 0, plain.err
    assert "OpenVINO" not in plain.out
    monkeypatch.setitem(networks.ENCODERS, "tiny", replace(networks.ENCODERS["tiny"], int8=True))
    # A run that has begun otherwise stays as it was.
    done = call(train, "--resume")
    assert (done.status, "OpenVINO" in done.out) == (0, False), done.err
    # There are 16 clips that no split tests.
    done = call(train, *flags, "--output_path", "few")
    assert (done.status, "OpenVINO computes" in done.out) == (0, False), done.err
    assert "tiny: not in int8, for which a cache is wanted, and 32 clips that no split tests" in done.out
    monkeypatch.setattr(features.execution, "CLIPS", 16)
    done = call(train, *flags, "--output_path", "int8")
    assert done.status == 0, done.err
    assert "tiny: OpenVINO computes it in int8" in done.out
    other = replace(networks.ENCODERS["tiny"], int8=False, input_size=32)
    monkeypatch.setitem(networks.ENCODERS, "other", other)
    done = call(train, *flags, "--streams", "rgb,other", "--output_path", "two")
    assert (done.status, "OpenVINO computes" in done.out) == (0, False), done.err
    assert "tiny: not in int8, which may cost other accuracy; --precision int8 takes it for all" in done.out
    # What is kept needs no package to quantise with.
    with monkeypatch.context() as without:
        without.setattr(features.execution, "can_quantize", lambda: False)
        done = call(train, *flags, "--output_path", "kept")
    assert done.status == 0, done.err
    assert "tiny: OpenVINO computes it in int8" in done.out
    assert ("quantising" in done.out, "encoding" in done.out) == (False, False)
    for more in (("--engine", "torch"), ("--precision", "fp32"), ("--split_number", "random")):
        done = call(train, *flags, *more, "--output_path", "without")
        assert (done.status, "OpenVINO" in done.out) == (0, False), done.err
    # Each fold would want a network of its own, and so the whole data set encoded anew.
    own = ["--dataset_path", toy / "UCF-101", "--dataset", "folder", *flags[4:]]
    done = call(train, *own, "--output_path", "own")
    assert (done.status, "OpenVINO" in done.out) == (0, False), done.err


def test_what_does_not_go_is_told_in_a_line(call, toy, train_flags, tmp_path, monkeypatch):
    flags = [*train_flags(toy), "--num_epochs", 1, "--cache_path", tmp_path / "cache"]
    done = call(train, *flags, "--precision", "int8", "--engine", "torch")
    assert "--precision int8 is for OpenVINO; leave out --engine torch" in done.one_line_error()
    done = call(train, *flags, "--engine", "openvino", "--compile")
    assert "--compile is for PyTorch, and OpenVINO computes tiny; leave it out" in done.one_line_error()
    with monkeypatch.context() as without:
        without.setattr(features.execution, "openvino_is_installed", lambda: False)
        done = call(train, *flags, "--engine", "openvino")
        assert "OpenVINO is not installed, and computes tiny; run pip install -r" in done.one_line_error()
        done = call(train, *flags, "--precision", "int8")
        assert "OpenVINO is not installed" in done.one_line_error()
    flags = ["--video_path", next((toy / "UCF-101").glob("*/*.avi")), "--encoder", "tiny", "--output", "x"]
    done = call(extract_features, *flags, "--precision", "int8")
    assert "tiny has no quantised network here; features.py and train.py make" in done.one_line_error()
    assert not (tmp_path / "x").exists()


def test_features_are_filled_in_int8_and_a_damaged_network_is_told(call, toy, tmp_path):
    flags = ["--dataset_path", toy / "UCF-101", "--split_path", toy / "ucfTrainTestlist", "--img_dim", 32,
             "--cache_path", tmp_path / "cache", "--precision", "int8", "--encoder", "tiny"]  # fmt: skip
    done = call(fill_script, *flags)
    assert done.status == 0, done.err
    assert "-openvino-int8-" in done.out.splitlines()[-1]
    (kept,) = (tmp_path / "cache/quantized").iterdir()
    whole = kept.read_bytes()
    contents = torch.load(kept, weights_only=True)
    contents["weights"][100] += 1
    torch.save(contents, kept)
    other = kept.read_bytes()
    for damaged in (whole[:-1000], other):
        kept.write_bytes(damaged)
        assert f"{kept}: damaged; delete it, it is made again" in call(fill_script, *flags).one_line_error()
