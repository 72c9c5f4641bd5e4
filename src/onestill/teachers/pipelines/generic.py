"""A pipeline of diffusers that no family names: a description made from its index and its own calls.

It must keep a `unet` or a `transformer`, a schedule with `alphas_cumprod` or one of flow matching, and decode
plainly. What is not written down is tried: the scale of a flow network's time is read off the first call, its
direction and the sign of the output are those that reproduce the pipeline's own steps. The self-check decides,
and so does the pipeline's own picture for the decoder; whatever does not fit is refused, saying what it would need.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onestill.core.errors import SettingError, in_short
from onestill.core.tensors import SELF_CHECK_TOLERANCE
from onestill.teachers.pipelines.build import pipeline_teacher
from onestill.teachers.pipelines.calls import PipelineCalls
from onestill.teachers.pipelines.capture import finish, record
from onestill.teachers.pipelines.families._flow import flow_schedule, flow_steps, one_flow_step
from onestill.teachers.pipelines.families._vp import ddim_steps, one_ddim_step
from onestill.teachers.pipelines.folder import load_pipeline, pipeline_class
from onestill.teachers.pipelines.schedulers import is_flow, plain_stock, scheduler_process, scheduler_threshold
from onestill.teachers.pipelines.spec import PipelineSpec, Schedule
from onestill.teachers.pipelines.teacher import PipelineTeacher
from onestill.teachers.pipelines.vae import decode_vae

NETWORKS = ("transformer", "unet")
# Fields of a pipeline's output, and from what "pt" gives to what the decoder gives.
OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "images": lambda images: images * 2 - 1,
    "frames": lambda frames: frames.movedim(1, 2) * 2 - 1,
    "audios": lambda audios: audios,
}
# What pipelines and networks raise when they are given what they were not made for.
FOREIGN = (TypeError, AttributeError, RuntimeError, LookupError, ArithmeticError, AssertionError, NameError)


def load_generic(
    folder: Path, index: dict[str, Any], source: str, variant: str | None, arguments: Mapping[str, Any]
) -> PipelineTeacher:
    """Return the teacher in the folder of a pipeline without a family of its own.

    Raises:
        ValueError: If the pipeline does not fit, saying what it would need.
    """
    cannot = f"{source}: a {index['_class_name']} cannot be a teacher"
    try:
        pipeline_class(index["_class_name"])
    except ValueError as error:
        raise ValueError(f"{cannot}: {error}") from error
    try:
        network = _network(index)
        pipeline = load_pipeline(folder, index, source, variant)
        return _first_that_fits(network, pipeline, folder, source, variant, arguments)
    except SettingError as error:
        raise error.found_in(source) from error
    except ValueError as error:
        message = str(error).removeprefix(f"{source}: ")
        raise ValueError(f"{cannot}: no family names it, and none could be made: {message}") from error


def plain_family(index: dict[str, Any], pipeline: Any) -> PipelineSpec:
    """Return the description of an exported student's pipeline that no family names: enough for its plain call."""
    return _described(_network(index), pipeline)


def _network(index: dict[str, Any]) -> str:
    there = [name for name, entry in index.items() if isinstance(entry, list) and entry[1] is not None]
    networks = [name for name in there if name.startswith(NETWORKS)]
    if len(networks) == 1:
        return networks[0]
    raise ValueError(
        f"a teacher is one network named unet or transformer, and this pipeline has {', '.join(sorted(there))}. "
        "A cascade has no single trajectory from noise to image"
    )


def _first_that_fits(
    network: str, pipeline: Any, folder: Path, source: str, variant: str | None, arguments: Mapping[str, Any]
) -> PipelineTeacher:
    error: ValueError | None = None
    for family in _candidates(network, pipeline, arguments):
        try:
            teacher = pipeline_teacher(family, pipeline, folder, source, variant)
        except ValueError as found:
            error = error or found
        except FOREIGN as found:
            error = error or ValueError(f"its network does not run as the pipeline runs it: {in_short(found)}")
        else:
            _check_decoder(teacher)
            return teacher
    raise error or ValueError("there is nothing to try")


def _candidates(network: str, pipeline: Any, arguments: Mapping[str, Any]) -> Iterator[PipelineSpec]:
    """Yield the descriptions that a pipeline may have."""
    config = getattr(pipeline, network).config
    sees, predicts = config.get("in_channels"), config.get("out_channels")
    if isinstance(sees, int) and isinstance(predicts, int) and sees > predicts:
        raise ValueError(
            f"its {network} sees {sees} channels and predicts {predicts}: it is given an image or a mask beside the "
            "noise. It would need a family that provides them"
        )
    base = _described(network, pipeline).with_arguments(arguments)
    first = _first_call(base, pipeline)
    if not is_flow(pipeline.scheduler):
        yield base
        return
    for net_scale, net_offset in [(first, 0.0)] if first > 0 else [(-1.0, 1.0), (-1000.0, 1000.0)]:
        schedule = partial(flow_schedule, net_scale=net_scale, net_offset=net_offset)
        for sign in (1.0, -1.0):
            yield replace(base, schedule=schedule, one_step=one_flow_step, few_steps=flow_steps, sign=sign)


def _described(network: str, pipeline: Any) -> PipelineSpec:
    """Return the description of a pipeline, with the schedule of `alphas_cumprod`."""
    taken = inspect.signature(pipeline.__call__).parameters
    if missing := [n for n in ("prompt", "generator", "num_inference_steps", "output_type") if n not in taken]:
        raise ValueError(f"its call does not take {', '.join(missing)}. It would need a family that calls it")
    guidance = "guidance_scale" if "guidance_scale" in taken else None
    return PipelineSpec(
        name="generic",
        pipelines=(type(pipeline).__name__,),
        network=network,
        schedule=_vp_schedule,
        decode=decode_vae if getattr(pipeline, "vae", None) is not None else None,
        one_step=one_ddim_step,
        few_steps=ddim_steps,
        result=_result,
        guidance=guidance,
        export_arguments={"num_inference_steps": 1, **({guidance: 1.0} if guidance else {})},
    )


def _vp_schedule(pipeline: Any) -> Schedule:
    process, prediction, _ = scheduler_process(pipeline.scheduler)
    on_pixels = getattr(pipeline, "vae", None) is None
    more = {"threshold": scheduler_threshold(pipeline.scheduler)} if on_pixels else {}
    return Schedule(process, prediction, plain_stock(pipeline.scheduler), **more)


def _result(output: Any) -> Tensor:
    name = next((name for name in OUTPUTS if name in output), None)
    if name is None:
        raise ValueError(f"it returns {', '.join(output)}, not {', '.join(OUTPUTS)}")
    return OUTPUTS[name](output[name])


def _first_call(family: PipelineSpec, pipeline: Any) -> float:
    """Return the time in a pipeline's first call of its network, which must work for one prompt alone."""
    calls = PipelineCalls(family, pipeline)
    run = lambda: calls(calls.examples(1), {"num_inference_steps": 2})  # noqa: E731 - passed on at once
    try:
        (call,) = record(run, calls.network)
    except (ValueError, *FOREIGN) as error:
        raise ValueError(
            f"its call with a prompt alone ends with {type(error).__name__}: {in_short(error)}. "
            "It would need a family that gives it what it asks for"
        ) from error
    return float(call.net_time.reshape(-1)[0])


@torch.no_grad()
def _check_decoder(teacher: PipelineTeacher) -> None:
    """Raise ValueError if our decoder does not make the pipeline's own picture of its own last state."""
    calls, given = teacher.calls, {"num_inference_steps": 2, "output_type": "pt"}
    run = lambda: calls(calls.examples(2), given, seeds=(0, 1))  # noqa: E731 - passed on at once
    try:
        output, latents = finish(run, calls.pipeline.scheduler)
        theirs, ours = calls.spec.result(output), teacher.decode(latents)
    except FOREIGN as error:
        raise ValueError(
            f"its latents do not decode plainly: {in_short(error)}. It would need a family that decodes (and packs) them"
        ) from error
    fits = ours.shape == theirs.shape
    if not fits or not (ours.clamp(-1, 1) - theirs.clamp(-1, 1)).abs().max() <= SELF_CHECK_TOLERANCE:
        raise ValueError(
            f"its latents {list(latents.shape)} do not decode to its own {list(theirs.shape)} pictures by its "
            "autoencoder's scale alone. It would need a family that decodes (and packs) them"
        )
