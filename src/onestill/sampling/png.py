"""A picture that says what it shows: a PNG with the settings that it was drawn by as its text, which can be read again."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, PngImagePlugin
from torch import Tensor

from onestill.core.arguments import checked
from onestill.core.errors import SettingError, in_short
from onestill.core.writing import writing
from onestill.sampling.pictures import to_pil

FASTEST = 1
"""The level of compression: another makes a picture a tenth smaller, and takes longer than a student to draw it."""


def png_of(image: Tensor, settings: Mapping[str, object]) -> bytes:
    """Return an image [1 or 3, H, W] in [-1, 1] as a PNG that holds settings, a text each under its name."""
    text, data = PngImagePlugin.PngInfo(), io.BytesIO()
    for name, value in settings.items():
        text.add_itxt(name, str(value))
    with writing("a picture in memory"):
        to_pil(image[None])[0].save(data, "png", pnginfo=text, compress_level=FASTEST)
    return data.getvalue()


@checked()
def read_settings(path: str | Path) -> dict[str, str]:
    """Return the settings inside a PNG that `png_of` made, by name; {} of one that holds none.

    Raises:
        SettingError: If the file cannot be read as a PNG.
    """
    try:
        with Image.open(path, formats=("png",)) as picture:
            picture.load()  # what comes behind the pixels too
            found = dict(getattr(picture, "text", {}))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SettingError("path", str(path), f"cannot be read as a PNG: {in_short(error)}") from error
    return {name: str(value) for name, value in found.items()}
