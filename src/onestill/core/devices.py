"""Devices: which there are, and waiting for what they have been told to do."""

from __future__ import annotations

import platform
from collections.abc import Callable
from time import perf_counter

import torch

from onestill.core.errors import SettingError


def resolve_device(name: str) -> torch.device:
    """Return the device that a name stands for: auto, cpu, cuda, cuda:N or mps; refuse what is not here."""
    if name == "auto":
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(best)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SettingError("device", name, "unknown device", "use auto, cpu, cuda, cuda:N or mps") from None
    usable = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not usable.get(device.type, False):
        why = f"is not available on this machine (CUDA devices: {torch.cuda.device_count()})"
        raise SettingError("device", name, why, "use auto or cpu")
    return device


def hardware(device: torch.device) -> str:
    """Return what a device is, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return f"{device.type} on {platform.machine()}"
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' if threads != 1 else ''}"


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
