"""Models of transformers: loaded without a pickle or remote code, and a vision model as an extractor."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from onestill.core.errors import SettingError, named
from onestill.core.models import LARGEST_SIDE, load_model
from onestill.core.reading import loading
from onestill.evaluation.features import as_parameters, check_range, pooled

HUB_SECONDS = 10
"""How long the hub may take to answer the first question."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


class TransformersFeatures:
    """A transformers vision model (DINOv2, CLIP, ViT, ...) as an extractor.

    The whole image is resized to the model's input size (bicubic, antialiased; no crop, since the border of a
    generated image counts too) and normalised with the processor's mean and standard deviation; grey images
    are repeated to 3 channels. The feature is the pooled output, or the mean of the tokens where the model
    has no pooled output or its file has no weights for one.

    Args:
        model_id: A local folder or a hub id. Only safetensors weights are read and no remote code is run.
        local_files_only: Never ask the network.
        device: Where the model runs.

    Raises:
        ValueError: If the model or its processor cannot be loaded, its weights are incomplete, or it does not
            take images.
    """

    def __init__(
        self, model_id: str | os.PathLike[str], *, local_files_only: bool = False, device: str | torch.device = "cpu"
    ) -> None:
        from transformers import AutoImageProcessor

        source = os.fspath(model_id)
        local_files_only = stays_here("features", source, local_files_only)
        self._model, has_pooler = _load_vision(source, local_files_only)
        self._model.to(device).eval().requires_grad_(False)
        with told("features", source, "has no usable image processor"):
            processor = AutoImageProcessor.from_pretrained(
                source, trust_remote_code=False, local_files_only=local_files_only
            )
            self.size = input_size(processor)
            self._mean = torch.tensor(processor.image_mean).view(1, -1, 1, 1)
            self._std = torch.tensor(processor.image_std).view(1, -1, 1, 1)
        with told("features", source, "does not run on the pictures of its image processor"), torch.no_grad():
            output = self._model(pixel_values=as_parameters(torch.zeros(1, 3, *self.size), self._model))
        self._use_pooler = has_pooler and getattr(output, "pooler_output", None) is not None
        pooling = "pooled output" if self._use_pooler else "mean of tokens"
        self.name = f"{name_with_commit(source)} ({pooling}, {self.size[0]}x{self.size[1]} bicubic)"

    def __call__(self, images: Tensor) -> Tensor:
        """Return features [N, D] of images [N, 1 or 3, H, W] in [-1, 1]."""
        output = self._model(pixel_values=self.pixels(images))
        return pooled(output.pooler_output if self._use_pooler else output.last_hidden_state, self.name)

    def pixels(self, images: Tensor) -> Tensor:
        """Return the model's input: resized to `size`, in [0, 1], then `(pixels - mean) / std`."""
        check_range(images)
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            found = list(images.shape)
            raise ValueError(f"{self.name} sees grey or RGB images, [N, 1 or 3, H, W], and was given {found}")
        pixels = images.float().expand(-1, 3, -1, -1) / 2 + 0.5
        pixels = functional.interpolate(pixels, self.size, mode="bicubic", antialias=True).clamp(0, 1)
        normalised = (pixels - self._mean.to(pixels)) / self._std.to(pixels)
        return as_parameters(normalised, self._model)


def load_transformers(
    source: str, local_files_only: bool, *, setting: str, dtype: torch.dtype | Literal["auto"] = "auto"
) -> tuple[nn.Module, set[str]]:
    """Return the transformers model of a folder or hub id, and the names of the weights that its file lacks.

    Only safetensors are read, in the file's precision if `dtype` is "auto", and no remote code is run.

    Raises:
        SettingError: About `setting`, if it cannot be loaded, or lacks more weights than those of a pooler.
    """
    from transformers import AutoModel

    options = {
        "trust_remote_code": False,
        # With peft installed, the look for an adapter would ask the network all the same.
        "adapter_kwargs": {"local_files_only": local_files_only},
        "dtype": dtype,
    }
    offline = " (local files only: nothing was downloaded)" if local_files_only else ""
    # transformers fills what a file lacks with random numbers; nothing measured must depend on those.
    with told(setting, source, f"cannot be loaded as a transformers model with safetensors weights{offline}"):
        model, missing, _ = load_model(AutoModel, source, "it", options, may_lack="pooler", offline=local_files_only)
    return model, set(missing)


@contextmanager
def told(setting: str, source: str, why: str) -> Iterator[None]:
    """Turn whatever a library raises of a model's folder or id into a SettingError: `why`, and its reason."""
    try:
        with loading("it"):
            yield
    except SettingError:
        raise
    except ValueError as error:
        raise SettingError(setting, source, f"{why}: {str(error).removeprefix('it cannot be read: ')}") from error


def _load_vision(source: str, local_files_only: bool) -> tuple[nn.Module, bool]:
    """Return the vision model and whether its pooled output has trained weights."""
    model, missing = load_transformers(source, local_files_only, setting="features")
    vision = getattr(model, "vision_model", model)
    if getattr(vision, "main_input_name", None) != "pixel_values":
        raise SettingError("features", source, f"a {type(model).__name__} does not take images")
    return vision, not missing


def stays_here(setting: str, source: str, local_files_only: bool) -> bool:
    """Return whether only local files are to be read of a model's folder or hub id: also where no hub answers.

    A hub that cannot be reached is asked once: its client would try again, file by file, for a minute.

    Raises:
        SettingError: About `setting`, if nothing answers and it was not downloaded before.
    """
    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    if local_files_only or Path(source).is_dir() or constants.is_offline_mode():
        return local_files_only or Path(source).is_dir()
    try:
        get_hf_file_metadata(hf_hub_url(source, "config.json"), timeout=HUB_SECONDS)
    except (errors.HfHubHTTPError, errors.HFValidationError):
        return False  # it has answered, and its client says best what
    except Exception as error:  # its client's own types: of names, connections, proxies and time
        if isinstance(try_to_load_from_cache(source, "config.json"), str):
            return True
        why = "the hub cannot be reached, and it was not downloaded before"
        todo = f"give a folder, or download it where there is a network, and give {named('local_files_only')}"
        raise SettingError(setting, source, why, todo) from error
    return False


def name_with_commit(source: str) -> str:
    """Return a folder's name, or a hub id with the commit that was loaded, which a branch does not tell."""
    from huggingface_hub import try_to_load_from_cache

    if Path(source).is_dir():
        return Path(source).resolve().name
    cached = try_to_load_from_cache(source, "config.json")
    return f"{source}@{Path(cached).parent.name[:12]}" if isinstance(cached, str) else source


def input_size(processor: Any) -> tuple[int, int]:
    """Return the height and width that the network sees: the crop's where there is a crop; ValueError if it has none."""
    crops = getattr(processor, "do_center_crop", False) and getattr(processor, "crop_size", None)
    size = getattr(processor, "crop_size" if crops else "size", None)
    height, width, edge = (getattr(size, key, None) for key in ("height", "width", "shortest_edge"))
    sides = int(height or edge or 0), int(width or edge or 0)
    if not all(1 <= side <= LARGEST_SIDE for side in sides):
        raise ValueError(f"its image processor names no input size from 1 to {LARGEST_SIDE}: {str(size)[:80]}")
    return sides
