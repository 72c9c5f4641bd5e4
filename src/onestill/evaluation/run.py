"""One evaluation: the student's one step and the teacher's many, from the same noise, in one table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from onestill.evaluation import metrics, speed
from onestill.evaluation.classifier import ConvFeatures
from onestill.evaluation.clip import ClipScore
from onestill.evaluation.features import (
    ClassifierFeatures,
    FeatureExtractor,
    MiddleFeatures,
    extract,
    load_features,
)
from onestill.evaluation.heads import head_accuracies, head_hits, read_prompt
from onestill.evaluation.report import EvaluationProtocol, Report, Row, package_versions
from onestill.sampler import Rows, generate_images, noise, to_device
from onestill.teachers.base import NetworkTeacher
from onestill.teachers.load import EMBEDDED
from onestill.teachers.pipeline import PipelineTeacher
from onestill.tensors import Cond, as_times, broadcast

NUM_SHOWN = 100
REFERENCE_SEED = 10_000_000
MIDDLE_LOG_SNR = 2.0
SPEED_ROUNDS = 5
NO_KERNEL = "no kernel distance: rows and reference show the same prompts, at least in part, and its estimator takes them for independent"


class Candidate(Protocol):
    """What is evaluated: `onestill.runs.Source` is one."""

    @property
    def name(self) -> str: ...
    @property
    def generate(self) -> Callable[[Tensor, Cond], Tensor]: ...
    @property
    def sample_shape(self) -> tuple[int, ...]: ...
    @property
    def num_steps(self) -> int: ...
    @property
    def calls(self) -> int: ...
    @property
    def latents(self) -> Callable[[Tensor, Cond], Tensor] | None: ...
    @property
    def decodes(self) -> bool: ...
    @property
    def decode(self) -> Callable[[Tensor], Tensor] | None: ...
    def conditions(
        self, num: int, chosen: tuple[int, ...] = (), prompts: Sequence[str] = (), *, seed: int = 0
    ) -> Rows: ...


@dataclass(frozen=True)
class Reference:
    """Images to compare with, and what they are.

    Attributes:
        images: [N, C, H, W], or latents.
        name: What they are, in words.
        prompts: Prompts that they show, where that is known.
    """

    images: Tensor
    name: str
    prompts: Sequence[str] = ()


@dataclass(frozen=True)
class Settings:
    """How to evaluate.

    Attributes:
        num_samples: Images per row.
        batch_size: Images per network call, and the large batch of the speed columns.
        seed: Seed of the first image; image i has seed + i, for every row.
        class_labels: Labels to go round; all if empty.
        prompts: Prompts to go round, for text teachers.
        prompts_from: Where they come from, for the protocol.
        base_student: Who draws the pictures that every row enlarges, for the protocol; "" if none does.
        neighbours: k of precision and recall.
        measure_speed: Whether to time the rows.
        guidance_scale: What was distilled in, for the protocol.
        device: What the speeds are measured on, for the protocol.
    """

    num_samples: int = 2000
    batch_size: int = 64
    seed: int = 0
    class_labels: tuple[int, ...] = ()
    prompts: Sequence[str] = ()
    prompts_from: str = ""
    base_student: str = ""
    neighbours: int = 3
    measure_speed: bool = True
    guidance_scale: float | None = None
    device: str = "cpu"


def compare_sources(
    sources: Sequence[tuple[str, Candidate, bool]],
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
        images = _samples(source, extractor, seeds, cond, settings)
        shown[name] = images[:NUM_SHOWN] if not _of_latents(extractor, source) else _shown(source, seeds, cond)
        row = _row(name, source, is_student, images, cond, real, extractor, wanted, paired, settings, seconds)
        if clip is not None:
            say(f"{name}: CLIP score")
            pictures = _pictures(source, extractor, images, seeds, cond, settings.batch_size)
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
        device=f"{settings.device}, {torch.get_num_threads()} threads" if settings.device == "cpu" else settings.device,
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
    others = f" ({without:,} have prompts that are not of its kind)" if without else ""
    lines = [f"prompt accuracy: what the classifier sees in {len(rows):,} of {len(prompts):,} images a row{others}"]
    own = extractor.classifier.record.get("held_out_accuracy_per_head")
    if isinstance(own, dict) and set(own) == set(heads):
        lines.append("the classifier itself, on real images: " + ", ".join(f"{head} {own[head]:.3f}" for head in heads))
    return _Wanted(torch.tensor(rows), torch.tensor([read[prompts[i]] for i in rows])), tuple(lines)


def _cut_prompts(clip: ClipScore | None, prompts: Sequence[str]) -> tuple[str, ...]:
    cut = 0 if clip is None else clip.num_truncated(list(dict.fromkeys(prompts)))
    if clip is None or not cut:
        return ()
    return (f"CLIP score: {cut:,} different prompts have more than {clip.max_tokens} tokens, and were cut there",)


def _pictures(
    source: Candidate, extractor: FeatureExtractor, images: Tensor, seeds: range, cond: Rows, batch_size: int
) -> Iterator[Tensor]:
    """Yield the pictures of a row in batches: what the features looked at, or decoded from it."""
    for first in range(0, len(images), batch_size):
        batch = slice(first, first + batch_size)
        if not _of_latents(extractor, source):
            yield images[batch]
        elif source.decode is not None:
            yield source.decode(images[batch]).cpu()
        else:  # an exported pipeline decodes inside its call
            rows = {name: value[batch] for name, value in cond.items()}
            yield generate_images(source.generate, seeds[batch], source.sample_shape, rows, batch_size=batch_size)


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


def _of_latents(extractor: FeatureExtractor, source: Candidate) -> bool:
    """Return whether the features are those of what comes before the decoder."""
    return source.decodes and getattr(extractor, "of_latents", False)


def _samples(source: Candidate, extractor: FeatureExtractor, seeds: range, cond: Rows, settings: Settings) -> Tensor:
    """Return what the extractor looks at: images, or the latents they are decoded from."""
    if _of_latents(extractor, source):
        assert source.latents is not None, "check_features has been called"
        return generate_images(source.latents, seeds, source.sample_shape, cond, batch_size=settings.batch_size).float()
    images = generate_images(source.generate, seeds, source.sample_shape, cond, batch_size=settings.batch_size)
    # What leaves the sampler is a picture: values beyond the range are clipped, as in any pipeline's output.
    return images.clamp(-1, 1)


def _shown(source: Candidate, seeds: range, cond: Rows, num: int = 16) -> Tensor:
    first = {name: value[:num] for name, value in cond.items()}
    return generate_images(source.generate, seeds[:num], source.sample_shape, first, batch_size=num)


def check_features(extractor: FeatureExtractor, sources: Sequence[Candidate]) -> None:
    """Raise ValueError if the extractor looks at latents and a source does not give them."""
    for source in sources:
        if _of_latents(extractor, source) and source.latents is None:
            raise ValueError(
                f"--features teacher looks at latents, and {source.name} gives images only; name a transformers model"
            )


def _row(
    name: str,
    source: Candidate,
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
        network_evaluations=source.calls,
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


def _speeds(sources: Sequence[tuple[str, Candidate, bool]], settings: Settings) -> dict[str, tuple[float, float]]:
    """Return seconds per call at batch 1 and at the large batch, all rows timed in turns."""

    def call(source: Candidate, num: int) -> Callable[[], object]:
        eps = noise(range(num), source.sample_shape)
        cond = source.conditions(num, settings.class_labels, settings.prompts)
        return lambda: source.generate(eps, cond)

    one = speed.compare({name: call(source, 1) for name, source, _ in sources}, repeats=SPEED_ROUNDS)
    large = speed.compare(
        {name: call(source, settings.batch_size) for name, source, _ in sources}, repeats=SPEED_ROUNDS
    )
    return {name: (one[name], large[name]) for name in one}


def _short_name(name: str) -> str:
    """Return the last two parts of a student's path: the whole one says where it lay, which is nobody's business."""
    return "/".join(Path(name.removeprefix("the student in ")).parts[-2:])


def _subset_size(num_real: int, num_fake: int) -> int:
    return min(1000, num_real, num_fake)


def teacher_reference(source: Candidate, extractor: FeatureExtractor, settings: Settings) -> Reference:
    """Return the teacher's own many-step samples (or their latents), from seeds that no row uses."""
    num = settings.num_samples
    first = REFERENCE_SEED if settings.seed + num <= REFERENCE_SEED else settings.seed + num
    cond = source.conditions(num, settings.class_labels, settings.prompts, seed=first)
    images = _samples(source, extractor, range(first, first + num), cond, settings)
    name = f"the teacher's own {source.num_steps}-step samples, seeds {first}.."
    return Reference(images, name, settings.prompts)


def folder_reference(folder: Path, image_shape: Sequence[int]) -> Reference:
    """Return the images in a folder (searched recursively), in the teacher's size.

    Raises:
        ValueError: If there is no folder, fewer than two images, or an image of another size.
    """
    if not folder.is_dir():
        raise ValueError(
            f"--reference {folder}: no such folder; give 'teacher', an embedded teacher's name, or a folder of images"
        )
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp"))
    if len(paths) < 2:
        raise ValueError(f"--reference {folder} holds {len(paths)} images; at least 2 are needed")
    channels, height, width = image_shape
    images = []
    for path in paths:
        with Image.open(path) as picture:
            if picture.size != (width, height):
                raise ValueError(
                    f"--reference: {path} is {picture.width}x{picture.height}, the teacher makes {width}x{height}; resize it first"
                )
            pixels = torch.tensor(
                bytearray(picture.convert("L" if channels == 1 else "RGB").tobytes()), dtype=torch.float32
            )
        images.append(pixels.reshape(height, width, channels).permute(2, 0, 1) / 127.5 - 1)
    return Reference(torch.stack(images), f"the images in {folder.name}/")


def embedded_reference(name: str) -> Reference:
    """Return the real images that an embedded teacher ships for evaluation."""
    images = load_file(EMBEDDED[name].folder / "images.safetensors")["images"]
    pictures = images.float() * (2 / EMBEDDED[name].white) - 1
    held_out = EMBEDDED[name].heldout
    prompts = [] if held_out is None else held_out.read_text(encoding="utf-8").splitlines()
    return Reference(pictures, f"the {len(images):,} real {name} (only ever read by evaluate)", prompts)


def choose_features(
    spec: str, teacher: NetworkTeacher, *, local_files_only: bool, device: torch.device
) -> FeatureExtractor:
    """Return the extractor for `--features`: teacher, an embedded teacher's name, a file, a folder or an id."""
    if spec == "teacher":
        return teacher_features(teacher, device)
    if spec in EMBEDDED:
        return ClassifierFeatures(ConvFeatures.load(EMBEDDED[spec].folder / "classifier.safetensors", device=device))
    return load_features(spec, local_files_only=local_files_only, device=device)


def default_features(teacher_source: str) -> str:
    """Return the features used if none are named: an embedded teacher's classifier, else the teacher's own."""
    return teacher_source if teacher_source in EMBEDDED else "teacher"


def teacher_features(teacher: NetworkTeacher, device: torch.device) -> FeatureExtractor:
    """Return the teacher's own middle features of slightly noised images, as an extractor.

    The noise is fixed (one seed) and its level is log-SNR 2, where networks see structure more than noise.

    Raises:
        ValueError: If the teacher has no network with a middle.
    """
    network = teacher.network
    if not isinstance(network, torch.nn.Module):
        raise ValueError(
            "--features teacher: this teacher is a plain callable without middle features; name a network file"
        )
    process = teacher.spec.process
    t = float(process.time_at_log_snr(torch.tensor([MIDDLE_LOG_SNR], dtype=torch.float64)))
    fixed = noise([0], teacher.spec.sample_shape)

    def look(images: Tensor) -> None:
        alpha, sigma = (broadcast(v, images) for v in process.alpha_sigma(as_times(t, len(images))))
        # What the images show is not said: the null condition where there is one, else the same for all.
        cond = to_device(teacher.null_rows(teacher.example_rows(len(images))), device)
        if isinstance(teacher, PipelineTeacher) and teacher.family.beside is not None:
            # Each image beside itself made small, as a super-resolution network expects.
            small = torch.nn.functional.interpolate(images, scale_factor=1 / teacher.picture.usual_factor, mode="area")
            cond |= to_device(teacher.picture_rows(small, fixed.expand_as(images)), device)
        teacher.denoised((alpha * images + sigma * fixed.to(images)).to(device), t, cond)

    if hasattr(network, "mid_block"):
        decodes = isinstance(teacher, PipelineTeacher) and teacher.family.latents
        of_what = " of latents" if decodes else ""
        name = f"the teacher's own mid_block{of_what} at log-SNR {MIDDLE_LOG_SNR:g}"
        return MiddleFeatures(network, look, name=name, of_latents=decodes)
    raise ValueError(
        f"--features teacher: {type(network).__name__} has no mid_block; name a network file or a transformers model"
    )
