"""What the families of flow matching share: x_t = (1 - sigma) x_0 + sigma eps, the network predicts eps - x_0.

At pure noise the head of such a student is y = eps - output: it predicts eps - y, the average velocity from the
noise to its target time, and a teacher's velocity there is finite. No coefficient divides by 1 - t, since the
signal form mixes with rho = (w_s - w_t) / (w_s - w_a), w = alpha / sigma, which is 1 for the first step from t = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onestill.teachers.pipelines.schedulers import flow_process, one_euler_step, plain_euler
from onestill.teachers.pipelines.spec import Schedule
from onestill.teachers.pipelines.walks import flow_walks
from onestill.teachers.teacher_spec import TeacherSpec


def flow_schedule(pipeline: Any, *, net_scale: float = 1000.0, net_offset: float = 0.0) -> Schedule:
    """Return the linear path under the scheduler's shift; the network's time is net_offset + net_scale sigma."""
    process = flow_process(pipeline.scheduler, net_scale=net_scale, net_offset=net_offset)
    return Schedule(process, "velocity", plain_euler(pipeline.scheduler))


def one_flow_step(_pipeline: Any, _prediction_type: str, alpha: float) -> Any:
    """Return the scheduler of an exported student: its one step from the noise is eps - output."""
    return one_euler_step(alpha)


def flow_steps(_pipeline: Any, spec: TeacherSpec, levels: Sequence[float]) -> list[Any]:
    """Return the schedulers that an exported student of several steps may have: which one, the pipeline's call decides."""
    return list(flow_walks(spec, levels))
