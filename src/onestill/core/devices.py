"""Devices: waiting for what they have been told to do."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a call takes, an accelerator's work included: its calls return before that is done."""
    _wait(device)
    started = perf_counter()
    call()
    _wait(device)
    # The clock's own tick, so that a rate is never a division by zero.
    return max(perf_counter() - started, 1e-9)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
