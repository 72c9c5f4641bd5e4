"""Intervals of what is measured: how much it would change if other images had been drawn, by the bootstrap."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import numpy as np
from torch import Tensor

LEVEL: Final = 0.95
_SEED = 40_000_000
_MOST_DRAWS = 2**22
"""Rows that are drawn at once, over all resamples: 32 MB of their numbers."""

Interval = tuple[float, float]


def interval(value: float, parts: Tensor, resamples: int, classes: Tensor | None = None) -> Interval:
    """Return the 95% interval of a value to which each image contributes a part, [N].

    The images are drawn again with replacement, `resamples` times, and the value changes by what the mean of the parts
    does. Parts of a mean or a share are its own numbers; those of other measures are their derivatives by the images'
    weights. A distance computed of resampled rows itself would not do: it takes the repeated rows for a narrower law.
    With `classes` [N], which are drawn in turn and are the same in any other draw, images are drawn again within theirs.
    """
    from scipy.stats import bootstrap

    rows = parts.detach().cpu().double().numpy()
    rows = rows if classes is None else within(rows, classes.cpu().numpy())
    found = bootstrap(
        (rows,), np.mean, n_resamples=resamples, confidence_level=LEVEL, method="percentile", vectorized=True,
        batch=max(1, _MOST_DRAWS // len(rows)), rng=np.random.default_rng(_SEED),
    ).confidence_interval  # fmt: skip
    shift = value - float(rows.mean())
    return float(found.low) + shift, float(found.high) + shift


def within(parts: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Return what is left of parts [N] less the mean of their class, to draw from as if there were no classes.

    The mean of N draws has then the variance of one that draws within each class, unbiased: sum n_c var_c / N^2.
    """
    _, place, counts = np.unique(classes, return_inverse=True, return_counts=True)
    means = np.bincount(place, parts) / counts
    left: np.ndarray = (parts - means[place]) * np.sqrt(counts / np.maximum(counts - 1, 1))[place]
    return left


def intervals(
    values: Mapping[str, float], parts: Mapping[str, Tensor], resamples: int, classes: Tensor | None = None
) -> dict[str, Interval]:
    """Return the interval of each value that has parts; none for no resamples.

    No Fréchet distance goes below 0, no share beyond 0 and 1, no Inception Score below 1.
    """
    if not resamples:
        return {}
    if classes is not None and len(classes) < 2 * len(set(classes.tolist())):
        classes = None  # of classes that are there once nothing could be drawn again
    found = {name: interval(values[name], rows, resamples, classes) for name, rows in parts.items()}
    bounds = {
        "frechet_distance": (0.0, math.inf),
        "precision": (0.0, 1.0),
        "label_accuracy": (0.0, 1.0),
        "inception_score": (1.0, math.inf),
    }
    limits = {name: bounds.get(name, (-math.inf, math.inf)) for name in found}
    return {name: (max(low, limits[name][0]), min(high, limits[name][1])) for name, (low, high) in found.items()}
