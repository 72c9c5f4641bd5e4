"""Exported pipelines as samplers: their own call, one step, on noise that is given."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import diffusers
import torch
from torch import Tensor, nn

from onestill.core.errors import SettingError, named
from onestill.core.patch import replaced
from onestill.core.tensors import Cond
from onestill.data.cascade import FirstStage, check_shape, second_noise
from onestill.sampling.generate import Rows
from onestill.sampling.samplers.base import Sampler
from onestill.students import model_card as card
from onestill.students.injection import time_embeddings
from onestill.students.mark import is_student
from onestill.teachers.load import FAMILY_OF_PIPELINE, read_index
from onestill.teachers.pipelines import token_limits
from onestill.teachers.pipelines.calls import PipelineCalls
from onestill.teachers.pipelines.capture import Signature, record
from onestill.teachers.pipelines.folder import load_stock
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
) -> ExportedSampler:
    """Return the one step of an exported pipeline: its own components, on noise that is given.

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
    try:
        index = read_index(folder, "the folder")
        pipeline = load_stock(getattr(diffusers, index["_class_name"]), folder).to(device)
        if index["_class_name"] in UNET2D_PIPELINES:
            _check_steps(pipeline.unet, folder)
            made: ExportedSampler = PixelPipelineSampler(pipeline, distilled)
        else:
            family = FAMILY_OF_PIPELINE.get(index["_class_name"]) or plain_family(index, pipeline)
            _check_steps(getattr(pipeline, family.network), folder)
            family = family.with_arguments(read_call(folder))
            if first_stage is None:
                made = PipelineSampler(pipeline, family, distilled, device)
            else:
                level = card.noise_level(folder) if noise_level is None else noise_level
                made = EnlargingSampler(pipeline, family, first_stage, level, device)
    except (OSError, ValueError, AttributeError) as error:
        raise SettingError("student", str(folder), f"does not load: {str(error).splitlines()[0]}") from error
    if first_stage is not None:
        check_shape(first_stage, made.sample_shape)
    made.name, made.trained = f"the student in {folder}", trained
    return made


def _check_steps(network: nn.Module, folder: Path) -> None:
    # Where the time cannot be seen to enter, the folder may be of a student that somebody else wrote again.
    if time_embeddings(network) and not is_student(folder, network):
        raise ValueError(f"it is a pipeline of many steps, no one-step student; {named('teacher')} draws with it")


class ExportedSampler(Sampler):
    """An exported student: its target time and its guidance scale are baked in.

    Attributes:
        trained: Opens the student whose export it is, which can go to other target times; None where it is not at hand.
    """

    name = "an exported student"
    trained: Callable[[], Sampler] | None = None

    def at(self, *, guidance_scale: float | None = None, target_time: float | None = None) -> Sampler:
        if self.trained is None or guidance_scale is target_time is None:
            return super().at(guidance_scale=guidance_scale, target_time=target_time)
        return self.trained().at(guidance_scale=guidance_scale, target_time=target_time)


@final
class PixelPipelineSampler(ExportedSampler):
    """The one step of a stock pipeline around a `UNet2DModel`, by its own network and scheduler.

    Args:
        pipeline: The pipeline.
        distilled: What was distilled into it.
    """

    def __init__(self, pipeline: Any, distilled: card.Distilled) -> None:
        self.network, self.scheduler = pipeline.unet, pipeline.scheduler
        config = self.network.config
        size = config.sample_size
        self.sample_shape = (config.in_channels, *((size, size) if isinstance(size, int) else size))
        classes = range(config.num_class_embeds or 0)
        self.labels = distilled.class_labels or tuple(i for i in classes if i != distilled.null_class)
        self.scheduler.set_timesteps(1)

    @torch.no_grad()
    def __call__(self, eps: Tensor, rows: Rows) -> Tensor:
        network, scheduler, t = self.network, self.scheduler, self.scheduler.timesteps[0]
        x = eps.to(network.device) * scheduler.init_noise_sigma
        labels = rows["class_labels"].to(network.device) if "class_labels" in rows else None
        images: Tensor = scheduler.step(network(x, t, class_labels=labels).sample, t, x).prev_sample
        return images


class _CalledSampler(ExportedSampler):
    """The plain call of an exported pipeline of a family, seen once to know its shapes."""

    def __init__(self, pipeline: Any, family: PipelineSpec, device: torch.device | str) -> None:
        self.calls, self.pipeline, self.family, self.device = PipelineCalls(family, pipeline), pipeline, family, device
        self.given = dict(family.export_arguments)
        (self.seen,) = record(lambda: self.calls(self.calls.examples(1), self.given), self.calls.network)
        self.takes_text, self.has_decoder = family.prompt == "prompt", family.has_decoder
        self.arguments = family.given

    @functools.cached_property
    def prompt_limits(self) -> tuple[PromptLimit, ...]:
        if not self.takes_text:
            return ()
        with token_limits.listening(self.pipeline) as calls:
            record(lambda: self.calls([EXAMPLE], self.given), self.calls.network)
        return token_limits.limits(calls)


@final
class PipelineSampler(_CalledSampler):
    """The plain call of an exported pipeline that draws what a prompt or a label says.

    Args:
        pipeline: The pipeline.
        family: Its family.
        distilled: What was distilled into it.
        device: Where it is.
    """

    def __init__(
        self, pipeline: Any, family: PipelineSpec, distilled: card.Distilled, device: torch.device | str
    ) -> None:
        super().__init__(pipeline, family, device)
        start = family.unpack(self.calls.sorted(self.seen).x_t, self.seen.arguments)
        self.sample_shape = tuple(start.shape[1:])
        classes = 0 if family.null_class is None else family.null_class(self.calls.network.config)
        self.labels = distilled.class_labels or tuple(range(classes))
        self._takes_noise = "latents" in inspect.signature(pipeline.__call__).parameters
        self.gives_latents = self._takes_noise and family.has_decoder

    def __call__(self, eps: Tensor, rows: Rows) -> Tensor:
        if not self.takes_text or "prompt" in rows:
            return self._images(eps, rows)
        with self.calls.encoded(self._signature, rows):
            return self._images(eps, {"prompt": [""] * len(eps)})

    def latents(self, eps: Tensor, rows: Rows) -> Tensor:
        latents: Tensor = self._called(eps, rows, "latent")[0]
        return latents

    def encode(self, prompts: Sequence[str]) -> Cond:
        return self.calls.encode(self._signature, prompts)

    @functools.cached_property
    def _signature(self) -> Signature:
        return self.calls.signature()[0]

    def _images(self, eps: Tensor, rows: Rows) -> Tensor:
        return self.family.result(self._called(eps, rows, "pt")).float().clamp(-1, 1)

    def _called(self, eps: Tensor, rows: Rows, output_type: str) -> Any:
        shown = rows["prompt"] if self.takes_text else rows["class_labels"].tolist()
        packed = self.family.pack(eps.to(self.device), self.seen.arguments)
        given = {**self.given, "output_type": output_type}
        if self._takes_noise:
            return self.calls(shown, {**given, "latents": packed})
        with _drawing(self.pipeline, packed):
            return self.calls(shown, given)


@final
class EnlargingSampler(_CalledSampler):
    """The plain call of an exported pipeline that enlarges the pictures of a first stage.

    Args:
        pipeline: The pipeline.
        family: Its family.
        first_stage: The student that draws the pictures.
        noise_level: How much noise is mixed into them; the pipeline's own level if None.
        device: Where it is.
    """

    evaluations = 2

    def __init__(
        self,
        pipeline: Any,
        family: PipelineSpec,
        first_stage: FirstStage,
        noise_level: int | None,
        device: torch.device | str,
    ) -> None:
        super().__init__(pipeline, family, device)
        assert family.image_condition is not None
        self.condition, self.first_stage = family.image_condition, first_stage
        self.sample_shape = tuple(self.calls.sorted(self.seen).x_t.shape[1:])
        first_stage.teacher.lend_encoders(pipeline)
        self.noise_level = self.condition.level if noise_level is None else noise_level

    def __call__(self, eps: Tensor, rows: Rows) -> Tensor:
        assert self.first_stage is not None and self.noise_level is not None
        pictures = self.first_stage.seeded(rows["seed"], rows["prompt"]).to(self.device)
        given = {**self.given, **self.condition.arguments(pictures, self.noise_level), "output_type": "pt"}
        # Its first draw is where it starts, its second the noise in the picture.
        blur = second_noise(rows["seed"], self.sample_shape)
        with _drawing(self.pipeline, eps.to(self.device), blur.to(self.device)):
            return self.family.result(self.calls(rows["prompt"], given)).float().clamp(-1, 1)


@contextmanager
def _drawing(pipeline: Any, *draws: Tensor) -> Iterator[None]:
    """Let a pipeline that takes no `latents` draw given noise, in this order: its module uses `randn_tensor`."""
    module: Any = sys.modules[type(pipeline).__module__]
    draw, given = module.randn_tensor, list(draws)

    def drawn(shape: Sequence[int], *args: Any, **kwargs: Any) -> Any:
        return given.pop(0) if given and tuple(shape) == tuple(given[0].shape) else draw(shape, *args, **kwargs)

    with replaced(module, "randn_tensor", drawn):
        yield
