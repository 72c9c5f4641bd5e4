"""The embedded digits: distil with the defaults for half an hour on one core, then the whole table.

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
from onestill.evaluation.report import Row
from onestill.evaluation.tables import print_report
from onestill.runs.distill import distill

SETTINGS: dict[str, Any] = {"max_train_steps": 11_000, "checkpointing_steps": 500, "validation_steps": 1000}
"""A length and nothing else: the rest are the defaults."""
STUDENT_STEPS = (1, 2, 4, 8)


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
        steps=(50, 8, 4, 1),
        student_steps=STUDENT_STEPS,
        output=run / "evaluation",
        overwrite=True,
        speed=False,
        device=args.device,
    )
    print_report(report, Console(width=100))
    rows = {row.name: row for row in report.rows}
    for row in filter(lambda row: row.is_student, report.rows):
        print(beside(row, rows["DDIM-50"]))


def beside(row: Row, teacher: Row) -> str:
    """Return how a student is placed beside its teacher, in words."""
    found = row.frechet_distance, row.recall, row.label_accuracy
    target = teacher.frechet_distance, teacher.recall, teacher.label_accuracy
    assert None not in (*found, *target)
    (distance, recall, labels), (distance_50, recall_50, labels_50) = found, target
    said = f"{row.name}: Fréchet distance {distance / distance_50:.3f} x DDIM-50, recall {recall - recall_50:+.3f}"  # type: ignore[operator]  # not None
    return f"{said}, label accuracy {100 * (labels - labels_50):+.2f} points"  # type: ignore[operator]  # not None


if __name__ == "__main__":
    main()
