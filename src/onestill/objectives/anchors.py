"""Anchors: the ends of a few teacher trajectories, kept as exact regression targets beside the bootstrap, eq. (20).

A bootstrap target is only as good as the student's own signal at the time before it. An anchor is the teacher's
signal at t_min itself, from noise to end in some steps of the same solver: a row of eq. (10) whose one step is all the
trajectory, so rho = 1. A pool of them is made once, from noise and conditions alone, and drawn from throughout.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onestill.core.errors import FoundWarning, RunError, named
from onestill.core.reading import loading
from onestill.core.settings import MOST_STEPS, Settings, setting
from onestill.core.writing import writing
from onestill.diffusion.names import SolverName
from onestill.objectives.base import Batch, Context, Cost, Objective
from onestill.objectives.boot import BOOTSTRAP, OBJECTIVE, BootSettings, row_weights

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

    from onestill.core.tensors import Cond

POOL_SEED = 2**31
WRITE_SECONDS = 300.0


class AnchorSettings(Settings):
    """How many anchors, and how they are made."""

    anchor_fraction: float = setting(
        0.0,
        OBJECTIVE,
        "Share of the batch that is regressed on whole teacher trajectories; 0 is BOOT alone.",
        ge=0,
        lt=1,
    )
    num_anchors: int = setting(
        10_000, OBJECTIVE, "Teacher trajectories made for that before the first step.", ge=1, le=MOST_STEPS
    )
    num_anchor_steps: int = setting(12, OBJECTIVE, "Solver steps of each.", ge=1, le=1000)
    anchor_solver: SolverName | None = setting(
        None, OBJECTIVE, f"Solver of those trajectories; {named('solver')} if not given."
    )


class _Both(AnchorSettings, BootSettings):
    """What anchors read: they are weighted as the bootstrap's rows, and made by its step if by nothing else."""


class Anchors(Objective[_Both]):
    """Rows from x_a to t_min whose target is the teacher's own signal there, eq. (20); in the mean of the bootstrap."""

    name = "anchors"
    unit = "anchor"
    Settings = AnchorSettings

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.pool: Pool | None = None

    @classmethod
    def num_rows(cls, settings: Any, batch_size: int) -> int:
        return max(1, round(settings.anchor_fraction * batch_size)) if settings.anchor_fraction > 0 else 0

    @classmethod
    def cost(cls, settings: Any, batch_size: int) -> Cost:
        from onestill.diffusion.trajectory import CALLS_PER_STEP

        calls = settings.num_anchor_steps * CALLS_PER_STEP[settings.anchor_solver or settings.solver]
        return Cost(pool=settings.num_anchors, teacher_per_item=calls, samples_per_item=2)

    def prepare(self) -> Generator[int, None, None]:
        """Make the pool, going on with what an earlier part of this run made; yield how many came each time.

        A pool of its own for every process, from a generator of its own, so that a resumed run has the same one. It is
        written when it is whole, when the iterator is closed, and every few minutes.
        """
        import torch

        context, rank = self.context, self.context.process_index
        path = context.folder / f"anchors-{rank}.safetensors"
        generator = torch.Generator().manual_seed(context.seed + POOL_SEED + rank)
        num = -(-self.settings.num_anchors // context.num_processes)
        found = self._read(path, num, generator)
        batches = [] if found is None else [found]
        made = written = 0 if found is None else len(found.eps)
        last = torch.Generator()  # as the last whole batch left `generator`, which the next one may have drawn from
        last.set_state(generator.get_state())
        at, pause = time.monotonic(), WRITE_SECONDS
        try:
            if made:
                yield made
            for batch in self._roll_out(made, num, generator):
                batches.append(batch)
                made += len(batch.eps)
                last.set_state(generator.get_state())
                if (started := time.monotonic()) - at > pause:
                    batches = [joined(batches)]
                    write_pool(batches[0], last, path, context.identity)
                    written, at = made, time.monotonic()
                    pause = max(pause, 20 * (at - started))  # a large pool is written less often
                yield len(batch.eps)
        finally:
            if written < made:
                batches = [joined(batches)]
                write_pool(batches[0], last, path, context.identity)
        self.pool = joined(batches)
        if not self._is_begun_with(self.pool):
            why = f"{path} is not what this run was begun with, and what is made again here is not the same"
            raise RunError(f"{why}: go on where it was made, or distil again into another folder")
        self.pool_hash = self.pool.hash(context.identity)
        context.pools[self.name] = self.pool

    def _is_begun_with(self, pool: Pool) -> bool:
        """Return whether a pool is the one that the run was begun with; one of another identity is another."""
        made, known = pool.hash(self.context.identity), self.pool_hash
        return made.partition("-")[0] != known.partition("-")[0] or made == known

    def _read(self, path: Path, num: int, generator: torch.Generator) -> Pool | None:
        """Return what the run's file has of the pool, None if it is to be made; what is damaged is said."""
        shape, state = self.context.teacher.spec.sample_shape, generator.get_state()
        try:
            found = read_pool(path, self.context.identity, generator)
            if found is not None and not found.fits(num, shape):
                raise ValueError(f"{path} holds no anchors of this teacher")
            if found is not None and len(found.eps) == num and not self._is_begun_with(found):
                raise ValueError(f"{path} is not what this run was begun with")
        except ValueError as error:
            warnings.warn(f"{error}; it is made again", FoundWarning, stacklevel=2)
            generator.set_state(state)
            return None
        return found

    def _roll_out(self, first: int, num: int, generator: torch.Generator) -> Iterator[Pool]:
        """Yield `num` anchors less the `first` ones, which are whole batches and have left the generator as it is."""
        import torch

        from onestill.core.tensors import to_device
        from onestill.diffusion.trajectory import SOLVERS, uniform_times

        context, settings, spec = self.context, self.settings, self.context.teacher.spec
        times = uniform_times(spec.t_max, settings.num_anchor_steps, settings.t_min)
        solve = SOLVERS[settings.anchor_solver or settings.solver]
        for start in range(first, num, context.batch_size):
            rows = min(context.batch_size, num - start)
            eps = torch.randn(rows, *spec.sample_shape, generator=generator)
            chosen = context.conditions.choose(rows, generator)
            with torch.no_grad(), context.autocast():
                denoised = context.teacher.denoiser(to_device(context.conditions.rows(chosen), context.device))
                x_a = spec.trajectory.start(eps.to(context.device))
                signal = solve(spec.trajectory, denoised, x_a, times)
            yield Pool(eps, signal.cpu(), chosen)

    def batch(self, num: int) -> Batch:
        import torch

        from onestill.core.tensors import to_device

        assert self.pool is not None, "prepare has run to its end"
        context, settings = self.context, self.settings
        drawn, trajectory = self.pool.draw(num, context.generator), context.teacher.spec.trajectory
        t = torch.full((num,), trajectory.t_max, dtype=torch.float64)
        s = torch.full((num,), settings.t_min, dtype=torch.float64)
        weights = row_weights(settings.bootstrap_weight, trajectory, t, s).float()
        cond = to_device(context.conditions.rows(drawn.chosen), context.device)
        x_a = trajectory.start(drawn.eps.to(context.device))
        return Batch(x_a, s, cond, drawn.signal.to(context.device), weights, torch.full((num,), BOOTSTRAP))


@dataclass(frozen=True)
class Pool:
    """Teacher trajectories' two ends.

    Attributes:
        eps: Noise, [N, *sample_shape].
        signal: The teacher's signal at t_min from that noise, [N, *sample_shape].
        chosen: Which conditions, N rows each: choices, since what the networks are given may be far larger.
    """

    eps: Tensor
    signal: Tensor
    chosen: Cond

    def hash(self, identity: Mapping[str, object]) -> str:
        """Return a hash of what it was made with, a dash, and a hash of all of it."""
        from onestill.core.files import hash_of

        made_with = hash_of({}, {"made_with": json.dumps(identity, sort_keys=True)})
        return f"{made_with[:16]}-{hash_of(self.tensors(), {})}"

    def fits(self, most: int, shape: tuple[int, ...]) -> bool:
        """Return whether these are at most so many anchors, all parts alike, of samples of this shape."""
        parts, num = self.tensors(), len(self.eps)
        alike = all(len(value) == num for value in parts.values())
        return num <= most and alike and self.eps.shape == self.signal.shape == (num, *shape)

    def tensors(self) -> dict[str, Tensor]:
        """Return all of it, by the names in its file."""
        chosen = {f"chosen.{name}": value.contiguous() for name, value in self.chosen.items()}
        return {"eps": self.eps, "signal": self.signal, **chosen}

    def draw(self, num: int, generator: torch.Generator) -> Pool:
        """Return `num` anchors of the pool, with replacement."""
        import torch

        rows = torch.randint(len(self.eps), (num,), generator=generator)
        return Pool(self.eps[rows], self.signal[rows], {name: value[rows] for name, value in self.chosen.items()})


def joined(batches: list[Pool]) -> Pool:
    """Return batches of anchors as one pool."""
    import torch

    eps, signal = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("eps", "signal"))
    return Pool(eps, signal, {name: torch.cat([b.chosen[name] for b in batches]) for name in batches[0].chosen})


def write_pool(pool: Pool, generator: torch.Generator, path: Path, identity: Mapping[str, object]) -> None:
    """Write a pool, whole or its first batches, with the generator as the last batch left it, in one rename."""
    from onestill.core.files import save_hashed

    partial, said = path.with_suffix(".partial"), {"made_with": json.dumps(identity, sort_keys=True)}
    try:
        with writing(path):
            save_hashed({**pool.tensors(), "generator": generator.get_state()}, partial, said)
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_pool(path: Path, identity: Mapping[str, object], generator: torch.Generator) -> Pool | None:
    """Return the pool in a file, or None if none of this identity is there; the generator goes on where it ended.

    Raises:
        ValueError: If the file is not what was written.
    """
    from onestill.core.files import read_hashed

    if not path.exists():
        return None
    tensors, said = read_hashed(path)
    if said.get("made_with") != json.dumps(identity, sort_keys=True):
        return None
    with loading(str(path)):
        generator.set_state(tensors["generator"])
        chosen = {name.removeprefix("chosen."): value for name, value in tensors.items() if name.startswith("chosen.")}
        return Pool(tensors["eps"], tensors["signal"], chosen)
