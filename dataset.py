"""Which frames of a video make a clip, and batches of such clips; a check of a whole data set.

    python3 dataset.py check --dataset_path data/UCF-101 --split_path data/ucfTrainTestlist

Shapes: B clips, T frames, S streams, D embedding width.
"""

from __future__ import annotations

import argparse
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from features.cache import CachedClips, check_caches
from features.fill import cache_folder
from features.pipeline import Prefetch
from models import Classifier
from splits.check import check
from splits.split import Clip
from splits.ucf101 import DataSettings
from utils.device import available_cores
from utils.flags import add_flags, read
from utils.process import run
from video.frames import resize_frames, stream_images
from video.opencv import cv2
from video.reader import check_length, worker_context

# Embeddings (B, T, S D) float32 and which frames are padding (B, T) bool, on the model's device, and labels
# (B,) on the CPU.
Batches = Iterable[tuple[Tensor, Tensor, Tensor]]


def clip_indices(
    num_frames: int, length: int, *, rng: np.random.Generator | None = None, view: int = 0, views: int = 1
) -> np.ndarray:
    """Frame numbers of one clip of `length` frames.

    With `rng`, a random step and start (training); without, evenly spread over the whole video (test). The
    clips of several `views` lie between each other. A video shorter than `length` repeats its first frame at
    the front.

    Returns: int64 array of shape (length,), ascending, each in [0, num_frames).
    Raises: ValueError if `num_frames` or `length` is not positive.
    """
    if num_frames < 1 or length < 1:
        raise ValueError(f"a clip of {length} frames out of {num_frames} cannot be: both must be positive")
    if num_frames < length:
        return np.maximum(np.arange(num_frames - length, num_frames), 0)
    if rng is None and views > 1:
        return ((np.arange(length) + (view + 0.5) / views) * num_frames / length).astype(np.int64)
    if rng is None:
        return np.linspace(0, num_frames - 1, length).round().astype(np.int64)
    step = rng.integers(1, num_frames // length, endpoint=True)
    start = rng.integers(0, num_frames - step * (length - 1))
    return start + step * np.arange(length)


def padding_of(indices: np.ndarray) -> np.ndarray:
    """Which places of clips (..., T) repeat the first frame of a video that is too short: bool (..., T)."""
    padding = np.zeros(indices.shape, bool)
    padding[..., :-1] = indices[..., 1:] == indices[..., :-1]
    return padding


def window_indices(num_frames: int, length: int, *, step: int = 2, start: int = 0) -> np.ndarray:
    """For each frame of a video from `start` on, the frame numbers of the clip around it that labels it.

    A window is `length` frames, `step` apart, with the frame in its middle; at both ends of the video it is
    shifted to stay inside. A video too short for the step is read with a smaller one, and one shorter than
    `length` repeats its first frame at the front, as in `clip_indices`.

    Args:
        start: the first frame whose window is asked for
        step: 2 is about the middle of what training draws on UCF-101 (1 to 4 for 40 frames of about 180)

    Returns: int64 array of shape (num_frames - start, length), rows ascending, in [0, num_frames).
    Raises: ValueError if an argument is not positive.
    """
    if step < 1:
        raise ValueError(f"a step of {step} frames cannot be: it must be positive")
    if num_frames < length:
        return np.tile(clip_indices(num_frames, length), (num_frames - start, 1))
    if length < 1:
        raise ValueError(f"a clip of {length} frames cannot be: it must be positive")
    step = min(step, num_frames // length)
    span = step * (length - 1)
    starts = np.clip(np.arange(start, num_frames) - span // 2, 0, num_frames - 1 - span)
    return starts[:, None] + step * np.arange(length)


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video make an item, and whether they are mirrored.

    An item is an (epoch, index); in testing, a (view, index). Its random numbers depend on these two and on
    the seed alone, so that neither the order of items, nor the number of workers, nor where embeddings come
    from changes what training sees.

    Attributes:
        sequence_length: frames of a clip
        training: random step and start, and random flips; otherwise frames are spread evenly over the video
        flip: in training, mirror the whole clip left to right with p = 0.5; off where direction is the label
        seed: of the random numbers
        frame_stride: use every N-th frame of a video only
        views: clips of a video that are tested
        shuffle: put the frames out of order, to see whether a model takes notice
    """

    sequence_length: int
    training: bool = False
    flip: bool = True
    seed: int = 0
    frame_stride: int = 1
    views: int = 1
    shuffle: bool = False

    def draw(self, item: tuple[int, int], num_frames: int) -> tuple[np.ndarray, np.ndarray, bool]:
        """Frames of an item.

        Returns: their numbers (T,) int64 among `num_frames`, which are padding (T,) bool, and whether the
            item is mirrored.
        """
        rng = np.random.default_rng([self.seed, *item])
        training = rng if self.training else None
        indices = clip_indices(num_frames, self.sequence_length, rng=training, view=item[0], views=self.views)
        mirrored = self.training and self.flip and bool(rng.random() < 0.5)
        padding = padding_of(indices)
        if self.shuffle:
            indices[~padding] = rng.permutation(indices[~padding])
        return indices, padding, mirrored


class FrameClips(Dataset[tuple[Tensor, Tensor, int]]):
    """Clips of frames, decoded when asked for by (epoch, index).

    Args:
        clips: what to read
        sampling: which frames make an item
        img_dim: height and width of a frame in pixels
        streams: what a frame is seen as
    """

    def __init__(
        self, clips: Sequence[Clip], sampling: Sampling, img_dim: int, streams: Sequence[str] = ("rgb",)
    ) -> None:
        self.clips, self.sampling, self.img_dim, self.streams = clips, sampling, img_dim, streams

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, Tensor, int]:
        """Frames (T, 3 S, img_dim, img_dim) uint8, which are padding (T,) bool, and the label.

        Raises: FileNotFoundError or VideoError for a clip that cannot be read.
        """
        clip, stride = self.clips[item[1]], self.sampling.frame_stride
        num_frames = clip.video.count()
        check_length(clip.video.path, num_frames)
        indices, padding, flipped = self.sampling.draw(item, -(-num_frames // stride))
        moments = [indices]
        if "diff" in self.streams:
            moments.append(np.maximum(indices - 1, 0))
        # A video is read in its order.
        distinct, places = np.unique(np.concatenate(moments), return_inverse=True)
        frames = resize_frames(list(clip.video.frames(distinct * stride)), self.img_dim)[places]
        frames = stream_images(frames[: len(indices)], frames[-len(indices) :], self.streams)
        return frames.flip(-1) if flipped else frames, torch.from_numpy(padding), clip.label


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
    """Batches of what `clips` gives, decoded in `workers` processes: (B, T, ...), (B, T) and labels (B,)."""
    options: dict[str, Any] = {"num_workers": workers, "pin_memory": pin_memory}
    if workers:
        options |= {"persistent_workers": True, "multiprocessing_context": worker_context()}
    return DataLoader(clips, batch_sampler=batches, worker_init_fn=_start_worker, **options)


class EncodedClips:
    """`Batches` of clips that are decoded and encoded anew in each pass.

    Args:
        frames: gives frames (B, T, 3 S, H, W) uint8, padding and labels
        model: on its device, its encoder prepared
    """

    def __init__(self, frames: DataLoader, model: Classifier) -> None:
        self.frames, self.model = frames, model

    def __len__(self) -> int:
        return len(self.frames)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        device = self.model.device
        for frames, padding, labels in self.frames:
            embeddings = self.model.encode(frames.to(device, non_blocking=True))
            yield embeddings, padding.to(device, non_blocking=True), labels


class EmbeddingClips:
    """`Batches` of clips whose embeddings are kept.

    Args:
        kept: the embeddings of all of `clips`, for each stream
        clips: what to read
        sampling: which frames make an item
        batches: which items make a batch
        device: where embeddings are wanted

    Raises: VideoError for a clip of a single frame.
    """

    def __init__(
        self,
        kept: Sequence[CachedClips],
        clips: Sequence[Clip],
        sampling: Sampling,
        batches: ClipBatches,
        device: torch.device,
    ) -> None:
        self.kept, self.clips, self.sampling, self.batches = kept, clips, sampling, batches
        self.device = device
        for clip in clips:
            check_length(clip.video.path, kept[0].frames(clip))

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
        drawn = [
            self.sampling.draw(item, self.kept[0].frames(clip))
            for item, clip in zip(items, clips, strict=True)
        ]
        frames, padding, flipped = (np.array(part) for part in zip(*drawn, strict=True))
        embeddings = torch.cat([kept.gather(clips, frames, flipped) for kept in self.kept], dim=-1)
        places = torch.from_numpy(padding)
        if self.device.type == "cuda":
            # Only from pinned memory does a copy go on while others compute.
            embeddings, places = embeddings.pin_memory(), places.pin_memory()
        return embeddings, places, torch.tensor([clip.label for clip in clips])


def get_args_parser() -> argparse.ArgumentParser:
    """The flags of dataset.py."""
    parser = argparse.ArgumentParser(description="Look after a data set.")
    commands = parser.add_subparsers(dest="command", required=True)
    checking = commands.add_parser(
        "check", help="decode everything, compare it with the lists, and read all embeddings that are kept"
    )
    add_flags(checking, DataSettings)
    checking.add_argument(
        "--cache_path", type=Path, help="folder of the embeddings; default: <dataset_path>-embeddings"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Check a data set and its embeddings; returns 1 if anything would corrupt a result."""
    args = get_args_parser().parse_args(argv)
    data = read(DataSettings, args)
    report = check(data.dataset_path, data.split_path, threads=available_cores())
    for folder, clips, damaged in check_caches(cache_folder(args.cache_path, data.dataset_path)):
        report.remarks.append(f"{folder}: {clips:,} clips read")
        if damaged:
            report.faults.append(
                f"{folder}: the embeddings of {len(damaged):,} clips are damaged, the first {damaged[0]}; "
                "delete the folder, it is made again"
            )
    for kind, lines in (("remark", report.remarks), ("fault", report.faults)):
        for line in lines:
            print(f"{kind}: {line}")
    counts = f"{len(report.faults):,} faults, {len(report.remarks):,} remarks"
    print(f"{report.clips:,} clips, {report.frames:,} frames decoded; {counts}")
    return 1 if report.faults else 0


if __name__ == "__main__":
    run(main)
