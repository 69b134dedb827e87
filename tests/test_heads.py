import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models import MODELS, Classifier, ConvLSTM, sinusoids


def waves(*shape, phase=0.0):
    """Numbers that look random and are the same everywhere."""
    count = math.prod(shape)
    return torch.sin(torch.arange(count, dtype=torch.float64) ** 2 / 3 + phase).float().view(shape)


def filled(name, **sizes):
    """A small model whose trained numbers are known."""
    if name == "ConvLSTM":
        sizes["hidden_dim"] = 7
    net = Classifier(name, 3, encoder="tiny", latent_dim=8, sequence_length=5, **sizes).eval()
    for number, (_, tensor) in enumerate(sorted(net.heads.state_dict().items())):
        if tensor.is_floating_point():
            tensor.copy_(waves(*tensor.shape, phase=number) / 2 + (0.6 if tensor.ndim == 1 else 0))
    return net


# Logits of two clips; the first one's two frames in front are padding.
KNOWN = [
    ("ConvLSTM", {}, [[1.6119, 1.1223, 1.2539], [1.605, 1.0277, 1.181]]),
    (
        "ConvLSTM",
        {"pooling": "last", "bidirectional": False, "lstm_layers": 2},
        [[1.5562, 0.6928, -1.8654], [1.518, 0.7512, -1.8746]],
    ),
    ("ConvLSTM", {"pooling": "average"}, [[-0.5445, -0.9257, -3.7453], [-0.6579, -0.7951, -3.4887]]),
    ("ActionBERT", {}, [[2.2449, -0.5478, 0.0049], [2.1301, -0.5102, 0.0459]]),
    ("ConvClassifier", {}, [[-0.9796, -1.8646, -0.7559], [-1.1648, -1.9385, -0.6086]]),
    ("MeanPool", {}, [[6.9478, 0.1313, -8.1193], [5.7177, -2.4918, -2.5956]]),
    ("MeanPool", {"streams": ("rgb", "diff")}, [[4.665, 0.1818, -3.656], [7.785, -0.5932, -1.6073]]),
]


@pytest.mark.parametrize(("name", "sizes", "expected"), KNOWN)
def test_a_model_of_an_earlier_checkpoint_computes_what_it_did_then(name, sizes, expected):
    net = filled(name, **sizes)
    padding = torch.zeros(2, 4, dtype=torch.bool)
    padding[0, :2] = True
    with torch.no_grad():
        found = net.classify(waves(2, 4, net.width), padding)
    assert torch.allclose(found, torch.tensor(expected), atol=1e-4), found


def test_sizes_that_no_flag_gives_are_those_of_earlier_checkpoints():
    config = Classifier("ConvLSTM", 2, encoder="tiny").config
    assert config == {
        "num_classes": 2,
        "encoder": "tiny",
        "streams": ["rgb"],
        "latent_dim": 512,
        "sequence_length": 40,
        "hidden_dim": 1024,
        "lstm_layers": 1,
        "bidirectional": True,
        "pooling": "attention",
    }
    config = Classifier("ActionBERT", 2, encoder="tiny").config
    assert (config["layers"], config["attention_heads"]) == (2, 8)


@pytest.mark.parametrize("name", MODELS)
def test_a_clip_is_named_alike_whatever_stands_beside_it(name):
    net, embeddings = filled(name), waves(3, 4, 48)
    together = net.classify(embeddings)
    for clip in range(3):
        assert torch.allclose(net.classify(embeddings[clip : clip + 1])[0], together[clip], atol=1e-5)


@pytest.mark.parametrize("name", ["ConvClassifier", "MeanPool"])
def test_a_padded_clip_is_the_clip_without_its_padding(name):
    net, embeddings = filled(name), waves(2, 6, 48)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[0, :4], padding[1, :1] = True, True
    found = net.classify(embeddings, padding)
    assert torch.allclose(found[:1], net.classify(embeddings[:1, 4:]), atol=1e-5)
    assert torch.allclose(found[1:], net.classify(embeddings[1:, 1:]), atol=1e-5)


@pytest.mark.parametrize(("name", "sizes"), [("ConvLSTM", {"pooling": "average"}), ("ConvClassifier", {})])
def test_the_logits_of_an_average_are_the_logarithms_of_probabilities(name, sizes):
    logits = filled(name, **sizes).classify(waves(4, 5, 48))
    assert torch.allclose(logits.exp().sum(dim=1), torch.ones(4), atol=1e-5)


def test_positions_are_sines_and_cosines_of_ever_longer_waves():
    positions = sinusoids(30, 7)
    assert positions.shape == (30, 7)
    for place in (0, 1, 29):
        for rate in range(4):
            angle = place / 10_000 ** (2 * rate / 7)
            assert positions[place, 2 * rate].item() == pytest.approx(math.sin(angle), abs=1e-5)
            if 2 * rate + 1 < 7:
                assert positions[place, 2 * rate + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


def test_a_transformer_begins_with_small_weights_and_positions_that_tell_apart():
    torch.manual_seed(0)
    head = Classifier("ActionBERT", 3, encoder="tiny", latent_dim=64, sequence_length=10).head("rgb")
    matrices = [one for name, one in head.named_parameters() if one.ndim > 1 and "positions" not in name]
    assert len(matrices) == 10
    for matrix in [*matrices, head.cls]:
        assert matrix.std().item() == pytest.approx(0.02, rel=0.3)
    layers = head.transformer.layers
    assert not torch.equal(layers[0].linear1.weight, layers[1].linear1.weight), "each its own"
    assert torch.equal(head.positions.data, sinusoids(10, 64))
    assert head.positions.requires_grad


def test_a_linear_probe_trains_one_matrix_on_standardised_means():
    net = Classifier("MeanPool", 3, encoder="tiny")
    head = net.head("rgb")
    assert {name: tuple(one.shape) for name, one in head.named_parameters()} == {
        "output.weight": (3, 48),
        "output.bias": (3,),
    }
    embeddings = 5 + 3 * torch.randn(16, 6, 48)
    means = embeddings.mean(dim=1)
    standard = (means - means.mean(dim=0)) / means.std(dim=0, correction=0)
    expected = F.linear(standard, head.output.weight, head.output.bias)
    assert torch.allclose(net.train().classify(embeddings), expected, atol=1e-3)


@pytest.mark.parametrize("name", ["ConvLSTM", "ActionBERT", "ConvClassifier"])
def test_dropout_takes_from_what_the_last_layer_sees(name):
    net, embeddings = filled(name), waves(2, 4, 48)
    before = net.classify(embeddings)
    net.head("rgb").dropout.train().p = 1.0
    # Nothing is left but the bias.
    first, second = net.classify(embeddings)
    assert torch.allclose(first, second, atol=1e-6)
    assert not torch.allclose(before[0], before[1], atol=1e-3)


def test_one_direction_has_half_the_width():
    for bidirectional, width in ((True, 14), (False, 7)):
        head = ConvLSTM(48, 3, latent_dim=4, hidden_dim=7, bidirectional=bidirectional)
        assert head.hidden_dim == width
        pooled, hidden = head(torch.randn(2, 5, 48)), head.read(torch.randn(2, 5, 48))
        assert pooled.shape == (2, 3)
        assert (hidden[0].shape, hidden[1].shape) == ((2, width), (2, 5, width))


def test_the_transformer_drops_a_tenth_in_training():
    head = MODELS["ActionBERT"](6, 3, latent_dim=16, sequence_length=12)
    inside = [module.p for module in head.transformer.modules() if isinstance(module, nn.Dropout)]
    attention = [m.dropout for m in head.transformer.modules() if isinstance(m, nn.MultiheadAttention)]
    assert set(inside) == set(attention) == {0.1}
    assert len(attention) == 2
