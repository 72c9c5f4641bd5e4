"""`evaluate`: a student and its teacher, found to belong together, and compared."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from onestill.core.arguments import checked
from onestill.core.devices import resolve_device
from onestill.core.errors import SettingError, named
from onestill.core.files import check_output
from onestill.core.settings import make
from onestill.core.writing import WriteError
from onestill.data.prompts import read_prompts
from onestill.diffusion.names import SolverName
from onestill.evaluation.choice import choose_features
from onestill.evaluation.clip import ClipScore, check_pictures
from onestill.evaluation.comparison import Comparison, Entry
from onestill.evaluation.config import EvaluateConfig
from onestill.evaluation.features import FeatureExtractor, sees_latents
from onestill.evaluation.gaussians import is_statistics, write_gaussian
from onestill.evaluation.inception import InceptionFeatures
from onestill.evaluation.references import (
    Reference,
    check_save_reference,
    embedded_reference,
    folder_reference,
    gaussian_reference,
    teacher_reference,
)
from onestill.evaluation.report import Report
from onestill.evaluation.samples import Subjects, check_features
from onestill.runs.build import guided_as
from onestill.runs.evaluation_files import WRITTEN, captions_of, write_report
from onestill.runs.folder import EVALUATION_FOLDER, PIPELINE_FOLDER, is_run
from onestill.runs.load import LoadedStudent, at_widths, check_folder, load_student, run_teacher
from onestill.runs.memory import enough_for_images
from onestill.sampling.samplers.base import Sampler
from onestill.sampling.samplers.network import TeacherSampler
from onestill.students import model_card
from onestill.students.mark import refuse_student
from onestill.teachers.base import Teacher
from onestill.teachers.guidance import guided
from onestill.teachers.load import EMBEDDED, load_teacher
from onestill.teachers.settings import STORED
from onestill.training.config import DistillConfig

WORDS: dict[SolverName, str] = {"ddim": "DDIM", "heun": "Heun", "midpoint": "midpoint", "dpmsolver++": "DPM++"}
"""Names of the teacher's rows, before their number of steps."""


@checked(EvaluateConfig)
def evaluate(
    student: str | Path,
    *,
    teacher: str | Path | Teacher | None = None,
    features: str | Path | FeatureExtractor | None = None,
    config_file: str | Path | None = None,
    show_progress: bool = False,
    say: Callable[[str], None] = lambda _: None,
    **settings: Any,
) -> Report:
    """Compare a student's one step, or few, with its teacher's many; return the report, and write it if `output` is given.

    Args:
        student: A run's folder or an exported pipeline.
        teacher: The teacher, by name or as an object; that of the run if None.
        features: What the images are compared by, by name or as an extractor; "auto" if None.
        config_file: A YAML file of settings; those given here win.
        show_progress: Show a bar on a terminal while a row's images are made.
        say: Called with a line before each slow part.
        **settings: Fields of `onestill.EvaluateConfig`; an unknown name is refused.

    Raises:
        ValueError: If any input is unusable; nothing has been written then.
    """
    config = _configured({**settings, "student": student, "teacher": teacher, "features": features}, config_file)
    resolve_device(config.device)
    check_folder(config.student)  # before the output, whose default it names
    check_save_reference(config)
    if config.output is not None:
        there = "a report" if any((config.output / name).exists() for name in WRITTEN) else ""
        check_output(config.output, there, overwrite=config.overwrite)
    with enough_for_images(config.batch_size, "comparing"):
        return _evaluated(config, teacher, features, show_progress, say)


def _evaluated(
    config: EvaluateConfig,
    teacher: str | Path | Teacher | None,
    features: str | Path | FeatureExtractor | None,
    show_progress: bool,
    say: Callable[[str], None],
) -> Report:
    pair = _open_pair(config, teacher if isinstance(teacher, Teacher) else None)
    students = _student_rows(config, pair.student)
    offline = config.local_files_only
    extractor = features
    if extractor is None or isinstance(extractor, (str, Path)):
        where: dict[str, Any] = {"device": pair.device, "weights": config.features_weights}
        extractor = choose_features(config.features, pair.teacher, local_files_only=offline, **where)
    check_features(extractor, pair.student.sampler)
    if isinstance(extractor, InceptionFeatures):
        check_pictures(_decoded_shape(pair), "features", "the Inception network")
    source = _reference_source(config, pair, extractor)
    subjects, notes = _subjects(config, pair, source)
    if config.protocol is not None:
        say(f"protocol {config.protocol}: {_said_of(config, subjects)}")
    for warning in pair.student.sampler.warnings(subjects.prompts[: config.num_samples]):
        say(warning)
    clip = None if config.clip is None else _open_clip(config.clip, pair, offline=offline)
    resolved = {"guidance_scale": _guidance_of(config, pair.student, pair.teacher), "device": str(pair.device)}
    config = config.model_copy(update=resolved)
    if source == "teacher":
        say(f"reference: {config.num_samples:,} samples of the teacher at {config.num_reference_steps} steps")
    reference = _reference(source, config, pair, extractor, subjects, shows=show_progress)
    name = pair.teacher.spec.source
    comparison = Comparison(
        reference, extractor, subjects, config, name, clip, notes, show_progress=show_progress, say=say
    )
    rows = [Entry(f"{WORDS[s]}-{n}", pair.many_steps(n, s)) for s in config.solver for n in config.steps]
    report, shown = comparison.run([*rows, *students])
    if config.save_reference is not None:
        num = report.protocol.num_reference_images or 0
        write_gaussian(comparison.standard.gaussian, config.save_reference, features=extractor.name, num_images=num)
    if config.output is not None:
        try:
            write_report(report, shown, config, captions_of(pair.student, subjects), pair.student)
        except WriteError:
            say(report.to_markdown())  # what took hours to measure
            raise
        if pair.student.pipeline is not None:
            model_card.write_table(pair.student.pipeline, report.to_markdown())
    return report


def _configured(values: Mapping[str, Any], config_file: str | Path | None) -> EvaluateConfig:
    """Return the settings; paths are given as text, as names are, and objects come beside them."""
    given = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    objects = {name for name in ("student", "teacher", "features") if not isinstance(given[name], str)}
    config = make(EvaluateConfig, {name: v for name, v in given.items() if name not in objects}, config_file)
    if config.protocol is not None and given["features"] is not None and "features" in objects:
        why = f"is an object, and {named('protocol')} {config.protocol} has {config.features}"
        raise SettingError("features", type(given["features"]).__name__, why, "leave out one of the two")
    return config


@dataclass(frozen=True)
class _Pair:
    """A student and its teacher, opened, the teacher guided and thresholded as its rows are."""

    student: LoadedStudent
    teacher: Teacher
    device: torch.device

    def many_steps(self, num: int, solver: SolverName = "ddim") -> Sampler:
        """Return the teacher's sampler of so many steps."""
        first_stage = self.student.sampler.first_stage
        return TeacherSampler(self.teacher, num_steps=num, solver=solver, device=self.device, first_stage=first_stage)


def _open_pair(config: EvaluateConfig, teacher: Teacher | None) -> _Pair:
    """Return the student and the teacher, which may be an object, with w of both as the settings say."""
    device, offline, base = resolve_device(config.device), config.local_files_only, config.base_student
    width = config.ema_width[0] if config.ema_width else None
    found = load_student(config.student, device=device, ema_width=width, local_files_only=offline, base_student=base)
    student = _at_scale(found, config)
    return _Pair(student, teacher_beside(student, config, device, teacher), device)


def teacher_beside(
    student: LoadedStudent, config: EvaluateConfig, device: torch.device, teacher: Teacher | None = None
) -> Teacher:
    """Return the teacher of a student, loaded if it is no object, guided and thresholded as its rows are.

    Raises:
        SettingError: If it is unknown, or is not the student's.
    """
    teacher = _load_teacher(config, student, device) if teacher is None else teacher
    refuse_student(teacher)
    one_step = student.sampler
    _check_pair(one_step, teacher)
    if one_step.first_stage is not None and one_step.noise_level is not None:
        teacher = teacher.with_image_condition(one_step.noise_level, one_step.first_stage.examples)
    return _guided(config, student, teacher)


def _at_scale(student: LoadedStudent, config: EvaluateConfig) -> LoadedStudent:
    """Return the student at the guidance scale asked for, if it takes one: what is exported has it baked in."""
    takes_it = student.config is not None and student.config.guidance_range is not None
    if config.guidance_scale is None or not takes_it or student.pipeline == config.student:
        return student
    return LoadedStudent(student.sampler.at(guidance_scale=config.guidance_scale), None, student.run)


def _student_rows(config: EvaluateConfig, student: LoadedStudent) -> list[Entry]:
    """Return a row of the student for each number of steps that is asked for, with each average."""
    rows, timed = [], dict[int, str]()
    try:
        for average, sampler in at_widths(student, config.student, config.ema_width).items():
            for num in config.student_steps or (sampler.num_steps,):
                sampler = sampler.at(num_inference_steps=num)  # each from the one before, which may have loaded it
                name = f"student{'' if num == 1 else f', {num} steps'}{average}"
                like = timed.setdefault(num, name)
                rows.append(Entry(name, sampler, is_student=True, as_fast_as=like))
    except SettingError as error:
        is_ours = error.settings == ("num_inference_steps",)
        raise (error.about("student_steps", config.student_steps) if is_ours else error) from None
    return rows


def _load_teacher(config: EvaluateConfig, student: LoadedStudent, device: torch.device) -> Teacher:
    """Return the teacher that is named, else that of the student's run."""
    run = student.config
    if config.teacher is None:
        if student.run is None or run is None:
            why = "is an exported folder that does not know its teacher"
            raise SettingError("student", config.student, why, f"name it with {named('teacher')}")
        return run_teacher(student.run, device, local_files_only=config.local_files_only)
    given: dict[str, Any] = {} if run is None else {"t_max": run.t_max, "variant": run.variant}
    given |= {name: value for name in STORED if (value := getattr(config, name)) is not None}
    given |= {"arguments": student.sampler.arguments, "local_files_only": config.local_files_only}
    load = functools.partial(load_teacher, config.teacher, device=str(device), **given)
    known = _recorded(student).null_class
    try:
        return load(null_class=known if config.null_class is None else config.null_class)
    except ValueError:
        if config.null_class is None and known is not None:
            _check_pair(student.sampler, load())  # another teacher has no such label, which nobody has named
        raise


def _guided(config: EvaluateConfig, student: LoadedStudent, teacher: Teacher) -> Teacher:
    """Return the teacher as it was distilled: at w, with the negative prompt and the thresholding of then."""
    scale = _guidance_of(config, student, teacher)
    if scale is None and teacher.can_guide:
        why = f"{student.sampler.name} does not say what was distilled into it, and its teacher can guide"
        raise SettingError("guidance_scale", why=why, todo="say which w the teacher is to have (1 for none)")
    negative = config.negative_prompt
    if negative is None and teacher.spec.text:
        negative = _recorded(student).negative_prompt
    acts = config.negative_prompt is None or scale not in (None, 1)
    teacher = teacher.with_negative_prompt(negative, acts=acts)
    config.check_interval(acts=scale not in (None, 1))
    interval = config.guidance_interval
    if student.config is not None:
        return guided_as(teacher, student.config, scale, interval)
    said, scale = model_card.distilled(student.pipeline), teacher.usual_guidance if scale is None else scale
    interval = said.guidance_interval if interval is None else interval
    return guided(teacher, scale, threshold=said.threshold, interval=interval)


def _check_pair(student: Sampler, teacher: Teacher) -> None:
    """Raise SettingError if a student and a teacher cannot be compared."""
    spec, other = teacher.spec, "not the same teacher"
    if spec.sample_shape != student.sample_shape:
        why = f"makes samples of shape {spec.sample_shape}, {named('student')} of {student.sample_shape}"
        raise SettingError("teacher", spec.source, why)
    if bool(student.labels) != bool(spec.labels) or not set(student.labels) <= set(spec.labels):
        why = f"has {spec.num_classes or 0} classes and {named('student')} {len(student.labels)}"
        raise SettingError("teacher", spec.source, why, other)
    if (teacher.image_condition is None) != (student.first_stage is None):
        why = f"enlarges a picture and {named('student')} does not, or the other way round"
        raise SettingError("teacher", spec.source, why, other)
    if student.takes_text != spec.text:
        takes = "takes text" if student.takes_text else "takes no text"
        raise SettingError("teacher", spec.source, f"is another teacher: {named('student')} {takes}")


def _recorded(student: LoadedStudent) -> DistillConfig | model_card.Distilled:
    """Return what is known of the distillation: by the student's run, else by its card."""
    return model_card.distilled(student.pipeline) if student.config is None else student.config


def _guidance_of(config: EvaluateConfig, student: LoadedStudent, teacher: Teacher) -> float | None:
    """Return w of the teacher's rows: what is given, what the student's folder has baked in, or what its run says."""
    if config.guidance_scale is not None or teacher.spec.conditioning == "none":
        return config.guidance_scale
    baked, run = model_card.distilled(student.pipeline).guidance_scale, student.config
    if baked is not None or run is None:
        return baked
    return run.guidance_scale if run.guidance_range is None else sum(run.guidance_range) / 2


def _reference_source(config: EvaluateConfig, pair: _Pair, extractor: FeatureExtractor) -> str:
    """Return what the rows are compared with: "teacher", an embedded teacher's name, or a folder."""
    if config.reference != "auto":
        return config.reference
    name = pair.teacher.spec.source
    return name if name in EMBEDDED and not sees_latents(extractor) else "teacher"


def _reference(
    source: str, config: EvaluateConfig, pair: _Pair, extractor: FeatureExtractor, subjects: Subjects, *, shows: bool
) -> Reference:
    """Return the images, or the latents, to compare with; `shows` a bar while the teacher makes them."""
    if source == "teacher":
        sampler = pair.many_steps(config.num_reference_steps)
        return teacher_reference(sampler, extractor, subjects, config, show_progress=shows)
    if is_statistics(source):
        shape = pair.teacher.spec.sample_shape if sees_latents(extractor) else _decoded_shape(pair)
        return gaussian_reference(Path(source), extractor, shape)
    embedded = source in EMBEDDED
    found = embedded_reference(source) if embedded else folder_reference(Path(source), _decoded_shape(pair))
    if sees_latents(extractor):
        why = f"holds images, and {named('features')} teacher looks at latents"
        todo = f"name a transformers model with {named('features')}"
        raise SettingError("reference", source, why, todo)
    return found


def _subjects(config: EvaluateConfig, pair: _Pair, source: str) -> tuple[Subjects, tuple[str, ...]]:
    """Return what the images of every row show, and lines about it for the protocol."""
    student = pair.student.sampler
    held_out = _held_out_prompts(source, pair.teacher.spec.source, pair.student.config)
    prompts, origin = _prompts_of(pair.student, config, held_out)
    student.conditions(1, config.class_labels, prompts)
    notes = [f"prompts: {origin}"] if origin else []
    subjects = Subjects(config.class_labels or student.labels, prompts)
    if config.protocol is not None:
        notes.append(f"protocol {config.protocol}: {_said_of(config, subjects)}")
    if config.class_labels:
        notes.append(f"classes: {', '.join(map(str, config.class_labels))}, in turn")
    if (interval := pair.teacher.guidance_interval) is not None and config.guidance_scale != 1:
        notes.append(f"teacher guided at {interval[0]:g} < t <= {interval[1]:g}, w = 1 elsewhere")
    if student.first_stage is not None:
        drawn = f"every row enlarges what {student.first_stage.name} draws in one step"
        notes.append(f"{drawn}, which its evaluations and its time include")
    return subjects, tuple(notes)


def _said_of(config: EvaluateConfig, subjects: Subjects) -> str:
    """Return what the protocol of an evaluation has set."""
    labels = ", all labels in turn" if subjects.class_labels else ""
    seeds = f"seeds {config.seed}..{config.seed + config.num_samples - 1}"
    return f"{config.num_samples:,} images a row, {seeds}{labels}, {config.features} features"


def _held_out_prompts(reference: str, teacher: str, run: DistillConfig | None) -> Path | None:
    """Return the prompts of an embedded teacher that an evaluation goes by if none are named; None if there are none.

    They are those of the images it is compared with, or take the place of the teacher's own prompts in the run's.
    """
    if reference in EMBEDDED:
        return EMBEDDED[reference].heldout
    own = EMBEDDED.get(teacher)
    return own.heldout if own is not None and (run is None or run.prompt_file == own.prompts) else None


def _prompts_of(student: LoadedStudent, config: EvaluateConfig, held_out: Path | None) -> tuple[Sequence[str], str]:
    """Return (the prompts to evaluate on, where they come from): given ones, held-out ones, or those of the run."""
    file, field, kind = config.prompt_file, config.prompt_field, ""
    if student.sampler.takes_text and not config.prompts and file is None:
        if held_out is not None:
            file, kind = held_out, ", held-out ones"
        elif student.config is not None:
            file = student.config.prompt_file
            field = student.config.prompt_field if field is None else field
    found = read_prompts(config.prompts, file, field)
    where = "given ones" if file is None else file.name
    return found, f"{len(found):,} of {where}{kind}, in turn" if found else ""


def _open_clip(clip: str, pair: _Pair, *, offline: bool) -> ClipScore:
    """Return what measures how well images fit their prompts."""
    if not pair.teacher.spec.text:
        raise SettingError("clip", clip, "compares pictures with their prompts, and this teacher takes no text")
    check_pictures(_decoded_shape(pair))
    return ClipScore(clip, local_files_only=offline, device=pair.device)


@torch.no_grad()
def _decoded_shape(pair: _Pair) -> torch.Size:
    """Return the shape of what the teacher makes, decoded, without the batch."""
    spec = pair.teacher.spec
    return pair.teacher.decode(torch.zeros(1, *spec.sample_shape, device=pair.device)).shape[1:]


def default_report_folder(student: str | Path) -> Path:
    """Return where the report of a student goes if nothing is said: its run's folder, or beside the exported one."""
    path = Path(student)
    if path.name in ("", "..") and not is_run(path):
        path = path.resolve()  # "." says neither its name nor what it lies in
    if path.name == PIPELINE_FOLDER and is_run(path.parent):
        path = path.parent
    inside = is_run(path) or is_run(path.parent)
    return path / EVALUATION_FOLDER if inside else path.with_name(f"{path.name}-evaluation")
