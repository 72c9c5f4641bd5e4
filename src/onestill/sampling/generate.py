"""Seeds to images: one seed is one image, for the student in one step and for the teacher in many."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from onestill.core.errors import SettingError
from onestill.core.tensors import Cond, as_times, noise, to_device
from onestill.diffusion.names import SolverName
from onestill.diffusion.trajectory import SOLVERS, uniform_times
from onestill.students.student import Student
from onestill.teachers.base import Teacher

Rows = dict[str, Any]
"""What images show, a row each: a tensor of labels, or a list of prompts (and of seeds, if a smaller picture is first)."""
Part = TypeVar("Part")
Generate = Callable[[Tensor, Cond], Tensor]
"""(eps [B, *sample_shape], cond) -> images [B, *sample_shape] in [-1, 1]."""


def student_generator(
    student: Student, *, t: float = 0.0, num_steps: int = 1, device: torch.device | str = "cpu"
) -> Generate:
    """Return generation by the student in K steps, eq. (28), one if not said; the last goes to the target time t.

    Several walk the student's `levels`: x_{k+1} is the state of eq. (5) at t_{k+1} of the signal from x_k at t_k. For
    students that are trained as a map between any two times; t = 0 is the finished image.
    """
    trajectory, levels = student.spec.trajectory, student.levels(num_steps)

    @torch.no_grad()
    def generate(eps: Tensor, cond: Cond) -> Tensor:
        x, cond = trajectory.start(eps.to(device)), to_device(cond, device)
        for r, s in pairwise(levels):
            a, to = as_times(r, len(x)), as_times(s, len(x))
            x = trajectory.state(student.teacher.bound(student(x, a, to, cond)), x, to, a)
        return student(x, None if num_steps == 1 else levels[-1], t, cond)

    return generate


def teacher_generator(
    teacher: Teacher, *, num_steps: int, solver: SolverName = "ddim", device: torch.device | str = "cpu"
) -> Generate:
    """Return generation by the teacher by `SOLVERS[solver]` on a uniform grid of times, as DDIM's "trailing" spacing."""
    times = uniform_times(teacher.spec.t_max, num_steps)

    @torch.no_grad()
    def generate(eps: Tensor, cond: Cond) -> Tensor:
        x_a = teacher.spec.trajectory.start(eps.to(device))
        return SOLVERS[solver](teacher.spec.trajectory, teacher.denoiser(to_device(cond, device)), x_a, times)

    return generate


def generate_images(
    generate: Generate,
    seeds: Sequence[int] | Tensor,
    shape: Sequence[int],
    cond: Rows,
    *,
    batch_size: int = 64,
    show_progress: bool = False,
) -> Tensor:
    """Return the images of `seeds`, [N, ...] on the CPU; row i of `cond` belongs to seeds[i].

    Args:
        generate: The generator.
        seeds: One for each image, or the noise itself, [N, *shape].
        shape: Shape of the noise of one image.
        cond: What they show, N rows.
        batch_size: Images in one network call; it changes no image beyond the last float digits.
        show_progress: Show a bar on a terminal.
    """
    batches = []
    for first in with_progress(range(0, len(seeds), batch_size), show_progress):
        part = slice(first, first + batch_size)
        eps = seeds[part] if isinstance(seeds, Tensor) else noise(seeds[part], shape)
        batches.append(generate(eps, {name: value[part] for name, value in cond.items()}).cpu())
    return torch.cat(batches) if batches else torch.empty(0, *shape)


def check_seeds(seeds: Sequence[int] | Tensor, shape: Sequence[int]) -> None:
    """Raise SettingError if these are no seeds, and no noise of images of this shape either."""
    if isinstance(seeds, Tensor):
        if tuple(seeds.shape[1:]) != tuple(shape) or not seeds.is_floating_point():
            why = f"is a tensor of shape {list(seeds.shape)}, and noise has [N, {', '.join(map(str, shape))}]"
            raise SettingError("seeds", why=why, todo="give that, or a list of whole numbers")
    elif len(seeds) and (min(seeds) < 0 or max(seeds) >= 2**63):
        raise SettingError("seeds", [min(seeds), max(seeds)], "must be from 0 up and below 2^63")


def with_progress(parts: Sequence[Part], show: bool, unit: str = "batch") -> Iterable[Part]:
    """Return the parts of some work; going through several shows a bar on a terminal, which is gone at the end."""
    hidden = not show or len(parts) < 2 or not sys.stderr.isatty()
    return tqdm(parts, disable=hidden, leave=False, desc="generating", unit=unit, dynamic_ncols=True, mininterval=0.5)
