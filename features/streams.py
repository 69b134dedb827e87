"""What a head reads along a video: the embeddings of one or more encoders, side by side.

Shapes: N windows, L frames of each, H x W pixels, K embeddings of each, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from features.encoder import STREAMS, Encoder
from features.networks import EncoderSpec, encoder_spec
from features.windows import Cut, WindowReader, Windows, joint_hop, joint_indices
from features.workers import in_worker
from utils.process import UserError
from video.frames import Resize, resize_frames


@dataclass(frozen=True)
class View:
    """What an encoder sees of a video.

    Attributes:
        windows: which frames at once
        resize, img_dim: how frames become squares, and their side in pixels
    """

    windows: Windows
    resize: Resize
    img_dim: int


@dataclass(frozen=True)
class Stream(View):
    """An encoder along a video.

    Attributes:
        name: of `encoder.STREAMS`, or of an encoder that stands beside the first one
        width: D
        live_frames: frames of a window where a label must not wait for a whole one
        embed: windows (N, L, 3, img_dim, img_dim) uint8 -> (N, K, D) float32
        device: where `embed` wants its windows
        batch_size: windows that it puts through the network at once
    """

    name: str
    width: int
    live_frames: int
    embed: Callable[[Tensor], Tensor]
    device: torch.device
    batch_size: int

    @property
    def view_name(self) -> str:
        """What its encoder is shown, one of `encoder.STREAMS`."""
        return self.name if self.name in STREAMS else "rgb"

    @property
    def view(self) -> View:
        """Without the encoder: what another process needs to read for it."""
        return View(self.windows, self.resize, self.img_dim)


def encoder_stream(encoder: Encoder, name: str, img_dim: int) -> Stream:
    """A stream of an encoder that is on its device.

    Args:
        name: "diff" for the differences of frames; any other is of the frames themselves
        img_dim: side of the frames in pixels

    Raises: UserError for differences, where the network sees more than one frame itself.
    """
    view = name if name in STREAMS else "rgb"

    def embed(windows: Tensor) -> Tensor:
        return encoder.embed(windows, view)

    return Stream(
        encoder.windows(view), encoder.spec.resize, img_dim, name, encoder.width, encoder.spec.live_frames,
        embed, encoder.device, encoder.batch_size,
    )  # fmt: skip


def parse_streams(text: str) -> tuple[str, ...]:
    """Streams out of words between commas, such as rgb,diff or rgb,efficientnet_lite0.

    Raises: UserError for an unknown one, or one that is there twice.
    """
    streams = tuple(text.split(","))
    for stream in streams:
        if stream not in STREAMS:
            try:
                encoder_spec(stream)
            except UserError as error:
                raise UserError(
                    f"unknown stream {stream!r}; choose from {','.join(STREAMS)}, or name a further encoder: "
                    f"{error}"
                ) from error
    if len(set(streams)) < len(streams):
        raise UserError(f"{text}: a stream twice is worth no more than once; name each once")
    if not set(streams) & set(STREAMS):
        raise UserError(f"--streams {text} leaves nothing for --encoder; use --encoder {streams[0]} instead")
    return streams


def pace(encoder: str, streams: Sequence[str]) -> EncoderSpec:
    """The entry of the encoder with the longest hop, which sets the pace of all streams together.

    Raises: UserError if `encoder` stands among the further ones too; otherwise as `encoder_spec`.
    """
    if encoder in streams:
        raise UserError(f"--streams {','.join(streams)}: {encoder} is --encoder already; leave it out there")
    names = [encoder, *(stream for stream in streams if stream not in STREAMS)]
    return max(map(encoder_spec, names), key=lambda spec: spec.windows.hop)


def further_encoders(streams: Sequence[str], *, pretrained: bool = True) -> nn.ModuleDict:
    """The encoders that stand beside the first one, by `stream_key`. Raises: as `Encoder`."""
    names = [stream for stream in streams if stream not in STREAMS]
    return nn.ModuleDict({stream_key(name): Encoder(name, pretrained=pretrained) for name in names})


def stream_key(stream: str) -> str:
    """A stream's name in a state dict, where dots part names."""
    return stream.replace(".", "_")


def open_streams(
    encoder: Encoder, further: nn.ModuleDict, names: Sequence[str], img_dim: int | None
) -> list[tuple[Encoder, Stream]]:
    """The streams with these names, and the encoder of each.

    Args:
        further: of `further_encoders`, on their device; frames have the size that each was trained at
        img_dim: side of the frames for `encoder`, in pixels; None for what it was trained at

    Raises: UserError for differences of frames, where `encoder` sees more than one frame itself.
    """
    opened = []
    for name in names:
        own = encoder if name in STREAMS else further[stream_key(name)]
        assert isinstance(own, Encoder)
        size = img_dim if own is encoder and img_dim else own.spec.input_size
        opened.append((own, encoder_stream(own, name, size)))
    return opened


class Cutter:
    """Windows of a video for each of some views; its frames come some at a time."""

    def __init__(self, views: Sequence[View]) -> None:
        self._views = views
        self._readers = [WindowReader(view.windows) for view in views]

    def read(self, frames: Sequence[np.ndarray]) -> list[list[Cut]]:
        """The windows of each view that the next frames, (H, W, 3) uint8 RGB, complete."""
        resized = {
            size: resize_frames(frames, *size).permute(0, 2, 3, 1).numpy()
            for size in {(view.img_dim, view.resize) for view in self._views}
        }
        return [
            reader.read(resized[view.img_dim, view.resize])
            for view, reader in zip(self._views, self._readers, strict=True)
        ]

    def end(self) -> list[list[Cut]]:
        """The last windows, at the end of the video."""
        return [reader.end() for reader in self._readers]


@dataclass(frozen=True)
class Coming:
    """Windows of a video that are on their way through an encoder.

    Attributes:
        parts: what becomes their embeddings, (n, K, D) each
        skip, count: as in `Cut`
    """

    parts: Sequence[Future[Tensor]]
    skip: int
    count: int

    @classmethod
    def begin(cls, stream: Stream, cut: Cut) -> Self:
        """Have a CPU's cores encode windows side by side."""
        windows = cut.tensor().split(stream.batch_size)
        return cls([in_worker(stream.embed, part) for part in windows], cut.skip, cut.count)


def _embedded(stream: Stream, piece: Cut | Coming) -> Tensor:
    """Embeddings (N, K, D) of windows."""
    if isinstance(piece, Coming):
        return torch.cat([part.result() for part in piece.parts])
    return stream.embed(piece.tensor().to(stream.device))


class Joiner:
    """Embeddings of all streams of a video side by side, as its windows come."""

    def __init__(self, streams: Sequence[Stream]) -> None:
        self._streams = streams
        self._layouts = [stream.windows for stream in streams]
        self.hop = joint_hop(self._layouts)
        self._rows = [torch.empty(0, stream.width, device=stream.device) for stream in streams]
        self._done = 0
        # Rows of each stream that are not held any more.
        self._dropped = [0] * len(streams)

    def add(self, cuts: Sequence[Sequence[Cut | Coming]], *, ended: bool = False) -> Tensor:
        """Encode windows of each stream, or wait for them; the embeddings (n, sum of D) that they complete.

        Args:
            ended: there are no more
        """
        for place, (stream, pieces) in enumerate(zip(self._streams, cuts, strict=True)):
            for piece in pieces:
                kept = _embedded(stream, piece)[:, piece.skip : piece.skip + piece.count].flatten(0, 1)
                self._rows[place] = torch.cat([self._rows[place], kept])
        counts = [dropped + len(rows) for dropped, rows in zip(self._dropped, self._rows, strict=True)]
        ready = self._ready(counts, ended)
        joint = self._take(np.arange(self._done, ready), counts)
        self._done = max(ready, self._done)
        return joint

    def _ready(self, counts: Sequence[int], ended: bool) -> int:
        slowest = min(
            count for layout, count in zip(self._layouts, counts, strict=True) if layout.hop == self.hop
        )
        if ended:
            return slowest
        middles = [
            (count * layout.hop - self.hop // 2 - 1) // self.hop + 1
            for layout, count in zip(self._layouts, counts, strict=True)
        ]
        return max(self._done, min(slowest, *middles))

    def _take(self, indices: np.ndarray, counts: Sequence[int]) -> Tensor:
        parts = []
        for place, own in enumerate(joint_indices(self._layouts, counts, indices)):
            rows = self._rows[place]
            parts.append(rows[torch.from_numpy(own - self._dropped[place]).to(rows.device)])
            if len(own):
                # The last one may be wanted again, where the video ends before the middle of a hop.
                drop = int(own[-1]) - self._dropped[place]
                self._rows[place], self._dropped[place] = rows[drop:], self._dropped[place] + drop
        return torch.cat(parts, dim=1)


def embed_clips(streams: Sequence[Stream], clips: Tensor) -> Tensor:
    """Joined embeddings of clips of consecutive frames: (B, frames, 3, H, W) -> (B, T, sum of D)."""
    videos = []
    for frames in clips.permute(0, 1, 3, 4, 2).cpu().numpy():
        readers = [WindowReader(stream.windows) for stream in streams]
        cuts = [[*reader.read(frames), *reader.end()] for reader in readers]
        videos.append(Joiner(streams).add(cuts, ended=True))
    return torch.stack(videos)
