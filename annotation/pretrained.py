"""Which model names actions: a checkpoint, or an encoder with the last layer that it was released with."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from features.networks import ENCODERS, encoder_spec
from features.weights import State
from models import Head
from training.checkpoint import Checkpoint
from training.classifier import Classifier
from utils.process import UserError


class LastLayer(Head):
    """An encoder's own last layer, as it was released: it tells the classes that the encoder was trained on.

    Linear on the mean embedding of a clip. I3D and S3D average each two neighbouring steps before it, so the
    first and the last step of theirs count half; of a single step the average is the step.

    Args:
        network: with `last_layer`, (..., D) -> (..., C), and `averages_pairs`
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        assert isinstance(network.last_layer, nn.Linear)
        self.output, self.pairs = network.last_layer, bool(network.averages_pairs)

    def forward(self, embeddings: Tensor, padding: Tensor | None = None) -> Tensor:
        """Logits of clips: (B, T, D) -> (B, C)."""
        if padding is None:
            padding = torch.zeros(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        weights = (~padding).to(embeddings.dtype)
        if self.pairs:
            both = weights[:, :-1] * weights[:, 1:]
            halves = F.pad(both, (1, 0)) + F.pad(both, (0, 1))
            weights = torch.where(halves.sum(1, keepdim=True) > 0, halves, weights)
        return self.output((embeddings * (weights / weights.sum(1, keepdim=True))[..., None]).sum(1))


def with_own_classes() -> list[str]:
    """The encoders whose own last layer can be used."""
    return [name for name, spec in ENCODERS.items() if spec.categories]


def check_own_classes(name: str) -> None:
    """Raises: UserError for an encoder whose own last layer is not there."""
    if encoder_spec(name).categories is None:
        raise UserError(
            f"{name} has no last layer of its own that names actions; choose one of "
            f"{', '.join(with_own_classes())}, or name a trained model with --checkpoint_model"
        )


def untrained(name: str, state: State | None = None) -> Checkpoint:
    """A model that names the classes an encoder was trained on, without any training here.

    Args:
        name: of the encoder
        state: weights to load instead of the released ones

    Raises: as `check_own_classes` and `Encoder`.
    """
    check_own_classes(name)
    spec = encoder_spec(name)
    assert spec.categories is not None
    classes = spec.categories()
    # A head of the right size, in whose place the encoder's own comes.
    model = Classifier("MeanPool", len(classes), encoder=name, state=state)
    model.heads["rgb"] = LastLayer(model.encoder.feature_extractor)
    model.name = "LastLayer"
    settings = {"frame_stride": spec.frame_stride, "fps": spec.fps}
    return Checkpoint(model.eval(), classes, spec.input_size, spec.sequence_length, None, 0, settings)


def choose(only: str | None, classes: Sequence[str]) -> list[int]:
    """Labels of the classes that --only names between commas, in its order; all without it.

    Capitals do not matter. Raises: UserError for a name twice, or an unknown one, with those nearest to it.
    """
    if only is None:
        return list(range(len(classes)))
    known = {name.lower(): label for label, name in enumerate(classes)}
    chosen: dict[int, None] = {}
    for name in filter(None, (part.strip() for part in only.split(","))):
        if name.lower() not in known:
            near = difflib.get_close_matches(name.lower(), known, 3, 0.4)
            near += [each for each in known if name.lower() in each and each not in near][:3]
            names = ", ".join(classes[known[each]] for each in near)
            raise UserError(
                f"--only {name}: the model knows no such action"
                + (f"; near it are {names}" if near else "")
                + "; --list_actions of test_on_video.py prints all"
            )
        if known[name.lower()] in chosen:
            raise UserError(f"--only {name}: this action stands there twice; name each once")
        chosen[known[name.lower()]] = None
    if not chosen:
        raise UserError("--only names no action; write names between commas")
    return list(chosen)
