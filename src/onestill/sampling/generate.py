"""Seeds to images: one seed is one image, for the student in one step and for the teacher in many."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from onestill.core.tensors import Cond, noise, to_device
from onestill.diffusion.trajectory import STEPS, solve, uniform_times
from onestill.students.student import Student
from onestill.teachers.base import Teacher

Rows = dict[str, Any]
"""What images show, one row for each: labels as a tensor, or prompts as a list of strings. Where a smaller
picture is drawn first, their seeds too."""
Part = TypeVar("Part")
Generate = Callable[[Tensor, Cond], Tensor]
"""(eps [B, *sample_shape], cond) -> images [B, *sample_shape] in [-1, 1]."""


def student_generator(student: Student, *, t: float = 0.0, device: torch.device | str = "cpu") -> Generate:
    """Return one-step generation by the student, at the target time t (0 is the finished image)."""

    @torch.no_grad()
    def generate(eps: Tensor, cond: Cond) -> Tensor:
        x_a = student.spec.trajectory.start(eps.to(device))
        return student(x_a, None, t, to_device(cond, device))

    return generate


def teacher_generator(
    teacher: Teacher, *, num_steps: int, solver: str = "ddim", device: torch.device | str = "cpu"
) -> Generate:
    """Return multi-step generation by the teacher on a uniform grid of times, as DDIM's "trailing" spacing.

    Args:
        teacher: The teacher, guided and thresholded as wanted.
        num_steps: Steps; each costs `CALLS_PER_STEP[solver] * teacher.evaluations` network evaluations.
        solver: One of `onestill.diffusion.trajectory.STEPS`.
        device: Where the teacher is.
    """
    times = uniform_times(teacher.spec.t_max, num_steps)

    @torch.no_grad()
    def generate(eps: Tensor, cond: Cond) -> Tensor:
        x_a = teacher.spec.trajectory.start(eps.to(device))
        return solve(teacher.spec.trajectory, teacher.denoiser(to_device(cond, device)), x_a, times, STEPS[solver])

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
    """Return the images of `seeds`, one row each, on the CPU; row i of `cond` belongs to seeds[i].

    Args:
        generate: The generator.
        seeds: One for each image, or the noise itself, [N, *shape].
        shape: Shape of the noise of one image.
        cond: Conditions with as many rows as seeds.
        batch_size: Images in one network call; it changes no image beyond the last float digits.
        show_progress: Show a bar on standard error, as `with_progress` does.
    """
    batches = [
        generate(
            _noise_of(seeds[i : i + batch_size], shape),
            {name: value[i : i + batch_size] for name, value in cond.items()},
        ).cpu()
        for i in with_progress(range(0, len(seeds), batch_size), show_progress)
    ]
    return torch.cat(batches) if batches else torch.empty(0, *shape)


def with_progress(parts: Sequence[Part], show: bool, unit: str = "batch") -> Iterable[Part]:
    """Return the parts of some work; going through several shows a bar on a terminal, which is gone at the end."""
    hidden = not show or len(parts) < 2 or not sys.stderr.isatty()
    return tqdm(parts, disable=hidden, leave=False, desc="generating", unit=unit, dynamic_ncols=True, mininterval=0.5)


def _noise_of(seeds: Sequence[int] | Tensor, shape: Sequence[int]) -> Tensor:
    return seeds if isinstance(seeds, Tensor) else noise(seeds, shape)
