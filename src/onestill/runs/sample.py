"""`sample`: images of a student in one step, or of a teacher in many."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from onestill.core.arguments import checked
from onestill.core.errors import SettingError
from onestill.core.files import check_writable
from onestill.core.settings import make
from onestill.data.prompts import read_prompts
from onestill.runs.load import generator, open_sampler
from onestill.runs.memory import enough_for_images
from onestill.sampling import explore
from onestill.sampling.config import DrawSettings, SampleConfig, check_interpolation
from onestill.sampling.explore import MOST_IMAGES, NUM_SAMPLES, Samples, Sheet
from onestill.sampling.pictures import check_output
from onestill.sampling.samplers.base import Sampler
from onestill.teachers.base import Teacher


@checked(SampleConfig)
def sample(
    student: str | Path | None = None,
    *,
    teacher: str | Path | Teacher | None = None,
    config_file: str | Path | None = None,
    show_progress: bool = False,
    **settings: Any,
) -> Tensor:
    """Return images [N, C, H, W] in [-1, 1]: by a student in one step, or by a teacher in many.

    Image i has seed `seed + i` and does not depend on the batch it came in. Of a way of exploring, all images are
    returned, row by row; the functions of `onestill.sampling.explore` say what each is.

    Args:
        student: A run's folder, a checkpoint-N folder, or an exported pipeline. Either this or `teacher`.
        teacher: A teacher, for its multi-step baseline.
        config_file: YAML file of settings; `settings` win over it.
        show_progress: Show a bar on a terminal.
        **settings: Fields of `onestill.SampleConfig`; an unknown name is refused. The images are written, too, if
            `output` is among them.

    Raises:
        ValueError: If a setting is unusable, or the sampler does not exist or cannot draw this.
    """
    config = make(SampleConfig, generator(student, teacher, settings), config_file)
    made = draw(config, teacher if isinstance(teacher, Teacher) else None, show_progress=show_progress)
    if config.output is not None:
        made.save(config.output, overwrite=config.overwrite)
    return made.images if isinstance(made, Samples) else made.images.flatten(0, 1)


def draw(
    config: SampleConfig,
    teacher: Teacher | None = None,
    *,
    show_progress: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Samples | Sheet:
    """Return the images that a configuration describes; nothing is loaded before all of it has been checked.

    `teacher` is the one that it names, where that is an object; `say` is called with a line for each limit of the text
    encoders that prompts exceed.
    """
    if config.output is not None:
        check_output(config.output, overwrite=config.overwrite, moves=config.exploring is not None)
        check_writable(config.output, "output")
    prompts = read_prompts(config.prompts, config.prompt_file, config.prompt_field)
    if config.interpolate is not None:
        check_interpolation(config.interpolate, config, config.to_seed, prompts)
    with enough_for_images(config.batch_size, "opening what draws"):
        sampler = _open(config, teacher)
    few = config.exploring not in (None, "fixed_noise")
    # What goes round shows no more of them, and each would have to be read.
    prompts = tuple(prompts[: config.num_images or (MOST_IMAGES if few else NUM_SAMPLES)])
    for warning in sampler.warnings(prompts):
        say(warning)
    with enough_for_images(config.batch_size, "drawing"):
        return _drawn(config.model_copy(update={"prompts": prompts}), sampler, show_progress)


def _open(config: SampleConfig, teacher: Teacher | None) -> Sampler:
    """Return the sampler at the value of a list that most refuse: the scale furthest from none, the earliest time."""
    listed, one = None, {}
    if config.guidance_scales:
        listed, one = "guidance_scales", {"guidance_scale": max(config.guidance_scales, key=lambda w: abs(w - 1))}
    if config.target_times:
        listed, one = "target_times", {"target_time": max(config.target_times)}
    try:
        return open_sampler(config.model_copy(update=one), teacher)
    except SettingError as error:
        if listed is None or error.settings != tuple(one):
            raise
        raise error.about(listed, getattr(config, listed)) from None


def _drawn(config: SampleConfig, sampler: Sampler, show_progress: bool) -> Samples | Sheet:
    settings: dict[str, Any] = {name: getattr(config, name) for name in DrawSettings.model_fields}
    settings["show_progress"] = show_progress
    match config.exploring:
        case "interpolate":
            return explore.interpolate(sampler, to_seed=config.to_seed, **settings | {"num_images": config.interpolate})
        case "fixed_noise":
            return explore.fixed_noise(sampler, **settings)
        case "guidance_scales":
            return explore.guidance_sweep(sampler, config.guidance_scales, **settings)
        case "target_times":
            return explore.student_trajectory(sampler, config.target_times, **settings)
    return explore.samples(sampler, **settings)
