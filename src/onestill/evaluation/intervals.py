"""Intervals of what is measured: how much it would change if other images had been drawn, by the bootstrap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
from torch import Tensor

LEVEL: Final = 0.95
_SEED = 40_000_000
_MOST_DRAWS = 2**22
"""Rows that are drawn at once, over all resamples: 32 MB of their numbers."""

Interval = tuple[float, float]


def interval(value: float, parts: Tensor, resamples: int) -> Interval:
    """Return the 95% interval of a value to which each image contributes a part, [N].

    The images are drawn again with replacement, `resamples` times, and the value changes by what the mean of the parts
    does. Parts of a mean or a share are its own numbers; those of other measures are their derivatives by the images'
    weights. A distance computed of resampled rows itself would not do: it takes the repeated rows for a narrower law.
    """
    from scipy.stats import bootstrap

    rows = parts.detach().cpu().double().numpy()
    found = bootstrap(
        (rows,), np.mean, n_resamples=resamples, confidence_level=LEVEL, method="percentile", vectorized=True,
        batch=max(1, _MOST_DRAWS // len(rows)), rng=np.random.default_rng(_SEED),
    ).confidence_interval  # fmt: skip
    shift = value - float(rows.mean())
    return float(found.low) + shift, float(found.high) + shift


def intervals(values: Mapping[str, float], parts: Mapping[str, Tensor], resamples: int) -> dict[str, Interval]:
    """Return the interval of each value that has parts; none for no resamples."""
    named = parts if resamples else {}
    found = {name: interval(values[name], rows, resamples) for name, rows in named.items()}
    bounded = {"frechet_distance": 0.0}
    return {name: (max(low, bounded.get(name, low)), high) for name, (low, high) in found.items()}
