"""Playing with a generator: interpolation, one noise for many prompts, guidance sweeps, a student's trajectory.

Each function takes a source (`onestill.load_source`) and returns a `Sheet`: the images, and how to show them.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from onestill.core.errors import SettingError
from onestill.core.tensors import Cond, noise
from onestill.runs.checks import check_count, check_guidance, check_seeds
from onestill.sampling import pictures
from onestill.sampling.generate import Rows, generate_images, with_progress
from onestill.sampling.samplers import Source

MOST_IMAGES = 8
"""Images beside each other, where nobody says how many."""


@dataclass(frozen=True)
class Sheet:
    """Images in rows and columns, with their words.

    Attributes:
        images: [R, N, C, H, W] in [-1, 1].
        rows: A caption for each row, all different.
        columns: Words above each column.
        title: A line above.
        down: Whether what changes from frame to frame of an animation goes down the rows; else along the columns.
    """

    images: Tensor
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    title: str = ""
    down: bool = False

    @property
    def num_frames(self) -> int:
        """The frames of a .gif, there and back."""
        there = self.images.shape[0 if self.down else 1]
        return max(2 * there - 2, 1)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the images and return the path.

        Args:
            path: A .png (captioned rows), a .gif (there and back, in a loop), a .safetensors ("images", row by row:
                [R N, C, H, W]), or a folder (numbered PNGs, row by row).
            overwrite: Replace what is there.

        Raises:
            ValueError: If `path` is anything else, or something is there, or the samples are no pictures.
        """
        path = Path(path)
        pictures.check_output(path, overwrite=overwrite, moves=True)
        if path.suffix == ".png":
            rows = dict(zip(self.rows, self.images, strict=True))
            return pictures.save_rows(rows, path, title=self.title, columns=self.columns)
        if path.suffix == ".gif":
            return self._save_gif(path)
        return pictures.save_samples(self.images.flatten(0, 1), path, 0)

    def _save_gif(self, path: Path) -> Path:
        frames = self.images if self.down else self.images.transpose(0, 1)
        steps, beside = (self.rows, self.columns) if self.down else (self.columns, self.rows)
        words = [[": ".join(filter(None, (step, one))) for one in beside] for step in steps]
        return pictures.save_gif(frames, path, columns=words if all(steps) else ())


def samples(
    source: Source,
    num_images: int,
    *,
    seed: int = 0,
    class_labels: Sequence[int] = (),
    prompts: Sequence[str] = (),
    batch_size: int = 64,
    show_progress: bool = False,
) -> tuple[Tensor, tuple[str, ...]]:
    """Return plain samples, [N, C, H, W] in [-1, 1], and what each is asked for, in words.

    Args:
        source: What generates.
        num_images: N.
        seed: Seed of the first image; image i has seed + i.
        class_labels: Labels to go round.
        prompts: Prompts to go round.
        batch_size: Images per network call.
        show_progress: Show a bar on a terminal.

    Raises:
        ValueError: If `check_samples` refuses, or the source cannot be asked for this.
    """
    check_samples(num_images, seed, batch_size)
    cond = source.conditions(num_images, tuple(class_labels), prompts, seed=seed)
    seeds, shape = range(seed, seed + num_images), source.sample_shape
    images = generate_images(source.generate, seeds, shape, cond, batch_size=batch_size, show_progress=show_progress)
    return images, _words(cond)


def check_samples(num_images: int, seed: int, batch_size: int) -> None:
    """Raise ValueError if there are no such samples."""
    check_count("num_images", num_images)
    check_count("batch_size", batch_size)
    check_seeds(seed, num_images)


def slerp(start: Tensor, end: Tensor, u: Tensor, *, dim: int | None = None) -> Tensor:
    """Return the spherical interpolation between two tensors, [N, *shape].

    sin((1 - u) theta) / sin(theta) start + sin(u theta) / sin(theta) end, theta being the angle between them. Two
    standard normal noises are nearly orthogonal and of nearly one norm, which all that lies between keeps; linear
    interpolation would fall to 0.71 of it in the middle, which no network has seen. Where the two are parallel,
    opposite or zero there is no arc, and the interpolation is linear: (1 - u) start + u end.

    Args:
        start: Where u = 0, [*shape]; there the result is exactly this.
        end: Where u = 1, the same shape.
        u: Places on the way, [N].
        dim: Axis of the vectors that are turned, each by its own angle; all of `start` is one vector if None.
    """
    a, b = start.double(), end.double()
    axes = tuple(range(a.ndim)) if dim is None else (dim,)
    lengths = (a.square().sum(axes, keepdim=True) * b.square().sum(axes, keepdim=True)).sqrt()
    angle = ((a * b).sum(axes, keepdim=True) / lengths).clamp(-1, 1).arccos()
    sine = angle.sin()
    bent = sine > 1e-4  # not where an end is zero: its angle is NaN
    u = u.double().reshape(-1, *[1] * a.ndim)
    of_a, of_b = (torch.where(bent, (part * angle).sin() / sine, part) for part in (1 - u, u))
    return (of_a * a + of_b * b).to(start.dtype)


def between(start: Cond, end: Cond, u: Tensor) -> Cond:
    """Return the encoded conditions on the way from one prompt to another, N rows.

    Floats are interpolated by `slerp` along their last axis: each token's vector keeps its length. Masks are united on
    the way, so that the tokens of both prompts are seen, and other whole numbers are those of the nearer prompt. At
    u = 0 and u = 1 every row is exactly the prompt's.

    Args:
        start: Conditions of one prompt, one row each, [1, ...].
        end: Those of another.
        u: Places on the way, [N].
    """
    return {name: _between(name, start[name][0], end[name][0], u) for name in start}


def _between(name: str, a: Tensor, b: Tensor, u: Tensor) -> Tensor:
    mask = "mask" in name or a.dtype == torch.bool
    if a.is_floating_point() and not mask:
        return slerp(a, b, u, dim=-1)
    places = u.reshape(-1, *[1] * a.ndim)
    middle = torch.maximum(a, b) if mask else torch.where(places < 0.5, a, b)
    return torch.where(places == 0, a, torch.where(places == 1, b, middle))


def interpolate(
    source: Source,
    num_images: int,
    *,
    seed: int = 0,
    to_seed: int | None = None,
    class_labels: Sequence[int] = (),
    prompts: Sequence[str] = (),
    batch_size: int = 64,
    show_progress: bool = False,
) -> Sheet:
    """Return images on the way from one noise to another, or from one prompt to another; one row.

    Place i of N is u = i / (N - 1). Between two seeds the noise is `slerp`(noise(seed), noise(to_seed), u) and the
    condition stays; between two prompts the conditions are `between` them and the noise stays. Both ends are what
    `sample` gives.

    Args:
        source: What generates.
        num_images: N, both ends included.
        seed: Seed of the noise.
        to_seed: Seed of the noise at the other end.
        class_labels: The label, with `to_seed`; that of `seed` if empty.
        prompts: The prompt, with `to_seed`; or two, from one to the other.
        batch_size: Images per network call.
        show_progress: Show a bar on a terminal.

    Raises:
        ValueError: If `check_interpolation` refuses, or the source cannot be asked for this.
    """
    check_interpolation(num_images, seed, to_seed, class_labels, prompts)
    check_count("batch_size", batch_size)
    if source.base is not None:
        raise ValueError(
            f"--interpolate: {source.name} enlarges the pictures of {source.base.name}, which decides what is seen; "
            "interpolate with that one as --student"
        )
    u = torch.linspace(0, 1, num_images, dtype=torch.float64)
    from_noise, to_noise = noise([seed, seed if to_seed is None else to_seed], source.sample_shape)
    one = source.conditions(max(len(prompts), 1), tuple(class_labels), prompts, seed=seed)
    if to_seed is None:
        assert source.encode is not None  # `conditions` refused prompts otherwise
        start, end = ({n: v[i : i + 1] for n, v in source.encode(list(prompts)).items()} for i in range(2))
        cond: Rows = dict(between(start, end, u))
        captions, title = tuple(prompts), f"from one prompt to another, the same noise (seed {seed})"
    else:
        cond = {
            name: torch.cat([v] * num_images) if isinstance(v, Tensor) else v * num_images for name, v in one.items()
        }
        captions = (f"seed {seed}", f"seed {to_seed}")
        title = ": ".join(["from one noise to another", *_words(one)])
    eps = slerp(from_noise, to_noise, u)
    images = generate_images(
        source.generate, eps, source.sample_shape, cond, batch_size=batch_size, show_progress=show_progress
    )
    return Sheet(images[None], ("",), (captions[0], *[""] * (num_images - 2), captions[1]), _line(title))


def check_interpolation(
    num_images: int, seed: int, to_seed: int | None, class_labels: Sequence[int], prompts: Sequence[str]
) -> None:
    """Raise ValueError if an interpolation has no two ends, or more."""
    check_count("interpolate", num_images, 2)
    check_seeds(seed)
    if len(class_labels) > 1:
        raise ValueError(
            f"--interpolate between --class_labels {list(class_labels)}: there is nothing between two labels that the "
            "network knows. Give one label, and go from --seed to --to_seed"
        )
    if to_seed is None:
        if len(prompts) != 2:
            one = "one --prompt and " if len(prompts) else ""
            raise ValueError(
                f"--interpolate {num_images} needs two ends: two --prompt (got {len(prompts)}), or {one}--to_seed N"
            )
        return
    check_seeds(to_seed, flag="to_seed")
    if len(prompts) > 1:
        raise ValueError(
            f"--interpolate with --to_seed {to_seed} keeps the prompt: give one --prompt, not {len(prompts)}"
        )
    if to_seed == seed:
        raise ValueError(f"--to_seed {to_seed} is --seed: there is nothing between a noise and itself")


def fixed_noise(
    source: Source,
    *,
    seed: int = 0,
    class_labels: Sequence[int] = (),
    prompts: Sequence[str] = (),
    num_images: int | None = None,
    batch_size: int = 64,
    show_progress: bool = False,
) -> Sheet:
    """Return one image for each prompt or label, all from the same noise; one row.

    Args:
        source: What generates.
        seed: Seed of the noise.
        class_labels: The labels; all that the source knows if empty.
        prompts: The prompts.
        num_images: How many of them; all, but 16 at most, if None.
        batch_size: Images per network call.
        show_progress: Show a bar on a terminal.

    Raises:
        ValueError: If the source is unconditional, or there are fewer prompts or labels than images.
    """
    check_seeds(seed)
    check_count("batch_size", batch_size)
    source.conditions(1, tuple(class_labels), prompts)
    choices: Sequence[object] = prompts if source.text else tuple(class_labels) or source.labels
    if not choices:
        raise ValueError(f"--fixed_noise: {source.name} is unconditional, so one noise is one image")
    num = min(len(choices), 16) if num_images is None else num_images
    check_count("num_images", num)
    if num > len(choices):
        each = f"each of the {len(choices)}" if len(choices) != 1 else "the one"
        kind = ("prompt" if source.text else "label") + ("s" if len(choices) != 1 else "")
        raise ValueError(f"--num_images {num}: with --fixed_noise there is one image for {each} {kind}")
    cond = source.conditions(num, tuple(class_labels), prompts)
    if "seed" in cond:  # of the pictures that are enlarged
        cond["seed"] = [seed] * num
    images = generate_images(
        source.generate, [seed] * num, source.sample_shape, cond, batch_size=batch_size, show_progress=show_progress
    )
    return Sheet(images[None], ("",), _words(cond), f"the same noise in every image (seed {seed})")


def guidance_sweep(
    source: Source,
    guidance_scales: Sequence[float],
    *,
    num_images: int | None = None,
    seed: int = 0,
    class_labels: Sequence[int] = (),
    prompts: Sequence[str] = (),
    batch_size: int = 64,
    show_progress: bool = False,
) -> Sheet:
    """Return images at several guidance scales: one row for each, the same noise and condition in every column.

    Args:
        source: What generates: a teacher with a null condition, or a student that was distilled to take the scale.
        guidance_scales: w of each row, all different.
        num_images: Columns; one for each prompt, or 8, but 8 at most, if None.
        seed: Seed of the first column; column i has seed + i.
        class_labels: Labels to go round.
        prompts: Prompts to go round.
        batch_size: Images per network call.
        show_progress: Show a bar on a terminal.

    Raises:
        ValueError: If the source does not take these scales.
    """
    check_values("guidance_scales", guidance_scales)
    num = (min(len(prompts), MOST_IMAGES) or MOST_IMAGES) if num_images is None else num_images
    images, words = _at_each(
        source, "guidance_scales", guidance_scales, num, seed, class_labels, prompts, batch_size, show_progress
    )
    rows = tuple(f"w = {w:g}" for w in guidance_scales)
    columns = words or tuple(f"seed {i}" for i in range(seed, seed + num))
    return Sheet(images, rows, columns, "the same noise in every column", down=True)


def student_trajectory(
    source: Source,
    target_times: Sequence[float],
    *,
    num_images: int | None = None,
    seed: int = 0,
    class_labels: Sequence[int] = (),
    prompts: Sequence[str] = (),
    batch_size: int = 64,
    show_progress: bool = False,
) -> Sheet:
    """Return what a student predicts at several target times: one column for each, one noise in every row.

    Args:
        source: The student of a run; an exported one has its target time baked in.
        target_times: The times, all different; 0 is the finished image.
        num_images: Rows; one for each prompt, or one, but 8 at most, if None.
        seed: Seed of the first row; row i has seed + i.
        class_labels: Labels to go round.
        prompts: Prompts to go round.
        batch_size: Images per network call.
        show_progress: Show a bar on a terminal.

    Raises:
        ValueError: If the source is no student of a run, or was not trained for these times.
    """
    check_values("target_times", target_times)
    rows: tuple[str, ...]
    num = (min(len(prompts), MOST_IMAGES) or 1) if num_images is None else num_images
    images, words = _at_each(
        source, "target_times", target_times, num, seed, class_labels, prompts, batch_size, show_progress
    )
    title = "what the student predicts from one noise"
    if num == 1:
        rows, title = ("",), ": ".join([f"{title} (seed {seed})", *words])
    else:
        told = [textwrap.fill(text, 20, max_lines=3, placeholder=" ...") for text in words] or [""] * num
        rows = tuple(f"seed {seed + i}\n{text}".strip() for i, text in enumerate(told))
    columns = tuple(f"t = {t:g}" for t in target_times)
    return Sheet(images.transpose(0, 1), rows, columns, _line(title))


def _at_each(
    source: Source,
    flag: str,
    values: Sequence[float],
    num_images: int,
    seed: int,
    class_labels: Sequence[int],
    prompts: Sequence[str],
    batch_size: int,
    show_progress: bool,
) -> tuple[Tensor, tuple[str, ...]]:
    """Return (images [S, N, C, H, W] at the S values of a flag that takes a list, what each of the N is asked for)."""
    check_samples(num_images, seed, batch_size)
    cond = source.conditions(num_images, tuple(class_labels), prompts, seed=seed)
    sources = []
    with asked_by(flag, values):
        for value in values:  # each from the one before, which may have loaded the student already
            source = source.at(**{flag.removesuffix("s"): value})
            sources.append(source)
    seeds, shape = range(seed, seed + num_images), source.sample_shape
    images = [
        generate_images(one.generate, seeds, shape, cond, batch_size=batch_size, show_progress=show_progress)
        for one in with_progress(sources, show_progress, "value")
    ]
    return torch.stack(images), _words(cond)


@contextmanager
def asked_by(flag: str | None, values: Sequence[float] = ()) -> Iterator[None]:
    """Let who refuses one value of a list name the list's flag, such as guidance_scales: the one that was given.

    They are asked for one value at a time, and name the flag for one. Who says "--flag value: why" would take no other
    value either, and names them all. A flag that takes no list, or none, changes nothing.
    """
    if flag is None:
        yield
        return
    one = flag.removesuffix("s")
    try:
        yield
    except SettingError as error:
        if error.settings != (one,) or not values:
            raise
        raise error.about(flag, tuple(values)) from None
    except ValueError as error:
        given = ",".join(f"{value:g}" for value in values)
        words = re.sub(rf"^--{one} [^\s:]+:", f"--{one} {given}:", str(error)) if given else str(error)
        words = re.sub(rf"--{one}\b", f"--{flag}", words)
        if words == str(error):
            raise
        raise ValueError(words) from None


def check_values(flag: str, values: Sequence[float]) -> None:
    """Raise ValueError if the values of a flag that takes a list are none, or two of them look the same."""
    if not values or len({f"{value:g}" for value in values}) != len(values):
        raise ValueError(f"--{flag} must be different numbers, got {list(values)}")
    if flag == "guidance_scales":
        for value in values:
            check_guidance(value, flag)


def _words(cond: Rows) -> tuple[str, ...]:
    """Return what each image is asked for, in words; nothing where the source is unconditional."""
    labels = cond["class_labels"].tolist() if "class_labels" in cond else []
    return tuple(cond.get("prompt", ())) or tuple(f"label {label}" for label in labels)


def _line(text: str) -> str:
    return textwrap.shorten(text, 120, placeholder=" ...")
