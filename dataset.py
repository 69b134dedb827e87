"""Sample clips from stored embeddings and batch them; check a whole data set.

    python3 dataset.py check --dataset_path data/UCF-101 --split_path data/ucfTrainTestlist

Shapes: B clips, T embeddings along a video, D embedding width; L frames of a window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from features.embed import Embedded
from features.store import Entry, Store, damaged_pairs, find_stores
from splits.check import check
from splits.datasets import DataSettings, Listed
from splits.segments import SegmentedVideos, uncovered
from splits.split import NO_ACTION, Clip, Split
from utils.files import beside
from utils.flags import Parser, add_flags, read
from utils.process import UserError, available_cores, run
from utils.ranks import ALONE, Ranks
from video.files import VideoError
from video.frames import resize_frames
from video.reader import Video, check_length

# Two clips are near copies if the cosine of their mean embeddings is above this, and if they are so many
# times nearer than two clips of different classes (docs/benchmarks.md).
NEAR, NEARER = 0.95, 8
# Seconds of the longest and of the shortest clip of what no segment covers.
PIECE, LEAST = 10.0, 0.3


def get_args_parser() -> Parser:
    """The flags of dataset.py."""
    parser = Parser(description="Look after a data set.")
    commands = parser.add_subparsers(dest="command", required=True)
    checking = commands.add_parser(
        "check", help="decode everything, compare it with the lists, and read all embeddings that are kept"
    )
    add_flags(checking, DataSettings, without=("segments",))
    checking.add_argument(
        "--cache_path", type=Path, help="folder of the embeddings; default: <dataset_path>-embeddings"
    )
    return parser


def clip_indices(num_frames: int, length: int, *, rng: np.random.Generator | None = None) -> np.ndarray:
    """Which embeddings of a video make a clip of `length`; `num_frames` counts those of the video.

    With `rng`, a random step and start (training); without, evenly spread over the whole video (test). A
    video with fewer than `length` repeats its first one at the front.

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
        step: 2 is about the middle of what training draws on UCF-101 (1 to 4 for 40 frames of about 180)
        start: the first embedding whose clip is asked for

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

    An item is an (epoch, index). Its random numbers depend on these two and on the seed alone, so that
    neither the order of items nor the number of processes changes what training sees.

    Attributes:
        sequence_length: embeddings of a clip
        training: random step and start, and random flips; otherwise they are spread evenly over the video
        flip: in training, mirror the whole clip left to right with p = 0.5; off where direction is the label
        seed: of the random numbers
        shuffle: put the embeddings of a clip out of order, to see whether a model takes notice
    """

    sequence_length: int
    training: bool = False
    flip: bool = True
    seed: int = 0
    shuffle: bool = False

    def draw(self, item: tuple[int, int], num_frames: int) -> tuple[np.ndarray, np.ndarray, bool]:
        """Embeddings of an item.

        Returns: their numbers (T,) int64 among the `num_frames` of the video, which are padding (T,)
            bool, and whether the item is mirrored.
        """
        rng = np.random.default_rng([self.seed, *item])
        indices = clip_indices(num_frames, self.sequence_length, rng=rng if self.training else None)
        mirrored = self.training and self.flip and bool(rng.random() < 0.5)
        padding = padding_of(indices)
        if self.shuffle:
            indices[~padding] = rng.permutation(indices[~padding])
        return indices, padding, mirrored


def sampled(labels: np.ndarray, background: int | None, epoch: int, seed: int) -> np.ndarray:
    """Numbers of the clips of an epoch: all, but background only as often as the most frequent action.

    Args:
        labels: of all clips, (N,)
        background: the label that is drawn from anew in each epoch; None if there is none
    """
    places = np.arange(len(labels))
    if background is None or (labels == background).all():
        return places
    rest, actions = places[labels == background], places[labels != background]
    most = int(np.bincount(labels[actions]).max())
    drawn = np.random.default_rng([seed, epoch, 1]).choice(rest, min(len(rest), most), replace=False)
    return np.sort(np.concatenate([actions, drawn]))


def batch_items(
    clips: int | np.ndarray,
    batch_size: int,
    *,
    epoch: int = 0,
    seed: int | None = None,
    ranks: Ranks = ALONE,
) -> list[list[tuple[int, int]]]:
    """The batches of an epoch as items (epoch, index), this process's part of each.

    Args:
        clips: how many, or the indices of those that are taken
        batch_size: clips of a batch, those of all processes together
        seed: of the order; None for testing, in order. A shuffled last batch of a single clip, which
            BatchNorm cannot train on, or of fewer clips than two for each process, is left out
    """
    order = np.array(clips) if isinstance(clips, np.ndarray) else np.arange(clips)
    if seed is not None:
        np.random.default_rng([seed, epoch]).shuffle(order)
    items = [(epoch, index) for index in order.tolist()]
    batches = [items[at : at + batch_size] for at in range(0, len(items), batch_size)]
    least = 1 if seed is None else max(2, 2 * ranks.size if ranks.size > 1 else 0)
    parts = [batch[ranks.rank :: ranks.size] for batch in batches if len(batch) >= least]
    return [part for part in parts if part]


def store_name(clip: Clip) -> str:
    """The name of a clip in a store, `<class>/<clip>`."""
    return clip.name.rsplit(".", 1)[0]


def fill_store(store: Store, clips: Sequence[Clip], threads: int, ranks: Ranks = ALONE) -> None:
    """Encode the clips that are missing in a store.

    Raises: VideoError, after all others, for clips that cannot be read; UserError for two of one name; else
        as `Store.fill`.
    """
    videos: dict[str, Video] = {}
    for clip in clips:
        if videos.setdefault(store_name(clip), clip.video).path != clip.video.path:
            raise UserError(
                f"{clip.name}: another clip has this name with another ending; rename one of them"
            )
    if failures := list(store.fill(videos, threads=threads, ranks=ranks).values()):
        raise VideoError(
            f"{len(failures)} of {len(videos):,} clips cannot be read; the first: {failures[0]}"
            + ("; python3 dataset.py check names them all" if len(failures) > 1 else "")
        )


def load_videos(store: Store, clips: Sequence[Clip]) -> dict[str, Embedded]:
    """The embeddings of the videos of clips, all of which are kept, by the name of the video."""
    videos = {clip.name: clip for clip in clips}
    found = {name: store.load(store_name(clip), clip.video) for name, clip in videos.items()}
    assert None not in found.values()
    return {name: each for name, each in found.items() if each is not None}


def with_background(split: Split, store: Store, listed: SegmentedVideos) -> Split:
    """A split with clips of no action too: what no segment covers in its videos, in pieces.

    Of validation and test there are as many as of the most frequent action; training draws anew each epoch.

    Raises: UserError for a segment that ends behind its video, or where all clips are of one class.
    """
    videos, label = load_videos(store, split.clips), split.classes.index(NO_ACTION)
    listed.check_ends({name: video.end for name, video in videos.items()})
    sides: list[list[Clip]] = []
    for clips in (split.train, split.val, split.test):
        spans: dict[str, list[tuple[float, float]]] = {}
        for clip in clips:
            assert clip.span
            spans.setdefault(clip.name, []).append(clip.span)
        made = list(clips)
        for clip in {clip.name: clip for clip in clips}.values():
            pieces = uncovered(sorted(spans[clip.name]), videos[clip.name].end, PIECE)
            long = [piece for piece in pieces if piece[1] - piece[0] >= LEAST]
            made += [replace(clip, label=label, span=piece) for piece in long]
        if sides:
            taken = sampled(np.array([clip.label for clip in made], np.int64), label, 0, 0)
            made = [made[place] for place in taken]
        sides.append(made)
    train, val, test = sides
    if train and len({clip.label for clip in train}) < 2:
        raise UserError(
            f"{listed.table}: training has one action, {split.classes[train[0].label]}, and nothing beside "
            "it; add segments of another, or videos with something else in them"
        )
    return replace(split, train=train, val=val, test=test)


def clips_around(embedded: Embedded, length: int, step: int) -> np.ndarray:
    """For each embedding of a video the clip around it, within its shot: (K, length); as `window_indices`."""
    clips, at = list[np.ndarray](), 0
    for _, _, rows in embedded.shots():
        clips.append(at + window_indices(rows.shape[1], length, step=step))
        at += rows.shape[1]
    return np.concatenate(clips)


def rows_of(middles: np.ndarray, span: tuple[float, float]) -> tuple[int, int]:
    """First embedding of some seconds of a video, and their number: by their middles, one at least."""
    first, last = np.searchsorted(middles, span).tolist()
    if last <= first:
        # Shorter than an embedding: the nearest one.
        return int(np.abs(middles - sum(span) / 2).argmin()), 1
    return first, last - first


class EmbeddingClips:
    """Clips of embeddings that are kept.

    Args:
        store: holds the embeddings of all of `clips`
        clips: what to read
        sampling: which embeddings make a clip

    Raises: VideoError for a video of a single frame.
    """

    def __init__(self, store: Store, clips: Sequence[Clip], sampling: Sampling) -> None:
        self.store, self.clips, self.sampling = store, clips, sampling
        self.labels = np.array([clip.label for clip in clips], np.int64)
        # First embedding of each clip, and their number.
        self.rows: list[tuple[int, int]] = []
        cut = [clip for clip in clips if clip.span]
        middles = {name: video.middles() for name, video in load_videos(store, cut).items()}
        for clip in clips:
            if clip.span:
                self.rows.append(rows_of(middles[clip.name], clip.span))
                continue
            entry = self.entry(clip)
            if store.encoder.windows.hop == 1 and store.stride == 1:
                check_length(clip.video.path, entry.embeddings)
            self.rows.append((0, entry.embeddings))

    def entry(self, clip: Clip) -> Entry:
        """What is kept of the video of a clip."""
        entry = self.store.entry(store_name(clip), clip.video)
        assert entry is not None, clip.name
        return entry

    def batch(self, items: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings (B, T, D) float32, which of them are padding (B, T) bool, and labels (B,) of items."""
        length = self.sampling.sequence_length
        embeddings = np.empty((len(items), length, self.store.width), np.float32)
        padding = np.empty((len(items), length), bool)
        for row, item in enumerate(items):
            clip, (first, count) = self.clips[item[1]], self.rows[item[1]]
            indices, padding[row], mirrored = self.sampling.draw(item, count)
            embeddings[row] = self.store.array(store_name(clip))[int(mirrored), first + indices]
        labels = torch.from_numpy(self.labels[[index for _, index in items]])
        return torch.from_numpy(embeddings), torch.from_numpy(padding), labels


# Windows (L, 3, H, W) uint8 of frames, the window and the row in it of each embedding of the clip (T, 2),
# which of these are padding (T,) bool, and the label.
FrameItem = tuple[list[Tensor], np.ndarray, np.ndarray, int]


class FrameClips(Dataset[FrameItem]):
    """Clips of frames, decoded when asked for by (epoch, index): for an encoder that is trained too.

    Each is mirrored with p = 0.5 and cropped somewhere. Of a video encoder a clip is embeddings that follow
    each other, from any frame on, and the windows that give them; of an image encoder it is as `Sampling`
    draws it.

    Args:
        clips: the same clips of embeddings, which tell what frames there are
        flip: mirror them
    """

    def __init__(self, clips: EmbeddingClips, *, flip: bool) -> None:
        store, encoder = clips.store, clips.store.encoder
        self.clips, self.length, self.seed = clips.clips, clips.sampling.sequence_length, clips.sampling.seed
        self.flip, self.stride, self.side = flip, store.stride, encoder.img_dim
        self.windows, self.resize = encoder.windows, encoder.resize.with_margin(self.side)
        # Of videos that are not read from their first frame on, or where some frames do not decode.
        of_video = {clip.name: clip for clip in clips.clips}
        entries = {name: clips.entry(clip) for name, clip in of_video.items()}
        searched = [clip for clip in clips.clips if clip.span or entries[clip.name].lost_frames]
        videos = load_videos(store, searched)
        self._seconds = {name: video.seconds() for name, video in videos.items()}
        bounds = {name: video.bounds().tolist() for name, video in videos.items()}
        # First frame of each clip, and their number.
        self._frames: list[tuple[int, int]] = []
        for clip, (first, count) in zip(clips.clips, clips.rows, strict=True):
            ends = bounds[clip.name] if clip.span else [0, entries[clip.name].frames]
            begin, end = (ends[first], ends[first + count]) if clip.span else ends
            self._frames.append((begin, end - begin))

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, item: tuple[int, int]) -> FrameItem:
        """What it takes to encode a clip. Raises: MissingFileError or VideoError if it cannot be read."""
        clip, (begin, frames) = self.clips[item[1]], self._frames[item[1]]
        rng, layout = np.random.default_rng([self.seed, *item]), self.windows
        kept = -(-frames // self.stride)
        if layout.frames == 1:
            indices = clip_indices(kept, self.length, rng=rng)
            padding = padding_of(indices)
            numbers, which = np.unique(indices, return_inverse=True)
            windows, places = list(numbers[:, None]), np.stack([which, np.zeros_like(which)], 1)
        else:
            count = min(self.length, layout.count(kept))
            span = max(count * layout.hop, layout.least)
            first = int(rng.integers(0, max(0, kept - span), endpoint=True))
            starts = range(0, count * layout.hop, layout.frames)
            cut = [layout.window(start, min(span, kept)) for start in starts]
            windows = [first + numbers for numbers, _ in cut]
            rows = np.array([(at, row) for at, (_, new) in enumerate(cut) for row in range(new.stop)[new]])
            # As a short video repeats its first embedding.
            order = np.arange(count - self.length, count).clip(0)
            places, padding = rows[order], padding_of(order)
        wanted = np.unique(np.concatenate(windows))
        mirrored, corner = self.flip and rng.random() < 0.5, (rng.random(), rng.random())
        images = self._read(clip, begin + wanted * self.stride)
        resized = resize_frames(images, self.side, self.resize, corner)
        resized = resized.flip(-1) if mirrored else resized
        return [resized[np.searchsorted(wanted, each)] for each in windows], places, padding, clip.label

    def _read(self, clip: Clip, numbers: np.ndarray) -> list[np.ndarray]:
        if clip.name not in self._seconds:
            return list(clip.video.frames(numbers))
        seconds, wanted = self._seconds[clip.name], set((numbers - numbers[0]).tolist())
        shown = clip.video.frames_from(float(seconds[numbers[0]]), seconds[:-1])
        pairs = zip(range(max(wanted) + 1), shown, strict=False)
        images = [frame.image for number, frame in pairs if number in wanted]
        if len(images) < len(wanted):
            raise VideoError(f"{clip.video.name}: it ends before frame {numbers[-1]}; did the file change?")
        return images

    def collate(self, items: Sequence[FrameItem]) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """A batch of items, whose windows are of a few lengths.

        Returns: windows (N, L, 3, H, W) uint8 of each length L; the row of each clip's embeddings among all
            that these give, one length after the other, (B, T); which of them are padding (B, T) bool; labels
            (B,).
        """
        windows = [window for item in items for window in item[0]]
        lengths = np.array([len(window) for window in windows])
        # The first row of each window.
        order, counts = np.argsort(lengths, kind="stable"), lengths // self.windows.hop
        begins = np.empty_like(counts)
        begins[order] = np.cumsum(counts[order]) - counts[order]
        rows, at = list[np.ndarray](), 0
        for own, places, _, _ in items:
            rows.append(begins[at + places[:, 0]] + places[:, 1])
            at += len(own)
        alike = [np.flatnonzero(lengths == length) for length in np.unique(lengths)]
        return (
            [torch.stack([windows[number] for number in numbers]) for numbers in alike],
            torch.from_numpy(np.stack(rows)),
            torch.from_numpy(np.stack([padding for _, _, padding, _ in items])),
            torch.tensor([label for *_, label in items]),
        )


def near_copies(folder: Path, train: Sequence[Clip], test: Sequence[Clip]) -> Iterator[str]:
    """Test clips that are nearly the same as a training clip: copies, or one scene under two names.

    Args:
        folder: of embeddings; clips without any are left out
    """

    def means(clips: Sequence[Clip]) -> tuple[list[Clip], np.ndarray]:
        there = [clip for clip in clips if (folder / f"{store_name(clip)}.npy").is_file()]
        rows = [np.load(folder / f"{store_name(clip)}.npy")[0].mean(0, np.float32) for clip in there]
        matrix = np.array(rows, np.float32).reshape(len(there), -1)
        return there, matrix / np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-9)

    (trained, known), (tested, new) = means(train), means(test)
    if not trained or not tested:
        return
    cosines = new @ known.T
    labels = np.array([clip.label for clip in trained])
    different = np.array([clip.label for clip in tested])[:, None] != labels
    typical = float(np.median(cosines[different])) if different.any() else 0.0
    for clip, row in zip(tested, cosines, strict=True):
        best = int(row.argmax())
        if row[best] > max(NEAR, 1 - (1 - typical) / NEARER):
            yield f"{clip.name} is nearly the same as {trained[best].name}, cosine {row[best]:.3f}"


def main(argv: list[str] | None = None) -> int:
    """Check a data set and its embeddings; returns 1 if anything would corrupt a result."""
    args = get_args_parser().parse_args(argv)
    data = read(DataSettings, args)
    report, listed = check(data, threads=available_cores()), Listed(data)
    for folder in find_stores(args.cache_path or beside(data.dataset_path, "-embeddings")):
        count, damaged = damaged_pairs(folder)
        report.remarks.append(f"{folder}: embeddings of {count:,} clips read")
        if damaged:
            report.faults.append(
                f"{folder}: the embeddings of {len(damaged):,} clips are damaged, the first {damaged[0]}; "
                "delete its files, they are made again"
            )
            continue
        for number in listed.numbers:
            split = listed.split(number)
            pairs = list(near_copies(folder, split.train, split.test))
            report.remarks += [f"split {number}: {pair}" for pair in pairs]
    for kind, lines in (("remark", report.remarks), ("fault", report.faults)):
        for line in lines:
            print(f"{kind}: {line}")
    counts = f"{len(report.faults):,} faults, {len(report.remarks):,} remarks"
    print(f"{report.clips:,} clips, {report.frames:,} frames decoded; {counts}")
    return 1 if report.faults else 0


if __name__ == "__main__":
    run(main)
