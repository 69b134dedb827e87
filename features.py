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
from dataset import ClipBatches, FrameClips, Sampling, check_length, frame_loader, parse_streams
from encoders import Encoder, State, encoder_spec, read_weights
from engine import Batches
from models import Classifier
from pipeline import Prefetch
from ranks import ALONE, Ranks
from splits import Clip, Shard, load_split


class EmbeddingClips:
    """Batches of `engine.Batches`: what `frame_loader` gives, already encoded.

    Args:
        caches: hold all of `clips`, one for each stream
        clips: what to read
        sampling: which frames make an item
        batches: which items make a batch
    """

    def __init__(
        self,
        caches: Sequence[EmbeddingCache],
        clips: Sequence[Clip],
        sampling: Sampling,
        batches: ClipBatches,
    ) -> None:
        self.caches, self.clips, self.sampling, self.batches = caches, clips, sampling, batches
        for clip in clips:
            check_length(clip.video.path, caches[0].frames(clip))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        # A thread reads the next batches while the head trains: there is no process to start in an epoch.
        ahead = Prefetch(map(self._gather, self.batches), 2)
        try:
            yield from ahead
        finally:
            ahead.close()

    def _gather(self, items: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        clips = [self.clips[index] for _, index in items]
        drawn = [
            self.sampling.draw(item, self.caches[0].frames(clip))
            for item, clip in zip(items, clips, strict=True)
        ]
        frames, padding, flipped = (np.array(part) for part in zip(*drawn, strict=True))
        parts = [cache.gather(clips, frames, flipped) for cache in self.caches]
        labels = torch.tensor([clip.label for clip in clips])
        return torch.cat(parts, dim=-1), torch.from_numpy(padding), labels


class EncodedClips:
    """Batches of `engine.Batches`, decoded and encoded anew in each pass.

    Args:
        frames: gives frames (B, T, 3 S, H, W) uint8, padding and labels
        model: on its device, its encoder prepared
    """

    def __init__(self, frames: DataLoader, model: Classifier) -> None:
        self.frames, self.model = frames, model

    def __len__(self) -> int:
        return len(self.frames)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for frames, padding, labels in self.frames:
            yield self.model.encode(frames.to(self.model.encoder.device, non_blocking=True)), padding, labels


def open_cache(
    path: Path,
    clips: Sequence[Clip],
    encoder: Encoder,
    img_dim: int,
    *,
    flip: bool,
    stream: str = "rgb",
    frame_stride: int = 1,
    threads: int = 1,
    ranks: Ranks = ALONE,
    shard: Shard | None = None,
) -> EmbeddingCache:
    """The cache of what `encoder` gives of `clips` in a stream, filled where something is missing.

    Without `flip`, one that keeps mirrored frames too is used where it is there.

    Args:
        ranks: processes that fill it together, each its share
        shard: fill this part only, and leave the rest to other machines

    Raises: as `EmbeddingCache` and `EmbeddingCache.fill`; CacheError if the processes see different folders.
    """
    key = CacheKey(
        encoder.name, encoder.sha256(), img_dim, encoder.variant, True, frame_stride, stream=stream
    )
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


def caches_from_flags(
    args: argparse.Namespace,
    clips: Sequence[Clip],
    encoder: Encoder,
    img_dim: int,
    streams: Sequence[str],
    *,
    flip: bool,
    ranks: Ranks = ALONE,
    shard: Shard | None = None,
) -> list[EmbeddingCache]:
    """`open_cache` of each stream, as --cache_path, --dataset_path, --frame_stride and --num_workers say."""
    return [
        open_cache(
            args.cache_path or cli.beside(args.dataset_path, "-embeddings"),
            clips,
            encoder,
            img_dim,
            flip=flip,
            stream=stream,
            frame_stride=args.frame_stride,
            threads=max(1, args.num_workers),
            ranks=ranks,
            shard=shard,
        )
        for stream in streams
    ]


def encoder_state(args: argparse.Namespace) -> State | None:
    """The weights of --encoder_weights, whose SHA-256 is printed; None where the flag is not given.

    Raises: FileNotFoundError if there is no such file, WeightsError if it holds no tensors.
    """
    if args.encoder_weights is None:
        return None
    state, digest = read_weights(args.encoder_weights)
    cli.say(f"weights of {args.encoder}: {args.encoder_weights}, SHA-256 {digest}")
    return state


class ClipSource:
    """Where the clips of a command come from: the cache, or the encoder anew in each epoch.

    Args:
        model: on its device, its encoder prepared
        img_dim: height and width of the frames in pixels
        caches: hold the embeddings of all clips, one for each stream; none decodes and encodes clips when
            they are asked for
        workers: processes that decode where there is no cache
    """

    def __init__(
        self, model: Classifier, img_dim: int, caches: Sequence[EmbeddingCache], workers: int
    ) -> None:
        self.model, self.img_dim, self.caches, self.workers = model, img_dim, caches, workers

    @classmethod
    def from_flags(
        cls,
        args: argparse.Namespace,
        model: Classifier,
        clips: Sequence[Clip],
        img_dim: int,
        *,
        flip: bool,
        ranks: Ranks = ALONE,
    ) -> Self:
        """What --cache, --cache_path, --frame_stride and --num_workers ask for; fills the cache with `clips`.

        Raises: as `open_cache`.
        """
        caches: list[EmbeddingCache] = []
        if args.cache == "disk":
            streams = model.streams
            caches = caches_from_flags(args, clips, model.encoder, img_dim, streams, flip=flip, ranks=ranks)
        return cls(model, img_dim, caches, args.num_workers)

    def loader(self, clips: Sequence[Clip], sampling: Sampling, batches: ClipBatches) -> Batches:
        """Embeddings of what `batches` names of `clips`."""
        if self.caches:
            return EmbeddingClips(self.caches, clips, sampling, batches)
        frames = FrameClips(clips, sampling, self.img_dim, self.model.streams)
        pin_memory = self.model.encoder.device.type == "cuda"
        return EncodedClips(
            frame_loader(frames, batches, workers=self.workers, pin_memory=pin_memory), self.model
        )


def get_args_parser() -> argparse.ArgumentParser:
    """The flags of features.py."""
    parser = argparse.ArgumentParser(description="Fill the embedding cache of a data set ahead of training.")
    cli.add_data_flags(parser)
    cli.add_encoder_flags(parser, check_encoder=encoder_spec, check_streams=parse_streams)
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
    encoder = Encoder(args.encoder, state=encoder_state(args)).to(device)
    encoder.prepare(cli.choose_dtype(args.precision, device), compile=args.compile)
    clips = split.train + split.test
    flip = not args.no_flip
    img_dim, streams = args.img_dim or encoder.spec.input_size, parse_streams(args.streams)
    for cache in caches_from_flags(
        args, clips, encoder, img_dim, streams, flip=flip, ranks=ranks, shard=args.shard
    ):
        cli.say(f"{len(clips) - len(cache.missing(clips)):,} of {len(clips):,} clips in {cache.folder}")
    ranks.close()
    return 0


if __name__ == "__main__":
    cli.run(main)
