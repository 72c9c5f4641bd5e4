"""From a pipeline to its teacher: how it calls its network is learned from it, and the two are compared."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onestill.core.errors import SettingError, found_in, in_short, named
from onestill.core.patch import replaced
from onestill.core.tensors import SELF_CHECK_TOLERANCE, as_times, refuse_non_finite
from onestill.diffusion.process import FlowMatching, Process
from onestill.diffusion.trajectory import Trajectory
from onestill.teachers.pipelines.calls import PipelineCalls
from onestill.teachers.pipelines.capture import requested_shift, watch
from onestill.teachers.pipelines.folder import load_pipeline
from onestill.teachers.pipelines.schedulers import check_told, times_of
from onestill.teachers.pipelines.spec import PipelineSpec
from onestill.teachers.pipelines.teacher import PipelineTeacher
from onestill.teachers.pipelines.vae import decode_vae, form_of
from onestill.teachers.teacher_spec import TeacherSpec

FAR = 8
"""How many times the side that it was trained on a teacher may be asked for."""


def load_family(
    family: PipelineSpec, folder: Path, index: dict[str, Any], source: str, variant: str | None
) -> PipelineTeacher:
    """Return the teacher in the folder of a stock pipeline, after the self-check."""
    pipeline = load_pipeline(folder, index, source, variant, family.without)
    try:
        return pipeline_teacher(family, pipeline, folder, source, variant)
    except ValueError as error:
        raise found_in(source, _about_arguments(error, family.given)) from error
    except Exception as error:  # whatever a network or a pipeline of odd sizes ends with
        absent = [n for n, part in pipeline.components.items() if part is None and n.startswith(("text", "token"))]
        why = f": {type(error).__name__}: {in_short(error)}"
        if absent and "NoneType" in str(error):  # some pipelines do without a part, such as a third text encoder
            why = (
                f" without {' and '.join(absent)}, which encode its prompts: use a folder that holds the whole pipeline"
            )
        raise ValueError(f"{source}: the {index['_class_name']} does not run{why}") from error


def _about_arguments(error: ValueError, given: Mapping[str, Any]) -> ValueError:
    """Return a pipeline's own error as one of the arguments that it speaks of, where it speaks of some."""
    message = " ".join(str(error).split())
    names = [name for name in given if name in message.lower()]
    if isinstance(error, SettingError) or not names:
        return error
    return SettingError(names, [given[name] for name in names], message)


def pipeline_teacher(
    family: PipelineSpec, pipeline: Any, folder: Path, source: str = "", variant: str | None = None
) -> PipelineTeacher:
    """Return the teacher inside a pipeline loaded from `folder`, after the self-check.

    Raises:
        ValueError: If its schedule or its way of calling the network is not supported, or the self-check fails.
    """
    schedule = family.schedule(pipeline)
    t_max, reason = schedule.process.start_level(schedule.prediction_type)
    calls = PipelineCalls(family, pipeline)
    _check_channels(family, calls.network.config)
    signature, one = calls.signature()
    _check_far(family, calls, family.unpack(one.x_t, signature.constant).shape[1:])
    process = _with_shift(schedule.process, calls)
    check_told(pipeline.scheduler, process, float(one.net_time.reshape(-1)[0]))
    null_class = None if family.null_class is None else family.null_class(calls.network.config)
    null = {} if null_class is not None else calls.null_conditions(signature)
    if null_class is None and not null and (told := calls.guidance_input(signature, one)) is not None:
        calls = PipelineCalls(family := family.guided_by(told), pipeline)
        signature, one = calls.signature()
    spec = TeacherSpec(
        family=family.name,
        source=source,
        process=process,
        prediction_type=schedule.prediction_type,
        sample_shape=tuple(family.unpack(one.x_t, signature.constant).shape[1:]),
        t_max=t_max,
        t_max_reason=reason,
        num_classes=null_class,
        null_class=null_class,
        threshold=schedule.threshold,
        text=family.prompt == "prompt",
    )
    _check_size(family, pipeline, spec.sample_shape)
    teacher = PipelineTeacher(family, pipeline, folder, spec, signature, null, signature.conditions(one), variant)
    _, states, decoded = _compared(teacher, schedule.stock)
    if isinstance(vae := getattr(pipeline, "vae", None), nn.Module):
        refuse_non_finite(vae, "vae")  # which the steps above do not use
    if decoded is None or family.decode is not decode_vae:
        return teacher
    return teacher.with_decoder(partial(decode_vae, form=form_of(pipeline.vae, states, decoded)))


def _check_channels(family: PipelineSpec, config: Any) -> None:
    """Raise ValueError if the network returns less than its noisy input, and so is given more than that."""
    noisy = config.get("in_channels") if family.image_condition is None else family.image_condition.channels(config)
    output = config.get("out_channels")
    if noisy and output and output < noisy:
        raise ValueError(
            f"the network takes {noisy} channels and returns {output}: the others hold a mask or a picture "
            "(inpainting, image to image), which would have to be given with every prompt, so it is not supported"
        )


def _check_far(family: PipelineSpec, calls: PipelineCalls, sample_shape: tuple[int, ...]) -> None:
    """Raise SettingError if a size that was asked for is far from the teacher's own, before its network computes any of it."""
    own = calls.network.config.get("sample_size") or getattr(calls.pipeline, "default_sample_size", None)
    asked = [name for name in ("height", "width") if name in family.given]
    if not asked or own is None or len(sample_shape) < 3:
        return
    sides = (own, own) if isinstance(own, int) else tuple(own)[-2:]
    if any(made > FAR * side for made, side in zip(sample_shape[-2:], sides, strict=True)):
        why = f"is more than {FAR} times what the teacher was trained on, where it draws no picture"
        raise SettingError(asked, [family.given[name] for name in asked], why, "lower it, or leave it out")


def _check_size(family: PipelineSpec, pipeline: Any, sample_shape: tuple[int, ...]) -> None:
    """Raise ValueError if the pipeline rounded a size that was asked for, which some do without a word."""
    given, made = family.given, {}
    on_pixels = 1 if getattr(pipeline, "vae", None) is None else None
    scale = getattr(pipeline, "vae_scale_factor", on_pixels)
    spatial = getattr(pipeline, "vae_scale_factor_spatial", scale)
    temporal = getattr(pipeline, "vae_scale_factor_temporal", None)
    if spatial is not None and len(sample_shape) >= 3:
        made = {"height": sample_shape[-2] * spatial, "width": sample_shape[-1] * spatial}
    if temporal is not None and len(sample_shape) == 4:
        made["num_frames"] = (sample_shape[-3] - 1) * temporal + 1
    rounded = [name for name in made if name in given and given[name] != made[name]]
    if rounded:
        nearest = " ".join(f"{named(name)} {made[name]}" for name in rounded)
        why = f"a {type(pipeline).__name__} cannot make that and rounds it"
        raise SettingError(rounded, [given[name] for name in rounded], why, f"ask for {nearest}")


def _with_shift(process: Process, calls: PipelineCalls) -> Process:
    """Return the process under the shift that the pipeline asks a "dynamic" scheduler for, itself elsewhere."""
    if not isinstance(process, FlowMatching) or not calls.pipeline.scheduler.config.get("use_dynamic_shifting", False):
        return process
    run = lambda: calls(calls.examples(1), {"num_inference_steps": 2})  # noqa: E731 - passed on at once
    shift = requested_shift(run, calls.network, calls.pipeline.scheduler)
    return FlowMatching(shift, process.net_scale, process.net_offset)


def self_check(
    teacher: PipelineTeacher, stock: Any, num_steps: int = 2, *, negative_prompt: str | None = None
) -> float:
    """Compare some guided steps of ours with the pipeline's own call; return the largest relative difference.

    Args:
        teacher: The teacher; its null condition is that of `negative_prompt`.
        stock: A deterministic scheduler on the pipeline's own schedule, which it runs with.
        num_steps: How many steps.
        negative_prompt: What the pipeline guides away from, in the place of "no prompt".

    Raises:
        ValueError: If they differ by more than 1e-4.
    """
    return _compared(teacher, stock, num_steps, negative_prompt=negative_prompt)[0]


@torch.no_grad()
def _compared(
    teacher: PipelineTeacher, stock: Any, num_steps: int = 2, *, negative_prompt: str | None = None
) -> tuple[float, Tensor, Tensor | None]:
    """Return (what `self_check` does, the pipeline's last states, what its autoencoder was given of them to decode)."""
    family, pipeline = teacher.pipeline_spec, teacher.pipeline
    scale, conditions = 2.0 if teacher.can_guide else 1.0, teacher.calls.examples(2)
    given = {"num_inference_steps": num_steps, **family.guidance_argument(scale)}
    if negative_prompt is not None:
        given["negative_prompt"] = [negative_prompt] * len(conditions)
    with replaced(pipeline, "scheduler", stock):
        run = partial(teacher.calls, conditions, given, seeds=(0, 1))
        x_t, theirs, decoded = watch(run, teacher.network, stock, num_steps, getattr(pipeline, "vae", None))
    x_t, theirs = (family.unpack(x[:2], teacher.signature.constant) for x in (x_t, theirs))
    x_t = x_t[:, : teacher.spec.sample_shape[0]]
    cond = teacher.encode(conditions)
    ours = x_t
    for t, s in pairwise(times_of(stock, teacher.spec.process)):
        f = teacher.denoised(ours, t, cond)
        if scale != 1:
            without = teacher.denoised(ours, t, teacher.null_rows(cond))
            f = without + scale * (f - without)
        ours = Trajectory(teacher.spec.process, t).state(f, ours, as_times(s, 2))
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    if not error <= SELF_CHECK_TOLERANCE:
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module):
                refuse_non_finite(part, name)
        raise ValueError(
            f"self-check failed: {num_steps} steps of onestill and of {type(pipeline).__name__} differ by {error:.1e} "
            f"(allowed {SELF_CHECK_TOLERANCE:.0e}): the pipeline does not do what its configuration says"
        )
    return error, theirs, decoded
