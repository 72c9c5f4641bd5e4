"""What is drawn from a sampler to be looked at: images, or the latents that they are decoded from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from onestill.core.errors import SettingError, named
from onestill.evaluation.features import FeatureExtractor, sees_latents
from onestill.sampling.generate import Rows, generate_images
from onestill.sampling.samplers.base import Sampler


@dataclass(frozen=True)
class Subjects:
    """What the images of every row show: labels (all if empty) or prompts to go round."""

    class_labels: tuple[int, ...] = ()
    prompts: Sequence[str] = ()

    def rows(self, sampler: Sampler, num: int, *, seed: int = 0) -> Rows:
        """Return what `num` images from seed, seed + 1, ... on are asked of a sampler."""
        return sampler.conditions(num, self.class_labels, self.prompts, seed=seed)


@dataclass(frozen=True)
class Draw:
    """Images of one sampler, one for each seed and row, in batches."""

    sampler: Sampler
    seeds: range
    rows: Rows
    batch_size: int
    show_progress: bool = False

    def seen_by(self, extractor: FeatureExtractor) -> Tensor:
        """Return what an extractor looks at: images, or the latents they are decoded from."""
        how: dict[str, Any] = {"batch_size": self.batch_size, "show_progress": self.show_progress}
        if looks_at_latents(extractor, self.sampler):
            shape = self.sampler.sample_shape
            return generate_images(self.sampler.latents, self.seeds, shape, self.rows, **how).float()
        # What leaves the sampler is a picture: values beyond the range are clipped, as in any pipeline's output.
        return self.sampler.images(self.seeds, self.rows, **how).clamp(-1, 1)

    def pictures(self, seen: Tensor, extractor: FeatureExtractor) -> Iterator[Tensor]:
        """Yield the pictures in batches: what `seen_by` returned, or decoded from it."""
        for first in range(0, len(seen), self.batch_size):
            batch = slice(first, first + self.batch_size)
            if not looks_at_latents(extractor, self.sampler):
                yield seen[batch]
            elif self.sampler.can_decode:
                yield self.sampler.decode(seen[batch]).cpu()
            else:  # an exported pipeline decodes inside its call
                yield self.drawn(batch)

    def drawn(self, part: slice) -> Tensor:
        """Return some of the pictures, whatever an extractor looks at."""
        rows, seeds = {name: value[part] for name, value in self.rows.items()}, self.seeds[part]
        return self.sampler.images(seeds, rows, batch_size=len(seeds))


def check_features(extractor: FeatureExtractor, sampler: Sampler) -> None:
    """Raise SettingError if the extractor looks at latents and a sampler does not give them."""
    if looks_at_latents(extractor, sampler) and not sampler.gives_latents:
        why = f"looks at latents, and {sampler.name} gives images only"
        raise SettingError("features", "teacher", why, f"name a transformers model with {named('features')}")


def looks_at_latents(extractor: FeatureExtractor, sampler: Sampler) -> bool:
    """Return whether the features are those of what comes before the decoder."""
    return sampler.has_decoder and sees_latents(extractor)
