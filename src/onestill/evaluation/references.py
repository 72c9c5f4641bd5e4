"""What an evaluation compares with: the teacher's own samples, a folder of images, an embedded teacher's real ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from onestill.core.errors import SettingError
from onestill.evaluation.config import EvaluateConfig
from onestill.evaluation.features import FeatureExtractor
from onestill.evaluation.samples import Draw, Subjects
from onestill.sampling.samplers.base import Sampler
from onestill.teachers.load import EMBEDDED

REFERENCE_SEED = 10_000_000


@dataclass(frozen=True)
class Reference:
    """Images [N, C, H, W] (or latents) to compare with, what they are, and the prompts that they show, if known."""

    images: Tensor
    name: str
    prompts: Sequence[str] = ()


def teacher_reference(
    sampler: Sampler,
    extractor: FeatureExtractor,
    subjects: Subjects,
    config: EvaluateConfig,
    *,
    show_progress: bool = False,
) -> Reference:
    """Return the teacher's own many-step samples (or their latents), from seeds that no row uses."""
    num = config.num_samples
    first = REFERENCE_SEED if config.seed + num <= REFERENCE_SEED else config.seed + num
    rows = subjects.rows(sampler, num, seed=first)
    draw = Draw(sampler, range(first, first + num), rows, config.batch_size, show_progress)
    name = f"the teacher's own {sampler.num_steps}-step samples, seeds {first}.."
    return Reference(draw.seen_by(extractor), name, subjects.prompts)


def folder_reference(folder: Path, image_shape: Sequence[int]) -> Reference:
    """Return the images in a folder (searched recursively), all of which must have the teacher's size."""
    if not folder.is_dir():
        todo = "give 'teacher', an embedded teacher's name, or a folder of images"
        raise SettingError("reference", str(folder), "no such folder", todo)
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp"))
    if len(paths) < 2:
        why = f"holds {len(paths)} image{'s' if len(paths) != 1 else ''}; at least 2 are needed"
        raise SettingError("reference", str(folder), why)
    channels, height, width = image_shape
    images = []
    for path in paths:
        with Image.open(path) as picture:
            if picture.size != (width, height):
                why = f"{path} is {picture.width}x{picture.height}, the teacher makes {width}x{height}"
                raise SettingError("reference", str(folder), why, "resize it first")
            images.append(_pixels(picture, channels).reshape(height, width, channels).permute(2, 0, 1) / 127.5 - 1)
    return Reference(torch.stack(images), f"the images in {folder.name}/")


def _pixels(picture: Image.Image, channels: int) -> Tensor:
    """Return the values of a picture from 0 to 255, of grey or RGB."""
    if picture.mode.startswith("I"):  # 16 bits, which `convert` would clip at 255 of 65,535
        grey = torch.from_numpy(np.asarray(picture).astype(np.float32)) / 257
        return grey[..., None].expand(-1, -1, channels)
    return torch.tensor(bytearray(picture.convert("L" if channels == 1 else "RGB").tobytes()), dtype=torch.float32)


def embedded_reference(name: str) -> Reference:
    """Return the real images that an embedded teacher ships for evaluation."""
    teacher = EMBEDDED[name]
    images = load_file(teacher.folder / "images.safetensors")["images"]
    pictures = images.float() * (2 / teacher.white) - 1
    prompts = [] if teacher.heldout is None else teacher.heldout.read_text(encoding="utf-8").splitlines()
    return Reference(pictures, f"the {len(images):,} real {name} (only ever read by evaluate)", prompts)
