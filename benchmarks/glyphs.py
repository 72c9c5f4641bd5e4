"""The embedded glyphs: text to image in one step, against the teacher's 50 guided steps, on held-out captions.

python benchmarks/glyphs.py --output_dir runs/glyphs --seed 0 --threads 1
python benchmarks/glyphs.py --output_dir runs/glyphs --seed 1 --threads 1
python benchmarks/text_speed.py --student runs/glyphs/seed-0/pipeline --threads 1
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import onestill
from onestill.evaluation.tables import print_report
from onestill.runs.demo import draw
from onestill.runs.distill import distill

SETTINGS: dict[str, Any] = {
    "guidance_scale": 3.0, "max_train_steps": 1_300, "checkpointing_steps": 100, "validation_steps": 500,
    "num_validation_images": 8,
}  # fmt: skip
"""Guidance and a length; the rest are the defaults."""
STUDENT_STEPS = (1, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_train_steps", type=int, default=SETTINGS["max_train_steps"])
    parser.add_argument("--num_samples", type=int, default=1920, help="a multiple of the 480 held-out captions")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run = args.output_dir / f"seed-{args.seed}"
    settings = {**SETTINGS, "max_train_steps": args.max_train_steps, "resume_from_checkpoint": "latest"}
    wall, cpu = time.monotonic(), time.process_time()
    result = distill("glyphs", run, seed=args.seed, device=args.device, show_progress=False, **settings)
    if result.stopped_by is not None:
        raise SystemExit(128 + result.stopped_by)
    wall, cpu = (time.monotonic() - wall) / 60, (time.process_time() - cpu) / 60
    print(f"seed {args.seed}: {args.max_train_steps} steps, {wall:.1f} minutes, {cpu:.1f} core-minutes", flush=True)
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
    teacher = rows["DDIM-50"]
    for row in filter(lambda row: row.is_student, report.rows):
        assert row.frechet_distance and teacher.frechet_distance and row.prompt_accuracy and teacher.prompt_accuracy
        ratio = row.frechet_distance / teacher.frechet_distance
        points = 100 * (row.prompt_accuracy["all"] - teacher.prompt_accuracy["all"])
        print(f"{row.name}: Fréchet distance {ratio:.3f} x DDIM-50, all that is asked for {points:+.2f} points")
    print(f"picture: {draw(run, 'glyphs', args.device)}")


if __name__ == "__main__":
    main()
