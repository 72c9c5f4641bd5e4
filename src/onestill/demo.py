"""The demo: the embedded digits teacher, distilled in minutes on a CPU, with the table and one picture."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onestill import pictures
from onestill.api import evaluate, sample
from onestill.checks import CONFIG_FILE, check_device, check_output_dir
from onestill.config import make_config, read_yaml
from onestill.distillation import distill
from onestill.evaluation.report import Report

SETTINGS: dict[str, Any] = {
    "max_train_steps": 1600,
    "anchor_fraction": 0.75,
    "num_anchors": 6_400,
    "learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "checkpointing_steps": 400,
    "validation_steps": 400,
    "tracker_project_name": "onestill-demo",
}
"""The project name also marks the folder as a demo, which --overwrite may remove."""
NUM_SAMPLES = 1800
TEACHER_STEPS = (50, 10, 4, 1)
# A multiple of ten, so that the columns are the classes in order.
FIRST_SEED = 70


def run_demo(
    output_dir: Path,
    *,
    seed: int = 0,
    device: str = "cpu",
    max_train_steps: int | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> tuple[Report, Path]:
    """Distil, evaluate and draw; return the report and the picture.

    Args:
        output_dir: Folder of the run; with `overwrite`, an earlier demo there is removed first.
        seed: Seed of the training.
        device: Where to run.
        max_train_steps: Steps, if not the demo's own.
        overwrite: Replace an earlier demo.
        say: Called with a line before each part.

    Raises:
        ValueError: If `output_dir` holds something else, or an earlier demo and not `overwrite`.
    """
    settings = dict(SETTINGS)
    if max_train_steps is not None:
        # As many anchors for each step as in the full demo.
        anchors = SETTINGS["num_anchors"] * max_train_steps // SETTINGS["max_train_steps"]
        settings |= {"max_train_steps": max_train_steps, "num_anchors": max(1, anchors)}
    make_config({"teacher": "digits", "output_dir": output_dir, "seed": seed, "device": device, **settings})
    check_device(device)
    _make_room(output_dir, overwrite)
    check_output_dir(output_dir, resuming=False)
    say(f"distilling the embedded digits teacher: {settings['max_train_steps']} steps, no image is read")
    distill("digits", output_dir, seed=seed, device=device, **settings)
    report = evaluate(
        output_dir,
        num_samples=NUM_SAMPLES,
        steps=TEACHER_STEPS,
        output=output_dir / "evaluation",
        device=device,
        say=say,
    )
    return report, draw(output_dir, device)


def draw(run: Path, device: str) -> Path:
    """Write the picture: the teacher at several steps above the student at one, same noise in each column."""
    rows = {
        f"teacher, {n} step{'s' if n > 1 else ''}": sample(
            teacher="digits", num_images=10, seed=FIRST_SEED, num_inference_steps=n, device=device
        )
        for n in TEACHER_STEPS
    }
    rows["student, 1 step"] = sample(run, num_images=10, seed=FIRST_SEED, device=device)
    return pictures.save_rows(
        rows, run / "demo.png", title="digits: same noise in each column, same class order", size=72
    )


def _make_room(output_dir: Path, overwrite: bool) -> None:
    """Remove an earlier demo; anything else that stands there is left for `distill` to refuse."""
    config = output_dir / CONFIG_FILE
    if not config.is_file() or read_yaml(config).get("tracker_project_name") != SETTINGS["tracker_project_name"]:
        return
    if not overwrite:
        raise ValueError(f"--output_dir {output_dir} holds a demo; name another folder, or give --overwrite")
    shutil.rmtree(output_dir)
