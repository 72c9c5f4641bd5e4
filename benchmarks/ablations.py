"""The ablations of the paper, one setting changed at a time.

python benchmarks/ablations.py toys --seeds 5              # the 2-D mixture, RMS to the exact map
python benchmarks/ablations.py digits --minutes 6          # the embedded digits, Fréchet distance
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
from toys import distilled_error, mixture

BASE_TOY: dict[str, Any] = {"max_train_steps": 1500, "train_batch_size": 256}
BASE_DIGITS: dict[str, Any] = {"train_batch_size": 128, "learning_rate": 1e-3, "lr_scheduler": "cosine"}
# Heun and the midpoint call the teacher twice: at equal teacher calls they take a double step.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "boundary loss off": {"boundary_weight": 0.0},
    "uniform time": {"time_sampling": "uniform"},
    "progressive time": {"time_sampling": "progressive"},
    "DDIM, delta 1/50": {"solver": "ddim", "delta": 1 / 50},
    "Heun, delta 1/25": {"solver": "heun", "delta": 1 / 25},
    "midpoint, delta 1/25": {"solver": "midpoint", "delta": 1 / 25},
    "midpoint, delta 1/10": {"solver": "midpoint", "delta": 1 / 10},
    "midpoint, delta 1/50": {"solver": "midpoint", "delta": 1 / 50},
    "DDIM, delta 1/10": {"solver": "ddim", "delta": 1 / 10},
    "DDIM, delta 1/25": {"solver": "ddim", "delta": 1 / 25},
    "weight 1/rho^2": {"bootstrap_weight": "inverse_rho"},
    "weight 1": {"bootstrap_weight": "none"},
    "weight velocity": {"bootstrap_weight": "velocity"},
    "EMA target 0.99": {"ema_target_decay": 0.99},
}


def toys(num_seeds: int, names: list[str]) -> None:
    """Print the table on the 2-D mixture."""
    print("| variant | RMS to the exact map, mean | std | seconds |\n|---|---|---|---|")
    for name in names:
        started = time.monotonic()
        errors = [distilled_error(mixture(), seed=seed, **{**BASE_TOY, **VARIANTS[name]}) for seed in range(num_seeds)]
        spread = stdev(errors) if num_seeds > 1 else float("nan")
        seconds = (time.monotonic() - started) / num_seeds
        print(f"| {name} | {mean(errors):.4f} | {spread:.4f} | {seconds:.1f} |", flush=True)


def digits(num_steps: int, names: list[str], seed: int) -> None:
    """Print the table on the embedded digits."""
    import onestill

    print(
        "| variant | Fréchet distance | precision | recall | label accuracy | RMS to DDIM-50 | minutes |\n"
        + "|---" * 7
        + "|"
    )
    for name in names:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            rare = {"checkpointing_steps": 10**6, "validation_steps": 10**6, "num_validation_images": 64}
            settings = {**BASE_DIGITS, **rare, **VARIANTS[name], "max_train_steps": num_steps, "seed": seed}
            onestill.distill("digits", run, device="cpu", show_progress=False, **settings)
            minutes = (time.monotonic() - started) / 60
            report = onestill.evaluate(run, num_samples=1800, steps=[1], measure_speed=False, device="cpu")
            last = json.loads((run / "logs" / "metrics.jsonl").read_text().splitlines()[-1])
        row = report.rows[-1]
        cells = [f"{v:.3f}" for v in (row.frechet_distance, row.precision, row.recall, row.label_accuracy)]  # type: ignore[str-format]
        print(f"| {name} | {' | '.join(cells)} | {last['validation_rms']:.3f} | {minutes:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("toys", "digits"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="digits only")
    parser.add_argument("--max_train_steps", type=int, default=900, help="digits only")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.what == "toys":
        toys(args.seeds, args.variants)
    else:
        digits(args.max_train_steps, args.variants, args.seed)


if __name__ == "__main__":
    main()
