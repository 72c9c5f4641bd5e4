"""What the families of latents with an `alphas_cumprod` schedule share: its reading, size and one step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onestill.teachers.pipelines.schedulers import one_level, plain_stock, scheduler_process
from onestill.teachers.pipelines.spec import Schedule
from onestill.teachers.pipelines.walks import ddim_walk
from onestill.teachers.teacher_spec import TeacherSpec


def vp_schedule(pipeline: Any) -> Schedule:
    """Return the schedule of a pipeline whose scheduler is not one of flow matching; latents are never thresholded."""
    process, prediction, _ = scheduler_process(pipeline.scheduler)
    if prediction == "edm":
        raise ValueError(
            f"a {type(pipeline).__name__} with {type(pipeline.scheduler).__name__} is not supported: EDM's "
            "preconditioning of an output without prediction_type='v_prediction' is known for pixel networks only"
        )
    return Schedule(process, prediction, plain_stock(pipeline.scheduler))


def one_ddim_step(_pipeline: Any, prediction_type: str, alpha: float) -> Any:
    """Return the scheduler of an exported student: its one step is the head."""
    return one_level(alpha, prediction_type, clip_sample=False)


def ddim_steps(_pipeline: Any, spec: TeacherSpec, levels: Sequence[float]) -> list[Any]:
    """Return the scheduler of an exported student of several steps."""
    return [ddim_walk(spec, levels)]


def any_size(network: Any, size: tuple[int, int]) -> bool:
    """Make (height, width) of the latents the default size of the pipeline around a network."""
    height, width = size
    network.register_to_config(sample_size=height if height == width else [height, width])
    return True


def square_size(network: Any, size: tuple[int, int]) -> bool:
    """Make a size the default of a pipeline that multiplies its network's `sample_size`, which must be one number."""
    return size[0] == size[1] and any_size(network, size)
