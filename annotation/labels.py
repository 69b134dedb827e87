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
# Nats by which a second can speak against an action at most, however sure the model is.
CERTAIN = 7.0
# Nats of a label that is not to be chosen.
NEVER = -1e9

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


def scores(probabilities: np.ndarray, min_probability: float = 0, none: np.ndarray | float = 0) -> np.ndarray:
    """How well each action fits each frame, in nats: (N, C) -> (N, C + 1), the last column for no action.

    A single frame says no more than `CERTAIN` against an action.

    Args:
        min_probability: with less for the most probable action, no action fits best
        none: probability of no action, where that was learned, (N,)
    """
    last = np.broadcast_to(np.maximum(none, min_probability), len(probabilities))
    logs = np.log(np.maximum(np.column_stack([probabilities, last]), 1e-300, dtype=np.float64))
    logs = (logs - logs.max(1, keepdims=True)).clip(-CERTAIN)
    logs[last == 0, -1] = NEVER
    return logs


def best_sequence(scores: np.ndarray, times: np.ndarray, cost: float, begins: Sequence[int]) -> np.ndarray:
    """The labels (N,) with the greatest sum of scores over time less `cost` for each change; last is `NONE`.

    A chain with one cost for all changes (Potts, 1952), solved by dynamic programming (Viterbi, 1967) in a
    time linear in frames and labels. Shots are labeled each by itself.

    Args:
        scores: of each frame, (N, C + 1), in nats
        times: second of each frame, and that at which the last one ends, (N + 1,)
        cost: in nats x seconds; with 0 each frame has the label that fits it best
        begins: first frames of the shots
    """
    labels = np.empty(len(scores), np.int64)
    for begin, end in pairwise([*begins, len(scores)]):
        shot = scores[begin:end]
        # Frames share their scores for a while.
        firsts = np.flatnonzero(np.r_[True, (shot[1:] != shot[:-1]).any(1)])
        edges = np.append(begin + firsts, end)
        gains = shot[firsts] * np.diff(times[edges])[:, None]
        total, before = gains[0], np.empty(gains.shape, np.int64)
        for step in range(1, len(gains)):
            best = int(total.argmax())
            stays = total >= total[best] - cost
            before[step] = np.where(stays, np.arange(len(total)), best)
            total = np.where(stays, total, total[best] - cost) + gains[step]
        label = int(total.argmax())
        for step in reversed(range(len(gains))):
            labels[edges[step] : edges[step + 1]] = label
            label = int(before[step, label])
    return np.where(labels == scores.shape[1] - 1, NONE, labels)


def runs(labels: np.ndarray) -> Iterator[tuple[int, int]]:
    """First and last frame of each run of equal labels."""
    edges = [0, *(np.flatnonzero(np.diff(labels)) + 1).tolist(), len(labels)]
    yield from ((first, end - 1) for first, end in pairwise(edges))
