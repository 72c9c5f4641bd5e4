"""Samples as pictures: captioned rows of images, or scatter plots for points."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from onestill.core.errors import SettingError, named
from onestill.core.files import save_tensors
from onestill.core.writing import written, written_into

_INK, _PAPER, _GAP, _GUTTER = (40, 40, 40), (255, 255, 255), 4, 8
# Words above a column: the least width, the most lines, the height of one.
WORDS_WIDTH, _WORDS_LINES, _LINE_HEIGHT = 112, 3, 14


def to_pil(images: Tensor, width: int | None = None) -> list[Image.Image]:
    """Return images [N, 1 or 3, H, W] in [-1, 1] as pictures; enlarged smoothly to `width` pixels if that is given."""
    if not is_picture(images.shape[1:]):
        raise ValueError(_no_pictures(images))
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p).convert("RGB") for p in pixels]
    if width is None:
        return pictures
    height = round(width * images.shape[-2] / images.shape[-1])
    return [p.resize((width, height), Image.Resampling.BICUBIC) for p in pictures]


def is_picture(shape: Sequence[int]) -> bool:
    """Return whether a sample of this shape can be drawn as an image."""
    return len(shape) == 3 and shape[0] in (1, 3)


def can_be_shown(shape: Sequence[int]) -> bool:
    """Return whether `save_rows` shows samples of this shape: images, or points."""
    return is_picture(shape) or len(shape) == 1


def _no_pictures(samples: Tensor) -> str:
    return f"samples of shape {list(samples.shape[1:])} are no pictures; a .safetensors can hold them"


def save_rows(
    rows: Mapping[str, Tensor], path: Path, *, title: str = "", size: int = 56, columns: Sequence[str] = ()
) -> Path:
    """Write one PNG with a captioned row of samples per entry, and return `path`; the columns share their noise.

    Args:
        rows: Caption to samples [N, C, H, W] in [-1, 1]; points [N, D] become scatter plots.
        path: The PNG.
        title: A line above.
        size: Least width of one image in the picture, in pixels.
        columns: Words above the columns, such as prompts; gone round if there are fewer than columns.

    Raises:
        ValueError: If the samples are neither images (1 or 3 channels) nor points.
    """
    first = next(iter(rows.values()))
    if not can_be_shown(first.shape[1:]):
        raise ValueError(_no_pictures(first))
    with written(path) as partial:
        if is_picture(first.shape[1:]):
            _sheet(rows, title, size, columns).save(partial)
        else:
            _scatter(rows, title).savefig(partial, dpi=110)
    return path


def _sheet(rows: Mapping[str, Tensor], title: str, size: int, columns: Sequence[str]) -> Image.Image:
    """Return captioned rows as one picture, with words above the columns."""
    first = next(iter(rows.values()))
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    side = max(size, WORDS_WIDTH if columns else 0, first.shape[-1])
    margin = 12 + max(int(small.getlength(line)) for caption in rows for line in caption.split("\n"))
    num = max(len(images) for images in rows.values())
    words = [_wrapped(columns[j % len(columns)], side - _GAP) for j in range(num if columns else 0)]
    painted = [(to_pil(images, side), words if i == 0 else []) for i, images in enumerate(rows.values())]
    start = (margin, 30 if title else _GAP)
    end = (max(8 + _GAP, int(font.getlength(title)) + 16 - margin - num * (side + _GAP) + _GAP), 2 * _GAP)
    sheet, places = _paint(painted, _GAP, start, end)
    draw = ImageDraw.Draw(sheet)
    draw.text((8, 7), title, fill=_INK, font=font)
    for caption, y in zip(rows, places, strict=True):
        draw.text((8, y + painted[0][0][0].height / 2), caption, fill=_INK, font=small, anchor="lm")
    return sheet


def _paint(
    rows: Sequence[tuple[Sequence[Image.Image], Sequence[str]]], gap: int, start: tuple[int, int], end: tuple[int, int]
) -> tuple[Image.Image, list[int]]:
    """Return a sheet of rows of pictures of one size under their words, and where each row begins.

    There are `gap` pixels between the pictures, `start` left of and above them, `end` right of and below them.
    """
    width, height = rows[0][0][0].size
    lines = [max((text.count("\n") + 1 for text in words), default=0) for _, words in rows]
    above = [num * _LINE_HEIGHT + (3 if num else 0) for num in lines]
    places = [start[1] + sum(above[: i + 1]) + i * (height + gap) for i in range(len(rows))]
    num = max(len(pictures) for pictures, _ in rows)
    size = (start[0] + num * (width + gap) - gap + end[0], places[-1] + height + end[1])
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    for (pictures, words), y, space in zip(rows, places, above, strict=True):
        for j, picture in enumerate(pictures):
            x = start[0] + j * (width + gap)
            if words:
                draw.text((x, y - space), words[j], fill=_INK, font=_words_font(), spacing=1)
            sheet.paste(picture, (x, y))
    return sheet, places


def _words_font() -> Any:
    return ImageFont.load_default(12)  # smaller ones lose the spaces between words


def _wrapped(text: str, width: int) -> str:
    """Return text as a few lines of at most `width` pixels; what does not fit is left out, which dots say."""
    font, lines = _words_font(), [""]
    # Long words are cut, and no more is measured than can fit.
    for word in text[:400].split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width:
            lines[-1] = longer
        elif len(lines) == _WORDS_LINES:
            lines[-1] += " ..."
            break
        else:
            lines.append(word)
    for i, line in enumerate(lines):
        while font.getlength(line) > width:
            line = f"{line.removesuffix('...')[:-1].rstrip()}..."
        lines[i] = line
    return "\n".join(lines)


def read_pixels(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return a written picture as [H, W, 3] bytes, which is what trackers take."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def save_grid(images: Tensor, path: Path, *, words: Sequence[str] = (), size: int = WORDS_WIDTH) -> Path:
    """Write images as one near-square PNG grid, or one image as it is, and return `path`.

    Args:
        images: [N, C, H, W] in [-1, 1].
        path: The PNG.
        words: What each image is of, such as its prompt; written above the images where they differ, and above the
            columns alone where each column keeps to one.
        size: Least width of one image in the grid, in pixels; smaller ones are enlarged a whole number of times.

    Raises:
        ValueError: If the samples are no images (1 or 3 channels).
    """
    drawn = to_pil(images)
    sheet = drawn[0] if len(drawn) == 1 else _grid(images, drawn[0].width, words, size)
    with written(path) as partial:
        sheet.save(partial)
    return path


def _grid(images: Tensor, width: int, words: Sequence[str], size: int) -> Image.Image:
    """Return several images, `width` pixels wide, as one near-square picture."""
    width = math.ceil(size / width) * width
    drawn, columns = to_pil(images, width), _num_columns(len(images), words)
    wrapped = [_wrapped(text, width) for text in words] if len(set(words)) > 1 else []
    rows = [(drawn[i : i + columns], wrapped[i : i + columns]) for i in range(0, len(drawn), columns)]
    first = rows[0][1]
    rows = [(row, texts if i == 0 or texts != first[: len(texts)] else []) for i, (row, texts) in enumerate(rows)]
    return _paint(rows, _GUTTER, (_GUTTER, _GUTTER), (_GUTTER, _GUTTER))[0]


def _num_columns(num: int, words: Sequence[str]) -> int:
    """Return how many columns make a grid near-square; where a few words go round, so many that each column keeps its own."""
    columns, period = math.ceil(num**0.5), len(set(words))
    goes_round = 1 < period < num and all(text == words[i % period] for i, text in enumerate(words))
    return period * max(1, round(columns / period)) if goes_round and period <= 2 * columns else columns


def save_gif(frames: Tensor, path: Path, *, columns: Sequence[Sequence[str]] = (), size: int = 128) -> Path:
    """Write an animation that runs to its end and back, for ever, and return `path`.

    Args:
        frames: Pictures [F, K, C, H, W] in [-1, 1]: F frames of K pictures beside each other.
        path: The GIF.
        columns: For each frame, words above its pictures.
        size: Least width of one picture, in pixels.
    """
    from diffusers.utils import export_to_gif, make_image_grid

    size = max(size, frames.shape[-1])
    if columns:
        drawn = [_sheet({"": frame}, "", size, words) for frame, words in zip(frames, columns, strict=True)]
        tallest = max(frame.height for frame in drawn)  # some words are longer than others
        drawn = [ImageOps.expand(frame, (0, tallest - frame.height, 0, 0), _PAPER) for frame in drawn]
    else:
        drawn = [make_image_grid(to_pil(frame, size), rows=1, cols=len(frame)) for frame in frames]
    # There in about two seconds, but no frame so short that it flickers or so long that nothing moves.
    fps = min(max(round(len(drawn) / 2), 1), 20)
    with written(path) as partial:
        export_to_gif([*drawn, *drawn[-2:0:-1]], str(partial), fps=fps)
    return path


def _scatter(rows: Mapping[str, Tensor], title: str) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(rows), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (caption, points) in enumerate(rows.items()):
        axes = figure.add_subplot(1, len(rows), i + 1)
        flat = points.flatten(1).float()
        axes.scatter(flat[:, 0].numpy(), flat[:, min(1, flat.shape[1] - 1)].numpy(), s=4, alpha=0.5)
        axes.set_title(caption, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def check_output(path: Path, *, overwrite: bool, moves: bool = False) -> None:
    """Raise SettingError if samples cannot be written to `path`, or would overwrite something; what `moves` may be a .gif."""
    if path.suffix not in (".png", ".safetensors", "", *([".gif"] if moves else [])):
        known = f"give a .png, {'a .gif, ' if moves else ''}a .safetensors, or a folder"
        if path.suffix == ".gif":
            known = f"a .gif needs frames, such as those of {named('interpolate')} 9; else {known}"
        raise SettingError("output", path, known)
    if path.suffix and path.is_dir():
        raise SettingError("output", path, "is a folder")
    if not path.suffix and path.is_file():
        raise SettingError("output", path, "a file exists under the name of the folder", "name another")
    taken = path.exists() if path.suffix else path.is_file() or (path.is_dir() and any(path.iterdir()))
    if taken and not overwrite:
        raise SettingError("output", path, "exists", f"name another, or give {named('overwrite')}")


def save_samples(images: Tensor, path: Path, seed: int, words: Sequence[str] = ()) -> Path:
    """Write samples as a grid (.png), as they are (.safetensors), or one PNG for each seed (a folder).

    A folder loses the PNGs of seeds that it holds already, and nothing else. A grid has `words` above its images.
    """
    if path.suffix == ".safetensors":
        with written(path) as partial:
            save_tensors({"images": images.contiguous()}, partial)
        return path
    if path.suffix == ".png":
        return save_grid(images, path, words=words)
    drawn = to_pil(images)
    with written_into(path) as partial:
        names = [f"{seed + i:06d}.png" for i in range(len(drawn))]
        for name, picture in zip(names, drawn, strict=True):
            picture.save(partial / name)
    for old in path.glob("*.png"):
        if re.fullmatch(r"\d{6}|[1-9]\d{6,}", old.stem, re.ASCII) and old.name not in names and old.is_file():
            old.unlink()
    return path
