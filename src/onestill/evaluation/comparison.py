"""One evaluation: the student's one step and the teacher's many, from the same noise, in one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from onestill.core.devices import hardware
from onestill.core.tensors import noise
from onestill.evaluation import metrics, speed
from onestill.evaluation.clip import ClipScore
from onestill.evaluation.config import EvaluateConfig
from onestill.evaluation.features import FeatureExtractor
from onestill.evaluation.gaussians import gaussian_of
from onestill.evaluation.look import KERNEL_SUBSETS, NEIGHBOURS, Eyes, Standard, look
from onestill.evaluation.prompt_accuracy import read_prompts
from onestill.evaluation.references import Reference
from onestill.evaluation.report import Report, package_versions
from onestill.evaluation.rows import EvaluationProtocol, Row
from onestill.evaluation.samples import Draw, Subjects
from onestill.sampling.samplers.base import Sampler

SPEED_ROUNDS = 5
NO_KERNEL = "no kernel distance: rows and reference show the same prompts, at least in part, and its estimator takes them for independent"

NO_IMAGES = "no kernel distance, precision or recall: of the reference, a mean and a covariance alone are known"


class Entry(NamedTuple):
    """What a row of the table is about; `as_fast_as` is the row of the same network that is timed for it, if not it."""

    name: str
    sampler: Sampler
    is_student: bool = False
    as_fast_as: str = ""


@dataclass(frozen=True)
class Comparison:
    """What a set of samplers is compared with, and how.

    Attributes:
        reference: What their images are compared with.
        extractor: The features.
        subjects: What the images of every row show.
        config: The settings of the evaluation, w and the device resolved.
        teacher: Name of the teacher, for the protocol.
        clip: How well images fit their prompts, for text teachers.
        notes: Lines for the protocol.
        show_progress: Whether to show a bar on a terminal.
        say: Called with a line before each slow part.
    """

    reference: Reference
    extractor: FeatureExtractor
    subjects: Subjects
    config: EvaluateConfig
    teacher: str
    clip: ClipScore | None = None
    notes: tuple[str, ...] = ()
    show_progress: bool = False
    say: Callable[[str], None] = lambda _: None

    def run(self, entries: Sequence[Entry]) -> tuple[Report, dict[str, Tensor]]:
        """Return the report, and the first images of each row; the first row is what speed-ups are relative to.

        All rows share seeds and what they show.
        """
        standard = self.standard
        seconds = self._seconds(entries) if self.config.speed else {}
        prompts = self._draw(entries[0]).rows.get("prompt", ())
        targets, notes = read_prompts(self.extractor, prompts) if len(prompts) else (None, ())
        notes = (*self.notes, *notes, *self._left_out(), *_truncated(self.clip, prompts))
        eyes, rows, shown = Eyes(self.extractor, targets, self.clip), [], {}
        for entry in entries:
            self.say(f"{entry.name}: {self.config.num_samples:,} images")
            seen = look(self._draw(entry), eyes)
            shown[entry.name] = seen.shown
            speeds = _speed_columns(entry.as_fast_as or entry.name, seconds, self.config.batch_size)
            numbers = standard.numbers(seen, targets, self.config.resamples)
            rows.append(_row(entry, {**numbers, **speeds}))
        num_features = len(standard.gaussian.mean)
        warning = metrics.sample_warning(standard.num_images, self.config.num_samples, num_features)
        protocol = self._protocol(entries, notes)
        return Report(protocol=protocol, rows=tuple(rows), warnings=(warning,) if warning else ()), shown

    @cached_property
    def standard(self) -> Standard:
        """The features of the reference, or what is known of them."""
        reference = self.reference
        if reference.gaussian is not None:
            return Standard(reference.gaussian, None)
        held = reference.seen if reference.images is None else reference.images
        assert held is not None
        num = len(held)
        self.say(f"features of {num:,} reference images: {reference.name}")
        real = reference.features(self.extractor)
        assert real is not None
        shown = set(self.subjects.prompts[: self.config.num_samples])
        return Standard(
            replace(gaussian_of(real), num_images=num), real, paired=not shown.isdisjoint(reference.prompts)
        )

    def _left_out(self) -> list[str]:
        """Return which numbers there are not, and why."""
        if self.standard.features is None:
            return [NO_IMAGES]
        return [NO_KERNEL] if self.standard.paired else []

    def _draw(self, entry: Entry) -> Draw:
        config = self.config
        seeds = range(config.seed, config.seed + config.num_samples)
        rows = self.subjects.rows(entry.sampler, config.num_samples, seed=config.seed)
        return Draw(entry.sampler, seeds, rows, config.batch_size, self.show_progress)

    def _seconds(self, entries: Sequence[Entry]) -> dict[str, tuple[float, float]]:
        """Return seconds per call at batch 1 and at the large batch, all rows timed in turns."""
        self.say(f"speed: all rows in turns, in batches of 1 and {self.config.batch_size:,}")

        def call(sampler: Sampler, num: int) -> Callable[[], object]:
            eps, rows = noise(range(num), sampler.sample_shape), self.subjects.rows(sampler, num)
            return lambda: sampler(eps, rows)

        how: dict[str, Any] = {"device": self.config.device, "repeats": SPEED_ROUNDS}
        one, large = (
            speed.compare({e.name: call(e.sampler, num) for e in entries if e.as_fast_as in ("", e.name)}, **how)
            for num in (1, self.config.batch_size)
        )
        return {name: (one[name], large[name]) for name in one}

    def _protocol(self, entries: Sequence[Entry], notes: tuple[str, ...]) -> EvaluationProtocol:
        config, standard = self.config, self.standard
        has_kernel, real = standard.has_kernel, standard.features
        return EvaluationProtocol(
            teacher=self.teacher,
            student=next((_short_name(entry.sampler.name) for entry in entries if entry.is_student), None),
            extractor=self.extractor.name,
            feature_dim=len(standard.gaussian.mean),
            num_images=config.num_samples,
            reference=self.reference.name,
            num_reference_images=standard.num_images,
            seeds=f"{config.seed}..{config.seed + config.num_samples - 1}",
            guidance_scale=config.guidance_scale,
            device=hardware(torch.device(config.device)),
            clip_model=None if self.clip is None else self.clip.name,
            large_batch_size=config.batch_size if config.speed else None,
            kernel_subset_size=standard.subset_size(config.num_samples) if has_kernel else None,
            kernel_num_subsets=KERNEL_SUBSETS if has_kernel else None,
            neighbours=None if real is None else NEIGHBOURS,
            resamples=config.resamples or None,
            speedup_over=entries[0].name if config.speed else None,
            versions=package_versions(),
            notes=notes,
        )


def _row(entry: Entry, numbers: Mapping[str, Any]) -> Row:
    sampler = entry.sampler
    steps: dict[str, Any] = {"num_steps": sampler.num_steps, "network_evaluations": sampler.evaluations}
    return Row(name=entry.name, is_student=entry.is_student, **steps, **numbers)


def _truncated(clip: ClipScore | None, prompts: Sequence[str]) -> tuple[str, ...]:
    num = 0 if clip is None else clip.num_truncated(list(dict.fromkeys(prompts)))
    if clip is None or not num:
        return ()
    have, were = ("prompt has", "was") if num == 1 else ("different prompts have", "were")
    return (f"CLIP score: {num:,} {have} more than {clip.max_tokens} tokens, and {were} cut there",)


def _speed_columns(name: str, seconds: dict[str, tuple[float, float]], batch_size: int) -> dict[str, float]:
    if not seconds:
        return {}
    (one, large), (_, baseline) = seconds[name], next(iter(seconds.values()))
    return {"images_per_second": 1 / one, "images_per_second_large": batch_size / large, "speedup": baseline / large}


def _short_name(name: str) -> str:
    """Return the last two parts of a student's path: the whole one says where it lay, which is nobody's business."""
    return "/".join(Path(name.removeprefix("the student in ")).parts[-2:])
