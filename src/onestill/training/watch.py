"""What a run shows of itself: lines of numbers, pictures of student beside teacher, and trackers."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from onestill.core.errors import FoundWarning
from onestill.core.reading import parse_json
from onestill.core.writing import append_line, written
from onestill.data.conditions import VALIDATION_SEED, Conditions
from onestill.sampling import pictures
from onestill.sampling.generate import Generate, generate_images
from onestill.training.distance import FEW_STEPS, Distance, Verdict
from onestill.training.loss import shares

if TYPE_CHECKING:
    from accelerate import Accelerator

    from onestill.objectives.base import Batch
    from onestill.teachers.teacher_spec import TeacherSpec
    from onestill.training.config import DistillConfig

METRICS_FILE = "logs/metrics.jsonl"
NUM_HELD_OUT = 64
"""Images that averages of several widths are compared on."""


@dataclass
class StepLog:
    """What is known after an optimiser step; written to logs/metrics.jsonl every `logging_steps`.

    `residual_by_time` is the mean squared residual in units of f over equal bins of target time, cleanest first,
    since the last line; None for a bin without a draw. `own_losses` are those of the objectives' networks,
    `states` what objectives say of themselves, `held_out` the Fréchet distances of student and teacher.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    seconds_per_step: float
    images_per_second: float
    nonfinite_steps: int
    residual_by_time: list[float | None] = field(default_factory=list)
    own_losses: dict[str, float] | None = None
    states: dict[str, dict[str, float]] | None = None
    validation_rms: float | None = None
    held_out: Verdict | None = None
    picture: Path | None = None
    checkpoint: Path | None = None


class Watch:
    """Logs, paints and tracks a run, in pictures of some of its conditions."""

    def __init__(
        self, config: DistillConfig, accelerator: Accelerator, spec: TeacherSpec, conditions: Conditions
    ) -> None:
        self.config, self.accelerator, self.spec, self.conditions = config, accelerator, spec, conditions
        self.path = config.output_dir / METRICS_FILE
        self.teacher_images: Tensor | None = None
        self.shown: dict[str, Tensor] = {}
        self.last_rms: float | None = None
        self.judge: Callable[[float], Verdict | None] | None = None
        self.verdict: Verdict | None = None
        self._began, self._forwards = 0.0, 0
        self._bins = torch.zeros(2, config.num_time_bins, dtype=torch.float64)

    def count(self, batches: Sequence[Batch], residuals: Tensor) -> None:
        """Add the rows of one forward pass, with their mean squared residuals [B], to the residual profile."""
        self._began, self._forwards = self._began or time.monotonic(), self._forwards + 1
        s = torch.cat([batch.s for batch in batches])
        rows = torch.cat(
            [torch.zeros_like(b.s, dtype=torch.bool) if b.is_profiled is None else b.is_profiled for b in batches]
        )
        rho, kept = shares(batches)[rows], residuals[rows.to(residuals.device)]
        self._bins += torch.stack(residual_by_time(kept, rho, s[rows], self.config.num_time_bins, self.spec.t_max))

    def validate(
        self, step: int, teacher: Generate, student: Generate, decode: Callable[[Tensor], Tensor]
    ) -> tuple[Path | None, float]:
        """Draw student beside teacher from the same noise; return (picture, RMS difference of the two).

        There is no picture of what cannot be shown in one, such as a video or a sound. The teacher is asked once in a
        run; `decode` makes images of samples.
        """
        config = self.config
        if self.teacher_images is None:
            self.teacher_images = self._drawn(teacher)
        images = self._drawn(student)
        self.last_rms = distance = _rms(images, self.teacher_images)
        if self.judge is not None and self._forwards:
            forwards = config.max_train_steps * config.gradient_accumulation_steps
            self.verdict = self.judge((time.monotonic() - self._began) / self._forwards * forwards)
        if not self.accelerator.is_main_process:
            return None, distance
        drawn = {f"teacher, {config.num_teacher_steps} steps": self.teacher_images, "student, 1 step": images}
        # One by one: a decoder needs far more memory than the network.
        rows = {words: torch.cat([decode(row[None]).cpu() for row in made]) for words, made in drawn.items()}
        self.shown = rows if config.report else {}
        if not pictures.can_be_shown(next(iter(rows.values())).shape[1:]):
            return None, distance
        path = config.output_dir / "samples" / f"step-{step:06d}.png"
        title = f"step {step}: {distance:.3g} from the teacher's{f'; held out {self.verdict.in_short}' if self.verdict else ''}"
        pictures.save_rows(rows, path, title=title, columns=self.conditions.captions)
        for tracker in self.accelerator.trackers if config.report_to else ():
            if hasattr(tracker, "log_images"):
                # Of accelerate's trackers only this one expects the channels first unless told.
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": pictures.read_pixels(path)[None]}, step=step, **layout)
        return path, distance

    def _drawn(self, generate: Generate) -> Tensor:
        """Return the samples that a run shows of itself: their noise and conditions are always the same."""
        seeds = range(VALIDATION_SEED, VALIDATION_SEED + self.config.num_validation_images)
        return generate_images(generate, seeds, self.spec.sample_shape, self.conditions.grid(len(seeds)))

    def held_out(self, generate: Generate) -> Tensor:
        """Return samples of other noise than that of the pictures, which no training sees either."""
        first, config = VALIDATION_SEED + self.config.num_validation_images, self.config
        seeds = range(first, first + NUM_HELD_OUT)
        rows = self.conditions.grid(len(seeds))
        return generate_images(generate, seeds, self.spec.sample_shape, rows, batch_size=config.train_batch_size)

    def distance(self, teacher_of: Callable[[int], Generate], seconds: float) -> Distance | None:
        """Return how far the student was from its teacher when it was last drawn; None if it never was.

        `teacher_of(n)` generates in n steps. Numbers of steps are tried, rising, until one is nearer than the student
        or so many seconds are over.
        """
        many, config, few = self.teacher_images, self.config, dict[int, float]()
        if many is None or self.last_rms is None:
            return None
        end = time.monotonic() + seconds
        for num in FEW_STEPS:
            if num >= config.num_teacher_steps or time.monotonic() > end:
                break
            few[num] = _rms(self._drawn(teacher_of(num)), many)
            if not few[num] > self.last_rms:
                break
        return Distance(self.last_rms, few, config.num_teacher_steps, len(many))

    def write(self, log: StepLog) -> None:
        """Write a line; the residual profile begins anew."""
        if log.validation_rms is not None:
            log.held_out = self.verdict
        sums, counts = self._bins
        log.residual_by_time = [float(a / n) if n else None for a, n in zip(sums, counts, strict=True)]
        self._bins.zero_()
        if not self.accelerator.is_main_process:
            return
        record = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(log).items() if v is not None}
        append_line(self.path, json.dumps(_finite(record)))
        if self.config.report_to:
            scalars = {k: v for k, v in record.items() if isinstance(v, float)} | (log.own_losses or {})
            scalars |= {f"{of}/{name}": v for of, state in (log.states or {}).items() for name, v in state.items()}
            if log.held_out is not None:
                scalars |= {f"held_out/{n}": d for n, d in log.held_out.student.items()}
            bins = {f"residual/{i}": v for i, v in enumerate(log.residual_by_time) if v is not None}
            self.accelerator.log({**scalars, **bins}, step=log.step)

    def forget_after(self, step: int) -> None:
        """Drop the lines that an interrupted run wrote after `step`: those steps come again."""
        if not self.accelerator.is_main_process or not self.path.is_file():
            return
        content, kept, last, damaged = self.path.read_bytes(), [], 0, 0
        for line in content.splitlines():
            number = _step_of(line)
            if number is None or number <= last:  # steps grow from line to line
                damaged += 1
            else:
                last = number
                kept.append(line + b"\n") if number <= step else None
        if damaged:
            aside = next(p for i in count(1) if not (p := self.path.with_name(f"metrics-damaged-{i}.jsonl")).exists())
            with written(aside) as partial:
                partial.write_bytes(content)
            lines = "a line" if damaged == 1 else f"{damaged} lines"
            warnings.warn(f"{self.path} has {lines} that cannot be read; it is kept as {aside.name}", FoundWarning, 3)
        with written(self.path) as partial:
            partial.write_bytes(b"".join(kept))


def _rms(images: Tensor, others: Tensor) -> float:
    return float((images - others).square().mean().sqrt())


def _step_of(line: bytes) -> int | None:
    """Return the step of a line of metrics; None if it cannot be read."""
    try:
        found = parse_json(line.decode("utf-8"), "a line")
    except ValueError:
        return None
    step = found.get("step") if isinstance(found, dict) else None
    return step if type(step) is int else None


def residual_by_time(residuals: Tensor, rho: Tensor, s: Tensor, num_bins: int, t_max: float) -> tuple[Tensor, Tensor]:
    """Return (sums, counts) of residual / rho^2 over equal bins of the target time s, [num_bins] each.

    In these units the residual is an error of f: a profile that grows towards the clean end says that errors
    accumulate along the trajectory.
    """
    bins = (s / t_max * num_bins).long().clamp(0, num_bins - 1)
    sums = torch.zeros(num_bins, dtype=torch.float64)
    sums.index_add_(0, bins, residuals.detach().double().cpu() / rho**2)
    return sums, torch.bincount(bins, minlength=num_bins).double()


def _finite(value: Any) -> Any:
    """Return `value` with non-finite floats as strings, since JSON has none."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
