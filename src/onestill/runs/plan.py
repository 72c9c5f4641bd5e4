"""How long a run takes on this machine, measured before it, and how much of it a budget of time allows."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from accelerate.utils import broadcast_object_list
from torch import nn

from onestill.core.devices import resolve_device, seconds_of
from onestill.core.errors import SettingError, named
from onestill.core.memory import enough_memory
from onestill.core.settings import MOST_STEPS
from onestill.core.tensors import Cond, noise, to_device
from onestill.data.cascade import FirstStage
from onestill.data.conditions import draw_guidance, middle_guidance
from onestill.data.prompts import PromptFile
from onestill.evaluation.speed import compare
from onestill.objectives.anchors import Anchors
from onestill.objectives.pool import STOPS
from onestill.objectives.registry import rows_of
from onestill.runs import hub
from onestill.runs.build import (
    Run,
    build_run,
    configured_teacher,
    make_student,
    open_teacher,
    with_embedded_prompts,
    with_usual_rate,
)
from onestill.runs.folder import CONFIG_FILE, RunFolder, check_output_dir
from onestill.runs.resume import can_be_longer
from onestill.sampling.generate import student_generator, teacher_generator
from onestill.teachers.base import Teacher
from onestill.teachers.pipelines.calls import EXAMPLE_PROMPTS
from onestill.training.config import DistillConfig, num_processes, usual_warmup
from onestill.training.recipes import PLANNED, as_budget, in_time, seconds_of_budget
from onestill.training.trainer import Fingerprints, Trainer

LEAST_ROUNDS, MOST_ROUNDS, OF_THE_BUDGET = 3, 30, 0.02
"""How often each part of a run is timed, so that it takes this share of a budget; the median counts."""
LEAST_STEPS = 100
"""The fewest steps that a budget may come to: a student of fewer is its teacher's first guess."""
POOL_SHARE = 0.2
"""The share of the training's time that goes to pools, unless that is more items than there are rows for them."""
ENCODING_SHARE = 0.2
"""The largest share of a budget that goes to encoding prompts; where all take longer, fewer are drawn from."""
WATCHING_SHARE = 0.05
"""What is left of a budget for pictures, checkpoints and distances."""
NUM_PICTURES = 10
MOST_BETWEEN, LEAST_BETWEEN = 1800.0, 60.0
"""Seconds between two checkpoints."""


@dataclass(frozen=True)
class Speed:
    """Seconds on this machine, at this moment.

    Attributes:
        steps: Of an optimiser step, by the share of the training from which on it holds: objectives may begin later.
        call: Of a call of the guided teacher, per image.
        drawing: Of the student's one step, per image.
        encoding: Of encoding a prompt; 0 without prompts.
        opening: Of loading and measuring, which have passed when this is known.
    """

    steps: Mapping[float, float]
    call: float
    drawing: float = 0.0
    encoding: float = 0.0
    opening: float = 0.0

    @property
    def step(self) -> float:
        """Of a step on average over the training."""
        ends = [*list(self.steps)[1:], 1.0]
        return sum((end - begin) * seconds for (begin, seconds), end in zip(self.steps.items(), ends, strict=True))


@dataclass(frozen=True)
class ExampleConditions:
    """A teacher's example conditions, in the place of prompts that are not encoded yet: of their size, and as slow."""

    teacher: Teacher
    first_stage: FirstStage | None = None
    guidance_range: tuple[float, float] | None = None
    captions: ClassVar[tuple[str, ...]] = ()

    def choose(self, num: int, generator: torch.Generator) -> Cond:
        """Return that many choices, all alike but for the guidance scale."""
        return {"example": torch.zeros(num), **draw_guidance(self.guidance_range, num, generator)}

    def rows(self, chosen: Cond) -> Cond:
        """Return the example's conditions, with a picture that the first stage draws for each."""
        num, rest = len(chosen["example"]), {name: v for name, v in chosen.items() if name != "example"}
        cond = self.teacher.example_rows(num)
        if (first := self.first_stage) is not None:
            pictures = first.pictures(noise(range(num), first.shape), first.teacher.example_rows(num))
            cond |= to_device(
                self.teacher.picture_rows(pictures, noise(range(num), self.teacher.spec.sample_shape)), "cpu"
            )
        return cond | rest

    def grid(self, num: int) -> Cond:
        """Return the same with the middle of the guidance range."""
        return self.rows({"example": torch.zeros(num), **middle_guidance(self.guidance_range, num)})


def measure(config: DistillConfig, teacher: Teacher, network: nn.Module | None = None) -> Speed:
    """Return the speed of a run, by a few of its steps on a copy that is thrown away, and teacher's calls.

    There are more of them where the run has a budget that leaves time for it: machines do other things as well. Random state, the teacher and a network of one's own are afterwards what they were; nothing is written.
    """
    what = f"measuring a step of {named('train_batch_size')} {config.train_batch_size:,}"
    less = f"lower {named('train_batch_size')}, or give {named('gradient_checkpointing')}, {named('corrector_fraction')} 0 or {named('lora_rank')} 64"
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(), enough_memory(what, less):
        steps = min(config.num_anchor_steps, STOPS + 1)
        small = {"output_dir": Path(folder), "num_anchors": 1, "num_anchor_steps": steps, "report_to": None}
        # One pass of a step is timed: with many of them a step may take minutes.
        small |= {"gradient_accumulation_steps": 1}
        resolved, guided, first_stage, _ = open_teacher(
            config.model_copy(update=small), teacher, needs_first_stage=False
        )
        student = make_student(guided, resolved, copy.deepcopy(network))
        conditions = ExampleConditions(guided, first_stage, resolved.guidance_range)
        resolved = with_usual_rate(resolved, student)
        trainer = Trainer(resolved, student, conditions, Fingerprints(""))
        guided.to(trainer.device)
        if first_stage is not None:
            first_stage.teacher.to(trainer.device)
        try:
            found, passes = _timed(trainer, conditions), config.gradient_accumulation_steps
            return replace(found, steps={share: passes * seconds for share, seconds in found.steps.items()})
        finally:
            guided.to("cpu")


def _timed(trainer: Trainer, conditions: ExampleConditions) -> Speed:
    config, device, num = trainer.config, trainer.device, trainer.config.train_batch_size
    for _ in trainer.prepare():
        pass
    begins = sorted({0.0, *(kind.begins(config) for kind in rows_of(config, num))})
    eps, cond = noise(range(num), trainer.teacher.spec.sample_shape), conditions.grid(num)
    call = teacher_generator(trainer.teacher, num_steps=1, device=device)
    draw = student_generator(trainer.student, device=device)

    def step(share: float) -> None:
        trainer.progress.step = min(round(share * config.max_train_steps) + 1, config.max_train_steps - 1)
        trainer.update()

    parts: dict[str, Callable[[], object]] = {str(share): partial(step, share) for share in begins}
    parts |= {"call": partial(call, eps, cond), "drawing": partial(draw, eps, cond)}
    found = compare(parts, device=device, repeats=LEAST_ROUNDS)
    if config.budget is not None:
        more = OF_THE_BUDGET * seconds_of_budget(config.budget) / sum(found.values())
        (rounds,) = broadcast_object_list([min(int(more), MOST_ROUNDS)])  # in a step all processes wait for each other
        if rounds > LEAST_ROUNDS:
            found = compare(parts, device=device, repeats=rounds, warmup=0)
    return Speed(
        {share: found[str(share)] for share in begins},
        found["call"] / num,
        found["drawing"] / num,
        _encoding(conditions.teacher, device),
    )


def _encoding(teacher: Teacher, device: torch.device) -> float:
    if not teacher.spec.text or teacher.encoders_released:
        return 0.0
    prompts = (list(EXAMPLE_PROMPTS) * 8)[:8]
    teacher.encode(prompts)
    return seconds_of(lambda: teacher.encode(prompts), device) / len(prompts)


@dataclass(frozen=True)
class Plan:
    """How a run fits its budget.

    Attributes:
        config: The run, with what the budget decides; the budget itself is used up.
        budget: The budget, as it was given.
        parts: Seconds of each part of the run.
        speed: What was measured.
    """

    config: DistillConfig
    budget: str
    parts: Mapping[str, float]
    speed: Speed

    @property
    def words(self) -> str:
        """What to say of it."""
        config, speed, steps = self.config, self.speed, self.config.max_train_steps
        found = [f"{steps:,} steps of {in_time(speed.step)}"]
        if len(speed.steps) > 1:
            found += [f"{in_time(each)} from step {round(share * steps):,} on" for share, each in speed.steps.items()]
        if config.lr_scheduler != "constant":
            found.append(f"the first {config.lr_warmup_steps:,} of them warm-up")
        if "anchors" in self.parts:
            found.append(f"{config.num_anchors:,} anchors")
        if "prompts" in self.parts and config.num_prompts is not None:
            found.append(f"{config.num_prompts:,} prompts")
        found.append(
            f"a picture every {config.validation_steps:,} and a checkpoint every {config.checkpointing_steps:,}"
        )
        parts = ", ".join(f"{name} {in_time(seconds)}" for name, seconds in self.parts.items())
        whole = f"about {in_time(sum(self.parts.values()))} in all ({parts})"
        return f"plan for {self.budget}, by the speed of this machine as it is now: {', '.join(found)}; {whole}"


def make_plan(
    config: DistillConfig, teacher: Teacher | None = None, network: nn.Module | None = None
) -> tuple[Plan, Teacher]:
    """Return the plan for a configuration with a budget, and its teacher, loaded if it is no object.

    Raises:
        SettingError: If the budget is too short; says how long the least run takes.
    """
    assert config.budget is not None
    started = time.monotonic()
    resolve_device(config.device)
    prompt_file = with_embedded_prompts(config).prompt_file
    num_prompts = None if prompt_file is None else len(PromptFile(prompt_file.expanduser(), config.prompt_field))
    if teacher is None:
        teacher = configured_teacher(config)
    speed = measure(config, teacher, network)
    speed = replace(speed, opening=time.monotonic() - started)
    if num_processes() > 1:  # each has measured, and all do what one of them finds
        speed = broadcast_object_list([speed])[0]
    return fit(config, speed, num_prompts), teacher


def fit(config: DistillConfig, speed: Speed, in_file: int | None = None) -> Plan:
    """Return what a run of that speed does in its budget; settings that are given are kept, and planned around.

    `in_file` is how many prompts there are; None where there is no file.
    """
    assert config.budget is not None
    budget = seconds_of_budget(config.budget)
    chosen, parts = _sizes(config, speed, budget, in_file)
    if chosen["max_train_steps"] < LEAST_STEPS:
        enough = budget
        while _sizes(config, speed, enough, in_file)[0]["max_train_steps"] < LEAST_STEPS:
            enough *= 1.02
        step = f"a step takes {in_time(speed.step)} on this machine, as it is now"
        pool, todo = "", f"give at least {as_budget(enough)}"
        if "num_anchors" in config.model_fields_set and "anchors" in (
            parts := _sizes(config, speed, enough, in_file)[1]
        ):
            pool = f" with {in_time(parts['anchors'])} for {config.num_anchors:,} anchors"
            todo += f", or lower {named('num_anchors')}"
        why = f"is too short: {step}, and the least run of use, {LEAST_STEPS} steps, {in_time(enough)} in all{pool}"
        raise SettingError("budget", config.budget, why, todo)
    given = {name: getattr(config, name) for name in config.model_fields_set}
    return Plan(DistillConfig(**{**chosen, **given, "budget": None}), config.budget, parts, speed)


def _sizes(
    config: DistillConfig, speed: Speed, budget: float, in_file: int | None
) -> tuple[dict[str, int], dict[str, float]]:
    """Return (settings, seconds of each part) of a run of so many seconds; its steps may be too few, or below 0."""
    rows, accumulated = rows_of(config, config.train_batch_size), config.gradient_accumulation_steps
    num, images = num_processes(), config.train_batch_size * accumulated * num_processes()
    shown = config.num_validation_images * (config.num_teacher_steps * speed.call + NUM_PICTURES * speed.drawing)
    parts = {"opening and export": 2 * speed.opening, "watching": WATCHING_SHARE * budget + shown}
    left, chosen = budget - sum(parts.values()), dict[str, int]()
    if speed.encoding:
        most = min(in_file or MOST_STEPS, config.num_prompts or MOST_STEPS, max(left, 0) / speed.step * images)
        if config.num_prompts is None and most * speed.encoding > ENCODING_SHARE * left:
            most = chosen["num_prompts"] = max(1, int(ENCODING_SHARE * left / speed.encoding))
        parts["prompts"] = most * speed.encoding
        left -= parts["prompts"]
    if Anchors in rows:
        item = Anchors.cost(config, config.train_batch_size).teacher_per_item * speed.call / num
        drawn = rows[Anchors] * accumulated * num  # by a step
        if "num_anchors" not in config.model_fields_set:
            # As many as rows are drawn are enough: then the rest of their time goes to steps.
            anchors = min(POOL_SHARE * left / item, drawn * left / (speed.step + drawn * item), MOST_STEPS)
            chosen["num_anchors"] = max(1, int(anchors))
        parts["anchors"] = item * chosen.get("num_anchors", config.num_anchors)
        left -= parts["anchors"]
    parts["steps"] = left
    steps = min(int(left / speed.step), MOST_STEPS)
    between = min(max(budget / NUM_PICTURES, LEAST_BETWEEN), MOST_BETWEEN) / speed.step
    chosen |= {
        "max_train_steps": steps,
        "lr_warmup_steps": usual_warmup(steps),
        "checkpointing_steps": max(1, min(steps, round(between))),
        "validation_steps": max(1, -(-steps // NUM_PICTURES)),
    }
    return chosen, parts


def planned_run(config: DistillConfig, teacher: Teacher | None = None, network: nn.Module | None = None) -> Run:
    """Return a run as `build_run`, of the length that its budget allows, if it has one; nothing is written.

    A run that goes on keeps the plan in its folder, and nothing is measured.
    """
    check_output_dir(config.output_dir, resuming=config.resume_from_checkpoint is not None)
    config, begun = _begun(hub.addressed(config, config.output_dir))
    said = (f"the student will be uploaded to {hub.destination(config)}",) if config.push_to_hub else ()
    if config.budget is None:
        run = build_run(config, teacher, network)
        return replace(run, budget=begun, messages=(*said, *run.messages))
    found, teacher = make_plan(config, teacher, network)
    run = build_run(found.config, teacher, network)
    return replace(run, budget=found.budget, messages=(*said, found.words, *run.messages))


def _begun(config: DistillConfig) -> tuple[DistillConfig, str | None]:
    """Return (the configuration with the plan of the run that it goes on with, that run's budget if it has one)."""
    folder = RunFolder(config.output_dir)
    if config.resume_from_checkpoint is None or not (folder.path / CONFIG_FILE).is_file():
        return config, None
    begun = None if folder.facts is None else folder.facts.budget
    if config.budget is None:
        return config, begun
    if begun is None or seconds_of_budget(begun) != seconds_of_budget(config.budget):
        was, steps = f"was begun {'without one' if begun is None else f'with {begun}'}", folder.config.max_train_steps
        todo = "leave it out to go on"
        todo += f"; {named('max_train_steps')} above {steps:,} makes it longer" if can_be_longer(folder.config) else ""
        raise SettingError("budget", config.budget, f"the run in {config.output_dir} {was}", todo)
    given = {name: getattr(config, name) for name in config.model_fields_set}
    plan = {name: getattr(folder.config, name) for name in PLANNED}
    return DistillConfig(**{**plan, **given, "budget": None}), begun
