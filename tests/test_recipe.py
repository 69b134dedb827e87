"""Optimizer and schedule of a training."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from models import build_head
from training.recipe import RECIPES, Optimization, Recipe, read_recipe


@given(steps=st.integers(1, 200), warmup=st.floats(0, 0.5), cosine=st.booleans())
def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine(steps, warmup, cosine):
    recipe = Recipe(learning_rate=1.0, warmup=warmup, cosine=cosine, clip_norm=0)
    optimization = Optimization(nn.Linear(2, 2), recipe, steps)
    rising = round(warmup * steps)
    for step in range(steps):
        if step < rising:
            expected = (step + 1) / rising
        else:
            expected = 0.5 + 0.5 * math.cos(math.pi * (step - rising) / (steps - rising)) if cosine else 1
        assert optimization.learning_rate == pytest.approx(expected)
        optimization.optimizer.step()
        optimization.scheduler.step()


def test_matrices_decay_and_dropout_and_batchnorm_are_the_recipes():
    head = build_head("ConvLSTM", 6, 3, latent_dim=4, hidden_dim=3)[0]
    optimization = Optimization(head, RECIPES["default"], 10)
    decaying, others = optimization.optimizer.param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.01, 0)
    assert all(parameter.ndim > 1 for parameter in decaying["params"])
    assert len(decaying["params"]) + len(others["params"]) == len(list(head.parameters()))
    assert head.dropout.p == 0.5
    assert {module.momentum for module in head.modules() if isinstance(module, nn.BatchNorm1d)} == {0.1}
    Optimization(head, RECIPES["original"], 10)
    assert head.dropout.p == 0
    assert {module.momentum for module in head.modules() if isinstance(module, nn.BatchNorm1d)} == {0.01}


def test_labels_are_smoothed_and_long_gradients_cut():
    logits, labels = torch.tensor([[2.0, 0.0], [1.0, 3.0]]), torch.tensor([0, 1])
    network = nn.Linear(2, 2)
    optimization = Optimization(network, Recipe(label_smoothing=0.2, clip_norm=1.0), 5)
    targets = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    assert optimization.loss(logits, labels).item() == pytest.approx(
        -(targets * logits.log_softmax(1)).sum().item()
    )
    optimization.step(1e6 * network(torch.ones(1, 2)).sum())
    total = sum(parameter.grad.square().sum() for parameter in network.parameters())
    assert total.sqrt().item() == pytest.approx(1, abs=1e-3)


def test_it_goes_on_from_its_state():
    def stepped(count, state=None):
        torch.manual_seed(0)
        network = nn.Linear(3, 2)
        optimization = Optimization(network, RECIPES["default"], 20)
        if state:
            network.load_state_dict(state[0])
            optimization.load_state_dict(state[1])
        for _ in range(count):
            optimization.step(network(torch.ones(1, 3)).square().sum())
        return network.state_dict(), optimization.state_dict()

    whole, halves = stepped(8), stepped(5, stepped(3))
    assert all(torch.equal(whole[0][name], halves[0][name]) for name in whole[0])


def test_the_learning_rate_may_be_set():
    assert read_recipe("original", None).learning_rate == 1e-5
    assert read_recipe("default", (0.5,)) == Recipe(learning_rate=0.5)
    assert read_recipe("default", (0.5, 0.1)) == Recipe(learning_rate=0.5, encoder_rate=0.1)
