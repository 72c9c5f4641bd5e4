"""The configuration of a distillation run: the settings of every room, as one flat model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from onestill.core.errors import SettingError, named
from onestill.core.settings import MOST_ROWS, MOST_STEPS, MOST_WIDTH, Settings, about, make, setting
from onestill.data.settings import PromptSettings
from onestill.objectives.flow_map import check_flow_map
from onestill.objectives.registry import ObjectiveSettings, rows_of
from onestill.students.settings import LoraSettings
from onestill.teachers.settings import TeacherSettings
from onestill.training.recipes import RUN, RecipeSettings

OPTIMISATION, WATCHING = "Optimisation", "Watching"
USUAL_WARMUP = 100
LEAST_WIDTH = 0.01
"""The smallest relative width of an average of weights."""
TWICE_OR_HALF = 0.07
"""Up to this width the second average is twice as wide as the first, beyond it half as wide."""


class OptimisationSettings(Settings):
    """Steps, batches, AdamW, precision."""

    max_train_steps: int = setting(10_000, OPTIMISATION, "Optimiser steps.", ge=1, le=MOST_STEPS)
    train_batch_size: int = setting(64, OPTIMISATION, "Images in one forward pass, per process.", ge=2, le=MOST_ROWS)
    gradient_accumulation_steps: int = setting(1, OPTIMISATION, "Forward passes per optimiser step.", ge=1, le=10_000)
    gradient_checkpointing: bool = setting(False, OPTIMISATION, "Recompute activations to save memory.")
    learning_rate: float = setting(1e-4, OPTIMISATION, "Peak learning rate.", gt=0, le=10)
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = setting(
        "constant_with_warmup", OPTIMISATION, "Learning-rate schedule."
    )
    lr_warmup_steps: int = setting(
        USUAL_WARMUP, OPTIMISATION, "Warm-up steps; if not given at most a tenth of the run.", ge=0, le=MOST_STEPS
    )
    adam_beta1: float = setting(0.9, OPTIMISATION, "AdamW beta 1.", ge=0, lt=1)
    adam_beta2: float = setting(0.999, OPTIMISATION, "AdamW beta 2.", ge=0, lt=1)
    adam_weight_decay: float = setting(0.0, OPTIMISATION, "AdamW weight decay.", ge=0, le=1000)
    adam_epsilon: float = setting(1e-8, OPTIMISATION, "AdamW epsilon.", gt=0, le=1)
    max_grad_norm: float = setting(1.0, OPTIMISATION, "Gradient norm to clip to.", gt=0, le=1e12)
    ema_width: tuple[Annotated[float, Field(ge=0, le=MOST_WIDTH)], ...] = setting(
        (0.09,),
        OPTIMISATION,
        "Relative width of the average of the weights that is exported; 0 is none. Of several, with commas, the one "
        "nearest to the teacher at the end.",
        commas=True,
    )
    num_ema_snapshots: int = setting(
        8,
        OPTIMISATION,
        "Moments of the run of which averages are kept, to rebuild other widths from; 0 is none, and saves an average.",
        ge=0,
        le=100,
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = setting("no", OPTIMISATION, "Precision of the networks.")
    allow_tf32: bool = setting(False, OPTIMISATION, "Allow TF32 matrix products on NVIDIA GPUs.")
    max_nonfinite_steps: int = setting(
        20, OPTIMISATION, "Stop after this many non-finite losses in a row.", may_change=True, ge=1, le=MOST_STEPS
    )

    @property
    def ema_tracks(self) -> tuple[float, ...]:
        """Widths of the averages that are kept: what pictures show, and if others can be rebuilt one more for them."""
        first = self.ema_width[0]
        beside = 2 * first if first <= TWICE_OR_HALF else first / 2
        return (first, beside)[: 1 + (self.num_ema_snapshots > 0)] if first else ()

    @model_validator(mode="after")
    def _averages_can_be_had(self) -> Self:
        widths = self.ema_width
        spelt = widths[0] if len(widths) == 1 else ",".join(f"{width:g}" for width in widths)
        if not widths or len(set(widths)) != len(widths):
            raise SettingError("ema_width", spelt, "must be one number, or different ones")
        if any(0 < width < LEAST_WIDTH for width in widths) or (len(widths) > 1 and 0 in widths):
            zero = ", or 0 for none" if len(widths) == 1 else ", none of them 0"
            raise SettingError("ema_width", spelt, f"must be at least {LEAST_WIDTH}{zero}")
        if len(widths) > 1 and not self.num_ema_snapshots:
            why = f"of several widths all but one are rebuilt, and {named('num_ema_snapshots')} is 0"
            raise SettingError("ema_width", spelt, why)
        return self

    @model_validator(mode="before")
    @classmethod
    def _shorten_warmup(cls, data: Any) -> Any:
        steps = data.get("max_train_steps") if isinstance(data, dict) else None
        if isinstance(steps, int) and data.get("lr_warmup_steps") is None:
            return {**data, "lr_warmup_steps": usual_warmup(steps)}
        return data

    @model_validator(mode="after")
    def _warms_up_within_the_run(self) -> Self:
        if self.lr_scheduler != "constant" and self.lr_warmup_steps >= self.max_train_steps:
            why = f"must be below {named('max_train_steps')}, {self.max_train_steps}"
            raise SettingError("lr_warmup_steps", self.lr_warmup_steps, why)
        return self

    @classmethod
    def overruled(cls, values: Mapping[str, Any], read: Mapping[str, Any]) -> set[str]:
        """A shorter run has no warm-up that is longer than it."""
        steps, warmup = values.get("max_train_steps"), read.get("lr_warmup_steps")
        too_long = isinstance(steps, int) and isinstance(warmup, int) and warmup >= steps
        return super().overruled(values, read) | ({"lr_warmup_steps"} if too_long else set())


class RunSettings(Settings):
    """Where a run is written, where it runs, what it goes on from."""

    output_dir: Path = setting(..., RUN, "Folder of the run.", may_change=True)
    seed: int = setting(0, RUN, "Seed of every random draw.", ge=0, lt=2**31)
    device: str = setting("auto", RUN, "auto, cpu, cuda, cuda:N or mps.", may_change=True)
    resume_from_checkpoint: str | None = setting(
        None, RUN, "'latest', or a checkpoint-N folder of this run.", may_change=True, path=True
    )
    checkpointing_steps: int = setting(500, RUN, "Steps between checkpoints.", may_change=True, ge=1, le=MOST_STEPS)
    checkpoints_total_limit: int = setting(2, RUN, "Checkpoints kept.", may_change=True, ge=1, le=MOST_STEPS)


def _shown(default: Any, description: str, **limits: Any) -> Any:
    return setting(default, WATCHING, description, may_change=True, **limits)


class WatchSettings(Settings):
    """What a run shows of itself."""

    logging_steps: int = _shown(20, "Steps between lines of logs/metrics.jsonl.", ge=1, le=MOST_STEPS)
    validation_steps: int = _shown(500, "Steps between pictures of student beside teacher.", ge=1, le=MOST_STEPS)
    num_validation_images: int = _shown(10, "Images in such a picture.", ge=1, le=64)
    validation_prompt: tuple[str, ...] = _shown(
        (), "Prompt of such a picture; repeat for more. The file's first if not given."
    )
    num_teacher_steps: int = _shown(50, "DDIM steps of the teacher in such a picture.", ge=1, le=1000)
    num_time_bins: int = _shown(10, "Bins of target time in which the residual is logged.", ge=1, le=100)
    report_to: Annotated[str | None, Field(min_length=1)] = _shown(
        None, "Tracker of accelerate, such as tensorboard; JSON and PNG are always written."
    )
    tracker_project_name: str = _shown("onestill", "Project name for the tracker.", min_length=1, max_length=200)

    @model_validator(mode="after")
    def _shows_every_prompt(self) -> Self:
        if (num := len(self.validation_prompt)) > self.num_validation_images:
            why = f"shows fewer than the {num} of {named('validation_prompt')}"
            raise SettingError("num_validation_images", self.num_validation_images, why)
        return self


# The help and the written YAML show the settings of the last base first.
class DistillConfig(
    WatchSettings,
    RecipeSettings,
    RunSettings,
    OptimisationSettings,
    LoraSettings,
    ObjectiveSettings,
    PromptSettings,
    TeacherSettings,
):
    """Everything that decides a distillation run. Frozen; unknown names are refused."""

    @model_validator(mode="after")
    def _times_fit(self) -> Self:
        t_max = 1.0 if self.t_max is None else self.t_max
        if self.t_min >= t_max:
            raise SettingError("t_min", self.t_min, f"must be below {named('t_max')}, {t_max:g}")
        for name in self.steps_in_t():
            if getattr(self, name) >= t_max - self.t_min:
                why = f"must be below {named('t_max')} minus {named('t_min')}, {t_max - self.t_min:g}"
                raise SettingError(name, getattr(self, name), why)
        check_flow_map(self)
        return self

    def steps_in_t(self) -> list[str]:
        """Return the settings that are steps of the teacher in t and are used."""
        return ["delta", *(["flow_map_delta"] if self.flow_map_fraction > 0 else [])]

    @model_validator(mode="after")
    def _leaves_bootstrap_rows(self) -> Self:
        size = self.train_batch_size
        if next(iter(rows_of(self, size).values())) > self.num_boundary_rows(size):
            return self
        weights = {"boundary_fraction": self.boundary_weight}
        fractions = ("anchor_fraction", "corrector_fraction", "flow_map_fraction")
        weights |= {name: getattr(self, name) for name in fractions}
        names = [name for name, weight in weights.items() if weight > 0]
        given = [getattr(self, name) for name in names]
        raise SettingError(names, given, f"no bootstrap rows are left in a batch of {size}")


def usual_warmup(steps: int) -> int:
    """Return the warm-up of a run of so many steps that names none: at most a tenth of it."""
    return min(USUAL_WARMUP, max(steps, 0) // 10)


def make_config(
    values: Mapping[str, Any], config_file: str | Path | None = None, *, recorded: bool = False
) -> DistillConfig:
    """Return the configuration made of a YAML file, a shipped one too, and of `values`, which win; raises as `make`."""
    return make(DistillConfig, values, config_file, recorded=recorded)


def deciding_settings(config: DistillConfig) -> dict[str, Any]:
    """Return the settings that decide what a run ends in: those that must not differ on resume."""
    fields = DistillConfig.model_fields
    return {name: v for name, v in config.model_dump(mode="json").items() if not about(fields[name], "may_change")}


def pool_settings(config: DistillConfig) -> dict[str, Any]:
    """Return the settings that pools of objectives are made with: the deciding ones but those of the optimiser."""
    fields, of_forwards = DistillConfig.model_fields, {"train_batch_size", "mixed_precision", "allow_tf32"}
    optimiser = {name for name, field in fields.items() if about(field, "panel") == OPTIMISATION} - of_forwards
    return {name: value for name, value in deciding_settings(config).items() if name not in optimiser}
