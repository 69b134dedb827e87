"""From the embeddings of a video to labels along it, as operations on arrays.

Shapes: K embeddings of a shot, T of a clip, N frames of a video, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from annotation.overlay import NONE
from dataset import padding_of, window_indices
from features.embed import Embedded
from training.checkpoint import check_finite

# Clips classified at once: with fewer the LSTM's weights are read too often, with more nothing is gained.
CLIP_BATCH = 16

Classify = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ClipLayout:
    """How the clips lie that label a video.

    Attributes:
        sequence_length: embeddings of a clip
        step: embeddings from one of the clip to the next
        every: embeddings that share a label, that of the clip around their middle one
    """

    sequence_length: int
    step: int = 1
    every: int = 1


@torch.no_grad()
def label_clips(classify: Classify, embeddings: Tensor, padding: Tensor, dtype: torch.dtype) -> Tensor:
    """Class probabilities of clips: embeddings (B, T, D) and padding (B, T) -> (B, C), on the CPU.

    Args:
        dtype: to compute in; bf16 is twice as fast on a CPU too, and moves a probability by 2e-6

    Raises: CheckpointError if they are not finite, as with a damaged checkpoint.
    """
    with torch.autocast(embeddings.device.type, dtype, enabled=dtype != torch.float32):
        logits = classify(embeddings, padding)
    probabilities = logits.float().softmax(dim=-1).cpu()
    check_finite(bool(probabilities.isfinite().all()))
    return probabilities


def label_frames(
    classify: Classify,
    embedded: Embedded,
    layout: ClipLayout,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> np.ndarray:
    """Class probabilities (N, C) of a video's frames, by the clips around them in each shot."""
    found = []
    for _, frames, embeddings in embedded.shots():
        rows = torch.from_numpy(embeddings[0].astype(np.float32)).to(device)
        count, every = len(rows), layout.every
        middles = np.minimum(np.arange(0, count, every) + every // 2, count - 1)
        clips = window_indices(count, layout.sequence_length, step=layout.step)[middles]
        # At both ends of a shot, and all through a short one, clips are the same.
        distinct, of_group = np.unique(clips, axis=0, return_inverse=True)
        padding = torch.from_numpy(padding_of(distinct)).to(device).split(CLIP_BATCH)
        parts = torch.from_numpy(distinct).to(device).split(CLIP_BATCH)
        probabilities = torch.cat(
            [label_clips(classify, rows[part], pad, dtype) for part, pad in zip(parts, padding, strict=True)]
        ).numpy()
        of_frame = of_group.reshape(-1).repeat(every * embedded.hop * embedded.stride)[:frames]
        found.append(probabilities[of_frame])
    return np.concatenate(found)


def smooth(probabilities: np.ndarray, times: np.ndarray, seconds: float, begins: Sequence[int]) -> np.ndarray:
    """Probabilities averaged over time in each shot, with weights exp(-distance / seconds).

    Args:
        probabilities: (N, C)
        times: second of each frame, (N,)
        seconds: time constant; 0 changes nothing
        begins: first frames of the shots
    """
    if not seconds:
        return probabilities
    result = np.empty_like(probabilities)
    for first, last in pairwise([*begins, len(probabilities)]):
        rows = probabilities[first:last].astype(np.float64)
        keep = np.exp(-np.diff(times[first:last]) / seconds)
        ones = np.ones((len(rows), 1))
        sums, weights = (
            _decayed(part, keep) + _decayed(part[::-1], keep[::-1])[::-1] - part for part in (rows, ones)
        )
        result[first:last] = sums / weights
    return result


def _decayed(rows: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Sums over the rows before each and itself, those before multiplied by `keep` at every step."""
    sums = rows.copy()
    for place, factor in enumerate(keep, 1):
        sums[place] += factor * sums[place - 1]
    return sums


def choose_labels(probabilities: np.ndarray, min_probability: float) -> np.ndarray:
    """The most probable class of each frame (N,) out of (N, C); `NONE` below `min_probability`."""
    labels = probabilities.argmax(1)
    return np.where(probabilities.max(1) >= min_probability, labels, NONE)


def runs(labels: np.ndarray, begins: Sequence[int] = (0,)) -> Iterator[tuple[int, int]]:
    """First and last frame of each run of equal labels; a run ends where a shot does."""
    edges = {0, *(np.flatnonzero(np.diff(labels)) + 1).tolist(), *begins, len(labels)}
    yield from ((first, end - 1) for first, end in pairwise(sorted(edges)))


def drop_short(labels: np.ndarray, times: np.ndarray, seconds: float, begins: Sequence[int]) -> np.ndarray:
    """Labels whose runs last `seconds`: a shorter run, the shortest first, becomes its longer neighbor.

    Args:
        labels: (N,)
        times: second of each frame, and that at which the last one ends, (N + 1,)
        begins: first frames of the shots; a run has no neighbor in another shot
    """
    labels = labels.copy()
    for start, stop in pairwise([*begins, len(labels)]):
        shot = labels[start:stop]
        while True:
            found = list(runs(shot))
            lengths = [times[start + last + 1] - times[start + first] for first, last in found]
            shortest = int(np.argmin(lengths))
            # A frame's time is no round number.
            if len(found) < 2 or lengths[shortest] >= seconds - 1e-6:
                break
            sides = [side for side in (shortest - 1, shortest + 1) if 0 <= side < len(found)]
            longer = max(sides, key=lambda side: lengths[side])
            first, last = found[shortest]
            shot[first : last + 1] = shot[found[longer][0]]
    return labels
