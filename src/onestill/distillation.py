"""A whole run: check everything, train, export."""

from __future__ import annotations

import copy
import json
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from onestill import card
from onestill.chain import BaseStudent, choose_base
from onestill.chain import messages as chain_messages
from onestill.checkpoint import Checkpoint
from onestill.checks import (
    CONFIG_FILE,
    PIPELINE_FOLDER,
    TEACHER_FILE,
    check_device,
    check_output_dir,
    check_start,
    check_times,
    check_tracker,
    check_writable,
    find_resume,
    make_output_dir,
)
from onestill.conditions import Conditions, LabelConditions, check_labels
from onestill.config import CALL_ARGUMENTS, DistillConfig, make_config, write_yaml
from onestill.export import export_student
from onestill.lora import Lora, has_loader
from onestill.prompt_cache import default_cache_dir
from onestill.prompt_plan import PromptPlan, plan_prompts, refuse_prompts, use_negative_prompt
from onestill.student import Student
from onestill.teachers.base import NetworkTeacher, Teacher, Threshold
from onestill.teachers.guidance import Guided, Thresholded
from onestill.teachers.load import EMBEDDED, load_teacher, with_t_max
from onestill.teachers.pipeline import PipelineTeacher
from onestill.trainer import StepLog, Trainer

PYTHON_OBJECT = "python object"


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    Attributes:
        output_dir: The run's folder.
        step: The last step done.
        pipeline: The exported folder, or None if the run was stopped before its end or only checked.
        checkpoint: The newest checkpoint.
        export_error: Largest difference between the exported folder and the student.
        stopped_by: Number of the signal that stopped the run, if one did.
        num_trained: Steps done by this call; 0 of a run that had been finished before, which is left as it was.
    """

    output_dir: Path
    step: int = 0
    pipeline: Path | None = None
    checkpoint: Path | None = None
    export_error: float | None = None
    stopped_by: int | None = None
    num_trained: int = 0


@dataclass(frozen=True)
class Prepared:
    """A run whose every setting has been checked, before anything is written."""

    config: DistillConfig
    base: NetworkTeacher
    teacher: Teacher
    conditions: Conditions
    student: Student
    fingerprint: str
    resume: tuple[Path, Checkpoint] | None
    messages: tuple[str, ...]
    prompts: PromptPlan | None = None
    base_student: BaseStudent | None = None


def distill(
    teacher: str | Path | NetworkTeacher,
    output_dir: str | Path,
    *,
    config_file: str | Path | None = None,
    network: nn.Module | None = None,
    dry_run: bool = False,
    show_progress: bool = True,
    on_step: Callable[[StepLog], None] | None = None,
    **settings: Any,
) -> RunResult:
    """Distil a teacher into a one-step student and export it to `output_dir`/pipeline.

    Args:
        teacher: A pipeline folder, a hub id, an embedded teacher's name, or a teacher object.
        output_dir: Folder of the run.
        config_file: YAML file of settings; `settings` win over it.
        network: A module to train as the student, for teachers that are plain callables.
        dry_run: Check everything, write nothing, train nothing.
        show_progress: Print progress to standard error.
        on_step: Called after each optimiser step.
        **settings: Fields of `onestill.DistillConfig`; an unknown name is refused.

    Returns:
        What the run left behind.

    Raises:
        ValueError: If any input is unusable; nothing has been written then.
        NonFiniteLossError: If the loss stays non-finite; names the last good checkpoint.
    """
    given = {**settings, "output_dir": Path(output_dir)}
    if isinstance(teacher, NetworkTeacher):
        given |= _facts_of(teacher, given)
    else:
        given["teacher"] = _absolute(str(teacher))
    config = make_config(given, Path(config_file) if config_file else None)
    prepared = prepare(config, teacher if isinstance(teacher, NetworkTeacher) else None, network)
    if show_progress:
        for message in prepared.messages:
            print(message, file=sys.stderr)
    return RunResult(config.output_dir) if dry_run else run(prepared, show_progress=show_progress, on_step=on_step)


def _facts_of(teacher: NetworkTeacher, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the run's configuration must say of a teacher object, so that it can be opened again.

    Raises:
        ValueError: If the settings name another null class than the object has, or other arguments of its call.
    """
    spec = teacher.spec
    if given.get("null_class") not in (None, spec.null_class):
        raise ValueError(
            f"--null_class {given['null_class']} was given with a teacher object whose null class is {spec.null_class}; "
            "name it where the object is made: load_teacher or module_teacher"
        )
    asked = teacher.family.asked if isinstance(teacher, PipelineTeacher) else {}
    for name in CALL_ARGUMENTS:
        if given.get(name) not in (None, asked.get(name)):
            raise ValueError(
                f"--{name} {given[name]} was given with a teacher object; name it where the object is made: "
                "load_teacher(..., arguments={...})"
            )
    if others := sorted(set(asked) - set(CALL_ARGUMENTS)):
        raise ValueError(
            f"the teacher object was loaded with the argument {others[0]} = {asked[others[0]]}, which a run cannot record, so "
            f"that it could not be opened again; it records {', '.join(CALL_ARGUMENTS)}"
        )
    t_max = spec.t_max if given.get("t_max") is None else given["t_max"]
    facts = {"teacher": spec.source or PYTHON_OBJECT, "null_class": spec.null_class, "t_max": t_max}
    return {**facts, **{name: asked.get(name) for name in CALL_ARGUMENTS}}


def configured_teacher(config: DistillConfig, *, device: str = "cpu", local_files_only: bool = False) -> NetworkTeacher:
    """Return the teacher that a configuration names, loaded as it says; ValueError if it cannot be."""
    return load_teacher(
        config.teacher,
        revision=config.revision,
        variant=config.variant,
        cache_dir=config.cache_dir,
        local_files_only=config.local_files_only or local_files_only,
        null_class=config.null_class,
        t_max=config.t_max,
        arguments=config.call_arguments,
        device=device,
    )


def _absolute(teacher: str) -> str:
    """Return a folder's path so that the run can be opened from anywhere; names and hub ids as they are."""
    is_folder = teacher not in EMBEDDED and Path(teacher).expanduser().is_dir()
    return str(Path(teacher).expanduser().resolve()) if is_folder else teacher


def prepare(config: DistillConfig, teacher: NetworkTeacher | None = None, network: nn.Module | None = None) -> Prepared:
    """Check every setting against the machine, the teacher and the output folder; write nothing.

    Raises:
        ValueError: If anything does not fit, saying what and which flag.
    """
    config = with_embedded_prompts(config)
    check_device(config.device)
    check_tracker(config.report_to)
    check_output_dir(config.output_dir, resuming=config.resume_from_checkpoint is not None)
    # Its null condition and its pictures may be replaced here, and the caller's stay.
    base = copy.copy(teacher) if teacher is not None else configured_teacher(config)
    if teacher is not None and config.t_max not in (None, teacher.spec.t_max):
        base = with_t_max(base, config.t_max)
    base_student = choose_base(base, config.base_student, config.noise_level)
    if base_student is not None:
        config = _with_picture(config, base)
    check_times(config, base)
    check_start(base)
    guided = config.guidance_scale != 1 or config.guidance_range is not None
    use_negative_prompt(base, config.negative_prompt, acts=guided or config.empty_prompt_fraction > 0)
    fitted = fit_teacher(base, config)
    labels = check_labels(config.class_labels, base.spec)
    prompts = choose_prompts(config, base, base_student)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # the new layers start from random numbers too
        student = make_student(base, config, network)
    if config.gradient_checkpointing and not hasattr(student.network, "enable_gradient_checkpointing"):
        raise ValueError(f"--gradient_checkpointing: {type(student.network).__name__} has no support for it")
    fingerprint = base.fingerprint()
    resume, messages = find_resume(config, fingerprint, prompts.fingerprint if prompts else "")
    if config.lora_rank is not None and not has_loader(base):
        messages += (
            "--lora_rank: the teacher's pipeline takes no LoRA files, so the merged student alone is exported",
        )
    if prompts is None:
        labelled = LabelConditions(labels, config.guidance_range)
        return Prepared(config, base, fitted, labelled, student, fingerprint, resume, messages)
    said = (*messages, *prompts.messages, *(() if base_student is None else chain_messages(base_student, base)))
    return Prepared(config, base, fitted, prompts.conditions, student, fingerprint, resume, said, prompts, base_student)


def with_embedded_prompts(config: DistillConfig) -> DistillConfig:
    """Return the configuration with an embedded text teacher's own prompts, where none are named."""
    embedded = EMBEDDED.get(config.teacher)
    if embedded is None or embedded.prompts is None or config.prompt_file is not None:
        return config
    return config.model_copy(update={"prompt_file": embedded.prompts})


def _with_picture(config: DistillConfig, teacher: NetworkTeacher) -> DistillConfig:
    """Return the configuration with the noise level of the pictures, and their student's path from anywhere."""
    assert isinstance(teacher, PipelineTeacher) and config.base_student is not None
    where = config.base_student.expanduser().resolve()
    return config.model_copy(update={"base_student": where, "noise_level": teacher.picture.level})


def choose_prompts(
    config: DistillConfig, teacher: NetworkTeacher, base_student: BaseStudent | None = None
) -> PromptPlan | None:
    """Return the prompts of a run, or None for a teacher that takes no text, whose run must not name any."""
    if not teacher.spec.text:
        refuse_prompts(config)
        return None
    if config.prompt_cache_dir is not None and config.prompt_cache_dir.is_file():
        raise ValueError(f"--prompt_cache_dir {config.prompt_cache_dir} is a file")
    check_writable((config.prompt_cache_dir or default_cache_dir()).expanduser(), "prompt_cache_dir")
    return plan_prompts(config, teacher, int(os.environ.get("WORLD_SIZE", 1)), base_student)


def make_student(base: NetworkTeacher, config: DistillConfig, network: nn.Module | None = None) -> Student:
    """Return the untrained student that the configuration says."""
    lora = None
    if config.lora_rank is not None:
        lora = Lora(config.lora_rank, config.lora_alpha, config.lora_target_modules)
    return Student(base, guidance_range=config.guidance_range, network=network, lora=lora)


def fit_teacher(base: Teacher, config: DistillConfig, guidance_scale: float | None = None) -> Teacher:
    """Return the teacher guided and thresholded as the configuration says, or at another fixed guidance scale."""
    if guidance_scale is None:
        guided = Guided(base, config.guidance_scale, drawn=config.guidance_range is not None)
    else:
        guided = Guided(base, guidance_scale)
    threshold = base.spec.threshold
    if config.thresholding != "teacher":
        threshold = Threshold(config.thresholding, config.threshold_limit, config.threshold_ratio)
    return guided if threshold.mode == "none" else Thresholded(guided, threshold)


def run(
    prepared: Prepared, *, show_progress: bool = True, on_step: Callable[[StepLog], None] | None = None
) -> RunResult:
    """Train a prepared run to its end, or until SIGINT or SIGTERM, and export it."""
    config = prepared.config
    trainer = make_trainer(prepared, show_progress=show_progress)
    if trainer.accelerator.is_main_process:
        make_output_dir(config.output_dir)
        write_yaml(config, config.output_dir / CONFIG_FILE)
        facts = {"fingerprint": prepared.fingerprint, "teacher": config.teacher}
        if prepared.base_student is not None:
            facts["base_student"] = prepared.base_student.fingerprint
        (config.output_dir / TEACHER_FILE).write_text(json.dumps(facts) + "\n", encoding="utf-8")
    if config.report_to:
        trainer.accelerator.init_trackers(config.tracker_project_name)
    checkpoint = None
    if prepared.resume is not None:
        checkpoint = trainer.last_checkpoint = prepared.resume[0]
        trainer.restore(prepared.resume[1])
    else:
        trainer.cut_log()
    first, started = trainer.progress.step, time.monotonic()
    if first == config.max_train_steps and (config.output_dir / PIPELINE_FOLDER).is_dir():
        return RunResult(config.output_dir, first, config.output_dir / PIPELINE_FOLDER, checkpoint)
    with _stopping(trainer) as signals:
        if config.num_anchor_rows:
            with _bar(trainer, show_progress, "making anchors", config.num_anchors, unit="anchor") as bar:
                for num in trainer.make_anchors():
                    bar.update(num)
        with _bar(trainer, show_progress, "distilling", config.max_train_steps, first) as bar:
            for log in trainer.steps():
                checkpoint = log.checkpoint or checkpoint
                bar.update()
                if log.step % 10 == 0 or log.picture:
                    bar.set_postfix(loss=f"{log.loss:.4g}", refresh=False)
                if on_step is not None:
                    on_step(log)
        if trainer.stop_requested and trainer.progress.step < config.max_train_steps:
            checkpoint = trainer.save()
    seconds = time.monotonic() - started
    if config.report_to:
        trainer.accelerator.end_training()
    trained = trainer.progress.step - first
    if trainer.progress.step < config.max_train_steps:
        # The signal may have reached another process of this run only.
        stopped_by = signals[0] if signals else int(signal.SIGTERM)
        return RunResult(
            config.output_dir,
            trainer.progress.step,
            checkpoint=checkpoint,
            stopped_by=stopped_by,
            num_trained=trained,
        )
    return _finish(trainer, prepared, checkpoint, trained, seconds)


def make_trainer(prepared: Prepared, *, show_progress: bool = False) -> Trainer:
    """Return the trainer of a prepared run; its prompts are encoded then, and their encoders are gone.

    Raises:
        PromptCacheError: If the encoded prompts cannot be written.
    """
    trainer = Trainer(
        prepared.config,
        prepared.teacher,
        prepared.student,
        prepared.conditions,
        prepared.fingerprint,
        prompts_fingerprint=prepared.prompts.fingerprint if prepared.prompts else "",
    )
    prepared.base.to(trainer.device)
    if prepared.base_student is not None:
        prepared.base_student.teacher.to(trainer.device)
    if prepared.prompts is not None:
        accelerator = trainer.accelerator
        # One process of each machine encodes; the others then find everything in the cache.
        with accelerator.local_main_process_first():
            prepared.prompts.encode(show_progress=show_progress and accelerator.is_local_main_process)
    return trainer


def _finish(trainer: Trainer, prepared: Prepared, checkpoint: Path | None, num_steps: int, seconds: float) -> RunResult:
    config, folder = prepared.config, prepared.config.output_dir / PIPELINE_FOLDER
    error = None
    # Takes accelerate's mixed precision off the student: what is exported is compared in full precision.
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    if trainer.accelerator.is_main_process:
        with trainer.averaged():
            error = export_student(
                prepared.student,
                folder,
                t=config.t_min,
                facts=card_facts(prepared, num_steps, seconds),
                overwrite=True,
            )
    trainer.accelerator.wait_for_everyone()
    return RunResult(config.output_dir, config.max_train_steps, folder, checkpoint, error, num_trained=num_steps)


def card_facts(prepared: Prepared, num_steps: int, seconds: float) -> card.Facts:
    """Return what the model card says of a run."""
    config = prepared.config
    images = config.train_batch_size * config.gradient_accumulation_steps
    device = next(prepared.student.parameters()).device
    hardware = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    training = f"{config.max_train_steps:,} steps of {images:,} images, {num_steps:,} of them in {seconds / 60:.1f} minutes on {hardware}, seed {config.seed}"
    settings = f"{config.time_sampling} times, delta {config.delta:g}, {config.solver} targets, learning rate {config.learning_rate:g}"
    return card.Facts(guidance=guidance_words(config), training=training, settings=settings)


def guidance_words(config: DistillConfig, guidance_scale: float | None = None) -> str:
    """Return what guidance an exported student has, for its card."""
    if config.guidance_range is None:
        return f"w = {config.guidance_scale:g}" if config.guidance_scale != 1 else "none"
    low, high = config.guidance_range
    w = (low + high) / 2 if guidance_scale is None else guidance_scale
    return f"w = {w:g}, of a student trained on {low:g} to {high:g}"


@contextmanager
def _stopping(trainer: Trainer) -> Iterator[list[int]]:
    """Turn SIGINT and SIGTERM into a stop after the current step; yield the list of those received."""
    received: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        trainer.stop_requested = True

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def _bar(trainer: Trainer, show: bool, name: str, total: int, initial: int = 0, unit: str = "step") -> Iterator[Any]:
    hidden = not show or not trainer.accelerator.is_main_process
    with tqdm(
        total=total,
        initial=initial,
        disable=hidden,
        desc=name,
        unit=unit,
        dynamic_ncols=True,
        # One line in ten seconds where the bar cannot redraw itself, such as in a log file.
        mininterval=0.5 if sys.stderr.isatty() else 10,
    ) as bar:
        yield bar
