"""The export of a student before its first step: what is refused at the end of a run is refused in its first minute."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import torch

from onestill.core.devices import resolve_device
from onestill.core.errors import SettingError, in_short, named
from onestill.core.memory import enough_memory, is_out_of_memory
from onestill.export.export import ExportError, export_student
from onestill.objectives.anchors import Anchors
from onestill.objectives.flow_map import FlowMap
from onestill.objectives.registry import is_map
from onestill.runs.build import Run
from onestill.runs.folder import PIPELINE_FOLDER, REHEARSAL
from onestill.runs.inspect import less_memory
from onestill.runs.space import check_memory, check_space, space_of
from onestill.students.student import Student
from onestill.training.config import DistillConfig, num_processes
from onestill.training.trainer import unused_parameters

TRIED_STEPS = 4
"""The steps of the second export, for runs that train for several."""
SMALL_MOVE = 0.01
"""What the parameters that start at zero are moved by while a student is exported for a try."""


def rehearse(run: Run) -> tuple[str, ...]:
    """Check that there is room for a run, and that its student can be exported: write it, read it, and compare.

    The student is untrained, so what starts at zero, through which the target time enters, is moved for that time:
    otherwise a target time that is baked in wrongly would not show. What was written is removed, and parameters and
    random state are afterwards what they were, to the bit. A run that goes on from a checkpoint has been through this.

    Returns:
        What should be said before the run; may mention settings by `named`.

    Raises:
        SettingError: If the student cannot be exported, or one checkpoint and the export do not fit on the disk.
    """
    if run.resume is not None:
        return ()
    space = space_of(run.student, run.config)
    check_memory(space)
    messages = check_space(space, run.config.output_dir)
    said: list[str] = []
    with enough_memory(f"exporting a student of {run.config.teacher}", less_memory(run.config, run.student)):
        _on_one_process(lambda: said.extend(_try(run)), run.config)
    return (*messages, *_off_its_times(run.config), *said)


def _try(run: Run) -> list[str]:
    """Try both; return what should be said of exports for several steps, where the run trains for them."""
    if run.teacher.folder is None:
        _try_gradient(run)
    _try_export(run)
    if not is_map(run.config):
        return []
    try:
        _try_export(run, num_steps=TRIED_STEPS)
    except SettingError as error:
        why = error.why.rpartition("so none is trained: ")[2]
        todo = (
            f"sample and evaluate it in several from the run ({named('num_inference_steps')}, {named('student_steps')})"
        )
        return [f"warning: the student can be exported for one step only: {why}; {todo}"]
    return []


def _off_its_times(config: DistillConfig) -> tuple[str, ...]:
    """Return what to say of a run whose student will draw badly in some numbers of steps: between its anchors' times."""
    off = [str(k) for k in (2, 4, 8) if Anchors.is_off_its_times(config, k) and not FlowMap.is_map(config)]
    if not off:
        return ()
    todo = f"{named('num_anchor_steps')} 16 is for all, {named('anchor_path_fraction')} 0 for one step alone"
    why = f"its {named('num_anchor_steps')} {config.num_anchor_steps} have not the levels of those"
    return (f"warning: the student will draw badly in {', '.join(off)} steps: {why}; {todo}",)


def _try_gradient(run: Run) -> None:
    """Raise SettingError if no gradient can be taken through a network of one's own."""
    device = resolve_device(run.config.device)
    run.teacher.to(device)
    try:
        unused_parameters(run.student.to(device))
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        todo = "let it compute without no_grad, inference_mode, detach, and changes of its input in place"
        raise SettingError("network", why=f"cannot be trained: {in_short(error)}", todo=todo) from error


def _try_export(run: Run, num_steps: int = 1) -> None:
    config, student, device = run.config, run.student, resolve_device(run.config.device)
    run.teacher.to(device)
    student.to(device)
    place = _place(config.output_dir)
    shutil.rmtree(place, ignore_errors=True)  # of one that was killed
    try:
        with torch.random.fork_rng(), _moved(student):
            export_student(student, place / PIPELINE_FOLDER, t=config.t_min, num_inference_steps=num_steps)
    except ExportError as error:
        why = f"a student of it cannot be exported, so none is trained: {error.text}"
        todo = "its folder draws in another way than its parts do here; name a teacher that onestill inspect knows"
        raise SettingError("teacher", config.teacher, why, todo) from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
@torch.no_grad()
def _moved(student: Student) -> Iterator[None]:
    """Move what is trained and starts at zero, always in the same way; it is put back to the bit."""
    generator = torch.Generator().manual_seed(0)
    new = {p: p.clone() for p in student.parameters() if p.requires_grad and not p.any()}
    try:
        for parameter in new:
            parameter.add_(SMALL_MOVE * torch.randn(parameter.shape, generator=generator).to(parameter))
        yield
    finally:
        for parameter, old in new.items():
            parameter.copy_(old)


def _place(output_dir: Path) -> Path:
    """Return a folder on the disk of a run that no other run has: in its own, or where that will be."""
    here = output_dir.absolute()
    if here.is_dir():
        return here / REHEARSAL
    parent = next(p for p in here.parents if p.is_dir())
    return parent / f"{REHEARSAL}-{sha256(os.fsencode(here)).hexdigest()[:16]}"


def _on_one_process(check: Callable[[], None], config: DistillConfig) -> None:
    """Let the first process check; the others wait, and what it refuses all refuse."""
    if num_processes() == 1:
        check()
        return
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState(cpu=config.device == "cpu")
    verdict: list[Exception | None] = [None]
    if state.is_main_process:
        try:
            check()
        except Exception as error:
            verdict = [error]
    broadcast_object_list(verdict)
    if verdict[0] is not None:
        raise verdict[0]
