"""DiT: latents and class labels, a `DiTTransformer2DModel` with one label more for "no class"."""

from __future__ import annotations

from typing import Any

from onestill.teachers.pipelines.families._vp import ddim_steps, one_ddim_step, vp_schedule
from onestill.teachers.pipelines.spec import PipelineSpec
from onestill.teachers.pipelines.vae import decode_vae

PIPELINE_NULL_CLASS = 1000


def null_class(config: Any) -> int:
    """Return the label of "no class", the last one; ValueError if it is not the one that `DiTPipeline` guides with."""
    label = int(config.num_embeds_ada_norm)
    if label != PIPELINE_NULL_CLASS:
        raise ValueError(
            f"the network has {label} classes, but DiTPipeline guides with label {PIPELINE_NULL_CLASS} as 'no class', "
            f"so only networks of {PIPELINE_NULL_CLASS} classes can be guided by it"
        )
    return label


DIT = PipelineSpec(
    name="dit",
    pipelines=("DiTPipeline",),
    network="transformer",
    schedule=vp_schedule,
    decode=decode_vae,
    one_step=one_ddim_step,
    few_steps=ddim_steps,
    prompt="class_labels",
    null_class=null_class,
)
