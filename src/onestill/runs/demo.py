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
from onestill.core.settings import read_yaml
from onestill.evaluation.report import Report
from onestill.runs.distill import distill
from onestill.runs.evaluate import evaluate
from onestill.runs.folder import CONFIG_FILE, check_output_dir
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
COMMON = {"learning_rate": 1e-3, "lr_scheduler": "cosine", "checkpointing_steps": 400, "validation_steps": 400}
DEMOS = {
    "glyphs": Demo(
        distillation={
            "guidance_scale": 3.0,
            "max_train_steps": 420,
            "train_batch_size": 32,
            "boundary_weight": 0.0,
            "bootstrap_weight": "none",
            "anchor_fraction": 0.875,
            "num_anchors": 1_000,
            "num_anchor_steps": 5,
            "num_validation_images": 8,
            **COMMON,
        },
        evaluation={"num_samples": 480, "batch_size": 16, "steps": (50, 8, 4, 1)},
        shown={"prompts": PROMPTS, "num_images": len(PROMPTS), "seed": 0},
        columns=PROMPTS,
    ),
    "digits": Demo(
        distillation={"max_train_steps": 1600, "anchor_fraction": 0.75, "num_anchors": 6_400, **COMMON},
        evaluation={"num_samples": 1800, "batch_size": 64, "steps": (50, 10, 4, 1)},
        # A multiple of ten, so that the columns are the classes in order.
        shown={"num_images": 10, "seed": 70},
    ),
}


def run_demo(
    output_dir: Path,
    *,
    teacher: str = "glyphs",
    seed: int = 0,
    device: str = "cpu",
    max_train_steps: int | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> tuple[Report, Path]:
    """Distil, evaluate and draw; return the report and the picture.

    An earlier demo in `output_dir` is removed first with `overwrite`, and refused without, as is anything else there;
    `max_train_steps` takes the place of the demo's own; `say` is called with a line before each part.
    """
    if teacher not in DEMOS:
        raise SettingError("teacher", teacher, "there is no demo of it", f"choose one of {', '.join(DEMOS)}")
    demo = DEMOS[teacher]
    settings = {**demo.distillation, "tracker_project_name": PROJECT_NAME, "seed": seed, "device": device}
    if max_train_steps is not None:
        # As many anchors for each step as in the full demo.
        anchors = settings["num_anchors"] * max_train_steps // settings["max_train_steps"]
        settings |= {"max_train_steps": max_train_steps, "num_anchors": max(1, anchors)}
    make_config({"teacher": teacher, "output_dir": output_dir, **settings})
    resolve_device(device)
    _make_room(output_dir, overwrite)
    check_output_dir(output_dir, resuming=False)
    say(f"distilling the embedded {teacher} teacher: {settings['max_train_steps']} steps, no image is read")
    stopped_by = distill(teacher, output_dir, **settings).stopped_by
    # A signal that the training has caught ends the whole demo, also where a shell in the background ignores Ctrl-C.
    if stopped_by == signal.SIGINT:
        raise KeyboardInterrupt
    if stopped_by is not None:
        signal.raise_signal(stopped_by)
    place: dict[str, Any] = {"output": output_dir / "evaluation", "device": device}
    report = evaluate(output_dir, show_progress=True, say=say, **place, **demo.evaluation)
    return report, draw(output_dir, teacher, device)


def draw(run: Path, teacher: str, device: str = "cpu") -> Path:
    """Write the picture: the teacher at several steps above the student at one, same noise in each column."""
    demo = DEMOS[teacher]
    given = {"guidance_scale": demo.distillation.get("guidance_scale"), "device": device, **demo.shown}
    rows = {
        f"teacher, {n} step{'s' if n > 1 else ''}": sample(teacher=teacher, num_inference_steps=n, **given)
        for n in demo.evaluation["steps"]
    }
    rows["student, 1 step"] = sample(run, device=device, **demo.shown)
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
