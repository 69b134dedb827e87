"""What names the action: heads over the embeddings of a clip's frames.

A new approach is one class here, a `Head`, and one entry in `MODELS`.

Shapes: B clips, T embeddings along a video, D embedding width, H hidden width, C classes.
"""

from __future__ import annotations

import difflib
import inspect
import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.process import UserError

# An open forget gate remembers some ten frames from the start; PyTorch's half-open one remembers two
# (Gers et al., 2000; Jozefowicz et al., ICML 2015).
FORGET_BIAS = 2.0


def mean_over_time(steps: Tensor, padding: Tensor | None) -> Tensor:
    """Mean of the time steps that are not padding: (B, T, H), (B, T) -> (B, H)."""
    if padding is None:
        return steps.mean(dim=1)
    weights = (~padding).to(steps.dtype)
    return (steps * (weights / weights.sum(dim=1, keepdim=True))[..., None]).sum(dim=1)


def _projection(width: int, latent_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, latent_dim), nn.BatchNorm1d(latent_dim, momentum=0.01))


class Head(nn.Module):
    """Embeddings of a clip -> logits.

    A subclass takes `width` (D), `num_classes` (C) and, by keyword with a default for each, `latent_dim` (the
    width that embeddings are projected to), `sequence_length` (of the clips that are trained on) and sizes of
    its own.

    Attributes:
        hidden_dim: H, the width of what `read` returns; 0 for heads without `read`, which pretraining needs
        dropout: before the last layer; the recipe sets its share
        temperature: `classify` divides logits by it, so that probabilities are calibrated; 1 until fitted
    """

    hidden_dim = 0

    def __init__(self) -> None:
        super().__init__()
        # The original had none.
        self.dropout = nn.Dropout(0.0)
        self.temperature = 1.0

    def read(self, embeddings: Tensor, padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features of the clip before the last layer, (B, H), and of each time step, (B, T, H)."""
        raise NotImplementedError

    def classify(self, embeddings: Tensor, padding: Tensor | None = None) -> Tensor:
        """Calibrated logits of clips: (B, T, D) -> (B, C); `padding` as in `forward`."""
        return self(embeddings, padding) / self.temperature

    def forward(self, embeddings: Tensor, padding: Tensor | None = None) -> Tensor:
        """Logits of clips: (B, T, D) -> (B, C).

        Args:
            padding: mask (B, T) bool, True where a short clip is padded with its first frame
        """
        raise NotImplementedError


class ConvLSTM(Head):
    """A bi-directional LSTM over frame embeddings, pooled over time by attention.

    After the original repository (E. Linder-Noren, 2019); the ways of pooling are those of its three
    generations of checkpoints. It reads padding as the frames that stand there, as the original did.

    Args:
        hidden_dim: width of the LSTM in each direction
        lstm_layers: layers of the LSTM
        bidirectional: read the clip backwards too
        pooling: "attention" (a weighted mean of all time steps), "last" (the last time step) or "average"
            (every time step is classified, and the probabilities are averaged)

    Raises: UserError for an unknown pooling.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        *,
        latent_dim: int = 512,
        sequence_length: int = 40,
        hidden_dim: int = 1024,
        lstm_layers: int = 1,
        bidirectional: bool = True,
        pooling: str = "attention",
    ) -> None:
        super().__init__()
        if pooling not in ("attention", "last", "average"):
            raise UserError(f"unknown pooling {pooling!r}; choose one of attention, last, average")
        self.pooling = pooling
        self.hidden_dim = 2 * hidden_dim if bidirectional else hidden_dim
        self.projection = _projection(width, latent_dim)
        self.lstm = nn.LSTM(
            latent_dim, hidden_dim, lstm_layers, batch_first=True, bidirectional=bidirectional
        )
        for name, bias in self.lstm.named_parameters():
            if name.startswith("bias_ih"):
                nn.init.constant_(bias[hidden_dim : 2 * hidden_dim], FORGET_BIAS)
        self.attention_layer = nn.Linear(self.hidden_dim, 1) if pooling == "attention" else None
        self.output_layers = nn.Sequential(
            nn.Linear(self.hidden_dim, hidden_dim),
            nn.BatchNorm1d(hidden_dim, momentum=0.01),
            nn.ReLU(),
            nn.Linear(hidden_dim, num_classes),
        )

    def read(self, embeddings: Tensor, padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The LSTM's states of both directions, pooled (B, H), and of each frame (B, T, H)."""
        latent = self.projection(embeddings.flatten(0, 1)).unflatten(0, embeddings.shape[:2])
        hidden, _ = self.lstm(latent)
        if self.attention_layer is not None:
            weights = self.attention_layer(hidden).softmax(dim=1)
            return (weights * hidden).sum(dim=1), hidden
        return (hidden[:, -1] if self.pooling == "last" else hidden.mean(dim=1)), hidden

    def forward(self, embeddings: Tensor, padding: Tensor | None = None) -> Tensor:
        """Logits of clips: (B, T, D) -> (B, C)."""
        pooled, hidden = self.read(embeddings)
        if self.pooling != "average":
            return self._output(pooled)
        steps = self._output(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])
        # The logarithm of mean probabilities: its softmax is that mean, so it serves as logits.
        return F.log_softmax(steps, dim=-1).logsumexp(dim=1) - math.log(hidden.shape[1])

    def _output(self, hidden: Tensor) -> Tensor:
        *before, last = self.output_layers
        for layer in before:
            hidden = layer(hidden)
        # Behind the BatchNorm, whose statistics would otherwise be those of a network with dropout, and not
        # of the one that is tested (Li et al., CVPR 2019).
        return last(self.dropout(hidden))


def sinusoids(length: int, width: int) -> Tensor:
    """Sines and cosines of positions, (length, width); Vaswani et al., NeurIPS 2017, section 3.5."""
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000) / width))
    angles = torch.arange(length)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :width]


class ActionBERT(Head):
    """A Transformer over frame embeddings, read off at a [CLS] token.

    BERT's layout (Devlin et al., NAACL 2019) on frames instead of words, with padding masked. Positions begin
    as sinusoids: as small as BERT's, they are lost beside the embeddings of frames, which are much alike.
    LayerNorm stands before each layer, so that training needs no long warm-up (Xiong et al., ICML 2020).

    Args:
        sequence_length: positions that are learned; for other lengths interpolated (ViT, ICLR 2021, 3.2)
        layers: of the Transformer, whose width is `latent_dim`
        attention_heads: in each layer
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        *,
        latent_dim: int = 512,
        sequence_length: int = 40,
        layers: int = 2,
        attention_heads: int = 8,
    ) -> None:
        super().__init__()
        if latent_dim % attention_heads:
            raise UserError(
                f"--latent_dim {latent_dim} does not divide into the {attention_heads} attention heads of "
                f"ActionBERT; take a multiple of {attention_heads}"
            )
        self.hidden_dim = latent_dim
        self.projection = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, latent_dim))
        self.cls = nn.Parameter(torch.empty(latent_dim))
        self.positions = nn.Parameter(torch.empty(sequence_length, latent_dim))
        kind: dict[str, Any] = {"activation": "gelu", "batch_first": True, "norm_first": True}
        layer = nn.TransformerEncoderLayer(latent_dim, attention_heads, 4 * latent_dim, 0.1, **kind)
        self.transformer = nn.TransformerEncoder(layer, layers, nn.LayerNorm(latent_dim), False)
        self.output = nn.Linear(latent_dim, num_classes)
        # PyTorch copies one layer's weights into all.
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=0.02)
        nn.init.trunc_normal_(self.cls, std=0.02)
        with torch.no_grad():
            self.positions.copy_(sinusoids(sequence_length, latent_dim))

    def forward(self, embeddings: Tensor, padding: Tensor | None = None) -> Tensor:
        """Logits of clips: (B, T, D) -> (B, C)."""
        return self.output(self.dropout(self.read(embeddings, padding)[0]))

    def _positions(self, length: int) -> Tensor:
        """Positions of a clip of `length` frames, (T, H)."""
        # An export is for clips of any length.
        if not torch.compiler.is_exporting() and length == len(self.positions):
            return self.positions
        # By a product of matrices, since the gradient of `interpolate` differs from run to run on CUDA.
        places = torch.eye(len(self.positions), device=self.positions.device)
        weights = F.interpolate(places[None], size=length, mode="linear", align_corners=True)[0]
        return weights.T @ self.positions

    def read(self, embeddings: Tensor, padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the last layer makes of [CLS], (B, H), and of each frame, (B, T, H)."""
        batch, length = embeddings.shape[:2]
        tokens = self.projection(embeddings) + self._positions(length)
        tokens = torch.cat([self.cls.expand(batch, 1, -1), tokens], dim=1)
        mask = None if padding is None else F.pad(padding, (1, 0), value=False)
        read = self.transformer(tokens, src_key_padding_mask=mask)
        return read[:, 0], read[:, 1:]


class ConvClassifier(Head):
    """Each frame is classified by itself, and probabilities are averaged: the original's baseline."""

    def __init__(
        self, width: int, num_classes: int, *, latent_dim: int = 512, sequence_length: int = 40
    ) -> None:
        super().__init__()
        self.projection = _projection(width, latent_dim)
        self.output = nn.Linear(latent_dim, num_classes)

    def forward(self, embeddings: Tensor, padding: Tensor | None = None) -> Tensor:
        """Logits of clips: (B, T, D) -> (B, C)."""
        latent = self.projection(embeddings.flatten(0, 1)).relu()
        steps = self.output(self.dropout(latent)).unflatten(0, embeddings.shape[:2])
        # The logarithm of mean probabilities serves as logits.
        return mean_over_time(F.softmax(steps.float(), dim=-1), padding).clamp_min(1e-30).log()


class AttentiveProbe(Head):
    """One learned query looks at all embeddings of a clip: the attentive probe of frozen video encoders.

    Cross-attention, a two-layer perceptron, both pre-norm with residual connections, and a linear layer
    at the encoder's own width: the pooler of V-JEPA (Bardes et al., 2024, appendix) and the last block of
    V-JEPA 2's probe (Assran et al., 2025, section 5), whose blocks before it are ActionBERT's. It has no
    positions: order is told only as far as the encoder sees it.

    Args:
        attention_heads: at most; as many as divide the width
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        *,
        latent_dim: int = 512,
        sequence_length: int = 40,
        attention_heads: int = 16,
    ) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(width))
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, math.gcd(width, attention_heads), batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.output = nn.Linear(width, num_classes)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=0.02)
        nn.init.trunc_normal_(self.query, std=0.02)

    def forward(self, embeddings: Tensor, padding: Tensor | None = None) -> Tensor:
        """Logits of clips: (B, T, D) -> (B, C)."""
        context = self.norm(embeddings)
        query = self.query.expand(context.shape[0], 1, -1)
        seen, _ = self.attention(query, context, context, key_padding_mask=padding, need_weights=False)
        pooled = query + seen
        return self.output(self.dropout((pooled + self.mlp(pooled))[:, 0]))


class LinearProbe(Head):
    """Logistic regression on the mean embedding of a clip, blind to the order of frames.

    The L2 norm of an embedding says more about a clip than about its action, which matters where labels are
    few: so all have one length (Ranjan et al., "L2-constrained softmax loss", 2017, section 4). The layer
    begins at zero, so that its first gradient points from the mean of all clips to that of each class.

    Args:
        scale: the length; chosen on held-out groups with few and with many labels
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        *,
        latent_dim: int = 512,
        sequence_length: int = 40,
        scale: float = 100.0,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.output = nn.Linear(width, num_classes)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, embeddings: Tensor, padding: Tensor | None = None) -> Tensor:
        """Logits of clips: (B, T, D) -> (B, C)."""
        # Directions are much alike: in bfloat16 a probability would move by some percent.
        kind = embeddings.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            mean = F.normalize(mean_over_time(embeddings, padding).float(), dim=-1)
            return self.output(self.scale * mean)


MODELS: dict[str, type[Head]] = {
    "ConvLSTM": ConvLSTM,
    "ActionBERT": ActionBERT,
    "AttentiveProbe": AttentiveProbe,
    "LinearProbe": LinearProbe,
    "ConvClassifier": ConvClassifier,
}


def check_model(name: str) -> None:
    """Raises: UserError for a name that is not in `MODELS`."""
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, 1)
        raise UserError(
            f"unknown model {name!r}{f', did you mean {near[0]}?' if near else ''}; choose one of "
            f"{', '.join(MODELS)}"
        )


def build_head(name: str, width: int, num_classes: int, **sizes: Any) -> tuple[Head, dict[str, Any]]:
    """A new head, and all the sizes it was built with, by keyword.

    Raises: UserError for an unknown name or a size that does not fit.
    """
    check_model(name)
    # With the defaults of today, which may be others tomorrow.
    bound = inspect.signature(MODELS[name]).bind(width, num_classes, **sizes)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    sizes = {key: value for key, value in arguments.items() if key not in ("width", "num_classes")}
    build: Any = MODELS[name]
    return build(width, num_classes, **sizes), sizes
