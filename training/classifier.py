"""A model: frozen encoders, and the heads that name the action from their embeddings.

Shapes: B clips, T embeddings along a video, D embedding width, C classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from features.encoder import Encoder
from features.streams import Stream, embed_clips, further_encoders, open_streams, stream_key
from features.weights import State
from models import MODELS, Head, check_model

# What the names of the tensors that are never trained have in them, in a model.
FROZEN = ".feature_extractor."


class Classifier(nn.Module):
    """Frozen encoders, and a head for each stream of embeddings, whose logits are averaged.

    Averaging at the end is the late fusion of the two-stream networks (Simonyan and Zisserman, NeurIPS 2014).

    Args:
        name: a key of `MODELS`
        encoder, pretrained, state: as in `Encoder`
        streams: what a head reads each, as `streams.parse_streams` gives them
        sizes: what the head takes by keyword

    Attributes:
        widths, width: D of each stream, and their sum
        further: the encoders of streams that have their own
        temperature: logits are divided by it, so that probabilities are right; 1 until one was fitted
        config: all that is needed to build this model again, besides its name

    Raises: UserError for an unknown name or a size that does not fit, otherwise as `Encoder`.
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        *,
        encoder: str = "resnet152",
        streams: tuple[str, ...] | list[str] = ("rgb",),
        pretrained: bool = True,
        state: State | None = None,
        **sizes: Any,
    ) -> None:
        super().__init__()
        check_model(name)
        self.name, self.num_classes, self.streams = name, num_classes, tuple(streams)
        self.encoder = Encoder(encoder, pretrained=pretrained, state=state)
        self.further = further_encoders(streams, pretrained=pretrained)
        build: Callable[..., Head] = MODELS[name]
        # With the defaults of today, which may be others tomorrow.
        given = inspect.signature(build).bind(0, num_classes, **sizes)
        given.apply_defaults()
        sizes = {key: given.arguments[key] for key in given.arguments if key not in ("width", "num_classes")}
        opened = self.open_streams()
        self.widths = [stream.width for stream in opened]
        self.width = sum(self.widths)
        self.heads = nn.ModuleDict(
            {stream_key(stream.name): build(stream.width, num_classes, **sizes) for stream in opened}
        )
        self.temperature = 1.0
        self.config = {"num_classes": num_classes, "encoder": encoder, "streams": list(streams), **sizes}

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.encoder.device

    @property
    def dtype(self) -> torch.dtype:
        """What its encoder computes in."""
        return self.encoder.dtype

    def encoders(self) -> list[Encoder]:
        """All its frozen encoders, the first one first."""
        return [self.encoder, *(each for each in self.further.values() if isinstance(each, Encoder))]

    def open_streams(self, img_dim: int | None = None) -> list[Stream]:
        """What its heads read along a video, for frames of `img_dim` pixels, as `streams.open_streams`."""
        return [stream for _, stream in open_streams(self.encoder, self.further, self.streams, img_dim)]

    def encode(self, clips: Tensor) -> Tensor:
        """Embeddings of clips of consecutive frames: (B, frames, 3, H, W) -> (B, T, sum of D)."""
        return embed_clips(self.open_streams(clips.shape[-1]), clips)

    def classify(self, embeddings: Tensor, padding: Tensor | None = None) -> Tensor:
        """Logits of clips of embeddings: (B, T, sum of D) -> (B, C); `padding` as in `Head.forward`."""
        parts = zip(self.heads.values(), embeddings.split(self.widths, dim=-1), strict=True)
        logits = [head(part, padding) for head, part in parts]
        joined = logits[0] if len(logits) == 1 else torch.stack(logits).mean(dim=0)
        return joined / self.temperature

    def forward(self, clips: Tensor, padding: Tensor | None = None) -> Tensor:
        """Logits of clips of consecutive frames: (B, frames, 3, H, W) -> (B, C)."""
        return self.classify(self.encode(clips), padding)
