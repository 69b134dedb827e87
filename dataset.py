"""UCF-101: its classes and official splits, and which frames make a clip.

The files read here are those of ucfTrainTestlist.zip (Soomro, Zamir and Shah, 2012):

    classInd.txt        1 ApplyEyeMakeup                                    label and class folder
    trainlist01.txt     ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1       clip and label
    testlist01.txt      ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi         clip
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from video import Video, VideoError, check_whole, worker_context

SPLIT_NUMBERS = (1, 2, 3)
MIN_FRAMES = 2  # a single frame shows no action


@dataclass(frozen=True)
class Clip:
    """A clip of the data set that is there.

    Attributes:
        name: as the lists name it, `<Class>/<file>.avi`
        label: from 0, the line of its class folder in classInd.txt
        video: its file or its folder of frames
    """

    name: str
    label: int
    video: Video


@dataclass(frozen=True)
class Split:
    """The clips of one official split that are there, and how many the lists name.

    Attributes:
        classes: class names, by label
        train, test: clips in the order of the lists
        listed: number of clips that both lists name
    """

    classes: list[str]
    train: list[Clip]
    test: list[Clip]
    listed: int

    def missing(self) -> str | None:
        """One line that counts what the lists name and is not there; None if all is."""
        found = len(self.train) + len(self.test)
        if found == self.listed:
            return None
        labels = {clip.label for clip in self.train + self.test}
        return (
            f"{found:,} of {self.listed:,} listed clips found, "
            f"{len(labels)} of {len(self.classes)} classes; going on with those"
        )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a list file that are not blank."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such list file; unzip ucfTrainTestlist.zip and name its folder with --split_path"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file; unzip ucfTrainTestlist.zip again") from error
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, line.strip()


def read_classes(path: Path) -> list[str]:
    """Class names of a classInd.txt, in the order of their labels.

    Raises: FileNotFoundError if there is no such file; ValueError for a line that is not `<label> <Class>`,
        labels that do not count 1, 2, 3, ..., or a name that stands twice.
    """
    classes: list[str] = []
    for number, line in _lines(path):
        label, _, name = line.partition(" ")
        name = name.strip()
        if label != str(len(classes) + 1) or not name or "/" in name or "\\" in name or name in (".", ".."):
            raise ValueError(f"{path}, line {number}: {line!r} is not '{len(classes) + 1} <Class>'")
        if name in classes:
            raise ValueError(f"{path}, line {number}: the class {name} stands there twice")
        classes.append(name)
    if not classes:
        raise ValueError(f"{path}: the file names no class; unzip ucfTrainTestlist.zip again")
    return classes


def read_list(path: Path, classes: Sequence[str], *, labelled: bool) -> list[tuple[str, int]]:
    """Names and labels of a trainlist (`labelled`) or a testlist.

    The label is that of the class folder: UCF-101 spells HandstandPushups another way in its file names.

    Raises: FileNotFoundError if there is no such file; ValueError with the line for a malformed one, a class
        that classInd.txt does not name, a path that leaves its folder, or a label that is not the class's.
    """
    labels = {name: label for label, name in enumerate(classes)}
    form = "'<Class>/<clip>.avi <label>'" if labelled else "'<Class>/<clip>.avi'"
    entries = []
    for number, line in _lines(path):
        name, *rest = line.split()
        parts = PurePosixPath(name).parts
        where = f"{path}, line {number}"
        if len(parts) != 2 or ".." in parts or "\\" in name or not PurePosixPath(name).suffix:
            raise ValueError(f"{where}: {line!r} is not {form}")
        if len(rest) != int(labelled):
            raise ValueError(f"{where}: {line!r} is not {form}")
        if parts[0] not in labels:
            raise ValueError(f"{where}: the class {parts[0]} is not in classInd.txt; add it there")
        label = labels[parts[0]]
        if labelled and rest[0] != str(label + 1):
            raise ValueError(
                f"{where}: label {rest[0]} is not that of {parts[0]} in classInd.txt, {label + 1}"
            )
        entries.append((name, label))
    return entries


def _find(dataset_path: Path, entries: list[tuple[str, int]]) -> list[Clip]:
    clips = []
    for name, label in entries:
        file = dataset_path / name
        folder = file.with_suffix("")
        if file.is_file():
            check_whole(file)
            clips.append(Clip(name, label, Video(file)))
        elif folder.is_dir():
            clips.append(Clip(name, label, Video(folder)))
    return clips


def load_split(dataset_path: Path, split_path: Path, split_number: int) -> Split:
    """The clips of an official split, from videos or from folders of extracted frames, whichever are there.

    Args:
        dataset_path: holds `<Class>/<clip>.avi` or `<Class>/<clip>/<n>.jpg`
        split_path: holds classInd.txt, trainlist0N.txt and testlist0N.txt
        split_number: N: 1, 2 or 3

    Raises: FileNotFoundError if a folder or list is not there, or none of the listed clips; ValueError for
        another split number, a wrong list, or a class folder that classInd.txt does not name; VideoError for
        a video that is empty or truncated.
    """
    if split_number not in SPLIT_NUMBERS:
        raise ValueError(f"split number {split_number} does not exist; choose 1, 2 or 3")
    if not split_path.is_dir():
        raise FileNotFoundError(
            f"{split_path}: no such folder; unzip ucfTrainTestlist.zip, name it with --split_path"
        )
    classes = read_classes(split_path / "classInd.txt")
    train = read_list(split_path / f"trainlist{split_number:02d}.txt", classes, labelled=True)
    test = read_list(split_path / f"testlist{split_number:02d}.txt", classes, labelled=False)
    if not dataset_path.is_dir():
        raise FileNotFoundError(f"{dataset_path}: no such folder; name the data set with --dataset_path")
    unknown = sorted(
        entry.name
        for entry in dataset_path.iterdir()
        if entry.is_dir() and not entry.name.startswith(".") and entry.name not in classes
    )
    if unknown:
        raise ValueError(
            f"{dataset_path / unknown[0]}: the class {unknown[0]} is not in {split_path / 'classInd.txt'}; "
            "add it there, or move the folder away"
        )
    split = Split(classes, _find(dataset_path, train), _find(dataset_path, test), len(train) + len(test))
    if not split.train and not split.test:
        expected = (
            dataset_path / (train + test)[0][0] if train or test else dataset_path / "<Class>/<clip>.avi"
        )
        raise FileNotFoundError(
            f"none of the {split.listed:,} listed clips is in {dataset_path}; expected for example "
            f"{expected}, or frames in the folder {expected.with_suffix('')}"
        )
    return split


def clip_indices(num_frames: int, length: int, *, rng: np.random.Generator | None = None) -> np.ndarray:
    """Frame numbers of one clip of `length` frames.

    With `rng`, a random step and start (training); without, evenly spread over the whole video (test).
    A video shorter than `length` repeats its first frame at the front.

    Returns: int64 array of shape (length,), ascending, each in [0, num_frames).
    Raises: ValueError if `num_frames` or `length` is not positive.
    """
    if num_frames < 1 or length < 1:
        raise ValueError(f"a clip of {length} frames out of {num_frames} cannot be: both must be positive")
    if num_frames < length:
        return np.maximum(np.arange(num_frames - length, num_frames), 0)
    if rng is None:
        return np.linspace(0, num_frames - 1, length).round().astype(np.int64)
    step = rng.integers(1, num_frames // length, endpoint=True)
    start = rng.integers(0, num_frames - step * (length - 1))
    return start + step * np.arange(length)


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


def resize_frames(frames: Sequence[np.ndarray], img_dim: int) -> Tensor:
    """Frames as the encoder takes them: (T, H, W, 3) uint8 RGB -> (T, 3, img_dim, img_dim) uint8.

    Bicubic with antialiasing, on uint8; the aspect ratio is not kept, as in the original.
    """
    stacked = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
    return transforms.resize(stacked, [img_dim, img_dim], InterpolationMode.BICUBIC, antialias=True)


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video make an item, and whether they are mirrored.

    An item is an (epoch, index). Its random numbers depend on these two and on the seed alone, so that
    neither the order of items, nor the number of workers, nor where embeddings come from changes what
    training sees.

    Attributes:
        sequence_length: frames of a clip
        training: random step and start, and random flips; otherwise frames are spread evenly over the video
        flip: in training, mirror the whole clip left to right with p = 0.5; off where direction is the label
        seed: of the random numbers
        frame_stride: use every N-th frame of a video only
    """

    sequence_length: int
    training: bool = False
    flip: bool = True
    seed: int = 0
    frame_stride: int = 1

    def draw(self, item: tuple[int, int], num_frames: int) -> tuple[np.ndarray, bool]:
        """Frames of an item, as numbers (T,) int64 among `num_frames`, and whether it is mirrored."""
        rng = np.random.default_rng([self.seed, *item]) if self.training else None
        indices = clip_indices(num_frames, self.sequence_length, rng=rng)
        return indices, rng is not None and self.flip and bool(rng.random() < 0.5)


def check_length(path: Path, num_frames: int) -> None:
    """Refuse a video that shows no action.

    Raises: VideoError if it has a single frame.
    """
    if num_frames < MIN_FRAMES:
        raise VideoError(f"{path}: a single frame shows no action; remove the clip, or choose a longer one")


class FrameClips(Dataset[tuple[Tensor, int]]):
    """Clips of frames, decoded when asked for by (epoch, index).

    Args:
        clips: what to read
        sampling: which frames make an item
        img_dim: height and width of a frame in pixels
    """

    def __init__(self, clips: Sequence[Clip], sampling: Sampling, img_dim: int) -> None:
        self.clips, self.sampling, self.img_dim = clips, sampling, img_dim

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        """Frames (T, 3, img_dim, img_dim) uint8 and the label.

        Raises: FileNotFoundError or VideoError for a clip that cannot be read.
        """
        clip, stride = self.clips[item[1]], self.sampling.frame_stride
        num_frames = clip.video.count()
        check_length(clip.video.path, num_frames)
        indices, flipped = self.sampling.draw(item, -(-num_frames // stride))
        frames = resize_frames(list(clip.video.frames(indices * stride)), self.img_dim)
        return frames.flip(-1) if flipped else frames, clip.label


class ClipBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) for `FrameClips`: shuffled anew in each epoch, or in order.

    A shuffled last batch of a single clip is left out, since BatchNorm cannot train on one.

    Attributes:
        epoch: set it before each pass
    """

    def __init__(self, num_clips: int, batch_size: int, *, shuffle: bool, seed: int = 0) -> None:
        self.num_clips, self.batch_size, self.shuffle, self.seed = num_clips, batch_size, shuffle, seed
        self.epoch = 0

    def __len__(self) -> int:
        batches, rest = divmod(self.num_clips, self.batch_size)
        return batches + (rest > int(self.shuffle))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.arange(self.num_clips)
        if self.shuffle:
            np.random.default_rng([self.seed, self.epoch]).shuffle(order)
        for batch in range(len(self)):
            chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [(self.epoch, int(index)) for index in chosen]


def _start_worker(_: int) -> None:
    # A worker per core already: OpenCV's own threads would only get in each other's way.
    cv2.setNumThreads(1)


def frame_loader(
    clips: FrameClips, batches: ClipBatches, *, workers: int, pin_memory: bool = False
) -> DataLoader:
    """Batches of frames (B, T, 3, img_dim, img_dim) uint8 and labels (B,), decoded in `workers` processes."""
    return DataLoader(
        clips,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
        multiprocessing_context=worker_context() if workers else None,
        pin_memory=pin_memory,
    )
