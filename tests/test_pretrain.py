"""pretrain.py: a head learns without labels."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pretrain
import train
from models import build_head
from training.checkpoint import load_checkpoint
from training.recipe import RECIPES, Optimization


@given(batch=st.integers(1, 5), length=st.integers(2, 60), seed=st.integers(0, 99))
def test_of_every_clip_some_embeddings_are_hidden_and_some_are_not(batch, length, seed):
    torch.manual_seed(seed)
    mask = pretrain.span_mask(batch, length)
    assert mask.shape == (batch, length)
    assert mask.any(1).all()
    assert not mask.all(1).any()


def test_half_of_the_embeddings_are_hidden_in_spans():
    torch.manual_seed(0)
    mask = pretrain.span_mask(400, 60)
    assert 0.45 < mask.float().mean() < 0.55
    spans = (mask[:, 1:] & ~mask[:, :-1]).sum() + mask[:, 0].sum()
    assert 4 < mask.sum() / spans < 7


@pytest.mark.parametrize(("name", "sizes"), [("ConvLSTM", {"hidden_dim": 32}), ("ActionBERT", {"layers": 1})])
def test_hidden_embeddings_are_learned_from_the_others(name, sizes):
    torch.manual_seed(0)
    head = build_head(name, 12, 3, latent_dim=32, sequence_length=16, **sizes)[0]
    masked = pretrain.MaskedHead(head, 12)
    steps = torch.arange(16) / 3
    clips = torch.sin(steps[None, :, None] * torch.rand(32, 1, 12) + 6 * torch.rand(32, 1, 12))
    padding = torch.zeros(32, 16, dtype=torch.bool)
    optimization = Optimization(masked, RECIPES["default"], 150)
    losses = []
    for _ in range(150):
        loss, picked = masked(clips, padding)
        optimization.step(loss.mean())
        losses.append((loss.mean().item(), picked.float().mean().item()))
    assert sum(loss for loss, _ in losses[-10:]) < 0.9 * sum(loss for loss, _ in losses[:10])
    assert sum(picked for _, picked in losses[-10:]) > sum(picked for _, picked in losses[:10])


def test_padding_is_never_hidden():
    torch.manual_seed(0)
    masked = pretrain.MaskedHead(
        build_head("ActionBERT", 12, 3, latent_dim=16, sequence_length=8)[0], 12
    ).eval()
    padding = torch.zeros(2, 8, dtype=torch.bool)
    padding[:, :6] = True
    losses, _ = masked(torch.randn(2, 8, 12), padding)
    assert len(losses) <= 4


def test_training_starts_from_what_it_writes(call, small, train_flags, tmp_path):
    flags = [*train_flags(small), "--model", "ActionBERT", "--latent_dim", 16, "--num_epochs", 2]
    done = call(pretrain, *flags, "--output_path", "pre")
    assert done.status == 0, done.err
    assert "of the hidden are picked" in done.out
    again = call(pretrain, *flags, "--output_path", "again")
    one, other = (load_checkpoint(tmp_path / f"{name}/ActionBERT_2.pth").head for name in ("pre", "again"))
    assert all(
        torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )
    assert again.status == 0
    data = [*train_flags(small)[:4], "--precision", "fp32"]
    done = call(train, *data, "--checkpoint_model", "pre/ActionBERT_2.pth", "--num_epochs", 1)
    assert done.status == 0, done.err
    assert "training ActionBERT" in done.out


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [(["--model", "LinearProbe"], 1, "choose ConvLSTM or ActionBERT"),
     (["--split_number", "all"], 2, "one split"),
     (["--sequence_length", 1], 1, "--sequence_length 2 at least")],
)  # fmt: skip
def test_what_cannot_be_pretrained_is_told_in_a_line(
    call, small, train_flags, tmp_path, flags, status, words
):
    done = call(pretrain, *train_flags(small), *flags)
    assert (done.status, words in done.one_line_error()) == (status, True), done.err
    assert not list(tmp_path.rglob("*.pth"))
