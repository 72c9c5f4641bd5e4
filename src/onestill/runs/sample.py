"""`sample`: images of a student in one step, or of a teacher in many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from onestill.data.prompts import read_prompts
from onestill.runs.load import load_source
from onestill.sampling.explore import check_samples, samples
from onestill.teachers.base import Teacher


def sample(
    student: str | Path | None = None,
    *,
    teacher: str | Path | Teacher | None = None,
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
