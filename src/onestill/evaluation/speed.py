"""Speed: fair comparisons on a machine that is doing other things as well."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median

import torch

from onestill.core.devices import seconds_of


def compare(
    candidates: Mapping[str, Callable[[], object]],
    *,
    device: str | torch.device = "cpu",
    repeats: int = 10,
    warmup: int = 1,
) -> dict[str, float]:
    """Return the median seconds of each candidate over `repeats` rounds, after `warmup` others; `device` is waited for.

    In a round each candidate runs once, and each round starts with another one, so that whatever else the machine does
    falls on all of them alike: ratios hold within one call of this function.
    """
    if not candidates:
        raise ValueError("compare needs at least one candidate")
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be at least 1 and warmup not negative, got {repeats} and {warmup}")
    names, place = list(candidates), torch.device(device)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(warmup):
        for name in names:
            candidates[name]()
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(seconds_of(candidates[name], place))
    return {name: median(values) for name, values in seconds.items()}
