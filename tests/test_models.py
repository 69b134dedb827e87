"""The heads: what they compute, what they see, and how they begin."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import test as test_script
import test_on_video
import train
from features.encoder import Encoder
from models import MODELS, ConvLSTM, Head, build_head

# Each sees embeddings, and where in a clip they stand it does not.
ORDER_BLIND = ("AttentiveProbe", "ConvClassifier", "LinearProbe")


def waves(*shape, phase=0.0):
    """Numbers that look random and are the same everywhere."""
    count = math.prod(shape)
    return torch.sin(torch.arange(count, dtype=torch.float64) ** 2 / 3 + phase).float().view(shape)


def filled(name, **sizes):
    """A small head whose numbers are known."""
    if name == "ConvLSTM":
        sizes["hidden_dim"] = 7
    head = build_head(name, 48, 3, latent_dim=8, sequence_length=5, **sizes)[0].eval()
    for number, (_, tensor) in enumerate(sorted(head.state_dict().items())):
        if tensor.is_floating_point():
            tensor.copy_(waves(*tensor.shape, phase=number) / 2 + (0.6 if tensor.ndim == 1 else 0))
    return head


# Logits of two clips, computed by the heads of earlier checkpoints; the first one's two frames in front are
# padding.
KNOWN = [
    ("ConvLSTM", {}, [[1.61192, 1.12228, 1.25393], [1.60497, 1.02766, 1.18104]]),
    (
        "ConvLSTM",
        {"pooling": "last", "bidirectional": False, "lstm_layers": 2},
        [[1.55617, 0.69282, -1.86541], [1.51799, 0.75122, -1.87457]],
    ),
    ("ConvLSTM", {"pooling": "average"}, [[-0.54451, -0.92572, -3.7453], [-0.65793, -0.7951, -3.48866]]),
    ("ActionBERT", {}, [[2.24486, -0.54785, 0.00494], [2.13009, -0.51022, 0.04588]]),
    ("ConvClassifier", {}, [[-0.97961, -1.86459, -0.75591], [-1.16484, -1.93851, -0.6086]]),
]


@pytest.mark.parametrize(("name", "sizes", "expected"), KNOWN)
def test_logits_are_what_they_were(name, sizes, expected):
    padding = torch.zeros(2, 4, dtype=torch.bool)
    padding[0, :2] = True
    with torch.no_grad():
        found = filled(name, **sizes).classify(waves(2, 4, 48), padding)
    assert torch.allclose(found, torch.tensor(expected), atol=1e-4), found


@pytest.mark.full_size
def test_default_sizes_are_those_of_the_original():
    assert build_head("ConvLSTM", 48, 2)[1] == {
        "latent_dim": 512, "sequence_length": 40, "hidden_dim": 1024, "lstm_layers": 1,
        "bidirectional": True, "pooling": "attention",
    }  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_every_head_takes_any_length_and_each_clip_by_itself(name):
    head = filled(name)
    for length in (1, 4, 9):
        embeddings = waves(3, length, 48)
        together = head.classify(embeddings)
        assert together.shape == (3, 3)
        for clip in range(3):
            assert torch.allclose(head.classify(embeddings[clip : clip + 1])[0], together[clip], atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_who_sees_the_order_of_frames(name):
    head, embeddings = filled(name), waves(4, 6, 48)
    shuffled = embeddings[:, [3, 0, 5, 1, 4, 2]]
    same = torch.allclose(head.classify(embeddings), head.classify(shuffled), atol=1e-5)
    assert same == (name in ORDER_BLIND)


@pytest.mark.parametrize("name", ["ActionBERT", *ORDER_BLIND])
def test_padding_is_masked(name):
    head, embeddings = filled(name), waves(2, 6, 48)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[0, :4], padding[1, :1] = True, True
    changed = torch.where(padding[..., None], waves(2, 6, 48, phase=1), embeddings)
    assert torch.allclose(head.classify(embeddings, padding), head.classify(changed, padding), atol=1e-6)
    assert not torch.allclose(head.classify(embeddings), head.classify(changed), atol=1e-4)
    if name in ORDER_BLIND:
        found = head.classify(embeddings, padding)
        assert torch.allclose(found[:1], head.classify(embeddings[:1, 4:]), atol=1e-5)


@pytest.mark.parametrize(("name", "sizes"), [("ConvLSTM", {"pooling": "average"}), ("ConvClassifier", {})])
def test_the_logits_of_an_average_are_the_logarithms_of_probabilities(name, sizes):
    logits = filled(name, **sizes).classify(waves(4, 5, 48))
    assert torch.allclose(logits.exp().sum(dim=1), torch.ones(4), atol=1e-5)


def test_a_temperature_divides_logits():
    head, embeddings = filled("LinearProbe"), waves(2, 4, 48)
    before = head.classify(embeddings)
    head.temperature = 2.5
    assert torch.allclose(head.classify(embeddings), before / 2.5)
    assert torch.allclose(head(embeddings), before)


def test_a_transformer_begins_with_small_weights_and_drops_a_tenth():
    torch.manual_seed(0)
    head = MODELS["ActionBERT"](48, 3, latent_dim=64, sequence_length=10)
    for name, matrix in head.named_parameters():
        if matrix.ndim > 1 and name != "positions":
            assert matrix.std().item() == pytest.approx(0.02, rel=0.3)
    layers = head.transformer.layers
    assert not torch.equal(layers[0].linear1.weight, layers[1].linear1.weight), "each its own"
    assert {module.p for module in head.transformer.modules() if isinstance(module, nn.Dropout)} == {0.1}
    with pytest.raises(ValueError, match="multiple of 8"):
        build_head("ActionBERT", 48, 3, latent_dim=20)


def test_forget_gates_begin_open():
    head = ConvLSTM(48, 3, latent_dim=4, hidden_dim=6, lstm_layers=2)
    for name, bias in head.lstm.named_parameters():
        if name.startswith("bias_ih"):
            assert (bias[6:12] == 2).all()
            assert (bias[:6].abs() < 1).all()


@pytest.mark.parametrize("name", ["ConvLSTM", "ActionBERT", "AttentiveProbe", "ConvClassifier"])
def test_dropout_takes_from_what_the_last_layer_sees(name):
    head, embeddings = filled(name), waves(2, 4, 48)
    before = head.classify(embeddings)
    head.dropout.train().p = 1.0
    # Nothing is left but the bias.
    first, second = head.classify(embeddings)
    assert torch.allclose(first, second, atol=1e-6)
    assert not torch.allclose(before[0], before[1], atol=1e-3)


def test_the_attentive_probe_is_a_weighted_mean_and_a_perceptron():
    head, embeddings = filled("AttentiveProbe"), waves(2, 5, 48)
    context = F.layer_norm(embeddings, (48,), head.norm.weight, head.norm.bias)
    weights, biases = head.attention.in_proj_weight.chunk(3), head.attention.in_proj_bias.chunk(3)
    query = (weights[0] @ head.query + biases[0]).view(16, 3)
    key = (context @ weights[1].T + biases[1]).view(2, 5, 16, 3)
    value = (context @ weights[2].T + biases[2]).view(2, 5, 16, 3)
    shares = torch.einsum("hd,bthd->bth", query / 3**0.5, key).softmax(1)
    seen = torch.einsum("bth,bthd->bhd", shares, value).flatten(1)
    pooled = head.query + F.linear(seen, head.attention.out_proj.weight, head.attention.out_proj.bias)
    assert torch.allclose(head(embeddings), head.output(pooled + head.mlp(pooled)), atol=1e-4)
    assert [MODELS["AttentiveProbe"](width, 3).attention.num_heads for width in (1024, 27, 1280)] == [
        16,
        1,
        16,
    ]


def test_a_linear_probe_sees_the_direction_of_the_mean_and_begins_at_zero():
    head, embeddings = filled("LinearProbe"), waves(2, 5, 48)
    means = F.normalize(embeddings.mean(dim=1), dim=1)
    assert torch.allclose(head(embeddings), head.output(100 * means), atol=1e-5)
    assert torch.allclose(head(7 * embeddings), head(embeddings), atol=1e-5)
    expected = head(embeddings)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(head(embeddings), expected, atol=1e-4), "as exact in bfloat16"
    assert not any(parameter.any() for parameter in MODELS["LinearProbe"](48, 3).parameters())


def test_unknown_names_list_the_known_ones_and_the_nearest():
    with pytest.raises(ValueError, match=r"did you mean resnet152\?.*efficientnet_lite0"):
        Encoder("resnet15")
    with pytest.raises(ValueError, match=r"did you mean LinearProbe\?"):
        build_head("Linearprobe", 48, 3)
    with pytest.raises(ValueError, match="attention, last, average"):
        build_head("ConvLSTM", 48, 3, pooling="max")


class Extremes(Head):
    """A new approach: the largest value of each dimension over time."""

    def __init__(self, width, num_classes, *, latent_dim=512, sequence_length=40):
        super().__init__()
        self.output = torch.nn.Linear(width, num_classes)

    def forward(self, embeddings, padding=None):
        return self.output(self.dropout(embeddings.amax(dim=1)))


def test_a_new_head_is_one_class_and_one_entry(call, small, train_flags, tmp_path, monkeypatch):
    """Trained, tested, annotated: nothing else knows of it."""
    monkeypatch.setitem(MODELS, "Extremes", Extremes)
    done = call(train, *train_flags(small), "--model", "Extremes", "--num_epochs", 2)
    assert done.status == 0, done.err
    path = tmp_path / "model_checkpoints/Extremes_2.pth"
    tested = call(test_script, *train_flags(small)[:4], "--precision", "fp32", "--checkpoint_model", path)
    assert tested.status == 0, tested.err
    lines = [*done.out.splitlines(), *tested.out.splitlines()]
    figures = [line.split("test ")[1] for line in lines if "interval" in line]
    assert len(set(figures)) == 1, "train.py's last test and test.py agree"
    clip = small / "UCF-101/WalkLeft/v_WalkLeft_g01_c01.avi"
    shown = call(test_on_video, "--video_path", clip, "--checkpoint_model", path, "--output", "out.mp4")
    assert shown.status == 0, shown.err
    assert (tmp_path / "out.mp4").stat().st_size > 1000
