"""Anchors: trajectories of the teacher, kept as exact regression targets, eqs. (20) and (35).

A bootstrap target is only as good as the student's own signal at the time before it. An anchor is the teacher's
signal at t_min itself, from noise to end in some steps of a solver: a row of eq. (10) whose one step is all the
trajectory, so rho = 1. Two states on the way are kept as well: rows between any two points of a path make a student of
several steps. A pool of them is made once, from noise and conditions alone, and drawn from throughout.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self

from pydantic import model_validator

from onestill.core.errors import FoundWarning, RunError, SettingError, named
from onestill.core.settings import MOST_STEPS, Settings, setting
from onestill.diffusion.names import SolverName
from onestill.objectives.base import Batch, Context, Cost, Objective
from onestill.objectives.boot import BOOTSTRAP, OBJECTIVE, BootSettings, bounded_sigma, num_boundary_rows, row_weights
from onestill.objectives.pool import STOPS, Pool, joined, read_pool, write_pool

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

    from onestill.diffusion.trajectory import Denoiser
    from onestill.teachers.base import Teacher
    from onestill.teachers.teacher_spec import TeacherSpec

POOL_SEED = 2**31
WRITE_SECONDS = 300.0
WAYS = ((0, 1), (0, 2), (1, 2), (1, 3), (2, 3))
"""From where to where rows on the way go: 0 is the start, 1 and 2 are the stops, 3 is the end."""
USES = 16
"""How often each anchor is drawn where their number is not given: a pool then takes about a fifth of a run."""


class AnchorSettings(Settings):
    """How many anchors, and how they are made."""

    anchor_fraction: float = setting(
        1.0,
        OBJECTIVE,
        "Share of the rows that the corrector, the flow map and the boundary leave that is regressed on whole teacher "
        "trajectories, in place of the bootstrap; 0 is none.",
        ge=0,
        le=1,
    )
    num_anchors: int = setting(
        20_000,
        OBJECTIVE,
        f"Teacher trajectories made for that before the first step; if not given, each is drawn about {USES} times.",
        ge=1,
        le=MOST_STEPS,
    )
    num_anchor_steps: int = setting(
        16,
        OBJECTIVE,
        "Solver steps of each, the last of which is cut in two. Students draw well between their times only: a multiple of 8 "
        "is for 1, 2, 4 and 8 steps.",
        ge=1,
        le=1000,
    )
    anchor_path_fraction: float = setting(
        0.5,
        OBJECTIVE,
        "Share of those rows that begin or end on the way of a trajectory, for students of several steps.",
        ge=0,
        le=1,
    )
    anchor_solver: SolverName = setting("dpmsolver++", OBJECTIVE, "Solver of those trajectories.")

    @model_validator(mode="after")
    def _has_room_for_stops(self) -> Self:
        if self.anchor_fraction > 0 and self.anchor_path_fraction > 0 and self.num_anchor_steps <= STOPS:
            why = f"leaves no {STOPS} stops on the way of a trajectory, where rows of {named('anchor_path_fraction')} begin"
            raise SettingError(
                "num_anchor_steps",
                self.num_anchor_steps,
                why,
                f"give at least {STOPS + 1}, or {named('anchor_path_fraction')} 0",
            )
        return self


def usual_anchors(num_drawn: float) -> int:
    """Return how many anchors a run makes that draws so many rows of them and names no number."""
    return min(max(1, round(num_drawn / USES)), MOST_STEPS)


class _Both(AnchorSettings, BootSettings):
    """What anchors read: they are weighted as the bootstrap's rows, and made by its step if by nothing else."""


class Anchors(Objective[_Both]):
    """Rows whose target is the teacher's own signal, from x_a to t_min, eq. (20), or between two points on its way, eq. (35).

    They enter the mean of the bootstrap; those on the way come first.
    """

    name = "anchors"
    turn = 1
    unit = "anchor"
    Settings = AnchorSettings

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.pool: Pool | None = None

    @classmethod
    def num_rows(cls, settings: Any, batch_size: int, left: int) -> int:
        if settings.anchor_fraction == 0:
            return 0
        most = left - num_boundary_rows(settings, batch_size)
        return max(0, min(max(1, round(settings.anchor_fraction * left)), most))

    @classmethod
    def is_map(cls, settings: Any) -> bool:
        return bool(settings.anchor_fraction > 0 and settings.anchor_path_fraction > 0)

    @classmethod
    def is_off_its_times(cls, settings: Any, num_steps: int) -> bool:
        """Return whether a student of K steps is drawn from a level that rows on the way neither begin nor end at."""
        return cls.is_map(settings) and settings.num_anchor_steps % num_steps > 0

    @classmethod
    def in_words(cls, settings: Any) -> str:
        made = f"{settings.num_anchors:,} trajectories of {settings.num_anchor_steps} {settings.anchor_solver} steps"
        return f"{made}, {settings.anchor_path_fraction:.0%} of their rows on the way"

    @classmethod
    def check(cls, settings: Any, teacher: Teacher) -> None:
        from onestill.diffusion.trajectory import refined_times

        spec, num = teacher.spec, settings.num_anchor_steps
        times = refined_times(spec.process, spec.t_max, num, settings.t_min)
        if settings.anchor_path_fraction and len(inner_times(times, spec)) < STOPS:
            why = f"leaves no {STOPS} stops on the way that are times of this teacher, whose cleanest is {spec.process.t_min:.3g}"
            raise SettingError("num_anchor_steps", num, why, f"give others, or {named('anchor_path_fraction')} 0")

    @classmethod
    def cost(cls, settings: Any, batch_size: int) -> Cost:
        from onestill.diffusion.trajectory import CALLS_PER_STEP

        calls = (settings.num_anchor_steps + (settings.num_anchor_steps > 1)) * CALLS_PER_STEP[settings.anchor_solver]
        kept = 2 + STOPS * (settings.anchor_path_fraction > 0)
        return Cost(pool=settings.num_anchors, teacher_per_item=calls, samples_per_item=kept)

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
        from onestill.diffusion.trajectory import SOLVERS, refined_times

        context, settings, spec = self.context, self.settings, self.context.teacher.spec
        times = refined_times(spec.process, spec.t_max, settings.num_anchor_steps, settings.t_min)
        inner, solve = inner_times(times, spec), SOLVERS[settings.anchor_solver]
        for start in range(first, num, context.batch_size):
            rows = min(context.batch_size, num - start)
            eps = torch.randn(rows, *spec.sample_shape, generator=generator)
            chosen = context.conditions.choose(rows, generator)
            stops = draw_stops(rows, inner, generator) if settings.anchor_path_fraction > 0 else None
            with torch.no_grad(), context.autocast():
                denoised = context.teacher.denoiser(to_device(context.conditions.rows(chosen), context.device))
                x_a = spec.trajectory.start(eps.to(context.device))
                seen = None if stops is None else Passing(denoised, stops)
                signal = solve(spec.trajectory, denoised if seen is None else seen, x_a, times)
            yield Pool(eps, signal.cpu(), chosen, {} if seen is None else seen.path())

    def batch(self, num: int) -> Batch:
        import torch

        from onestill.core.tensors import to_device

        assert self.pool is not None, "prepare has run to its end"
        context, settings = self.context, self.settings
        drawn, trajectory = self.pool.draw(num, context.generator), context.teacher.spec.trajectory
        t = torch.full((num,), trajectory.t_max, dtype=torch.float64)
        s = torch.full((num,), settings.t_min, dtype=torch.float64)
        cond = to_device(context.conditions.rows(drawn.chosen), context.device)
        x, target = trajectory.start(drawn.eps.to(context.device)), drawn.signal.to(context.device)
        on_the_way = path_rows(settings, num)
        if on_the_way:
            some = slice(on_the_way)
            way = torch.tensor(WAYS)[torch.randint(len(WAYS), (on_the_way,), generator=context.generator)]
            begin, end, row = way[:, 0], way[:, 1], torch.arange(on_the_way)
            times = torch.cat([t[:, None], drawn.path["stops"], s[:, None]], 1)[some]
            stops, ends = drawn.path["states"][some].to(target), trajectory.state(target, x, s)[some]
            points = torch.stack([x[some], *stops.unbind(1), ends], 1)
            x[some], x_s = points[row, begin], points[row, end]
            t[some], s[some] = times[row, begin], times[row, end]
            target[some] = trajectory.signal(x_s, x[some], s[some], t[some])
        # An error of y from level t on is one of f there: as many times larger in the velocity.
        noisy = torch.where(t < trajectory.t_max, bounded_sigma(trajectory, t), 1.0)
        weights = (
            row_weights(settings.bootstrap_weight, trajectory, torch.full_like(t, trajectory.t_max), s) * noisy**-2
        )
        mean, from_noise = torch.full((num,), BOOTSTRAP), t == trajectory.t_max
        return Batch(x, s, cond, target, weights.float(), mean, r=t if on_the_way else None, is_profiled=from_noise)


class Passing:
    """A denoiser that keeps the states in which it is asked at some times, [B, S] float64: a solver's own times."""

    def __init__(self, denoised: Denoiser, stops: Tensor) -> None:
        self.denoised, self.stops = denoised, stops
        self.states: list[Tensor | None] = [None] * stops.shape[1]

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the prediction for states x_t [B, ...] at times t [B]."""
        import torch

        from onestill.core.tensors import broadcast

        for i, kept in enumerate(self.states):
            here = broadcast(self.stops[:, i] == t, x_t).bool()
            self.states[i] = torch.where(here, x_t, torch.zeros_like(x_t) if kept is None else kept)
        return self.denoised(x_t, t)

    def path(self) -> dict[str, Tensor]:
        """Return the times, [B, S], and the states, [B, S, ...], on the CPU."""
        import torch

        return {"stops": self.stops, "states": torch.stack([kept for kept in self.states if kept is not None], 1).cpu()}


def path_rows(settings: Any, num: int) -> int:
    """Return how many of a batch's rows of anchors begin or end on the way."""
    share = settings.anchor_path_fraction
    return max(1, round(share * num)) if share > 0 else 0


def inner_times(times: Sequence[float], spec: TeacherSpec) -> list[float]:
    """Return those of a trajectory's falling times that a row may begin at: no end, none below the network's, no cut.

    From the cut of eq. (36) no student is drawn, and the weight of a row from there would be hundreds.
    """
    least = max(spec.process.t_min, times[-1] + 0.9 * (times[0] - times[-1]) / (len(times) - 1))
    return [t for t in times[1:-1] if t >= least]


def draw_stops(num: int, inner: Sequence[float], generator: torch.Generator) -> Tensor:
    """Return `STOPS` different times for each of `num` trajectories, falling, [num, STOPS] float64."""
    import torch

    order = torch.rand(num, len(inner), generator=generator).argsort(1)[:, :STOPS].sort(1).values
    return torch.tensor(inner, dtype=torch.float64)[order]
