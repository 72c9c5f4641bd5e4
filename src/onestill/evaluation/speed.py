"""Speed: images per second, and fair comparisons on a machine that is doing other things as well."""

from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter

import torch


def images_per_second(
    sample: Callable[[int], object], batch_size: int, *, min_seconds: float = 1.0, warmup: int = 1
) -> float:
    """Return how many images per second `sample` makes at one batch size.

    Calls are timed one by one, each waited for: at batch 1 this is the latency that somebody at a web page
    feels, and not the throughput of a filled queue.

    Args:
        sample: `sample(batch_size)` makes that many images.
        batch_size: Images per call.
        min_seconds: Calls are repeated until this much time has passed; there is at least one.
        warmup: Calls before the clock starts (allocation, compilation).

    Returns:
        Images per second.

    Raises:
        ValueError: If `batch_size` is below 1, or `min_seconds` or `warmup` is negative.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if min_seconds < 0 or warmup < 0:
        raise ValueError(f"min_seconds and warmup must not be negative, got {min_seconds} and {warmup}")
    for _ in range(warmup):
        sample(batch_size)
    num_calls, elapsed = 0, 0.0
    while not num_calls or elapsed < min_seconds:
        elapsed += _seconds(lambda: sample(batch_size))
        num_calls += 1
    return batch_size * num_calls / elapsed


def compare(candidates: Mapping[str, Callable[[], object]], *, repeats: int = 10, warmup: int = 1) -> dict[str, float]:
    """Return the median seconds of each candidate, timed in turns.

    Round after round each candidate runs once, and each round starts with another one, so that whatever else
    the machine does falls on all of them alike: ratios hold within one call of this function.

    Args:
        candidates: What to time, by name.
        repeats: Rounds.
        warmup: Rounds before the clock starts.

    Returns:
        Seconds per call, in the order of `candidates`.

    Raises:
        ValueError: If there is no candidate, `repeats` is below 1 or `warmup` is negative.
    """
    if not candidates:
        raise ValueError("compare needs at least one candidate")
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be at least 1 and warmup not negative, got {repeats} and {warmup}")
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(warmup):
        for name in names:
            candidates[name]()
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(_seconds(candidates[name]))
    return {name: median(values) for name, values in seconds.items()}


def _seconds(call: Callable[[], object]) -> float:
    _synchronize()
    started = perf_counter()
    call()
    _synchronize()
    # The clock's own tick, so that a rate is never a division by zero.
    return max(perf_counter() - started, 1e-9)


def _synchronize() -> None:
    """Wait for the accelerator: its calls return before their work is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()
