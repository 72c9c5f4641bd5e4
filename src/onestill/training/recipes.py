"""A run in few words: a recipe, which is settings of the method by one name, and a budget, which decides its length."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Final, Literal, Self

from pydantic import model_validator

from onestill.core.errors import SettingError, named
from onestill.core.settings import Settings, about, setting
from onestill.objectives.boot import OBJECTIVE

RUN = "Run"
RECIPES: Final[Mapping[str, Mapping[str, Any]]] = {
    "default": {},
    "boot": {
        "time_sampling": "uniform",
        "solver": "ddim",
        "bootstrap_weight": "inverse_rho",
        "boundary_weight": 1.0,
        "ema_target_decay": 0.0,
        "robust_exponent": 0.0,
        "anchor_fraction": 0.0,
        "anchor_path_fraction": 0.0,
        "flow_map_fraction": 0.0,
        "corrector_fraction": 0.0,
    },
}
"""Settings by a recipe's name: `default` is the defaults, `boot` the paper's method alone (docs/method.md, section 10)."""
OF_LENGTH: Final = ("max_train_steps", "lr_warmup_steps", "num_anchors", "checkpointing_steps", "validation_steps")
PLANNED: Final = (*OF_LENGTH, "num_prompts")
"""What a budget decides where nothing else is given."""
SECONDS_OF: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
LONGEST: Final = 365 * SECONDS_OF["d"]


class RecipeSettings(Settings):
    """What the other settings start from, and how long the run may take."""

    recipe: Literal["default", "boot"] = setting(
        "default", RUN, "What the method starts from: the defaults, or the paper's BOOT alone.", may_change=True
    )
    budget: str | None = setting(
        None,
        RUN,
        f"Time for all of the run, such as 30m, 8h or 2d, in place of {named('max_train_steps')}: measured and planned.",
        may_change=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _start_from_the_recipe(cls, data: Any) -> Any:
        return with_recipe(data) if isinstance(data, dict) else data

    @model_validator(mode="before")
    @classmethod
    def _one_length(cls, data: Any) -> Any:
        given = [data.get(name) for name in ("budget", "max_train_steps")] if isinstance(data, dict) else [None]
        if isinstance(given[0], (int, float)):
            raise _no_time(given[0])
        if None not in given:
            raise SettingError(["budget", "max_train_steps"], given, "both say how long the run is", "give one of them")
        return data

    @model_validator(mode="after")
    def _budget_is_a_time(self) -> Self:
        if self.budget is not None:
            seconds_of_budget(self.budget)
        return self

    @classmethod
    def overruled(cls, values: Mapping[str, Any], read: Mapping[str, Any]) -> set[str]:
        """A file's method gives way to a recipe that is asked for beside it, its length to a budget or a length."""
        of_method = {name for name, field in cls.model_fields.items() if about(field, "panel") == OBJECTIVE}
        of_method = of_method if values.get("recipe") is not None else set()
        of_length = set(OF_LENGTH) if values.get("budget") is not None else set()
        budget = {"budget"} if values.get("max_train_steps") is not None else set()
        return super().overruled(values, read) | of_method | of_length | budget

    @classmethod
    def said_of(cls, values: Mapping[str, Any], read: Mapping[str, Any], left_out: set[str]) -> str:
        """A budget beside a file plans anew what the file says of the length."""
        goes_on = values.get("resume_from_checkpoint") is not None  # with the plan that it has
        gone = () if values.get("budget") is None or goes_on else (left_out & read.keys()) - values.keys()
        planned = [named(name) for name in OF_LENGTH if name in gone]
        them = "them" if len(planned) > 1 else "it"
        return (
            f"{named('budget')} plans {', '.join(planned)} anew; give {them} beside it to keep {them}"
            if planned
            else ""
        )


def with_recipe(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with those of the recipe that they name, which give way to them."""
    recipe = given.get("recipe")
    return {**(RECIPES.get(recipe, {}) if isinstance(recipe, str) else {}), **given}


def seconds_of_budget(text: str) -> float:
    """Return the seconds that a budget stands for; SettingError if it is no time, or longer than a year."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*([smhd])", text.strip())
    seconds = float(found[1]) * SECONDS_OF[found[2]] if found else 0.0
    if seconds <= 0:
        raise _no_time(text)
    if seconds > LONGEST:
        raise SettingError("budget", text, "must be at most 365d")
    return seconds


def _no_time(given: Any) -> SettingError:
    return SettingError("budget", given, "is no time", "give a number with s, m, h or d, such as 30m")


def as_budget(seconds: float) -> str:
    """Return a time as a budget is given, rounded up."""
    unit = "s" if seconds <= 600 else "m" if seconds <= 36_000 else "h" if seconds <= 10 * 86_400 else "d"
    return f"{math.ceil(seconds / SECONDS_OF[unit])}{unit}"


def in_time(seconds: float) -> str:
    """Return a time in words."""
    for unit, name in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}" if unit > 60 else f"{seconds / unit:.0f} {name}"
    if seconds >= 0.9995:
        return f"{seconds:.0f} seconds" if seconds >= 10 else f"{seconds:.2g} seconds"
    return f"{1000 * seconds:.3g} ms"
