"""Flags that several commands have, and the reading of lists in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of the first image; image i has seed + i.")]
LabelsOption = Annotated[list[int], typer.Option("--class_labels", help="Label; repeat for more. All if not given.")]
PromptOption = Annotated[list[str], typer.Option("--prompt", help="What to draw, for text teachers; repeat for more.")]
PromptFileOption = Annotated[
    Path | None, typer.Option("--prompt_file", help="Prompts instead: a .txt, .jsonl or .csv in UTF-8.")
]
PromptFieldOption = Annotated[
    str | None, typer.Option("--prompt_field", help="Field of the prompt in a .jsonl or .csv [default: prompt].")
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

Number = TypeVar("Number", int, float)


def numbers(flag: str, text: str, kind: Callable[[str], Number], words: str) -> list[Number]:
    """Return the numbers of a flag that takes several with commas; ValueError, with `words` for them, if it is none."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--{flag} {text!r} must be {words}") from None
