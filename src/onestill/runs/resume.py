"""Which settings of a run may differ when it is gone on with, and which decide what it ends in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onestill.training.config import OPTIMISATION, DistillConfig, panel_of, usual_warmup

RESUMABLE_CHANGES = frozenset(
    {
        "base_student",
        "cache_dir",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "device",
        "local_files_only",
        "logging_steps",
        "max_nonfinite_steps",
        "num_teacher_steps",
        "num_time_bins",
        "num_validation_images",
        "output_dir",
        "prompt_cache_dir",
        "prompt_field",
        "prompt_file",
        "report_to",
        "resume_from_checkpoint",
        "revision",
        "teacher",
        "tracker_project_name",
        "validation_prompt",
        "validation_steps",
        "variant",
    }
)
"""Settings that may differ on resume. The paths of the teacher and the base student may, since their weights are compared
themselves, and so may the prompts' file, since the prompts are."""


def deciding_settings(config: DistillConfig) -> dict[str, Any]:
    """Return the settings that decide what a run ends in: those that must not differ on resume."""
    return {name: v for name, v in config.model_dump(mode="json").items() if name not in RESUMABLE_CHANGES}


def pool_settings(config: DistillConfig) -> dict[str, Any]:
    """Return the settings that a run's pool of anchors is made with: the deciding ones but those of the optimiser."""
    fields, of_forwards = DistillConfig.model_fields, {"train_batch_size", "mixed_precision", "allow_tf32"}
    optimiser = {name for name, field in fields.items() if panel_of(field) == OPTIMISATION} - of_forwards
    return {name: value for name, value in deciding_settings(config).items() if name not in optimiser}


def made_longer(config: DistillConfig, old: Mapping[str, Any]) -> DistillConfig:
    """Return the configuration of a run that goes on, with the warm-up it began with where the default would be another.

    A run of less than 1,000 steps has a shorter one, which does not grow with it.
    """
    short, begun = config.lr_warmup_steps, old.get("lr_warmup_steps")
    usual = {
        usual_warmup(steps) for steps in (old.get("max_train_steps"), config.max_train_steps) if isinstance(steps, int)
    }
    if not _can_be_longer(config) or short == begun or not {short, begun} <= usual:
        return config
    return config.model_copy(update={"lr_warmup_steps": begun})


def changed_settings(old: Mapping[str, Any], new: DistillConfig) -> list[str]:
    """Return "name: old -> new" for each setting that must not differ on resume and does.

    A run may become longer where no step knows how many there will be: with a constant rate and no progressive times.
    """
    values = deciding_settings(new)
    if _can_be_longer(new) and old.get("max_train_steps", 0) < new.max_train_steps:
        del values["max_train_steps"]
    # A run of a version without some setting had its default.
    defaults = {k: f.default for k, f in DistillConfig.model_fields.items()}
    old = {name: old.get(name, list(d) if isinstance(d := defaults[name], tuple) else d) for name in values}
    return [f"{name}: {old[name]!r} -> {values[name]!r}" for name in sorted(values) if old[name] != values[name]]


def _can_be_longer(config: DistillConfig) -> bool:
    return config.lr_scheduler.startswith("constant") and config.time_sampling != "progressive"
