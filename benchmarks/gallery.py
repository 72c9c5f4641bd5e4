"""The pictures of docs/gallery.md: both embedded teachers, and a student of the digits.

python benchmarks/digits.py --output_dir runs/digits --seed 0
python benchmarks/gallery.py --student runs/digits/seed-0 --output_dir docs/images/gallery --overwrite
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import onestill
from onestill.sampling import pictures
from onestill.sampling.samplers.base import Sampler

SIDE, GAP = 48, 3
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ123456789"
COLORS = ("red", "green", "blue", "yellow", "cyan", "purple", "black", "white")
FACES = ("regular sans", "bold serif", "italic serif", "bold mono", "italic sans")
PROMPTS = (
    "an italic green serif A on a black background",
    "a bold purple sans B on a yellow background",
    "a regular blue mono K on a cyan background",
    "an italic cyan serif Q on a purple background",
    "a bold cyan sans S on a red background",
    "a bold black mono 8 on a green background",
)
GUIDANCE = (0.0, 1.0, 2.0, 4.0, 8.0)
TIMES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)
SEED = 70  # a multiple of ten: the columns are the classes in order


def tiles(images: Tensor, side: int = SIDE) -> Image.Image:
    """Return images [R, N, C, H, W] in [-1, 1] beside and below each other, and nothing else."""
    rows, columns = images.shape[:2]
    sheet = Image.new("RGB", (columns * (side + GAP) - GAP, rows * (side + GAP) - GAP), (255, 255, 255))
    for i, picture in enumerate(pictures.to_pil(images.flatten(0, 1), side)):
        sheet.paste(picture, (i % columns * (side + GAP), i // columns * (side + GAP)))
    return sheet


def drawn(sampler: Sampler, num: int) -> Tensor:
    """Return `num` images, the classes in turn."""
    return sampler.images(range(SEED, SEED + num), sampler.conditions(num, seed=SEED))


def classes(student: Sampler, path: Path) -> None:
    """Every class, eight noises each, in one step."""
    images = drawn(student, 80)
    tiles(images.unflatten(0, (8, 10)), 56).save(path)


def walks(student: Sampler, path: Path) -> None:
    """From noise to noise, `slerp`ed: a class a row, every picture one evaluation."""
    rows = [
        onestill.interpolate(student, 13, seed=SEED + k, to_seed=SEED + 30 + k, class_labels=[k]) for k in range(10)
    ]
    tiles(torch.cat([row.images for row in rows]), 44).save(path)


def steps(student: Sampler, path: Path) -> None:
    """One step beside fifty, and 1, 2, 4 and 8 of both, from the same noise."""
    teacher = onestill.load_sampler(teacher="digits", device="cpu")
    rows = {f"teacher, {n} step{'s' * (n > 1)}": drawn(teacher.at(num_inference_steps=n), 10) for n in (50, 8, 4, 2, 1)}
    for n in (1, 2, 4, 8):
        rows[f"student, {n} step{'s' * (n > 1)}"] = drawn(student.at(num_inference_steps=n), 10)
    pictures.save_rows(rows, path, size=SIDE)


def times(student: Sampler, path: Path) -> None:
    """What the student predicts of one noise at eleven target times, from the start to the image."""
    sheet = onestill.student_trajectory(student, TIMES, seed=SEED, num_images=8)
    rows = {f"t = {t:g}": sheet.images[:, i] for i, t in enumerate(TIMES)}
    pictures.save_rows(rows, path, size=SIDE)


def guidance(glyphs: Sampler, path: Path) -> None:
    """The teacher at five guidance scales."""
    onestill.guidance_sweep(glyphs, GUIDANCE, prompts=PROMPTS, seed=0, batch_size=16).save(path)


def alphabet(glyphs: Sampler, path: Path) -> None:
    """Every character that the teacher knows, in changing faces and colours."""
    pairs = [pair for pair in product(COLORS, COLORS) if len({*pair}) == 2]
    words = [(CHARACTERS[i], FACES[i % len(FACES)], *pairs[11 * i % len(pairs)]) for i in range(len(CHARACTERS))]
    prompts = [sentence(*each) for each in words]
    images = glyphs.images(range(len(prompts)), glyphs.conditions(len(prompts), prompts=prompts), batch_size=16)
    tiles(images.unflatten(0, (5, 7)), 80).save(path)


def colors(glyphs: Sampler, path: Path) -> None:
    """One noise and one letter in every pair of colours; a pair of the same was in no training."""
    prompts = [sentence("R", "bold serif", *pair) for pair in product(COLORS, COLORS)]
    images = glyphs.images([0] * len(prompts), glyphs.conditions(len(prompts), prompts=prompts), batch_size=16)
    tiles(images.unflatten(0, (8, 8)), 64).save(path)


def sentence(character: str, face: str, color: str, background: str) -> str:
    """Return a prompt of glyphs: "a bold red serif A on a yellow background"."""
    style, family = face.split()
    return f"a{'n' * (style == 'italic')} {style} {color} {family} {character} on a {background} background"


STUDENT: dict[str, Callable[[Sampler, Path], None]] = {
    "digits-steps": steps,
    "digits-classes": classes,
    "digits-walks": walks,
    "digits-times": times,
}
GLYPHS: dict[str, Callable[[Sampler, Path], None]] = {
    "glyphs-alphabet": alphabet,
    "glyphs-colors": colors,
    "glyphs-guidance": guidance,
}


def shrink(path: Path) -> None:
    """Write a picture anew with at most 256 colours, which is a third of its size."""
    with Image.open(path) as picture:
        few = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--student", help="a run of benchmarks/digits.py; without one the teachers alone are drawn")
    parser.add_argument("--only", nargs="+", choices=[*STUDENT, *GLYPHS], help="some of the pictures")
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args()
    wanted = args.only or [*(STUDENT if args.student else ()), *GLYPHS]
    if not args.student and (left := [name for name in wanted if name in STUDENT]):
        parser.error(f"{', '.join(left)}: drawn by a student; give --student RUN")
    places = {name: args.output_dir / f"{name}.png" for name in wanted}
    if there := [str(place) for place in places.values() if place.exists() and not args.overwrite]:
        parser.error(f"{', '.join(there)}: there already; name another --output_dir, or give --overwrite")
    try:
        draw(places, args.student)
    except onestill.SettingError as error:
        parser.error(error.as_flags())


def draw(places: dict[str, Path], run: str | None) -> None:
    """Draw pictures by their names, those of the digits with the student of a run."""
    samplers: dict[str, Sampler] = {}
    if any(name in STUDENT for name in places):
        samplers["student"] = onestill.load_sampler(run, device="cpu")
    if any(name in GLYPHS for name in places):
        samplers["glyphs"] = onestill.load_sampler(
            teacher="glyphs", guidance_scale=3.0, num_inference_steps=20, solver="dpmsolver++", device="cpu"
        )
    for name, place in places.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        if name in STUDENT:
            STUDENT[name](samplers["student"], place)
        else:
            GLYPHS[name](samplers["glyphs"], place)
        shrink(place)
        print(f"{place}: {place.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
