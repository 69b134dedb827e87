"""The recipe's parts: schedule, augmentation, averaging, and that each flag does what it says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train
from training.checkpoint import load_checkpoint
from training.classifier import Classifier
from training.learner import Learner, learning_rate_factor
from training.recipe import RECIPES, Recipe

PLAIN = RECIPES["original"]


def small_model(seed=0):
    torch.manual_seed(seed)
    return Classifier("ConvLSTM", 3, encoder="tiny", latent_dim=4, hidden_dim=5)


def learner_of(steps=10, seed=0, **changes):
    return Learner(small_model(), Recipe(**{**vars(PLAIN), **changes}), steps, seed)


@given(steps=st.integers(1, 500), warmup=st.floats(0, 0.9), cosine=st.booleans())
def test_the_learning_rate_rises_in_a_line_and_falls_as_a_cosine(steps, warmup, cosine):
    factors = [learning_rate_factor(step, steps, warmup, cosine=cosine) for step in range(steps)]
    top = round(warmup * steps)
    assert all(0 <= factor <= 1 for factor in factors)
    assert factors[:top] == sorted(factors[:top])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    if top < steps:
        assert factors[top] == 1
        end = learning_rate_factor(steps, steps, warmup, cosine=cosine)
        assert end == pytest.approx(0 if cosine else 1)


def test_only_the_head_is_trained_and_only_matrices_decay():
    learner = learner_of(optimizer="adamw", weight_decay=0.3)
    frozen = set(map(id, learner.model.encoder.feature_extractor.parameters()))
    matrices, others = learner.optimizer.param_groups
    for group, decay, dims in ((matrices, 0.3, {2}), (others, 0.0, {1})):
        assert group["weight_decay"] == decay
        assert {parameter.ndim for parameter in group["params"]} == dims
        assert not frozen & set(map(id, group["params"]))
    trained = [one for one in learner.model.parameters() if id(one) not in frozen]
    assert len(matrices["params"]) + len(others["params"]) == len(trained)


def test_a_batch_draws_by_its_place_alone():
    embeddings, labels = torch.randn(4, 6, 8), torch.tensor([0, 1, 2, 0])
    learner = learner_of(mixup=0.4, seed=3)

    def drawn(*place):
        learner.begin_batch(*place)
        return learner.augment(embeddings, labels)[0]

    first = drawn(2, 5, 0)
    torch.rand(100)
    assert torch.equal(drawn(2, 5, 0), first)
    for other in ((3, 5, 0), (2, 6, 0), (2, 5, 1)):
        assert not torch.equal(drawn(*other), first)


@given(alpha=st.floats(0.1, 2), clips=st.integers(2, 6))
def test_mixup_blends_clips_and_labels_alike(alpha, clips):
    learner = learner_of(mixup=alpha)
    labels = torch.arange(clips) % 3
    # The embedding is its label: what a blend is made of can be read off.
    embeddings = torch.nn.functional.one_hot(labels, 3).float()[:, None].repeat(1, 4, 1)
    learner.begin_batch(1, clips, 0)
    mixed, targets = learner.augment(embeddings, labels)
    assert torch.allclose(mixed, targets[:, None].expand(-1, 4, -1))
    assert torch.allclose(targets.sum(1), torch.ones(clips))


def test_dropout_and_batchnorm_are_set_in_the_head_and_nowhere_else():
    model = small_model()
    model.encoder.feature_extractor.norm.momentum = 0.123
    Learner(model, Recipe(**{**vars(PLAIN), "dropout": 0.4, "norm_momentum": 0.2}), 10)
    assert model.heads["rgb"].dropout.p == 0.4
    head = model.heads["rgb"]
    assert head.projection[1].momentum == head.output_layers[1].momentum == 0.2
    assert model.encoder.feature_extractor.norm.momentum == 0.123


def one_step(learner, number):
    learner.model.train()
    learner.begin_batch(1, number, 0)
    embeddings = torch.randn(4, 6, 48)
    inputs, targets = learner.augment(embeddings, torch.tensor([0, 1, 2, 0]))
    learner.step(learner.loss(learner.model.classify(inputs), targets))


def test_a_learner_goes_on_from_its_state():
    def trained(learner, numbers):
        for number in numbers:
            one_step(learner, number)
        return learner

    changes = vars(RECIPES["default"])
    whole = trained(learner_of(**changes), range(6))
    first = trained(learner_of(**changes), range(3))
    second = learner_of(**changes)
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(first.state_dict())
    trained(second, range(3, 6))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name


def test_long_gradients_are_cut():
    learner = learner_of(clip_norm=0.01)
    one_step(learner, 0)
    length = torch.nn.utils.get_total_norm([one.grad for one in learner.parameters])
    assert length.item() == pytest.approx(0.01, rel=1e-3)


def test_recipes_and_their_flags(call, small, train_flags, tmp_path):
    def settings(*flags):
        done = call(train, *train_flags(small), "--num_epochs", 1, "--latent_dim", 8, *flags)
        assert done.status == 0, done.err
        return load_checkpoint(tmp_path / "model_checkpoints/ConvLSTM_1.pth").settings

    found = settings("--recipe", "original")
    assert (found["learning_rate"], found["dropout"], found["optimizer"]) == (1e-5, 0, "adam")
    found = settings("--dropout", 0.1)
    assert found["dropout"] == 0.1
    assert found["learning_rate"] == RECIPES["default"].learning_rate
    done = call(train, *train_flags(small), "--dropout", 1)
    assert (done.status, "--dropout" in done.one_line_error()) == (2, True)
