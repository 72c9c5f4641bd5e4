"""How near the ends of anchors are to the teacher's ODE, and how good, on uniform times and with the last step cut, eq. (36).

    python benchmarks/anchor_times.py --teachers_dir runs/teachers --teachers digits ddpm16 flow mixture

The truth is the same solver in 150 uniform steps. RMS in units of a sample; the share of the truth's variance; and the
Fréchet distance to real pictures (of the mixture, 1000 x the energy distance to its data), as `benchmarks/recipes.py`
measures it. One thread.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from onestill.core.tensors import Cond
from onestill.diffusion.trajectory import dpm_solve, refined_times, uniform_times
from onestill.sampling.generate import generate_images
from onestill.teachers.base import Teacher
from recipes import SHARES, Pictures, Points, bench_of

FINE, STEPS = 150, (12, 16, 24, 32)


def generator(teacher: Teacher, times: Sequence[float]) -> Callable[[Tensor, Cond], Tensor]:
    """Return generation by DPM-Solver++(2M) along the times."""
    trajectory = teacher.spec.trajectory

    @torch.no_grad()
    def generate(eps: Tensor, cond: Cond) -> Tensor:
        return dpm_solve(trajectory, teacher.denoiser(cond), trajectory.start(eps), times)

    return generate


def samples(teacher: Teacher, scores: Pictures | Points, times: Sequence[float]) -> Tensor:
    """Return the samples that the bench is scored on, by those times."""
    generate = generator(teacher, times)
    if isinstance(scores, Points):
        return generate(scores.eps, {})
    return generate_images(generate, range(scores.num), teacher.spec.sample_shape, scores.cond, batch_size=64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers_dir", type=Path, default=Path("runs/teachers"))
    parser.add_argument("--output_dir", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--teachers", nargs="+", choices=list(SHARES), default=["digits"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| teacher | times | calls | RMS to the ODE | variance | distance |\n|---|---|---|---|---|---|")
    for name in args.teachers:
        bench = bench_of(name, args)
        teacher, scores = bench.opened(), bench.scores()
        spec = teacher.spec
        grids = {("uniform", FINE): uniform_times(spec.t_max, FINE)}
        for num in STEPS:
            grids["uniform", num] = uniform_times(spec.t_max, num)
            grids["cut", num] = refined_times(spec.process, spec.t_max, num - 1)  # a call more
        truth: Tensor | None = None
        for (kind, num), times in grids.items():
            found = samples(teacher, scores, times)
            truth = found if truth is None else truth
            rms, share = float((found - truth).square().mean().sqrt()), float(found.var(0).mean() / truth.var(0).mean())
            print(
                f"| {name} | {kind} | {num} | {rms:.4f} | {share:.3f} | {scores.distance(found.clamp(-1, 1) if isinstance(scores, Pictures) else found):.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
