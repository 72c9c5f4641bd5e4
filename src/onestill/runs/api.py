"""What users call in Python with folders: `sample`, and `export` of what a run has learned."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from onestill.data.cascade import choose_first_stage
from onestill.data.prompts import read_prompts
from onestill.export.export import export_student, is_exported
from onestill.runs.checks import check_device, check_writable, resolve_device
from onestill.runs.distill import distilled_facts
from onestill.runs.folder import is_run
from onestill.runs.load import load_source
from onestill.runs.restore import check_student_request, read_run_config, restore_student
from onestill.sampling.explore import check_samples, samples
from onestill.teachers.base import NetworkTeacher


def sample(
    student: str | Path | None = None,
    *,
    teacher: str | Path | NetworkTeacher | None = None,
    num_images: int = 16,
    seed: int = 0,
    class_labels: Sequence[int] = (),
    guidance_scale: float | None = None,
    target_time: float = 0.0,
    num_inference_steps: int | None = None,
    solver: str | None = None,
    null_class: int | None = None,
    prompts: Sequence[str] = (),
    prompt_file: str | Path | None = None,
    prompt_field: str | None = None,
    negative_prompt: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    base_student: str | Path | None = None,
    noise_level: int | None = None,
    batch_size: int = 64,
    device: str = "auto",
    local_files_only: bool = False,
    show_progress: bool = False,
) -> Tensor:
    """Return images [num_images, C, H, W] in [-1, 1]: by a student in one step, or by a teacher in many.

    Image i has seed `seed + i` and does not depend on the batch it came in.

    Args:
        student: A run's folder, a checkpoint-N folder, or an exported pipeline. Either this or `teacher`.
        teacher: A teacher, for its multi-step baseline.
        num_images: How many.
        seed: Seed of the first image.
        class_labels: Labels to go round; if empty, seed i has label i modulo the number of classes.
        guidance_scale: w; for a student only if it was distilled to take it.
        target_time: The student's target time; 0 is the finished image.
        num_inference_steps: Steps of the teacher (50 if None); a student has one.
        solver: Step of the teacher: ddim (if None), heun or midpoint.
        null_class: The teacher's label for "no class".
        prompts: Prompts to go round, for text teachers and their students: image i shows prompts[i % len(prompts)].
        prompt_file: A file of them instead (.txt, .jsonl, .csv).
        prompt_field: Field of the prompt in a .jsonl or .csv; "prompt" if None.
        negative_prompt: Takes the place of "no prompt" in a teacher's guidance.
        arguments: Arguments of every call of a teacher's pipeline, such as height and width; its own defaults if None.
        base_student: For super-resolution: the student that draws what is enlarged, one step before; that of the
            student's run if None.
        noise_level: Noise mixed into those pictures, for a teacher; a student has that of its run.
        batch_size: Images per network call.
        device: auto, cpu, cuda, cuda:N or mps.
        local_files_only: Never use the network.
        show_progress: Show a bar on a terminal.

    Raises:
        ValueError: If the source does not exist or cannot do what is asked.
    """
    check_samples(num_images, seed, batch_size)
    asked = read_prompts(prompts, prompt_file, prompt_field)
    source = load_source(
        student,
        teacher=teacher,
        guidance_scale=guidance_scale,
        target_time=target_time,
        num_inference_steps=num_inference_steps,
        solver=solver,
        null_class=null_class,
        negative_prompt=negative_prompt,
        arguments=arguments,
        base_student=base_student,
        noise_level=noise_level,
        device=device,
        local_files_only=local_files_only,
    )
    images, _ = samples(
        source,
        num_images,
        seed=seed,
        class_labels=class_labels,
        prompts=asked,
        batch_size=batch_size,
        show_progress=show_progress,
    )
    return images


def export(
    student: str | Path,
    output: str | Path,
    *,
    guidance_scale: float | None = None,
    target_time: float | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> float:
    """Write the student of a run, or of one of its checkpoint-N folders, as a stock diffusers folder.

    Args:
        student: A run's folder or a checkpoint-N folder.
        output: Folder to write.
        guidance_scale: w to bake in, for students that take it; the middle of their range if None.
        target_time: Target time to bake in; the run's t_min if None.
        device: auto, cpu, cuda, cuda:N or mps.
        overwrite: Replace `output`.

    Returns:
        The largest difference between the reloaded folder's images and the student's.

    Raises:
        ValueError: If there is no such run, the student cannot do what is asked, or `output` exists.
    """
    check_device(device)
    path, output = Path(student), Path(output)
    run = path if is_run(path) else path.parent
    if not path.is_dir() or not is_run(run):
        raise ValueError(f"--student {path} is no run and no checkpoint-N folder of one")
    if output.exists() and not overwrite:
        raise ValueError(f"--output {output} exists; name another folder, or give --overwrite to replace it")
    if output.exists() and not is_exported(output):
        raise ValueError(f"--output {output} is no exported student, so --overwrite does not replace it")
    check_writable(output.absolute().parent, "output")
    config = read_run_config(run)
    restored = restore_student(path, config, resolve_device(device))
    if config.base_student is not None:
        # Its pictures are those of the self-check; what is written does not depend on them, so it may be gone.
        with contextlib.suppress(ValueError):
            choose_first_stage(restored.teacher, config.base_student, config.noise_level, device=resolve_device(device))
    check_student_request(restored, config, target_time or 0.0, guidance_scale)
    facts = replace(
        distilled_facts(config, restored.teacher, guidance_scale),
        training=f"{config.max_train_steps:,} steps planned, exported from {path.name}, seed {config.seed}",
    )
    t = config.t_min if target_time is None else max(target_time, config.t_min)
    return export_student(restored, output, t=t, guidance_scale=guidance_scale, facts=facts, overwrite=overwrite)
