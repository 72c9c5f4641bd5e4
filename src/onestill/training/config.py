"""The one typed run configuration: command-line flags, YAML file and Python arguments are this model."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

TEACHER, PROMPTS, OBJECTIVE, LORA = "Teacher", "Prompts", "Objective", "LoRA"
OPTIMISATION, RUN, WATCHING = "Optimisation", "Run", "Watching"


def _field(default: Any, panel: str, description: str, **limits: Any) -> Any:
    return Field(default, description=description, json_schema_extra={"panel": panel}, **limits)


def panel_of(field: FieldInfo) -> str:
    """Return the panel of the help that a setting stands in."""
    extra = field.json_schema_extra
    assert isinstance(extra, dict)
    return str(extra["panel"])


CALL_ARGUMENTS = ("height", "width", "num_frames", "audio_end_in_s", "max_sequence_length")
"""Settings that are arguments of every call of the teacher's pipeline; its own defaults where they are not given."""


class DistillConfig(BaseModel):
    """Everything that decides a distillation run. Frozen; unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    # Teacher
    teacher: str = _field(
        ..., TEACHER, "Folder of a diffusers pipeline, hub id, or embedded teacher (digits, glyphs).", min_length=1
    )
    revision: str | None = _field(None, TEACHER, "Branch, tag or commit of the hub id.")
    variant: str | None = _field(None, TEACHER, "Weights' variant, such as fp16.")
    cache_dir: Path | None = _field(None, TEACHER, "Where downloads of a hub id go.")
    local_files_only: bool = _field(False, TEACHER, "Never use the network.")
    null_class: int | None = _field(None, TEACHER, "Label that means 'no class'; needed for guidance.", ge=0)
    t_max: float | None = _field(None, TEACHER, "Start level; chosen from the teacher if not given.", gt=0, le=1)
    height: int | None = _field(None, TEACHER, "Height of the pictures in pixels; the pipeline's if not given.", ge=1)
    width: int | None = _field(None, TEACHER, "Width of the pictures in pixels; given with --height.", ge=1)
    num_frames: int | None = _field(None, TEACHER, "Frames of a video; the pipeline's if not given.", ge=1)
    audio_end_in_s: float | None = _field(
        None, TEACHER, "End of a sound in seconds; the pipeline's if not given.", gt=0
    )
    max_sequence_length: int | None = _field(
        None,
        TEACHER,
        "Tokens of a prompt that a T5 or language-model encoder takes; the pipeline's if not given.",
        ge=1,
    )
    guidance_scale: float = _field(
        1.0, TEACHER, "w in u + w (c - u), distilled into the student; 1 is none. Flux: what its network is told.", ge=0
    )
    guidance_scale_min: float | None = _field(
        None, TEACHER, "Draw w per image from here ... and give it to the student.", ge=0
    )
    guidance_scale_max: float | None = _field(None, TEACHER, "... up to here.", ge=0)
    class_labels: tuple[int, ...] = _field((), TEACHER, "Labels to distil; all if not given.")
    thresholding: Literal["teacher", "none", "static", "dynamic"] = _field(
        "teacher", TEACHER, "Thresholding of the guided prediction; 'teacher' does what its scheduler does."
    )
    threshold_limit: float = _field(1.0, TEACHER, "Largest magnitude, for static and dynamic.", gt=0)
    threshold_ratio: float = _field(0.995, TEACHER, "Quantile, for dynamic.", gt=0, le=1)

    base_student: Path | None = _field(
        None,
        TEACHER,
        "Run or exported pipeline of the earlier stage's student, which draws what a super-resolution teacher enlarges.",
    )
    noise_level: int | None = _field(
        None, TEACHER, "Noise mixed into those pictures, of 1000; what the pipeline does (250) if not given.", ge=0
    )

    # Prompts
    prompt_file: Path | None = _field(
        None, PROMPTS, "Prompts of a text teacher: a .txt (one per line), .jsonl or .csv in UTF-8."
    )
    prompt_field: str | None = _field(
        None, PROMPTS, "Field of the prompt in a .jsonl or .csv; 'prompt' if not given.", min_length=1
    )
    num_prompts: int | None = _field(
        None, PROMPTS, "Different prompts to draw from; as many as the run can draw if not given.", ge=1
    )
    prompt_cache_dir: Path | None = _field(
        None, PROMPTS, "Where encoded prompts are kept for all runs; ~/.cache/onestill/prompts if not given."
    )
    negative_prompt: str | None = _field(None, PROMPTS, "Takes the place of 'no prompt' in the guidance.")
    empty_prompt_fraction: float = _field(0.0, PROMPTS, "Share of the draws with the empty prompt.", ge=0, lt=1)

    # Objective
    time_sampling: Literal["uniform", "s_first", "progressive"] = _field(
        "s_first", OBJECTIVE, "How step times are drawn."
    )
    delta: float = _field(1 / 25, OBJECTIVE, "Step size in t.", gt=0, lt=1)
    t_min: float = _field(0.0, OBJECTIVE, "Cleanest target time; 0 is the finished image.", ge=0, lt=1)
    solver: Literal["ddim", "heun", "midpoint"] = _field("midpoint", OBJECTIVE, "Step that makes the bootstrap target.")
    bootstrap_weight: Literal["inverse_rho", "velocity", "none"] = _field(
        "velocity", OBJECTIVE, "Weight of the residuals."
    )
    boundary_weight: float = _field(1.0, OBJECTIVE, "beta, the weight of the boundary loss; 0 leaves it out.", ge=0)
    boundary_fraction: float = _field(0.125, OBJECTIVE, "Share of the batch for the boundary loss.", gt=0, lt=1)
    anchor_fraction: float = _field(
        0.0,
        OBJECTIVE,
        "Share of the batch that is regressed on whole teacher trajectories; 0 is BOOT alone.",
        ge=0,
        lt=1,
    )
    num_anchors: int = _field(10_000, OBJECTIVE, "Teacher trajectories made for that before the first step.", ge=1)
    num_anchor_steps: int = _field(12, OBJECTIVE, "Solver steps of each.", ge=1, le=1000)
    ema_target_decay: float = _field(
        0.0, OBJECTIVE, "Decay of an EMA student used in the target; 0 is the student itself.", ge=0, lt=1
    )

    # LoRA
    lora_rank: int | None = _field(
        None, LORA, "Train updates of this rank beside the teacher's own weights, not a copy of them.", ge=1
    )
    lora_alpha: float | None = _field(None, LORA, "Updates are scaled by alpha / rank; the rank if not given.", gt=0)
    lora_target_modules: tuple[str, ...] = _field(
        (),
        LORA,
        "Layers by the last part of their name; attention and feed-forwards if not given, all where those are scarce.",
    )

    # Optimisation
    max_train_steps: int = _field(10_000, OPTIMISATION, "Optimiser steps.", ge=1)
    train_batch_size: int = _field(64, OPTIMISATION, "Images in one forward pass, per process.", ge=2)
    gradient_accumulation_steps: int = _field(1, OPTIMISATION, "Forward passes per optimiser step.", ge=1)
    gradient_checkpointing: bool = _field(False, OPTIMISATION, "Recompute activations to save memory.")
    learning_rate: float = _field(1e-4, OPTIMISATION, "Peak learning rate.", gt=0)
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = _field(
        "constant_with_warmup", OPTIMISATION, "Learning-rate schedule."
    )
    lr_warmup_steps: int = _field(100, OPTIMISATION, "Warm-up steps; if not given at most a tenth of the run.", ge=0)
    adam_beta1: float = _field(0.9, OPTIMISATION, "AdamW beta 1.", ge=0, lt=1)
    adam_beta2: float = _field(0.999, OPTIMISATION, "AdamW beta 2.", ge=0, lt=1)
    adam_weight_decay: float = _field(0.0, OPTIMISATION, "AdamW weight decay.", ge=0)
    adam_epsilon: float = _field(1e-8, OPTIMISATION, "AdamW epsilon.", gt=0)
    max_grad_norm: float = _field(1.0, OPTIMISATION, "Gradient norm to clip to.", gt=0)
    ema_decay: float = _field(
        0.9999,
        OPTIMISATION,
        "Largest decay of the averaged weights that are exported; 0 is none.",
        ge=0,
        lt=1,
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = _field("no", OPTIMISATION, "Precision of the networks.")
    allow_tf32: bool = _field(False, OPTIMISATION, "Allow TF32 matrix products on NVIDIA GPUs.")
    max_nonfinite_steps: int = _field(20, OPTIMISATION, "Stop after this many non-finite losses in a row.", ge=1)

    # Run
    output_dir: Path = _field(..., RUN, "Folder of the run.")
    seed: int = _field(0, RUN, "Seed of every random draw.", ge=0, lt=2**31)
    device: str = _field("auto", RUN, "auto, cpu, cuda, cuda:N or mps.")
    resume_from_checkpoint: str | None = _field(None, RUN, "'latest', or a checkpoint-N folder of this run.")
    checkpointing_steps: int = _field(500, RUN, "Steps between checkpoints.", ge=1)
    checkpoints_total_limit: int = _field(2, RUN, "Checkpoints kept.", ge=1)

    # Watching
    logging_steps: int = _field(20, WATCHING, "Steps between lines of logs/metrics.jsonl.", ge=1)
    validation_steps: int = _field(500, WATCHING, "Steps between pictures of student beside teacher.", ge=1)
    num_validation_images: int = _field(10, WATCHING, "Images in such a picture.", ge=1, le=64)
    validation_prompt: tuple[str, ...] = _field(
        (), WATCHING, "Prompt of such a picture; repeat for more. The first ones of the file if not given."
    )
    num_teacher_steps: int = _field(50, WATCHING, "DDIM steps of the teacher in such a picture.", ge=1, le=1000)
    num_time_bins: int = _field(10, WATCHING, "Bins of target time in which the residual is logged.", ge=1, le=100)
    report_to: Annotated[str | None, Field(min_length=1)] = _field(
        None, WATCHING, "Tracker of accelerate, such as tensorboard; JSON lines and PNG are always written."
    )
    tracker_project_name: str = _field("onestill", WATCHING, "Project name for the tracker.", min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _shorten_warmup(cls, data: Any) -> Any:
        steps = data.get("max_train_steps") if isinstance(data, dict) else None
        if not isinstance(steps, int) or data.get("lr_warmup_steps") is not None:
            return data
        return {**data, "lr_warmup_steps": usual_warmup(steps)}

    @model_validator(mode="after")
    def _consistent(self) -> DistillConfig:
        t_max = 1.0 if self.t_max is None else self.t_max
        if self.t_min >= t_max:
            raise ValueError(f"--t_min {self.t_min:g} must be below --t_max {t_max:g}")
        if self.delta >= t_max - self.t_min:
            raise ValueError(f"--delta {self.delta:g} must be below --t_max minus --t_min, {t_max - self.t_min:g}")
        if (self.height is None) != (self.width is None):
            raise ValueError("--height and --width are given together or not at all")
        low, high = self.guidance_scale_min, self.guidance_scale_max
        if (low is None) != (high is None):
            raise ValueError("--guidance_scale_min and --guidance_scale_max are given together or not at all")
        if low is not None and high is not None:
            if low >= high:
                raise ValueError(f"--guidance_scale_min {low:g} must be below --guidance_scale_max {high:g}")
            if "guidance_scale" in self.model_fields_set and self.guidance_scale != 1:
                raise ValueError("--guidance_scale fixes w and --guidance_scale_min/max draw it: give one or the other")
        if self.num_boundary_rows + self.num_anchor_rows >= self.train_batch_size:
            given = f"--boundary_fraction {self.boundary_fraction:g}" if self.boundary_weight > 0 else ""
            if self.anchor_fraction > 0:
                given += f"{' and ' if given else ''}--anchor_fraction {self.anchor_fraction:g}"
            verb = "leave" if " and " in given else "leaves"
            raise ValueError(f"{given} {verb} no bootstrap rows in a batch of {self.train_batch_size}")
        if len(self.validation_prompt) > self.num_validation_images:
            raise ValueError(
                f"--validation_prompt was given {len(self.validation_prompt)} times, and --num_validation_images "
                f"{self.num_validation_images} shows fewer"
            )
        if self.lr_scheduler != "constant" and self.lr_warmup_steps >= self.max_train_steps:
            raise ValueError(
                f"--lr_warmup_steps {self.lr_warmup_steps} must be below --max_train_steps {self.max_train_steps}"
            )
        if self.lora_rank is None and (self.lora_alpha is not None or self.lora_target_modules):
            given = (
                f"alpha {self.lora_alpha:g}"
                if self.lora_alpha
                else f"target_modules {' '.join(self.lora_target_modules)}"
            )
            raise ValueError(f"--lora_{given} says how to train a LoRA: give --lora_rank too")
        return self

    @property
    def call_arguments(self) -> dict[str, Any]:
        """The arguments of every call of the teacher's pipeline that are given."""
        return {name: value for name in CALL_ARGUMENTS if (value := getattr(self, name)) is not None}

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        """Range that w is drawn from, or None if it is fixed."""
        low, high = self.guidance_scale_min, self.guidance_scale_max
        return None if low is None or high is None else (low, high)

    @property
    def num_boundary_rows(self) -> int:
        """Rows of a batch that go to the boundary loss."""
        return max(1, round(self.boundary_fraction * self.train_batch_size)) if self.boundary_weight > 0 else 0

    @property
    def num_anchor_rows(self) -> int:
        """Rows of a batch that are anchors."""
        return max(1, round(self.anchor_fraction * self.train_batch_size)) if self.anchor_fraction > 0 else 0


def usual_warmup(steps: int) -> int:
    """Return the warm-up of a run of so many steps that names none: at most a tenth of it."""
    usual: int = DistillConfig.model_fields["lr_warmup_steps"].default
    return min(usual, max(steps, 0) // 10)


def make_config(values: Mapping[str, Any], config_file: Path | None = None) -> DistillConfig:
    """Return the configuration made of a YAML file and of `values`, which win.

    Raises:
        ValueError: With one line per problem, each naming the flag and what was given.
    """
    read = read_yaml(config_file) if config_file else {}
    for names, where in ((read, str(config_file)), (values, "the configuration")):
        refuse_unknown(names, DistillConfig.model_fields, where)
    merged = {**_not_against(values, read), **values}
    try:
        return DistillConfig(**merged)
    except ValidationError as error:
        raise ValueError(describe(error, {name: f" ({config_file})" for name in read if name not in values})) from None


def _not_against(values: Mapping[str, Any], read: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a file says without what `values` exclude: another kind of guidance, a warm-up longer than the run."""
    fixed, drawn = {"guidance_scale"}, {"guidance_scale_min", "guidance_scale_max"}
    given = {name for name, value in values.items() if value is not None}
    out = (fixed if drawn & given else set()) | (drawn if fixed & given else set())
    steps, warmup = values.get("max_train_steps"), read.get("lr_warmup_steps")
    if isinstance(steps, int) and isinstance(warmup, int) and warmup >= steps:
        out |= {"lr_warmup_steps"}
    return {name: value for name, value in read.items() if name not in out}


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        ValueError: If the file is missing or holds no mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise ValueError(f"--config {path} is no YAML{line}: {error.problem or error.context}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path} is no YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config {path} must hold 'name: value' lines, it holds {type(content).__name__}")
    return {str(key).replace("-", "_"): value for key, value in content.items()}


def write_yaml(config: DistillConfig, path: Path) -> None:
    """Write the resolved configuration."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


def refuse_unknown(values: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    """Raise ValueError naming each unknown key of `values` and the nearest known name."""
    problems = []
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            problems.append(f"{where}: unknown setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    if problems:
        raise ValueError("\n".join(problems))


def describe(error: ValidationError, origins: Mapping[str, str] | None = None) -> str:
    """Return a validation error as one line per problem, naming flags.

    Args:
        error: The error.
        origins: Where a setting's value comes from, in words, by its name; nothing is said of others.
    """
    lines = []
    for problem in error.errors():
        message = problem["msg"].removeprefix("Value error, ")
        if problem["loc"]:
            given = "" if problem["type"] == "missing" else f", got {problem['input']!r}"
            message = "is required" if problem["type"] == "missing" else message[0].lower() + message[1:]
            message = f"--{problem['loc'][0]}: {message}{given}{(origins or {}).get(str(problem['loc'][0]), '')}"
        lines.append(message)
    return "\n".join(lines)
