import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from conftest import embed_frames
from features.encoder import Encoder
from models import MODELS, sinusoids
from training.classifier import Classifier


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
    ("ConvLSTM", {}, [[1.61192, 1.12228, 1.25393], [1.60497, 1.02766, 1.18104]]),
    (
        "ConvLSTM",
        {"pooling": "last", "bidirectional": False, "lstm_layers": 2},
        [[1.55617, 0.69282, -1.86541], [1.51799, 0.75122, -1.87457]],
    ),
    ("ConvLSTM", {"pooling": "average"}, [[-0.54451, -0.92572, -3.7453], [-0.65793, -0.7951, -3.48866]]),
    ("ActionBERT", {}, [[2.24486, -0.54785, 0.00494], [2.13009, -0.51022, 0.04588]]),
    ("ConvClassifier", {}, [[-0.97961, -1.86459, -0.75591], [-1.16484, -1.93851, -0.6086]]),
    ("MeanPool", {}, [[6.94776, 0.13132, -8.11933], [5.7177, -2.49182, -2.59558]]),
    ("MeanPool", {"streams": ("rgb", "diff")}, [[4.66502, 0.18178, -3.65596], [7.78504, -0.59316, -1.60729]]),
]


@pytest.mark.parametrize(("name", "sizes", "expected"), KNOWN)
def test_a_model_of_an_earlier_checkpoint_computes_what_it_did_then(name, sizes, expected):
    net = filled(name, **sizes)
    padding = torch.zeros(2, 4, dtype=torch.bool)
    padding[0, :2] = True
    with torch.no_grad():
        found = net.classify(waves(2, 4, net.width), padding)
    assert torch.allclose(found, torch.tensor(expected), atol=1e-4), found


@pytest.mark.full_size
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
    for name in MODELS:
        config = Classifier(name, 2, encoder="tiny").config
        assert (config["latent_dim"], config["sequence_length"]) == (512, 40)
        if name == "ActionBERT":
            assert (config["layers"], config["attention_heads"]) == (2, 8)


def test_the_encoder_has_the_weights_of_its_name_unless_told_otherwise():
    frames = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    known = Classifier("MeanPool", 2, encoder="tiny")
    assert known.encoder.pretrained
    assert torch.equal(embed_frames(known.encoder, frames), embed_frames(Encoder("tiny"), frames))
    assert not Classifier("MeanPool", 2, encoder="tiny", pretrained=False).encoder.pretrained


@pytest.mark.parametrize("name", MODELS)
def test_a_clip_is_named_alike_whatever_stands_beside_it(name):
    net, embeddings = filled(name), waves(3, 4, 48)
    together = net.classify(embeddings)
    for clip in range(3):
        assert torch.allclose(net.classify(embeddings[clip : clip + 1])[0], together[clip], atol=1e-5)


@pytest.mark.parametrize("name", ["AttentiveProbe", "ConvClassifier", "MeanPool", "NormalizedProbe"])
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
    head = Classifier("ActionBERT", 3, encoder="tiny", latent_dim=64, sequence_length=10).heads["rgb"]
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
    head = net.heads["rgb"]
    assert {name: tuple(one.shape) for name, one in head.named_parameters()} == {
        "output.weight": (3, 48),
        "output.bias": (3,),
    }
    embeddings = 5 + 3 * torch.randn(16, 6, 48)
    means = embeddings.mean(dim=1)
    standard = (means - means.mean(dim=0)) / means.std(dim=0, correction=0)
    expected = F.linear(standard, head.output.weight, head.output.bias)
    assert torch.allclose(net.train().classify(embeddings), expected, atol=1e-3)


@pytest.mark.parametrize("name", ["ConvLSTM", "ActionBERT", "AttentiveProbe", "ConvClassifier"])
def test_dropout_takes_from_what_the_last_layer_sees(name):
    net, embeddings = filled(name), waves(2, 4, 48)
    before = net.classify(embeddings)
    net.heads["rgb"].dropout.train().p = 1.0
    # Nothing is left but the bias.
    first, second = net.classify(embeddings)
    assert torch.allclose(first, second, atol=1e-6)
    assert not torch.allclose(before[0], before[1], atol=1e-3)


@pytest.mark.parametrize("pooling", ["attention", "last", "average"])
@pytest.mark.parametrize(("bidirectional", "width"), [(True, 14), (False, 7)])
def test_what_pretraining_reads_of_an_lstm(pooling, bidirectional, width):
    head = filled("ConvLSTM", pooling=pooling, bidirectional=bidirectional).heads["rgb"]
    pooled, frames = head.read(waves(2, 5, 48))
    assert (head.hidden_dim, pooled.shape, frames.shape) == (width, (2, width), (2, 5, width))
    if pooling == "attention":
        weights = head.attention_layer(frames).softmax(dim=1)
        assert torch.allclose(pooled, (weights * frames).sum(dim=1), atol=1e-6)
    else:
        assert torch.allclose(pooled, frames[:, -1] if pooling == "last" else frames.mean(dim=1), atol=1e-6)


def test_what_pretraining_reads_of_a_transformer():
    head, embeddings = filled("ActionBERT").heads["rgb"], waves(2, 5, 48)
    pooled, frames = head.read(embeddings)
    assert (head.hidden_dim, pooled.shape, frames.shape) == (8, (2, 8), (2, 5, 8))
    assert torch.allclose(head(embeddings), head.output(pooled), atol=1e-6)


@pytest.mark.parametrize("name", ["AttentiveProbe", "ConvClassifier", "MeanPool", "NormalizedProbe"])
def test_where_no_frame_sees_another_there_is_nothing_to_read(name):
    head = filled(name).heads["rgb"]
    assert head.hidden_dim == 0
    with pytest.raises(NotImplementedError):
        head.read(waves(2, 5, 48))


def test_the_probe_is_a_weighted_mean_and_a_perceptron():
    head, embeddings = filled("AttentiveProbe").heads["rgb"], waves(2, 5, 48)
    context = F.layer_norm(embeddings, (48,), head.norm.weight, head.norm.bias)
    weights, biases = head.attention.in_proj_weight.chunk(3), head.attention.in_proj_bias.chunk(3)
    query = (weights[0] @ head.query + biases[0]).view(16, 3)
    key = (context @ weights[1].T + biases[1]).view(2, 5, 16, 3)
    value = (context @ weights[2].T + biases[2]).view(2, 5, 16, 3)
    shares = torch.einsum("hd,bthd->bth", query / 3**0.5, key).softmax(1)
    seen = torch.einsum("bth,bthd->bhd", shares, value).flatten(1)
    pooled = head.query + F.linear(seen, head.attention.out_proj.weight, head.attention.out_proj.bias)
    assert torch.allclose(head(embeddings), head.output(pooled + head.mlp(pooled)), atol=1e-4)


def test_a_normalized_probe_sees_where_embeddings_point_and_not_how_long_they_are():
    head, embeddings = filled("NormalizedProbe").heads["rgb"], waves(2, 5, 48)
    means = embeddings.mean(dim=1)
    lengths = means.square().sum(dim=1, keepdim=True).sqrt()
    assert torch.allclose(head(embeddings), head.output(30 * means / lengths), atol=1e-5)
    assert torch.allclose(head(7 * embeddings), head(embeddings), atol=1e-5)


def test_a_normalized_probe_is_as_exact_in_bfloat16():
    torch.manual_seed(0)
    head = MODELS["NormalizedProbe"](1024, 10).eval()
    torch.nn.init.normal_(head.output.weight)
    embeddings = torch.rand(20, 4, 1024)
    with torch.no_grad():
        exact = head(embeddings).softmax(1)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = head(embeddings).float().softmax(1)
    assert (exact - rounded).abs().max() < 1e-3


@pytest.mark.parametrize(("width", "heads"), [(1024, 16), (27, 1), (48, 16), (1280, 16)])
def test_a_probe_has_as_many_heads_as_divide_the_width(width, heads):
    assert MODELS["AttentiveProbe"](width, 3).attention.num_heads == heads


def test_the_transformer_drops_a_tenth_in_training():
    head = MODELS["ActionBERT"](6, 3, latent_dim=16, sequence_length=12)
    inside = [module.p for module in head.transformer.modules() if isinstance(module, nn.Dropout)]
    attention = [m.dropout for m in head.transformer.modules() if isinstance(m, nn.MultiheadAttention)]
    assert set(inside) == set(attention) == {0.1}
    assert len(attention) == 2
