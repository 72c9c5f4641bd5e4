"""Students of pixel teachers: a stock `ConsistencyModelPipeline`, whose one step is eq. (19).

Where a = 0 (v-prediction at zero terminal SNR, x_0-prediction) b is folded into the last convolution and the scheduler
does nothing ("sample"). Elsewhere the head is a stock DDIM step of a schedule with one level: "epsilon" where
a = 1 / alpha, else "v_prediction", with the rest of b folded. c is folded into the first convolution.

Several steps are the pipeline's own loop with a stock scheduler that walks the levels, eq. (28); nothing is folded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ConsistencyModelPipeline, DiffusionPipeline
from torch import Tensor, nn

from onestill.export.base import Format
from onestill.students.bake import constants, tell
from onestill.students.model_card import Facts, shown_labels, stock_code
from onestill.students.one_step import FewSteps, OneStep
from onestill.teachers.pipelines.folder import load_stock
from onestill.teachers.pipelines.schedulers import one_level
from onestill.teachers.pipelines.walks import ddim_walk, edm_walk


class PixelFormat(Format):
    """A pipeline of a `UNet2DModel` and a scheduler of one level, or of K."""

    library = "diffusers"

    def write(self, step: OneStep, folder: Path) -> None:
        network: Any = step.network
        spec, walk = self.student.spec, self._walk(step) if isinstance(step, FewSteps) else None
        _drop_null_class(network, spec.null_class)
        _drop_variance(network)
        # The stock pipeline wants one number; a square may be written as a pair.
        network.register_to_config(sample_size=spec.sample_shape[-1])
        scheduler = _fold_head(step, spec.prediction_type) if walk is None else walk
        ConsistencyModelPipeline(unet=network, scheduler=scheduler).save_pretrained(folder, safe_serialization=True)

    def check(self, folder: Path) -> float:
        eps, cond = self.example(4)
        labels = cond["class_labels"].tolist() if "class_labels" in cond else None
        images = call_pipeline(load_stock(DiffusionPipeline, folder).to(self.device), range(4), labels, self.num_steps)
        return float((images - self.expected(eps, cond).cpu().clamp(-1, 1)).abs().max())

    def code(self, facts: Facts) -> str:
        labels = shown_labels(self.student.spec, facts)
        arguments = f"batch_size={len(labels)}, class_labels={labels}" if labels else "batch_size=4"
        if self.num_steps > 1:
            arguments += f", num_inference_steps={self.num_steps}"
        return stock_code(self.student.teacher.output_field, arguments, num_steps=self.num_steps)

    def _walk(self, step: FewSteps) -> Any:
        """Return the scheduler that walks the levels, and let the network know the times that it is told."""
        teacher, spec, levels = self.student.teacher, self.student.spec, self.student.levels(self.num_steps)
        scheduler = edm_walk(spec, levels) if spec.prediction_type == "edm" else ddim_walk(spec, levels)
        scheduler.set_timesteps(self.num_steps)
        native = [head["net_time"] for head in step.heads]
        tell(teacher, step.network, constants(teacher, step.network, native), scheduler.timesteps.tolist())
        return scheduler


def call_pipeline(pipeline: Any, seeds: Sequence[int], labels: list[int] | None, num_steps: int = 1) -> Tensor:
    """Return the images of an exported pipeline's plain call, [N, C, H, W] in [-1, 1] on the CPU; one seed each."""
    images: Tensor = pipeline(
        batch_size=len(seeds),
        class_labels=labels,
        num_inference_steps=num_steps,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="pt",
    ).images
    return images.cpu() * 2 - 1


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


def _fold_head(step: OneStep, prediction_type: str) -> Any:
    """Fold what a convolution can hold of y = a eps + b network(c eps); return the scheduler that does the rest."""
    network: Any = step.network
    network.conv_in.weight.mul_(step.c)
    if step.a == 0:
        _scale_output(network, step.b)
        return one_level(0.0, "sample", clip_sample=True)
    if prediction_type == "epsilon":
        return one_level(1 / step.a, "epsilon", clip_sample=True)
    _scale_output(network, -step.b / (1 - step.a**2) ** 0.5)
    return one_level(step.a, "v_prediction", clip_sample=True)


def _scale_output(network: Any, factor: float) -> None:
    network.conv_out.weight.mul_(factor)
    network.conv_out.bias.mul_(factor)
