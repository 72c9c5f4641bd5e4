"""From a trained student to a folder that others load and sample in one network evaluation, or a few.

The target time is baked into the weights, eq. (13), and what is left is one step, eq. (19): `OneStep`. How that is
written is the teacher's choice of a format. Each is loaded afresh and compared with the student before it has its name.
"""

from __future__ import annotations

import gc
import glob
import importlib.util
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from onestill.core.arguments import checked
from onestill.core.errors import RunError, SettingError, in_short, named
from onestill.core.files import check_writable, set_usual_mode
from onestill.core.memory import is_out_of_memory
from onestill.core.reading import reason
from onestill.core.tensors import SELF_CHECK_TOLERANCE, to_device, without_autocast
from onestill.core.writing import is_refusal, write_text, written
from onestill.export.base import Format
from onestill.export.browser import BrowserFormat
from onestill.export.config import DIFFUSERS
from onestill.export.lora import LoraFormat
from onestill.export.lora_file import lora_words
from onestill.export.module import ModuleFormat
from onestill.export.onnx_file import OnnxFormat
from onestill.export.pipeline import PipelineFormat
from onestill.export.pixel import PixelFormat
from onestill.export.program import ProgramFormat
from onestill.export.settings import Options
from onestill.export.single_file import SingleFileFormat
from onestill.sampling.pictures import is_picture, to_pil
from onestill.sampling.samplers.network import NOTHING_SAID, check_trained
from onestill.students.bake import NO_TIME
from onestill.students.injection import TimeEmbeddingInjection
from onestill.students.mark import Head, Mark, read_mark
from onestill.students.model_card import Facts, teacher_license, write_card
from onestill.students.one_step import FewSteps, OneStep, few_steps_of, one_step_of
from onestill.students.student import Student
from onestill.teachers.pipelines.calls import EXAMPLE_PROMPTS

FORMATS: dict[str, type[Format]] = {
    "pixel": PixelFormat,
    "pipeline": PipelineFormat,
    "module": ModuleFormat,
    "single_file": SingleFileFormat,
    "lora": LoraFormat,
    "torch": ProgramFormat,
    "onnx": OnnxFormat,
    "browser": BrowserFormat,
}
"""By name; the first three are what `Teacher.student_format` names."""
NUM_PICTURES, PICTURES_FOLDER = 4, "images"
"""Pictures of a student that its folder may have, and where."""
_OF_TEACHERS = ("pixel", "pipeline")


class ExportError(RunError):
    """A student cannot be written or read again, or a written folder does not draw what its student draws."""


@checked()
@torch.no_grad()
@without_autocast
def export_student(
    student: Student,
    folder: Path,
    *,
    t: float = 0.0,
    guidance_scale: float | None = None,
    num_inference_steps: int = 1,
    facts: Facts | None = None,
    format: str | None = None,
    options: Options | None = None,
    overwrite: bool = False,
    pictures: bool = False,
) -> float:
    """Write the student as a stock diffusers folder (or, for modules, as safetensors and JSON).

    Args:
        student: The student, with the weights to export.
        folder: Where to; must not exist unless `overwrite`.
        t: Target time to bake in; 0 is the finished image.
        guidance_scale: w to bake in, for students that take it.
        num_inference_steps: K, for students that are trained between any two times: the folder's own call with K steps
            is theirs, eq. (28).
        facts: What the model card says besides; nothing more if None.
        format: One of `FORMATS`; the teacher's if None or "diffusers".
        options: What some formats are told besides.
        overwrite: Replace an existing folder, in one rename, after the new one passed its check.
        pictures: Put some of the student's pictures into the folder, which its card shows on the hub.

    Returns:
        The largest difference between the reloaded folder's samples and the student's, same noise.

    Raises:
        SettingError: If `folder` exists, or the student cannot be written for so many steps.
        ExportError: If the self-check fails; nothing is left under the folder's name then.
        WriteError: If the system refuses, as when the disk is full; likewise.
    """
    options = options or Options()
    options.refuse_unused((format,))
    check_installed(format, options)
    name = check_format(student, format, num_inference_steps)
    _check_trained(student, t, guidance_scale)
    check_writable(folder, "output")
    if folder.exists() and not overwrite:
        todo = f"name another folder, or give {named('overwrite')} to replace it"
        raise SettingError("output", folder, "exists", todo)
    for left in folder.parent.glob(f".{glob.escape(folder.name[:100])}.partial*"):  # by an export that was killed
        shutil.rmtree(left, ignore_errors=True)
    with written(folder, overwrite=overwrite) as partial, _exporting():
        partial.mkdir()
        form = FORMATS[name](student, t, guidance_scale, num_inference_steps)
        facts = facts or Facts()
        form.options, form.prompt = options, facts.prompt
        _write(form, name, partial)
        gc.collect()  # what was written: modules know each other in circles
        error = _passed(form.check(partial), "the reloaded folder's images differ", form.tolerance)
        _describe(form, partial, replace(facts, pictures=_draw(form, partial)) if pictures else facts, error)
        set_usual_mode(partial)
    return error


def check_format(student: Student, format: str | None, num_inference_steps: int = 1) -> str:
    """Return the name in `FORMATS` of a format; raise SettingError if a student cannot be written in it.

    It is known before any work: the family may have no such files, or no K steps of them.
    """
    own = student.teacher.student_format
    name = own if format in (None, DIFFUSERS) else format
    known = [each for each in FORMATS if each == own or each not in _OF_TEACHERS]
    if name not in known:
        raise SettingError("format", name, "is unknown of this teacher", f"known are {', '.join(known)}")
    kind = FORMATS[name]
    if num_inference_steps > 1 and (why := why_not_in_steps(student, num_inference_steps)) is not None:
        raise SettingError("num_inference_steps", num_inference_steps, why, "export it for one step, or sample the run")
    if (why := kind.why_not(student, num_inference_steps)) is not None:
        raise SettingError("format", name, why)
    return name


def check_installed(format: str | None, options: Options) -> None:
    """Raise SettingError if a package that a format needs is missing, or what it is told besides cannot be used."""
    if (kind := FORMATS.get(format or DIFFUSERS)) is None:
        return
    if missing := [module for module in kind.modules if importlib.util.find_spec(module) is None]:
        todo = f"pip install 'onestill[{kind.extra}]' brings them"
        raise SettingError("format", format, f"needs {', '.join(missing)}", todo)
    kind.check_options(options)


@contextmanager
def _exporting() -> Iterator[None]:
    """Turn what a library raises while it writes or loads a student into `ExportError`; a full disk and memory pass."""
    try:
        yield
    except Exception as error:
        is_systems = is_refusal(error) or is_out_of_memory(error)
        if is_systems or isinstance(error, (RunError, SettingError)):
            raise
        why = in_short(error) if isinstance(error, OSError) else reason(error)
        raise ExportError(f"the student cannot be exported: {why}") from error


def _check_trained(student: Student, t: float, guidance_scale: float | None) -> None:
    try:
        check_trained(student, t, guidance_scale, NOTHING_SAID, 0.0)
    except SettingError as error:
        raise (error.about("t", t) if error.settings == ("target_time",) else error) from None


def why_not_in_steps(student: Student, num_steps: int) -> str | None:
    """Return why a student cannot be exported for several steps, or None if it can."""
    if not isinstance(student.injection, TimeEmbeddingInjection):
        return NO_TIME
    return student.teacher.why_not_in_steps(student.levels(num_steps))


def is_exported(folder: Path) -> bool:
    """Return whether a folder is an exported student: one may be replaced by another, and nothing else may."""
    try:
        return read_mark(folder) is not None
    except ValueError:
        return False


def _write(form: Format, name: str, folder: Path) -> None:
    """Write a student and its mark, after a look at its one step."""
    student, t, scale = form.student, form.t, form.guidance_scale
    num = form.num_steps
    step = one_step_of(student, t, scale) if num == 1 else few_steps_of(student, num, t, scale)
    _passed(_difference(step, form), f"its {'one step' if num == 1 else f'{num} steps'}'s samples differ")
    mark = Mark(
        format=name,
        sample_shape=student.spec.sample_shape,
        head=step.head,
        num_inference_steps=num,
        heads=tuple(Head(**head) for head in step.heads) if isinstance(step, FewSteps) else (),
        target_time=t,
        guidance_scale=student.chosen_scale(scale),
    )
    form.write(step, folder)
    _forget_places(folder)
    mark.write(folder)


def _forget_places(folder: Path) -> None:
    """Take out of a folder's configurations where on this machine their parts were loaded from: others get to see them."""
    for path in folder.rglob("*.json"):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and found.pop("_name_or_path", None) is not None:
            write_text(path, json.dumps(found, indent=2) + "\n")


def _difference(step: OneStep, form: Format) -> float:
    """Return the largest difference of samples between a student and its one step, relative to their size."""
    eps, cond = form.example(2)
    expected = form.expected(eps, cond)
    found = step.to(form.device)(eps.to(form.device), to_device(cond, form.device))
    step.to("cpu")
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1))


def _passed(error: float, what: str, most: float = SELF_CHECK_TOLERANCE) -> float:
    """Return an error that is small enough; raise ExportError if it is not."""
    if not error <= most:
        allowed = f"(allowed {most:.0e})"
        raise ExportError(f"export self-check failed: {what} from the student's by {error:.1e} {allowed}")
    return error


def _draw(form: Format, folder: Path) -> tuple[tuple[str, str], ...]:
    """Write some of the student's pictures into a folder; return (what each shows, its file), () of no pictures."""
    teacher, spec = form.student.teacher, form.student.spec
    eps, cond = form.example(NUM_PICTURES)
    drawn = teacher.decode(form.expected(eps, cond)).cpu()
    if not is_picture(drawn.shape[1:]):
        return ()
    (folder / PICTURES_FOLDER).mkdir()
    words = [f"class {label}" for label in cond["class_labels"].tolist()] if spec.num_classes else []
    words = words or [EXAMPLE_PROMPTS[0] if spec.text else "a sample"] * NUM_PICTURES
    files = [f"{PICTURES_FOLDER}/{i}.png" for i in range(NUM_PICTURES)]
    for picture, file in zip(to_pil(drawn), files, strict=True):
        picture.save(folder / file)
    return tuple(zip(words, files, strict=True))


def _describe(form: Format, folder: Path, facts: Facts, error: float) -> None:
    """Write the card of a folder that passed its check."""
    teacher = form.student.teacher
    facts = form.facts(folder, facts)
    if not facts.license and teacher.folder is not None:
        facts = replace(facts, license=teacher_license(teacher.folder, teacher.spec.source))
    if form.student.lora is not None and not facts.lora:
        facts = replace(facts, lora=lora_words(form.student, folder))
    facts = replace(facts, num_steps=form.num_steps)
    write_card(folder, teacher, facts, error, library=form.library, code=(form.language, form.code(facts)))
