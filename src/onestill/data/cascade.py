"""Cascades of students: one draws a small picture in one step, the next enlarges it in one step, and no data is needed.

A super-resolution teacher predicts f(x_t, t, prompt, picture). The picture comes from the distilled student of the
earlier stage, y_I(eps_I, prompt), in training and in sampling alike, from the same prompt and noise of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from onestill.core.errors import SettingError, named
from onestill.core.tensors import Cond, noise, to_device, without_autocast
from onestill.data.conditions import VALIDATION_SEED, PromptConditions
from onestill.students.mark import is_student, num_steps_of
from onestill.teachers.base import Teacher
from onestill.teachers.load import load_teacher, read_index
from onestill.teachers.pipelines import text_encoders as encoders
from onestill.teachers.pipelines.calls import EXAMPLE_PROMPTS
from onestill.teachers.pipelines.folder import INDEX
from onestill.teachers.pipelines.teacher import read_call
from onestill.teachers.pixel import PIPELINES as UNET2D_PIPELINES

FIRST_STAGE_SEED = 2**31
"""Added to an image's seed for its small picture. With the same seed the two noises would begin with equal numbers."""
PREFIX = "first_stage."
"""Begins the names of the first stage's conditions, where they lie beside those of the teacher."""
# Empty, with capitals, longer than any encoder takes: two pipelines that agree on these prepare prompts alike.
PROBES = ("", "A Photo, of (it)!", "a long photo of it " * 60)


class FirstStage:
    """A student of an earlier stage: its exported pipeline, loaded as teachers are and asked for pictures in one step.

    Attributes:
        shape: Shape of the noise of one picture.
        name: The last two parts of its folder.
        examples: Two of its pictures, [2, C, h, w] in [-1, 1].
    """

    def __init__(self, teacher: Teacher, folder: Path) -> None:
        self.teacher, self.folder = teacher, folder
        self.shape, self.name = teacher.spec.sample_shape, "/".join(folder.parts[-2:])
        self.examples = self.seeded(range(2), EXAMPLE_PROMPTS).cpu()

    def to(self, device: torch.device | str) -> FirstStage:
        """Move it to `device`."""
        self.teacher.to(device)
        return self

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of its weights, the decoder's too, its schedule and its text encoders: the same pictures, or not."""
        return self.teacher.pictures_fingerprint()

    @torch.no_grad()
    @without_autocast
    def pictures(self, eps: Tensor, cond: Cond) -> Tensor:
        """Return the pictures of one step from noise [B, *shape], [B, C, h, w] in [-1, 1], in full precision."""
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
    """Encoded prompts, and for each row the picture that the first stage draws from the same prompt.

    Those of the first stage are among the prompts' conditions, under `PREFIX`; the teacher enlarges the pictures.
    """

    prompts: PromptConditions
    teacher: Teacher
    first_stage: FirstStage

    @property
    def captions(self) -> tuple[str, ...]:
        """The prompts of `grid`."""
        return self.prompts.captions

    def choose(self, num: int, generator: torch.Generator) -> Cond:
        """Return keys of `num` random prompts, and the noise of their pictures; every draw is from `generator`."""
        chosen = self.prompts.choose(num, generator)
        eps = torch.randn(num, *self.first_stage.shape, generator=generator)
        blur = torch.randn(num, *self.teacher.spec.sample_shape, generator=generator)
        return {**chosen, "eps": eps, "blur": blur}

    def rows(self, chosen: Cond) -> Cond:
        """Return the encoded prompts and the pictures drawn from them."""
        return self._with_pictures(self.prompts.rows(chosen), chosen["eps"], chosen["blur"])

    def grid(self, num: int) -> Cond:
        """Return `num` fixed conditions: the shown prompts, with the pictures of the validation seeds."""
        seeds = range(VALIDATION_SEED, VALIDATION_SEED + num)
        eps, blur = self.first_stage.noise(seeds), second_noise(seeds, self.teacher.spec.sample_shape)
        return self._with_pictures(self.prompts.grid(num), eps, blur)

    def _with_pictures(self, cond: Cond, eps: Tensor, blur: Tensor) -> Cond:
        own = {name.removeprefix(PREFIX): value for name, value in cond.items() if name.startswith(PREFIX)}
        rows = self.teacher.picture_rows(self.first_stage.pictures(eps, own), blur)
        return {name: v for name, v in cond.items() if not name.startswith(PREFIX)} | to_device(rows, "cpu")


def second_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Return [N, *shape], the second draw of each seed's generator: the pipelines' noise for a given picture."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    draws = [torch.randn(1, *shape, generator=generator) for generator in generators for _ in range(2)]
    return torch.cat(draws[1::2]) if draws else torch.empty(0, *shape)


def seeded_rows(teacher: Teacher, first_stage: FirstStage, seeds: Sequence[int], prompts: Sequence[str]) -> Cond:
    """Return the conditions of `teacher` that belong to images of these seeds and prompts, the picture's included."""
    blur = second_noise(seeds, teacher.spec.sample_shape)
    return teacher.encode(prompts) | teacher.picture_rows(first_stage.seeded(seeds, prompts), blur)


def with_prefix(cond: Cond) -> Cond:
    """Return conditions of the first stage under the names that they have beside the teacher's."""
    return {f"{PREFIX}{name}": value for name, value in cond.items()}


def with_first_stage(
    teacher: Teacher, path: str | Path | None, noise_level: int | None = None, *, device: torch.device | str = "cpu"
) -> tuple[Teacher, FirstStage | None]:
    """Return a teacher, and the student that draws the pictures that it enlarges; None for a teacher that takes none.

    The teacher that is returned knows the noise level, the pipeline's own default if None, and checks itself with the
    student's own pictures. The path is a run of the earlier stage, or its exported pipeline.

    Raises:
        SettingError: If one is needed and not given or the other way round, or the student does not fit the teacher.
    """
    if teacher.image_condition is None:
        for name, value in (("base_student", path), ("noise_level", noise_level)):
            if value is not None:
                raise SettingError(name, value, "this teacher takes no picture", "leave it out")
        return teacher, None
    if path is None:
        needed = "which without data has to come from a distilled student"
        why = f"{teacher.kind} enlarges the picture of an earlier model, {needed}"
        raise SettingError("base_student", why=why, todo="distil the earlier model first, and give that run")
    level = teacher.image_condition.level if noise_level is None else noise_level
    teacher.with_image_condition(level)  # which is refused before anything else is loaded
    first_stage = open_first_stage(path)
    check_shape(first_stage, teacher.spec.sample_shape)
    return teacher.with_image_condition(level, first_stage.to(device).examples), first_stage


def find_first_stage(path: str | Path) -> Path:
    """Return the folder of the exported pipeline in a run's folder, or that folder itself; SettingError if none is."""
    path = Path(path).expanduser()
    if not path.is_dir():
        raise SettingError("base_student", path, "no such folder", "give a run of the earlier stage, or its pipeline/")
    folder = path / "pipeline" if (path / "config.yaml").is_file() else path
    if not (folder / INDEX).is_file():
        todo = "give a finished run of the earlier stage, or export a checkpoint of it with onestill export"
        raise SettingError("base_student", path, f"holds no exported pipeline ({INDEX})", todo)
    return folder


def open_first_stage(path: str | Path) -> FirstStage:
    """Return the one-step student in a run's folder or an exported pipeline; SettingError if it takes no prompts."""
    path, folder = Path(path).expanduser(), find_first_stage(path)
    try:
        takes_labels, steps = read_index(folder, str(folder))["_class_name"] in UNET2D_PIPELINES, num_steps_of(folder)
        teacher = (
            None
            if takes_labels or steps > 1
            else load_teacher(folder, local_files_only=True, arguments=read_call(folder))
        )
    except ValueError as error:
        raise SettingError("base_student", path, str(error).removeprefix(f"{folder}: ")) from error
    if steps > 1:
        why = f"was exported for {steps} steps, and a first stage draws in one"
        raise SettingError("base_student", path, why, "export its run for one")
    if teacher is None or not teacher.spec.text:
        why = "takes no text, and the teacher takes prompts: both must draw the same"
        raise SettingError("base_student", path, why)
    if teacher.image_condition is not None:
        raise SettingError("base_student", path, f"needs a picture itself ({teacher.kind})", "give the first stage")
    if not is_student(folder, teacher.network):
        why = f"is a {teacher.kind} of many steps, no one-step student"
        todo = f"distil it first (onestill distill, with it as {named('teacher')}) and give that run"
        raise SettingError("base_student", path, why, todo)
    return FirstStage(teacher, folder.resolve())


def check_shape(first_stage: FirstStage, wanted: tuple[int, ...]) -> None:
    """Raise SettingError if a student's pictures cannot become samples of a shape by a whole factor."""
    found, why = tuple(first_stage.examples.shape[1:]), ""
    if len(found) != len(wanted):
        why = f"draws no pictures but samples of shape {'x'.join(map(str, found))}"
    elif found[0] != wanted[0]:
        why = f"draws pictures of {found[0]} channels, and the teacher takes {wanted[0]}"
    else:
        factors = {large / small for small, large in zip(found[1:], wanted[1:], strict=True)}
        if len(factors) > 1 or not (factor := factors.pop()).is_integer() or factor < 2:
            sides = " or ".join(f"{wanted[1] // n}x{wanted[2] // n}" for n in (4, 2) if min(wanted[1:]) >= n)
            small, large = f"{found[1]}x{found[2]}", f"{wanted[1]}x{wanted[2]}"
            why = f"draws pictures of {small}, and the teacher makes {large} of smaller ones, such as {sides}"
    if why:
        raise SettingError("base_student", first_stage.folder, why)


def messages(first_stage: FirstStage, teacher: Teacher) -> tuple[str, ...]:
    """Return what should be said of a cascade before it is trained."""
    condition = teacher.image_condition
    assert condition is not None, "with_first_stage has been called"
    small, large = first_stage.examples.shape[-1], teacher.spec.sample_shape[-1]
    sizes = f"{small}x{small} pictures of {first_stage.name} to {large}x{large}"
    said, usual = f"enlarging the {sizes}, noise level {condition.level}", condition.usual_factor
    if large // small == usual:
        return (said,)
    enlarged = f"the pictures are enlarged {large // small} times"
    return said, f"warning: {enlarged}; published pipelines of this kind are made for {usual}"
