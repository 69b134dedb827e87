"""Calibration of probabilities: temperature scaling, and the expected calibration error."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BINS = 15
# Of logarithms of temperatures; beyond, all answers are alike or all are certain.
LIMITS = math.log(1 / 50), math.log(50)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The number that logits are divided by so that probabilities are right on clips that are held out.

    It changes no answer (temperature scaling; Guo et al., ICML 2017, section 4.2), and makes the mean
    probability of the answers equal to the share of right ones (expectation consistency; Clarté et al., UAI
    2023). Unlike the least cross-entropy, that does not ask what classes get that no clip shows. R right
    answers of N are a share of (R + 1) / (N + 2), Laplace's rule: clips that are all named right do not ask
    for certainty. In the mean, no more than 1 - 1 / (N + 2) is claimed: with 30 clips, 97 % at the most.

    Clips by which an epoch was chosen too are named right a little more often than others, so the temperature
    is a little low there.

    Args:
        logits: (N, C)
        labels: (N,)

    Returns: the temperature; 1 without clips or for a single class.
    """
    import scipy.optimize

    clips, classes = logits.shape
    if not clips or classes < 2:
        return 1.0
    right = int((logits.argmax(1) == labels).sum())
    share, given = (right + 1) / (clips + 2), logits.double()

    def excess(logarithm: float) -> float:
        return float((given / math.exp(logarithm)).softmax(1).amax(1).mean()) - share

    # The warmer, the less sure.
    if excess(LIMITS[0]) <= 0:
        return math.exp(LIMITS[0])
    if excess(LIMITS[1]) >= 0:
        return math.exp(LIMITS[1])
    return math.exp(scipy.optimize.brentq(excess, *LIMITS))


def with_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities (N, C) as they are when the logits behind them are divided by a temperature."""
    logits = torch.from_numpy(probabilities).clamp_min(np.finfo(np.float64).tiny).log()
    return (logits / temperature).softmax(1).numpy()


@dataclass(frozen=True)
class Reliability:
    """Clips by the probability of their answer, in bins of equal width.

    Attributes:
        counts: clips of each bin
        confidence, accuracy: mean probability of the answer, and share of right ones; 0 where a bin is empty
    """

    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @classmethod
    def of(cls, probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> Reliability:
        """Bins of predictions, by probabilities (N, C) and labels (N,)."""
        highest = probabilities.max(1)
        place = np.clip(np.ceil(highest * bins).astype(int) - 1, 0, bins - 1)
        counts = np.bincount(place, minlength=bins)
        right = np.bincount(place, probabilities.argmax(1) == labels, minlength=bins)
        sums = np.bincount(place, highest, minlength=bins)
        return cls(counts, sums / np.maximum(1, counts), right / np.maximum(1, counts))

    @property
    def error(self) -> float:
        """Expected calibration error: the mean gap of confidence and accuracy (Guo et al., equation 3)."""
        gaps = np.abs(self.confidence - self.accuracy)
        return float((self.counts * gaps).sum() / max(1, self.counts.sum()))
