"""One evaluation: the student's one step and the teacher's many, from the same noise, in one table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from onestill.core.tensors import noise
from onestill.evaluation import metrics, speed
from onestill.evaluation.candidates import (
    Settings,
    first_pictures,
    looks_at_latents,
    pictures_of_samples,
    samples,
)
from onestill.evaluation.clip import ClipScore
from onestill.evaluation.features import ClassifierFeatures, FeatureExtractor, extract
from onestill.evaluation.heads import head_accuracies, head_hits, read_prompt
from onestill.evaluation.references import Reference
from onestill.evaluation.report import EvaluationProtocol, Report, Row, package_versions
from onestill.sampling.generate import Rows
from onestill.sampling.samplers.base import Sampler

NUM_SHOWN = 100
SPEED_ROUNDS = 5
NO_KERNEL = "no kernel distance: rows and reference show the same prompts, at least in part, and its estimator takes them for independent"


def compare_sources(
    sources: Sequence[tuple[str, Sampler, bool]],
    reference: Reference,
    extractor: FeatureExtractor,
    settings: Settings,
    *,
    teacher: str,
    clip: ClipScore | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Report, dict[str, Tensor]]:
    """Return the report over (name, source, is it a student) and the first images of each row.

    The first source is what speed-ups are relative to. All rows share seeds and conditions.

    Args:
        sources: What is evaluated.
        reference: What it is compared with.
        extractor: The features.
        settings: How.
        teacher: Name of the teacher, for the protocol.
        clip: How well images fit their prompts, for text teachers.
        say: Called with a line before each slow part.
    """
    say(f"features of {len(reference.images):,} reference images: {reference.name}")
    real = extract(extractor, reference.images)
    if settings.measure_speed:
        say(f"speed: all rows in turns, in batches of 1 and {settings.batch_size:,}")
    seconds = _speeds(sources, settings) if settings.measure_speed else {}
    rows: list[Row] = []
    shown: dict[str, Tensor] = {}
    wanted: _Wanted | None = None
    paired = False
    notes = _notes(settings)
    for name, source, is_student in sources:
        say(f"{name}: {settings.num_samples:,} images")
        cond = source.conditions(settings.num_samples, settings.class_labels, settings.prompts, seed=settings.seed)
        seeds = range(settings.seed, settings.seed + settings.num_samples)
        if not rows and "prompt" in cond:
            wanted, reading = _what_prompts_want(extractor, cond["prompt"])
            paired = not set(cond["prompt"]).isdisjoint(reference.prompts)
            notes += (*reading, *([NO_KERNEL] if paired else []), *_cut_prompts(clip, cond["prompt"]))
        images = samples(source, extractor, seeds, cond, settings)
        shown[name] = (
            images[:NUM_SHOWN] if not looks_at_latents(extractor, source) else first_pictures(source, seeds, cond)
        )
        row = _row(name, source, is_student, images, cond, real, extractor, wanted, paired, settings, seconds)
        if clip is not None:
            say(f"{name}: CLIP score")
            pictures = pictures_of_samples(source, extractor, images, seeds, cond, settings.batch_size)
            row = row.model_copy(update={"clip_score": _clip_score(clip, pictures, cond["prompt"])})
        rows.append(row)
    size = _subset_size(len(real), settings.num_samples)
    warning = metrics.sample_warning(len(real), settings.num_samples, real.shape[1])
    protocol = EvaluationProtocol(
        teacher=teacher,
        student=next((_short_name(s.name) for _, s, is_student in sources if is_student), None),
        extractor=extractor.name,
        feature_dim=real.shape[1],
        num_images=settings.num_samples,
        reference=reference.name,
        num_reference_images=len(reference.images),
        seeds=f"{settings.seed}..{settings.seed + settings.num_samples - 1}",
        guidance_scale=settings.guidance_scale,
        device=f"{settings.device}, {_threads()}" if settings.device == "cpu" else settings.device,
        clip_model=None if clip is None else clip.name,
        large_batch_size=settings.batch_size if settings.measure_speed else None,
        kernel_subset_size=None if paired else size,
        kernel_num_subsets=None if paired else 50,
        neighbours=settings.neighbours,
        speedup_over=sources[0][0] if settings.measure_speed else None,
        versions=package_versions(),
        notes=notes,
    )
    return Report(protocol=protocol, rows=tuple(rows), warnings=(warning,) if warning else ()), shown


@dataclass(frozen=True)
class _Wanted:
    """What the prompts want to see, for a classifier of several heads.

    Attributes:
        rows: [M], the images whose prompt it can read.
        labels: [M, num_heads], what they have to show.
    """

    rows: Tensor
    labels: Tensor


def _what_prompts_want(extractor: FeatureExtractor, prompts: Sequence[str]) -> tuple[_Wanted | None, tuple[str, ...]]:
    """Return what the classifier has to see in the images of the prompts, and lines about it for the protocol."""
    if not isinstance(extractor, ClassifierFeatures):
        return None, ()
    heads, pattern = extractor.classifier.heads, extractor.classifier.prompt_pattern
    if pattern is None:
        return None, ("no prompt accuracy: the classifier of the features does not say how prompts are read",)
    read = {prompt: read_prompt(prompt, heads, pattern) for prompt in dict.fromkeys(prompts)}
    rows = [i for i, prompt in enumerate(prompts) if read[prompt] is not None]
    if not rows:
        return None, (f"no prompt accuracy: no prompt is of the classifier's kind, such as {prompts[0]!r}",)
    without = len(prompts) - len(rows)
    have = "has a prompt that is" if without == 1 else "have prompts that are"
    others = f" ({without:,} {have} not of its kind)" if without else ""
    lines = [f"prompt accuracy: what the classifier sees in {len(rows):,} of {len(prompts):,} images a row{others}"]
    own = extractor.classifier.record.get("held_out_accuracy_per_head")
    if isinstance(own, dict) and set(own) == set(heads):
        lines.append("the classifier itself, on real images: " + ", ".join(f"{head} {own[head]:.3f}" for head in heads))
    return _Wanted(torch.tensor(rows), torch.tensor([read[prompts[i]] for i in rows])), tuple(lines)


def _cut_prompts(clip: ClipScore | None, prompts: Sequence[str]) -> tuple[str, ...]:
    cut = 0 if clip is None else clip.num_truncated(list(dict.fromkeys(prompts)))
    if clip is None or not cut:
        return ()
    have, were = ("prompt has", "was") if cut == 1 else ("different prompts have", "were")
    return (f"CLIP score: {cut:,} {have} more than {clip.max_tokens} tokens, and {were} cut there",)


def _clip_score(clip: ClipScore, pictures: Iterator[Tensor], prompts: Sequence[str]) -> float:
    scores: list[Tensor] = []
    done = 0
    for batch in pictures:
        scores.append(clip(batch.clamp(-1, 1), prompts[done : done + len(batch)]))
        done += len(batch)
    return float(torch.cat(scores).double().mean())


def _notes(settings: Settings) -> tuple[str, ...]:
    notes = [f"prompts: {settings.prompts_from}"] if settings.prompts_from else []
    if settings.base_student:
        notes.append(
            f"every row enlarges what {settings.base_student} draws in one step, which its evaluations and its time include"
        )
    return tuple(notes)


def _row(
    name: str,
    source: Sampler,
    is_student: bool,
    images: Tensor,
    cond: Rows,
    real: Tensor,
    extractor: FeatureExtractor,
    wanted: _Wanted | None,
    paired: bool,
    settings: Settings,
    seconds: dict[str, tuple[float, float]],
) -> Row:
    fake = extract(extractor, images)
    kernel = spread = None
    if not paired:
        size = _subset_size(len(real), len(fake))
        kernel, spread = metrics.kernel_distance(real, fake, subset_size=size, num_subsets=50)
    precision, recall = metrics.precision_recall(real, fake, k=settings.neighbours)
    label_accuracy = prompt_accuracy = None
    if isinstance(extractor, ClassifierFeatures):
        heads = extractor.classifier.heads
        if "class_labels" in cond and not heads:
            label_accuracy = metrics.label_accuracy(extractor.logits(images), cond["class_labels"])
        if wanted is not None:
            hits = head_hits(extractor.logits(images[wanted.rows]), wanted.labels, heads)
            prompt_accuracy = head_accuracies(hits, heads)
    one, large = seconds.get(name, (None, None))
    base = next(iter(seconds.values()), (None, None))[1]
    return Row(
        name=name,
        is_student=is_student,
        num_steps=source.num_steps,
        network_evaluations=source.evaluations,
        frechet_distance=metrics.frechet_distance(real, fake),
        kernel_distance=kernel,
        kernel_distance_std=spread,
        precision=precision,
        recall=recall,
        label_accuracy=label_accuracy,
        prompt_accuracy=prompt_accuracy,
        images_per_second=None if one is None else 1 / one,
        images_per_second_large=None if large is None else settings.batch_size / large,
        speedup=None if large is None or base is None else base / large,
    )


def _speeds(sources: Sequence[tuple[str, Sampler, bool]], settings: Settings) -> dict[str, tuple[float, float]]:
    """Return seconds per call at batch 1 and at the large batch, all rows timed in turns."""

    def call(source: Sampler, num: int) -> Callable[[], object]:
        eps = noise(range(num), source.sample_shape)
        cond = source.conditions(num, settings.class_labels, settings.prompts)
        return lambda: source(eps, cond)

    one, large = (
        speed.compare(
            {name: call(source, num) for name, source, _ in sources}, device=settings.device, repeats=SPEED_ROUNDS
        )
        for num in (1, settings.batch_size)
    )
    return {name: (one[name], large[name]) for name in one}


def _threads() -> str:
    num = torch.get_num_threads()
    return f"{num} thread{'s' if num != 1 else ''}"


def _short_name(name: str) -> str:
    """Return the last two parts of a student's path: the whole one says where it lay, which is nobody's business."""
    return "/".join(Path(name.removeprefix("the student in ")).parts[-2:])


def _subset_size(num_real: int, num_fake: int) -> int:
    return min(1000, num_real, num_fake)
