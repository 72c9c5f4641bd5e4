"""Exploring a sampler: plain samples, interpolation, one noise for many prompts, guidance sweeps, trajectories.

Each function takes a sampler (`onestill.load_sampler`), whether to show a bar on a terminal, and fields of
`DrawSettings`: `num_images`, `seed`, `class_labels`, `prompts` and `batch_size`. It returns the images and how to show
them, and raises `SettingError` if a setting is unusable or the sampler cannot draw this.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from onestill.core.arguments import Limits, checked
from onestill.core.errors import SettingError, named
from onestill.core.settings import make
from onestill.core.tensors import Cond, noise
from onestill.sampling import pictures
from onestill.sampling.config import LONGEST_WAY, DrawSettings, check_interpolation, check_values
from onestill.sampling.generate import Rows, with_progress
from onestill.sampling.samplers.base import Sampler

NUM_SAMPLES, MOST_IMAGES = 16, 8
"""Plain samples, and images beside each other, where nobody says how many."""


@dataclass(frozen=True)
class Samples:
    """Plain samples, [N, C, H, W] in [-1, 1], and what each shows, if anything; image i has seed + i."""

    images: Tensor
    words: tuple[str, ...]
    seed: int

    @checked()
    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write them and return the path: a .png (a grid), a .safetensors, or a folder (one PNG for each seed)."""
        path = Path(path)
        pictures.check_output(path, overwrite=overwrite)
        return pictures.save_samples(self.images, path, self.seed, self.words)


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
        return max(2 * self.images.shape[0 if self.down else 1] - 2, 1)

    @checked()
    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the images and return the path.

        It is a .png (captioned rows), a .gif (there and back, in a loop), a .safetensors ("images", row by row:
        [R N, C, H, W]), or a folder (numbered PNGs, row by row).

        Raises:
            ValueError: If `path` is anything else, or something is there, or the samples are no pictures.
        """
        path = Path(path)
        pictures.check_output(path, overwrite=overwrite, moves=True)
        if path.suffix == ".png":
            rows = dict(zip(self.rows, self.images, strict=True))
            return pictures.save_rows(rows, path, title=self.title, columns=self.columns)
        if path.suffix == ".gif":
            frames = self.images if self.down else self.images.transpose(0, 1)
            steps, others = (self.rows, self.columns) if self.down else (self.columns, self.rows)
            words = [[": ".join(filter(None, (step, one))) for one in others] for step in steps]
            return pictures.save_gif(frames, path, columns=words if all(steps) else ())
        return pictures.save_samples(self.images.flatten(0, 1), path, 0)


@checked(DrawSettings)
def samples(sampler: Sampler, *, show_progress: bool = False, **settings: Any) -> Samples:
    """Return plain samples, by fields of `DrawSettings`; 16 images, and all labels in turn, if not given."""
    drawn = make(DrawSettings, settings)
    num = drawn.num_images or NUM_SAMPLES
    rows = sampler.conditions(num, drawn.class_labels, drawn.prompts, seed=drawn.seed)
    seeds = range(drawn.seed, drawn.seed + num)
    images = sampler.images(seeds, rows, batch_size=drawn.batch_size, show_progress=show_progress)
    return Samples(images, _words(rows), drawn.seed)


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


@checked(DrawSettings)
def interpolate(
    sampler: Sampler,
    num_images: Annotated[int, Limits(least=2, most=LONGEST_WAY)],
    *,
    to_seed: int | None = None,
    show_progress: bool = False,
    **settings: Any,
) -> Sheet:
    """Return images on the way from one noise to another, or from one prompt to another; one row.

    Place i of N is u = i / (N - 1). Between two seeds the noise is `slerp`(noise(seed), noise(to_seed), u) and the
    condition stays; between two prompts the conditions are `between` them and the noise stays. Both ends are what
    `sample` gives.

    Args:
        sampler: What generates.
        num_images: N, both ends included.
        to_seed: Seed of the noise at the other end.
        show_progress: Show a bar on a terminal.
        **settings: Fields of `DrawSettings`: the prompt, with `to_seed`, or two, from one to the other; the label of `seed` if
            none is given.
    """
    drawn = make(DrawSettings, settings)
    check_interpolation(num_images, drawn, to_seed, drawn.prompts)
    if sampler.first_stage is not None:
        why = f"{sampler.name} enlarges the pictures of {sampler.first_stage.name}, which decides what is seen"
        raise SettingError("interpolate", num_images, why, f"interpolate with that one as {named('student')}")
    u = torch.linspace(0, 1, num_images, dtype=torch.float64)
    ends = [drawn.seed, drawn.seed if to_seed is None else to_seed]
    from_noise, to_noise = noise(ends, sampler.sample_shape)
    one = sampler.conditions(max(len(drawn.prompts), 1), drawn.class_labels, drawn.prompts, seed=drawn.seed)
    if to_seed is None:
        start, end = ({n: v[i : i + 1] for n, v in sampler.encode(drawn.prompts).items()} for i in range(2))
        rows: Rows = dict(between(start, end, u))
        captions, title = drawn.prompts, f"from one prompt to another, the same noise (seed {drawn.seed})"
    else:
        rows = {n: torch.cat([v] * num_images) if isinstance(v, Tensor) else v * num_images for n, v in one.items()}
        captions = (f"seed {drawn.seed}", f"seed {to_seed}")
        title = ": ".join(["from one noise to another", *_words(one)])
    eps = slerp(from_noise, to_noise, u)
    images = sampler.images(eps, rows, batch_size=drawn.batch_size, show_progress=show_progress)
    return Sheet(images[None], ("",), (captions[0], *[""] * (num_images - 2), captions[1]), _line(title))


@checked(DrawSettings)
def fixed_noise(sampler: Sampler, *, show_progress: bool = False, **settings: Any) -> Sheet:
    """Return one image for each prompt or label, all from the same noise; one row.

    Args:
        sampler: What generates.
        show_progress: Show a bar on a terminal.
        **settings: Fields of `DrawSettings`: all labels if none are given, and all of them or of the prompts, but 16
            at most, if no number is.
    """
    drawn = make(DrawSettings, settings)
    sampler.conditions(1, drawn.class_labels, drawn.prompts)
    choices: Sequence[object] = drawn.prompts if sampler.takes_text else drawn.class_labels or sampler.labels
    if not choices:
        raise SettingError("fixed_noise", why=f"{sampler.name} is unconditional, so one noise is one image")
    num = drawn.num_images or min(len(choices), NUM_SAMPLES)
    if num > len(choices):
        each = f"each of the {len(choices)}" if len(choices) != 1 else "the one"
        kind = ("prompt" if sampler.takes_text else "label") + ("s" if len(choices) != 1 else "")
        raise SettingError("num_images", num, f"with {named('fixed_noise')} there is one image for {each} {kind}")
    rows = sampler.conditions(num, drawn.class_labels, drawn.prompts)
    if "seed" in rows:  # of the pictures that are enlarged
        rows["seed"] = [drawn.seed] * num
    images = sampler.images([drawn.seed] * num, rows, batch_size=drawn.batch_size, show_progress=show_progress)
    return Sheet(images[None], ("",), _words(rows), f"the same noise in every image (seed {drawn.seed})")


@checked(DrawSettings)
def guidance_sweep(
    sampler: Sampler, guidance_scales: Sequence[float], *, show_progress: bool = False, **settings: Any
) -> Sheet:
    """Return images at several guidance scales: one row for each, the same noise and condition in every column.

    Args:
        sampler: What generates: a teacher with a null condition, or a student that was distilled to take the scale.
        guidance_scales: w of each row, all different.
        show_progress: Show a bar on a terminal.
        **settings: Fields of `DrawSettings`: one column for each prompt, or 8, but 8 at most, if no number is given.
    """
    drawn = make(DrawSettings, settings)
    num = drawn.num_images or min(len(drawn.prompts), MOST_IMAGES) or MOST_IMAGES
    images, words = _at_each(sampler, "guidance_scales", guidance_scales, num, drawn, show_progress)
    rows = tuple(f"w = {w:g}" for w in guidance_scales)
    columns = words or tuple(f"seed {i}" for i in range(drawn.seed, drawn.seed + num))
    return Sheet(images, rows, columns, "the same noise in every column", down=True)


@checked(DrawSettings)
def student_trajectory(
    sampler: Sampler, target_times: Sequence[float], *, show_progress: bool = False, **settings: Any
) -> Sheet:
    """Return what a student predicts at several target times: one column for each, one noise in every row.

    Args:
        sampler: The student of a run; an exported one has its target time baked in.
        target_times: The times, all different; 0 is the finished image.
        show_progress: Show a bar on a terminal.
        **settings: Fields of `DrawSettings`: one row for each prompt, or one, but 8 at most, if no number is given.
    """
    drawn = make(DrawSettings, settings)
    num = drawn.num_images or min(len(drawn.prompts), MOST_IMAGES) or 1
    images, words = _at_each(sampler, "target_times", target_times, num, drawn, show_progress)
    title = "what the student predicts from one noise"
    rows: tuple[str, ...] = ("",)
    if num == 1:
        title = ": ".join([f"{title} (seed {drawn.seed})", *words])
    else:
        filled = [textwrap.fill(text, 20, max_lines=3, placeholder=" ...") for text in words] or [""] * num
        rows = tuple(f"seed {drawn.seed + i}\n{text}".strip() for i, text in enumerate(filled))
    columns = tuple(f"t = {t:g}" for t in target_times)
    return Sheet(images.transpose(0, 1), rows, columns, _line(title))


def _at_each(
    sampler: Sampler, setting: str, values: Sequence[float], num_images: int, drawn: DrawSettings, show_progress: bool
) -> tuple[Tensor, tuple[str, ...]]:
    """Return (images [S, N, C, H, W] at the S values of a setting that takes a list, what each of the N shows)."""
    check_values(setting, values)
    rows = sampler.conditions(num_images, drawn.class_labels, drawn.prompts, seed=drawn.seed)
    samplers, one = [], setting.removesuffix("s")
    try:
        for value in values:  # each from the one before, which may have loaded the student already
            given: dict[str, Any] = {one: value}
            sampler = sampler.at(**given)
            samplers.append(sampler)
    except SettingError as error:
        raise (error.about(setting, tuple(values)) if error.settings == (one,) else error) from None
    seeds = range(drawn.seed, drawn.seed + num_images)
    images = [
        found.images(seeds, rows, batch_size=drawn.batch_size, show_progress=show_progress)
        for found in with_progress(samplers, show_progress, "value")
    ]
    return torch.stack(images), _words(rows)


def _words(rows: Rows) -> tuple[str, ...]:
    """Return what each image shows, in words; nothing where the sampler is unconditional."""
    labels = rows["class_labels"].tolist() if "class_labels" in rows else []
    return tuple(rows.get("prompt", ())) or tuple(f"label {label}" for label in labels)


def _line(text: str) -> str:
    return textwrap.shorten(text, 120, placeholder=" ...")
