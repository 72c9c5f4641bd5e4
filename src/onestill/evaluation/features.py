"""Feature extractors: the eyes through which two sets of images are compared.

A Fréchet distance is a number about images *and* an extractor, whose `name` is therefore printed beneath the table.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from onestill.evaluation.classifier import ConvFeatures


@runtime_checkable
class FeatureExtractor(Protocol):
    """What the metrics need of an extractor: images [N, C, H, W] in, features [N, D] float32 out."""

    @property
    def name(self) -> str:
        """What is printed as the extractor in the protocol: enough to tell two extractors apart."""

    def __call__(self, images: Tensor) -> Tensor:
        """Return features [N, D], float32, of images [N, C, H, W] in [-1, 1]."""


def sees_latents(extractor: FeatureExtractor) -> bool:
    """Return whether an extractor looks at latents, and not at the images that a decoder makes of them."""
    return bool(getattr(extractor, "of_latents", False))


def extract(extractor: FeatureExtractor, images: Tensor, batch_size: int = 256) -> Tensor:
    """Return the features [N, D] of images [N, C, H, W], batch by batch without gradients, float32 on the CPU.

    Raises:
        ValueError: If the images are not a non-empty, finite [N, C, H, W] float tensor, if `batch_size` is
            below 1, or if the extractor does not return one row of features per image.
    """
    _check_images(images)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    rows = []
    with torch.no_grad():
        for batch in torch.split(images, batch_size):
            features = extractor(batch)
            if features.ndim != 2 or len(features) != len(batch):
                what = f"features of shape {list(features.shape)} for {len(batch)} images"
                wanted = f"it must return one row per image, [{len(batch)}, D]"
                raise ValueError(f"the extractor {extractor.name!r} returned {what}; {wanted}")
            rows.append(features.float().cpu())
    return torch.cat(rows)


class ClassifierFeatures:
    """A `ConvFeatures` classifier, run in evaluation mode, as an extractor; its `logits` serve the label accuracy."""

    def __init__(self, classifier: ConvFeatures) -> None:
        self.classifier, self.name = classifier, classifier.name

    def __call__(self, images: Tensor) -> Tensor:
        """Return the penultimate features [N, D] of images in [-1, 1]."""
        check_range(images)
        with _evaluating(self.classifier):
            return self.classifier.features(images).float()

    def logits(self, images: Tensor, batch_size: int = 256) -> Tensor:
        """Return the class logits [N, num_classes] of images in [-1, 1], batch by batch, on the CPU."""
        check_range(images)
        with _evaluating(self.classifier), torch.no_grad():
            return torch.cat([self.classifier(batch).float().cpu() for batch in torch.split(images, batch_size)])


class MiddleFeatures:
    """A network's own middle features, for image kinds that no ready extractor knows.

    A forward hook on the submodule keeps its output while `run` sends the images through the network; the
    output is averaged over space. With a teacher as the network, `run` noises the images a little and
    denoises them once: fix its noise and its time, since the features depend on both.

    Args:
        network: The network, for example a `UNet2DModel`.
        run: `run(images)` calls the network exactly once on all images; what it returns is ignored.
        submodule: Dotted name of the submodule that is looked at.
        name: The extractor's name in the protocol; by default made of the network's class and `submodule`.
        of_latents: Whether it looks at latents, and not at the images that a decoder makes of them.

    Raises:
        ValueError: If the network has no such submodule.
    """

    def __init__(
        self,
        network: nn.Module,
        run: Callable[[Tensor], object],
        *,
        submodule: str = "mid_block",
        name: str | None = None,
        of_latents: bool = False,
    ) -> None:
        found = dict(network.named_modules()).get(submodule)
        if found is None or not submodule:
            children = ", ".join(key for key, _ in network.named_children()) or "none"
            why = f"has no submodule {submodule!r} to take features from; its children are: {children}"
            raise ValueError(f"{type(network).__name__} {why}")
        self._network, self._submodule, self._run, self.of_latents = network, found, run, of_latents
        self.name = name or f"{type(network).__name__}.{submodule}"

    def __call__(self, images: Tensor) -> Tensor:
        """Return features [N, D]: the submodule's output, averaged over space."""
        seen: list[object] = []
        handle = self._submodule.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        try:
            with _evaluating(self._network), torch.no_grad():
                self._run(images)
        finally:
            handle.remove()
        if len(seen) != 1:
            raise ValueError(f"{self.name}: run(images) must pass through the submodule once, it did {len(seen)} times")
        first = seen[0][0] if isinstance(seen[0], tuple | list) and seen[0] else seen[0]
        if not isinstance(first, Tensor):
            kind = type(seen[0]).__name__
            raise ValueError(f"{self.name}: expected a tensor or a tuple that starts with one, got {kind}")
        features = pooled(first, self.name)
        if len(features) != len(images):
            why = f"run(images) sent {len(features)} images through the network for {len(images)} given"
            raise ValueError(f"{self.name}: {why}; run each once, without guidance")
        return features


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or not len(images):
        raise ValueError(f"images must be a non-empty [N, C, H, W] tensor, got shape {list(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"images must be floats in [-1, 1], got {images.dtype}: images / 127.5 - 1")
    if not images.isfinite().all():
        bad = int((~images.isfinite()).flatten(1).any(dim=1).sum())
        raise ValueError(f"{bad} of {len(images)} images hold NaN or infinity: the sampler diverged")


def check_range(images: Tensor) -> None:
    """Raise ValueError if images do not lie in [-1, 1]."""
    # Metrics speak of images as they would be stored, and storing clips.
    low, high = images.min().item(), images.max().item()
    if low < -1.001 or high > 1.001:
        raise ValueError(f"images must lie in [-1, 1], got [{low:.3g}, {high:.3g}]: clamp or rescale them")


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Put the module into evaluation mode, and each part back into its own afterwards."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def as_parameters(images: Tensor, module: nn.Module) -> Tensor:
    """Return the images on the device and in the precision of the module's first parameter, if it has one."""
    parameter = next(module.parameters(), None)
    return images if parameter is None else images.to(parameter.device, parameter.dtype)


def pooled(features: Tensor, name: str) -> Tensor:
    """Return [N, D] float32 from features [N, D], maps [N, D, H, W] or sequences [N, L, D]."""
    if features.ndim == 4:
        return features.float().mean(dim=(2, 3))
    if features.ndim == 3:
        return features.float().mean(dim=1)
    if features.ndim != 2:
        raise ValueError(f"{name}: cannot pool an output of shape {list(features.shape)} to [N, D]")
    return features.float()
