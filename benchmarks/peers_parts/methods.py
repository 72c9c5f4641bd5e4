"""The methods of the peers' benchmark: each spends so many network evaluations and leaves samplers of some step counts.

The peers are written from their formulas, on the teacher's own network and from its weights, with onestill's processes
and trajectories; optimiser, schedule, clipping and average are `Trained`'s, as onestill's own. In the letters of
docs/method.md, with y(x_t; t -> s) one or several teacher steps started at x_t (a = t):

    KD                         |g(x_a, a) - y(x_a; a -> 0)|^2, pairs made once      Luhman & Luhman, 2101.02388
    progressive distillation   max(1, w_t^2) |g(x_t, t) - y(x_t; t -> m -> s)|^2    Salimans & Ho, 2202.00512
    consistency distillation   |g(x_t, t) - sg[g(x_s, s)]|^2, x_s by a Heun step    Song et al., 2303.01469

g is the network's prediction of x_0. A progressive student of K steps is the next one's teacher.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onestill.core.tensors import Cond, broadcast
from onestill.diffusion.names import SolverName
from onestill.diffusion.trajectory import (
    CALLS_PER_STEP,
    Denoiser,
    Trajectory,
    ddim_step,
    heun_step,
    midpoint_step,
    solve,
    uniform_times,
)
from onestill.objectives.registry import OBJECTIVES, is_map, rows_of
from onestill.runs.build import build_run
from onestill.runs.distill import make_trainer
from onestill.sampling.generate import Generate, student_generator
from onestill.students.student import Student
from onestill.teachers.base import Teacher
from onestill.training.config import DistillConfig, make_config
from onestill.training.trained import Trained
from onestill.training.trainer import make_accelerator
from peers_parts.problems import Counter, Numbers, Problem

Samplers = dict[int, Generate]
MARKS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)  # of what follows the making of a pool
STEP_COUNTS = (1, 2, 4, 8, 50)
POOL_STEPS = 12  # midpoint steps to each end of a pool, as anchors have by default
FIRST_TEACHER = 32  # DDIM steps that progressive distillation begins with
CONSISTENCY_STEPS = (4, 8, 16)  # of the whole range, in each third of the training
OPTIMISER: dict[str, Any] = {"lr_scheduler": "cosine"}
RARELY: dict[str, Any] = dict.fromkeys(("checkpointing_steps", "validation_steps", "logging_steps"), 10**6)


@dataclass
class Job:
    """One training: what is spent, and what is measured on the way.

    Attributes:
        problem: The teacher and its data.
        learning_rate: The peak.
        seed: Of every draw.
        budget: Network evaluations to spend.
        counter: Those spent.
        curve: Numbers of one step after some of the marks.
        steps: Numbers at the end, by sampling steps.
    """

    problem: Problem
    learning_rate: float
    seed: int
    budget: int
    counter: Counter
    curve: list[Numbers] = field(default_factory=list)
    steps: dict[int, Numbers] = field(default_factory=dict)
    num_train_steps: int = 0
    marks_passed: int = 0
    pool_cost: int = -1

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        torch.manual_seed(self.seed)
        self.teacher = self.problem.teacher
        self.trajectory = self.teacher.spec.trajectory

    @property
    def spent_share(self) -> float:
        """The share of the budget that is spent, below 1."""
        return min(self.counter.spent / self.budget, 1 - 1e-9)

    def watch(self, trained: Trained, generate: Generate) -> None:
        """Measure one step of the averaged weights if a further mark is passed; the last is measured at the end."""
        if self.pool_cost < 0:  # what is spent up to the end of the first step is the pool's, nearly
            self.pool_cost = self.counter.spent
        share = (self.counter.spent - self.pool_cost) / (self.budget - self.pool_cost)
        passed = sum(share >= mark for mark in MARKS)
        if passed > self.marks_passed:
            with self.counter.counting(False), trained.averaged():
                self.curve.append({"evaluations": self.counter.spent, **self.problem.judge(generate, self.seed)})
        self.marks_passed = passed

    def finish(self, samplers: Samplers, counts: tuple[int, ...] = STEP_COUNTS) -> None:
        """Measure every sampler at the end."""
        with self.counter.counting(False):
            self.steps = {num: self.problem.judge(samplers[num], self.seed) for num in counts if num in samplers}
        self.curve.append({"evaluations": self.counter.spent, **self.steps[1]})


# Training of the peers


def trained_steps(job: Job, network: nn.Module, num_steps: int) -> Iterator[tuple[Trained, Callable[[Tensor], None]]]:
    """Yield (what is trained, the update by a loss) `num_steps` times."""
    config = optimisation(job, num_steps)
    accelerator = make_accelerator(config)
    trained = Trained("student", network, accelerator, config, widths=config.ema_width)

    def update(loss: Tensor) -> None:
        accelerator.backward(loss)
        trained.clip()
        trained.optimizer.step()
        trained.optimizer.zero_grad()
        trained.schedule.step()
        trained.average()

    for _ in range(num_steps):
        yield trained, update
    job.num_train_steps += num_steps


def optimisation(job: Job, num_steps: int) -> DistillConfig:
    """Return the settings of the optimiser, which are the same for all; the rest is not used."""
    given = {"teacher": job.problem.name, "output_dir": "unused", "device": "cpu", "max_train_steps": num_steps}
    return make_config({**given, **OPTIMISER, "learning_rate": job.learning_rate})


def frozen(trained: Trained) -> nn.Module:
    """Return a copy of a network with its averaged weights."""
    with trained.averaged():
        return copy.deepcopy(trained.module).requires_grad_(False)


def predictor(teacher: Teacher, network: nn.Module, cond: Cond) -> Denoiser:
    """Return a network's prediction of x_0."""
    return lambda x_t, t: teacher.denoised_by(network, x_t, t, cond)


def squared(error: Tensor) -> Tensor:
    """Return the mean square of each row."""
    return error.square().flatten(1).mean(1)


def make_pool(job: Job, share: float) -> tuple[Tensor, Tensor, Cond]:
    """Return (start states, the teacher's ends, conditions) for a share of the budget."""
    calls = POOL_STEPS * CALLS_PER_STEP["midpoint"] * job.teacher.evaluations
    num, shape = max(1, int(share * job.budget / calls)), job.teacher.spec.sample_shape
    x_a = job.trajectory.start(torch.randn(num, *shape, generator=job.generator))
    cond = job.problem.conditions.choose(num, job.generator)
    times, ends = uniform_times(job.trajectory.t_max, POOL_STEPS), []
    with torch.no_grad():
        for part in torch.arange(num).split(500):
            rows = {name: value[part] for name, value in cond.items()}
            ends.append(solve(job.trajectory, job.teacher.denoiser(rows), x_a[part], times, midpoint_step))
    return x_a, torch.cat(ends), cond


def drawn(pool: tuple[Tensor, Tensor, Cond], num: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Cond]:
    """Return `num` rows of a pool."""
    rows = torch.randint(len(pool[0]), (num,), generator=generator)
    return pool[0][rows], pool[1][rows], {name: value[rows] for name, value in pool[2].items()}


Source = Callable[[int], tuple[Tensor, Cond]]


def clean_source(job: Job, *, data: bool, share: float = 0.25) -> Source:
    """Return where clean samples are drawn from: the data, or samples of the teacher for a share of the budget."""
    if data:
        return lambda num: job.problem.data(num, job.generator)
    pool = make_pool(job, share)
    return lambda num: drawn(pool, num, job.generator)[1:]


def noised(job: Job, x_0: Tensor, t: Tensor) -> Tensor:
    """Return alpha_t x_0 + sigma_t n."""
    alpha, sigma = job.trajectory.process.alpha_sigma(t)
    n = torch.randn(x_0.shape, generator=job.generator)
    return broadcast(alpha, x_0) * x_0 + broadcast(sigma, x_0) * n


def one_step(teacher: Teacher, network: nn.Module) -> Generate:
    """Return g(x_a, a)."""

    @torch.no_grad()
    def generate(eps: Tensor, cond: Cond) -> Tensor:
        return teacher.denoised_by(network, teacher.spec.trajectory.start(eps), teacher.spec.t_max, cond)

    return generate


# The peers


def knowledge_distillation(job: Job) -> None:
    """Regress the network on the ends of teacher trajectories, made once for half of the budget."""
    pool, size = make_pool(job, 0.5), job.problem.batch_size
    network = job.teacher.copy_network()
    steps = (job.budget - job.counter.spent) // (3 * size)
    for trained, update in trained_steps(job, network, steps):
        x_a, end, cond = drawn(pool, size, job.generator)
        g = job.teacher.denoised_by(network, x_a, job.trajectory.t_max, cond)
        update(squared(g - end).mean())
        job.watch(trained, one_step(job.teacher, network))
    job.finish({1: one_step(job.teacher, frozen(trained))})


def two_steps(trajectory: Trajectory, denoised: Denoiser, x_t: Tensor, t: Tensor, m: Tensor, s: Tensor) -> Tensor:
    """Return the prediction of x_0 at t whose one DDIM step t -> s ends where two of the teacher's, t -> m -> s, do.

    That is the signal at s of the trajectory that starts at t: rho is 1 from there, eq. (6) with a = t.
    """
    with torch.no_grad():
        y = ddim_step(trajectory, denoised, x_t, torch.zeros_like(x_t), t, m, t)
        return ddim_step(trajectory, denoised, x_t, y, m, s, t)


def progressive_distillation(job: Job, *, data: bool) -> None:
    """Halve the steps until one is left; the last two students get twice the others' training, as in the paper."""
    clean, size, t_max = clean_source(job, data=data), job.problem.batch_size, job.trajectory.t_max
    counts = [FIRST_TEACHER >> i for i in range(1, FIRST_TEACHER.bit_length())]
    shares = [2 if count <= 2 else 1 for count in counts]
    all_steps = (job.budget - job.counter.spent) / ((3 + 2) * size)
    students: dict[int, nn.Module] = {}
    previous: nn.Module = job.teacher.network
    for count, share in zip(counts, shares, strict=True):
        network = copy.deepcopy(previous).requires_grad_(True)
        num_steps = max(1, int(all_steps * share / sum(shares)))
        for trained, update in trained_steps(job, network, num_steps):  # noqa: B007 - kept
            x_0, cond = clean(size)
            t = t_max * (1 + torch.randint(count, (size,), generator=job.generator).double()) / count
            x_t, h = noised(job, x_0, t), t_max / count
            denoised = predictor(job.teacher, previous, cond)
            target = two_steps(job.trajectory, denoised, x_t, t, t - h / 2, (t - h).clamp(min=0))
            alpha, sigma = job.trajectory.process.alpha_sigma(t)
            weights = ((alpha / sigma) ** 2).clamp(min=1).float()
            update((weights * squared(job.teacher.denoised_by(network, x_t, t, cond) - target)).mean())
        previous = students[count] = frozen(trained)
    job.finish({count: ddim_generator(job.teacher, student, count) for count, student in students.items()})


def ddim_generator(teacher: Teacher, network: nn.Module, num_steps: int) -> Generate:
    """Return DDIM with another network in the teacher's place."""
    times = uniform_times(teacher.spec.t_max, num_steps)

    @torch.no_grad()
    def generate(eps: Tensor, cond: Cond) -> Tensor:
        x_a = teacher.spec.trajectory.start(eps)
        return solve(teacher.spec.trajectory, predictor(teacher, network, cond), x_a, times, ddim_step)

    return generate


def earlier_state(trajectory: Trajectory, denoised: Denoiser, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Return x_s, one Heun step of the teacher's ODE from x_t."""
    with torch.no_grad():
        y = heun_step(trajectory, denoised, x_t, torch.zeros_like(x_t), t, s, t)
        return trajectory.state(y, x_t, s, t)


def consistency_distillation(job: Job, *, data: bool) -> None:
    """Make the predictions at both ends of a teacher step equal; at t = 0 the network's is x itself.

    The steps become shorter twice, as in Song & Dhariwal, 2310.14189, and begin anywhere, so that every level is trained:
    with 18 fixed ones (2303.01469) the distance was three times as large on the mixture after 650 steps.
    """
    clean, size, t_max = clean_source(job, data=data), job.problem.batch_size, job.trajectory.t_max
    network = job.teacher.copy_network()
    steps = (job.budget - job.counter.spent) // ((3 + 1 + CALLS_PER_STEP["heun"] * job.teacher.evaluations) * size)
    for trained, update in trained_steps(job, network, steps):
        x_0, cond = clean(size)
        h = t_max / CONSISTENCY_STEPS[int(len(CONSISTENCY_STEPS) * job.spent_share)]
        s = torch.rand(size, generator=job.generator).double() * (t_max + h) - h
        t, s = (s + h).clamp(max=t_max), s.clamp(min=0)
        x_t = noised(job, x_0, t)
        x_s = earlier_state(job.trajectory, job.teacher.denoiser(cond), x_t, t, s)
        with torch.no_grad():
            target = job.teacher.denoised_by(network, x_s, s, cond)
        update(squared(job.teacher.denoised_by(network, x_t, t, cond) - target).mean())
        job.watch(trained, one_step(job.teacher, network))
    best = frozen(trained)
    job.finish({num: consistency_generator(job.teacher, best, num) for num in STEP_COUNTS})


def consistency_generator(teacher: Teacher, network: nn.Module, num_steps: int) -> Generate:
    """Return multistep consistency sampling: predict x_0, noise it anew to the next level, and again."""
    trajectory, times = teacher.spec.trajectory, uniform_times(teacher.spec.t_max, num_steps)

    @torch.no_grad()
    def generate(eps: Tensor, cond: Cond) -> Tensor:
        x_t = trajectory.start(eps)
        for t, s in pairwise(times):
            x_0 = teacher.denoised_by(network, x_t, t, cond)
            alpha, sigma = trajectory.process.level(s)
            x_t = alpha * x_0 + sigma * torch.randn_like(x_0) if s > 0 else x_0
        return x_t

    return generate


# onestill's own


def distillation(job: Job, settings: Mapping[str, Any]) -> None:
    """Train by onestill with some settings, its steps and its anchors as many as the budget pays for."""
    # What a run looks at beside its training, such as pictures, is not counted.
    with tempfile.TemporaryDirectory() as folder, job.counter.counting(False):
        config = planned(job, settings, Path(folder) / "run")
        trainer = make_trainer(build_run(config, job.teacher))
        config.output_dir.mkdir()
        trainer.update = counted(trainer.update, job.counter)  # type: ignore[method-assign]
        with job.counter.counting():
            for _ in trainer.prepare():
                pass
        for log in trainer.steps():
            if log.step < config.max_train_steps:
                job.watch(trainer.trained[0], student_generator(trainer.student))
        job.num_train_steps = config.max_train_steps
        with trainer.averaged():
            job.finish(student_samplers(trainer.student, config))


def counted(update: Callable[[], Any], counter: Counter) -> Callable[[], Any]:
    """Return a function whose network evaluations are counted."""

    def counts() -> Any:
        with counter.counting():
            return update()

    return counts


def student_samplers(student: Student, config: DistillConfig) -> Samplers:
    """Return the samplers of a student: of one step, and of more where it is a map between any two levels."""
    counts = STEP_COUNTS if is_map(config) else (1,)
    return {num: student_generator(student, num_steps=num) for num in counts}


def planned(job: Job, settings: Mapping[str, Any], folder: Path) -> DistillConfig:
    """Return the configuration that spends the budget, anchors the share `anchor_share` of it."""
    own = {**OPTIMISER, **RARELY, **settings}
    share = own.pop("anchor_share", 0.0)
    given = {"teacher": job.problem.name, "output_dir": folder, "device": "cpu", "seed": job.seed, **own}
    given |= {"learning_rate": job.learning_rate, "train_batch_size": job.problem.batch_size}
    given |= {"num_teacher_steps": 1, "num_validation_images": 1}
    config = make_config({**given, "max_train_steps": 10**6, "num_anchors": 1})
    if share:
        given["num_anchors"] = max(1, int(share * job.budget / pool_cost(config, job.teacher)))
        config = make_config({**given, "max_train_steps": 10**6})
    pool = config.num_anchors * pool_cost(config, job.teacher)
    steps = max(1, int((job.budget - pool) / step_cost(config, job.teacher)))
    return make_config({**given, "max_train_steps": steps})


def pool_cost(config: DistillConfig, teacher: Teacher) -> float:
    """Return the evaluations of one item of the pools; 0 where there are none."""
    costs = [kind.cost(config, config.train_batch_size) for kind in rows_of(config, config.train_batch_size)]
    return sum(cost.teacher_per_item for cost in costs) * teacher.evaluations


def step_cost(config: DistillConfig, teacher: Teacher) -> float:
    """Return the evaluations of a training step, the mean over the run."""
    size = config.train_batch_size
    begins = sorted({0.0, 1.0, *(kind.begins(config) for kind in OBJECTIVES)})
    total = 0.0
    for begin, end in pairwise(begins):
        for kind, rows in rows_of(config, size, begin).items():
            cost = kind.cost(config, size)
            per_row = 3 + cost.student + cost.teacher * teacher.evaluations + 3 * cost.learned
            total += (end - begin) * rows * per_row
    return total


# What is compared


@dataclass(frozen=True)
class Method:
    """A method: how it is called, whether it uses data, and its training."""

    title: str
    uses_data: bool
    train: Callable[[Job], None]
    settings: Mapping[str, Any] = field(default_factory=dict)


def of_onestill(title: str, settings: dict[str, Any]) -> Method:
    return Method(title, False, lambda job: distillation(job, settings), settings)


BOOT: dict[str, Any] = {"recipe": "boot"}
FREEFLOW: dict[str, Any] = {
    "solver": "ddim", "bootstrap_weight": "inverse_rho_sigma", "boundary_weight": 0.0, "anchor_fraction": 0.0,
    "corrector_fraction": 0.25, "corrector_begin": 0.0, "corrector_normalizer": "inverse_sigma", "corrector_weight": 1.0,
}  # fmt: skip
OWN: dict[str, Any] = {"anchor_share": 0.2}
"""The defaults; how much of a budget goes to anchors is a budget's to say."""
METHODS: dict[str, Method] = {
    "kd": Method("KD on pairs", False, knowledge_distillation),
    "pd_data": Method("progressive, on data", True, lambda job: progressive_distillation(job, data=True)),
    "pd_samples": Method("progressive, on teacher samples", False, lambda job: progressive_distillation(job, data=False)),
    "cd_data": Method("consistency, on data", True, lambda job: consistency_distillation(job, data=True)),
    "cd_samples": Method("consistency, on teacher samples", False, lambda job: consistency_distillation(job, data=False)),
    "boot": of_onestill("BOOT", BOOT),
    "freeflow": of_onestill("FreeFlow-like", FREEFLOW),
    "onestill": of_onestill("onestill", OWN),
}  # fmt: skip


# The teacher's own solvers

SOLVERS: dict[SolverName, str] = {"ddim": "DDIM", "dpmsolver++": "DPM-Solver++(2M)", "heun": "Heun"}


def solver_evaluations(teacher: Teacher, solver: SolverName, num_steps: int) -> int:
    """Return the network evaluations of a sample; Heun's last step, to the clean end, needs one only."""
    return teacher.evaluations * (CALLS_PER_STEP[solver] * num_steps - (solver == "heun"))
