import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torchvision.models.video import mvit

from annotation.recognizer import LastLayer
from features.encoder import Encoder
from features.networks import ENCODERS, VideoNetwork, encoder_spec
from utils.process import UserError
from video.frames import resize_frames

NAMES = [
    "r3d_18", "mc3_18", "r2plus1d_18", "s3d", "mvit_v1_b", "mvit_v2_s", "swin3d_t", "swin3d_s", "swin3d_b"
]  # fmt: skip
# A width that is not that of the crop, and a height that is no whole part of it.
HEIGHT, WIDTH = 120, 160


def released(name):
    return torchvision.models.get_model_weights(name)["KINETICS400_V1"]


def lively(network):
    """With BatchNorms that are not the identity."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm3d):
            layer.bias.data.uniform_(-0.2, 0.2)
            layer.running_mean.uniform_(-0.2, 0.2)
            layer.running_var.uniform_(0.5, 1.5)
    return network.eval().requires_grad_(False)


def make(name, **sizes):
    torch.manual_seed(0)
    return lively(torchvision.models.get_model(name, **sizes))


def frames_of(count):
    """A video that is no noise: a pattern that moves."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    waves = [
        128 + 100 * np.sin((x + 3 * t) / 9 + channel) * np.cos(y / 7)
        for t in range(count)
        for channel in range(3)
    ]
    return [np.stack(waves[3 * t : 3 * t + 3], -1).astype(np.uint8) for t in range(count)]


@pytest.mark.parametrize("name", NAMES)
def test_an_entry_says_what_torchvision_says(name):
    spec, weights = encoder_spec(name), released(name)
    preset, meta = weights.transforms(), weights.meta
    assert preset.crop_size == [spec.input_size, spec.input_size]
    size = spec.resize.size
    assert preset.resize_size == ([size] if isinstance(size, int) else list(size))
    assert (spec.resize.crop, spec.resize.mode) == (spec.input_size, preset.interpolation.value)
    assert not spec.resize.antialias
    assert (list(spec.mean), list(spec.std)) == (preset.mean, preset.std)
    told = re.search(r"`frame_rate=([\d.]+)`.*`clip_len=(\d+)`", meta["_docs"])
    assert spec.fps == float(told[1])
    assert spec.categories() == meta["categories"]
    assert spec.windows.least >= meta.get("min_temporal_size", 1)
    if name != "s3d":  # whose 128 frames would take much memory
        assert spec.windows.frames == int(told[2])
        assert spec.windows.hop == spec.windows.least == spec.windows.frames
    assert spec.live_frames == spec.windows.least
    assert spec.fixed_size == name.startswith("mvit")
    assert not spec.flip
    with torch.device("meta"):
        network = VideoNetwork(torchvision.models.get_model(name))
    assert network.last_layer.weight.shape == (400, spec.width)


@pytest.mark.parametrize("name", NAMES)
def test_frames_are_resized_as_torchvision_resizes_them(name):
    spec = encoder_spec(name)
    frames = frames_of(2)
    ours = resize_frames(frames, spec.input_size, spec.resize)
    preset = released(name).transforms()
    preset.mean, preset.std = [0.0] * 3, [1.0] * 3
    theirs = 255 * preset(torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)).transpose(0, 1)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1.001


# S3D's own average is over 7 x 7 positions.
SIZES = {"s3d": 224, "mvit_v1_b": 64, "mvit_v2_s": 64}


@pytest.fixture
def quick_random_weights(monkeypatch):
    """Those of torchvision take a second for each of the larger networks."""
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda tensor, std: tensor.data.uniform_(-2 * std, 2 * std))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("quick_random_weights")
def test_its_own_logits_are_those_of_torchvisions_network(name, monkeypatch):
    """By way of `Encoder`, and of its copy with folded BatchNorms; of the very same uint8 frames."""
    spec, side = encoder_spec(name), SIZES.get(name, 32)
    if spec.fixed_size:  # a smaller one, which takes smaller frames only
        full = mvit._mvit
        monkeypatch.setattr(mvit, "_mvit", lambda **sizes: full(**sizes | {"spatial_size": (side, side)}))
        monkeypatch.setitem(ENCODERS, name, lambda: replace(spec, input_size=side))
    network = make(name)
    encoder = Encoder(name, state=network.state_dict(), img_dim=side)
    # Three time steps of S3D: two pairs.
    count = 24 if name == "s3d" else spec.windows.frames
    frames = resize_frames(frames_of(count), side, spec.resize)
    preset = released(name).transforms(crop_size=(side, side), resize_size=(side,))
    expected = network(preset(frames)[None])
    assert expected.std() > 1e-3
    own = LastLayer(encoder.feature_extractor)
    embeddings = encoder.embed(frames[None])
    assert embeddings.shape == (1, count // spec.windows.hop, spec.width)
    assert torch.allclose(own(embeddings), expected, atol=1e-4)
    if any(isinstance(layer, nn.BatchNorm3d) for layer in network.modules()):
        encoder.prepare("fp32")
        assert torch.allclose(own(encoder.embed(frames[None])), expected, atol=1e-4)
    encoder.prepare("bf16")
    fast = encoder.embed(frames[None])
    assert fast.dtype == torch.float32
    assert F.cosine_similarity(fast, embeddings, dim=-1).min() > 0.98
    if spec.fixed_size:
        with pytest.raises(UserError, match=f"--img_dim {side}"):
            Encoder(name, pretrained=False, img_dim=32)


def test_weights_are_read_from_that_place(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    network = make("r3d_18")
    # Its name holds the beginning of its hash, which is looked at after a download only.
    torch.save(network.state_dict(), folder / released("r3d_18").url.rsplit("/", 1)[1])
    encoder = Encoder("r3d_18")
    assert encoder.pretrained
    clip = resize_frames(frames_of(16), 32, encoder.resize)
    logits = LastLayer(encoder.feature_extractor)(encoder.embed(clip[None]))
    preset = released("r3d_18").transforms(crop_size=(32, 32), resize_size=(32,))
    assert torch.allclose(logits, network(preset(clip)[None]), atol=1e-4)
