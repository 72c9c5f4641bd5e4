"""Chains of students: one draws a small picture in one step, the next enlarges it in one step, and no data is needed.

A super-resolution teacher predicts f(x_t, t, prompt, picture). The picture comes from the distilled student of the
earlier stage, y_I(eps_I, prompt), in training and in sampling alike, from the same prompt and noise of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from onestill.core.tensors import Cond, noise, to_device, without_autocast
from onestill.data.conditions import VALIDATION_SEED, PromptConditions
from onestill.students.mark import is_student
from onestill.teachers.base import Teacher
from onestill.teachers.load import load_teacher, read_index
from onestill.teachers.pipelines import text_encoders as encoders
from onestill.teachers.pipelines.calls import EXAMPLE_PROMPTS
from onestill.teachers.pipelines.folder import INDEX
from onestill.teachers.pipelines.teacher import read_call
from onestill.teachers.pixel import PIPELINES as UNET2D_PIPELINES

FIRST_STAGE_SEED = 2**31
"""Added to an image's seed for its small picture. With the same seed the two noises would begin with equal numbers."""
PREFIX = "base."
"""Begins the names of the base student's conditions, where they lie beside those of the teacher."""
# Empty, with capitals, longer than any encoder takes: two pipelines that agree on these prepare prompts alike.
PROBES = ("", "A Photo, of (it)!", "a long photo of it " * 60)


class FirstStage:
    """A student of an earlier stage: its exported pipeline, asked for pictures in one step.

    Attributes:
        teacher: The exported pipeline, loaded as teachers are.
        folder: Where it was loaded from.
        examples: Two of its pictures, [2, C, h, w] in [-1, 1].
    """

    def __init__(self, teacher: Teacher, folder: Path) -> None:
        self.teacher, self.folder = teacher, folder
        self.examples = self.seeded(range(2), EXAMPLE_PROMPTS).cpu()

    def to(self, device: torch.device | str) -> FirstStage:
        """Move it to `device`."""
        self.teacher.to(device)
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the noise of one picture."""
        return self.teacher.spec.sample_shape

    @property
    def name(self) -> str:
        """The last two parts of its folder."""
        return "/".join(self.folder.parts[-2:])

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of its weights, the decoder's included, its schedule and its text encoders: the same pictures, or not."""
        return self.teacher.pictures_fingerprint()

    @torch.no_grad()
    @without_autocast
    def pictures(self, eps: Tensor, cond: Cond) -> Tensor:
        """Return the pictures of one step, [B, C, h, w] in [-1, 1], in full precision.

        Args:
            eps: Noise, [B, *shape].
            cond: Its own conditions, B rows each.
        """
        device = next(self.teacher.network.parameters()).device
        return self.teacher.one_step(eps.to(device), to_device(cond, device)).clamp(-1, 1)

    def seeded(self, seeds: Sequence[int], prompts: Sequence[str]) -> Tensor:
        """Return the pictures that belong to images of these seeds, which have `FIRST_STAGE_SEED` more themselves."""
        return self.pictures(self.noise(seeds), self.teacher.encode(prompts))

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """Return the noise of the pictures that belong to images of these seeds."""
        return noise([seed + FIRST_STAGE_SEED for seed in seeds], self.shape)

    def shares_rows(self, teacher: Teacher) -> bool:
        """Return whether the teacher's conditions of a prompt hold this student's: the same encoders, used alike."""
        if not self.teacher.has_encoders_of(teacher):
            return False
        with encoders.quiet():
            own, theirs = self.teacher.encode(PROBES), teacher.prompt_rows(teacher.encode(PROBES))
        return all(name in theirs and torch.equal(theirs[name], value) for name, value in own.items())


@dataclass(frozen=True)
class CascadeConditions:
    """Encoded prompts, and for each row the picture that the base student draws from the same prompt.

    Attributes:
        prompts: The prompts' conditions, with those of the base student under `PREFIX`.
        teacher: The teacher that enlarges the pictures.
        base: The student that draws them.
    """

    prompts: PromptConditions
    teacher: Teacher
    base: FirstStage

    @property
    def captions(self) -> tuple[str, ...]:
        """The prompts of `grid`."""
        return self.prompts.captions

    def choose(self, num: int, generator: torch.Generator) -> Cond:
        """Return keys of `num` random prompts, and the noise of their pictures; every draw is from `generator`."""
        chosen = self.prompts.choose(num, generator)
        eps = torch.randn(num, *self.base.shape, generator=generator)
        blur = torch.randn(num, *self.teacher.spec.sample_shape, generator=generator)
        return {**chosen, "eps": eps, "blur": blur}

    def rows(self, chosen: Cond) -> Cond:
        """Return the encoded prompts and the pictures drawn from them."""
        return self._with_pictures(self.prompts.rows(chosen), chosen["eps"], chosen["blur"])

    def grid(self, num: int) -> Cond:
        """Return `num` fixed conditions: the shown prompts, with the pictures of the validation seeds."""
        seeds = range(VALIDATION_SEED, VALIDATION_SEED + num)
        eps, blur = self.base.noise(seeds), second_noise(seeds, self.teacher.spec.sample_shape)
        return self._with_pictures(self.prompts.grid(num), eps, blur)

    def _with_pictures(self, cond: Cond, eps: Tensor, blur: Tensor) -> Cond:
        own = {name.removeprefix(PREFIX): value for name, value in cond.items() if name.startswith(PREFIX)}
        rows = self.teacher.picture_rows(self.base.pictures(eps, own), blur)
        return {name: v for name, v in cond.items() if not name.startswith(PREFIX)} | to_device(rows, "cpu")


def second_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Return [N, *shape], the second draw of each seed's generator: the pipelines' noise for the picture they are given."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        torch.randn(1, *shape, generator=generator)
        rows.append(torch.randn(1, *shape, generator=generator))
    return torch.cat(rows) if rows else torch.empty(0, *shape)


def seeded_rows(teacher: Teacher, base: FirstStage, seeds: Sequence[int], prompts: Sequence[str]) -> Cond:
    """Return the conditions of `teacher` that belong to images of these seeds and prompts, the picture's included."""
    blur = second_noise(seeds, teacher.spec.sample_shape)
    return teacher.encode(prompts) | teacher.picture_rows(base.seeded(seeds, prompts), blur)


def with_prefix(cond: Cond) -> Cond:
    """Return conditions of the base student under the names that they have beside the teacher's."""
    return {f"{PREFIX}{name}": value for name, value in cond.items()}


def joined_rows(own: Cond, base: Callable[[], Cond] | None, names: Sequence[str]) -> Cond:
    """Return the teacher's rows and the base student's.

    Args:
        own: The teacher's.
        base: Gives the base student's; None where the teacher's hold them.
        names: Names of the base student's conditions.
    """
    found = {name: own[name].clone() for name in names} if base is None else base()
    return {**own, **with_prefix(found)}


def with_first_stage(
    teacher: Teacher,
    path: str | Path | None,
    noise_level: int | None = None,
    *,
    device: torch.device | str = "cpu",
) -> tuple[Teacher, FirstStage | None]:
    """Return a teacher, and the student that draws the pictures that it enlarges; None for a teacher that takes none.

    The teacher that is returned knows the noise level, and checks itself with the student's own pictures.

    Args:
        teacher: The teacher.
        path: A run of the earlier stage, or its exported pipeline.
        noise_level: How much noise is mixed into the pictures; the pipeline's own default if None.
        device: Where the student goes.

    Raises:
        ValueError: If one is needed and not given or the other way round, or the student does not fit the teacher.
    """
    if teacher.image_condition is None:
        for flag, value in (("base_student", path), ("noise_level", noise_level)):
            if value is not None:
                raise ValueError(f"--{flag} {value} was given, but this teacher takes no picture; leave it out")
        return teacher, None
    if path is None:
        raise ValueError(
            f"{teacher.kind} enlarges the picture of an earlier model, which without data has to come from a distilled student of "
            "that: distil the earlier model first, and give that run with --base_student RUN"
        )
    level = teacher.image_condition.level if noise_level is None else noise_level
    teacher.with_image_condition(level)  # which is refused before anything else is loaded
    base = open_first_stage(path)
    check_shape(base, teacher.spec.sample_shape)
    base.teacher.to(device)
    return teacher.with_image_condition(level, base.examples), base


def find_first_stage(path: str | Path) -> Path:
    """Return the folder of the exported pipeline in a run's folder, or that folder itself.

    Raises:
        ValueError: If there is none.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise ValueError(f"--base_student {path}: no such folder; give a run of the earlier stage, or its pipeline/")
    folder = path / "pipeline" if (path / "config.yaml").is_file() else path
    if not (folder / INDEX).is_file():
        raise ValueError(
            f"--base_student {path} holds no exported pipeline ({INDEX}): give a finished run of the earlier stage, or "
            "export a checkpoint of it with onestill export"
        )
    return folder


def open_first_stage(path: str | Path) -> FirstStage:
    """Return the one-step student in a run's folder or an exported pipeline.

    Raises:
        ValueError: If there is none that draws pictures from prompts in one step.
    """
    path, folder = Path(path).expanduser(), find_first_stage(path)
    if read_index(folder, f"--base_student {path}")["_class_name"] in UNET2D_PIPELINES:
        raise ValueError(f"--base_student {path} takes no text, and the teacher takes prompts: both must draw the same")
    try:
        teacher = load_teacher(folder, local_files_only=True, arguments=read_call(folder))
    except ValueError as error:
        raise ValueError(f"--base_student {path}: {str(error).removeprefix(f'{folder}: ')}") from error
    if not teacher.spec.text:
        raise ValueError(f"--base_student {path} takes labels, and the teacher takes prompts: both must draw the same")
    if teacher.image_condition is not None:
        raise ValueError(f"--base_student {path} needs a picture itself ({teacher.kind}); give the first stage")
    if not is_student(folder, teacher.network):
        raise ValueError(
            f"--base_student {path} is a {teacher.kind} of many steps, no one-step student: distil it "
            f"first (onestill distill --teacher {path}) and give that run"
        )
    return FirstStage(teacher, folder.resolve())


def check_shape(base: FirstStage, wanted: tuple[int, ...]) -> None:
    """Raise ValueError if a student's pictures cannot become samples of a shape by a whole factor."""
    path, found = base.folder, tuple(base.examples.shape[1:])
    words = "x".join(map(str, found))
    if len(found) != len(wanted):
        raise ValueError(f"--base_student {path} draws no pictures but samples of shape {words}")
    if found[0] != wanted[0]:
        raise ValueError(
            f"--base_student {path} draws pictures of {found[0]} channels, and the teacher takes {wanted[0]}"
        )
    factors = {large / small for small, large in zip(found[1:], wanted[1:], strict=True)}
    if len(factors) > 1 or not (factor := factors.pop()).is_integer() or factor < 2:
        sides = " or ".join(f"{wanted[1] // n}x{wanted[2] // n}" for n in (4, 2) if min(wanted[1:]) >= n)
        raise ValueError(
            f"--base_student {path} draws pictures of {found[1]}x{found[2]}, and the teacher makes {wanted[1]}x{wanted[2]} of "
            f"smaller ones, such as {sides}"
        )


def messages(base: FirstStage, teacher: Teacher) -> tuple[str, ...]:
    """Return what should be said of a chain before it is trained."""
    condition = teacher.image_condition
    assert condition is not None, "with_first_stage has been called"
    small, large = base.examples.shape[-1], teacher.spec.sample_shape[-1]
    sizes = f"{small}x{small} pictures of {base.name} to {large}x{large}, noise level {condition.level}"
    found = [f"enlarging the {sizes}"]
    if large // small != condition.usual_factor:
        found.append(
            f"warning: the pictures are enlarged {large // small} times; published pipelines of this kind are made for "
            f"{condition.usual_factor}"
        )
    return tuple(found)
