"""The data of the embedded text-to-image teacher `glyphs`: 32x32 pictures of one letter or digit, with captions.

A picture is a combination of five values: character (A-Z, 1-9), color, background (never equal to the color),
style (regular, bold, italic) and family (sans, serif, mono), drawn with the DejaVu fonts that matplotlib ships:

    a bold red serif A on a yellow background

There is no zero: that of the sans family cannot be told from an O of the mono family. The glyph masks are rendered
once per face (anti-aliased, each with its own small shift and scale); colors are laid over them when a batch is
drawn. A seeded tenth of the 17,640 combinations is held out: never trained on, while each of their values is.

    python examples/teachers/glyphs_data.py --output_dir src/onestill/embedded/glyphs

writes `prompts.txt` (captions of 2,000 training combinations), `heldout.txt` (captions of 480 held-out ones) and
`images.safetensors`, the reference of the evaluation: `images` uint8 in 0..255 (floats in [-1, 1] are
`images / 127.5 - 1`), `caption`, the line of `heldout.txt` (from 0) that each picture shows, and `labels`, the five
indices. The masks of the reference are drawn with a seed of their own. Seconds on one core.
"""

import argparse
import json
import string
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import torch
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from torch import Tensor

SIZE = 32
SPLIT_SEED = 0
HELD_OUT_FRACTION = 0.1
REFERENCE_SEED = 2  # masks of seed 0 train, of seed 1 test the classifier

PALETTE = {
    "red": (225, 35, 45),
    "green": (35, 150, 65),
    "blue": (40, 75, 220),
    "yellow": (250, 220, 50),
    "cyan": (60, 205, 225),
    "purple": (150, 50, 185),
    "black": (15, 15, 15),
    "white": (250, 250, 250),
}
STYLES = ("regular", "bold", "italic")
FAMILIES = ("sans", "serif", "mono")
HEADS: dict[str, tuple[str, ...]] = {
    "character": tuple(string.ascii_uppercase + string.digits[1:]),
    "color": tuple(PALETTE),
    "background": tuple(PALETTE),
    "style": STYLES,
    "family": FAMILIES,
}
"""The five values of a picture, in the order of a row of labels."""

_FACES = {
    "sans": ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique"),
    "serif": ("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic"),
    "mono": ("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique"),
}
PROMPT_PATTERN = (
    r"an? (?P<style>\w+) (?P<color>\w+) (?P<family>\w+) (?P<character>\w) on an? (?P<background>\w+) background"
)
"""How `caption` writes the five values, one named group each: the classifier's file says so to whoever evaluates."""

_SUPERSAMPLING = 8
_EM_PIXELS = 25.0
_MAX_SHIFT_PIXELS = 2.0
_SCALES = (0.9, 1.1)


def caption(row: Tensor) -> str:
    """Return the caption of one row of labels [5]."""
    character, color, background, style, family = (
        names[int(index)] for names, index in zip(HEADS.values(), row, strict=True)
    )
    article = "an" if style.startswith("i") else "a"
    return f"{article} {style} {color} {family} {character} on a {background} background"


@cache
def split() -> tuple[Tensor, Tensor]:
    """Return the labels (of the training combinations [N, 5], of the held-out ones [M, 5]), in a seeded order."""
    sizes = [range(len(names)) for names in HEADS.values()]
    rows = torch.tensor([row for row in product(*sizes) if row[1] != row[2]])
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(SPLIT_SEED))]
    held_out = round(len(rows) * HELD_OUT_FRACTION)
    return rows[held_out:], rows[:held_out]


def render_masks(variants: int, seed: int) -> Tensor:
    """Return the glyphs as coverage [35, 3 styles, 3 families, variants, 32, 32], uint8, each shifted and scaled."""
    generator = np.random.default_rng(seed)
    faces = product(HEADS["character"], range(len(STYLES)), FAMILIES)
    masks = [
        _mask(character, _FACES[family][style], generator)
        for character, style, family in faces
        for _ in range(variants)
    ]
    return torch.from_numpy(np.stack(masks)).view(-1, len(STYLES), len(FAMILIES), variants, SIZE, SIZE)


def _mask(character: str, face: str, generator: np.random.Generator) -> np.ndarray:
    """Return one glyph [32, 32], uint8, its box centred, then shifted as far as it stays inside."""
    scale, *shift = generator.uniform([_SCALES[0], -1, -1], [_SCALES[1], 1, 1])
    font = _font(face, round(_EM_PIXELS * _SUPERSAMPLING * scale))
    canvas = SIZE * _SUPERSAMPLING
    box = np.array(font.getbbox(character)).reshape(2, 2)
    room = (canvas - (box[1] - box[0])) / 2
    allowed = np.clip(room - _SUPERSAMPLING, 0, _MAX_SHIFT_PIXELS * _SUPERSAMPLING)
    image = Image.new("L", (canvas, canvas))
    corner = np.round(room - box[0] + allowed * np.array(shift))
    ImageDraw.Draw(image).text((int(corner[0]), int(corner[1])), character, fill=255, font=font)
    return np.asarray(image.reduce(_SUPERSAMPLING))


@cache
def _font(face: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / f"{face}.ttf", size)


def compose(masks: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return pictures [N, 3, 32, 32] in [-1, 1] of labels [N, 5], each with one of its glyph's masks by chance."""
    character, color, background, style, family = labels.unbind(1)
    variant = torch.randint(masks.shape[3], (len(labels),), generator=generator)
    coverage = masks[character, style, family, variant][:, None] / 255
    palette = torch.tensor(list(PALETTE.values()))[:, :, None, None] / 127.5 - 1
    return torch.lerp(palette[background], palette[color], coverage)


def main() -> None:
    """Write the captions and the reference pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_prompts", type=int, default=2000)
    parser.add_argument("--num_heldout", type=int, default=480)
    parser.add_argument("--images_per_caption", type=int, default=1)
    args = parser.parse_args()

    args.output_dir.mkdir(parents=True, exist_ok=True)
    training, held_out = split()
    held_out = held_out[: args.num_heldout]
    for name, rows in {"prompts": training[: args.num_prompts], "heldout": held_out}.items():
        (args.output_dir / f"{name}.txt").write_text("".join(f"{caption(row)}\n" for row in rows))
    which = torch.arange(len(held_out)).repeat(args.images_per_caption)
    generator = torch.Generator().manual_seed(REFERENCE_SEED)
    images = compose(render_masks(16, REFERENCE_SEED), held_out[which], generator)
    pixels = ((images + 1) * 127.5).round().to(torch.uint8)
    about = {"kind": "onestill.Images", "max_value": 255, "source": "DejaVu fonts of matplotlib", "heads": HEADS}
    save_file(
        {"images": pixels, "labels": held_out[which].to(torch.uint8), "caption": which.to(torch.int16)},
        args.output_dir / "images.safetensors",
        {"onestill": json.dumps(about)},
    )
    print(f"{len(pixels)} reference pictures, {len(training)} + {len(split()[1])} combinations -> {args.output_dir}")


if __name__ == "__main__":
    main()
