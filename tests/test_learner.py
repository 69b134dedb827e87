import argparse
import math

import pytest
import torch
from torch import nn

from training.classifier import Classifier
from training.learner import Learner, learning_rate_factor
from training.recipe import RECIPES, Recipe, add_recipe_flags, read_recipe

PLAIN = RECIPES["original"]
MEASURED = {
    "default": {
        **{"optimizer": "adamw", "schedule": "cosine", "learning_rate": 3e-4, "warmup": 0.1},
        **{"weight_decay": 0.01, "label_smoothing": 0.1, "dropout": 0.5, "mixup": 0.0},
        **{"clip_norm": 1.0, "norm_momentum": 0.1},
    },
    "original": {
        **{"optimizer": "adam", "schedule": "constant", "learning_rate": 1e-5, "warmup": 0.0},
        **{"weight_decay": 0.0, "label_smoothing": 0.0, "dropout": 0.0, "mixup": 0.0},
        **{"clip_norm": 0.0, "norm_momentum": 0.01},
    },
}


def learner_of(steps=10, **changes):
    torch.manual_seed(0)
    model = Classifier("ConvLSTM", 3, encoder="tiny", latent_dim=4, hidden_dim=5)
    return Learner(model, Recipe(**{**vars(PLAIN), **changes}), steps)


def one_step(learner, number=0, scale=1.0):
    learner.model.train()
    learner.begin_batch(1, number, 0)
    inputs, targets = learner.augment(torch.randn(4, 6, 48), torch.tensor([0, 1, 2, 0]))
    learner.step(scale * learner.loss(learner.model.classify(inputs), targets))


def test_clips_that_are_named_right_are_counted():
    learner = learner_of()
    labels = torch.tensor([0, 1, 2, 0, 1])
    logits = torch.tensor([[9.0, 0, 0], [0, 9, 0], [9, 0, 0], [5, 0, 0], [0, 0, 9]])
    padding = torch.zeros(5, 4, dtype=torch.bool)
    embeddings = torch.randn(5, 4, 48)
    loss, right, clips = learner.losses(lambda *_: logits, embeddings, padding, labels)
    assert (int(right), clips) == (3, 5)
    expected = -logits.log_softmax(dim=1)[range(5), labels].sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert int(learner.losses(lambda *_: -logits, embeddings, padding, labels)[1]) == 0


def test_a_blend_counts_as_the_clip_it_has_most_of():
    learner = learner_of(mixup=0.2)
    labels, embeddings = torch.tensor([0, 1, 2, 0]), torch.randn(4, 6, 48)
    padding = torch.zeros(4, 6, dtype=torch.bool)
    for batch in range(5):
        learner.begin_batch(1, batch, 0)
        _, targets = learner.augment(embeddings, labels)
        learner.begin_batch(1, batch, 0)
        _, right, _ = learner.losses(lambda *_, said=targets: said, embeddings, padding, labels)
        assert int(right) == 4
        learner.begin_batch(1, batch, 0)
        _, right, _ = learner.losses(lambda *_, said=targets: -said, embeddings, padding, labels)
        assert int(right) == 0


@pytest.mark.parametrize("mixup", [0.0, 0.5])
def test_padding_is_told_of_unless_clips_are_blended(mixup):
    learner = learner_of(mixup=mixup)
    padding = torch.tensor([[True, True, False, False], [False] * 4])
    seen = []

    def forward(embeddings, told):
        seen.append(told)
        return torch.zeros(2, 3)

    learner.begin_batch(1, 1, 0)
    learner.losses(forward, torch.randn(2, 4, 48), padding, torch.tensor([0, 1]))
    assert torch.equal(seen[0], torch.zeros(2, 4, dtype=torch.bool) if mixup else padding)


def test_smoothed_labels_cost_what_the_formula_says():
    learner = learner_of(label_smoothing=0.3)
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    _, targets = learner.augment(torch.randn(4, 2, 48), labels)
    smooth = 0.7 * nn.functional.one_hot(labels, 3) + 0.1
    expected = -(smooth * logits.log_softmax(dim=1)).sum()
    assert learner.loss(logits, targets).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("cosine", [True, False])
def test_the_schedule_in_numbers(cosine):
    found = [learning_rate_factor(step, 12, 0.25, cosine=cosine) for step in range(13)]
    assert found[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    falling = [(1 + math.cos(math.pi * part / 9)) / 2 if cosine else 1 for part in range(10)]
    assert found[3:] == pytest.approx(falling)
    # A training that only warms up has a rate after its last step too.
    assert learning_rate_factor(1, 1, 0.9, cosine=cosine) == 1


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_optimizer_follows_the_schedule(schedule):
    learner = learner_of(steps=4, schedule=schedule, warmup=0.5, learning_rate=0.01)
    rates = []
    for number in range(4):
        rates.append(learner.learning_rate)
        one_step(learner, number)
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.005 if schedule == "cosine" else 0.01])
    assert learner.learning_rate == pytest.approx(0 if schedule == "cosine" else 0.01)


def test_short_gradients_stay_and_no_limit_leaves_all():
    def length(learner, scale):
        one_step(learner, scale=scale)
        return torch.nn.utils.get_total_norm([one.grad for one in learner.parameters]).item()

    assert length(learner_of(clip_norm=0.0), 1e4) > 100
    short = length(learner_of(clip_norm=1.0), 1e-4)
    assert short == pytest.approx(length(learner_of(clip_norm=0.0), 1e-4), rel=1e-5)
    assert 0 < short < 0.1


def test_a_part_of_the_model_is_trained_where_it_is_named():
    torch.manual_seed(0)
    model = Classifier("ConvLSTM", 3, encoder="tiny", latent_dim=4, hidden_dim=5)
    part = model.heads["rgb"].output_layers
    learner = Learner(
        model, Recipe(**{**vars(PLAIN), "learning_rate": 0.1, "norm_momentum": 0.3}), 10, 0, part
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    one_step(learner)
    changed = {
        name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])
    }
    assert changed
    assert all(name.startswith("heads.rgb.output_layers.") for name in changed)
    assert (part[1].momentum, model.heads["rgb"].projection[1].momentum) == (0.3, 0.01)


def test_another_seed_draws_otherwise_and_clips_stay_where_nothing_is_blended():
    model = Classifier("ConvLSTM", 3, encoder="tiny", latent_dim=4, hidden_dim=5)
    embeddings, labels = torch.randn(4, 6, 8), torch.tensor([0, 1, 2, 0])
    drawn = []
    for seed in (0, 0, 1):
        learner = Learner(model, Recipe(**{**vars(PLAIN), "mixup": 0.5}), 10, seed)
        learner.begin_batch(1, 1, 0)
        drawn.append(learner.augment(embeddings, labels)[0])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    same, targets = Learner(model, PLAIN, 10).augment(embeddings, labels)
    assert torch.equal(same, embeddings)
    assert torch.equal(targets, torch.eye(3)[labels])


def test_flags_that_are_given_win_over_the_recipe():
    parser = argparse.ArgumentParser()
    add_recipe_flags(parser)

    def recipe(*flags):
        return read_recipe(parser.parse_args(flags))

    assert recipe() == RECIPES["default"]
    assert recipe("--recipe", "original") == RECIPES["original"]
    # A zero is given too.
    found = recipe("--dropout", "0", "--schedule", "constant", "--clip_norm", "0")
    expected = {**vars(RECIPES["default"]), "dropout": 0.0, "schedule": "constant", "clip_norm": 0.0}
    assert vars(found) == expected


def test_recipes_are_those_that_were_measured():
    """Another value makes the figures of the README untrue: measure anew, and change it here too."""
    found = {
        name: {key: value for key, value in vars(recipe).items() if key in MEASURED["default"]}
        for name, recipe in RECIPES.items()
    }
    assert found == MEASURED
