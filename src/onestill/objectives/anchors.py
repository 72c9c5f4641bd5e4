"""Anchors: the ends of a few teacher trajectories, kept as exact regression targets beside the bootstrap.

A bootstrap target is only as good as the student's own signal at the time before it. An anchor is the teacher's
signal at t_min itself, from noise to end in some steps of the same solver: eq. (20), a row of eq. (10) whose one
step is the whole trajectory, so rho = 1. A pool of them is made once, from noise and conditions alone, and drawn from
all along the training.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from onestill.core.files import save_tensors
from onestill.core.tensors import Cond, to_device
from onestill.data.conditions import Conditions
from onestill.diffusion.trajectory import STEPS, solve, uniform_times
from onestill.teachers.base import Teacher


@dataclass(frozen=True)
class Anchors:
    """A pool of teacher trajectories' two ends.

    Attributes:
        eps: Noise, [N, *sample_shape].
        signal: The teacher's signal at t_min from that noise, [N, *sample_shape].
        chosen: Which conditions, N rows each: the choices in short, not what the networks are given, which for a
            text teacher is many times larger than the sample.
    """

    eps: Tensor
    signal: Tensor
    chosen: Cond

    def draw(self, num: int, generator: torch.Generator) -> Anchors:
        """Return `num` anchors of the pool, with replacement."""
        rows = torch.randint(len(self.eps), (num,), generator=generator)
        return Anchors(self.eps[rows], self.signal[rows], {name: value[rows] for name, value in self.chosen.items()})


@torch.no_grad()
def roll_out(
    teacher: Teacher,
    conditions: Conditions,
    num: int,
    *,
    first: int = 0,
    num_steps: int,
    solver: str,
    t_min: float,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
) -> Iterator[Anchors]:
    """Yield `num` anchors less the `first` ones in batches, made by `num_steps` steps of the guided and thresholded teacher.

    Args:
        teacher: The teacher as the bootstrap uses it.
        conditions: Where the conditions come from.
        num: How many in all.
        first: How many of them there are already, whole batches, after which `generator` is as they left it.
        num_steps: Solver steps from t_max to t_min, uniform in t.
        solver: One of `onestill.diffusion.trajectory.STEPS`.
        t_min: Cleanest target time.
        generator: Of the noise and the conditions.
        device: Where the teacher is.
        batch_size: Rows in one network call.
    """
    spec = teacher.spec
    times = uniform_times(spec.t_max, num_steps, t_min)
    for start in range(first, num, batch_size):
        rows = min(batch_size, num - start)
        eps = torch.randn(rows, *spec.sample_shape, generator=generator)
        chosen = conditions.choose(rows, generator)
        denoised = teacher.denoiser(to_device(conditions.rows(chosen), device))
        x_a = spec.trajectory.start(eps.to(device))
        yield Anchors(eps, solve(spec.trajectory, denoised, x_a, times, STEPS[solver]).cpu(), chosen)


def joined(batches: list[Anchors]) -> Anchors:
    """Return batches of anchors as one pool."""
    names = batches[0].chosen
    return Anchors(
        torch.cat([batch.eps for batch in batches]),
        torch.cat([batch.signal for batch in batches]),
        {name: torch.cat([batch.chosen[name] for batch in batches]) for name in names},
    )


def write_anchors(anchors: Anchors, generator: torch.Generator, path: Path, made_with: dict[str, object]) -> None:
    """Write a pool, whole or its first batches, with what made it, in one rename.

    Args:
        anchors: The pool.
        generator: As the last batch left it.
        path: The file.
        made_with: Everything that decides what a pool is.
    """
    tensors = {"eps": anchors.eps, "signal": anchors.signal, "generator": generator.get_state()}
    tensors |= {f"chosen.{name}": value.contiguous() for name, value in anchors.chosen.items()}
    partial = path.with_suffix(".partial")
    save_tensors(tensors, partial, metadata={"made_with": json.dumps(made_with, sort_keys=True)})
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_anchors(path: Path, made_with: dict[str, object], generator: torch.Generator) -> Anchors | None:
    """Return the pool in a file, or None if there is none that was made with the same settings.

    Args:
        path: The file.
        made_with: Everything that decides what a pool is.
        generator: Is left as the pool's last batch left the one that made it.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("made_with") != json.dumps(made_with, sort_keys=True):
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    except SafetensorError:  # not what was written: it is made again
        return None
    generator.set_state(tensors["generator"])
    chosen = {name.removeprefix("chosen."): value for name, value in tensors.items() if name.startswith("chosen.")}
    return Anchors(tensors["eps"], tensors["signal"], chosen)
