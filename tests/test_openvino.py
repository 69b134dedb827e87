"""A network in 8-bit integers: OpenVINO and NNCF make it once, without any clip."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import test as test_script
import train
from features import networks, quantized
from features.encoder import Encoder
from features.quantized import can_quantize, moving_windows
from features.windows import Windows
from features.workers import map_on_cores
from utils.process import UserError

pytestmark = pytest.mark.skipif(not can_quantize(), reason="OpenVINO and NNCF are not installed")


def test_windows_that_measure_ranges_move_and_are_always_the_same():
    windows = moving_windows(Windows(8, 4, 4), 32)
    assert len(windows) == 32
    assert all(window.shape == (1, 8, 32, 32, 3) for window in windows)
    assert all(
        np.array_equal(one, other)
        for one, other in zip(windows, moving_windows(Windows(8, 4, 4), 32), strict=True)
    )
    changes = [np.abs(np.diff(window[0].astype(int), axis=0)).mean() for window in windows]
    assert min(changes) > 2
    assert len({window.tobytes() for window in windows}) == 32


@pytest.mark.parametrize(("name", "lengths"), [("tiny", [1]), ("i3d", [16, 24, 64])])
def test_embeddings_are_nearly_those_of_pytorch(name, lengths):
    encoder = Encoder(name, img_dim=32)
    exact = Encoder(name, img_dim=32).prepare("fp32")
    encoder.prepare("int8")
    assert encoder.kind == "int8"
    assert encoder.precision.startswith("int8-")
    numbers = torch.Generator().manual_seed(0)
    for length in lengths:
        windows = torch.randint(0, 256, (6, length, 3, 32, 32), dtype=torch.uint8, generator=numbers)
        one, other = encoder.embed(windows), exact.embed(windows)
        assert one.shape == other.shape
        assert F.cosine_similarity(one.flatten(1), other.flatten(1)).min() > 0.95
        parts = list(map_on_cores(encoder.embed, windows[:, None]))
        assert torch.allclose(torch.cat(parts), one, atol=0.05 * float(one.abs().max()))


def test_a_network_that_counts_on_one_length_is_refused():
    with pytest.raises(UserError, match="its answers differ from PyTorch's"):
        Encoder("tiny_video").prepare("int8")


def test_it_is_made_once_for_the_user_and_again_if_it_is_damaged(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    Encoder("tiny", img_dim=24).prepare("int8")
    assert "quantizing tiny for 24 px, once" in capsys.readouterr().out
    Encoder("tiny", img_dim=24).prepare("int8")
    assert capsys.readouterr().out == ""
    Encoder("tiny", img_dim=32).prepare("int8")
    assert "quantizing tiny for 32 px" in capsys.readouterr().out
    (path,) = (tmp_path / "action-recognition").glob("tiny-24px*.xml")
    path.write_text("<net>")
    with pytest.raises(UserError, match=r"damaged .* delete it"):
        Encoder("tiny", img_dim=24).prepare("int8")


def test_auto_takes_it_where_nothing_is_lost(monkeypatch):
    assert Encoder("tiny").prepare("auto").kind != "int8"
    spec = networks.encoder_spec("tiny")
    monkeypatch.setitem(networks.ENCODERS, "tiny", lambda: replace(spec, int8=True))
    assert Encoder("tiny", img_dim=24).prepare("auto").kind == "int8"
    monkeypatch.setattr("features.encoder.can_quantize", lambda: False)
    assert Encoder("tiny", img_dim=24).prepare("auto").kind != "int8"


def test_what_does_not_go_is_told_in_a_line(call, small, train_flags, monkeypatch):
    monkeypatch.setitem(sys.modules, "nncf", None)
    done = call(train, *train_flags(small), "--precision", "int8")
    assert done.status == 1
    assert (
        "int8 needs the package nncf; run pip install -r requirements-openvino.txt" in done.one_line_error()
    )


def test_a_training_in_int8_is_tested_and_resumed_in_it(call, small, train_flags, tmp_path, monkeypatch):
    flags = [*train_flags(small), "--precision", "int8", "--num_epochs", 2]
    done = call(train, *flags)
    assert done.status == 0, done.err
    assert "tiny in int8-" in done.out
    assert call(train, "--resume").status == 0
    data = [*train_flags(small)[:4], "--checkpoint_model", "model_checkpoints/ConvLSTM_2.pth"]
    done = call(test_script, *data, "--precision", "int8")
    assert done.status == 0, done.err
    assert "encoding" not in done.out
    # Without OpenVINO the same checkpoint is tested in another precision.
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    done = call(test_script, *data)
    assert (done.status, "encoding" in done.out) == (0, True), done.err
