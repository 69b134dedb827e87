"""Each frame is encoded once and kept; training and testing start from its embedding.

    python3 features.py --dataset_path data/UCF-101 --split_path data/ucfTrainTestlist     # fill it ahead
    python3 features.py --shard 1/8 ...                                # an eighth of it, on one machine of 8
    torchrun --nproc_per_node=4 features.py ...                         # all of it, on four devices

train.py and test.py fill what is missing by themselves. `cache` describes the files.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import cli
from cache import CacheError, CacheKey, EmbeddingCache
from dataset import ClipBatches, FrameClips, Sampling, check_length, frame_loader
from engine import Batches
from models import ENCODERS, ConvLSTM, Encoder
from pipeline import Prefetch
from ranks import ALONE, Ranks
from splits import Clip, Shard, load_split


class EmbeddingClips:
    """Batches of embeddings (B, T, D) float32 and labels (B,): what `frame_loader` gives, already encoded.

    Args:
        cache: holds all of `clips`
        clips: what to read
        sampling: which frames make an item
        batches: which items make a batch
    """

    def __init__(
        self, cache: EmbeddingCache, clips: Sequence[Clip], sampling: Sampling, batches: ClipBatches
    ) -> None:
        self.cache, self.clips, self.sampling, self.batches = cache, clips, sampling, batches
        for clip in clips:
            check_length(clip.video.path, cache.frames(clip))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # A thread reads the next batches while the head trains: there is no process to start in an epoch.
        ahead = Prefetch(map(self._gather, self.batches), 2)
        try:
            yield from ahead
        finally:
            ahead.close()

    def _gather(self, items: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        clips = [self.clips[index] for _, index in items]
        drawn = [
            self.sampling.draw(item, self.cache.frames(clip)) for item, clip in zip(items, clips, strict=True)
        ]
        frames = np.stack([indices for indices, _ in drawn])
        flipped = np.array([mirrored for _, mirrored in drawn])
        return self.cache.gather(clips, frames, flipped), torch.tensor([clip.label for clip in clips])


class EncodedClips:
    """Batches of embeddings (B, T, D) float32 and labels (B,), decoded and encoded anew in each pass.

    Args:
        frames: gives frames (B, T, 3, H, W) uint8 and labels
        model: on its device, its encoder prepared
    """

    def __init__(self, frames: DataLoader, model: ConvLSTM) -> None:
        self.frames, self.model = frames, model

    def __len__(self) -> int:
        return len(self.frames)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for frames, labels in self.frames:
            yield self.model.encode(frames.to(self.model.encoder.device, non_blocking=True)), labels


def open_cache(
    path: Path,
    clips: Sequence[Clip],
    encoder: Encoder,
    img_dim: int,
    *,
    flip: bool,
    frame_stride: int = 1,
    threads: int = 1,
    ranks: Ranks = ALONE,
    shard: Shard | None = None,
) -> EmbeddingCache:
    """The cache of what `encoder` gives of `clips`, filled where something is missing.

    Without `flip`, one that keeps mirrored frames too is used where it is there.

    Args:
        ranks: processes that fill it together, each its share
        shard: fill this part only, and leave the rest to other machines

    Raises: as `EmbeddingCache` and `EmbeddingCache.fill`; CacheError if the processes see different folders.
    """
    key = CacheKey(encoder.name, encoder.sha256(), img_dim, encoder.variant, True, frame_stride)
    if not flip and not (path / key.folder).is_dir():
        key = replace(key, flip=False)
    cache = EmbeddingCache(path, key, encoder.width, shard or Shard(ranks.rank + 1, ranks.size))
    # Shards of an earlier run, of whatever number of processes, count. All look before any begins to fill.
    missing = bool(cache.missing(clips))
    ranks.wait()
    if missing:
        cache.fill(clips, encoder, threads=threads)
    ranks.wait()
    if ranks.size > 1:
        cache.read()
        if gone := cache.missing(clips):
            raise CacheError(
                f"{cache.folder}: {len(gone):,} clips that other processes encoded are not there; all "
                "machines must see one folder, name it with --cache_path"
            )
    return cache


def cache_from_flags(
    args: argparse.Namespace,
    clips: Sequence[Clip],
    encoder: Encoder,
    img_dim: int,
    *,
    flip: bool,
    ranks: Ranks = ALONE,
    shard: Shard | None = None,
) -> EmbeddingCache:
    """`open_cache` with what --cache_path, --dataset_path, --frame_stride and --num_workers say."""
    return open_cache(
        args.cache_path or cli.beside(args.dataset_path, "-embeddings"),
        clips,
        encoder,
        img_dim,
        flip=flip,
        frame_stride=args.frame_stride,
        threads=max(1, args.num_workers),
        ranks=ranks,
        shard=shard,
    )


class ClipSource:
    """Where the clips of a command come from: the cache, or the encoder anew in each epoch.

    Args:
        model: on its device, its encoder prepared
        img_dim: height and width of the frames in pixels
        cache: holds the embeddings of all clips; None decodes and encodes them when they are asked for
        workers: processes that decode where there is no cache
    """

    def __init__(self, model: ConvLSTM, img_dim: int, cache: EmbeddingCache | None, workers: int) -> None:
        self.model, self.img_dim, self.cache, self.workers = model, img_dim, cache, workers

    @classmethod
    def from_flags(
        cls,
        args: argparse.Namespace,
        model: ConvLSTM,
        clips: Sequence[Clip],
        img_dim: int,
        *,
        flip: bool,
        ranks: Ranks = ALONE,
    ) -> Self:
        """What --cache, --cache_path, --frame_stride and --num_workers ask for; fills the cache with `clips`.

        Raises: as `open_cache`.
        """
        cache = None
        if args.cache == "disk":
            cache = cache_from_flags(args, clips, model.encoder, img_dim, flip=flip, ranks=ranks)
        return cls(model, img_dim, cache, args.num_workers)

    def loader(self, clips: Sequence[Clip], sampling: Sampling, batches: ClipBatches) -> Batches:
        """Batches of embeddings (B, T, D) float32 and labels (B,)."""
        if self.cache is not None:
            return EmbeddingClips(self.cache, clips, sampling, batches)
        frames = FrameClips(clips, sampling, self.img_dim)
        pin_memory = self.model.encoder.device.type == "cuda"
        return EncodedClips(
            frame_loader(frames, batches, workers=self.workers, pin_memory=pin_memory), self.model
        )


def get_args_parser() -> argparse.ArgumentParser:
    """The flags of features.py."""
    parser = argparse.ArgumentParser(description="Fill the embedding cache of a data set ahead of training.")
    cli.add_data_flags(parser)
    cli.add_encoder_flags(parser, ENCODERS)
    cli.add_device_flags(parser)
    parser.add_argument(
        "--shard",
        type=cli.checked(Shard.parse),
        help="fill part i/n only, such as 1/8 on the first of 8 machines; copy the files of all parts into "
        "one folder, or let all machines write to a shared one",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Fill the cache; returns the exit status."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    if args.shard and "WORLD_SIZE" in os.environ:
        parser.error("--shard and torchrun both share the clips out; use one of them")
    if args.cache == "off":
        raise ValueError("--cache off leaves nothing to do here")
    device = cli.choose_device(args.device)
    ranks = Ranks.from_environment(device)
    # Any split lists every clip, on one side or the other.
    split = load_split(args.dataset_path, args.split_path, 1)
    if missing := split.missing():
        cli.say(f"warning: {missing}")
    encoder = Encoder(args.encoder, 1).to(device)
    encoder.prepare(cli.choose_dtype(args.precision, device), compile=args.compile)
    clips = split.train + split.test
    flip = not args.no_flip
    cache = cache_from_flags(args, clips, encoder, args.img_dim, flip=flip, ranks=ranks, shard=args.shard)
    cli.say(f"{len(clips) - len(cache.missing(clips)):,} of {len(clips):,} clips in {cache.folder}")
    ranks.close()
    return 0


if __name__ == "__main__":
    cli.run(main)
