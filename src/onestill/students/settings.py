"""The settings that say what of a student is trained, how many steps it may be asked for, and where it is uploaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import model_validator

from onestill.core.errors import SettingError, named
from onestill.core.settings import Settings, setting

LORA, HUB = "LoRA", "Hub"
FEW_STEPS = 8
"""The most steps of a student."""


class LoraSettings(Settings):
    """Updates of low rank beside the teacher's own weights."""

    lora_rank: int | None = setting(
        None, LORA, "Train updates of this rank beside the teacher's own weights, not a copy of them.", ge=1, le=4096
    )
    lora_alpha: float | None = setting(
        None, LORA, "Updates are scaled by alpha / rank; the rank if not given.", gt=0, le=1e6
    )
    lora_target_modules: tuple[str, ...] = setting(
        (),
        LORA,
        "Layers by the last part of their name; attention and feed-forwards if not given, all where those are scarce.",
    )

    @model_validator(mode="after")
    def _has_a_rank(self) -> Self:
        for name in ("lora_alpha", "lora_target_modules"):
            if self.lora_rank is None and (value := getattr(self, name)):
                raise SettingError(name, value, "says how to train a LoRA", f"give {named('lora_rank')} too")
        return self


class HubSettings(Settings):
    """Where on the Hugging Face hub an exported folder goes, if it does."""

    push_to_hub: bool = setting(
        False, HUB, "Upload the exported folder to the hub, after its self-check.", may_change=True
    )
    hub_model_id: str | None = setting(
        None,
        HUB,
        "Where it goes, as owner/name; your own name and the output folder's if not given.",
        may_change=True,
        min_length=1,
    )
    hub_private: bool = setting(False, HUB, "Make it a private repository.", may_change=True)

    @model_validator(mode="after")
    def _is_uploaded(self) -> Self:
        for name in ("hub_model_id", "hub_private"):
            if not self.push_to_hub and (value := getattr(self, name)):
                raise SettingError(name, value, "says where to upload to", f"give {named('push_to_hub')} too")
        return self

    @classmethod
    def overruled(cls, values: Mapping[str, Any], read: Mapping[str, Any]) -> set[str]:
        """What a file says of the place gives way where nothing is uploaded."""
        place = {"hub_model_id", "hub_private"} if values.get("push_to_hub") is False else set()
        return super().overruled(values, read) | place


def check_steps(num_steps: int, target_time: float = 0.0, *, is_map: bool) -> None:
    """Raise SettingError if a student was not trained for a number of steps; more than one end at the picture."""
    if not 1 <= num_steps <= FEW_STEPS:
        why = f"a student has 1 to {FEW_STEPS} steps"
        raise SettingError("num_inference_steps", num_steps, why, f"give {named('teacher')} for more")
    if num_steps > 1 and not is_map:
        ways = f"{named('anchor_path_fraction')} or {named('flow_map_fraction')}"
        todo = f"distil with {ways} above 0 for one of 1 to {FEW_STEPS}"
        raise SettingError("num_inference_steps", num_steps, "this student was trained for one step", todo)
    if num_steps > 1 and target_time:
        why = "is of a single step; several end at the finished image"
        raise SettingError("target_time", target_time, why, f"leave it out, or give {named('num_inference_steps')} 1")
