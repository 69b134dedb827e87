import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import test as test_script
import test_on_video
import train
from models import MODELS, ConvLSTM, Head
from training.classifier import Classifier


def model(**changes):
    torch.manual_seed(0)
    return Classifier("ConvLSTM", 5, **{"encoder": "tiny", "latent_dim": 6, "hidden_dim": 7, **changes})


@pytest.fixture
def frames():
    return torch.randint(
        0, 256, (3, 4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize("pooling", ["attention", "last", "average"])
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


def test_order_matters(frames):
    net = model().eval()
    assert not torch.allclose(net(frames), net(frames.flip(1)), atol=1e-5)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=r"resnet152.*efficientnet_lite0"):
        model(encoder="vgg16")
    with pytest.raises(ValueError, match="attention, last, average"):
        model(pooling="max")


def test_forget_gates_begin_open():
    net = ConvLSTM(48, 3, latent_dim=4, hidden_dim=6, lstm_layers=2)
    for name, bias in net.lstm.named_parameters():
        if name.startswith("bias_ih"):
            assert (bias[6:12] == 2).all()
            assert (bias[:6].abs() < 1).all()
            assert (bias[12:].abs() < 1).all()


# Each sees embeddings, and where in a clip they stand it does not.
ORDER_BLIND = ("AttentiveProbe", "ConvClassifier", "MeanPool", "NormalizedProbe")
SEES_ORDER = {"ConvLSTM": True, "ActionBERT": True} | dict.fromkeys(ORDER_BLIND, False)


def any_model(name, **changes):
    torch.manual_seed(0)
    net = Classifier(name, 5, **{"encoder": "tiny", "latent_dim": 16, "sequence_length": 6, **changes}).eval()
    # A last layer of zeros and BatchNorm as training leaves them.
    for parameter in net.heads.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter)
    net.train()
    net.classify(torch.randn(8, 6, net.width))
    return net.eval()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("streams", [("rgb",), ("rgb", "diff")])
def test_every_model_encodes_and_classifies(name, streams):
    net = any_model(name, streams=streams)
    frames = torch.randint(0, 256, (3, 6, 3, 16, 16), dtype=torch.uint8)
    embeddings = net.encode(frames)
    assert embeddings.shape == (3, 6, 48 * len(streams))
    assert torch.equal(net(frames), net.classify(embeddings))
    assert net(frames).shape == (3, 5)
    # Any other length goes through as well.
    assert net.classify(torch.randn(2, 9, net.width)).shape == (2, 5)
    again = Classifier(name, **net.config)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again.eval()(frames), net(frames))


@pytest.mark.parametrize("name", MODELS)
def test_who_sees_the_order_of_frames(name):
    net, embeddings = any_model(name), torch.randn(4, 6, 48)
    same = torch.allclose(
        net.classify(embeddings), net.classify(embeddings[:, [3, 0, 5, 1, 4, 2]]), atol=1e-5
    )
    assert same != SEES_ORDER[name]


@pytest.mark.parametrize("name", ["ActionBERT", *ORDER_BLIND])
def test_padding_is_masked(name):
    net, embeddings = any_model(name), torch.randn(2, 6, 48)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[0, :4] = True
    changed = embeddings.clone()
    changed[0, :4] = torch.randn(4, 48)
    assert torch.allclose(net.classify(embeddings, padding), net.classify(changed, padding), atol=1e-6)
    assert not torch.allclose(net.classify(embeddings), net.classify(changed), atol=1e-4)


def test_streams_are_joined_by_the_mean_of_their_logits():
    net = any_model("ConvLSTM", streams=("rgb", "diff"))
    embeddings = torch.randn(3, 6, 96)
    alone = [net.heads["rgb"](embeddings[..., :48]), net.heads["diff"](embeddings[..., 48:])]
    assert torch.allclose(net.classify(embeddings), (alone[0] + alone[1]) / 2)


def test_a_width_that_heads_do_not_share_is_refused():
    with pytest.raises(ValueError, match="multiple of 8"):
        any_model("ActionBERT", latent_dim=20)


@given(length=st.integers(2, 60))
def test_positions_of_another_length_keep_their_ends(length):
    """Interpolated positions begin and end where the learned ones do, so a clip's ends look like ends."""
    from models import sinusoids

    learned = sinusoids(6, 16)
    stretched = F.interpolate(learned.T[None], size=length, mode="linear", align_corners=True)[0].T
    assert torch.allclose(stretched[[0, -1]], learned[[0, -1]], atol=1e-5)


class Extremes(Head):
    """A new approach: the largest value of each dimension over time."""

    def __init__(self, width, num_classes, *, latent_dim=512, sequence_length=40):
        super().__init__()
        self.output = torch.nn.Linear(width, num_classes)

    def forward(self, embeddings, padding=None):
        return self.output(self.dropout(embeddings.amax(dim=1)))


def test_a_new_model_is_one_class_and_one_entry(call, small, train_flags, tmp_path, monkeypatch):
    """Trained, tested, gone on with, annotated: nothing else knows of it."""
    monkeypatch.setitem(MODELS, "Extremes", Extremes)
    done = call(train, *train_flags(small), "--model", "Extremes", "--num_epochs", 2, "--streams", "rgb,diff")
    assert done.status == 0, done.err
    assert "training Extremes" in done.out
    path = tmp_path / "model_checkpoints/Extremes_2.pth"
    tested = call(test_script, *train_flags(small)[:4], "--precision", "fp32", "--checkpoint_model", path)
    assert tested.status == 0, tested.err
    figures = [
        line.split("test ")[1]
        for line in (*done.out.splitlines(), *tested.out.splitlines())
        if "interval" in line
    ]
    assert len(set(figures)) == 1, "train.py's last test and test.py agree"
    clip = small / "UCF-101/WalkLeft/v_WalkLeft_g01_c01.avi"
    shown = call(
        test_on_video, "--video_path", clip, "--checkpoint_model", path, "--output", tmp_path / "out.mp4"
    )
    assert shown.status == 0, shown.err
    assert (tmp_path / "out.mp4").stat().st_size > 1000


def test_positions_of_actionbert_are_interpolated_only_where_the_length_differs():
    torch.manual_seed(0)
    head = MODELS["ActionBERT"](6, 3, latent_dim=16, sequence_length=12)
    assert head._positions(12) is head.positions
    for length in (1, 5, 30):
        wanted = F.interpolate(head.positions.T[None], size=length, mode="linear", align_corners=True)[0].T
        assert torch.allclose(head._positions(length), wanted, atol=1e-6)
    names = set()

    def walk(node):
        if node is not None:
            names.add(type(node).__name__)
            for before, _ in node.next_functions:
                walk(before)

    # Its backward has no deterministic form on CUDA.
    walk(head._positions(30).grad_fn)
    assert not [name for name in names if "Upsample" in name]
