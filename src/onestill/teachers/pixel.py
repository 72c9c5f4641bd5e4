"""Pixel teachers: diffusers pipelines around a `UNet2DModel`, unconditional or with class labels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import UNet2DModel
from torch import Tensor

from onestill.core.errors import SettingError, found_in, in_short
from onestill.core.files import PICKLE_SUFFIXES
from onestill.core.models import check_configs, load_model
from onestill.core.reading import loading
from onestill.core.tensors import SELF_CHECK_TOLERANCE, Cond, refuse_non_finite, without_autocast
from onestill.diffusion.process import LogSigmaVP
from onestill.diffusion.trajectory import Trajectory
from onestill.teachers.base import NetworkTeacher
from onestill.teachers.pipelines.folder import check_variant
from onestill.teachers.pipelines.schedulers import (
    check_told,
    plain_stock,
    scheduler_process,
    scheduler_threshold,
    times_of,
)
from onestill.teachers.teacher_spec import TeacherSpec

PIPELINES = ("DDPMPipeline", "DDIMPipeline", "ConsistencyModelPipeline")


class PixelTeacher(NetworkTeacher):
    """A teacher around a `UNet2DModel`; of one with learned variance half of the channels are the prediction."""

    student_format = "pixel"
    records_null_class = True  # no file of a pipeline around a UNet2DModel says it

    def call(self, network: Callable[..., Any], x_t: Tensor, net_time: Tensor, cond: Cond) -> Tensor:
        output: Tensor = network(x_t, net_time, class_labels=cond.get("class_labels")).sample
        return output[:, : x_t.shape[1]]


def load_unet2d(
    folder: Path, index: dict[str, Any], source: str, variant: str | None, null_class: int | None
) -> PixelTeacher:
    """Return the teacher in a pipeline folder; `index` is its model_index.json."""
    name = index["_class_name"]
    for part in ("unet", "scheduler"):
        entry = index.get(part)
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)):
            raise ValueError(f"{source}: model_index.json names no {part!r}, which a {name} must have")
    if index["unet"][1] != "UNet2DModel":
        raise ValueError(f"{source}: the network is a {index['unet'][1]}; {name} teachers need a UNet2DModel")
    network = _load_network(folder, source, variant)
    scheduler = _load_scheduler(folder, index["scheduler"][1], source)
    try:
        teacher = unet2d_teacher(network, scheduler, source=source, null_class=null_class)
    except ValueError as error:
        raise found_in(source, error) from error
    teacher.folder = folder
    return teacher


def unet2d_teacher(
    network: UNet2DModel, scheduler: Any, *, source: str = "", null_class: int | None = None
) -> PixelTeacher:
    """Return the teacher made of a `UNet2DModel` and its scheduler, after the self-check.

    Raises:
        ValueError: If the network or the scheduler is of a kind that cannot be a teacher, if an epsilon network
            meets zero terminal SNR, if the null class is no label of the network, or if two DDIM steps of ours
            do not agree with the scheduler's own.
    """
    config = network.config
    process, prediction, sigma_data = scheduler_process(scheduler)
    _refuse_unknown_parts(config)
    num_classes = _count_classes(config, null_class)
    t_max, reason = process.start_level(prediction)
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    spec = TeacherSpec(
        family="unet2d",
        source=source,
        process=process,
        prediction_type=prediction,
        sample_shape=(config.in_channels, height, width),
        t_max=t_max,
        t_max_reason=reason,
        num_classes=num_classes,
        null_class=null_class,
        threshold=scheduler_threshold(scheduler),
        sigma_data=sigma_data,
    )
    teacher = PixelTeacher(network, spec)
    try:
        self_check(teacher, scheduler)
    except RuntimeError as error:
        shape = "x".join(map(str, spec.sample_shape))
        raise ValueError(
            f"the network does not run on samples of its own shape {shape} (sample_size {size} in "
            f"unet/config.json): {in_short(error)}"
        ) from error
    own = copy.deepcopy(scheduler)
    own.set_timesteps(10)
    check_told(own, process, float(own.timesteps[0]))
    return teacher


@torch.no_grad()
@without_autocast
def self_check(teacher: PixelTeacher, scheduler: Any) -> float:
    """Compare two deterministic steps of ours with the scheduler's own `step`; return the largest relative difference.

    Steps 4 to 6 of 10, where neither end hides an error. ValueError if they differ by more than 1e-4.
    """
    spec = teacher.spec
    stock = plain_stock(scheduler)
    stock.set_timesteps(10)
    x = torch.randn(2, *spec.sample_shape, generator=torch.Generator().manual_seed(0))
    cond = {"class_labels": torch.tensor([0, 0])} if spec.num_classes else {}
    device = next(teacher.network.parameters()).device
    x, cond = x.to(device), {name: value.to(device) for name, value in cond.items()}
    levels = times_of(stock, spec.process)
    # In EDM's units x_0 + sigma eps; what its networks see of unit data has the scale of ours.
    units = [1 / spec.process.level(level)[0] if isinstance(spec.process, LogSigmaVP) else 1.0 for level in levels]
    x = x * (spec.process.level(levels[4])[1] ** 2 + 1) ** 0.5 if spec.prediction_type == "edm" else x
    ours, theirs = x, x * units[4]
    if hasattr(stock, "set_begin_index"):
        stock.set_begin_index(4)
    for i in (4, 5):
        t, s = levels[i], levels[i + 1]
        step = Trajectory(spec.process, t)
        ours = step.state(teacher.denoised(ours, t, cond), ours, torch.tensor([s], dtype=torch.float64))
        scaled = stock.scale_model_input(theirs, stock.timesteps[i])
        output = teacher.call(teacher.network, scaled, stock.timesteps[i].expand(2).to(device), cond)
        theirs = stock.step(output, stock.timesteps[i], theirs).prev_sample
    theirs = theirs / units[6]
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    if not error <= SELF_CHECK_TOLERANCE:
        refuse_non_finite(teacher.network, "unet")
        raise ValueError(
            f"self-check failed: two steps of onestill and of {type(scheduler).__name__} differ by {error:.1e} "
            f"(allowed {SELF_CHECK_TOLERANCE:.0e}): the scheduler's configuration does not say what it does "
            f"(prediction_type={spec.prediction_type!r})"
        )
    return error


def _refuse_unknown_parts(config: Any) -> None:
    if (kind := config.get("time_embedding_type")) != "positional":
        why = "its time input is not continuous or divides the output; only 'positional' is"
        raise ValueError(f"UNet2DModel with time_embedding_type={kind!r} is not supported: {why}")
    if (kind := config.get("class_embed_type")) is not None:
        raise ValueError(f"UNet2DModel with class_embed_type={kind!r} is not supported; only num_class_embeds is")
    if config.out_channels not in (config.in_channels, 2 * config.in_channels):
        raise ValueError(
            f"a UNet2DModel with {config.in_channels} input and {config.out_channels} output channels takes more than "
            "a noisy image (super-resolution or inpainting) and is not supported"
        )
    size = config.sample_size
    if isinstance(size, (list, tuple)) and len(set(size)) > 1:
        shown = f"sample_size {tuple(size)} is not square"
        raise ValueError(f"{shown}: no stock pipeline around a UNet2DModel makes other images")
    if size is None:
        todo = "the shape of an image is unknown; add it to unet/config.json"
        raise ValueError(f"the UNet2DModel's config has no sample_size, so {todo}")


def _count_classes(config: Any, null_class: int | None) -> int | None:
    num = config.num_class_embeds
    if null_class is None:
        return int(num) if num else None
    if not num:
        raise SettingError("null_class", null_class, "the teacher is unconditional", "leave it out")
    if not 0 <= null_class < num:
        raise SettingError("null_class", null_class, f"is not a label of the teacher, which has {num} (0 to {num - 1})")
    return int(num) - 1


def _load_network(folder: Path, source: str, variant: str | None) -> UNet2DModel:
    # Old folders keep the network beside model_index.json, and diffusers reads those too.
    flat = not (folder / "unet").is_dir() and (folder / "config.json").is_file()
    weights = folder if flat else folder / "unet"
    present = sorted(p.name for p in weights.glob("*"))
    name = "diffusion_pytorch_model"
    files = [p for p in present if p.startswith(name) and p.endswith(".safetensors")]
    check_variant("unet", files, source, variant, may_lack=False)
    if not files:
        if pickles := [p for p in present if p.endswith(PICKLE_SUFFIXES)]:
            raise ValueError(
                f"{source}: unet/ holds only the pickle {pickles[0]}, which can run code when loaded. Convert it once where "
                "you trust it: UNet2DModel.from_pretrained(folder, subfolder='unet').save_pretrained(folder + '/unet')"
            )
        raise ValueError(f"{source}: missing weights unet/{name}.safetensors; the folder holds {present or 'nothing'}")
    how = {"variant": variant, "dtype": torch.float32}  # chosen, not the file's
    network, _, unknown = load_model(UNet2DModel, weights, f"{source}: unet/", how)
    if unknown:
        why = f"that unet/config.json has no place for, such as {unknown[0]!r}"
        raise ValueError(f"{source}: the weights hold tensors {why}")
    return network


def _load_scheduler(folder: Path, class_name: str, source: str) -> Any:
    cls = getattr(diffusers, class_name, None)
    if cls is None or not class_name.endswith("Scheduler"):
        raise ValueError(f"{source}: {class_name!r} is no scheduler of diffusers {diffusers.__version__}")
    flat = not (folder / "scheduler").is_dir() and (folder / "scheduler_config.json").is_file()
    place = folder if flat else folder / "scheduler"
    with loading(f"{source}: scheduler/scheduler_config.json"):
        check_configs(place)
        return cls.from_pretrained(place, local_files_only=True)
