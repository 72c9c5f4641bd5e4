"""The command `sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
    numbers,
)
from onestill.cli.output import note, quiet, say

PLAY = "Playing (one of them; the same noise or condition all over)"
EXAMPLES = {"guidance_scales": "1,2,4,8", "target_times": "1,0.5,0"}


def sample(
    student: Annotated[
        str | None, typer.Option("--student", help="Run, checkpoint-N or exported pipeline: one step.")
    ] = None,
    teacher: Annotated[str | None, typer.Option("--teacher", help="A teacher instead: many steps.")] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output", help="A .png (grid), a .safetensors, or a folder (one PNG per seed); a .gif of what is played."
        ),
    ] = Path("samples.png"),
    num_images: Annotated[
        int | None,
        typer.Option("--num_images", help="How many [default: 16; fewer when playing].", show_default=False),
    ] = None,
    seed: SeedOption = 0,
    class_labels: LabelsOption = [],  # noqa: B006 - typer copies it
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance_scale", help="w, for teachers and students that take it.")
    ] = None,
    target_time: Annotated[
        float, typer.Option("--target_time", help="The student's target time; 0 is the finished image.")
    ] = 0.0,
    num_inference_steps: Annotated[
        int | None, typer.Option("--num_inference_steps", help="Steps of a teacher [default: 50].")
    ] = None,
    solver: Annotated[
        str | None, typer.Option("--solver", help="Step of a teacher: ddim, heun or midpoint [default: ddim].")
    ] = None,
    null_class: Annotated[int | None, typer.Option("--null_class", help="A teacher's label for 'no class'.")] = None,
    prompt: PromptOption = [],  # noqa: B006 - typer copies it
    prompt_file: PromptFileOption = None,
    prompt_field: PromptFieldOption = None,
    negative_prompt: Annotated[
        str | None, typer.Option("--negative_prompt", help="In place of 'no prompt' in a text teacher's guidance.")
    ] = None,
    height: Annotated[int | None, typer.Option("--height", help="Height of a teacher's pictures.", min=1)] = None,
    width: Annotated[int | None, typer.Option("--width", help="Width of a teacher's pictures.", min=1)] = None,
    num_frames: Annotated[int | None, typer.Option("--num_frames", help="Frames of a teacher's video.", min=1)] = None,
    audio_end_in_s: Annotated[
        float | None, typer.Option("--audio_end_in_s", help="End of a teacher's sound in seconds.")
    ] = None,
    max_sequence_length: Annotated[
        int | None, typer.Option("--max_sequence_length", help="Tokens of a prompt that a teacher takes.", min=1)
    ] = None,
    base_student: BaseOption = None,
    noise_level: Annotated[
        int | None, typer.Option("--noise_level", help="Noise in what a teacher enlarges [default: 250].")
    ] = None,
    batch_size: BatchOption = 64,
    interpolate: Annotated[
        int | None,
        typer.Option(
            "--interpolate",
            help="So many images from --seed to --to_seed, or from one --prompt to another.",
            rich_help_panel=PLAY,
        ),
    ] = None,
    to_seed: Annotated[
        int | None, typer.Option("--to_seed", min=0, help="Where --interpolate goes to.", rich_help_panel=PLAY)
    ] = None,
    fixed_noise: Annotated[
        bool,
        typer.Option("--fixed_noise", help="One noise (--seed) for every prompt or label.", rich_help_panel=PLAY),
    ] = False,
    guidance_scales: Annotated[
        str | None,
        typer.Option(
            "--guidance_scales",
            help=f"A row for each w, with commas: {EXAMPLES['guidance_scales']}.",
            rich_help_panel=PLAY,
        ),
    ] = None,
    target_times: Annotated[
        str | None,
        typer.Option(
            "--target_times",
            help=f"A student's prediction at each time, with commas: {EXAMPLES['target_times']}.",
            rich_help_panel=PLAY,
        ),
    ] = None,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
    local_files_only: OfflineOption = False,
) -> None:
    """Generate images: a student's in one step, or a teacher's in many."""
    from onestill.data.prompts import read_prompts
    from onestill.runs.checks import check_writable
    from onestill.runs.load import load_source
    from onestill.sampling import explore as play
    from onestill.sampling import pictures

    quiet()
    played = _played(interpolate, to_seed, fixed_noise, guidance_scales, target_times)
    pictures.check_output(output, overwrite=overwrite, moves=played is not None)
    check_writable(output, "output")
    if (height is None) != (width is None):
        raise ValueError("--height and --width are given together or not at all")
    call = {
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "audio_end_in_s": audio_end_in_s,
        "max_sequence_length": max_sequence_length,
    }
    where: dict[str, Any] = {
        "teacher": teacher,
        "arguments": {name: value for name, value in call.items() if value is not None},
        "num_inference_steps": num_inference_steps,
        "solver": solver,
        "null_class": null_class,
        "negative_prompt": negative_prompt,
        "base_student": base_student,
        "noise_level": noise_level,
        "device": device,
        "local_files_only": local_files_only,
    }
    scales = [] if guidance_scales is None else _values("guidance_scales", guidance_scales, guidance_scale)
    times = [] if target_times is None else _values("target_times", target_times, target_time or None)
    prompts = read_prompts(prompt, prompt_file, prompt_field)
    what: dict[str, Any] = {
        "seed": seed,
        "class_labels": class_labels,
        "prompts": prompts,
        "batch_size": batch_size,
        "show_progress": True,
    }
    num_samples = 16 if num_images is None else num_images
    if played is None:
        play.check_samples(num_samples, seed, batch_size)
    if interpolate is not None:
        play.check_interpolation(interpolate, seed, to_seed, class_labels, prompts)
        if num_images is not None:
            raise ValueError(f"--num_images {num_images}: --interpolate {interpolate} says how many already")
    # What a list asks for is asked for at once: the scale furthest from none, and the earliest time.
    scale = max(scales, key=lambda w: abs(w - 1)) if scales else guidance_scale
    time = max(times) if times else target_time
    with play.asked_by(played, scales or times):
        source = load_source(student, guidance_scale=scale, target_time=time, **where)
    most = num_images or (num_samples if played in (None, "fixed_noise") else play.MOST_IMAGES)
    for warning in source.warnings(prompts[:most]):
        note(warning)
    if played is None:
        images, words = play.samples(source, num_samples, **what)
        written = pictures.save_samples(images, output, seed, words)
        seeds = f"seed {seed}" if num_samples == 1 else f"seeds {seed}..{seed + num_samples - 1}"
        say(f"{_images(num_samples)}, {seeds} -> {written}")
        return
    if interpolate is not None:
        sheet = play.interpolate(source, interpolate, to_seed=to_seed, **what)
    elif fixed_noise:
        sheet = play.fixed_noise(source, num_images=num_images, **what)
    elif scales:
        sheet = play.guidance_sweep(source, scales, num_images=num_images, **what)
    else:
        sheet = play.student_trajectory(source, times, num_images=num_images, **what)
    written = sheet.save(output, overwrite=overwrite)
    num = sheet.images.shape[0] * sheet.images.shape[1]
    frames = f", {sheet.num_frames} frames there and back" if output.suffix == ".gif" and sheet.num_frames > 1 else ""
    say(f"{_images(num)} (--{played}){frames} -> {written}")


def _images(num: int) -> str:
    return f"{num} image{'s' if num != 1 else ''}"


def _played(
    interpolate: int | None,
    to_seed: int | None,
    fixed_noise: bool,
    guidance_scales: str | None,
    target_times: str | None,
) -> str | None:
    """Return the flag that says what to play; None for plain samples.

    Raises:
        ValueError: If there are two.
    """
    flags = {
        "interpolate": interpolate is not None,
        "fixed_noise": fixed_noise,
        "guidance_scales": guidance_scales is not None,
        "target_times": target_times is not None,
    }
    given = [flag for flag, is_given in flags.items() if is_given]
    if len(given) > 1:
        raise ValueError(
            f"{' and '.join(f'--{flag}' for flag in given)}: give one of them, each is a picture of its own"
        )
    if to_seed is not None and interpolate is None:
        raise ValueError(f"--to_seed {to_seed} is where --interpolate goes to; say with it how many images")
    return given[0] if given else None


def _values(flag: str, text: str, one: float | None) -> list[float]:
    """Return the numbers of a flag that takes a list, beside which `one`, of the flag for one, was not given."""
    from onestill.sampling.explore import check_values

    if one is not None:
        raise ValueError(f"--{flag} {text} and --{flag.removesuffix('s')} {one:g}: give one or the other")
    values = numbers(flag, text, float, f"numbers with commas, such as {EXAMPLES[flag]}")
    check_values(flag, values)
    return values
