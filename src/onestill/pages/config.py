"""The settings of pages: one that runs stand on side by side, and one that a student is played with on."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import model_validator

from onestill.core.errors import SettingError, named
from onestill.core.settings import LONGEST_TEXT, MOST_GUIDANCE, MOST_LABELS, Settings, setting
from onestill.students.settings import FEW_STEPS

COMPARED, OUTPUT = "Runs", "Output"
MOST_RUNS = 12
SERVED, SERVER, ASKED = "What draws", "Server", "What is asked for"
HOST, PORT = "127.0.0.1", 7860
MOST_SEED = 2**32
"""Up to here numbers of a browser, which have 53 bits, still hold the place between two seeds."""
NUM_SEEDS = 100
"""Seeds along the slider of the page."""
MOST_PICTURES = 16
"""Of one answer."""


class CompareConfig(Settings):
    """Which runs stand beside each other, and where that is written."""

    runs: tuple[Path, ...] = setting(..., COMPARED, "Folder of a run that distill has made; repeat for more.")
    output: Path | None = setting(
        None,
        OUTPUT,
        "Folder of report.html, the table and the plots; the command takes comparison if it is not given, and prints no table for other programs.",
    )
    overwrite: bool = setting(False, OUTPUT, "Replace what is there.")

    @model_validator(mode="after")
    def _is_a_few(self) -> Self:
        if not 2 <= len(self.runs) <= MOST_RUNS:
            why = f"are {len(self.runs)}, and from 2 to {MOST_RUNS} can be seen side by side"
            raise SettingError("runs", [str(run) for run in self.runs], why)
        return self


class ServeConfig(Settings):
    """Which student is played with, and where its page is served."""

    student: str = setting(
        ..., SERVED, "Folder of a run, a checkpoint-N folder, or an exported pipeline: one step or few.", path=True
    )
    teacher: str | None = setting(
        None, SERVED, "The teacher that draws beside it on request; that of the run if not given.", path=True
    )
    num_teacher_steps: int = setting(50, SERVED, "Steps of the teacher.", ge=1, le=1000)
    guidance_scale: float | None = setting(
        None, SERVED, "w of the teacher, and of a student that takes it at first.", ge=0, le=MOST_GUIDANCE
    )
    prompt: str | None = setting(
        None, SERVED, "What the page shows at first, for text students; the first of the run's prompts if not given."
    )
    seed: int = setting(
        0, SERVED, f"First of the {NUM_SEEDS} seeds along the slider.", ge=0, le=MOST_SEED - NUM_SEEDS - MOST_PICTURES
    )
    base_student: Path | None = setting(
        None, SERVED, "For super-resolution: who draws what is enlarged; that of the run if not given."
    )
    device: str = setting("auto", SERVED, "auto, cpu, cuda, cuda:N or mps.")
    local_files_only: bool = setting(False, SERVED, "Never use the network.")
    host: str = setting(HOST, SERVER, "Address to listen at; any but this machine's own is open to others.")
    port: int = setting(PORT, SERVER, "Port to listen at; 0 is a free one.", ge=0, le=65_535)
    queue_size: int = setting(16, SERVER, "Requests that may wait; more are told to come again.", ge=1, le=1000)


class Asked(Settings):
    """One request of the page: what is to be drawn."""

    prompt: str | None = setting(None, ASKED, "What to draw, for text students.", max_length=LONGEST_TEXT)
    class_label: int | None = setting(
        None, ASKED, "Label to draw; that of the seed, as in sample, if not given.", ge=0, le=MOST_LABELS
    )
    seed: int = setting(0, ASKED, "Seed of the first picture; picture i has seed + i.", ge=0, le=MOST_SEED)
    between: float = setting(
        0.0, ASKED, f"Place on the arc from the noise of {named('seed')} to that of the next.", ge=0, lt=1
    )
    num_images: int = setting(1, ASKED, "Pictures.", ge=1, le=MOST_PICTURES)
    num_inference_steps: int | None = setting(None, ASKED, "Steps; the fewest if not given.", ge=1, le=FEW_STEPS)
    guidance_scale: float | None = setting(None, ASKED, "w, for students that take it.", ge=0, le=MOST_GUIDANCE)
    target_time: float = setting(0.0, ASKED, "Target time; 0 is the finished image.", ge=0, le=1)
    by_teacher: bool = setting(False, ASKED, "Whether the teacher draws it, in its many steps.")
