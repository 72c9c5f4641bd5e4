"""From a trained student to a folder that stock diffusers loads and samples in one network evaluation.

The target time is baked into the weights, eq. (13), so the network ignores the time it is given. What is left is
the head at the start level, y = A eps + B network(eps), eq. (19). Where A = 0 (v-prediction at zero terminal SNR,
x_0-prediction) B is folded into the last convolution and the scheduler does nothing ("sample"). Elsewhere the
head is a stock DDIM step of a schedule with one level: "epsilon" where A = 1 / alpha, else "v_prediction", with
the rest of B folded. Each export is loaded afresh and compared with the student before it gets its name.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from onestill.core.files import save_tensors, set_usual_mode
from onestill.core.tensors import Cond, noise, to_device, without_autocast
from onestill.diffusion.process import head
from onestill.export.pipeline import lora_words, write_family
from onestill.sampling.generate import Generate, student_generator
from onestill.students import model_card as card
from onestill.students.student import Student
from onestill.teachers.pipelines.schedulers import one_level
from onestill.teachers.pipelines.teacher import PipelineTeacher

SELF_CHECK_TOLERANCE = 1e-4
MODULE_FILE, MODULE_WEIGHTS = "onestill.json", "model.safetensors"


class ExportError(RuntimeError):
    """A written folder does not draw what its student draws."""


@dataclass(frozen=True)
class StartHead:
    """y = a eps + b network(c eps) at the start level, eq. (19)."""

    a: float
    b: float
    c: float
    net_time: float


def start_head(student: Student) -> StartHead:
    """Return the head of a student as plain numbers."""
    spec = student.spec
    t = torch.tensor([spec.t_max], dtype=torch.float64)
    alpha, sigma = spec.process.alpha_sigma(t)
    c_in, c_skip, c_out = head(spec.prediction_type, alpha, sigma, spec.sigma_data)
    scale = torch.hypot(alpha, sigma)
    return StartHead(float(c_skip * scale), float(c_out), float(c_in * scale), float(spec.process.net_time(t)))


def export_student(
    student: Student,
    folder: Path,
    *,
    t: float = 0.0,
    guidance_scale: float | None = None,
    facts: card.Facts | None = None,
    overwrite: bool = False,
) -> float:
    """Write the student as a stock diffusers folder (or, for modules, as safetensors and JSON).

    Args:
        student: The student, with the weights to export.
        folder: Where to; must not exist unless `overwrite`.
        t: Target time to bake in; 0 is the finished image.
        guidance_scale: w to bake in, for students that take it.
        facts: What the model card says besides; nothing more if None.
        overwrite: Replace an existing folder, in one rename, after the new one passed its check.

    Returns:
        The largest difference between the reloaded folder's samples and the student's, same noise.

    Raises:
        ValueError: If `folder` exists.
        RuntimeError: If the self-check fails; nothing is left under the folder's name then.
    """
    if folder.exists() and not overwrite:
        raise ValueError(f"--output {folder} exists; name another folder, or give --overwrite to replace it")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        error = _write_checked(student, partial, t, guidance_scale, facts or card.Facts())
        _put_in_place(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return error


def _write_checked(student: Student, partial: Path, t: float, guidance_scale: float | None, facts: card.Facts) -> float:
    """Write all of an export into an empty folder; return the difference that its self-check found."""
    if isinstance(student.teacher, PipelineTeacher):
        error, facts = write_family(student, student.teacher, partial, t, guidance_scale, facts)
    elif student.spec.family == "unet2d":
        _write_unet2d(student, partial, t, guidance_scale)
        gc.collect()  # the network that was written, whose modules know each other in circles
        error = _check_pipeline(student, partial, t, guidance_scale)
    else:
        _write_module(student, partial, t, guidance_scale)
        gc.collect()
        error = _check_module(student, partial, t, guidance_scale)
    if not error <= SELF_CHECK_TOLERANCE:
        raise ExportError(
            f"export self-check failed: the reloaded folder's images differ from the student's by {error:.1e} "
            f"(allowed {SELF_CHECK_TOLERANCE:.0e})"
        )
    if not facts.license and student.teacher.folder is not None:
        facts = replace(facts, license=card.teacher_license(student.teacher.folder, student.spec.source))
    if student.lora is not None:
        facts = replace(facts, lora=lora_words(student, partial))
    if isinstance(student.teacher, PipelineTeacher):
        family = student.teacher.pipeline_spec
        level = None if family.image_condition is None else family.image_condition.level
        arguments = student.teacher.plain_arguments
        card.write_card(partial, student.spec, facts, error, arguments, family.output_field, noise_level=level)
    else:
        card.write_card(partial, student.spec, facts, error)
    set_usual_mode(partial)
    return error


def _put_in_place(partial: Path, folder: Path) -> None:
    """Give a finished export its name, in the place of an older one if there is one."""
    if folder.exists():
        old = folder.with_name(f".{folder.name}.replaced")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        try:
            os.replace(partial, folder)
        except OSError:
            os.replace(old, folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(partial, folder)


def is_exported(folder: Path) -> bool:
    """Return whether a folder is an exported student: one may be replaced by another, and nothing else may."""
    is_pipeline = (folder / "model_index.json").is_file() and card.is_card(folder / "README.md")
    return is_pipeline or (folder / MODULE_FILE).is_file()


def _write_unet2d(student: Student, folder: Path, t: float, guidance_scale: float | None) -> None:
    from diffusers import ConsistencyModelPipeline

    network: Any = student.bake(t, guidance_scale)
    _drop_null_class(network, student.spec.null_class)
    _drop_variance(network)
    # The stock pipeline wants one number; a square may be written as a pair.
    network.register_to_config(sample_size=student.spec.sample_shape[-1])
    scheduler = _fold_head(network, start_head(student), student.spec.prediction_type)
    ConsistencyModelPipeline(unet=network, scheduler=scheduler).save_pretrained(folder, safe_serialization=True)


def _drop_null_class(network: Any, null_class: int | None) -> None:
    """Remove a null class that stands last, so that random labels of the stock pipeline are all classes."""
    if null_class is None or null_class != network.config.num_class_embeds - 1:
        return
    kept = network.class_embedding.weight.detach()[:null_class].clone()
    network.class_embedding = nn.Embedding(len(kept), kept.shape[1], _weight=kept)
    network.register_to_config(num_class_embeds=null_class)


def _drop_variance(network: Any) -> None:
    """Remove the output channels of a learned variance: one step draws no noise."""
    channels = network.config.in_channels
    if network.config.out_channels == channels:
        return
    last = network.conv_out
    network.conv_out = nn.Conv2d(last.in_channels, channels, last.kernel_size, padding=last.padding)
    network.conv_out.load_state_dict({"weight": last.weight[:channels].clone(), "bias": last.bias[:channels].clone()})
    network.register_to_config(out_channels=channels)


def _fold_head(network: Any, at_start: StartHead, prediction_type: str) -> Any:
    """Fold what a convolution can hold of y = a eps + b network(c eps); return the scheduler that does the rest."""
    with torch.no_grad():
        network.conv_in.weight.mul_(at_start.c)
        if at_start.a == 0:
            _scale_output(network, at_start.b)
            return one_level(0.0, "sample", clip_sample=True)
        if prediction_type == "epsilon":
            return one_level(1 / at_start.a, "epsilon", clip_sample=True)
        _scale_output(network, -at_start.b / (1 - at_start.a**2) ** 0.5)
        return one_level(at_start.a, "v_prediction", clip_sample=True)


def _scale_output(network: Any, factor: float) -> None:
    network.conv_out.weight.mul_(factor)
    network.conv_out.bias.mul_(factor)


@without_autocast
def _check_pipeline(student: Student, folder: Path, t: float, guidance_scale: float | None, num: int = 4) -> float:
    """Return the largest difference of images in [-1, 1] between the folder, loaded afresh, and the student."""
    _, cond, expected = _expected(student, t, guidance_scale, num)
    labels = cond["class_labels"].tolist() if "class_labels" in cond else None
    # On the student's own device: two devices differ by more than an export may (TF32 convolutions, for one).
    images = call_pipeline(load_pipeline(folder, next(student.parameters()).device), range(num), labels)
    return float((images - expected.clamp(-1, 1)).abs().max())


@without_autocast
def _check_module(student: Student, folder: Path, t: float, guidance_scale: float | None, num: int = 4) -> float:
    """Return the largest difference of samples between the written module, loaded afresh, and the student."""
    eps, cond, expected = _expected(student, t, guidance_scale, num)
    fresh = student.bake(t, guidance_scale)
    for parameter in fresh.parameters():
        parameter.data.zero_()
    device = next(student.parameters()).device  # the student's own, as for pipelines
    generate = load_module(folder, fresh.to(device))
    return float((generate(eps.to(device), to_device(cond, device)).cpu() - expected).abs().max())


def _expected(student: Student, t: float, guidance_scale: float | None, num: int) -> tuple[Tensor, Cond, Tensor]:
    """Return (noise, conditions, the student's samples) of a self-check."""
    spec, eps = student.spec, noise(range(num), student.spec.sample_shape)
    cond: Cond = {}
    if spec.num_classes:
        cond["class_labels"] = torch.tensor([spec.labels[i % len(spec.labels)] for i in range(num)])
    asked, device = student.with_scale(cond, guidance_scale, num), next(student.parameters()).device
    return eps, cond, student_generator(student, t=t, device=device)(eps, asked).cpu()


def load_pipeline(folder: Path, device: torch.device | str) -> Any:
    """Return the stock pipeline in `folder`; safetensors only, no remote code, no network."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(
        folder, use_safetensors=True, local_files_only=True, trust_remote_code=False
    ).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call_pipeline(pipeline: Any, seeds: Sequence[int], labels: list[int] | None) -> Tensor:
    """Return the images of an exported pipeline's plain call, [N, C, H, W] in [-1, 1] on the CPU; one seed each."""
    images: Tensor = pipeline(
        batch_size=len(seeds),
        class_labels=labels,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="pt",
    ).images
    return images.cpu() * 2 - 1


def _write_module(student: Student, folder: Path, t: float, guidance_scale: float | None) -> None:
    network, spec = student.bake(t, guidance_scale), student.spec
    weights = {name: value.detach().contiguous().clone() for name, value in network.state_dict().items()}
    save_tensors(weights, folder / MODULE_WEIGHTS)
    at_start = start_head(student)
    description = {
        "kind": "onestill.module",
        "sample_shape": list(spec.sample_shape),
        "head": {"a": at_start.a, "b": at_start.b, "c": at_start.c, "net_time": at_start.net_time},
    }
    (folder / MODULE_FILE).write_text(json.dumps(description, indent=1), encoding="utf-8")


def load_module(folder: str | Path, network: nn.Module) -> Generate:
    """Return one-step generation by a module student that `export_student` wrote.

    Args:
        folder: The exported folder.
        network: A fresh instance of the network that the teacher had; it receives the student's weights.

    Raises:
        ValueError: If the folder is no exported module, or the weights are not of this network.
    """
    folder = Path(folder)
    if not (folder / MODULE_FILE).is_file():
        raise ValueError(f"{folder} is no exported module: it has no {MODULE_FILE}")
    at_start = StartHead(**json.loads((folder / MODULE_FILE).read_text(encoding="utf-8"))["head"])
    _add_missing_biases(network, weights := load_file(folder / MODULE_WEIGHTS))
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"{folder}: the weights are not of this network: {str(error).splitlines()[1].strip()}"
        ) from error
    network.eval()

    @torch.no_grad()
    def generate(eps: Tensor, cond: Cond) -> Tensor:
        net_time = torch.full((len(eps),), at_start.net_time, dtype=eps.dtype, device=eps.device)
        output: Tensor = network(at_start.c * eps, net_time, **cond)
        return at_start.a * eps + at_start.b * output

    return generate


def _add_missing_biases(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give layers without a bias the one that baking wrote for them."""
    for name, layer in network.named_modules():
        key = f"{name}.bias"
        if key in weights and getattr(layer, "bias", key) is None:
            layer.bias = nn.Parameter(weights[key].clone())
