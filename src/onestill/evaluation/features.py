"""Feature extractors: the eyes through which two sets of images are compared.

A Fréchet distance is a number about images *and* an extractor, so every extractor carries a `name` that is
printed beneath the table. Images are floats in [-1, 1], [N, C, H, W]; features are float32, [N, D].
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from onestill.evaluation.classifier import ConvFeatures as ConvFeatures

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


class FeatureExtractor(Protocol):
    """What the metrics need of an extractor: images [N, C, H, W] in, features [N, D] float32 out."""

    @property
    def name(self) -> str:
        """What is printed as the extractor in the protocol: enough to tell two extractors apart."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """Return features [N, D], float32, of images [N, C, H, W] in [-1, 1]."""
        ...


def extract(extractor: FeatureExtractor, images: Tensor, batch_size: int = 256) -> Tensor:
    """Return the features of all images, computed batch by batch without gradients.

    Args:
        extractor: Any `FeatureExtractor`.
        images: [N, C, H, W], floats.
        batch_size: Images per call of the extractor; it changes memory, not the result.

    Returns:
        Features [N, D], float32, on the CPU.

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
                raise ValueError(
                    f"the extractor {extractor.name!r} returned features of shape {list(features.shape)} for "
                    f"{len(batch)} images; it must return one row per image, [{len(batch)}, D]"
                )
            rows.append(features.float().cpu())
    return torch.cat(rows)


class ClassifierFeatures:
    """A `ConvFeatures` classifier as an extractor; its `logits` serve the label accuracy.

    Args:
        classifier: The classifier; it is run in evaluation mode.
    """

    def __init__(self, classifier: ConvFeatures) -> None:
        self.classifier = classifier
        self.name = classifier.name

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


class ModuleFeatures:
    """Any module or callable as an extractor.

    Args:
        module: `images -> Tensor` (or a tuple whose first entry is the tensor). A module is run in
            evaluation mode, on its own device and in its own precision.
        name: The extractor's name in the protocol.
        pool: `mean` averages maps [N, D, H, W] over space and sequences [N, L, D] over their length;
            `flatten` keeps every entry.
    """

    def __init__(
        self, module: Callable[[Tensor], object], *, name: str, pool: Literal["mean", "flatten"] = "mean"
    ) -> None:
        self.module = module
        self.name = name
        self.pool = pool

    def __call__(self, images: Tensor) -> Tensor:
        """Return features [N, D].

        Raises:
            ValueError: If the module returns something else than features, maps or sequences.
        """
        if isinstance(self.module, nn.Module):
            with _evaluating(self.module):
                output = self.module(_as_parameters(images, self.module))
        else:
            output = self.module(images)
        features = _first_tensor(output, self.name)
        return features.flatten(1).float() if self.pool == "flatten" else _pooled(features, self.name)


class TransformersFeatures:
    """A transformers vision model (DINOv2, CLIP, ViT, ...) as an extractor.

    The whole image is resized to the model's input size (bicubic, antialiased; no crop, since the border of a
    generated image counts too) and normalised with the processor's mean and standard deviation; grey images
    are repeated to 3 channels. The feature is the pooled output, or the mean of the tokens where the model
    has no pooled output or its file has no weights for one.

    Args:
        model_id: A local folder or a hub id. Only safetensors weights are read and no remote code is run.
        revision: Branch, tag or commit of a hub id.
        local_files_only: Never ask the network.
        device: Where the model runs.

    Raises:
        ValueError: If the model or its processor cannot be loaded, its weights are incomplete, or it does not
            take images.
    """

    def __init__(
        self,
        model_id: str | os.PathLike[str],
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        device: str | torch.device = "cpu",
    ) -> None:
        source = os.fspath(model_id)
        local_files_only = local_files_only or Path(source).is_dir()
        self._model, has_pooler = _load_vision(source, revision, local_files_only)
        self._model.to(device).eval().requires_grad_(False)
        processor = _load_processor(source, revision, local_files_only)
        self.size = _input_size(processor, source)
        self._mean = torch.tensor(processor.image_mean).view(1, -1, 1, 1)
        self._std = torch.tensor(processor.image_std).view(1, -1, 1, 1)
        with torch.no_grad():
            blank = _as_parameters(torch.zeros(1, 3, *self.size), self._model)
            output = self._model(pixel_values=blank)
        self._use_pooler = has_pooler and getattr(output, "pooler_output", None) is not None
        pooling = "pooled output" if self._use_pooler else "mean of tokens"
        height, width = self.size
        self.name = f"{name_with_commit(source, revision)} ({pooling}, {height}x{width} bicubic)"

    def __call__(self, images: Tensor) -> Tensor:
        """Return features [N, D] of images [N, 1 or 3, H, W] in [-1, 1].

        Raises:
            ValueError: If the images have neither 1 nor 3 channels.
        """
        output = self._model(pixel_values=self.pixels(images))
        return _pooled(output.pooler_output if self._use_pooler else output.last_hidden_state, self.name)

    def pixels(self, images: Tensor) -> Tensor:
        """Return the model's input: resized to `size`, in [0, 1], then `(pixels - mean) / std`."""
        check_range(images)
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"{self.name} sees grey or RGB images, [N, 1 or 3, H, W], and was given {list(images.shape)}"
            )
        pixels = images.float().expand(-1, 3, -1, -1) / 2 + 0.5
        pixels = functional.interpolate(pixels, self.size, mode="bicubic", antialias=True).clamp(0, 1)
        normalised = (pixels - self._mean.to(pixels)) / self._std.to(pixels)
        return _as_parameters(normalised, self._model)


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
            raise ValueError(
                f"{type(network).__name__} has no submodule {submodule!r} to take features from; "
                f"its children are: {children}"
            )
        self._network, self._submodule, self._run, self.of_latents = network, found, run, of_latents
        self.name = name or f"{type(network).__name__}.{submodule}"

    def __call__(self, images: Tensor) -> Tensor:
        """Return features [N, D]: the submodule's output, averaged over space.

        Raises:
            ValueError: If `run` did not pass through the submodule exactly once with all images.
        """
        seen: list[object] = []
        handle = self._submodule.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        try:
            with _evaluating(self._network), torch.no_grad():
                self._run(images)
        finally:
            handle.remove()
        if len(seen) != 1:
            raise ValueError(f"{self.name}: run(images) must pass through the submodule once, it did {len(seen)} times")
        features = _pooled(_first_tensor(seen[0], self.name), self.name)
        if len(features) != len(images):
            raise ValueError(
                f"{self.name}: run(images) sent {len(features)} images through the network for {len(images)} "
                "given; run each once, without guidance"
            )
        return features


def load_features(spec: str, *, local_files_only: bool = False, device: str | torch.device = "cpu") -> FeatureExtractor:
    """Return the extractor that `--features` names.

    Args:
        spec: A `.safetensors` file written by `ConvFeatures.save`, or the folder or hub id of a transformers
            vision model.
        local_files_only: Never ask the network.
        device: Where the extractor runs.

    Raises:
        ValueError: If there is no such file or folder, it is a pickle, or it is of another kind.
    """
    path = Path(spec)
    suffix = path.suffix.lower()
    if suffix in PICKLES and not path.is_dir():
        raise ValueError(
            f"--features: {spec} is a pickle ({suffix}), which can run code when it is opened; give a "
            ".safetensors file written by ConvFeatures.save, or a transformers model with safetensors weights"
        )
    if suffix == ".safetensors" or path.is_file():
        return ClassifierFeatures(ConvFeatures.load(path, device=device))
    if not path.is_dir() and not HUB_ID.fullmatch(spec):
        raise ValueError(
            f"--features: no such file or folder: {spec!r}; give a .safetensors file written by "
            "ConvFeatures.save, or the folder or id of a transformers vision model"
        )
    return TransformersFeatures(spec, local_files_only=local_files_only, device=device)


def load_transformers(
    source: str,
    revision: str | None,
    local_files_only: bool,
    *,
    flag: str,
    dtype: torch.dtype | Literal["auto"] = "auto",
) -> tuple[nn.Module, set[str]]:
    """Return the transformers model of a folder or hub id, and the names of the weights that its file lacks.

    Only safetensors are read and no remote code is run.

    Args:
        source: The folder or hub id.
        revision: Branch, tag or commit of a hub id.
        local_files_only: Never ask the network.
        flag: What errors speak of.
        dtype: Precision of the weights; "auto" is that of the file.

    Raises:
        ValueError: If it cannot be loaded, or lacks more weights than those of a pooler.
    """
    from transformers import AutoModel

    try:
        model, info = AutoModel.from_pretrained(
            source,
            revision=revision,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=local_files_only,
            # With peft installed, the look for an adapter would ask the network all the same.
            adapter_kwargs={"local_files_only": local_files_only},
            output_loading_info=True,
            dtype=dtype,
        )
    except (OSError, ValueError) as error:
        offline = " (local files only: nothing was downloaded)" if local_files_only else ""
        raise ValueError(
            f"{flag}: cannot load {source!r} as a transformers model with safetensors weights{offline}: {error}"
        ) from error
    # transformers fills what a file lacks with random numbers; nothing measured must depend on those.
    missing = set(info["missing_keys"])
    without_pooler = {key for key in missing if "pooler" not in key}
    if without_pooler:
        shown = ", ".join(sorted(without_pooler)[:3])
        raise ValueError(f"{flag}: the weights of {source!r} are incomplete; missing: {shown}, ...")
    return model, missing


def _load_vision(source: str, revision: str | None, local_files_only: bool) -> tuple[nn.Module, bool]:
    """Return the vision model and whether its pooled output has trained weights."""
    model, missing = load_transformers(source, revision, local_files_only, flag="--features")
    vision = getattr(model, "vision_model", model)
    if getattr(vision, "main_input_name", None) != "pixel_values":
        raise ValueError(f"--features: {source!r} ({type(model).__name__}) does not take images")
    return vision, not missing


def name_with_commit(source: str, revision: str | None) -> str:
    """Return a folder's name, or a hub id with the commit that was loaded, which a branch does not tell."""
    from huggingface_hub import try_to_load_from_cache

    if Path(source).is_dir():
        return Path(source).resolve().name
    cached = try_to_load_from_cache(source, "config.json", revision=revision)
    commit = Path(cached).parent.name[:12] if isinstance(cached, str) else revision
    return f"{source}@{commit}" if commit else source


class _Processor(Protocol):
    image_mean: list[float]
    image_std: list[float]


def _load_processor(source: str, revision: str | None, local_files_only: bool) -> _Processor:
    from transformers import AutoImageProcessor

    try:
        processor: _Processor = AutoImageProcessor.from_pretrained(
            source, revision=revision, trust_remote_code=False, local_files_only=local_files_only
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"--features: {source!r} has no usable image processor: {error}") from error
    return processor


def _input_size(processor: _Processor, source: str) -> tuple[int, int]:
    """Return the height and width that the network sees: the crop's where there is a crop."""
    crops = getattr(processor, "do_center_crop", False) and getattr(processor, "crop_size", None)
    size = getattr(processor, "crop_size" if crops else "size", None)
    height, width, edge = (getattr(size, key, None) for key in ("height", "width", "shortest_edge"))
    if not (height or edge):
        raise ValueError(f"--features: the image processor of {source!r} names no input size: {size}")
    return int(height or edge or 0), int(width or edge or 0)


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or not len(images):
        raise ValueError(f"images must be a non-empty [N, C, H, W] tensor, got shape {list(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"images must be floats in [-1, 1], got {images.dtype}: images / 127.5 - 1")
    if not images.isfinite().all():
        bad = (~images.isfinite()).flatten(1).any(dim=1).sum().item()
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


def _as_parameters(images: Tensor, module: nn.Module) -> Tensor:
    """Return the images on the device and in the precision of the module's first parameter, if it has one."""
    parameter = next(module.parameters(), None)
    return images if parameter is None else images.to(parameter.device, parameter.dtype)


def _first_tensor(output: object, name: str) -> Tensor:
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, Tensor):
        kind = type(output).__name__
        raise ValueError(f"{name}: expected a tensor or a tuple that starts with one, got {kind}")
    return first


def _pooled(features: Tensor, name: str) -> Tensor:
    """Return [N, D] float32 from features [N, D], maps [N, D, H, W] or sequences [N, L, D]."""
    if features.ndim == 4:
        return features.float().mean(dim=(2, 3))
    if features.ndim == 3:
        return features.float().mean(dim=1)
    if features.ndim != 2:
        raise ValueError(f"{name}: cannot pool an output of shape {list(features.shape)} to [N, D]")
    return features.float()
