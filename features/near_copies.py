"""Clips that are nearly the same on both sides of a split: copies, also re-encoded, shorter or mirrored.

Also clips of one scene that a data set takes for two: on UCF-101, Diving g02_c07 and g10_c03.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from features.cache import CachedClips
from splits.split import Clip

# Of mean embeddings (benchmarks/README.md). Of pairs of UCF-101's clips that are cut out of one video,
# 41 % (i3d) and 46 % (efficientnet_lite0) are more alike; of a class, out of two videos, 0.11 %, which show
# one scene. Of copies i3d finds 77 of 80: all that are encoded anew, smaller, darker, cropped or mirrored.
THRESHOLD = 0.95
# Where an encoder finds everything alike, copies are those that are so many times as near as two clips of
# different classes, in the median.
NEARER = 8
# Of a clip, evenly spread: all of UCF-101's would take minutes to read.
EMBEDDINGS = 16
# Test clips at once.
BLOCK = 512


@dataclass(frozen=True)
class NearCopy:
    """A test clip, the training clip that it is most alike, and their cosine."""

    test: Clip
    train: Clip
    cosine: float


def mean_embeddings(kept: CachedClips, clips: Sequence[Clip]) -> np.ndarray:
    """The mean of each clip's embeddings, scaled to length 1, (N, D) float32."""
    means = np.empty((len(clips), kept.width), np.float32)
    for row, clip in enumerate(clips):
        last = kept.count(clip) - 1
        indices = np.unique(np.linspace(0, last, EMBEDDINGS).round().astype(int))
        rows = kept.gather([clip], indices[None], np.zeros(1, bool))
        means[row] = rows[0].float().mean(0).numpy()
    return means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def find_near_copies(kept: CachedClips, train: Sequence[Clip], test: Sequence[Clip]) -> list[NearCopy]:
    """The test clips that are nearly the same as a training clip, of whatever class, the most alike first."""
    if not train or not test:
        return []
    trained, tested = mean_embeddings(kept, train), mean_embeddings(kept, test)
    labels = np.array([clip.label for clip in train])
    alike: list[NearCopy] = []
    others = []
    for start in range(0, len(test), BLOCK):
        cosines = tested[start : start + BLOCK] @ trained.T
        different = np.array([clip.label for clip in test[start : start + BLOCK]])[:, None] != labels
        others.append(cosines[different][:: max(1, len(test) * len(train) // 10**6)])
        for row, best in enumerate(cosines.argmax(1).tolist()):
            if (cosine := float(cosines[row, best])) > THRESHOLD:
                alike.append(NearCopy(test[start + row], train[best], min(1.0, cosine)))
    typical = float(np.median(np.concatenate(others))) if any(map(len, others)) else 0.0
    least = 1 - (1 - typical) / NEARER
    return sorted((pair for pair in alike if pair.cosine > least), key=lambda pair: -pair.cosine)
