"""Pictures inside a page: as many and as large as fit into what it may weigh."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onestill.core.writing import writing
from onestill.sampling.pictures import is_picture, to_pil

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

NUM_COLUMNS = 64
MOST_BYTES = 3_500_000
"""Of all pictures of a page, as text: with plots and tables it stays below 5 MB."""
SIDES = (512, 384, 256, 192, 128, 96)
"""Longest sides that are tried, in pixels."""
SMALL = 96
"""Up to this side pictures are kept to the pixel."""


@dataclass(frozen=True)
class Gallery:
    """Rows of pictures that share their columns: in one column the noise is the same, and what is to be drawn.

    Attributes:
        rows: By name, pictures as `data:` addresses.
        captions: What each column shows, "" if nothing is to be said.
        first: The seed of the first column; the others follow.
        is_student: The names of rows that are students.
        is_small: Whether a picture's pixels are to be seen as they are.
    """

    rows: Mapping[str, Sequence[str]]
    captions: Sequence[str]
    first: int = 0
    is_student: Sequence[str] = ()
    is_small: bool = False

    @property
    def num_columns(self) -> int:
        """How many columns there are."""
        return len(self.captions)


def gallery_of(
    rows: Mapping[str, Tensor], captions: Sequence[str], *, students: Sequence[str] = (), first: int = 0
) -> Gallery | None:
    """Return pictures [N, C, H, W] in [-1, 1] as a gallery of at most 64 columns; None of what is no picture."""
    if not rows or not all(is_picture(images.shape[1:]) for images in rows.values()):
        return None
    num = min(NUM_COLUMNS, *(len(images) for images in rows.values()))
    drawn = {name: to_pil(images[:num].cpu()) for name, images in rows.items()}
    longest = max(max(picture.size) for made in drawn.values() for picture in made)
    captions = [captions[i % len(captions)] if captions else "" for i in range(num)]
    is_small = longest <= SMALL
    for side in (min(longest, SIDES[0]), *(side for side in SIDES[1:] if side < longest)):
        # One column tells what all take.
        weight = max(sum(len(_encoded(made[i], side, is_small)) for made in drawn.values()) for i in {0, num // 2})
        if 1.1 * weight * num <= MOST_BYTES:
            break
    num = max(1, min(num, int(MOST_BYTES / (1.1 * weight))))
    encoded = {name: [_encoded(picture, side, is_small) for picture in made[:num]] for name, made in drawn.items()}
    return Gallery(encoded, captions[:num], first, students, is_small)


def _encoded(picture: Image.Image, side: int, is_small: bool) -> str:
    """Return a picture as a `data:` address, no longer than `side`: PNG where it is small, else WebP."""
    if max(picture.size) > side:
        picture = picture.copy()
        picture.thumbnail((side, side))
    data, form = io.BytesIO(), "png" if is_small else "webp"
    with writing("a picture in memory"):
        picture.save(data, form, **({"optimize": True} if form == "png" else {"quality": 88}))
    return f"data:image/{form};base64,{base64.b64encode(data.getvalue()).decode()}"
