"""A picture that says what it shows, whatever that is, and can be read again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from onestill.sampling.pictures import to_pil
from onestill.sampling.png import png_of, read_settings

HOSTILE = "</script> ${7*7} {{7*7}} \u2028 \u00fc \U0001f600 \n 'a' \"b\" " + "long " * 1000


@pytest.mark.parametrize("channels", [1, 3])
def test_settings_are_read_again_and_the_pixels_are_those_of_samples(channels: int, tmp_path: Path) -> None:
    image = torch.randn(channels, 5, 7, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    (path := tmp_path / "a.png").write_bytes(png_of(image, {"prompt": HOSTILE, "seed": 2**62, "target_time": 0.25}))
    assert read_settings(path) == {"prompt": HOSTILE, "seed": str(2**62), "target_time": "0.25"}
    with Image.open(path) as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(to_pil(image[None])[0]))


def test_other_pictures_hold_none(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    assert read_settings(tmp_path / "a.png") == {}


@pytest.mark.parametrize("content", [None, b"", b"\x89PNG\r\n\x1a\n", b"GIF89a" + bytes(50)])
def test_what_is_no_png_is_refused(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match="path=.*a.png.*: cannot be read as a PNG: "):
        read_settings(tmp_path / "a.png")
