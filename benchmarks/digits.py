"""The embedded digits: distil for up to 20 minutes on two cores, then the whole table.

python benchmarks/digits.py --output_dir runs/digits --seed 0
python benchmarks/digits.py --output_dir runs/digits --seed 1
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import onestill
from onestill.evaluation.report import print_report
from onestill.runs.distill import distill

SETTINGS: dict[str, Any] = {
    "max_train_steps": 14_000,
    "boundary_weight": 1.0,
    "anchor_fraction": 0.75,
    "num_anchors": 40_000,
    "train_batch_size": 64,
    "learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "checkpointing_steps": 500,
    "validation_steps": 1000,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_train_steps", type=int, default=SETTINGS["max_train_steps"])
    parser.add_argument("--num_samples", type=int, default=5000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run = args.output_dir / f"seed-{args.seed}"
    settings = {**SETTINGS, "max_train_steps": args.max_train_steps, "resume_from_checkpoint": "latest"}
    wall, cpu = time.monotonic(), time.process_time()
    result = distill("digits", run, seed=args.seed, device=args.device, show_progress=False, **settings)
    if result.stopped_by is not None:
        raise SystemExit(128 + result.stopped_by)
    wall, cpu = (time.monotonic() - wall) / 60, (time.process_time() - cpu) / 60
    print(
        f"seed {args.seed}: {args.max_train_steps} steps, {wall:.1f} minutes, {cpu:.1f} core-minutes, {args.threads} threads"
    )
    report = onestill.evaluate(
        run,
        num_samples=args.num_samples,
        output=run / "evaluation",
        overwrite=True,
        speed=False,
        device=args.device,
    )
    print_report(report, Console(width=100))
    rows = {row.name: row for row in report.rows}
    teacher, student = rows["DDIM-50"], rows["student"]
    assert student.frechet_distance is not None
    assert teacher.frechet_distance is not None
    assert student.label_accuracy is not None
    assert teacher.label_accuracy is not None
    ratio = student.frechet_distance / teacher.frechet_distance
    points = 100 * (student.label_accuracy - teacher.label_accuracy)
    print(f"Fréchet distance: {ratio:.2f} x DDIM-50; label accuracy: {points:+.2f} points")


if __name__ == "__main__":
    main()
