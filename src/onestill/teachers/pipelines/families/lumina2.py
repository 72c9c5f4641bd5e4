"""Lumina 2: flow matching told backwards. The network's time is 1 - sigma and its output x_0 - eps.

The pipeline rescales a guided output to the norm of the unguided one by default (`cfg_normalization=True`). Our
guidance is the plain one, so the teacher is the pipeline called with `cfg_normalization=False`.
"""

from __future__ import annotations

from functools import partial

from onestill.teachers.pipelines.families._flow import flow_schedule, flow_steps, one_flow_step
from onestill.teachers.pipelines.families._vp import square_size
from onestill.teachers.pipelines.spec import PipelineSpec
from onestill.teachers.pipelines.vae import decode_vae

LUMINA_2 = PipelineSpec(
    name="lumina2",
    pipelines=("Lumina2Pipeline",),
    network="transformer",
    schedule=partial(flow_schedule, net_scale=-1.0, net_offset=1.0),
    decode=decode_vae,
    one_step=one_flow_step,
    few_steps=flow_steps,
    arguments={"cfg_normalization": False},
    sign=-1.0,
    set_size=square_size,
)
