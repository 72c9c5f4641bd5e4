"""One evaluation: the student's one step and the teacher's many, from the same noise, in one table."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from onestill.core.devices import hardware
from onestill.core.tensors import noise
from onestill.evaluation import metrics, speed
from onestill.evaluation.clip import ClipScore
from onestill.evaluation.config import EvaluateConfig
from onestill.evaluation.features import ClassifierFeatures, FeatureExtractor, extract
from onestill.evaluation.prompt_accuracy import PromptTargets, read_prompts
from onestill.evaluation.references import Reference
from onestill.evaluation.report import Report, package_versions
from onestill.evaluation.rows import EvaluationProtocol, Row
from onestill.evaluation.samples import Draw, Subjects, looks_at_latents
from onestill.sampling.samplers.base import Sampler

NUM_SHOWN = 100
SPEED_ROUNDS = 5
NEIGHBOURS = 3
"""k of precision and recall."""
KERNEL_SUBSETS, LARGEST_SUBSET = 50, 1000
NO_KERNEL = "no kernel distance: rows and reference show the same prompts, at least in part, and its estimator takes them for independent"


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
        self.say(f"features of {len(self.reference.images):,} reference images: {self.reference.name}")
        real = extract(self.extractor, self.reference.images)
        seconds = self._seconds(entries) if self.config.speed else {}
        prompts = self._draw(entries[0]).rows.get("prompt", ())
        targets, notes = read_prompts(self.extractor, prompts) if len(prompts) else (None, ())
        paired = not set(prompts).isdisjoint(self.reference.prompts)
        notes = (*self.notes, *notes, *([NO_KERNEL] if paired else []), *_truncated(self.clip, prompts))
        rows, shown = [], {}
        for entry in entries:
            row, shown[entry.name] = self._row(entry, real, targets, paired)
            rows.append(
                row.model_copy(update=_speed_columns(entry.as_fast_as or entry.name, seconds, self.config.batch_size))
            )
        warning = metrics.sample_warning(len(real), self.config.num_samples, real.shape[1])
        protocol = self._protocol(entries, real, paired, notes)
        return Report(protocol=protocol, rows=tuple(rows), warnings=(warning,) if warning else ()), shown

    def _draw(self, entry: Entry) -> Draw:
        config = self.config
        seeds = range(config.seed, config.seed + config.num_samples)
        rows = self.subjects.rows(entry.sampler, config.num_samples, seed=config.seed)
        return Draw(entry.sampler, seeds, rows, config.batch_size, self.show_progress)

    def _row(self, entry: Entry, real: Tensor, targets: PromptTargets | None, paired: bool) -> tuple[Row, Tensor]:
        """Return a sampler's numbers, but for its speeds, and its first images."""
        self.say(f"{entry.name}: {self.config.num_samples:,} images")
        draw = self._draw(entry)
        seen = draw.seen_by(self.extractor)
        shown = draw.drawn(slice(16)) if looks_at_latents(self.extractor, entry.sampler) else seen[:NUM_SHOWN]
        fake = extract(self.extractor, seen)
        subsets = {"subset_size": min(LARGEST_SUBSET, len(real), len(fake)), "num_subsets": KERNEL_SUBSETS}
        kernel, spread = (None, None) if paired else metrics.kernel_distance(real, fake, **subsets)
        precision, recall = metrics.precision_recall(real, fake, k=NEIGHBOURS)
        row = Row(
            name=entry.name,
            is_student=entry.is_student,
            num_steps=entry.sampler.num_steps,
            network_evaluations=entry.sampler.evaluations,
            frechet_distance=metrics.frechet_distance(real, fake),
            kernel_distance=kernel,
            kernel_distance_std=spread,
            precision=precision,
            recall=recall,
            label_accuracy=_label_accuracy(self.extractor, seen, draw.rows.get("class_labels")),
            prompt_accuracy=None if targets is None else targets.accuracies(seen),
        )
        if self.clip is None:
            return row, shown
        self.say(f"{entry.name}: CLIP score")
        score = _clip_score(self.clip, draw.pictures(seen, self.extractor), draw.rows["prompt"])
        return row.model_copy(update={"clip_score": score}), shown

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

    def _protocol(
        self, entries: Sequence[Entry], real: Tensor, paired: bool, notes: tuple[str, ...]
    ) -> EvaluationProtocol:
        config, reference = self.config, self.reference
        return EvaluationProtocol(
            teacher=self.teacher,
            student=next((_short_name(entry.sampler.name) for entry in entries if entry.is_student), None),
            extractor=self.extractor.name,
            feature_dim=real.shape[1],
            num_images=config.num_samples,
            reference=reference.name,
            num_reference_images=len(reference.images),
            seeds=f"{config.seed}..{config.seed + config.num_samples - 1}",
            guidance_scale=config.guidance_scale,
            device=hardware(torch.device(config.device)),
            clip_model=None if self.clip is None else self.clip.name,
            large_batch_size=config.batch_size if config.speed else None,
            kernel_subset_size=None if paired else min(LARGEST_SUBSET, len(real), config.num_samples),
            kernel_num_subsets=None if paired else KERNEL_SUBSETS,
            neighbours=NEIGHBOURS,
            speedup_over=entries[0].name if config.speed else None,
            versions=package_versions(),
            notes=notes,
        )


def _label_accuracy(extractor: FeatureExtractor, images: Tensor, labels: Tensor | None) -> float | None:
    """Return the share of images that show their label; None without labels, or a classifier of one head."""
    if labels is None or not isinstance(extractor, ClassifierFeatures) or extractor.classifier.heads:
        return None
    return metrics.label_accuracy(extractor.logits(images), labels)


def _clip_score(clip: ClipScore, pictures: Iterator[Tensor], prompts: Sequence[str]) -> float:
    texts = iter(prompts)
    scores = [clip(batch.clamp(-1, 1), list(itertools.islice(texts, len(batch)))) for batch in pictures]
    return float(torch.cat(scores).double().mean())


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
