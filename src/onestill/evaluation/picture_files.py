"""Pictures of others, read as they look: which files of a folder are pictures, and what their pixels mean."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from onestill.core.errors import SettingError, in_short

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")


def pictures_in(folder: Path) -> list[Path]:
    """Return the files of pictures in a folder and below it, but hidden ones, by name; SettingError if it has not two."""
    why = "" if folder.is_dir() else "is a file" if folder.is_file() else "no such folder"
    todo = (
        "give 'teacher', an embedded teacher's name, a folder of images, or an .npz of 'mu' and 'sigma'" if why else ""
    )
    if not why and not os.access(folder, os.R_OK | os.X_OK):
        why = "cannot be read: permission denied"
    named = (p for p in folder.rglob("*") if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    found = [] if why else sorted(path for path in named if path.suffix.lower() in SUFFIXES and path.is_file())
    if len(found) < 2:
        few = f"holds {len(found)} image{'s' if len(found) != 1 else ''}; at least 2 are needed"
        raise SettingError("reference", str(folder), why or few, todo)
    return found


def read_pictures(folder: Path, image_shape: Sequence[int]) -> Tensor:
    """Return all pictures in a folder, [N, C, H, W] in [-1, 1], of `image_shape` (C, H, W); SettingError if one is not."""
    made: list[Tensor] = []
    if len(image_shape) != 3 or image_shape[0] not in (1, 3):
        raise SettingError("reference", str(folder), f"holds no samples of shape {'x'.join(map(str, image_shape))}")
    for path in pictures_in(folder):
        try:
            made.append(_read(path, image_shape))
        except Exception as error:  # decoders raise whatever they meet
            why = str(error) if type(error) is ValueError else f"is no whole picture: {in_short(error)}"
            raise SettingError("reference", str(folder), f"{path} {why}") from None
    return torch.stack(made)


def _read(path: Path, image_shape: Sequence[int]) -> Tensor:
    """Return a picture, upright, [C, H, W] in [-1, 1]."""
    channels, height, width = image_shape
    with Image.open(path) as picture:
        if (num := getattr(picture, "n_frames", 1)) > 1 and picture.format != "MPO":  # others there are views of it
            raise ValueError(f"has {num} frames: give a file for each")
        bits = np.atleast_1d(getattr(picture, "tag_v2", {}).get(258, 16)).max()
        if picture.mode == "F" or (picture.mode == "I" and bits > 16):
            raise ValueError("holds numbers of 32 bits, which do not say what white is: save it in 8 or 16")
        found = ImageOps.exif_transpose(picture)
    if found.size != (width, height):
        raise ValueError(f"is {found.width}x{found.height}, the teacher makes {width}x{height}; resize it first")
    if found.mode.startswith("I"):  # 16 bits, which `convert` would clip at 255 of 65,535
        return torch.tensor(np.asarray(found).astype(np.float32) / 257).expand(channels, -1, -1) / 127.5 - 1
    if found.has_transparency_data and found.convert("RGBA").getchannel("A").getextrema()[0] != 255:
        raise ValueError("has transparent pixels, which look like what is behind them: put it on a background first")
    found = found if found.mode in ("1", "L", "RGB") else found.convert("RGB")
    values = np.asarray(found.convert("L" if channels == 1 else "RGB"), dtype=np.float32)
    return torch.tensor(values.reshape(height, width, channels)).permute(2, 0, 1) / 127.5 - 1
