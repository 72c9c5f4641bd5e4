"""A student of several steps on the 2-D mixture: RMS to its teacher's exact map and energy distance to the data.

The teacher is a small network fitted to the exact prediction first, and the start of every student, as in any run.

python benchmarks/flow_map.py --seeds 3                    # the table
python benchmarks/flow_map.py --all --seeds 2              # with what was tried beside the defaults
python benchmarks/flow_map.py --prediction_type sample --only identity
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from onestill.diffusion.prediction import preconditioning
from onestill.diffusion.process import CosineVP
from onestill.diffusion.trajectory import midpoint_step, solve, uniform_times
from onestill.runs.build import build_run
from onestill.runs.distill import carry_out
from onestill.runs.folder import RunFolder
from onestill.runs.load import restore_student
from onestill.sampling.generate import student_generator, teacher_generator
from onestill.students.student import Student
from onestill.teachers.base import Teacher
from onestill.teachers.module import module_teacher
from onestill.training.config import make_config
from toys import PointNetwork, mixture

PROCESS, NUM_TEST, STEPS = CosineVP(), 4000, (1, 2, 4, 8)
BASE: dict[str, Any] = {
    "max_train_steps": 600, "train_batch_size": 256, "learning_rate": 2e-3, "lr_scheduler": "cosine",
    "lr_warmup_steps": 50, "checkpointing_steps": 10**6, "validation_steps": 10**6, "logging_steps": 10**6,
    "num_teacher_steps": 1, "device": "cpu", "bootstrap_weight": "inverse_rho_sigma", "boundary_weight": 1.0,
    "anchor_fraction": 0.0, "corrector_fraction": 0.0,
}  # fmt: skip
HALF: dict[str, Any] = {"flow_map_fraction": 0.5}
VARIANTS: dict[str, dict[str, Any]] = {
    "no flow map": {},
    "flow map, half of the batch": HALF,
}
MORE: dict[str, dict[str, Any]] = {
    "identity lagrangian": {**HALF, "flow_map_identity": "lagrangian"},
    "identity eulerian": {**HALF, "flow_map_identity": "eulerian"},
    "states path": {**HALF, "flow_map_states": "path"},
    "velocity weight, no flow map": {"bootstrap_weight": "velocity"},
    "velocity weight": {**HALF, "bootstrap_weight": "velocity"},
    "three quarters": {"flow_map_fraction": 0.75},
    "diagonal a quarter": {**HALF, "flow_map_diagonal": 0.25},
    "diagonal a quarter, half to the end": {**HALF, "flow_map_diagonal": 0.25, "flow_map_to_end": 0.5},
    "factor 0.2": {**HALF, "flow_map_weight": 0.2},
    "factor 5": {**HALF, "flow_map_weight": 5.0},
    "delta 1/100": {**HALF, "flow_map_delta": 0.01},
    "k = 1/2": {**HALF, "robust_exponent": 0.5},
    "k = 1": {**HALF, "robust_exponent": 1.0},
}


def fitted_teacher(prediction_type: str, num_steps: int = 2500) -> Teacher:
    """Return a network that has learned the mixture's exact prediction from points of the mixture."""
    exact, generator = mixture(), torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    network = PointNetwork(2)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(num_steps):
        t = torch.rand(512, generator=generator, dtype=torch.float64).clamp(min=1e-3)
        levels = PROCESS.alpha_sigma(t)
        alpha, sigma, c_skip, c_out = (
            level.float()[:, None] for level in (*levels, *preconditioning(prediction_type, *levels, 0.5)[1:])
        )
        x = alpha * exact.draw(512, generator) + sigma * torch.randn(512, 2, generator=generator)
        wanted = (exact.denoised(x, t, {}) - c_skip * x) / c_out
        optimizer.zero_grad()
        (network(x, PROCESS.net_time(t).float()) - wanted).square().mean().backward()
        optimizer.step()
        schedule.step()
    return module_teacher(network, PROCESS, prediction_type, (2,))


class Measure:
    """(RMS to the teacher's exact map, 1000 times the energy distance to data) of samples from fixed noise."""

    def __init__(self, teacher: Teacher) -> None:
        self.eps = torch.randn(NUM_TEST, 2, generator=torch.Generator().manual_seed(10**6))
        self.data = mixture().draw(NUM_TEST, torch.Generator().manual_seed(10**6 + 1))
        with torch.no_grad():
            times = uniform_times(1.0, 400)
            self.ends = solve(teacher.spec.trajectory, teacher.denoiser({}), self.eps, times, midpoint_step)

    def __call__(self, x: Tensor) -> tuple[float, float]:
        energy = 2 * torch.cdist(x, self.data).mean() - torch.cdist(x, x).mean()
        energy -= torch.cdist(self.data, self.data).mean()
        return math.sqrt((x - self.ends).square().mean()), 1000 * float(energy)


def distilled(teacher: Teacher, **settings: Any) -> Student:
    """Return the student of a run, with averaged weights."""
    with tempfile.TemporaryDirectory() as folder:
        config = make_config({"teacher": "fitted", "output_dir": f"{folder}/run", **BASE, **settings})
        carry_out(build_run(config, teacher), show_progress=False)
        return restore_student(RunFolder(config.output_dir), teacher)


def row(name: str, found: list[dict[int, tuple[float, float]]], seconds: float) -> str:
    """Return a line of the table: mean and, of several runs, standard deviation, by number of steps."""
    cells = []
    for num in STEPS:
        runs = [run[num] for run in found if num in run]
        spread = [f" ± {stdev(values):.4g}" if len(runs) > 1 else "" for values in zip(*runs, strict=True)]
        means = [mean(values) for values in zip(*runs, strict=True)]
        cells.append(f"{means[0]:.3f}{spread[0][:8]}, {means[1]:.2f}{spread[1][:7]}" if runs else "–")
    return f"| {name} | {' | '.join(cells)} | {seconds:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--only", help="variants whose name has this in it")
    parser.add_argument("--prediction_type", default="v_prediction")
    parser.add_argument("--max_train_steps", type=int, default=BASE["max_train_steps"])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    teacher = fitted_teacher(args.prediction_type)
    measure = Measure(teacher)
    print(f"| | {' | '.join(f'{k} steps: RMS, energy × 1000' for k in STEPS)} | CPU s |")
    print("|---" * (len(STEPS) + 2) + "|")
    print(row("the teacher's exact map", [{8: measure(measure.ends)}], 0))
    ddim = {k: measure(teacher_generator(teacher, num_steps=k)(measure.eps, {})) for k in STEPS}
    print(row("teacher, DDIM", [ddim], 0), flush=True)
    for name, own in {**VARIANTS, **(MORE if args.all or args.only else {})}.items():
        if args.only and args.only not in name:
            continue
        started, found = time.process_time(), []
        for seed in range(args.seeds):
            student = distilled(teacher, seed=seed, max_train_steps=args.max_train_steps, **own)
            steps = STEPS if own.get("flow_map_fraction") else (1,)
            drawn = {k: student_generator(student, num_steps=k)(measure.eps, {}) for k in steps}
            found.append({k: measure(x) for k, x in drawn.items()})
        print(row(name, found, (time.process_time() - started) / args.seeds), flush=True)


if __name__ == "__main__":
    main()
