"""A whole run: built, trained, exported."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import chain, count, groupby
from operator import itemgetter
from pathlib import Path
from types import FrameType
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from onestill.core.arguments import checked
from onestill.core.devices import hardware
from onestill.core.errors import as_arguments, named
from onestill.core.reading import loading
from onestill.core.settings import MOST_STEPS, write_yaml
from onestill.core.writing import write_text
from onestill.data.conditions import VALIDATION_SEED
from onestill.data.prompts import PromptFile
from onestill.evaluation.held_out import HeldOut
from onestill.evaluation.report import package_versions
from onestill.export.export import ExportError, export_student
from onestill.objectives.registry import objectives_of
from onestill.runs import hub
from onestill.runs.build import Run, chosen_threshold, configure
from onestill.runs.folder import (
    CONFIG_FILE,
    EVALUATION_FOLDER,
    PIPELINE_FOLDER,
    TEACHER_FILE,
    RunFacts,
    make_output_dir,
    removed_if_nothing_came,
)
from onestill.runs.memory import going_on
from onestill.runs.plan import planned_run
from onestill.runs.rehearsal import rehearse
from onestill.runs.resume import can_be_longer
from onestill.runs.run_page import write_run_page
from onestill.students import model_card as card
from onestill.teachers.base import Teacher
from onestill.teachers.load import EMBEDDED
from onestill.training.config import DistillConfig
from onestill.training.distance import Distance, Verdict
from onestill.training.recipes import LONGEST, as_budget, seconds_of_budget
from onestill.training.trainer import Trainer
from onestill.training.watch import StepLog

MANY_ANCHORS = 1.0
"""The share of anchors that is advised where there are few."""
LEAST_SECONDS, OF_THE_RUN = 3.0, 0.01
"""How long the teacher's few steps may take at the end: so many seconds, or this share of the run."""


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
        hub_url: Where it has been uploaded to, if it was to be; else `upload_error` says why not, and how it is still.
        distance: How far the student is from its teacher; None if nothing was trained, or another process knows.
        ema_width: The relative width of the average that is exported; 0 for the last weights themselves.
        ema_distances: Of several widths, how far the average of each was from the teacher on held-out noise.
        verdict: How good it is by held-out samples beside its teacher's few steps; None if that was not measured.
        unjudged: Why not.
        advice: The setting that helps most from here, with a value; may mention settings by `named`.
    """

    output_dir: Path
    step: int = 0
    pipeline: Path | None = None
    checkpoint: Path | None = None
    export_error: float | None = None
    stopped_by: int | None = None
    num_trained: int = 0
    hub_url: str = ""
    upload_error: str = ""
    distance: Distance | None = None
    ema_width: float = 0.0
    ema_distances: Mapping[float, float] = field(default_factory=dict)
    verdict: Verdict | None = None
    unjudged: str = ""
    advice: str = ""

    def closing(self) -> tuple[str, ...]:
        """Return the last words about a finished run, a line each: how far it came, and what would take it further."""
        if self.export_error is None:
            return ()  # of a run that has not ended, or ended before; or another process has exported, and says so
        of_others = [f"{width:g} ({found:.4g})" for width, found in self.ema_distances.items()]
        chosen = f"average: width {self.ema_width:g}, of {', '.join(of_others)} from the teacher on held-out noise"
        average = (chosen,) if of_others else ()
        if self.distance is None:
            return *average, "distance: not measured, since nothing was left to train; onestill evaluate measures it"
        judged = f"quality: {self.verdict or f'not measured during the run: {self.unjudged}'}"
        return *average, judged, f"distance: {self.distance}", f"what helps most from here: {self.advice}"


@checked(DistillConfig)
def distill(
    teacher: str | Path | Teacher,
    output_dir: str | Path,
    *,
    config_file: str | Path | None = None,
    network: nn.Module | None = None,
    dry_run: bool = False,
    show_progress: bool = True,
    on_step: Callable[[StepLog], None] | None = None,
    say: Callable[[str], None] | None = None,
    **settings: Any,
) -> RunResult:
    """Distil a teacher into a one-step student and export it to `output_dir`/pipeline.

    Args:
        teacher: A pipeline folder, a hub id, an embedded teacher's name, or a teacher object.
        output_dir: Folder of the run.
        config_file: YAML file of settings, or the name of a shipped one; `settings` win over it.
        network: A module to train as the student, for teachers that are plain callables.
        dry_run: Check everything, write nothing, train nothing.
        show_progress: Print progress to standard error.
        on_step: Called after each optimiser step.
        say: Called with what would be printed to standard error, but for the bars; settings are marked in it.
        **settings: Fields of `onestill.DistillConfig`; an unknown name is refused.

    Raises:
        ValueError: If any input is unusable; nothing has been written then.
        NonFiniteLossError: If the loss stays non-finite; names the last good checkpoint.
        RunError: If memory or disk is not enough, or the export or the upload fails; what was saved is kept.
    """
    config = configure(teacher, {**settings, "output_dir": Path(output_dir)}, config_file)
    run = planned_run(config, teacher if isinstance(teacher, Teacher) else None, network)
    messages = (*run.messages, *rehearse(run))
    say = say or print_message
    for message in messages if show_progress else ():
        say(message)
    if dry_run:
        return RunResult(config.output_dir)
    hub.create(run.config)
    result = carry_out(run, show_progress=show_progress, on_step=on_step)
    for message in result.closing() if show_progress else ():
        say(message)
    hub.raise_failed(result.upload_error)
    return result


def print_message(message: str) -> None:
    """Print a message to standard error, with its settings as Python spells them."""
    print(as_arguments(message), file=sys.stderr)


def carry_out(run: Run, *, show_progress: bool = True, on_step: Callable[[StepLog], None] | None = None) -> RunResult:
    """Train a run to its end, or until SIGINT or SIGTERM, and export it; RunError if it cannot go on."""
    with going_on(run), removed_if_nothing_came(run.config.output_dir):
        return _carried_out(run, show_progress, on_step)


def _carried_out(run: Run, show_progress: bool, on_step: Callable[[StepLog], None] | None) -> RunResult:
    config, steps, pipeline = run.config, run.config.max_train_steps, run.config.output_dir / PIPELINE_FOLDER
    trainer = make_trainer(run, show_progress=show_progress)
    checkpoint = _begin(run, trainer)
    first, started = trainer.progress.step, time.monotonic()
    if first == steps and pipeline.is_dir():
        return RunResult(config.output_dir, first, pipeline, checkpoint, **hub.tried(trainer, pipeline))
    with _stopping(trainer) as signals:
        _make_pools(trainer, show_progress)
        shows = show_progress and not trainer.stop_requested
        with _bar(trainer, shows, desc="distilling", total=steps, initial=first, unit="step") as bar:
            for log in trainer.steps():
                checkpoint = log.checkpoint or checkpoint
                if log.validation_rms is not None:
                    _show(trainer)
                bar.update()
                if log.step % 10 == 0 or log.picture:
                    judged = {} if (now := trainer.watch.verdict) is None else {"held_out": f"{now.student[1]:.3g}"}
                    bar.set_postfix(loss=f"{log.loss:.4g}", **judged, refresh=False)
                if on_step is not None:
                    on_step(log)
        if trainer.stop_requested and trainer.progress.step < steps:
            checkpoint = trainer.save()
    seconds = time.monotonic() - started
    if config.report_to:
        trainer.accelerator.end_training()
    step = trainer.progress.step
    if step < steps:
        # The signal may have reached another process of this run only.
        stopped_by = signals[0] if signals else int(signal.SIGTERM)
        return RunResult(config.output_dir, step, None, checkpoint, stopped_by=stopped_by, num_trained=step - first)
    return _finish(trainer, run, checkpoint, step - first, seconds)


def _show(trainer: Trainer) -> None:
    """Rewrite the run's page, with student and teacher as they were last drawn."""
    if trainer.config.report and trainer.accelerator.is_main_process:
        shown = trainer.watch.shown
        words, students = trainer.conditions.captions, list(shown)[1:]
        write_run_page(trainer.config.output_dir, shown, words, students=students, first=VALIDATION_SEED)


def _begin(run: Run, trainer: Trainer) -> Path | None:
    """Write what a run is, and go on from its checkpoint if it has one, whose folder is returned."""
    config = run.config
    if trainer.accelerator.is_main_process:
        make_output_dir(config.output_dir)
        here = config.output_dir.absolute()
        kept = config.model_copy(update={"output_dir": here, "resume_from_checkpoint": None})
        write_yaml(kept, here / CONFIG_FILE)
        base = None if run.first_stage is None else run.first_stage.fingerprint
        facts = RunFacts(
            fingerprint=run.fingerprints.teacher,
            teacher=config.teacher,
            base_student=base,
            budget=run.budget,
            hardware=hardware(trainer.device),
            versions=package_versions(),
        )
        write_text(config.output_dir / TEACHER_FILE, facts.model_dump_json(exclude_none=True) + "\n")
    if config.report_to:
        trainer.accelerator.init_trackers(config.tracker_project_name)
    if run.resume is None:
        trainer.forget_after(0)
        return None
    trainer.last_checkpoint, checkpoint = run.resume
    with loading(f"checkpoint {trainer.last_checkpoint}"):
        trainer.restore(checkpoint)
    if trainer.accelerator.is_main_process:
        _put_aside(config, checkpoint.values["config"]["max_train_steps"])
    return trainer.last_checkpoint


def _put_aside(config: DistillConfig, begun_with: int) -> None:
    """Give the export of a run that becomes longer, and what was measured of it, other names: theirs are the whole run's."""
    for name in (PIPELINE_FOLDER, EVALUATION_FOLDER):
        if begun_with != config.max_train_steps and (config.output_dir / name).is_dir():
            kept = (config.output_dir / f"{name}-{begun_with}{end}" for end in chain([""], map("-{}".format, count(2))))
            (config.output_dir / name).rename(next(place for place in kept if not place.exists()))


def _make_pools(trainer: Trainer, show_progress: bool) -> None:
    """Make what the objectives need before the first step, a bar for each."""
    for objective, items in groupby(trainer.prepare(), key=itemgetter(0)):
        total = objective.cost(trainer.config, trainer.config.train_batch_size).pool
        with _bar(trainer, show_progress, desc=f"making {objective.name}", total=total, unit=objective.unit) as bar:
            for _, num in items:
                bar.update(num)


def make_trainer(run: Run, *, show_progress: bool = False) -> Trainer:
    """Return the trainer of a run; its prompts are encoded then, and their encoders are gone."""
    trainer = Trainer(run.config, run.student, run.conditions, run.fingerprints)
    trainer.watch.judge = HeldOut(run.student, run.conditions, run.config, trainer.device)
    run.teacher.to(trainer.device)
    if run.first_stage is not None:
        run.first_stage.teacher.to(trainer.device)
    accelerator = trainer.accelerator
    if run.prompts is not None:
        # One process of each machine encodes; the others then find everything in the cache.
        with accelerator.local_main_process_first():
            run.prompts.encode(show_progress=show_progress and accelerator.is_local_main_process)
    return trainer


def _finish(trainer: Trainer, run: Run, checkpoint: Path | None, num_steps: int, seconds: float) -> RunResult:
    config, folder = run.config, run.config.output_dir / PIPELINE_FOLDER
    error, distance, verdict = None, None, trainer.watch.verdict
    if trainer.accelerator.is_main_process:
        distance = trainer.distance(max(LEAST_SECONDS, OF_THE_RUN * seconds))
    # Takes accelerate's mixed precision off the student: what is exported is compared in full precision.
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    if trainer.accelerator.is_main_process:
        with trainer.averaged():
            facts = card_facts(run, num_steps, seconds, trainer.ema_width)
            facts = replace(facts, quality=f"{verdict or ''}")
            try:
                how: dict[str, Any] = {"facts": facts, "overwrite": True, "pictures": config.push_to_hub}
                error = export_student(run.student, folder, t=config.t_min, **how)
            except ExportError as failed:
                raise ExportError(f"{failed.text}; the trained student is kept in {checkpoint}") from failed
        _show(trainer)
    trainer.accelerator.wait_for_everyone()
    judge = trainer.watch.judge
    return RunResult(
        config.output_dir,
        config.max_train_steps,
        folder,
        checkpoint,
        error,
        num_trained=num_steps,
        distance=distance,
        ema_width=trainer.ema_width,
        ema_distances=trainer.ema_distances,
        verdict=verdict,
        unjudged=judge.why if isinstance(judge, HeldOut) else "",
        advice=what_helps(config, is_falling=verdict is not None and verdict.is_falling, budget=run.budget),
        **hub.tried(trainer, folder),
    )


def what_helps(config: DistillConfig, *, is_falling: bool = False, budget: str | None = None) -> str:
    """Return the setting that would bring a student nearer to its teacher, with a value; mentions it by `named`.

    Anchors where there are few, since errors of the bootstrap add up along the trajectory; else more steps, and so
    where the distance is falling still.
    """
    if config.recipe == "boot" and not config.anchor_fraction and not is_falling:
        return f"{named('recipe')} default, in a new run"
    more = {**config.model_dump(), "anchor_fraction": MANY_ANCHORS}
    with suppress(ValueError):  # a batch may be too small for them
        if not is_falling and config.anchor_fraction < MANY_ANCHORS / 2 and DistillConfig.model_validate(more):
            return f"{named('anchor_fraction')} {MANY_ANCHORS:g}, in a new run"
    if budget is not None:
        return f"{named('budget')} {as_budget(min(2 * seconds_of_budget(budget), LONGEST))}, in a new run"
    longer = f"{named('max_train_steps')} {min(2 * config.max_train_steps, MOST_STEPS)}"
    return longer if can_be_longer(config) else f"{longer}, in a new run"


def card_facts(run: Run, num_steps: int, seconds: float, ema_width: float) -> card.Facts:
    """Return what the model card says of a run whose average of a relative width is exported."""
    config = run.config
    images = config.train_batch_size * config.gradient_accumulation_steps
    place = hardware(next(run.student.parameters()).device)
    now = f"{num_steps:,} of them in {seconds / 60:.1f} minutes on {place}"
    training = f"{config.max_train_steps:,} steps of {images:,} images, {now}, seed {config.seed}"
    kinds = objectives_of(config, config.train_batch_size)
    parts = [said for kind in kinds if (said := kind.in_words(config))]
    settings = f"{'; '.join(parts)}; learning rate {config.learning_rate:g}, {in_words(ema_width)}"
    return replace(distilled_facts(config, run.teacher), training=training, settings=settings)


def in_words(ema_width: float) -> str:
    """Return which weights are exported."""
    return f"average of relative width {ema_width:g} of the weights" if ema_width else "the last weights"


def distilled_facts(config: DistillConfig, teacher: Teacher, guidance_scale: float | None = None) -> card.Facts:
    """Return what was distilled into an exported student, for its card: guidance, labels, thresholding."""
    w, trained = config.guidance_scale, ""
    if config.guidance_range is not None:
        low, high = config.guidance_range
        w = (low + high) / 2 if guidance_scale is None else guidance_scale
        trained = f", of a student trained on {low:g} to {high:g}"
    if teacher.guidance_input is not None:
        usual = f"leave the call's guidance_scale at its default, {teacher.usual_guidance:g}"
        words = f"embedded guidance {w:g}, an input of the teacher's network{trained}; {usual}"
    else:
        away = "" if config.negative_prompt is None else f", away from the negative prompt {config.negative_prompt!r}"
        words = f"w = {w:g} in u + w (c - u){away}{trained}" if w != 1 or away or trained else "none"
    if (interval := config.guidance_interval) is not None:
        words += f"; at {interval[0]:g} < t <= {interval[1]:g} alone (0 clean, 1 noise)"
    threshold, embedded = chosen_threshold(config), EMBEDDED.get(config.teacher)
    said = card.Distilled(
        *(w, config.negative_prompt),
        class_labels=config.class_labels,
        threshold=threshold,
        guidance_interval=interval,
    )
    if embedded is None or embedded.prompts is None or config.prompt_file != embedded.prompts:
        return card.Facts(words, said)  # prompts of the user's own are not shown to others
    return card.Facts(words, said, PromptFile(embedded.prompts)[0])


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


def _bar(trainer: Trainer, show: bool, **settings: Any) -> Any:
    """Return a bar as tqdm makes it of the settings, on the main process alone."""
    # One line in ten seconds where the bar cannot redraw itself, such as in a log file.
    every, hidden = 0.5 if sys.stderr.isatty() else 10, not show or not trainer.accelerator.is_main_process
    return tqdm(disable=hidden, dynamic_ncols=True, mininterval=every, **settings)
