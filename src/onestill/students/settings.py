"""The settings that say what of a student is trained."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from onestill.core.errors import SettingError, named
from onestill.core.settings import Settings, setting

LORA = "LoRA"


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
