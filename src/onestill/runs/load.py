"""What lies on disk, opened again: a run, an exported folder or a teacher becomes a sampler."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from onestill.core.arguments import checked
from onestill.core.devices import resolve_device
from onestill.core.errors import SettingError, named
from onestill.core.settings import make
from onestill.data.cascade import FirstStage, open_first_stage, with_first_stage
from onestill.runs.build import PYTHON_OBJECT, configured_teacher, make_student, refuse_other_facts
from onestill.runs.folder import CONFIG_FILE, PIPELINE_FOLDER, RunFolder
from onestill.runs.resume import changed_settings, made_longer
from onestill.sampling.config import SamplerSettings
from onestill.sampling.samplers.base import Sampler
from onestill.sampling.samplers.network import StudentSampler, TeacherSampler
from onestill.sampling.samplers.pipeline import enlarges, open_pipeline
from onestill.students.mark import read_mark, refuse_student
from onestill.students.settings import check_steps
from onestill.students.student import Student
from onestill.teachers.base import Teacher
from onestill.teachers.guidance import guided
from onestill.teachers.load import EMBEDDED, load_teacher
from onestill.teachers.pipelines.folder import INDEX
from onestill.training.averages import weights_of
from onestill.training.checkpoint import Checkpoint, Tensors
from onestill.training.config import DistillConfig
from onestill.training.trained import load_parameters


@dataclass(frozen=True)
class LoadedStudent:
    """A student that was found on disk.

    Attributes:
        sampler: Its one step, or its few.
        pipeline: The exported pipeline that draws it; None where the run's own weights do.
        run: The run that it comes from, if that is known.
    """

    sampler: Sampler
    pipeline: Path | None
    run: RunFolder | None

    @property
    def config(self) -> DistillConfig | None:
        """The configuration of its run, if that is known."""
        return None if self.run is None else self.run.config


@checked(SamplerSettings)
def load_sampler(
    student: str | Path | None = None,
    *,
    teacher: str | Path | Teacher | None = None,
    config_file: str | Path | None = None,
    **settings: Any,
) -> Sampler:
    """Return what generates images, opened once for many: a student in one step, or a teacher in many.

    Args:
        student: A run's folder, a checkpoint-N folder, or an exported pipeline. Either this or `teacher`.
        teacher: A teacher, for its multi-step baseline.
        config_file: YAML file of settings; `settings` win over it.
        **settings: Fields of `onestill.sampling.config.SamplerSettings`; an unknown name is refused.

    Raises:
        ValueError: If it does not exist or cannot do this.
    """
    config = make(SamplerSettings, generator(student, teacher, settings), config_file)
    return open_sampler(config, teacher if isinstance(teacher, Teacher) else None)


def generator(
    student: str | Path | None, teacher: str | Path | Teacher | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return settings with the name of a student or of a teacher, which may be an object."""
    name = (teacher.spec.source or PYTHON_OBJECT) if isinstance(teacher, Teacher) else teacher
    given = {"student": student, "teacher": name}
    return {**settings, **{key: str(value) for key, value in given.items() if value is not None}}


def open_sampler(config: SamplerSettings, teacher: Teacher | None = None) -> Sampler:
    """Return the sampler that settings describe; `teacher` is the one that they name, where it is an object."""
    device = resolve_device(config.device)
    if config.student is None:
        return _teacher_sampler(config, teacher, device)
    names = ("target_time", "guidance_scale", "ema_width", "num_inference_steps", "local_files_only", "base_student")
    return load_student(config.student, device=device, **{name: getattr(config, name) for name in names}).sampler


def _teacher_sampler(config: SamplerSettings, teacher: Teacher | None, device: torch.device) -> TeacherSampler:
    """Return a teacher's multi-step sampler, thresholded as its own scheduler does."""
    assert config.teacher is not None
    if teacher is not None:
        refuse_other_facts(teacher, dict(config))
    else:
        offline, label, given = config.local_files_only, config.null_class, config.call_arguments
        teacher = load_teacher(
            config.teacher,
            variant=config.variant,
            original_config=config.original_config,
            local_files_only=offline,
            null_class=label,
            device=str(device),
            arguments=given,
        )
    refuse_student(teacher)
    teacher, first_stage = with_first_stage(teacher, config.base_student, config.noise_level, device=device)
    scale = teacher.usual_guidance if config.guidance_scale is None else config.guidance_scale
    interval = config.guidance_interval
    is_guided = teacher.unguided is not teacher and config.guidance_scale is None and interval is None
    teacher = teacher.with_negative_prompt(config.negative_prompt, acts=is_guided or scale != 1)
    config.check_interval(acts=scale != 1)
    teacher = teacher if is_guided else guided(teacher, scale, interval=interval)
    steps, solver = config.num_inference_steps or 50, config.solver or "ddim"
    return TeacherSampler(teacher, num_steps=steps, solver=solver, device=device, first_stage=first_stage)


def load_student(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    target_time: float = 0.0,
    guidance_scale: float | None = None,
    num_inference_steps: int | None = None,
    ema_width: float | None = None,
    local_files_only: bool = False,
    base_student: str | Path | None = None,
    prefers_weights: bool = False,
) -> LoadedStudent:
    """Return the student in a run's folder, a checkpoint-N folder or an exported pipeline.

    A run's exported pipeline is used where it can be, unless its own weights are preferred; another target time, average,
    the guidance scale of a student that takes one, or another number of steps, one if None, needs the run's checkpoint
    and teacher. `base_student`, or that of the run, draws what is enlarged.
    """
    path, device = Path(path), torch.device(device)
    check_folder(path)
    is_usual = target_time == 0 and guidance_scale is None and ema_width is None
    num_steps = num_inference_steps or 1
    if (path / INDEX).is_file():
        if not is_usual:
            why = "is an exported pipeline, whose target time, guidance and average are baked in"
            raise SettingError("student", path, why, "give the run's folder for others")
        found = _exported(path, path, RunFolder.around(path), device, base_student)
        if num_inference_steps not in (None, found.sampler.num_steps):
            why = f"{path} was exported for {found.sampler.num_steps}, and no other number"
            raise SettingError(
                "num_inference_steps", num_inference_steps, why, "leave it out, or give the run's folder"
            )
        return found
    for folder in (path, path / PIPELINE_FOLDER, path.parent / PIPELINE_FOLDER):
        if (mark := read_mark(folder)) is not None and mark.format == "module":
            todo = f"load it in Python with onestill.load_module({str(folder)!r}, network)"
            raise SettingError("student", path, "is a network of your own", todo)
        if mark is not None and folder == path:
            why, todo = (
                f"was exported as {mark.format}, for other programs",
                "give the run's folder, or draw with it as its README.md says",
            )
            raise SettingError("student", path, why, todo)
    run = RunFolder.of(path)
    if run is None:
        why = f"is neither a run (no {CONFIG_FILE}) nor an exported pipeline (no {INDEX})"
        raise SettingError("student", path, why)
    trained = functools.partial(_trained, run, path, device, local_files_only, base_student, ema_width)
    is_exported = run.path == path and (run.pipeline / INDEX).is_file()
    if is_usual and num_steps == 1 and is_exported and not prefers_weights:
        return _exported(path, run.pipeline, run, device, base_student, trained)
    return LoadedStudent(trained(target_time, guidance_scale, num_steps), None, run)


def check_folder(student: str | Path) -> None:
    """Raise SettingError if there is no such folder."""
    if not Path(student).is_dir():
        if str(student) in EMBEDDED:
            why = f"is a teacher, of many steps; {named('teacher')} {student} draws with it"
            raise SettingError("student", str(student), why)
        todo = f"give a run ({named('output_dir')} of distill) or an exported pipeline"
        raise SettingError("student", str(student), "no such folder", todo)


def _exported(
    path: Path,
    pipeline: Path,
    run: RunFolder | None,
    device: torch.device,
    base_student: str | Path | None,
    trained: Callable[[], Sampler] | None = None,
) -> LoadedStudent:
    """Return the student in an exported pipeline; `path` is what was given, the pipeline or its run."""
    first_stage = None
    if enlarges(pipeline):
        first_stage = _first_stage_of_pipeline(path, run, base_student).to(device)
    elif base_student is not None:
        raise SettingError("base_student", base_student, f"{path} enlarges no picture", "leave it out")
    said, level = (None, None) if run is None else (run.distilled, run.config.noise_level)
    sampler = open_pipeline(
        pipeline, device, distilled=said, noise_level=level, first_stage=first_stage, trained=trained
    )
    return LoadedStudent(sampler, pipeline, run)


def _trained(
    run: RunFolder,
    path: Path,
    device: torch.device,
    offline: bool,
    base_student: str | Path | None,
    ema_width: float | None,
    target_time: float = 0.0,
    guidance_scale: float | None = None,
    num_inference_steps: int = 1,
) -> StudentSampler:
    """Return the student of a run, or of one of its checkpoints, with its own weights."""
    check_steps(num_inference_steps, target_time, is_map=run.is_map)  # before anything is loaded
    teacher, recorded = run_teacher(run, device, local_files_only=offline), run.config.base_student
    found = base_student if recorded is None else _lies_at(run, recorded, base_student)
    teacher, first_stage = with_first_stage(teacher, found, run.config.noise_level, device=device)
    if first_stage is not None:
        _compare(first_stage, run, base_student)
    return StudentSampler(
        restore_student(run, teacher, path, ema_width).to(device),
        name=f"the student in {path}",
        target_time=target_time,
        guidance_scale=guidance_scale,
        distilled=run.distilled,
        t_min=run.config.t_min,
        device=device,
        first_stage=first_stage,
        num_inference_steps=num_inference_steps,
        is_map=run.is_map,
    )


def run_teacher(run: RunFolder, device: torch.device, *, local_files_only: bool = False) -> Teacher:
    """Return the teacher of a run; ValueError if it was a Python object, is gone, or has changed since."""
    config = run.config
    if config.teacher == PYTHON_OBJECT:
        raise ValueError(
            f"{run.path} was distilled from a Python object, which a folder cannot name; open it in Python"
        )
    teacher = configured_teacher(config, device=str(device), local_files_only=local_files_only)
    if run.facts is not None and run.facts.fingerprint != teacher.fingerprint():
        why = "is not the one it was distilled from: it has changed since"
        raise ValueError(f"{run.path}: the teacher {config.teacher} {why}")
    teacher = teacher.with_negative_prompt(config.negative_prompt)
    return teacher if config.noise_level is None else teacher.with_image_condition(config.noise_level)


def restore_student(
    run: RunFolder, teacher: Teacher, path: Path | None = None, ema_width: float | None = None
) -> Student:
    """Return the student of a run, with the average of a relative width of its weights: that of the run if None.

    Of the checkpoint-N folder that `path` is; of the newest that is whole if it is the run's own folder, or None.
    """
    checkpoint = checkpoint_at(run, path)
    old = checkpoint.values["config"]
    if changes := changed_settings(old, made_longer(run.config, old)):
        why = f"does not say what its checkpoint was trained with: {'; '.join(changes)}"
        raise ValueError(f"{run.path / CONFIG_FILE} {why}; put that back")
    student = make_student(teacher, run.config)
    load_parameters(student, weights_of(run.path, checkpoint, ema_width))
    return student


def at_widths(found: LoadedStudent, path: Path, widths: Sequence[float]) -> dict[str, Sampler]:
    """Return the student of a run with averages of several relative widths of its weights, by what a row's name ends in.

    They share one network: each puts its own weights there before it draws.
    """
    first = found.sampler
    if len(widths) < 2 or found.run is None:
        return {f", width {width:g}": first for width in widths} or {"": first}
    assert isinstance(first, StudentSampler)  # of a width that is given
    checkpoint, student = checkpoint_at(found.run, path), first.student
    there = list(widths[:1])

    def put(width: float, weights: Tensors) -> None:
        if there != [width]:
            load_parameters(student, weights)
            there[:] = [width]

    made: dict[str, Sampler] = {}
    for width in widths:
        weights = weights_of(found.run.path, checkpoint, width)
        made[f", width {width:g}"] = first.at(prepare=functools.partial(put, width, weights))
    return made


def checkpoint_at(run: RunFolder, path: Path | None) -> Checkpoint:
    """Return the checkpoint of a run in the checkpoint-N folder `path`; the newest if it is the run's own, or None."""
    return run.checkpoint(None if path in (None, run.path) else path)


def _first_stage_of_pipeline(path: Path, run: RunFolder | None, given: str | Path | None) -> FirstStage:
    """Return the student that draws the pictures that an exported pipeline enlarges."""
    found = given
    if run is not None and (recorded := run.config.base_student) is not None:
        found = _lies_at(run, recorded, given)
    if found is None:
        todo = f"name the student that draws them with {named('base_student')}"
        raise SettingError("student", path, "enlarges the pictures of an earlier stage", todo)
    first_stage = open_first_stage(found)
    if run is not None:
        _compare(first_stage, run, given)
    return first_stage


def _lies_at(run: RunFolder, recorded: Path, given: str | Path | None) -> str | Path:
    """Return where the first stage of a run lies: `given`, or what the run recorded if that is still there."""
    if given is None and not recorded.is_dir():
        gone = "which is not there any more"
        why = f"{run.path} enlarges the pictures of the student in {recorded}, {gone}"
        raise SettingError("base_student", why=why, todo="say where it is")
    return recorded if given is None else given


def _compare(first_stage: FirstStage, run: RunFolder, given: str | Path | None) -> None:
    """Refuse a first stage that has changed since a run was trained on its pictures; warn of another that is given."""
    if run.facts is None or run.facts.base_student in (None, first_stage.fingerprint):
        return
    if given is None:
        why = (
            f"the student in {first_stage.folder} is not the one whose pictures it was trained on: it has changed since"
        )
        todo = "give that one, or this one all the same"
        raise SettingError("base_student", why=why, todo=todo, where=str(run.path))
    warnings.warn(f"{run.path} was trained on the pictures of another student than that in {given}", stacklevel=4)
