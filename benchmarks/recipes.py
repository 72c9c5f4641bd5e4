"""The default recipe, chosen on five teachers at once: recipes x teachers x seeds, each for the same core-seconds.

    python examples/teachers/ddpm16.py --output_dir runs/teachers/ddpm16
    python examples/teachers/flow.py --output_dir runs/teachers/flow
    python benchmarks/recipes.py --teachers_dir runs/teachers --output_dir runs/recipes --minutes 8 --jobs 2
    python benchmarks/recipes.py --output_dir runs/recipes --table

A run is one process with one thread. It measures a step and an anchor first, and takes as many steps as fit into its
time, so that every schedule ends at its end. `results.jsonl` has one line for each finished run; called again, what is
there is not run again. The teachers' own rows are measured once, and kept beside it.

Distances are Fréchet distances to real pictures: through the embedded classifiers (digits, flow, glyphs on held-out
captions at guidance 3) or the teacher's own middle features (ddpm16); of the 2-D mixture the energy distance to its
data, x 1000. The table shows them divided by those of DDIM-50.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import onestill
from onestill.core.tensors import Cond, noise
from onestill.evaluation import metrics
from onestill.evaluation.choice import teacher_features
from onestill.evaluation.classifier import ConvFeatures
from onestill.evaluation.features import ClassifierFeatures, FeatureExtractor, extract
from onestill.evaluation.prompt_accuracy import read_prompts
from onestill.evaluation.references import embedded_reference
from onestill.evaluation.samples import Draw
from onestill.objectives.registry import is_map
from onestill.runs.build import Run, build_run, configure
from onestill.runs.distill import make_trainer
from onestill.sampling.generate import student_generator, teacher_generator
from onestill.sampling.samplers.network import NetworkSampler, StudentSampler, TeacherSampler
from onestill.students.student import Student
from onestill.teachers.base import Teacher
from onestill.teachers.guidance import guided
from onestill.teachers.load import EMBEDDED
from onestill.training.trainer import Trainer
from toys import PointNetwork, as_network_teacher, exact_map, mixture

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "teachers"))
import ddpm16
import flow

POOL = "pool"
"""The one key of a recipe that is no setting: the share of the time that anchors are made in, instead of their number."""
BASE: dict[str, Any] = {POOL: 0.25}
OLD: dict[str, Any] = {
    POOL: 0.25, "anchor_fraction": 0.75, "anchor_path_fraction": 0.0, "anchor_solver": "midpoint", "num_anchor_steps": 8,
    "corrector_fraction": 0.0,
}  # fmt: skip
MAP: dict[str, Any] = {
    "corrector_fraction": 0.25, "corrector_path_fraction": 0.0, "corrector_weight": 1.0, "flow_map_fraction": 0.25,
}  # fmt: skip
DPM: dict[str, Any] = {"anchor_solver": "dpmsolver++", "num_anchor_steps": 16}
# The first is the defaults; the next are one change of them each. Those after are what was looked at before there were rows on
# the way: three quarters of a batch anchors of eight midpoint steps, and one change each or a few.
RECIPES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no corrector": {"corrector_fraction": 0.0},
    "corrector from noise only": {"corrector_path_fraction": 0.0},
    "corrector from noise only, weight 1": {"corrector_path_fraction": 0.0, "corrector_weight": 1.0},
    "batch 32": {"train_batch_size": 32},
    "whole trajectories and a quarter bootstrap": OLD,
    "the same, no bootstrap": {**OLD, "anchor_fraction": 0.98},
    "the same, DPM-Solver++(2M)": {**OLD, **DPM},
    "the same, DPM-Solver++(2M), half of the anchors on the way": {**OLD, **DPM, "anchor_path_fraction": 0.5},
    "the same, weight 1/(rho sigma)": {**OLD, "bootstrap_weight": "inverse_rho_sigma"},
    "the same, robust 1/2": {**OLD, "robust_exponent": 0.5},
    "the same, learning rate 2e-3": {**OLD, "learning_rate": 2e-3},
    "the same, corrector": {
        **OLD, "anchor_fraction": 2 / 3, "corrector_fraction": 0.25, "corrector_path_fraction": 0.0, "corrector_weight": 1.0,
    },
    "flow map from the student's pictures, corrector": {
        **OLD, **MAP, "anchor_fraction": 0.97, "flow_map_states": "student",
    },
    "flow map from anchors, DPM-Solver++(2M), corrector": {
        **OLD, **DPM, **MAP, "anchor_fraction": 0.97, "flow_map_states": "anchors",
    },
    "paper": {"recipe": "boot"},
}  # fmt: skip
QUIET: dict[str, Any] = {
    "checkpointing_steps": 10**6, "validation_steps": 10**6, "logging_steps": 10**6, "num_validation_images": 1,
    "num_teacher_steps": 1, "device": "cpu",
}  # fmt: skip
SHARES = {"glyphs": 2.0, "digits": 1.0, "ddpm16": 1.0, "flow": 1.0, "mixture": 0.25}
"""The teachers, the slowest first, and their shares of --minutes."""
TEACHER_STEPS, STUDENT_STEPS = (50, 8), (1, 4)
NUM_SAMPLES, NUM_PROMPTED, NUM_POINTS = 1797, 960, 5_000
WIDTHS = (0.05, 0.14, 0.2)
"""Widths of other averages of the same run, which are scored in one step too."""
TRIAL_STEPS, TRIAL_BATCHES = 20, 3
MIXTURE_WEIGHTS = "mixture.safetensors"


Score = dict[str, float]


class Pictures:
    """How samplers of a picture teacher are scored: on pictures of `cond`, which are those of `prompts` if there are any."""

    def __init__(self, extractor: FeatureExtractor, real: Tensor, cond: Cond, prompts: Sequence[str] = ()) -> None:
        self.extractor, self.cond = extractor, cond
        self.real = extract(extractor, real)
        self.targets = read_prompts(extractor, prompts)[0] if prompts else None
        self.num = len(prompts) or NUM_SAMPLES

    def student(self, student: Student, num_steps: int) -> Score:
        """Return the numbers of a student's K steps."""
        return self._score(StudentSampler(student, num_inference_steps=num_steps))

    def teacher(self, teacher: Teacher, num_steps: int) -> Score:
        """Return the numbers of a teacher's DDIM steps."""
        return self._score(TeacherSampler(teacher, num_steps=num_steps))

    def distance(self, images: Tensor) -> float:
        """Return the Fréchet distance of pictures."""
        return metrics.frechet_distance(self.real, extract(self.extractor, images))

    def _score(self, sampler: NetworkSampler) -> Score:
        draw = Draw(sampler, range(self.num), self.cond, 64)
        images = torch.cat([seen for _, seen in draw.batches(self.extractor)])
        fake = extract(self.extractor, images)
        precision, recall = metrics.precision_recall(self.real, fake)
        score = {"distance": metrics.frechet_distance(self.real, fake), "precision": precision, "recall": recall}
        if "class_labels" in self.cond and isinstance(self.extractor, ClassifierFeatures):
            score["labels"] = metrics.label_accuracy(self.extractor.logits(images), self.cond["class_labels"])
        if self.targets is not None:
            score["prompts"] = self.targets.accuracies(self.targets.hits(images))["all"]
        return score


class Points:
    """How samplers of the 2-D mixture are scored: energy distance to the data, and RMS to the exact map."""

    def __init__(self) -> None:
        self.exact = mixture()
        self.real = self.exact.draw(NUM_POINTS, torch.Generator().manual_seed(1))
        self.eps = noise(range(NUM_POINTS), self.exact.spec.sample_shape)
        self.ends = exact_map(self.exact, self.eps)

    def student(self, student: Student, num_steps: int) -> Score:
        """Return the numbers of a student's K steps."""
        return self._score(student_generator(student, num_steps=num_steps)(self.eps, {}))

    def teacher(self, teacher: Teacher, num_steps: int) -> Score:
        """Return the numbers of a teacher's DDIM steps."""
        return self._score(teacher_generator(teacher, num_steps=num_steps)(self.eps, {}))

    def distance(self, points: Tensor) -> float:
        """Return 1000 x the energy distance of points."""
        return 1000 * energy_distance(self.real, points)

    def _score(self, points: Tensor) -> Score:
        precision, recall = metrics.precision_recall(self.real, points)
        rms = (points - self.ends).square().mean().sqrt().item()
        return {"distance": self.distance(points), "precision": precision, "recall": recall, "rms": rms}


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Return 2 E|x - y| - E|x - x'| - E|y - y'| of two sets of points [N, D], each pair counted."""

    def mean(a: Tensor, b: Tensor) -> float:
        return fmean(torch.cdist(part, b).mean().item() for part in a.double().split(1000))

    x, y = x.double(), y.double()
    return 2 * mean(x, y) - mean(x, x) - mean(y, y)


@dataclass(frozen=True)
class Bench:
    """A teacher, what of a run is its own and no recipe's, and how its students are scored."""

    teacher: str | Teacher
    scores: Callable[[], Pictures | Points]
    settings: dict[str, Any] = field(default_factory=dict)
    network: Callable[[], nn.Module] | None = None

    def opened(self) -> Teacher:
        """Return the teacher itself, guided."""
        if isinstance(self.teacher, Teacher):
            return self.teacher
        embedded = EMBEDDED.get(self.teacher)
        teacher = onestill.load_teacher(self.teacher, null_class=None if embedded is None else embedded.null_class)
        return guided(teacher, self.settings.get("guidance_scale", teacher.usual_guidance))


def bench_of(name: str, args: argparse.Namespace) -> Bench:
    """Return a teacher of the benchmark by its name."""
    folder = args.teachers_dir / name

    def fitted() -> nn.Module:
        network = PointNetwork(2)
        network.load_state_dict(load_file(args.output_dir / MIXTURE_WEIGHTS))
        return network

    def judged(which: str, cond: Cond, prompts: Sequence[str] = ()) -> Pictures:
        classifier = ConvFeatures.load(EMBEDDED[which].folder / "classifier.safetensors")
        return Pictures(ClassifierFeatures(classifier), embedded_reference(which).images, cond, prompts)

    def letters() -> Pictures:
        held_out = embedded_reference("glyphs").prompts
        prompts = [held_out[i % len(held_out)] for i in range(NUM_PROMPTED)]
        return judged("glyphs", onestill.load_teacher("glyphs").encode(prompts), prompts)

    def shapes() -> Pictures:
        real = ddpm16.render(NUM_SAMPLES, ddpm16.REFERENCE_SEED)
        return Pictures(teacher_features(onestill.load_teacher(str(folder)), torch.device("cpu")), real, {})

    labels = {"class_labels": torch.arange(NUM_SAMPLES) % 10}
    return {
        "mixture": lambda: Bench(as_network_teacher(mixture()), Points, network=fitted),
        "digits": lambda: Bench("digits", lambda: judged("digits", labels)),
        "flow": lambda: Bench(flow.open_teacher(folder), lambda: judged("digits", {})),
        "glyphs": lambda: Bench("glyphs", letters, {"guidance_scale": 3.0, "num_prompts": 2000}),
        "ddpm16": lambda: Bench(str(folder), shapes),
    }[name]()


def fit_mixture(path: Path) -> None:
    """Write a perceptron that was fitted to the mixture's exact prediction: where its students start."""
    torch.manual_seed(0)
    exact, network = mixture(), PointNetwork(2)
    process, generator = exact.spec.process, torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2000)
    for _ in range(2000):
        t = torch.rand(512, generator=generator, dtype=torch.float64)
        alpha, sigma = (level[:, None].float() for level in process.alpha_sigma(t))
        x_t = alpha * exact.draw(512, generator) + sigma * torch.randn(512, 2, generator=generator)
        loss = (network(x_t, process.net_time(t).float()) - exact.denoised(x_t, t, {})).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    save_file(network.state_dict(), path)


# One run


def settings_of(recipe: str, seed: int, bench: Bench) -> dict[str, Any]:
    """Return the settings of a run, but for its length and the number of its anchors; with the key `POOL`."""
    return {**BASE, **RECIPES[recipe], **bench.settings, **QUIET, "seed": seed}


def set_up(bench: Bench, folder: Path, settings: dict[str, Any]) -> tuple[Run, Trainer]:
    """Return a run, as `onestill.distill` builds it, and its trainer."""
    torch.manual_seed(settings["seed"])
    # Of its own: runs beside it would write the same one.
    cache = {"prompt_cache_dir": folder.parent / "prompts"} if "num_prompts" in settings else {}
    config = configure(bench.teacher, {**settings, **cache, "output_dir": folder})
    given = bench.teacher if isinstance(bench.teacher, Teacher) else None
    run = build_run(config, given, None if bench.network is None else bench.network())
    folder.mkdir()
    return run, make_trainer(run)


def pool_made(trainer: Trainer) -> tuple[int, float]:
    """Make the pools; return (their items, core-seconds)."""
    started = time.process_time()
    num = sum(num for _, num in trainer.prepare())
    return num, time.process_time() - started


def chosen_length(bench: Bench, folder: Path, settings: dict[str, Any], seconds: float) -> dict[str, int]:
    """Return the steps and the anchors that fit into so many core-seconds, found by a short run of the same kind."""
    share, batch = settings.pop(POOL), settings.get("train_batch_size", 64)
    trial = {**settings, "max_train_steps": TRIAL_STEPS, "num_anchors": TRIAL_BATCHES * batch}
    run, trainer = set_up(bench, folder, trial)
    share = share if run.config.anchor_fraction > 0 else 0.0
    num, pool_seconds = pool_made(trainer)
    steps = trainer.steps()
    next(steps)
    started = time.process_time()
    for _ in zip(range(TRIAL_STEPS - 2), steps, strict=False):  # without the last one, which shows and saves
        pass
    per_step = (time.process_time() - started) / (TRIAL_STEPS - 2)
    made = max(batch, round(share * seconds * num / pool_seconds)) if share else batch
    rest = seconds - (made * pool_seconds / num if share else 0.0)
    return {"max_train_steps": max(20, int(rest / per_step)), "num_anchors": made}


def trained(bench: Bench, recipe: str, seed: int, seconds: float) -> dict[str, Any]:
    """Train one student and return the line of it."""
    with tempfile.TemporaryDirectory() as temporary:
        settings = settings_of(recipe, seed, bench)
        length = chosen_length(bench, Path(temporary) / "trial", settings, seconds)
        run, trainer = set_up(bench, Path(temporary) / "run", {**settings, **length})
        started = time.process_time()
        pool_made(trainer)
        losses = [log.loss for log in trainer.steps()]
        took, started = time.process_time() - started, time.process_time()
        scores = bench.scores()
        steps = STUDENT_STEPS if is_map(run.config) else STUDENT_STEPS[:1]
        with trainer.averaged():
            rows = {str(num): scores.student(run.student, num) for num in steps}
        own, folder = trainer.trained[0], run.config.output_dir
        for width in WIDTHS:
            with own.averaged(own.tracks.at(width, folder, trainer.progress.step)):
                rows[f"width {width:g}"] = scores.student(run.student, 1)
    tenth = losses[-max(1, len(losses) // 10) :]
    shown = {name: value for name, value in settings.items() if name not in QUIET and name != "seed"}
    spent = {"train": took, "evaluate": time.process_time() - started}
    return {"settings": {**shown, **length}, "seconds": spent, "loss": fmean(tenth), "rows": rows}


def measured(bench: Bench) -> dict[str, Any]:
    """Return the teacher's own rows."""
    started, scores, teacher = time.process_time(), bench.scores(), bench.opened()
    rows = {f"DDIM-{num}": scores.teacher(teacher, num) for num in TEACHER_STEPS}
    return {"rows": rows, "seconds": {"evaluate": time.process_time() - started}}


# The sweep


@dataclass(frozen=True)
class Job:
    """One process: a student, or where there is no recipe the teacher's own rows."""

    teacher: str
    recipe: str = ""
    seed: int = 0

    def carry_out(self, args: argparse.Namespace) -> dict[str, Any]:
        """Return the line of this job, computed here."""
        torch.set_num_threads(1)
        bench = bench_of(self.teacher, args)
        if not self.recipe:
            return {"teacher": self.teacher, **measured(bench)}
        seconds = 60 * args.minutes * SHARES[self.teacher]
        about = {"teacher": self.teacher, "recipe": self.recipe, "seed": self.seed, "minutes": args.minutes}
        return {**about, **trained(bench, self.recipe, self.seed, seconds)}

    def started(self, args: argparse.Namespace) -> dict[str, Any]:
        """Return the line of this job, computed in a process of its own with one thread."""
        command = [sys.executable, __file__, "--teachers_dir", args.teachers_dir, "--output_dir", args.output_dir]
        command += ["--minutes", args.minutes, "--job", self.teacher, self.recipe, self.seed]
        one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        done = subprocess.run(
            list(map(str, command)), env={**os.environ, **one}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            return {"teacher": self.teacher, "recipe": self.recipe, "seed": self.seed, "error": done.stderr[-3000:]}
        line: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return line


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the finished lines of a file of them."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def jobs_of(args: argparse.Namespace) -> Iterator[Job]:
    """Yield what is still to be run: teachers first, then recipe by recipe, seed by seed."""
    known = {(line["teacher"], line["recipe"], line["seed"]) for line in lines(results_of(args))}
    measured_ones = {line["teacher"] for line in lines(baselines_of(args))}
    yield from (Job(teacher) for teacher in SHARES if teacher in args.teachers and teacher not in measured_ones)
    for seed, recipe, teacher in product(args.seeds, args.recipes, SHARES):
        if teacher in args.teachers and (teacher, recipe, seed) not in known:
            yield Job(teacher, recipe, seed)


def results_of(args: argparse.Namespace) -> Path:
    """Return the file of finished runs of this length."""
    return Path(args.output_dir) / f"results-{args.minutes:g}.jsonl"


def baselines_of(args: argparse.Namespace) -> Path:
    """Return the file of the teachers' own rows."""
    return Path(args.output_dir) / "teachers.jsonl"


def sweep(args: argparse.Namespace) -> None:
    """Run all that is missing, `jobs` processes at a time; each finished one is a line that stays."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if "mixture" in args.teachers and not (args.output_dir / MIXTURE_WEIGHTS).exists():
        fit_mixture(args.output_dir / MIXTURE_WEIGHTS)
    jobs, started = list(jobs_of(args)), time.monotonic()
    print(f"{len(jobs)} jobs, {args.jobs} at a time", flush=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        waiting = {pool.submit(job.started, args): job for job in jobs}
        for i, future in enumerate(as_completed(waiting), 1):
            job, line = waiting[future], future.result()
            failed = "error" in line
            target = (
                args.output_dir / "errors.jsonl" if failed else results_of(args) if job.recipe else baselines_of(args)
            )
            with target.open("a") as file:
                file.write(json.dumps(line) + "\n")
            what = line["error"].strip().splitlines()[-1:] if failed else line["rows"]
            print(f"{i}/{len(jobs)} {time.monotonic() - started:.0f} s  {job}: {what}", flush=True)


def table(args: argparse.Namespace) -> str:
    """Return the markdown: distance / that of DDIM-50, in one step and in four, means over seeds; the best first."""
    base = {line["teacher"]: line["rows"] for line in lines(baselines_of(args))}
    if not base:
        return "nothing is finished yet"
    found: dict[str, dict[str, list[dict[str, Score]]]] = {}
    for line in lines(results_of(args)):
        found.setdefault(line["recipe"], {}).setdefault(line["teacher"], []).append(line["rows"])
    names = [name for name in SHARES if name in base]

    def ratio(rows: list[dict[str, Score]], teacher: str, steps: str) -> float:
        own = [row[steps]["distance"] for row in rows if steps in row]
        return math.exp(fmean(map(math.log, own))) / base[teacher]["DDIM-50"]["distance"] if own else math.nan

    def recall(rows: list[dict[str, Score]], teacher: str) -> float:
        return fmean(row["1"]["recall"] for row in rows) - base[teacher]["DDIM-50"]["recall"]

    def geometric(values: list[float]) -> float:
        there = [value for value in values if not math.isnan(value)]
        return math.exp(fmean(map(math.log, there))) if len(there) == len(values) else math.nan

    def cells(of: dict[str, list[dict[str, Score]]]) -> tuple[float, str]:
        ratios = {steps: [ratio(of.get(name, []), name, steps) for name in names] for steps in ("1", "4")}
        recalls = [recall(of[name], name) if name in of else math.nan for name in names]
        one, four = (geometric(values) for values in ratios.values())
        each = [f"{a:.2f} / {b:.2f} ({c:+.2f})" for a, b, c in zip(*ratios.values(), recalls, strict=True)]
        seeds = max(map(len, of.values()))
        return one, f"{one:.3f} | {four:.3f} | {' | '.join(each)} | {seeds}".replace("nan", "-")

    rows = [(cells(of), name) for name, of in found.items()]
    rows.sort(key=lambda row: (math.isnan(row[0][0]), row[0][0]))
    few = [base[name]["DDIM-8"]["distance"] / base[name]["DDIM-50"]["distance"] for name in names]
    head = (
        "| recipe | mean, 1 step | 4 steps | " + " | ".join(names) + " | seeds |\n" + "|---" * (len(names) + 4) + "|\n"
    )
    first = f"| teacher, DDIM-8 | {geometric(few):.3f} | | {' | '.join(f'{value:.2f}' for value in few)} | |\n"
    body = "".join(f"| {name} | {shown} |\n" for (_, shown), name in rows)
    about = (
        "One step / four steps, each x DDIM-50 (recall less that of DDIM-50); other averages of the weights, one step:"
    )
    keys = [f"width {width:g}" for width in WIDTHS]
    others = f"| recipe | {' | '.join(keys)} |\n" + "|---" * (len(keys) + 1) + "|\n"
    for _, name in rows:
        means = [geometric([ratio(found[name].get(each, []), each, key) for each in names]) for key in keys]
        others += f"| {name} | {' | '.join(f'{value:.3f}' for value in means)} |\n".replace("nan", "-")
    return f"{head}{first}{body}\n{about}\n\n{others}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers_dir", type=Path, default=Path(), help="folder of ddpm16 and flow")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0, help="core-minutes of a run, pool included")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument(
        "--recipes", nargs="*", default=list(RECIPES), metavar="NAME", help="see --list; none: teachers only"
    )
    parser.add_argument("--teachers", nargs="+", default=list(SHARES), choices=list(SHARES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--table", action="store_true", help="print the table of what is there, and run nothing")
    parser.add_argument("--list", action="store_true", help="print the recipes, and run nothing")
    parser.add_argument("--job", nargs=3, metavar=("TEACHER", "RECIPE", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if unknown := set(args.recipes) - set(RECIPES):
        parser.error(f"no such recipe: {', '.join(sorted(unknown))}")
    if args.job:
        teacher, recipe, seed = args.job
        print(json.dumps(Job(teacher, recipe, int(seed)).carry_out(args)))
    elif args.list:
        print("\n".join(f"{name}: {RECIPES[name]}" for name in RECIPES))
    elif args.table:
        print(table(args))
    else:
        sweep(args)


if __name__ == "__main__":
    main()
