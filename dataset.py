"""Which embeddings of a video make a clip, and batches of such clips; a check of a whole data set.

    python3 dataset.py check --dataset_path data/UCF-101 --split_path data/ucfTrainTestlist

Shapes: B clips, T embeddings along a video, D embedding width; M windows of L frames.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from features.cache import check_caches
from features.fill import cache_folder
from features.streams import View
from features.windows import joint_indices
from splits.check import check
from splits.datasets import DataSettings
from splits.split import Clip
from utils.flags import add_flags, read
from utils.process import available_cores, run
from video.frames import resize_frames
from video.reader import check_length


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


def clip_indices(
    num_frames: int, length: int, *, rng: np.random.Generator | None = None, view: int = 0, views: int = 1
) -> np.ndarray:
    """Which embeddings of a video make a clip of `length`; `num_frames` counts those of the video.

    With `rng`, a random step and start (training); without, evenly spread over the whole video (test). The
    clips of several `views` lie between each other. A video with fewer than `length` repeats its first one at
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
    """For each embedding of a video from `start` on, which ones make the clip around it that labels it.

    A clip is `length` embeddings, `step` apart, with that one in its middle; at both ends of the video it is
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
    """Which embeddings of a video make an item, and whether they are mirrored.

    An item is an (epoch, index); in testing, a (view, index). Its random numbers depend on these two and on
    the seed alone, so that neither the order of items, nor the number of workers, nor where embeddings come
    from changes what training sees.

    Attributes:
        sequence_length: embeddings of a clip
        training: random step and start, and random flips; otherwise they are spread evenly over the video
        flip: in training, mirror the whole clip left to right with p = 0.5; off where direction is the label
        seed: of the random numbers
        frame_stride: use every N-th frame of a video only
        views: clips of a video that are tested
        shuffle: put them out of order, to see whether a model takes notice
    """

    sequence_length: int
    training: bool = False
    flip: bool = True
    seed: int = 0
    frame_stride: int = 1
    views: int = 1
    shuffle: bool = False

    def draw(self, item: tuple[int, int], num_frames: int) -> tuple[np.ndarray, np.ndarray, bool]:
        """Embeddings of an item.

        Returns: their numbers (T,) int64 among the `num_frames` of the video, which are padding (T,)
            bool, and whether the item is mirrored.
        """
        rng = np.random.default_rng([self.seed, *item])
        training = rng if self.training else None
        indices = clip_indices(num_frames, self.sequence_length, rng=training, view=item[0], views=self.views)
        mirrored = self.training and self.flip and bool(rng.random() < 0.5)
        padding = padding_of(indices)
        if self.shuffle:
            indices[~padding] = rng.permutation(indices[~padding])
        return indices, padding, mirrored


# Of each view, windows of as many frames each, (M, L, 3, H, W) uint8, and where the embeddings of a clip are
# among all those that they give, (T,); which of these are padding (T,) bool; the label.
Item = tuple[list[tuple[list[Tensor], Tensor]], Tensor, int]


class FrameClips(Dataset[Item]):
    """Clips of frames, decoded when asked for by (epoch, index).

    Args:
        clips: what to read
        sampling: which embeddings make an item
        views: what encoders see of the frames
    """

    def __init__(self, clips: Sequence[Clip], sampling: Sampling, views: Sequence[View]) -> None:
        self.clips, self.sampling, self.views = clips, sampling, views

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, item: tuple[int, int]) -> Item:
        """What it takes to encode a clip.

        Raises: FileNotFoundError or VideoError for a clip that cannot be read.
        """
        clip, stride = self.clips[item[1]], self.sampling.frame_stride
        num_frames = clip.video.count()
        check_length(clip.video.path, num_frames)
        kept, layouts = -(-num_frames // stride), [view.windows for view in self.views]
        counts = [layout.count(kept) for layout in layouts]
        indices, padding, flipped = self.sampling.draw(item, min(counts))
        needed = [
            layout.holding(kept, own)
            for layout, own in zip(layouts, joint_indices(layouts, counts, indices), strict=True)
        ]
        # A video is read in its order.
        numbers = np.unique(np.concatenate([window.frames for windows, _ in needed for window in windows]))
        frames = list(clip.video.frames(numbers * stride))
        parts = []
        for view, (windows, places) in zip(self.views, needed, strict=True):
            resized = resize_frames(frames, view.img_dim, view.resize)
            resized = resized.flip(-1) if flipped else resized
            cut = [resized[np.searchsorted(numbers, window.frames)] for window in windows]
            groups = [torch.stack(list(group)) for _, group in groupby(cut, len)]
            parts.append((groups, torch.from_numpy(places)))
        return parts, torch.from_numpy(padding), clip.label


def main(argv: list[str] | None = None) -> int:
    """Check a data set and its embeddings; returns 1 if anything would corrupt a result."""
    args = get_args_parser().parse_args(argv)
    data = read(DataSettings, args)
    report = check(data, threads=available_cores())
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
