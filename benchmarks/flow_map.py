"""A student of several steps on the 2-D mixture: RMS to the exact map and energy distance to the data, by steps.

python benchmarks/flow_map.py --seeds 3                    # the table; seconds a variant on an idle core
python benchmarks/flow_map.py --all --seeds 3              # with what was tried beside the defaults
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
from toys import PointNetwork, as_network_teacher, exact_map, mixture

from onestill.runs.build import build_run
from onestill.runs.distill import carry_out
from onestill.runs.folder import RunFolder
from onestill.sampling.generate import student_generator
from onestill.students.student import Student
from onestill.training.config import make_config
from onestill.training.trained import load_parameters

BASE: dict[str, Any] = {
    "max_train_steps": 1500, "train_batch_size": 256, "learning_rate": 2e-3, "lr_scheduler": "cosine",
    "lr_warmup_steps": 50, "checkpointing_steps": 10**6, "validation_steps": 10**6, "logging_steps": 10**6,
    "num_teacher_steps": 1, "device": "cpu",
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "no flow map": {},
    "flow map, half of the batch": {"flow_map_fraction": 0.5},
}
MORE: dict[str, dict[str, Any]] = {
    "no flow map, weight 1/(rho sigma)": {"bootstrap_weight": "inverse_rho_sigma"},
    "1/(rho sigma)": {"flow_map_fraction": 0.5, "bootstrap_weight": "inverse_rho_sigma"},
    "1/(rho sigma), three quarters": {"flow_map_fraction": 0.75, "bootstrap_weight": "inverse_rho_sigma"},
    "1/(rho sigma), own path": {
        "flow_map_fraction": 0.5, "bootstrap_weight": "inverse_rho_sigma", "flow_map_states": "path",
    },
    "1/(rho sigma), factor 0.2": {
        "flow_map_fraction": 0.5, "bootstrap_weight": "inverse_rho_sigma", "flow_map_weight": 0.2,
    },
    "1/(rho sigma), k = 1": {
        "flow_map_fraction": 0.5, "bootstrap_weight": "inverse_rho_sigma", "robust_exponent": 1.0,
    },
    "1/(rho sigma), delta 1/100": {
        "flow_map_fraction": 0.5, "bootstrap_weight": "inverse_rho_sigma", "flow_map_delta": 0.01,
    },
    "velocity, own path": {"flow_map_fraction": 0.5, "flow_map_states": "path"},
    "velocity, factor 5": {"flow_map_fraction": 0.5, "flow_map_weight": 5.0},
}  # fmt: skip


def energy(x: Tensor, y: Tensor) -> float:
    """Return the energy distance of two samples, 2 E|x - y| - E|x - x'| - E|y - y'|."""
    return float(2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean())


def measured(steps: tuple[int, ...], **settings: Any) -> dict[int, tuple[float, float]]:
    """Distil the mixture; return (RMS to the exact map, 1000 times the energy distance to data) for each K."""
    exact = mixture()
    torch.manual_seed(settings.get("seed", 0))
    with tempfile.TemporaryDirectory() as folder:
        config = make_config({"teacher": "exact", "output_dir": f"{folder}/run", **BASE, **settings})
        teacher = as_network_teacher(exact)
        carry_out(build_run(config, teacher, PointNetwork(2)), show_progress=False)
        student = Student(teacher, network=PointNetwork(2))
        load_parameters(student, RunFolder(config.output_dir).checkpoint().student)
    eps = torch.randn(4000, 2, generator=torch.Generator().manual_seed(10**6))
    ends, data = exact_map(exact, eps), exact.draw(4000, torch.Generator().manual_seed(10**6 + 1))
    found = {}
    for num in steps:
        x = student_generator(student, num_steps=num)(eps, {})
        found[num] = math.sqrt((x - ends).square().mean()), 1000 * energy(x, data)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--only", help="variants whose name has this in it")
    parser.add_argument("--steps", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    steps = tuple(args.steps)
    print(f"| variant | {' | '.join(f'{k} steps: RMS, energy' for k in steps)} | seconds |")
    print("|---" * (len(steps) + 2) + "|")
    for name, own in {**VARIANTS, **(MORE if args.all else {})}.items():
        if args.only and args.only not in name:
            continue
        started = time.process_time()
        runs = [measured(steps if "flow_map_fraction" in own else (1,), seed=seed, **own) for seed in range(args.seeds)]
        cells = [[[run[k][i] for run in runs] for i in (0, 1)] if k in runs[0] else None for k in steps]
        spread = lambda values: stdev(values) if len(values) > 1 else 0.0  # noqa: E731 - short
        said = [
            f"{mean(c[0]):.4f} ± {spread(c[0]):.4f}, {mean(c[1]):.2f} ± {spread(c[1]):.2f}" if c else "–" for c in cells
        ]
        seconds = (time.process_time() - started) / args.seeds
        print(f"| {name} | {' | '.join(said)} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
