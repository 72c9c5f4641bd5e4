"""What the tests of whole runs share: tiny teachers on disk, finished runs, and the command line called in-process.

Folders made here are cached for the session and read only; a test that writes copies them first.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import io
import multiprocessing
import re
import shlex
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

import onestill
from onestill import cli
from onestill.core.errors import SettingError, SettingErrors
from onestill.evaluation.report import JSON_NAME, Report
from onestill.runs.folder import RunFolder
from onestill.runs.load import restore_student, run_teacher
from onestill.students.student import Student
from onestill.training.checkpoint import read_checkpoint

NUM_CLASSES, NULL_CLASS = 3, 3
ALONE: dict[str, Any] = {
    "anchor_fraction": 0.0,
    "anchor_path_fraction": 0.0,
    "corrector_fraction": 0.0,
    "corrector_weight": 1.0,
    "boundary_weight": 1.0,
    "bootstrap_weight": "velocity",
    "learning_rate": 1e-4,
    "lr_scheduler": "constant_with_warmup",
}
"""The bootstrap and the boundary alone: no pool, no second network."""
FAST: dict[str, Any] = {
    **ALONE,
    "device": "cpu",
    "train_batch_size": 4,
    "max_train_steps": 4,
    "lr_warmup_steps": 1,
    "validation_steps": 1000,
    "num_validation_images": 2,
    "num_teacher_steps": 2,
    "report": False,
}
"""Settings of a run of a second; without its page, whose plots take another one."""


@functools.cache
def session_folder() -> Path:
    """Return a folder that lives as long as the test session."""
    folder = Path(tempfile.mkdtemp(prefix="onestill-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def tiny_network(*, channels: int = 1, num_classes: int | None = None, seed: int = 0, **config: Any) -> UNet2DModel:
    """Return a `UNet2DModel` of 8x8 images with random weights; one pass takes a few milliseconds."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DModel(
            sample_size=8,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
            norm_num_groups=4,
            num_class_embeds=num_classes,
            **config,
        )


def zero_snr_scheduler(prediction_type: str = "v_prediction") -> DDIMScheduler:
    """Return a scheduler whose last level is pure noise."""
    return DDIMScheduler(prediction_type=prediction_type, rescale_betas_zero_snr=True)


def write_teacher(folder: Path, network: UNet2DModel, scheduler: Any = None) -> Path:
    """Write a stock pipeline folder."""
    DDIMPipeline(unet=network, scheduler=scheduler or zero_snr_scheduler()).save_pretrained(folder)
    return folder


def teacher_folder(kind: str = "plain") -> Path:
    """Return a teacher's folder: "plain", "other" (other weights), "class" (4 labels, one may be null), "epsilon"."""
    return _teacher_folder(kind)


@functools.cache
def _teacher_folder(kind: str) -> Path:
    folder = session_folder() / f"teacher-{kind}"
    match kind:
        case "plain":
            return write_teacher(folder, tiny_network())
        case "other":
            return write_teacher(folder, tiny_network(seed=1))
        case "class":
            return write_teacher(folder, tiny_network(num_classes=NUM_CLASSES + 1, seed=2))
        case "epsilon":
            return write_teacher(folder, tiny_network(seed=3), DDIMScheduler())
    raise AssertionError(kind)


def finished_run(kind: str = "plain") -> Path:
    """Return a finished run's folder: "plain", "class" (w = 2), "drawn" (w in 1..3), "null_first"."""
    return _finished_run(kind)


@functools.cache
def _finished_run(kind: str) -> Path:
    teacher = "plain" if kind == "plain" else "class"
    own: dict[str, dict[str, Any]] = {
        "plain": {},
        "class": {"null_class": NULL_CLASS, "guidance_scale": 2.0},
        "drawn": {"null_class": NULL_CLASS, "guidance_scale_min": 1.0, "guidance_scale_max": 3.0},
        "null_first": {"null_class": 0},
    }
    folder = session_folder() / f"run-{kind}"
    # A high rate: a student that is still its teacher's copy would agree with too much.
    settings = {**FAST, "learning_rate": 3e-3, "checkpointing_steps": 2, **own[kind]}
    onestill.distill(teacher_folder(teacher), folder, show_progress=False, **settings)
    return folder


def restored(run: Path) -> Student:
    """Return the student of a run with the weights of its newest checkpoint."""
    folder = RunFolder(run)
    return restore_student(folder, run_teacher(folder, torch.device("cpu")))


def copied(folder: Path, to: Path) -> Path:
    """Return a copy of `folder` at `to`, which must not exist."""
    return Path(shutil.copytree(folder, to))


def snapshot(folder: Path) -> dict[str, str]:
    """Return everything below `folder`: a digest for each file, "" for each folder; {} if there is none."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str
    error: ValueError | None = None

    @property
    def settings(self) -> set[str]:
        """The settings that the refusal is about; empty if it is about none, or comes from the parser."""
        errors = self.error.errors if isinstance(self.error, SettingErrors) else [self.error]
        return {name for error in errors if isinstance(error, SettingError) for name in error.settings}

    @property
    def words(self) -> str:
        """What was printed to standard error, in one line and without the frame around it."""
        text = "".join(" " if c in "│╭╮╰╯─" else c for c in self.err)
        return " ".join(text.split())


def call_cli(*args: object) -> Outcome:
    """Run `onestill *args` in this process."""
    out, err = io.StringIO(), io.StringIO()
    code, refusals, app = 0, [], cli.app

    def recorded(**how: Any) -> Any:
        try:
            return app(**how)
        except ValueError as error:
            refusals.append(error)
            raise

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["onestill", *map(str, args)])
        patch.setattr(cli, "app", recorded)
        try:
            cli.main()
        except SystemExit as end:
            code = 0 if end.code is None else int(end.code)
    return Outcome(code, out.getvalue(), err.getvalue(), *refusals)


def with_places(command: str, places: Mapping[str, Callable[[], object]]) -> list[str]:
    """Return the words of a command, with what a name in capitals stands for in its place; made if it is there."""
    return re.sub(r"\b[A-Z][A-Z0-9_]*\b", lambda m: str(places[m[0]]()) if m[0] in places else m[0], command).split()


def assert_refused(outcome: Outcome, words: str) -> None:
    """Assert that a command has ended with one line that holds `words`; a flag they begin with is what it is about."""
    assert outcome.code == 2, outcome
    assert words in outcome.words and outcome.out == "" and "Traceback" not in outcome.err, outcome.err
    assert [line[:7] for line in outcome.err.splitlines()] == ["error: "], outcome.err
    flag = re.match(r"--(\w+)", words)
    if flag is not None and outcome.error is not None:
        assert flag[1] in outcome.settings, outcome.error


def go_on_with(said: str) -> list[str]:
    """Return the command that a stopped run says to go on with, as a shell reads it, without its first word."""
    (command,) = re.findall(r"Go on with: (.+)$", said, re.MULTILINE)
    first, *words = shlex.split(command)
    assert first == "onestill"
    return words


def read_report(folder: Path) -> Report:
    """Return the report that an evaluation wrote into a folder."""
    return Report.model_validate_json((folder / JSON_NAME).read_text(encoding="utf-8"))


def as_flags(settings: dict[str, Any]) -> list[str]:
    """Return settings as command-line flags."""
    return [
        part
        for name, value in settings.items()
        for part in (
            [f"--{name}" if value else f"--no_{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
        )
    ]


def same_state(one: Path, two: Path) -> bool:
    """Return whether two checkpoints hold the same bits: tensors, counters and learning rates."""
    a, b = read_checkpoint(one), read_checkpoint(two)
    assert {"student", "student-optimizer", "random"} <= set(a.tensors)
    return (
        set(a.tensors) == set(b.tensors)
        and all(set(a.tensors[group]) == set(b.tensors[group]) for group in a.tensors)
        and all(
            torch.equal(value, b.tensors[group][name])
            for group in a.tensors
            for name, value in a.tensors[group].items()
        )
        and all(a.values[key] == b.values[key] for key in ("progress", "trained", "scaler"))
    )


class Interruption(Exception):
    """Raised from a callback, in the place of a crash."""


def interrupt_at(step: int) -> Callable[[Any], None]:
    """Return an `on_step` that ends the run after `step`."""

    def stop(log: Any) -> None:
        if log.step == step:
            raise Interruption

    return stop


# Processes of their own, for signals. A fork server loads the package once for all of them.


def _main(args: list[str], log: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with Path(log).open("w", encoding="utf-8") as file:
        sys.stdout = sys.stderr = file
        sys.argv = ["onestill", *args]
        cli.main()


def start_cli(log: Path, *args: object) -> BaseProcess:
    """Start `onestill *args` in a process of its own, whose output goes to `log`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["onestill.cli", "onestill.runs.distill", "onestill.teachers.load"])
    process = context.Process(target=_main, args=([str(a) for a in args], str(log)), daemon=True)
    process.start()
    return process


def wait_for(path: Path, process: BaseProcess, log: Path, seconds: float = 120) -> None:
    """Wait until `path` exists; the process must not have ended before."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.exitcode is None and time.monotonic() < end, log.read_text(encoding="utf-8")
        time.sleep(0.002)
