"""Exported pipelines as samplers: their own call, one step or the few they were exported for, on noise that is given."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from onestill.core.arguments import checked
from onestill.core.errors import RunError, SettingError, named
from onestill.core.memory import is_out_of_memory
from onestill.core.patch import replaced
from onestill.core.reading import reason
from onestill.core.tensors import Cond
from onestill.data.cascade import FirstStage, check_shape, second_noise
from onestill.sampling.generate import Rows
from onestill.sampling.samplers.base import Sampler
from onestill.students import model_card as card
from onestill.students.injection import time_embeddings
from onestill.students.mark import is_student, read_mark
from onestill.teachers.load import FAMILY_OF_PIPELINE, check_arguments, read_index
from onestill.teachers.pipelines import token_limits
from onestill.teachers.pipelines.calls import PipelineCalls
from onestill.teachers.pipelines.capture import Signature, record
from onestill.teachers.pipelines.folder import load_stock, pipeline_class
from onestill.teachers.pipelines.generic import plain_family
from onestill.teachers.pipelines.spec import PipelineSpec
from onestill.teachers.pipelines.teacher import read_call
from onestill.teachers.pixel import PIPELINES as UNET2D_PIPELINES
from onestill.teachers.prompt_limits import EXAMPLE, PromptLimit


def enlarges(folder: Path) -> bool:
    """Return whether an exported pipeline enlarges the picture of an earlier stage."""
    try:
        family = FAMILY_OF_PIPELINE.get(read_index(folder, str(folder))["_class_name"])
    except ValueError:
        return False  # opening it says what is wrong
    return family is not None and family.image_condition is not None


def open_pipeline(
    folder: Path,
    device: torch.device | str = "cpu",
    *,
    distilled: card.Distilled | None = None,
    noise_level: int | None = None,
    first_stage: FirstStage | None = None,
    trained: Callable[[], Sampler] | None = None,
) -> PipelineSampler:
    """Return the steps of an exported pipeline, mostly one: its own components, on noise that is given.

    Args:
        folder: The exported pipeline.
        device: Where it goes.
        distilled: What was distilled into it; what its card says if None.
        noise_level: How much noise is mixed into the pictures that it enlarges; what its card says if None.
        first_stage: The student that draws those, if it enlarges some.
        trained: Opens the student whose export it is, which can go to other target times.

    Raises:
        SettingError: If it does not load.
    """
    distilled = card.distilled(folder) if distilled is None else distilled
    level = card.noise_level(folder) if noise_level is None else noise_level
    try:
        index = read_index(folder, "the folder")
        pipeline, spec = load_stock(pipeline_class(index["_class_name"]), folder).to(device), None
        if index["_class_name"] not in UNET2D_PIPELINES:
            spec = FAMILY_OF_PIPELINE.get(index["_class_name"]) or plain_family(index, pipeline)
            check_arguments(given := read_call(folder), index["_class_name"])
            spec = spec.with_arguments(given)
        network = pipeline.unet if spec is None else getattr(pipeline, spec.network)
        # Where the time cannot be seen to enter, the folder may be of a student that somebody else wrote again.
        if time_embeddings(network) and not is_student(folder, network):
            raise ValueError(f"it is a pipeline of many steps, no one-step student; {named('teacher')} draws with it")
        mark, given = read_mark(folder), {"first_stage": first_stage, "noise_level": level}
        num_steps = 1 if mark is None else mark.num_inference_steps
        sampler = PipelineSampler(pipeline, spec, distilled, device, num_steps=num_steps, **given)
        if mark is not None and mark.sample_shape != sampler.sample_shape:
            raise ValueError(f"its samples have shape {sampler.sample_shape}, and its mark says {mark.sample_shape}")
    except Exception as error:  # a call with arguments of a wrong kind ends in errors of every kind
        if isinstance(error, RunError) or is_out_of_memory(error):
            raise
        own = isinstance(error, (OSError, ValueError)) and str(error)
        why = str(error).splitlines()[0] if own else reason(error)
        raise SettingError("student", str(folder), f"does not load: {why}") from error
    if first_stage is not None:
        check_shape(first_stage, sampler.sample_shape)
    sampler.name, sampler.trained = f"the student in {folder}", trained
    return sampler


@final
class PipelineSampler(Sampler):
    """The steps of an exported pipeline by its own call; its target time and its guidance scale are baked in.

    Pipelines of a `UNet2DModel` take neither noise nor labels: there it is the steps of their network and scheduler.

    Args:
        pipeline: The pipeline.
        spec: What is known of pipelines of its kind; None for those of a `UNet2DModel`.
        distilled: What was distilled into it.
        device: Where it is.
        first_stage: The student that draws the pictures that it enlarges, if it does.
        noise_level: How much noise is mixed into them; the pipeline's own level if None.
        num_steps: The steps that it was exported for.

    Attributes:
        trained: Opens the student whose export it is, which can go to other target times; None where it is not at hand.
    """

    trained: Callable[[], Sampler] | None = None

    def __init__(
        self,
        pipeline: Any,
        spec: PipelineSpec | None,
        distilled: card.Distilled,
        device: torch.device | str,
        *,
        first_stage: FirstStage | None = None,
        noise_level: int | None = None,
        num_steps: int = 1,
    ) -> None:
        self.pipeline, self.device, self.first_stage = pipeline, device, first_stage
        self.num_steps = self.evaluations = num_steps
        self.takes_noise = first_stage is None and "latents" in inspect.signature(pipeline.__call__).parameters
        if spec is None:
            config, size = pipeline.unet.config, pipeline.unet.config.sample_size
            self.sample_shape = (config.in_channels, *((size, size) if isinstance(size, int) else size))
            self.labels = tuple(i for i in range(config.num_class_embeds or 0) if i != distilled.null_class)
        else:
            spec = spec.in_steps(num_steps)
            self.calls, self.given, self.arguments = (
                PipelineCalls(spec, pipeline),
                {**spec.export_arguments},
                spec.given,
            )
            (self.seen,) = record(lambda: self.calls(self.calls.examples(1), self.given), self.calls.network)
            start = spec.unpack(self.calls.sorted(self.seen).x_t, self.seen.arguments)
            self.sample_shape, self.takes_text = tuple(start.shape[1:]), spec.prompt == "prompt"
            self.labels = () if spec.null_class is None else tuple(range(spec.null_class(self.calls.network.config)))
            self.has_decoder, self.gives_latents = spec.has_decoder, self.takes_noise and spec.has_decoder
        self.labels = distilled.class_labels or self.labels
        self._step = self._of_network if spec is None else self._images
        if first_stage is not None:
            assert spec is not None and spec.image_condition is not None
            first_stage.teacher.lend_encoders(pipeline)
            self.evaluations += 1
            self.noise_level = spec.image_condition.level if noise_level is None else noise_level

    def __call__(self, eps: Tensor, rows: Rows) -> Tensor:
        if not self.takes_text or "prompt" in rows:
            return self._step(eps, rows)
        with self.calls.encoded(self._signature, rows):
            return self._step(eps, {"prompt": [""] * len(eps)})

    @torch.no_grad()
    def _of_network(self, eps: Tensor, rows: Rows) -> Tensor:
        network, scheduler = self.pipeline.unet, self.pipeline.scheduler
        scheduler.set_timesteps(self.num_steps)
        x = eps.to(network.device) * scheduler.init_noise_sigma
        labels = rows["class_labels"].to(network.device) if "class_labels" in rows else None
        for t in scheduler.timesteps:
            output = network(scheduler.scale_model_input(x, t), t, class_labels=labels).sample
            x = scheduler.step(output, t, x).prev_sample
        return x.clamp(-1, 1)

    def _images(self, eps: Tensor, rows: Rows) -> Tensor:
        return self.calls.spec.result(self._called(eps, rows, "pt")).float().clamp(-1, 1)

    def _called(self, eps: Tensor, rows: Rows, output_type: str) -> Any:
        spec, given = self.calls.spec, {**self.given, "output_type": output_type}
        shown = rows["prompt"] if self.takes_text else rows["class_labels"].tolist()
        draws = [spec.pack(eps.to(self.device), self.seen.arguments)]
        if self.takes_noise:
            return self.calls(shown, {**given, "latents": draws[0]})
        if self.first_stage is not None and spec.image_condition is not None and self.noise_level is not None:
            pictures = self.first_stage.seeded(rows["seed"], shown).to(self.device)
            given |= spec.image_condition.arguments(pictures, self.noise_level)
            # Its first draw is where it starts, its second the noise in the picture.
            draws.append(second_noise(rows["seed"], self.sample_shape).to(self.device))
        with _drawing(self.pipeline, *draws):
            return self.calls(shown, given)

    def latents(self, eps: Tensor, rows: Rows) -> Tensor:
        latents: Tensor = self._called(eps, rows, "latent")[0]
        return latents

    @checked()
    def encode(self, prompts: Sequence[str]) -> Cond:
        return self.calls.encode(self._signature, prompts)

    @functools.cached_property
    def _signature(self) -> Signature:
        return self.calls.signature()[0]

    @functools.cached_property
    def prompt_limits(self) -> tuple[PromptLimit, ...]:
        if not self.takes_text:
            return ()
        with token_limits.listening(self.pipeline) as calls:
            record(lambda: self.calls([EXAMPLE], self.given), self.calls.network)
        return token_limits.limits(calls)

    @checked()
    def at(
        self,
        *,
        guidance_scale: float | None = None,
        target_time: float | None = None,
        num_inference_steps: int | None = None,
    ) -> Sampler:
        own = guidance_scale is target_time is None and num_inference_steps in (None, self.num_steps)
        at = super().at if own or self.trained is None else self.trained().at
        return at(guidance_scale=guidance_scale, target_time=target_time, num_inference_steps=num_inference_steps)


@contextmanager
def _drawing(pipeline: Any, *draws: Tensor) -> Iterator[None]:
    """Let a pipeline that takes no `latents` draw given noise, in this order: its module uses `randn_tensor`."""
    module: Any = sys.modules[type(pipeline).__module__]
    draw, given = module.randn_tensor, list(draws)

    def drawn(shape: Sequence[int], *args: Any, **kwargs: Any) -> Any:
        return given.pop(0) if given and tuple(shape) == tuple(given[0].shape) else draw(shape, *args, **kwargs)

    with replaced(module, "randn_tensor", drawn):
        yield
