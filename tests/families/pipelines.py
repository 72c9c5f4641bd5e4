"""Tiny stock pipelines with random weights, one for each family; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flow_pipelines
import torch
import unnamed_pipelines
import vp_pipelines

BUILDERS: dict[str, Callable[[], Any]] = {
    **vp_pipelines.BUILDERS,
    **flow_pipelines.BUILDERS,
    **unnamed_pipelines.BUILDERS,
}


# Arguments of every call, where the pipeline's own defaults are too large for tests.
ARGUMENTS: dict[str, dict[str, Any]] = {**flow_pipelines.ARGUMENTS, **unnamed_pipelines.ARGUMENTS}


def build(name: str) -> Any:
    """Return the named pipeline with its own seeded random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(sorted(BUILDERS).index(name) + 1)
        pipeline = BUILDERS[name]()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
