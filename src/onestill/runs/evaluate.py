"""A student beside its teacher: both opened, found to belong together, and compared."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from onestill.data.prompts import read_prompts
from onestill.evaluation.candidates import Settings, check_features
from onestill.evaluation.choice import choose_features, default_features
from onestill.evaluation.clip import ClipScore, check_pictures
from onestill.evaluation.features import FeatureExtractor
from onestill.evaluation.references import Reference, embedded_reference, folder_reference, teacher_reference
from onestill.evaluation.report import JSON_NAME, MARKDOWN_NAME, Report
from onestill.evaluation.run import compare_sources
from onestill.runs.build import fit_teacher
from onestill.runs.checks import check_device, check_guidance, check_seeds, check_writable, resolve_device
from onestill.runs.folder import PIPELINE_FOLDER, is_run
from onestill.runs.load import LoadedStudent, check_folder, load_student, run_teacher
from onestill.sampling import pictures
from onestill.sampling.samplers.base import Sampler
from onestill.sampling.samplers.network import TeacherSampler
from onestill.students import model_card as card
from onestill.students.mark import refuse_student
from onestill.teachers.base import Teacher
from onestill.teachers.guidance import guided
from onestill.teachers.load import EMBEDDED, load_teacher
from onestill.training.config import DistillConfig

PICTURE_NAME = "samples.png"


def evaluate(
    student: str | Path,
    *,
    teacher: str | Path | Teacher | None = None,
    num_samples: int = 2000,
    steps: Sequence[int] = (50, 10, 4, 1),
    reference: str | Path = "auto",
    num_reference_steps: int = 100,
    features: str | FeatureExtractor = "auto",
    clip: str | Path | None = None,
    guidance_scale: float | None = None,
    null_class: int | None = None,
    class_labels: Sequence[int] = (),
    prompts: Sequence[str] = (),
    prompt_file: str | Path | None = None,
    prompt_field: str | None = None,
    negative_prompt: str | None = None,
    base_student: str | Path | None = None,
    seed: int = 0,
    batch_size: int = 64,
    measure_speed: bool = True,
    output: str | Path | None = None,
    overwrite: bool = False,
    device: str = "auto",
    local_files_only: bool = False,
    show_progress: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """Compare a student's one step with its teacher's many; return the report, and write it if `output` is given.

    Args:
        student: A run's folder or an exported pipeline.
        teacher: The teacher; that of the run if None.
        num_samples: Images per row of the table.
        steps: DDIM steps of the teacher's rows.
        reference: "teacher" (its own many-step samples: no data needed), an embedded teacher's name (its real
            images), a folder of images, or "auto": the embedded images where the teacher is embedded and
            the features see images, else "teacher".
        num_reference_steps: DDIM steps of the teacher as reference.
        features: "teacher" (its own middle features, of latents where it works on latents), an embedded teacher's
            name (its classifier, which also judges prompts or labels), a .safetensors file of `ConvFeatures`, a
            transformers vision model by folder or id, an extractor, or "auto".
        clip: A transformers CLIP model by folder or id, for the CLIP score of images and prompts.
        guidance_scale: w of the teacher's rows; what was distilled if None, as the student's card or its run says.
        null_class: The label of `teacher` that means "no class"; that of the run if None.
        class_labels: Labels to go round; all that the student knows if empty.
        prompts: Prompts to go round, for text students: every row has the same.
        prompt_file: A file of them instead. If neither is given: the held-out prompts of an embedded teacher that has
            some, where its images are the reference or its own prompts were those of the run; else those of the run.
        prompt_field: Field of the prompt in a .jsonl or .csv.
        negative_prompt: Takes the place of "no prompt" in the teacher's guidance; that of the run if None.
        base_student: For super-resolution: the student that draws what every row enlarges; that of the run if None.
        seed: Seed of the first image.
        batch_size: Images per network call, and the large batch of the speeds.
        measure_speed: Whether to time the rows.
        output: Folder for report.json, report.md and samples.png.
        overwrite: Replace a report that is there.
        device: auto, cpu, cuda, cuda:N or mps.
        local_files_only: Never use the network.
        show_progress: Show a bar on a terminal while a row's images are made.
        say: Called with a line before each slow part.

    Raises:
        ValueError: If any input is unusable; nothing has been written then.
    """
    check_device(device)
    place = resolve_device(device)
    check_folder(student)  # before the output, whose default it names
    _check_evaluation(num_samples, steps, batch_size, num_reference_steps, output, overwrite)
    check_seeds(seed, num_samples)
    check_guidance(guidance_scale)
    loaded = _open_at_scale(student, place, guidance_scale, local_files_only, base_student)
    one_step = loaded.sampler
    base, fitted = _teacher_of(loaded, teacher, guidance_scale, null_class, negative_prompt, place, local_files_only)
    name = base.spec.source
    extractor = features
    if isinstance(extractor, str):
        chosen = default_features(name) if extractor == "auto" else extractor
        extractor = choose_features(chosen, base, local_files_only=local_files_only, device=place)
    if reference == "auto":
        sees_images = not getattr(extractor, "of_latents", False)
        reference = name if name in EMBEDDED and sees_images else "teacher"
    held_out = _held_out_prompts(str(reference), name, loaded.config)
    asked, asked_from = _prompts_of(loaded, prompts, prompt_file, prompt_field, held_out)
    one_step.conditions(1, tuple(class_labels), asked)
    for warning in one_step.warnings(asked[:num_samples]):
        say(warning)
    judge = None if clip is None else _open_clip(clip, base, place, local_files_only)
    settings = Settings(
        num_samples=num_samples,
        batch_size=batch_size,
        seed=seed,
        class_labels=tuple(class_labels) or one_step.labels,
        prompts=asked,
        prompts_from=asked_from,
        base_student=one_step.first_stage.name if one_step.first_stage is not None else "",
        measure_speed=measure_speed,
        guidance_scale=_guidance_of(loaded, guidance_scale, base),
        device=str(place),
        show_progress=show_progress,
    )
    check_features(extractor, [one_step])
    sampler = TeacherSampler(fitted, num_steps=num_reference_steps, device=place, first_stage=one_step.first_stage)
    images = _reference(str(reference), base, sampler, extractor, settings, say)
    rows: list[tuple[str, Sampler, bool]] = [
        (f"DDIM-{n}", TeacherSampler(fitted, num_steps=n, device=place, first_stage=one_step.first_stage), False)
        for n in steps
    ]
    report, shown = compare_sources(
        [*rows, ("student", one_step, True)], images, extractor, settings, teacher=name, clip=judge, say=say
    )
    if output is not None:
        report.save(output, overwrite=overwrite)
        if pictures.can_be_shown(next(iter(shown.values())).shape[1:]):
            pictures.save_rows(
                {k: v[:16] for k, v in shown.items()},
                Path(output) / PICTURE_NAME,
                title="same noise in every column",
                columns=asked[:16],
            )
        if loaded.pipeline is not None:
            card.write_table(loaded.pipeline, report.to_markdown())
    return report


def _open_at_scale(
    student: str | Path, device: torch.device, scale: float | None, offline: bool, base: str | Path | None
) -> LoadedStudent:
    """Return the student to evaluate, at the guidance scale asked for if it takes one."""
    found = load_student(student, device=device, local_files_only=offline, base_student=base)
    takes_it = found.config is not None and found.config.guidance_range is not None and found.pipeline != Path(student)
    if scale is None or not takes_it:
        return found
    return LoadedStudent(found.sampler.at(guidance_scale=scale), None, found.run)


def _held_out_prompts(reference: str, teacher: str, config: DistillConfig | None) -> Path | None:
    """Return the prompts of an embedded teacher that an evaluation goes by if none are named; None if there are none.

    They are those of the images it is compared with, or take the place of the teacher's own prompts in the run's.
    """
    if reference in EMBEDDED:
        return EMBEDDED[reference].heldout
    own = EMBEDDED.get(teacher)
    if own is None or (config is not None and config.prompt_file != own.prompts):
        return None
    return own.heldout


def _prompts_of(
    student: LoadedStudent,
    prompts: Sequence[str],
    prompt_file: str | Path | None,
    prompt_field: str | None,
    held_out: Path | None,
) -> tuple[Sequence[str], str]:
    """Return (the prompts to evaluate on, where they come from): given ones, held-out ones, or those of the run."""
    config, kind = student.config, ""
    if student.sampler.takes_text and not prompts and prompt_file is None:
        if held_out is not None:
            prompt_file, kind = held_out, ", held-out ones"
        elif config is not None:
            prompt_file = config.prompt_file
            prompt_field = config.prompt_field if prompt_field is None else prompt_field
    found = read_prompts(prompts, prompt_file, prompt_field)
    where = "given ones" if prompt_file is None else Path(prompt_file).name
    return found, f"{len(found):,} of {where}{kind}, in turn" if found else ""


def _open_clip(clip: str | Path, teacher: Teacher, device: torch.device, offline: bool) -> ClipScore:
    """Return what measures how well images fit their prompts.

    Raises:
        ValueError: If there are no prompts or no pictures, or this is no CLIP model.
    """
    if not teacher.spec.text:
        raise ValueError(f"--clip {clip} compares pictures with their prompts, and this teacher takes no text")
    with torch.no_grad():
        made = teacher.decode(torch.zeros(1, *teacher.spec.sample_shape, device=device))
    check_pictures(made.shape[1:])
    return ClipScore(clip, local_files_only=offline, device=device)


def _check_evaluation(
    num_samples: int,
    steps: Sequence[int],
    batch_size: int,
    num_reference_steps: int,
    output: str | Path | None,
    overwrite: bool,
) -> None:
    if num_samples < 10:
        raise ValueError(
            f"--num_samples must be at least 10 (hundreds for numbers that mean something), got {num_samples}"
        )
    if batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1, got {batch_size}")
    if not steps or min(steps) < 1 or len(set(steps)) != len(steps):
        raise ValueError(f"--steps must be different numbers of at least 1, got {list(steps)}")
    if num_reference_steps < 1:
        raise ValueError(f"--num_reference_steps must be at least 1, got {num_reference_steps}")
    if output is None:
        return
    path = Path(output)
    if path.exists() and not path.is_dir():
        raise ValueError(f"--output {path} is a file; give a folder")
    check_writable(path, "output")
    if any((path / name).exists() for name in (JSON_NAME, MARKDOWN_NAME, PICTURE_NAME)) and not overwrite:
        raise ValueError(f"--output {path} holds a report; name another folder, or give --overwrite")


def _teacher_of(
    student: LoadedStudent,
    teacher: str | Path | Teacher | None,
    guidance_scale: float | None,
    null_class: int | None,
    negative_prompt: str | None,
    device: torch.device,
    offline: bool,
) -> tuple[Teacher, Teacher]:
    config, said = student.config, card.distilled(student.pipeline)
    if teacher is None and config is None:
        raise ValueError("--student is an exported folder that does not know its teacher; name it with --teacher")
    if isinstance(teacher, Teacher):
        base = teacher
    elif teacher is not None:
        known = said.null_class if config is None else config.null_class
        load = functools.partial(
            load_teacher,
            teacher,
            local_files_only=offline,
            device=str(device),
            arguments=student.sampler.arguments,
            t_max=None if config is None else config.t_max,
            variant=None if config is None else config.variant,
        )
        try:
            base = load(null_class=known if null_class is None else null_class)
        except ValueError:
            if null_class is None and known is not None:
                _check_pair(student.sampler, load())  # another teacher has no such label, which nobody has named
            raise
    else:
        assert student.run is not None
        assert config is not None
        base = run_teacher(student.run, device, local_files_only=offline)
    refuse_student(base)
    _check_pair(student.sampler, base)
    first_stage, level = student.sampler.first_stage, student.sampler.noise_level
    if base.image_condition is not None and first_stage is not None and level is not None:
        base = base.with_image_condition(level, first_stage.examples)
    scale = _guidance_of(student, guidance_scale, base)
    if scale is None and base.can_guide:
        raise ValueError(
            f"{student.sampler.name} does not say what guidance was distilled into it, and its teacher can guide: say which w the "
            "teacher is to have with --guidance_scale (1 for none)"
        )
    negative = negative_prompt
    if negative is None and base.spec.text:
        negative = said.negative_prompt if config is None else config.negative_prompt
    base = base.with_negative_prompt(negative, acts=negative_prompt is None or scale not in (None, 1))
    if config is not None:
        return base, fit_teacher(base, config, scale)
    return base, guided(base, base.usual_guidance if scale is None else scale, threshold=said.threshold)


def _check_pair(student: Sampler, teacher: Teacher) -> None:
    """Raise ValueError if a student and a teacher cannot be compared."""
    spec = teacher.spec
    if spec.sample_shape != student.sample_shape:
        raise ValueError(f"--teacher makes samples of shape {spec.sample_shape}, --student of {student.sample_shape}")
    if bool(student.labels) != bool(spec.labels) or not set(student.labels) <= set(spec.labels):
        raise ValueError(
            f"--student has {len(student.labels)} classes and --teacher {spec.num_classes or 0}: not the same teacher"
        )
    if (teacher.image_condition is None) != (student.first_stage is None):
        raise ValueError(
            "one of --student and --teacher enlarges a picture and the other does not: not the same teacher"
        )
    if student.takes_text != spec.text:
        raise ValueError(
            f"--student {'takes' if student.takes_text else 'takes no'} text, and --teacher is another teacher"
        )


def _guidance_of(student: LoadedStudent, guidance_scale: float | None, teacher: Teacher) -> float | None:
    """Return w of the teacher's rows: what is given, what the student's folder has baked in, or what its run says."""
    config = student.config
    if guidance_scale is not None or teacher.spec.conditioning == "none":
        return guidance_scale
    baked = card.distilled(student.pipeline).guidance_scale
    if baked is not None or config is None:
        return baked
    return config.guidance_scale if config.guidance_range is None else sum(config.guidance_range) / 2


def _reference(
    reference: str,
    base: Teacher,
    sampler: Sampler,
    extractor: FeatureExtractor,
    settings: Settings,
    say: Callable[[str], None],
) -> Reference:
    if reference == "teacher":
        say(f"reference: {settings.num_samples:,} samples of the teacher at {sampler.num_steps} steps")
        return teacher_reference(sampler, extractor, settings)
    if reference in EMBEDDED:
        found = embedded_reference(reference)
    else:
        image_shape = base.decode(torch.zeros(1, *base.spec.sample_shape, device=settings.device)).shape[1:]
        found = folder_reference(Path(reference), image_shape)
    if getattr(extractor, "of_latents", False):
        raise ValueError(
            f"--reference {reference} holds images, and --features teacher looks at latents; name a transformers model"
        )
    return found


def default_report_folder(student: str | Path) -> Path:
    """Return where the report of a student goes if nothing is said: its run's folder, or beside the exported one."""
    path = Path(student)
    if path.name in ("", "..") and not is_run(path):
        path = path.resolve()  # "." says neither its name nor what it lies in
    if path.name == PIPELINE_FOLDER and is_run(path.parent):
        path = path.parent
    if is_run(path) or is_run(path.parent):
        return path / "evaluation"
    return path.with_name(f"{path.name}-evaluation")
