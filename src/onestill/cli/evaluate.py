"""The command `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onestill.cli.options import (
    BaseOption,
    BatchOption,
    DeviceOption,
    LabelsOption,
    OfflineOption,
    OverwriteOption,
    PromptFieldOption,
    PromptFileOption,
    PromptOption,
    SeedOption,
    StudentOption,
    numbers,
)
from onestill.cli.output import note, out, quiet, say


def evaluate(
    student: StudentOption,
    teacher: Annotated[str | None, typer.Option("--teacher", help="The teacher; that of the run if not given.")] = None,
    num_samples: Annotated[int, typer.Option("--num_samples", help="Images per row of the table.")] = 2000,
    steps: Annotated[str, typer.Option("--steps", help="DDIM steps of the teacher's rows, with commas.")] = "50,10,4,1",
    reference: Annotated[
        str,
        typer.Option("--reference", help="teacher (its own samples), an embedded teacher's images, a folder, or auto."),
    ] = "auto",
    num_reference_steps: Annotated[
        int, typer.Option("--num_reference_steps", help="DDIM steps of the teacher as reference.")
    ] = 100,
    features: Annotated[
        str,
        typer.Option("--features", help="teacher, digits, glyphs, a .safetensors file, a transformers model, or auto."),
    ] = "auto",
    clip: Annotated[
        str | None,
        typer.Option("--clip", help="A transformers CLIP model, folder or hub id: adds the CLIP score of the prompts."),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option("--guidance_scale", help="w of the teacher's rows; as distilled if not given."),
    ] = None,
    null_class: Annotated[
        int | None, typer.Option("--null_class", help="The teacher's label for 'no class'; that of the run.")
    ] = None,
    class_labels: LabelsOption = [],  # noqa: B006 - typer copies it
    prompt: PromptOption = [],  # noqa: B006 - typer copies it
    prompt_file: PromptFileOption = None,
    prompt_field: PromptFieldOption = None,
    negative_prompt: Annotated[
        str | None,
        typer.Option("--negative_prompt", help="In place of 'no prompt' in the teacher's guidance; that of the run."),
    ] = None,
    base_student: BaseOption = None,
    seed: SeedOption = 0,
    batch_size: BatchOption = 64,
    speed: Annotated[bool, typer.Option("--speed/--no_speed", help="Time the rows.")] = True,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", help="Folder of the report [default: RUN/evaluation, or beside an export: FOLDER-evaluation]."
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    device: DeviceOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    local_files_only: OfflineOption = False,
) -> None:
    """Compare a student's one step with its teacher's many, in a table with its protocol."""
    from onestill.evaluation.report import print_report
    from onestill.runs import evaluate as pair

    quiet()
    folder = output or pair.default_report_folder(student)
    report = pair.evaluate(
        student,
        teacher=teacher,
        num_samples=num_samples,
        steps=numbers("steps", steps, int, "whole numbers with commas, such as 50,10,4,1"),
        reference=reference,
        num_reference_steps=num_reference_steps,
        features=features,
        clip=clip,
        guidance_scale=guidance_scale,
        null_class=null_class,
        class_labels=class_labels,
        prompts=prompt,
        prompt_file=prompt_file,
        prompt_field=prompt_field,
        negative_prompt=negative_prompt,
        base_student=base_student,
        seed=seed,
        batch_size=batch_size,
        measure_speed=speed,
        output=folder,
        overwrite=overwrite,
        device=device,
        local_files_only=local_files_only,
        show_progress=True,
        say=note,
    )
    if as_json:
        print(report.model_dump_json())
        return
    print_report(report, out)
    say(f"report and picture: {folder}")
