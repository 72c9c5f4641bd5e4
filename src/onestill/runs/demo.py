"""The demo: an embedded teacher, distilled in minutes on a CPU, with the table and one picture."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onestill.core.devices import resolve_device
from onestill.core.errors import SettingError, named
from onestill.core.settings import make, read_yaml
from onestill.diffusion.trajectory import CALLS_PER_STEP
from onestill.evaluation.comparison import SPEED_ROUNDS
from onestill.evaluation.config import EvaluateConfig
from onestill.evaluation.held_out import SHARE
from onestill.evaluation.report import Report
from onestill.runs.build import configured_teacher
from onestill.runs.distill import distill, print_message
from onestill.runs.evaluate import evaluate
from onestill.runs.folder import CONFIG_FILE, EVALUATION_FOLDER, check_output_dir
from onestill.runs.plan import Speed, measure
from onestill.runs.sample import sample
from onestill.sampling import pictures
from onestill.training.config import make_config

PROJECT_NAME = "onestill-demo"
"""Marks the folder of a run as a demo, which may be removed when overwriting is allowed."""


@dataclass(frozen=True)
class Demo:
    """What is done to one embedded teacher: settings of `distill`, `evaluate` and `sample`."""

    distillation: Mapping[str, Any]
    evaluation: Mapping[str, Any]  # its steps are the teacher's rows of the picture too
    shown: Mapping[str, Any]  # what the picture shows
    columns: tuple[str, ...] = ()  # words above the picture's columns


# All of combinations that were held out from the teacher and from the student.
PROMPTS = (
    "an italic green serif A on a black background",
    "a bold purple sans B on a yellow background",
    "a regular white serif G on a red background",
    "a regular blue mono K on a cyan background",
    "an italic cyan serif Q on a purple background",
    "a bold cyan sans S on a red background",
    "an italic red sans W on a white background",
    "a bold black mono 8 on a green background",
)
MOST_SECONDS = 480.0
"""How long a demo should take at most; on a slower machine it has fewer steps and compares fewer images."""
LEAST_SHARE = 1 / 3
"""The least share of both: a student of fewer steps would not be worth looking at."""
AROUND_SECONDS = 25.0
"""How long all but network calls takes: loading, checking, exporting, features, pictures."""
COMMON = {"checkpointing_steps": 400, "validation_steps": 400}
FEW_STEPS = (1, 4)
"""The student's steps in the table and the picture."""
DEMOS = {
    "glyphs": Demo(
        distillation={
            "guidance_scale": 3.0,
            "max_train_steps": 360,
            "train_batch_size": 32,
            "num_validation_images": 8,
            **COMMON,
        },
        evaluation={"num_samples": 480, "batch_size": 16, "steps": (50, 8, 4, 1), "student_steps": FEW_STEPS},
        shown={"prompts": PROMPTS, "num_images": len(PROMPTS), "seed": 0},
        columns=PROMPTS,
    ),
    "digits": Demo(
        distillation={"max_train_steps": 1200, **COMMON},
        evaluation={"num_samples": 1800, "batch_size": 64, "steps": (50, 8, 4, 1), "student_steps": FEW_STEPS},
        # A multiple of ten, so that the columns are the classes in order.
        shown={"num_images": 10, "seed": 70},
    ),
}


@dataclass(frozen=True)
class Plan:
    """How much of a demo is done, and how long that takes on this machine."""

    settings: Mapping[str, Any]  # of `distill`
    evaluation: Mapping[str, Any]
    seconds: float
    share: float = 1.0

    @property
    def words(self) -> str:
        """What to say of it."""
        steps, images = self.settings["max_train_steps"], self.evaluation["num_samples"]
        minutes = max(1, round(self.seconds / 60))
        text = f"will take about {minutes} minute{'s' if minutes != 1 else ''} on this machine, as it is now"
        if self.share == 1:
            return text
        why = "fewer would give no student worth looking at" if self.share == LEAST_SHARE else "it is slow for more"
        return f"{text}: {steps:,} steps and {images:,} images, which may differ between machines; {why}"


def plan(
    demo: Demo,
    settings: Mapping[str, Any],
    speed: Speed,
    max_train_steps: int | None = None,
    num_samples: int | None = None,
) -> Plan:
    """Return what to do of a demo so that it takes `MOST_SECONDS` at most, but never less than `LEAST_SHARE` of it.

    The seconds are those of the steps, of the anchors, of the run's watching itself, and of the comparison, whose network calls are nearly all the
    teacher's. A number of steps or of images that was asked for is taken as it is, with as many anchors for each step
    as in the full demo.
    """
    images = demo.evaluation["num_samples"] if num_samples is None else num_samples
    evaluation, full = {**demo.evaluation, "num_samples": images}, settings["max_train_steps"]
    calls = (settings["num_anchor_steps"] + 1) * CALLS_PER_STEP[settings["anchor_solver"]]
    steps = full if max_train_steps is None else max_train_steps
    training = (1 + SHARE) * steps * (speed.step + settings["num_anchors"] / full * calls * speed.call)
    of_image = (sum(evaluation["steps"]) + sum(FEW_STEPS)) * speed.call
    drawing = evaluation["num_samples"] * of_image
    timing = (SPEED_ROUNDS + 1) * (evaluation["batch_size"] + 1) * of_image
    around = AROUND_SECONDS + timing + demo.shown["num_images"] * of_image
    share = 1.0
    kept, shared = (0.0, training + drawing) if num_samples is None else (drawing, training)
    if max_train_steps is None:
        share = min(1.0, max(LEAST_SHARE, (MOST_SECONDS - around - kept) / shared))
        steps = round(share * full)
        if num_samples is None:
            evaluation["num_samples"] = round(share * images)
    anchors = max(1, settings["num_anchors"] * steps // full)
    chosen = {**settings, "max_train_steps": steps, "num_anchors": anchors}
    return Plan(chosen, evaluation, around + kept + share * shared, share)


def run_demo(
    output_dir: Path,
    *,
    teacher: str = "glyphs",
    seed: int = 0,
    device: str = "cpu",
    max_train_steps: int | None = None,
    num_samples: int | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = print_message,
) -> tuple[Report, Path]:
    """Distil, evaluate and draw; return the report and the picture.

    An earlier demo in `output_dir` is removed first with `overwrite`, and refused without, as is anything else there;
    `max_train_steps` and `num_samples` take the place of the demo's own, which are fewer on a slow machine: how fast it
    is is measured first. The run's configuration has the number that was chosen; `say` is called with a line before each part.
    """
    if teacher not in DEMOS:
        raise SettingError("teacher", teacher, "there is no demo of it", f"choose one of {', '.join(DEMOS)}")
    demo = DEMOS[teacher]
    if num_samples is not None:
        make(EvaluateConfig, {"student": output_dir, "num_samples": num_samples})
    settings = {**demo.distillation, "tracker_project_name": PROJECT_NAME, "seed": seed, "device": device}
    asked = {} if max_train_steps is None else {"max_train_steps": max_train_steps}
    config = make_config({"teacher": teacher, "output_dir": output_dir, **settings, **asked})
    resolve_device(device)
    _make_room(output_dir, overwrite)
    check_output_dir(output_dir, resuming=False)
    say("how fast is this machine? That takes a few seconds")
    full = make_config({"teacher": teacher, "output_dir": output_dir, **settings})
    settings |= {name: getattr(full, name) for name in ("num_anchors", "num_anchor_steps", "anchor_solver")}
    speed = measure(config, configured_teacher(config))
    planned = plan(demo, settings, speed, max_train_steps, num_samples)
    say(f"the demo {planned.words}")
    steps = planned.settings["max_train_steps"]
    say(f"distilling the embedded {teacher} teacher: {steps:,} steps, no image is read")
    stopped_by = distill(teacher, output_dir, say=say, **planned.settings).stopped_by
    # A signal that the training has caught ends the whole demo, also where a shell in the background ignores Ctrl-C.
    if stopped_by == signal.SIGINT:
        raise KeyboardInterrupt
    if stopped_by is not None:
        signal.raise_signal(stopped_by)
    place: dict[str, Any] = {"output": output_dir / EVALUATION_FOLDER, "device": device}
    report = evaluate(output_dir, show_progress=True, say=say, **place, **planned.evaluation)
    return report, draw(output_dir, teacher, device)


def draw(run: Path, teacher: str, device: str = "cpu") -> Path:
    """Write the picture: the teacher at several steps above the student at a few, same noise in each column."""
    demo = DEMOS[teacher]
    given = {"guidance_scale": demo.distillation.get("guidance_scale"), "device": device, **demo.shown}
    rows = {
        f"teacher, {n} step{'s' if n > 1 else ''}": sample(teacher=teacher, num_inference_steps=n, **given)
        for n in demo.evaluation["steps"]
    }
    for n in reversed(FEW_STEPS):
        rows[f"student, {n} step{'s' if n > 1 else ''}"] = sample(
            run, num_inference_steps=n, device=device, **demo.shown
        )
    title = f"{teacher}: same noise in each column, {'same prompt' if demo.columns else 'same class order'}"
    return pictures.save_rows(rows, run / "demo.png", title=title, size=72, columns=demo.columns)


def _make_room(output_dir: Path, overwrite: bool) -> None:
    """Remove an earlier demo; anything else that stands there is left for `distill` to refuse."""
    config = output_dir / CONFIG_FILE
    if not config.is_file() or read_yaml(config).get("tracker_project_name") != PROJECT_NAME:
        return
    if not overwrite:
        todo = f"name another folder, or give {named('overwrite')}"
        raise SettingError("output_dir", output_dir, "holds a demo", todo)
    shutil.rmtree(output_dir)
