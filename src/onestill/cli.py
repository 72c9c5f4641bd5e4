"""The command line: parse, call, print."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect as signatures
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional, TypeVar, get_args, get_origin

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from onestill import __version__
from onestill.config import DistillConfig, make_config

# Flags have underscores, as in diffusers' scripts; dashes mean the same.
CONTEXT = {"token_normalize_func": lambda name: name.replace("-", "_"), "help_option_names": ["-h", "--help"]}

app = typer.Typer(
    help="One-step generators from pre-trained diffusion models, without a training image.",
    context_settings=CONTEXT,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out, err = Console(), Console(stderr=True)

TeacherOption = Annotated[
    str,
    typer.Option("--teacher", help="Folder of a diffusers pipeline, hub id, or embedded teacher (digits, glyphs)."),
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")]
PLAY = "Playing (one of them; the same noise or condition all over)"
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of the first image; image i has seed + i.")]
LabelsOption = Annotated[list[int], typer.Option("--class_labels", help="Label; repeat for more. All if not given.")]
PromptOption = Annotated[list[str], typer.Option("--prompt", help="What to draw, for text teachers; repeat for more.")]
PromptFileOption = Annotated[
    Path | None, typer.Option("--prompt_file", help="Prompts instead: a .txt, .jsonl or .csv in UTF-8.")
]
PromptFieldOption = Annotated[
    str | None, typer.Option("--prompt_field", help="Field of the prompt in a .jsonl or .csv \\[default: prompt].")
]
BaseOption = Annotated[
    Path | None,
    typer.Option("--base_student", help="For super-resolution: who draws what is enlarged; that of the run."),
]
OfflineOption = Annotated[bool, typer.Option("--local_files_only", help="Never use the network.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
BatchOption = Annotated[int, typer.Option("--batch_size", help="Images in one network call.")]
StudentOption = Annotated[
    str, typer.Option("--student", help="Folder of a run, a checkpoint-N folder, or an exported pipeline.")
]


def main() -> None:
    """Run the command line; bad input ends with one clear line and exit code 2."""
    try:
        app()
    except ValueError as error:
        for line in str(error).splitlines():
            err.print(f"[red]error:[/red] {escape(line)}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _version(show: bool) -> None:
    if show:
        out.print(f"onestill {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """One-step generators from pre-trained diffusion models, without a training image."""


def _from_config(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command(settings, ...)` one flag per field of `DistillConfig`, so that flags and model cannot differ.

    A flag that is not given is absent from `settings`: then the YAML file or the model's default holds.
    """
    found = signatures.signature(command, eval_str=True).parameters.values()
    own = [p.replace(kind=signatures.Parameter.KEYWORD_ONLY) for p in found if p.name != "settings"]

    def wrapped(**given: Any) -> None:
        settings = {name: given.pop(name) for name in DistillConfig.model_fields}
        given_settings = {name: value for name, value in settings.items() if value is not None and value != []}
        command(given_settings, **given)

    parameters = [_parameter(name, info) for name, info in DistillConfig.model_fields.items()]
    # typer reads a function's signature from here; mypy does not know that functions may have one of their own.
    wrapped.__signature__ = signatures.Signature([*parameters, *own])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in [*parameters, *own]}
    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    return wrapped


def _parameter(name: str, info: Any) -> signatures.Parameter:
    """Return the keyword parameter, and with it the flag, of one field."""
    kind = _plain_type(info.annotation)
    names = [f"--{name}", *ALIASES.get(name, [])]
    if kind is bool:
        names = [f"--{name}/--no_{name}"]
    required = info.is_required()
    shown = "" if required or info.default in (None, ()) else f" [default: {_short(info.default)}]"
    option = typer.Option(
        *names,
        help=escape(f"{info.description}{' [required]' if required else ''}{shown}"),
        rich_help_panel=(info.json_schema_extra or {}).get("panel"),
        show_default=False,
    )
    annotation = Annotated[Optional[kind], option]  # type: ignore[valid-type]  # noqa: UP045 - made at run time
    return signatures.Parameter(name, signatures.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


ALIASES = {"teacher": ["--pretrained_model_name_or_path"]}


def _plain_type(annotation: Any) -> Any:
    """Return what typer should parse for a field's type: X of X | None, list[int] of tuple[int, ...]."""
    if get_origin(annotation) is tuple:
        # A type made at run time, which mypy cannot follow.
        return list[get_args(annotation)[0]]  # type: ignore[misc]
    options = [a for a in get_args(annotation) if a is not type(None)]
    return options[0] if type(None) in get_args(annotation) else annotation


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


@app.command()
@_from_config
def distill(
    settings: dict[str, Any],
    config: Annotated[Path | None, typer.Option("--config", help="YAML file of these settings; flags win.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry_run", help="Check everything, train nothing.")] = False,
) -> None:
    """Distil a teacher into a one-step student and export it to OUTPUT_DIR/pipeline."""
    from onestill import distillation as room
    from onestill.checks import make_output_dir
    from onestill.prompt_cache import PromptCacheError
    from onestill.trainer import NonFiniteLossError

    _quiet()
    prepared = room.prepare(make_config(settings, config))
    spec, made = prepared.base.spec, prepared.config
    for message in prepared.messages:
        err.print(escape(message), highlight=False, soft_wrap=True)
    classes = f", {spec.num_classes} classes" if spec.num_classes else ""
    shape = "x".join(map(str, spec.sample_shape))
    err.print(
        f"teacher {escape(made.teacher)}: {spec.family}, {spec.prediction_type}, {shape}{classes}, "
        f"start level t = {spec.t_max:.4g} ({spec.t_max_reason})",
        highlight=False,
        soft_wrap=True,
    )
    if dry_run:
        err.print(
            f"dry run: everything fits, nothing was written to {escape(str(made.output_dir))}",
            highlight=False,
            soft_wrap=True,
        )
        return
    make_output_dir(made.output_dir)
    try:
        result = room.run(prepared)
    except (NonFiniteLossError, PromptCacheError) as error:
        with contextlib.suppress(OSError):  # which holds something already, or another process has been here
            made.output_dir.rmdir()
        err.print(f"[red]stopped:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    except ValueError as error:
        raise RuntimeError("distillation failed") from error
    if result.stopped_by is not None:
        again = f"onestill distill ... --output_dir {made.output_dir} --resume_from_checkpoint latest"
        err.print(
            f"stopped at step {result.step}; state saved in {result.checkpoint}. Go on with: {again}",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(128 + result.stopped_by)
    if result.num_trained == 0:
        out.print(
            f"{escape(str(result.pipeline))} was finished before; nothing was left to train",
            highlight=False,
            soft_wrap=True,
        )
        return
    if result.export_error is None:  # another process of this run has exported, and says so
        return
    folder = escape(str(result.pipeline))
    out.print(
        f"[bold]{folder}[/bold]: loads with plain diffusers, one network evaluation per image",
        highlight=False,
        soft_wrap=True,
    )
    out.print(f"  self-check against the student: {result.export_error:.1e}", highlight=False)
    out.print(f"  pictures: {escape(str(made.output_dir / 'samples'))}", highlight=False, soft_wrap=True)
    out.print(
        f"  next: onestill evaluate --student {escape(str(made.output_dir))}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
@_from_config
def inspect(
    settings: dict[str, Any],
    config: Annotated[Path | None, typer.Option("--config", help="YAML file of settings; flags win.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a teacher is, and what distilling it would cost with these settings."""
    from onestill.chain import choose_base
    from onestill.checks import check_device, check_start, check_times
    from onestill.distillation import configured_teacher
    from onestill.inspection import inspect_teacher
    from onestill.prompt_plan import refuse_prompts, use_negative_prompt

    _quiet()
    made = make_config({"output_dir": Path("run"), **settings}, config)
    check_device(made.device)
    teacher = configured_teacher(made)
    base = (
        choose_base(teacher, made.base_student, made.noise_level)
        if made.base_student or made.noise_level is not None
        else None
    )
    check_times(made, teacher)
    check_start(teacher)
    guided = made.guidance_scale != 1 or made.guidance_range is not None
    use_negative_prompt(teacher, made.negative_prompt, acts=guided or made.empty_prompt_fraction > 0)
    if not teacher.spec.text:
        refuse_prompts(made)
    found = inspect_teacher(teacher, made, base)
    if as_json:
        print(json.dumps(found.as_dict()))
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    classes = (
        ""
        if found.num_classes is None
        else f" ({found.num_classes} classes, null class {'none' if found.null_class is None else found.null_class})"
    )
    rows = {
        "teacher": found.teacher,
        "family": found.family,
        "process": found.process,
        "prediction": found.prediction_type,
        "conditioning": found.conditioning + classes + (f" and {found.enlarges}" if found.enlarges else ""),
        "sample shape": " x ".join(map(str, found.sample_shape)),
        **(
            {"call": ", ".join(f"{name} = {value}" for name, value in found.arguments.items())}
            if found.arguments
            else {}
        ),
        "parameters": f"{found.num_parameters:,}",
        "start level": f"t_max = {found.t_max:.4g}, alpha = {found.alpha_at_t_max:.3g}, sigma = {found.sigma_at_t_max:.3g}: {found.t_max_reason}",
        "thresholding": f"{found.thresholding} (of the teacher's own scheduler)",
        "target time enters": found.target_time_enters,
        "estimate": f"{found.estimated_memory_gb:.2f} GB and {found.estimated_seconds_per_step:.3g} s per step on {found.estimate_device}, batch {found.train_batch_size}",
    }
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/bold]", escape(value))
    out.print(table)


@app.command()
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
        typer.Option("--num_images", help="How many \\[default: 16; fewer when playing].", show_default=False),
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
        int | None, typer.Option("--num_inference_steps", help="Steps of a teacher \\[default: 50].")
    ] = None,
    solver: Annotated[
        str | None, typer.Option("--solver", help="Step of a teacher: ddim, heun or midpoint \\[default: ddim].")
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
        int | None, typer.Option("--noise_level", help="Noise in what a teacher enlarges \\[default: 250].")
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
        typer.Option("--guidance_scales", help="A row for each w, with commas: 1,2,4,8.", rich_help_panel=PLAY),
    ] = None,
    target_times: Annotated[
        str | None,
        typer.Option(
            "--target_times", help="A student's prediction at each time, with commas: 1,0.5,0.", rich_help_panel=PLAY
        ),
    ] = None,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
    local_files_only: OfflineOption = False,
) -> None:
    """Generate images: a student's in one step, or a teacher's in many."""
    from onestill import api, pictures, play
    from onestill.checks import check_writable
    from onestill.runs import load_source

    _quiet()
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
    what: dict[str, Any] = {"seed": seed, "class_labels": class_labels, "batch_size": batch_size}
    if played is None:
        num_images = 16 if num_images is None else num_images
        images = api.sample(
            student,
            num_images=num_images,
            guidance_scale=guidance_scale,
            target_time=target_time,
            prompts=prompt,
            prompt_file=prompt_file,
            prompt_field=prompt_field,
            **where,
            **what,
        )
        written = pictures.save_samples(images, output, seed)
        drawn = f"{num_images} images, seeds {seed}..{seed + num_images - 1}"
        out.print(f"{drawn} -> {escape(str(written))}", highlight=False, soft_wrap=True)
        return
    scales = [] if guidance_scales is None else _values("guidance_scales", guidance_scales, guidance_scale)
    times = [] if target_times is None else _values("target_times", target_times, target_time or None)
    what["prompts"] = prompts = api.read_prompts(prompt, prompt_file, prompt_field)
    if interpolate is not None:
        play.check_interpolation(interpolate, seed, to_seed, class_labels, prompts)
        if num_images is not None:
            raise ValueError(f"--num_images {num_images}: --interpolate {interpolate} says how many already")
    # What a list asks for is asked for at once: the scale furthest from none, and the earliest time.
    scale = max(scales, key=lambda w: abs(w - 1)) if scales else guidance_scale
    source = load_source(student, guidance_scale=scale, target_time=max(times) if times else target_time, **where)
    if interpolate is not None:
        sheet = play.interpolate(source, interpolate, to_seed=to_seed, **what)
    elif fixed_noise:
        sheet = play.fixed_noise(source, num_images=num_images, **what)
    elif scales:
        sheet = play.guidance_sweep(source, scales, num_images=num_images, **what)
    else:
        sheet = play.student_trajectory(source, times, num_images=num_images, **what)
    written = sheet.save(output, overwrite=overwrite)
    drawn = f"{sheet.images.shape[0] * sheet.images.shape[1]} images ({played})"
    out.print(f"{drawn} -> {escape(str(written))}", highlight=False, soft_wrap=True)


@app.command()
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
        Path | None, typer.Option("--output", help="Folder of the report \\[default: RUN/evaluation].")
    ] = None,
    overwrite: OverwriteOption = False,
    device: DeviceOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    local_files_only: OfflineOption = False,
) -> None:
    """Compare a student's one step with its teacher's many, in a table with its protocol."""
    from onestill import api
    from onestill.evaluation.report import print_report

    _quiet()
    folder = output or api.default_report_folder(student)
    report = api.evaluate(
        student,
        teacher=teacher,
        num_samples=num_samples,
        steps=_numbers("steps", steps, int, "whole numbers with commas, such as 50,10,4,1"),
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
        say=lambda line: err.print(escape(line), highlight=False, soft_wrap=True),
    )
    if as_json:
        print(report.model_dump_json())
        return
    print_report(report, out)
    out.print(f"report and picture: {escape(str(folder))}", highlight=False, soft_wrap=True)


@app.command()
def export(
    student: StudentOption,
    output: Annotated[Path, typer.Option("--output", help="Folder to write.")],
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance_scale", help="w to bake in, for students that take it.")
    ] = None,
    target_time: Annotated[
        float | None, typer.Option("--target_time", help="Target time to bake in \\[default: the run's t_min].")
    ] = None,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
) -> None:
    """Write the student of a run or of a checkpoint-N folder as a stock diffusers folder."""
    from onestill import api

    _quiet()
    error = api.export(
        student,
        output,
        guidance_scale=guidance_scale,
        target_time=target_time,
        device=device,
        overwrite=overwrite,
    )
    out.print(
        f"[bold]{escape(str(output))}[/bold]: self-check against the student {error:.1e}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def demo(
    teacher: Annotated[str, typer.Argument(help="The embedded teacher: glyphs (text) or digits (classes).")] = "glyphs",
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Folder of the demo.")] = Path("demo"),
    max_train_steps: Annotated[
        int | None, typer.Option("--max_train_steps", help="Steps, if not the demo's own.", min=1)
    ] = None,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    overwrite: OverwriteOption = False,
) -> None:
    """Distil an embedded teacher in a few minutes on a CPU, and show what was gained and lost."""
    from onestill import demo as room
    from onestill.evaluation.report import print_report

    _quiet()
    report, picture = room.run_demo(
        output_dir,
        teacher=teacher,
        seed=seed,
        device=device,
        max_train_steps=max_train_steps,
        overwrite=overwrite,
        say=lambda line: err.print(escape(line), highlight=False, soft_wrap=True),
    )
    print_report(report, out)
    out.print(f"picture:  {escape(str(picture))}", highlight=False, soft_wrap=True)
    out.print(
        f"pipeline: {escape(str(output_dir / 'pipeline'))}  (loads with plain diffusers)",
        highlight=False,
        soft_wrap=True,
    )


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
        "--interpolate": interpolate is not None,
        "--fixed_noise": fixed_noise,
        "--guidance_scales": guidance_scales is not None,
        "--target_times": target_times is not None,
    }
    given = [flag for flag, is_given in flags.items() if is_given]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)}: give one of them, each is a picture of its own")
    if to_seed is not None and interpolate is None:
        raise ValueError(f"--to_seed {to_seed} is where --interpolate goes to; say with it how many images")
    return given[0] if given else None


def _values(flag: str, text: str, one: float | None) -> list[float]:
    """Return the numbers of a flag that takes a list, beside which `one`, of the flag for one, was not given."""
    from onestill.play import check_values

    if one is not None:
        raise ValueError(f"--{flag} {text} and --{flag.removesuffix('s')} {one:g}: give one or the other")
    values = _numbers(flag, text, float, "numbers with commas, such as 1,0.5,0")
    check_values(flag, values)
    return values


Number = TypeVar("Number", int, float)


def _numbers(flag: str, text: str, kind: Callable[[str], Number], words: str) -> list[Number]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--{flag} {text!r} must be {words}") from None


def _quiet() -> None:
    """Keep the libraries' own progress bars and notices out of the output; errors stay."""
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    if importlib.util.find_spec("transformers") is not None:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()


if __name__ == "__main__":
    main()
