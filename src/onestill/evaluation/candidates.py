"""What is evaluated: the sources, the settings that all of them share, and what is drawn from them to be looked at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from onestill.evaluation.features import FeatureExtractor
from onestill.sampling.generate import Rows, generate_images
from onestill.sampling.samplers.base import Sampler


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
        show_progress: Whether to show a bar on a terminal.
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
    show_progress: bool = False


def check_features(extractor: FeatureExtractor, sources: Sequence[Sampler]) -> None:
    """Raise ValueError if the extractor looks at latents and a source does not give them."""
    for source in sources:
        if looks_at_latents(extractor, source) and not source.gives_latents:
            raise ValueError(
                f"--features teacher looks at latents, and {source.name} gives images only; name a transformers model"
            )


def looks_at_latents(extractor: FeatureExtractor, source: Sampler) -> bool:
    """Return whether the features are those of what comes before the decoder."""
    return source.has_decoder and getattr(extractor, "of_latents", False)


def samples(source: Sampler, extractor: FeatureExtractor, seeds: range, cond: Rows, settings: Settings) -> Tensor:
    """Return what the extractor looks at: images, or the latents they are decoded from."""
    how: dict[str, Any] = {"batch_size": settings.batch_size, "show_progress": settings.show_progress}
    if looks_at_latents(extractor, source):
        return generate_images(source.latents, seeds, source.sample_shape, cond, **how).float()
    images = generate_images(source, seeds, source.sample_shape, cond, **how)
    # What leaves the sampler is a picture: values beyond the range are clipped, as in any pipeline's output.
    return images.clamp(-1, 1)


def first_pictures(source: Sampler, seeds: range, cond: Rows, num: int = 16) -> Tensor:
    """Return the first pictures of a row, to be shown."""
    first = {name: value[:num] for name, value in cond.items()}
    return generate_images(source, seeds[:num], source.sample_shape, first, batch_size=num)


def pictures_of_samples(
    source: Sampler, extractor: FeatureExtractor, images: Tensor, seeds: range, cond: Rows, batch_size: int
) -> Iterator[Tensor]:
    """Yield the pictures of a row in batches: what the features looked at, or decoded from it."""
    for first in range(0, len(images), batch_size):
        batch = slice(first, first + batch_size)
        if not looks_at_latents(extractor, source):
            yield images[batch]
        elif source.can_decode:
            yield source.decode(images[batch]).cpu()
        else:  # an exported pipeline decodes inside its call
            rows = {name: value[batch] for name, value in cond.items()}
            yield generate_images(source, seeds[batch], source.sample_shape, rows, batch_size=batch_size)
