"""The CLIP score: how well pictures fit their prompts in the eyes of a CLIP model."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from onestill.core.errors import SettingError
from onestill.core.models import check_configs
from onestill.evaluation.features import check_range
from onestill.evaluation.pretrained import HUB_ID, input_size, load_transformers, name_with_commit, stays_here, told


class ClipScore:
    """max(100 cos(E_image, E_text), 0) of pictures and their prompts, with a transformers CLIP model.

    Pictures are rounded to 8 bits, as they would be stored, and prepared by the model's own processor; grey ones
    become RGB. Prompts longer than the model reads are cut, their end token kept.

    Args:
        model: A folder or hub id of a `CLIPModel`. Only safetensors weights are read and no remote code is run;
            nothing is downloaded for a folder.
        local_files_only: Never ask the network.
        device: Where the model runs, in float32.

    Attributes:
        name: The model in a protocol: the folder's name, or the hub id with its commit.
        max_tokens: Tokens that the model reads of a prompt, start and end included.

    Raises:
        ValueError: If there is no such model, it is no CLIP, its weights are incomplete, or it has no processor.

    Source:
        Hessel et al. 2021, "CLIPScore: A Reference-free Evaluation Metric for Image Captioning", in the scale that
        torchmetrics' `CLIPScore` uses: 100 in place of the paper's 2.5.
    """

    def __init__(
        self, model: str | os.PathLike[str], *, local_files_only: bool = False, device: str | torch.device = "cpu"
    ) -> None:
        source = os.fspath(model)
        is_folder = os.path.isdir(source)  # unlike Path.is_dir, also of names too long for a path
        if not is_folder and (os.path.exists(source) or not HUB_ID.fullmatch(source)):
            raise SettingError(
                "clip", source, "no such folder", "give the folder or hub id of a transformers CLIP model"
            )
        self._model, self._processor = _load(source, local_files_only or is_folder)
        self._model.to(device).eval().requires_grad_(False)
        self._device = torch.device(device)
        self._texts: dict[str, Tensor] = {}
        self.max_tokens = int(self._model.config.text_config.max_position_embeddings)
        self.name = name_with_commit(source)
        with told("clip", source, "does not run on a picture and a prompt"):
            self(torch.zeros(1, 3, 8, 8), ["a picture"])
            self._texts.clear()

    def __call__(self, images: Tensor, prompts: Sequence[str], batch_size: int = 64) -> Tensor:
        """Return the score of each picture, [N] float32 in [0, 100].

        Args:
            images: [N, 1 or 3, H, W], in [-1, 1].
            prompts: N of them: what each picture was asked to show.
            batch_size: Pictures per call of the model; it changes memory, not the result.

        Raises:
            ValueError: If these are no pictures, or not as many as prompts.
        """
        check_pictures(images.shape[1:])
        if len(images) != len(prompts) or not len(images):
            raise ValueError(f"{len(images)} pictures and {len(prompts)} prompts; a CLIP score needs one of each")
        check_range(images)
        scores = []
        for first in range(0, len(images), batch_size):
            batch = slice(first, first + batch_size)
            cosines = (self._of_images(images[batch]) * self._of_texts(prompts[batch])).sum(dim=1)
            scores.append((100 * cosines).clamp(min=0))
        return torch.cat(scores)

    def num_truncated(self, prompts: Sequence[str]) -> int:
        """Return how many of the prompts have more than `max_tokens` tokens, so that their ends are not seen."""
        return sum(len(ids) > self.max_tokens for ids in self._processor.tokenizer(list(prompts))["input_ids"])

    @torch.no_grad()
    def _of_images(self, images: Tensor) -> Tensor:
        """Return embeddings [N, D] of length 1."""
        pixels = ((images.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        pictures = [Image.fromarray(p.numpy()) for p in pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()]
        inputs = self._processor.image_processor(images=pictures, return_tensors="pt")
        return _unit(self._model.get_image_features(pixel_values=inputs["pixel_values"].to(self._device)))

    @torch.no_grad()
    def _of_texts(self, prompts: Sequence[str]) -> Tensor:
        """Return embeddings [N, D] of length 1; each prompt is looked at once, however many pictures it has."""
        if new := list(dict.fromkeys(prompt for prompt in prompts if prompt not in self._texts)):
            cut = {"truncation": True, "max_length": self.max_tokens}
            tokens = self._processor.tokenizer(new, padding=True, return_tensors="pt", **cut).to(self._device)
            given = {name: tokens[name] for name in ("input_ids", "attention_mask")}
            self._texts |= dict(zip(new, _unit(self._model.get_text_features(**given)), strict=True))
        return torch.stack([self._texts[prompt] for prompt in prompts])


def check_pictures(shape: Sequence[int], setting: str = "clip", who: str = "CLIP") -> None:
    """Raise SettingError about what `who` sees if what a teacher makes, of this shape without the batch, are no pictures."""
    if len(shape) != 3 or shape[0] not in (1, 3):
        why = f"{who} sees pictures, [1 or 3, height, width], and this teacher makes {list(shape)}"
        raise SettingError(setting, why=why, todo="leave it out")


def _load(source: str, offline: bool) -> tuple[Any, Any]:
    """Return (the CLIPModel in float32, its CLIPProcessor)."""
    from transformers import AutoConfig, CLIPProcessor

    offline = stays_here("clip", source, offline)
    arguments = {"trust_remote_code": False, "local_files_only": offline}
    nothing = " (local files only: nothing was downloaded)" if offline else ""
    with told("clip", source, f"cannot be loaded as a transformers model{nothing}"):
        if os.path.isdir(source):
            check_configs(Path(source))
        kind = AutoConfig.from_pretrained(source, **arguments).model_type
    if kind != "clip":
        why = f"is a transformers model of type {kind!r}, and the CLIP score needs a whole CLIP"
        raise SettingError("clip", source, f"{why} ('clip': pictures and texts)")
    model, _ = load_transformers(source, offline, setting="clip", dtype=torch.float32)
    with told("clip", source, f"has no usable CLIP processor{nothing}"):
        processor = CLIPProcessor.from_pretrained(source, **arguments)
        input_size(processor.image_processor)
    return model, processor


def _unit(output: object) -> Tensor:
    """Return projected embeddings at length 1, on the CPU: a tensor, or what transformers 5 wraps around it."""
    embeddings: Tensor = output if isinstance(output, Tensor) else getattr(output, "pooler_output")  # noqa: B009 - typed as object
    return functional.normalize(embeddings.float(), dim=-1).cpu()
