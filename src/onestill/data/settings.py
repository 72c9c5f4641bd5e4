"""The settings that say which prompts a run draws from."""

from __future__ import annotations

from pathlib import Path

from onestill.core.settings import MOST_STEPS, Settings, setting

PROMPTS = "Prompts"


class PromptSettings(Settings):
    """Prompts of a text teacher."""

    # May change: the prompts themselves are compared.
    prompt_file: Path | None = setting(
        None, PROMPTS, "Prompts of a text teacher: a .txt (one per line), .jsonl or .csv in UTF-8.", may_change=True
    )
    prompt_field: str | None = setting(
        None, PROMPTS, "Field of the prompt in a .jsonl or .csv; 'prompt' if not given.", may_change=True, min_length=1
    )
    num_prompts: int | None = setting(
        None, PROMPTS, "Different prompts to draw from; as many as the run can draw if not given.", ge=1, le=MOST_STEPS
    )
    prompt_cache_dir: Path | None = setting(
        None,
        PROMPTS,
        "Where encoded prompts are kept for all runs; ~/.cache/onestill/prompts if not given.",
        may_change=True,
    )
    negative_prompt: str | None = setting(None, PROMPTS, "Takes the place of 'no prompt' in the guidance.")
    empty_prompt_fraction: float = setting(0.0, PROMPTS, "Share of the draws with the empty prompt.", ge=0, lt=1)
