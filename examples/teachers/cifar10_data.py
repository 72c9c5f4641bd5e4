"""CIFAR-10 as tensors: an archive of class/NNNN.jpg, decoded once and kept beside the output.

The archives are `cifar10-train.tar.xz` and `cifar10-test.tar.xz` in a folder that is always named on the
command line. Only teachers and their judges are trained on them; distillation never reads them.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

NUM_CLASSES = 10
SIZE = 32


@dataclass(frozen=True)
class LabelledImages:
    """Images and their classes.

    Attributes:
        pixels: [N, 3, 32, 32], uint8.
        labels: [N], int64, each an index into `classes`.
        classes: Names of the classes, in alphabetical order, which is CIFAR-10's own.
    """

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def to(self, device: torch.device | str) -> LabelledImages:
        """Return the same images on a device."""
        return LabelledImages(self.pixels.to(device), self.labels.to(device), self.classes)


def load_images(data_dir: Path, split: str, cache: Path) -> LabelledImages:
    """Return the images of `cifar10-{split}.tar.xz`, from `cache` if it was written from the same archive.

    Args:
        data_dir: Folder of the archives.
        split: "train" or "test".
        cache: The .safetensors file to read, or to write.

    Raises:
        ValueError: If there is no archive, or it does not hold ten classes of 32x32 images.
    """
    archive = data_dir / f"cifar10-{split}.tar.xz"
    if not archive.is_file():
        raise ValueError(f"--data_dir {data_dir} holds no {archive.name}: an archive of class/NNNN.jpg")
    source: dict[str, str | int] = {"archive": archive.name, "num_bytes": archive.stat().st_size}
    images = read_cache(cache, source)
    if images is None:
        images = decode(archive)
        write_cache(images, cache, source)
    return images


def to_floats(pixels: Tensor) -> Tensor:
    """Return uint8 pixels as floats in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def decode(archive: Path) -> LabelledImages:
    """Return the images of an archive in the order of their names, whatever the archive's own order.

    Raises:
        ValueError: If the archive does not hold ten classes of 32x32 images.
    """
    found: list[tuple[str, str, np.ndarray]] = []
    try:
        with tarfile.open(archive, "r|xz") as members:
            for member in members:
                folder, _, name = member.name.rpartition("/")
                content = members.extractfile(member)
                if content is None or not name.endswith(".jpg"):
                    continue
                with Image.open(io.BytesIO(content.read())) as picture:
                    image = np.asarray(picture.convert("RGB"))
                if image.shape[:2] != (SIZE, SIZE):
                    raise ValueError(f"{member.name} is not {SIZE}x{SIZE} pixels, but {image.shape[:2]}")
                found.append((folder.rpartition("/")[2], name, image))
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise ValueError(f"--data_dir: {archive} does not decode: {error}") from error
    found.sort(key=lambda entry: entry[:2])
    classes = tuple(sorted({name for name, _, _ in found}))
    if len(classes) != NUM_CLASSES:
        raise ValueError(f"--data_dir: {archive} holds {len(classes)} classes, not {NUM_CLASSES}")
    pixels = torch.from_numpy(np.stack([image for _, _, image in found])).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor([classes.index(name) for name, _, _ in found])
    return LabelledImages(pixels, labels, classes)


def read_cache(cache: Path, source: dict[str, str | int]) -> LabelledImages | None:
    """Return the images in `cache`, or None if it is missing, unreadable or of another archive."""
    try:
        with safe_open(cache, framework="pt") as file:
            about = json.loads((file.metadata() or {})["onestill"])
            if about["source"] != source:
                return None
            pixels, labels = file.get_tensor("images"), file.get_tensor("labels")
            return LabelledImages(pixels, labels, tuple(about["classes"]))
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def write_cache(images: LabelledImages, cache: Path, source: dict[str, str | int]) -> None:
    """Write the images so that a file of that name is always complete."""
    about = {"kind": "onestill.Images", "max_value": 255, "classes": images.classes, "source": source}
    cache.parent.mkdir(parents=True, exist_ok=True)
    partial = cache.with_name(f"{cache.name}.partial")
    save_file({"images": images.pixels, "labels": images.labels}, partial, {"onestill": json.dumps(about)})
    os.replace(partial, cache)
