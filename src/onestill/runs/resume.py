"""Which settings of a run may differ when it is gone on with, and which decide what it ends in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onestill.training.config import DistillConfig, deciding_settings, usual_warmup


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
