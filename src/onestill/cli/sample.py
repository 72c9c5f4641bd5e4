"""The command `sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onestill.cli.fields import ConfigFile, from_config
from onestill.cli.output import note, quiet, say
from onestill.core.settings import make
from onestill.sampling.config import SampleConfig


@from_config(SampleConfig, positional="student")
def sample(settings: dict[str, Any], config: ConfigFile = None) -> None:
    """Generate images: a student's in one step, or a teacher's in many."""
    made = make(SampleConfig, settings, config)
    output = made.output or Path("samples.png")
    from onestill.runs.sample import draw
    from onestill.sampling.explore import Samples

    quiet()
    found = draw(made.model_copy(update={"output": output}), show_progress=True, say=note)
    written = found.save(output, overwrite=made.overwrite)
    if isinstance(found, Samples):
        last = found.seed + len(found.images) - 1
        seeds = f"seed {last}" if last == found.seed else f"seeds {found.seed}..{last}"
        say(f"{_images(len(found.images))}, {seeds} -> {written}")
        return
    moves = output.suffix == ".gif" and found.num_frames > 1
    frames = f", {found.num_frames} frames there and back" if moves else ""
    say(f"{_images(found.images.shape[0] * found.images.shape[1])} (--{made.exploring}){frames} -> {written}")


def _images(num: int) -> str:
    return f"{num} image{'s' if num != 1 else ''}"
