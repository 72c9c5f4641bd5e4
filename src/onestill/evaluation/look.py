"""A row of the table: its images looked at batch by batch, and the numbers of what was seen, each with its interval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onestill.evaluation import metrics
from onestill.evaluation.clip import ClipScore
from onestill.evaluation.features import ClassifierFeatures, FeatureExtractor, extract
from onestill.evaluation.gaussians import Gaussian, frechet, frechet_parts, gaussian_of
from onestill.evaluation.inception import InceptionFeatures
from onestill.evaluation.intervals import intervals
from onestill.evaluation.prompt_accuracy import PromptTargets
from onestill.evaluation.samples import Draw, looks_at_latents

NUM_SHOWN = 100
NEIGHBOURS = 3
"""k of precision and recall."""
KERNEL_SUBSETS, LARGEST_SUBSET = 50, 1000


@dataclass(frozen=True)
class Eyes:
    """What the images of every row are looked at with.

    Attributes:
        extractor: The features.
        targets: What a classifier of several heads has to see in them.
        clip: How well they fit their prompts.
    """

    extractor: FeatureExtractor
    targets: PromptTargets | None = None
    clip: ClipScore | None = None


@dataclass(frozen=True)
class Seen:
    """What was seen in the images of a row.

    Attributes:
        features: [N, D].
        shown: The first of its pictures.
        labels: Which show their label, [N].
        heads: On which of those judged each head of the classifier is right, [M, num_heads].
        scores: The CLIP score of each, [N].
        logits: Of the Inception network, [N, 1008].
        classes: What each was asked to show, [N].
    """

    features: Tensor
    shown: Tensor
    labels: Tensor | None
    heads: Tensor | None
    scores: Tensor | None
    logits: Tensor | None
    classes: Tensor | None


def look(draw: Draw, eyes: Eyes) -> Seen:
    """Return what is seen in the images of a row; of the images themselves none but the first are kept."""
    extractor, found = eyes.extractor, dict[str, list[Tensor]]()
    for part, seen in draw.batches(extractor):
        each = {"features": extract(extractor, seen), "labels": _label_hits(draw, part, seen, extractor)}
        if part.start < NUM_SHOWN and not looks_at_latents(extractor, draw.sampler):
            each["shown"] = seen
        if eyes.targets is not None:
            each["heads"] = eyes.targets.hits(seen, part.start)
        if eyes.clip is not None:
            each["scores"] = eyes.clip(draw.pictures(seen, part, extractor), draw.rows["prompt"][part])
        for name, value in each.items():
            if value is not None:
                found.setdefault(name, []).append(value)
    whole: dict[str, Tensor | None] = {name: torch.cat(parts) for name, parts in found.items()}
    features, shown = whole["features"], whole.get("shown")
    assert features is not None
    return Seen(
        features,
        shown=draw.drawn(slice(16)) if shown is None else shown[:NUM_SHOWN],
        labels=whole.get("labels"),
        heads=whole.get("heads"),
        scores=whole.get("scores"),
        logits=extractor.class_logits(features) if isinstance(extractor, InceptionFeatures) else None,
        classes=draw.rows.get("class_labels"),
    )


def _label_hits(draw: Draw, part: slice, seen: Tensor, extractor: FeatureExtractor) -> Tensor | None:
    """Return which images show their label; None without labels, or a classifier of one head."""
    labels = draw.rows.get("class_labels")
    if labels is None or not isinstance(extractor, ClassifierFeatures) or extractor.classifier.heads:
        return None
    return metrics.label_hits(extractor.logits(seen), labels[part])


@dataclass(frozen=True)
class Standard:
    """What the rows are measured by: features of the reference, or none but their mean and covariance.

    `paired` says that its pictures show the rows' own prompts, which the kernel distance does not do with.
    """

    gaussian: Gaussian
    features: Tensor | None
    paired: bool = False

    @property
    def has_kernel(self) -> bool:
        """Whether there is a kernel distance."""
        return self.features is not None and not self.paired

    @property
    def num_images(self) -> int | None:
        """How many images it is of, if that is known."""
        return self.gaussian.num_images

    def subset_size(self, num: int) -> int:
        """Return how many rows a subset of the kernel distance has where `num` images are compared."""
        return min(LARGEST_SUBSET, num, num if self.features is None else len(self.features))

    def numbers(self, seen: Seen, targets: PromptTargets | None, resamples: int) -> dict[str, Any]:
        """Return the numbers of a row by the names of its fields, with their intervals."""
        values: dict[str, Any] = {}
        parts: dict[str, Tensor] = {}
        if resamples:
            values["frechet_distance"], parts["frechet_distance"] = frechet_parts(self.gaussian, seen.features)
        else:
            values["frechet_distance"] = frechet(self.gaussian, gaussian_of(seen.features))
        if self.features is not None:
            inside, found = metrics.precision_recall_hits(self.features, seen.features, k=NEIGHBOURS)
            parts["precision"], values["recall"] = inside, float(found.double().mean())
        if self.features is not None and self.has_kernel:
            how = {"subset_size": self.subset_size(len(seen.features)), "num_subsets": KERNEL_SUBSETS}
            distance, spread = metrics.kernel_distance(self.features, seen.features, **how)
            values |= {"kernel_distance": distance, "kernel_distance_std": spread}
            parts |= {"kernel_distance": metrics.kernel_parts(self.features, seen.features)} if resamples else {}
        if seen.logits is not None:
            values["inception_score"], parts["inception_score"] = metrics.inception_score(seen.logits)
        shares = {"label_accuracy": seen.labels, "clip_score": seen.scores}
        parts |= {name: rows for name, rows in shares.items() if rows is not None}
        values |= {name: float(rows.double().mean()) for name, rows in parts.items() if name not in values}
        if targets is not None and seen.heads is not None:
            values["prompt_accuracy"] = accuracies = targets.accuracies(seen.heads)
            parts |= {f"prompt_accuracy.{name}": rows for name, rows in targets.parts(seen.heads).items()}
            named = {f"prompt_accuracy.{name}": value for name, value in accuracies.items()}
            return {**values, "intervals": intervals({**values, **named}, parts, resamples, seen.classes)}
        return {**values, "intervals": intervals(values, parts, resamples, seen.classes)}
