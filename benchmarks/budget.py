"""One dial: `budget` and nothing else set, on five teachers; each student beside its teacher's DDIM-8 and DDIM-50.

    python examples/teachers/ddpm16.py --output_dir runs/teachers/ddpm16
    python examples/teachers/flow.py --output_dir runs/teachers/flow
    python benchmarks/budget.py --teachers_dir runs/teachers --output_dir runs/budget --budget 10m --threads 1
    python benchmarks/budget.py --output_dir runs/budget --table

Distances are those of `benchmarks/recipes.py`; "said" is the last sentence of the run itself, which knows held-out
samples of its teacher alone. `results.jsonl` has a line for each finished teacher; called again, it is not run again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from onestill.runs.build import configure
from onestill.runs.distill import carry_out
from onestill.runs.folder import RunFolder
from onestill.runs.load import checkpoint_at
from onestill.runs.plan import planned_run
from onestill.runs.rehearsal import rehearse
from onestill.teachers.base import Teacher
from onestill.training.averages import weights_of
from onestill.training.trained import load_parameters
from recipes import MIXTURE_WEIGHTS, SHARES, bench_of, fit_mixture

RESULTS = "results.jsonl"
TEACHER_STEPS, STUDENT_STEPS = (50, 8), (1, 4)
OWN = {"glyphs": {"guidance_scale": 3.0}}
"""What the teacher is, and no choice of a recipe: the guidance that its pictures are drawn with."""


def line_of(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Distil one teacher with a budget; return its line."""
    bench, folder = bench_of(name, args), args.output_dir / f"{name}-{args.seed}"
    given = bench.teacher if isinstance(bench.teacher, Teacher) else None
    settings = {**OWN.get(name, {}), "budget": args.budget, "seed": args.seed, "device": "cpu"}
    torch.manual_seed(args.seed)
    network = None if bench.network is None else bench.network()
    wall, cpu = time.monotonic(), time.process_time()
    run = planned_run(configure(bench.teacher, {**settings, "output_dir": folder}), given, network)
    print(*run.messages, *rehearse(run), sep="\n", flush=True)
    result = carry_out(run, show_progress=False)
    if result.stopped_by is not None:
        raise SystemExit(128 + result.stopped_by)
    spent = {"wall": time.monotonic() - wall, "cpu": time.process_time() - cpu}
    said = "\n".join(result.closing())
    student, place = run.student, RunFolder(folder)
    load_parameters(student, weights_of(folder, checkpoint_at(place, None), None))
    scores, teacher = bench.scores(), bench.opened()
    rows = {f"DDIM-{num}": scores.teacher(teacher, num) for num in TEACHER_STEPS}
    rows |= {str(num): scores.student(student, num) for num in STUDENT_STEPS}
    planned = {name: getattr(run.config, name) for name in ("max_train_steps", "num_anchors", "train_batch_size")}
    about = {"teacher": name, "seed": args.seed, "budget": args.budget, "planned": planned}
    return {**about, "seconds": spent, "said": said, "rows": rows}


def table(lines: list[dict[str, Any]]) -> str:
    """Return the markdown of all finished teachers."""
    head = (
        "| teacher | seed | steps, anchors | minutes (core) | DDIM-50 | DDIM-8 | 1 step (recall) | 4 steps (recall) |"
    )
    found = [head, "|---" * 8 + "|"]
    for line in lines:
        rows, spent = line["rows"], {name: f"{seconds / 60:.1f}" for name, seconds in line["seconds"].items()}
        teachers = " | ".join(f"{rows[f'DDIM-{num}']['distance']:.3g}" for num in TEACHER_STEPS)
        students = " | ".join(
            f"{rows[str(num)]['distance']:.3g} ({rows[str(num)]['recall'] - rows['DDIM-50']['recall']:+.3f})"
            for num in STUDENT_STEPS
        )
        planned = f"{line['planned']['max_train_steps']:,}, {line['planned']['num_anchors']:,}"
        about = f"{line['teacher']} | {line['seed']} | {planned} | {spent['wall']} ({spent['cpu']})"
        found.append(f"| {about} | {teachers} | {students} |")
    return "\n".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers_dir", type=Path, default=Path("runs/teachers"))
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--teachers", nargs="+", choices=list(SHARES), default=list(SHARES))
    parser.add_argument("--budget", default="10m")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--table", action="store_true", help="print what is finished, and run nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / RESULTS
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {(line["teacher"], line["seed"], line["budget"]) for line in lines}
    for name in () if args.table else args.teachers:
        if (name, args.seed, args.budget) in known:
            continue
        if name == "mixture" and not (args.output_dir / MIXTURE_WEIGHTS).exists():
            fit_mixture(args.output_dir / MIXTURE_WEIGHTS)
        lines.append(line_of(name, args))
        print(lines[-1]["said"], flush=True)
        with path.open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
    print(table(lines))


if __name__ == "__main__":
    main()
