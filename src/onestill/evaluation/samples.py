"""What is drawn from a sampler to be looked at: images, or the latents that they are decoded from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onestill.core.errors import SettingError, named
from onestill.evaluation.features import FeatureExtractor, extract, sees_latents
from onestill.sampling.generate import Rows, generate_images, with_progress
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

    def batches(self, extractor: FeatureExtractor) -> Iterator[tuple[slice, Tensor]]:
        """Yield what an extractor looks at, images or the latents they are decoded from, a batch at a time."""
        firsts = range(0, len(self.seeds), self.batch_size)
        for first in with_progress(firsts, self.show_progress):
            part = slice(first, min(first + self.batch_size, len(self.seeds)))
            yield part, self._latents(part) if looks_at_latents(extractor, self.sampler) else self.drawn(part)

    def features(self, extractor: FeatureExtractor) -> Tensor:
        """Return the features [N, D] of all; of the images a batch alone is kept at a time."""
        return torch.cat([extract(extractor, seen) for _, seen in self.batches(extractor)])

    def pictures(self, seen: Tensor, part: slice, extractor: FeatureExtractor) -> Tensor:
        """Return the pictures of a batch: what `batches` has yielded, or decoded from it."""
        if not looks_at_latents(extractor, self.sampler):
            return seen
        # An exported pipeline decodes inside its call.
        return self.sampler.decode(seen).cpu().clamp(-1, 1) if self.sampler.can_decode else self.drawn(part)

    def drawn(self, part: slice) -> Tensor:
        """Return some of the pictures, whatever an extractor looks at."""
        rows, seeds = self._part(part)
        # What leaves the sampler is a picture: values beyond the range are clipped, as in any pipeline's output.
        return self.sampler.images(seeds, rows, batch_size=len(seeds)).clamp(-1, 1)

    def _latents(self, part: slice) -> Tensor:
        rows, seeds = self._part(part)
        shape = self.sampler.sample_shape
        return generate_images(self.sampler.latents, seeds, shape, rows, batch_size=len(seeds)).float()

    def _part(self, part: slice) -> tuple[Rows, range]:
        return {name: value[part] for name, value in self.rows.items()}, self.seeds[part]


def check_features(extractor: FeatureExtractor, sampler: Sampler) -> None:
    """Raise SettingError if the extractor looks at latents and a sampler does not give them."""
    if looks_at_latents(extractor, sampler) and not sampler.gives_latents:
        why = f"looks at latents, and {sampler.name} gives images only"
        raise SettingError("features", "teacher", why, f"name a transformers model with {named('features')}")


def looks_at_latents(extractor: FeatureExtractor, sampler: Sampler) -> bool:
    """Return whether the features are those of what comes before the decoder."""
    return sampler.has_decoder and sees_latents(extractor)
