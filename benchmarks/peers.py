"""onestill beside the published ways to few steps: the same networks, the same optimiser, equal network evaluations.

python benchmarks/peers.py --output_dir runs/peers --teachers mixture            # minutes; digits: 90 core-minutes
python benchmarks/peers.py --output_dir runs/peers --methods kd onestill --seeds 3 --evaluations 300000
python benchmarks/peers.py --output_dir runs/peers --plot                        # table and pictures of what is there

Every method starts from the teacher's weights and spends the same number of network evaluations, pools of teacher
samples included: a row's forward pass is 1, with its backward pass 3, guidance is a row more. Each is given its
learning rate first: the best of a grid, widened while the best is at its end, on a quarter of the budget and a seed
of its own. Each finished training is a line of results.jsonl: what is there already is not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from scipy.stats import t as students_t

from onestill.sampling.generate import teacher_generator
from peers_parts.methods import (
    METHODS,
    SOLVERS,
    STEP_COUNTS,
    Job,
    solver_evaluations,
)
from peers_parts.problems import PROBLEMS, Counter, Problem

Record = dict[str, Any]
TUNING_SEED, TUNING_SHARE, TUNING_FACTOR, MOST_RATES = 1000, 1 / 4, 10**0.5, 6
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Task:
    """One line of the results: a training, or the teacher's own solver."""

    kind: str  # run, tuning or solver
    teacher: str
    method: str
    seed: int
    evaluations: int = 0
    learning_rate: float = 0.0

    @property
    def key(self) -> str:
        """What makes it the same task; a method's settings are part of it."""
        settings = dict(METHODS[self.method].settings) if self.method in METHODS else {}
        return json.dumps({**asdict(self), "settings": settings}, sort_keys=True)


@cache
def problem_of(name: str, folder: str) -> Problem:
    return PROBLEMS[name](Path(folder))


def done(task: Task, folder: str) -> Record:
    """Do a task; return its line."""
    torch.set_num_threads(1)
    problem, started = problem_of(task.teacher, folder), time.process_time()
    record: Record = {"key": task.key, **asdict(task)}
    if task.kind == "solver":
        steps = {}
        for num in STEP_COUNTS:
            numbers = problem.judge(teacher_generator(problem.teacher, num_steps=num, solver=task.method), task.seed)
            steps[str(num)] = {**numbers, "nfe": solver_evaluations(problem.teacher, task.method, num)}
        return record | {"steps": steps, "core_seconds": time.process_time() - started}
    counter = Counter(problem.teacher)
    job = Job(problem, task.learning_rate, task.seed, task.evaluations, counter)
    try:
        METHODS[task.method].train(job)
    finally:
        counter.close()
    if abs(counter.spent / task.evaluations - 1) > 0.03:
        raise RuntimeError(f"{task.method} spent {counter.spent} evaluations of {task.evaluations}")
    seconds = time.process_time() - started
    steps = {str(num): numbers for num, numbers in job.steps.items()}
    about = {"spent": counter.spent, "num_train_steps": job.num_train_steps, "core_seconds": seconds}
    return record | about | {"curve": job.curve, "steps": steps}


# Results on the disk


def read(path: Path) -> dict[str, Record]:
    """Return the finished lines by key; a line that a kill cut off is none."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        found[record["key"]] = record
    return found


def append(path: Path, record: Record) -> None:
    """Write one line, after a line's end if the last one was cut off."""
    with path.open("a+b") as file:
        file.seek(0, 2)
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(record).encode() + b"\n")


def do_all(tasks: Sequence[Task], path: Path, num_jobs: int) -> dict[str, Record]:
    """Do what is not there yet; return all that is."""
    found = read(path)
    missing = [task for task in tasks if task.key not in found]
    for record in results_of(missing, str(path.parent), num_jobs):
        append(path, record)
        found[record["key"]] = record
        what = f"{record['teacher']}, {record['method']}, seed {record['seed']}"
        rate = f", learning rate {record['learning_rate']:.2g}" if record["learning_rate"] else ""
        print(f"{record['kind']}: {what}{rate}: {one_step(record):.5f}, {record['core_seconds']:.0f} s", flush=True)
    return found


def results_of(tasks: Sequence[Task], folder: str, num_jobs: int) -> Iterator[Record]:
    if num_jobs == 1 or len(tasks) < 2:
        yield from (done(task, folder) for task in tasks)
        return
    with ProcessPoolExecutor(num_jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(done, tasks, [folder] * len(tasks))


def one_step(record: Record) -> float:
    """Return the distance of one step, the worst there is where it is no number."""
    distance = record["steps"]["1"]["distance"]
    return distance if math.isfinite(distance) else float("inf")


# Learning rates


def tuned(found: dict[str, Record], teacher: str, method: str, budget: int) -> list[tuple[float, float]]:
    """Return the tried (learning rate, distance), the best first."""
    of = [r for r in found.values() if r["kind"] == "tuning" and r["evaluations"] == budget]
    of = [r for r in of if (r["teacher"], r["method"]) == (teacher, method)]
    current = [r for r in of if r["key"] == Task("tuning", teacher, method, r["seed"], budget, r["learning_rate"]).key]
    return sorted(((r["learning_rate"], one_step(r)) for r in current), key=lambda pair: pair[1])


def rates_to_try(found: dict[str, Record], problem: Problem, method: str, budget: int) -> list[float]:
    """Return the rates that are missing: of the grid, then one beyond its end while the best is there."""
    tried = tuned(found, problem.name, method, budget)
    rates = [rate for rate, _ in tried]
    if missing := [rate for rate in problem.rates if rate not in rates]:
        return missing
    best = rates[0]
    if len(rates) >= MOST_RATES or best not in (min(rates), max(rates)):
        return []
    return [float(f"{best * TUNING_FACTOR if best == max(rates) else best / TUNING_FACTOR:.1e}")]


def tune(problem: Problem, methods: Sequence[str], budget: int, path: Path, num_jobs: int) -> dict[str, float]:
    """Return the learning rate of each method, found on a seed of its own."""
    share = int(TUNING_SHARE * budget)
    while True:
        found = read(path)
        tasks = [
            Task("tuning", problem.name, method, TUNING_SEED, share, rate)
            for method in methods
            for rate in rates_to_try(found, problem, method, share)
        ]
        if not tasks:
            return {method: tuned(found, problem.name, method, share)[0][0] for method in methods}
        do_all(tasks, path, num_jobs)


# Tables and pictures


def interval(values: Sequence[float]) -> float:
    """Return the half-width of the 95 % t-interval of the mean; nan of one value."""
    if len(values) < 2:
        return math.nan
    return float(students_t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def shown(values: Sequence[float], scale: float = 1.0) -> str:
    """Return mean ± interval, with as many digits as the interval has meaning for."""
    if not values:
        return ""
    middle, half = scale * mean(values), scale * interval(values)
    size = half if half > 0 else abs(middle) / 10 or 1.0
    decimals = min(4, max(0, 1 - math.floor(math.log10(size))))
    return f"{middle:.{decimals}f}" + ("" if math.isnan(half) else f" ± {half:.{decimals}f}")


def grouped(found: dict[str, Record], teacher: str, budget: int) -> dict[str, list[Record]]:
    """Return the finished runs of a teacher by method, and of its solvers."""
    groups: dict[str, list[Record]] = {}
    for record in found.values():
        if record["teacher"] == teacher and record["kind"] != "tuning" and record["evaluations"] in (0, budget):
            task = Task(*(record[name] for name in Task.__dataclass_fields__))
            if task.key == record["key"]:
                groups.setdefault(record["method"], []).append(record)
    return {name: groups[name] for name in (*METHODS, *SOLVERS) if name in groups}


def table(found: dict[str, Record], teacher: str, budget: int) -> str:
    """Return the markdown table of a teacher."""
    scale, name = (1000.0, "energy distance × 1000") if teacher == "mixture" else (1.0, "Fréchet distance")
    extra = {"mixture": ["rms"], "digits": ["recall", "label_accuracy"]}[teacher]
    heads = ["method", "data", "evaluations", "learning rate", *(f"{num} step{'s' * (num > 1)}" for num in STEP_COUNTS)]
    heads += [f"{key.replace('_', ' ')}, 1 step" for key in extra] + ["core-seconds"]
    groups = grouped(found, teacher, budget)
    seeds = max((len(records) for records in groups.values()), default=0)
    lines = [f"{teacher}: {name}, mean ± 95 % interval over {seeds} seeds, {budget:,} evaluations in training", ""]
    lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for method, records in groups.items():
        trained = method in METHODS
        cells = [METHODS[method].title if trained else f"teacher, {SOLVERS[method]}"]
        cells += [("yes" if METHODS[method].uses_data else "no") if trained else ""]
        cells += [f"{mean(r['spent'] for r in records):,.0f}" if trained else "", f"{records[0]['learning_rate']:.2g}"]
        cells[-1] *= trained
        for num in STEP_COUNTS:
            cells.append(shown([r["steps"][str(num)]["distance"] for r in records if str(num) in r["steps"]], scale))
        cells += [shown([r["steps"]["1"][key] for r in records]) for key in extra]
        lines.append("| " + " | ".join([*cells, f"{mean(r['core_seconds'] for r in records):.0f}"]) + " |")
    return "\n".join(lines)


def picture(found: dict[str, Record], problem_name: str, distance: str, budget: int, path: Path) -> None:
    """Draw the distance against what is spent in training, and against the sampling steps."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    groups = grouped(found, problem_name, budget)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.2), sharey=True, layout="constrained")
    colors = dict(zip(METHODS, plt.get_cmap("tab10").colors, strict=False))
    for method, records in groups.items():
        if method in SOLVERS:
            continue
        style: Record = {"color": colors[method], "marker": "o", "markersize": 4, "capsize": 3}
        style |= {
            "linestyle": "--" if METHODS[method].uses_data else "-",
            "linewidth": 2.5 if method == "onestill" else 1.3,
        }
        points = list(zip(*(r["curve"] for r in records), strict=False))
        x = [mean(p["evaluations"] for p in each) for each in points]
        y = [[p["distance"] for p in each] for each in points]
        left.errorbar(x, list(map(mean, y)), list(map(interval, y)), label=METHODS[method].title, **style)
        counts = [num for num in STEP_COUNTS if str(num) in records[0]["steps"]]
        y = [[r["steps"][str(num)]["distance"] for r in records] for num in counts]
        right.errorbar(counts, list(map(mean, y)), list(map(interval, y)), **style)
    for (solver, records), grey in zip(
        ((m, r) for m, r in groups.items() if m in SOLVERS), ("0.1", "0.4", "0.65"), strict=False
    ):
        y = [mean(r["steps"][str(num)]["distance"] for r in records) for num in STEP_COUNTS]
        nfe = [records[0]["steps"][str(num)]["nfe"] for num in STEP_COUNTS]
        right.plot(nfe, y, color=grey, linestyle=":", marker="s", markersize=3, label=f"teacher, {SOLVERS[solver]}")
        if solver == "ddim":
            left.axhline(y[-1], color=grey, linestyle=":", label=f"teacher, DDIM-{STEP_COUNTS[-1]}")
    left.set(xscale="log", yscale="log", xlabel="network evaluations spent in training", ylabel=f"{distance}, one step")
    right.set(xscale="log", xlabel="network evaluations per sample", title="at the end of training")
    right.set_xticks(STEP_COUNTS, map(str, STEP_COUNTS))
    left.set_title(f"{problem_name}: one step")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def show(found: dict[str, Record], teacher: str, distance: str, budget: int, folder: Path) -> None:
    """Print the table of a teacher, and write it and its picture."""
    if not grouped(found, teacher, budget):
        print(f"{teacher}: nothing is finished at {budget:,} evaluations")
        return
    text = table(found, teacher, budget)
    print(f"\n{text}\n")
    (folder / f"{teacher}.md").write_text(text + "\n", encoding="utf-8")
    picture(found, teacher, distance, budget, folder / f"{teacher}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--teachers", nargs="+", choices=tuple(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--evaluations", type=int, help="network evaluations of a training; each teacher's own if left out"
    )
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once, of one thread each")
    parser.add_argument("--plot", action="store_true", help="only draw what is finished")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / "results.jsonl"
    for teacher in args.teachers:
        problem = problem_of(teacher, str(args.output_dir))
        budget = args.evaluations or problem.evaluations
        if not args.plot:
            rates = tune(problem, args.methods, budget, path, args.jobs)
            tasks = [Task("solver", teacher, solver, seed) for solver in SOLVERS for seed in range(args.seeds)]
            tasks += [
                Task("run", teacher, method, seed, budget, rates[method])
                for seed in range(args.seeds)
                for method in args.methods
            ]
            do_all(tasks, path, args.jobs)
        show(read(path), teacher, problem.distance, budget, args.output_dir)


if __name__ == "__main__":
    main()
