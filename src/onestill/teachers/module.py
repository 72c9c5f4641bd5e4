"""Any `torch.nn.Module` or callable as a teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from onestill.core.tensors import Cond
from onestill.diffusion.prediction import PREDICTION_TYPES
from onestill.diffusion.process import Process
from onestill.teachers.base import NetworkTeacher
from onestill.teachers.teacher_spec import NO_THRESHOLD, TeacherSpec, Threshold


class ModuleTeacher(NetworkTeacher):
    """A teacher whose network is called as network(x, net_time, **conditions)."""

    def call(self, network: Callable[..., Any], x_t: Tensor, net_time: Tensor, cond: Cond) -> Tensor:
        output = network(x_t, net_time, **cond)
        if not isinstance(output, Tensor):
            raise TypeError(f"the teacher's network must return a tensor, it returned {type(output).__name__}")
        if output.shape != x_t.shape:
            raise ValueError(f"the teacher's network returned shape {list(output.shape)} for input {list(x_t.shape)}")
        return output


def module_teacher(
    network: Callable[..., object],
    process: Process,
    prediction_type: str,
    sample_shape: tuple[int, ...],
    *,
    num_classes: int | None = None,
    null_class: int | None = None,
    t_max: float | None = None,
    threshold: Threshold = NO_THRESHOLD,
    sigma_data: float = 0.5,
) -> ModuleTeacher:
    """Return a teacher around your own network.

    The network is called as `network(x, net_time)` or, with classes, `network(x, net_time, class_labels=...)`;
    x is [B, *sample_shape], net_time [B] is `process.net_time(t)`. It returns a tensor of x's shape that holds
    what `prediction_type` says. A native EDM network D(x; sigma) is `VE(time_input="sigma")` with "sample".

    Args:
        network: A module, or any callable.
        process: The noise process it was trained on.
        prediction_type: One of `onestill.diffusion.prediction.PREDICTION_TYPES`.
        sample_shape: Shape of one sample without the batch axis.
        num_classes: Number of classes besides the null class; None if unconditional.
        null_class: The label of "no class", if there is one.
        t_max: Start level; chosen from the process and the prediction type if None.
        threshold: What the teacher's sampler does to x_0.
        sigma_data: Standard deviation of the data, for "edm".

    Raises:
        ValueError: If the prediction type is unknown or cannot start on this process.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"unknown prediction type {prediction_type!r}; known: {', '.join(PREDICTION_TYPES)}")
    if t_max is not None:
        process.check_start_level(prediction_type, t_max)
    start, reason = process.start_level(prediction_type) if t_max is None else (t_max, "given")
    spec = TeacherSpec(
        family="module",
        source="",
        process=process,
        prediction_type=prediction_type,
        sample_shape=tuple(sample_shape),
        t_max=start,
        t_max_reason=reason,
        num_classes=num_classes,
        null_class=null_class,
        threshold=threshold,
        sigma_data=sigma_data,
    )
    return ModuleTeacher(network, spec)
