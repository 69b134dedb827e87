"""What action each frame of a video shows: from frames to probabilities."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain, islice, pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dataset import padding_of, window_indices
from features.streams import Coming, Cutter, Joiner, Stream
from features.windows import Cut
from training.checkpoint import check_answers
from video.decoder import Frame
from video.reader import Video
from video.shots import Shots

# Clips classified at once: with fewer the LSTM's weights are read too often, with more nothing is gained.
CLIP_BATCH = 16
# Frames read, encoded and labelled at once: enough for such a batch, and fewer where they are large.
READ_FRAMES, READ_BYTES = 128, 2**27


@dataclass(frozen=True)
class Batch:
    """Consecutive frames of a video, and the windows that they complete.

    Attributes:
        cuts: windows of each stream, or what becomes their embeddings
        ended: of the shot; what comes next is of another one
        step: the windows are of every `step`-th frame that a stride keeps; the same in a whole shot
    """

    frames: list[Frame]
    cuts: Sequence[Sequence[Cut | Coming]]
    ended: bool = False
    step: int = 1


class FrameModel(Protocol):
    """What labels a video's frames: a `Classifier`, or an exported one."""

    width: int

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""

    def open_streams(self, img_dim: int | None = None) -> list[Stream]:
        """As `Classifier.open_streams`."""

    def classify(self, embeddings: Tensor, padding: Tensor | None = None) -> Tensor:
        """As `Classifier.classify`."""


@dataclass(frozen=True)
class ClipLayout:
    """How the clips lie that label frames.

    Attributes:
        sequence_length: embeddings of a clip
        step: embeddings from one of the clip to the next
        every: embeddings that share a label, that of the clip around their middle one
        stride: every N-th frame of the video is encoded
    """

    sequence_length: int
    step: int = 1
    every: int = 1
    stride: int = 1


@dataclass
class Labelled:
    """Consecutive frames of a video, and what they show.

    Attributes:
        probabilities: (n, C)
        begins: the first frame is the first of a shot
    """

    frames: list[Frame]
    probabilities: Tensor
    begins: bool = False


def read_windows(
    video: Video, streams: Sequence[Stream], stride: int, *, shots: bool = True
) -> Iterator[Batch]:
    """Frames of a video, some at a time, and windows of every `stride`-th of a shot.

    Args:
        shots: windows begin anew where a shot does
    """
    source, finder = video.timed_frames(), Shots(find=shots)
    first = next(source)
    source = chain([first], source)
    size = max(1, min(READ_FRAMES, READ_BYTES // first.image.nbytes) // stride) * stride
    cutter, given = Cutter([stream.view for stream in streams]), 0
    while frames := list(islice(source, size)):
        begins = [finder.begins(frame.image) for frame in frames]
        edges = [0, *(place for place in range(1, len(frames)) if begins[place]), len(frames)]
        for start, end in pairwise(edges):
            if begins[start]:
                yield Batch([], cutter.end(), ended=True)
                cutter, given = Cutter([stream.view for stream in streams]), 0
            # Every `stride`-th of the shot, wherever the last batch ended.
            kept = [frame.image for frame in frames[start + -given % stride : end : stride]]
            yield Batch(frames[start:end], cutter.read(kept) if kept else [[] for _ in streams])
            given += end - start
    yield Batch([], cutter.end(), ended=True)


def thin_out(batches: Iterable[Batch], streams: Sequence[Stream], layout: ClipLayout) -> Iterator[Batch]:
    """The same batches without the windows that no clip holds.

    With a step of 2 the clips of frames that are labelled 10 by 10 hold every second embedding of a shot: the
    same ones for clips of an even length, those beside them for an odd one. A shot that is too short for such
    clips has a smaller step, and keeps all.
    """
    step, whole = layout.step, layout.step * layout.sequence_length
    if layout.every % step or any(stream.windows.frames > 1 for stream in streams):
        yield from batches
        return
    # Windows of the shot that were read and given out; the step of the shot, once it is known.
    read = given = own = 0
    held: list[Batch] = []
    for batch in batches:
        held.append(batch)
        read += _count_windows(batch)
        own = own or (step if read >= whole else int(batch.ended))
        if own:
            for one in held:
                yield replace(one, cuts=[_every(cuts, -given % own, own) for cuts in one.cuts], step=own)
                given += _count_windows(one)
            held = []
        if batch.ended:
            read = given = own = 0


def _every(cuts: Sequence[Cut | Coming], start: int, step: int) -> list[Cut]:
    kept = [replace(cut, windows=cut.windows[start::step]) for cut in _not_begun(cuts)]
    return [cut for cut in kept if len(cut.windows)]


def _count_windows(batch: Batch) -> int:
    return sum(len(cut.windows) for cut in _not_begun(batch.cuts[0]))


def _not_begun(cuts: Sequence[Cut | Coming]) -> list[Cut]:
    windows = [cut for cut in cuts if isinstance(cut, Cut)]
    assert len(windows) == len(cuts), "some are on their way already"
    return windows


def encode_ahead(batches: Iterable[Batch], streams: Sequence[Stream]) -> Iterator[Batch]:
    """The same batches, each given out when the next one is on its way through the encoders of a CPU.

    An accelerator has its batches as they are: it does not keep those waiting who begin something.
    """
    if any(stream.device.type != "cpu" for stream in streams):
        yield from batches
        return
    waiting: deque[Batch] = deque()
    for batch in batches:
        cuts = zip(streams, map(_not_begun, batch.cuts), strict=True)
        coming = [[Coming.begin(stream, cut) for cut in own] for stream, own in cuts]
        waiting.append(replace(batch, cuts=coming))
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting


@torch.no_grad()
def label_clips(model: FrameModel, embeddings: Tensor, padding: Tensor) -> Tensor:
    """Class probabilities of clips: embeddings (B, T, S D) and padding (B, T) -> (B, C), on the CPU.

    Raises: CheckpointError if they are no numbers, as with a damaged checkpoint.
    """
    # bf16 is more than twice as fast on a CPU too, and moves a probability by 2e-6.
    with torch.autocast(model.device.type, model.dtype, enabled=model.dtype != torch.float32):
        logits = model.classify(embeddings, padding)
    probabilities = logits.float().softmax(dim=-1).cpu()
    check_answers(bool(probabilities.isfinite().all()))
    return probabilities


@torch.no_grad()
def label_frames(
    model: FrameModel,
    streams: Sequence[Stream],
    batches: Iterable[Batch],
    layout: ClipLayout,
) -> Generator[Labelled]:
    """Label frames by the clips around them, as `dataset.window_indices` lays these in each shot.

    Each frame is encoded once. A frame is given out as soon as its clip is complete, so only a clip's worth
    of frames is held, however long the video. The numbers are those that the whole shot would give.

    Args:
        streams: of the model
        batches: frames in order, any number at a time, each shot with an end of its own
    """
    coming = iter(batches)
    for batch in coming:
        step = batch.step
        own = replace(
            layout, step=layout.step // step, every=layout.every // step, stride=layout.stride * step
        )
        yield from _label_shot(model, streams, chain([batch], coming), own)


def _label_shot(
    model: FrameModel, streams: Sequence[Stream], batches: Iterator[Batch], layout: ClipLayout
) -> Generator[Labelled]:
    """`label_frames` of the batches up to the end of a shot."""
    length, step, every = layout.sequence_length, layout.step, layout.every
    held: deque[Frame] = deque()  # frames without a label yet
    joiner = Joiner(streams)
    shared = every * joiner.hop * layout.stride  # frames with the same label
    embeddings = torch.empty(0, model.width, device=model.device)  # first to read - 1
    first = done = read = came = 0  # embeddings, groups of embeddings, embeddings, frames

    def labelled(clips: np.ndarray) -> Labelled:
        nonlocal done
        begins = done == 0
        done += len(clips)
        # At both ends, and all through a short video, clips are the same.
        distinct, of_group = np.unique(clips - first, axis=0, return_inverse=True)
        padding = torch.from_numpy(padding_of(distinct)).to(model.device).split(CLIP_BATCH)
        parts = torch.from_numpy(distinct).to(model.device).split(CLIP_BATCH)
        probabilities = [
            label_clips(model, embeddings[part], pad) for part, pad in zip(parts, padding, strict=True)
        ]
        frames = [held.popleft() for _ in range(min(len(held), shared * len(clips)))]
        of_frame = torch.from_numpy(of_group).view(-1).repeat_interleave(shared)[: len(frames)]
        return Labelled(frames, torch.cat(probabilities)[of_frame], begins)

    span = step * (length - 1)
    for batch in batches:
        held.extend(batch.frames)
        came += len(batch.frames)
        embeddings = torch.cat([embeddings, joiner.add(batch.cuts, ended=batch.ended)])
        read = first + len(embeddings)
        # Shorter videos have a smaller step, which is known at their end only.
        complete = read - span + span // 2 if read >= step * length else 0
        groups = min(read, max(0, complete + every - 1 - every // 2)) // every
        # The last embedding may stand for frames that are still to come.
        groups = min(groups, came // shared)
        if groups > done and not batch.ended:
            starts = np.maximum(every * np.arange(done, groups) + every // 2 - span // 2, 0)
            yield labelled(starts[:, None] + step * np.arange(length))
            # What comes needs nothing before its own clip, or before the video's last one.
            drop = max(0, min(every * groups + every // 2 - span // 2, read - 1 - span) - first)
            embeddings, first = embeddings[drop:], first + drop
        if batch.ended:
            break
    if held:
        start = every * done
        middles = np.minimum(np.arange(start, read, every) + every // 2, read - 1)
        yield labelled(window_indices(read, length, step=step, start=start)[middles - start])


class Smoother:
    """Averages probabilities over the past: an exponential mean, so that nothing has to wait for the future.

    Args:
        seconds: time constant, after which a new action has 63 % of the weight; 0 changes nothing
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._mean: Tensor | None = None

    def add(self, probabilities: Tensor, elapsed: float) -> Tensor:
        """The mean, (C,), with a frame's probabilities `elapsed` seconds after the frame before it."""
        keep = float(np.exp(-elapsed / self._seconds)) if self._seconds else 0.0
        before = probabilities if self._mean is None else self._mean
        self._mean = probabilities.double().lerp(before.double(), keep)
        return self._mean.float()

    def smooth(self, batches: Iterable[Labelled]) -> Generator[Labelled]:
        """The same frames with probabilities averaged over what came before in the shot."""
        before = Fraction(0)
        for batch in batches:
            if batch.begins:
                self._mean = None
            smoothed = []
            for frame, each in zip(batch.frames, batch.probabilities, strict=True):
                smoothed.append(self.add(each, float(frame.second - before)))
                before = frame.second
            yield replace(batch, probabilities=torch.stack(smoothed))
