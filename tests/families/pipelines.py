"""Tiny stock pipelines with random weights, one for each family; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import vp_pipelines

BUILDERS: dict[str, Callable[[], Any]] = {**vp_pipelines.BUILDERS}


def build(name: str) -> Any:
    """Return the named pipeline with its own seeded random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(sorted(BUILDERS).index(name) + 1)
        pipeline = BUILDERS[name]()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
