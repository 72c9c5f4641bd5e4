"""The ablations of the paper, one setting changed at a time.

python benchmarks/ablations.py toys --seeds 5              # the 2-D mixture, RMS to the exact map
python benchmarks/ablations.py digits                      # the embedded digits, Fréchet distance; minutes a variant
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from toys import BOOTSTRAP, distilled_error, mixture

BASE: dict[str, Any] = {
    "solver": "ddim", "delta": 1 / 25, "time_sampling": "s_first", "bootstrap_weight": "inverse_rho",
    "boundary_weight": 1.0, "ema_target_decay": 0.0,
}  # fmt: skip
BASE_TOY: dict[str, Any] = {"max_train_steps": 800, "train_batch_size": 256}
BASE_DIGITS: dict[str, Any] = {
    "train_batch_size": 64, "learning_rate": 1e-3, "lr_scheduler": "cosine", **BOOTSTRAP,
    "anchor_path_fraction": 0.0, "anchor_solver": "midpoint",
}  # fmt: skip
# One change from BASE each; Heun and the midpoint call the teacher twice, so equal calls along a trajectory are a
# double step, and equal calls in training are half the steps. The last rows are combinations on the way to the defaults.
VARIANTS: dict[str, dict[str, Any]] = {
    "base: DDIM, delta 1/25, s first, 1/rho^2": {},
    "boundary loss off": {"boundary_weight": 0.0},
    "uniform time": {"time_sampling": "uniform"},
    "progressive time": {"time_sampling": "progressive"},
    "Heun, delta 2/25": {"solver": "heun", "delta": 2 / 25},
    "midpoint, delta 2/25": {"solver": "midpoint", "delta": 2 / 25},
    "Heun, half the steps": {"solver": "heun", "max_train_steps": 400},
    "midpoint, half the steps": {"solver": "midpoint", "max_train_steps": 400},
    "weight 1": {"bootstrap_weight": "none"},
    "weight velocity": {"bootstrap_weight": "velocity"},
    "delta 1/10": {"delta": 1 / 10},
    "delta 1/50": {"delta": 1 / 50},
    "EMA target 0.99": {"ema_target_decay": 0.99},
    "midpoint, weight 1": {"solver": "midpoint", "bootstrap_weight": "none"},
    "midpoint, weight velocity": {"solver": "midpoint", "bootstrap_weight": "velocity"},
    "midpoint, weight velocity, delta 1/10": {"solver": "midpoint", "bootstrap_weight": "velocity", "delta": 1 / 10},
    "midpoint, weight 1, delta 1/10": {"solver": "midpoint", "bootstrap_weight": "none", "delta": 1 / 10},
}
# On the digits: one change each from midpoint, velocity weight, s first, delta 1/25 and the boundary loss.
DIGITS: dict[str, dict[str, Any]] = {
    "base": {},
    "DDIM, delta 1/50 (equal calls)": {"solver": "ddim", "delta": 1 / 50},
    "DDIM, delta 1/25": {"solver": "ddim"},
    "weight 1": {"bootstrap_weight": "none"},
    "weight 1/rho^2": {"bootstrap_weight": "inverse_rho"},
    "boundary loss off": {"boundary_weight": 0.0},
    "uniform time": {"time_sampling": "uniform"},
    "EMA target 0.99": {"ema_target_decay": 0.99},
    "delta 1/10": {"delta": 1 / 10},
    "anchors, half of the batch": {"anchor_fraction": 0.5, "num_anchors": 8_000},
}


def toys(num_seeds: int, names: list[str]) -> None:
    """Print the table on the 2-D mixture."""
    print("| variant | RMS to the exact map, mean | std | seconds |\n|---|---|---|---|")
    for name in names:
        started = time.monotonic()
        errors = [
            distilled_error(mixture(), seed=seed, **{**BASE, **BASE_TOY, **VARIANTS[name]}) for seed in range(num_seeds)
        ]
        spread = stdev(errors) if num_seeds > 1 else float("nan")
        seconds = (time.monotonic() - started) / num_seeds
        print(f"| {name} | {mean(errors):.4f} | {spread:.4f} | {seconds:.1f} |", flush=True)


def digits(num_steps: int, names: list[str], seed: int) -> None:
    """Print the table on the embedded digits."""
    import onestill

    print(
        "| variant | Fréchet distance | precision | recall | label accuracy | RMS to DDIM-50 | core-minutes |\n"
        + "|---" * 7
        + "|"
    )
    for name in names:
        started = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            rare = {"checkpointing_steps": 10**6, "validation_steps": 10**6, "num_validation_images": 64}
            settings = {**BASE_DIGITS, **rare, **DIGITS[name], "max_train_steps": num_steps, "seed": seed}
            onestill.distill("digits", run, device="cpu", show_progress=False, **settings)
            minutes = (time.process_time() - started) / 60
            report = onestill.evaluate(run, num_samples=5000, steps=[1], speed=False, device="cpu")
            last = json.loads((run / "logs" / "metrics.jsonl").read_text().splitlines()[-1])
        row = report.rows[-1]
        cells = [f"{v:.3f}" for v in (row.frechet_distance, row.precision, row.recall, row.label_accuracy)]  # type: ignore[str-format]
        print(f"| {name} | {' | '.join(cells)} | {last['validation_rms']:.3f} | {minutes:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("toys", "digits"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="digits only")
    parser.add_argument("--max_train_steps", type=int, default=1500, help="digits only")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help=f"of: {', '.join([*VARIANTS, *DIGITS])}")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    known = VARIANTS if args.what == "toys" else DIGITS
    names = args.variants or list(known)
    if unknown := set(names) - set(known):
        parser.error(f"no such variant of {args.what}: {', '.join(sorted(unknown))}")
    if args.what == "toys":
        toys(args.seeds, names)
    else:
        digits(args.max_train_steps, names, args.seed)


if __name__ == "__main__":
    main()
