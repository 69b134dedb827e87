"""Batches of clips as a head takes them: out of the cache, or decoded and encoded anew.

Shapes: B clips, T embeddings along a video, D embedding width.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from dataset import FrameClips, Sampling
from features.cache import CachedClips
from features.pipeline import Prefetch
from features.streams import Stream
from features.windows import Windows, joint_hop, joint_indices
from splits.split import Clip
from video.opencv import cv2
from video.reader import check_length, worker_context

# Embeddings (B, T, sum of D) float32 and which of them are padding (B, T) bool, on the model's device, and
# labels (B,) on the CPU.
Batches = Iterable[tuple[Tensor, Tensor, Tensor]]


class ClipBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) for `FrameClips`: shuffled anew in each epoch, or in order.

    Several processes share each batch: all draw the same, and each takes its part. A shuffled last batch of
    a single clip, which BatchNorm cannot train on, or of fewer clips than processes, is left out.

    Args:
        num_clips: how many there are
        batch_size: clips of a batch, those of all processes together
        shuffle: for training
        seed: of the order
        rank, ranks: which process this is, and of how many

    Attributes:
        epoch: set it before each pass
        start: batches to leave out of the next pass, since they have been
    """

    def __init__(
        self, num_clips: int, batch_size: int, *, shuffle: bool, seed: int = 0, rank: int = 0, ranks: int = 1
    ) -> None:
        self.num_clips, self.batch_size, self.shuffle, self.seed = num_clips, batch_size, shuffle, seed
        self.rank, self.ranks = rank, ranks
        self.epoch = self.start = 0

    def whole(self) -> list[list[tuple[int, int]]]:
        """All batches of the epoch, with the parts of all processes."""
        order = np.arange(self.num_clips)
        if self.shuffle:
            np.random.default_rng([self.seed, self.epoch]).shuffle(order)
        items = [(self.epoch, index) for index in order.tolist()]
        batches = [items[at : at + self.batch_size] for at in range(0, len(items), self.batch_size)]
        least = max(2, self.ranks) if self.shuffle else 1
        return [batch for batch in batches if len(batch) >= least]

    def __len__(self) -> int:
        """Batches of a whole epoch, whatever `start` says."""
        return len(self.whole())

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        parts = (batch[self.rank :: self.ranks] for batch in self.whole()[self.start :])
        return iter([part for part in parts if part])


def _start_worker(_: int) -> None:
    # A worker per core already: OpenCV's own threads would only get in each other's way.
    cv2.setNumThreads(1)
    # Ctrl-C reaches all processes of a terminal; the main one decides when the workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def frame_loader(
    clips: FrameClips, batches: ClipBatches, *, workers: int, pin_memory: bool = False
) -> DataLoader:
    """Batches of what `clips` gives, decoded in `workers` processes, as lists."""
    options: dict[str, Any] = {"num_workers": workers, "pin_memory": pin_memory, "collate_fn": list}
    if workers:
        options |= {"persistent_workers": True, "multiprocessing_context": worker_context()}
    return DataLoader(clips, batch_sampler=batches, worker_init_fn=_start_worker, **options)


class EncodedClips:
    """`Batches` of clips that are decoded and encoded anew in each pass.

    Args:
        items: lists of what `FrameClips` gives
        streams: encoders of the same views
    """

    def __init__(self, items: DataLoader, streams: Sequence[Stream]) -> None:
        self.items, self.streams = items, streams

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        device = self.streams[0].device
        for batch in self.items:
            of_stream = zip(*(parts for parts, _, _ in batch), strict=True)
            embeddings = [
                self._embed(stream, parts) for stream, parts in zip(self.streams, of_stream, strict=True)
            ]
            padding = torch.stack([padding for _, padding, _ in batch]).to(device, non_blocking=True)
            yield torch.cat(embeddings, dim=-1), padding, torch.tensor([label for _, _, label in batch])

    @staticmethod
    def _embed(stream: Stream, parts: Iterable[tuple[list[Tensor], Tensor]]) -> Tensor:
        """Embeddings (B, T, D) of windows of as many clips; those of one length go through together."""
        parts = list(parts)
        groups = [group for windows, _ in parts for group in windows]
        embedded: dict[int, Iterator[Tensor]] = {}
        for length in {group.shape[1] for group in groups}:
            same = [
                group.to(stream.device, non_blocking=True) for group in groups if group.shape[1] == length
            ]
            embedded[length] = iter(stream.embed(torch.cat(same)).split([len(group) for group in same]))
        rows = []
        for windows, places in parts:
            given = torch.cat([next(embedded[group.shape[1]]).flatten(0, 1) for group in windows])
            rows.append(given[places.to(given.device)])
        return torch.stack(rows)


def _room(device: torch.device) -> int:
    """Bytes of a GPU's memory that embeddings may take: half of what is free. UCF-101's in I3D are 0.6 GB."""
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 0


class EmbeddingClips:
    """`Batches` of clips whose embeddings are kept.

    Args:
        kept: the embeddings of all of `clips`, for each stream
        layouts: how each stream goes along a video
        clips: what to read
        sampling: which frames make an item
        batches: which items make a batch
        device: where embeddings are wanted

    Raises: VideoError for a clip of a single frame.
    """

    def __init__(
        self,
        kept: Sequence[CachedClips],
        layouts: Sequence[Windows],
        clips: Sequence[Clip],
        sampling: Sampling,
        batches: ClipBatches,
        device: torch.device,
    ) -> None:
        self.layouts, self.clips, self.sampling = layouts, clips, sampling
        self.kept = list(kept)
        if device.type != "cpu" and sum(own.needs(device) for own in kept) <= _room(device):
            self.kept = [own.on_device(device) for own in kept]
        self.batches, self.device = batches, device
        if joint_hop(layouts) == 1:
            for clip in clips:
                check_length(clip.video.path, kept[0].count(clip))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        # A thread reads the next batches while the head trains: there is no process to start in an epoch.
        ahead = Prefetch(map(self._gather, self.batches), 2)
        try:
            for embeddings, padding, labels in ahead:
                # Half as many bytes go up; they are widened where they are used.
                on_device = embeddings.to(self.device, non_blocking=True).float()
                yield on_device, padding.to(self.device, non_blocking=True), labels
        finally:
            ahead.close()

    def _gather(self, items: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        clips = [self.clips[index] for _, index in items]
        drawn, own = [], []
        for item, clip in zip(items, clips, strict=True):
            counts = [kept.count(clip) for kept in self.kept]
            drawn.append(self.sampling.draw(item, min(counts)))
            own.append(tuple(joint_indices(self.layouts, counts, drawn[-1][0])))
        _, padding, flipped = (np.array(part) for part in zip(*drawn, strict=True))
        embeddings = torch.cat(
            [
                kept.gather(clips, np.array(indices), flipped)
                for kept, indices in zip(self.kept, zip(*own, strict=True), strict=True)
            ],
            dim=-1,
        )
        places = torch.from_numpy(padding)
        if self.device.type == "cuda":
            # Only from pinned memory does a copy go on while others compute.
            embeddings, places = (
                part.pin_memory() if part.device.type == "cpu" else part for part in (embeddings, places)
            )
        return embeddings, places, torch.tensor([clip.label for clip in clips])
