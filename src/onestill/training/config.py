"""The configuration of a distillation run: the settings of every room, as one flat model."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from onestill.core.errors import SettingError, named
from onestill.core.settings import MOST_ROWS, MOST_STEPS, MOST_WIDTH, Settings, about, make, setting
from onestill.data.settings import PromptSettings
from onestill.objectives.anchors import Anchors, usual_anchors
from onestill.objectives.boot import Boot, num_boundary_rows
from onestill.objectives.corrector import Corrector
from onestill.objectives.flow_map import FlowMap, check_flow_map
from onestill.objectives.registry import ObjectiveSettings, objectives_of, rows_of
from onestill.students.settings import HubSettings, LoraSettings
from onestill.teachers.settings import TeacherSettings
from onestill.training.recipes import RUN, RecipeSettings, with_recipe

OPTIMISATION, WATCHING = "Optimisation", "Watching"
USUAL_WARMUP = 100
LEAST_CORRECTED = 4
"""The smallest batch that has a corrector if nothing is said: it takes rows by two, and leaves as many."""
MOST_RATE, FULL_RATE_WEIGHTS = 1e-3, 4_000_000
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
    learning_rate: float | None = setting(
        None, OPTIMISATION, "Peak learning rate; by the number of trained weights if not given.", gt=0, le=10
    )
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = setting(
        "cosine", OPTIMISATION, "Learning-rate schedule."
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
    report: bool = _shown(True, "Keep report.html of the run up to date: its numbers, curves and pictures.")
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
    HubSettings,
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

    @model_validator(mode="before")
    @classmethod
    def _fill_what_follows_from_others(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = _begun(data)
        if "num_anchors" in data or data.get("budget") is not None:
            return data
        num = usual_num_anchors(data)
        return data if num is None else {**data, "num_anchors": num}

    @classmethod
    def overruled(cls, values: Mapping[str, Any], read: Mapping[str, Any]) -> set[str]:
        """What a file's other settings came to gives way where those do."""
        left_out = super().overruled(values, read)
        kept = {name: value for name, value in read.items() if name not in left_out | {"num_anchors"}}
        usual = usual_num_anchors(read)
        follows = usual == read.get("num_anchors") and usual_num_anchors({**kept, **values}) != usual
        return left_out | ({"num_anchors"} if follows else set())

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
        used = {"delta": Boot, "flow_map_delta": FlowMap}
        return [name for name, kind in used.items() if kind in objectives_of(self, self.train_batch_size)]

    @model_validator(mode="after")
    def _has_one_scaler(self) -> Self:
        if self.mixed_precision == "fp16" and Corrector in rows_of(self, self.train_batch_size):
            why = "its one scaler serves one network, and the corrector trains another"
            todo = f"use bf16 or no, or {named('corrector_fraction')} 0"
            raise SettingError("mixed_precision", "fp16", why, todo)
        return self

    @model_validator(mode="after")
    def _divides_the_batch(self) -> Self:
        size, rows = self.train_batch_size, rows_of(self, self.train_batch_size)
        left = rows.get(Boot, 0) - num_boundary_rows(self, size)
        regressed = left > 0 or (left == 0 and {Anchors, FlowMap} & rows.keys())
        if regressed and (self.anchor_fraction == 0 or Anchors in rows):
            return self
        weights = {"boundary_fraction": self.boundary_weight}
        fractions = ("anchor_fraction", "corrector_fraction", "flow_map_fraction")
        weights |= {name: getattr(self, name) for name in fractions}
        names = [name for name, weight in weights.items() if weight > 0]
        given = [getattr(self, name) for name in names]
        why = "no rows are left for them all" if left >= 0 else f"{-left:,} rows too many are asked for"
        raise SettingError(
            names, given, f"{why} in a batch of {size}", f"raise {named('train_batch_size')}, or lower one of them"
        )


def usual_num_anchors(given: Mapping[str, Any]) -> int | None:
    """Return how many anchors a run makes that is given those settings and no number; None if it makes none, or cannot be."""
    values = {name: field.default for name, field in DistillConfig.model_fields.items()}
    values |= {name: _as_number(value) for name, value in _begun(given).items()}
    settings, size = SimpleNamespace(**values), values["train_batch_size"]
    try:
        rows = settings.gradient_accumulation_steps * rows_of(settings, size).get(Anchors, 0) * num_processes()
        return usual_anchors(settings.max_train_steps * rows) if rows > 0 else None
    except (TypeError, ValueError, OverflowError):
        return None


def _begun(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with those of their recipe, and without a corrector where a batch is too small and none is named."""
    size = _as_number(given.get("train_batch_size"))
    is_small = isinstance(size, (int, float)) and size < LEAST_CORRECTED
    return {**({"corrector_fraction": 0.0} if is_small else {}), **with_recipe(given)}


def _as_number(value: Any) -> Any:
    """Return the number that a text is, as the model reads it; anything else as it is."""
    if not isinstance(value, str):
        return value
    with suppress(ValueError):
        return int(value)
    with suppress(ValueError):
        return float(value)
    return value


def num_processes() -> int:
    """Return how many processes train this run, as torchrun and accelerate say it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def usual_learning_rate(num_weights: int) -> float:
    """Return the peak learning rate for so many trained weights: 1e-3 up to four million, then falling as 1/sqrt."""
    return MOST_RATE * min(1.0, math.sqrt(FULL_RATE_WEIGHTS / max(num_weights, 1)))


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
