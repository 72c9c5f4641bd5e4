"""What differs between the families of diffusers' pipelines, and what is the same in all of them.

A family is a short description: which pipelines, which component denoises, how its schedule is to be read. What a
pipeline is asked, and how its answers are read by watching it (`recording`), is here too, once for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from onestill.core.tensors import Cond
from onestill.diffusion.process import Process
from onestill.teachers.image_condition import ImageCondition
from onestill.teachers.pipelines.capture import Call, Signature, as_call, record, split
from onestill.teachers.teacher_spec import Threshold

EXAMPLE_PROMPTS = ("a photo", "a drawing of it")
"""The prompts of calls whose pictures do not matter."""


@dataclass(frozen=True)
class Schedule:
    """A pipeline's schedule in our terms.

    Attributes:
        process: The noise process.
        prediction_type: What the network predicts, after `PipelineSpec.sign`.
        stock: A deterministic scheduler of diffusers on the same schedule, for the self-check.
        threshold: What the pipeline's own sampler does to x_0.
    """

    process: Process
    prediction_type: str
    stock: Any
    threshold: Threshold = field(default_factory=Threshold)


@dataclass(frozen=True)
class PipelineSpec:
    """A family of pipelines.

    Attributes:
        name: Short name, such as "stable_diffusion".
        pipelines: Class names of the pipelines.
        network: The component that denoises: "unet" or "transformer".
        schedule: From the pipeline to its schedule.
        decode: From (pipeline, what the network makes) to images; None where that is the images already.
        one_step: From (pipeline, prediction_type, alpha at the start level) to the scheduler of an exported student.
        arguments: Arguments of every call of the pipeline.
        given: Those of them that were asked for, such as a size.
        result: From what a call with output_type="pt" returns to images in [-1, 1], as `decode` gives them.
        guidance: Name of the call's argument for the guidance scale; None if it has none.
        guidance_input: Name of the network's argument for the guidance scale, where it may take that as an input.
        prompt: Name of the call's argument for conditions: "prompt" or "class_labels".
        sign: Factor on the network's output that makes it what the prediction type says.
        export_arguments: Arguments of the plain call of an exported student, besides the condition.
        null_class: From the network's config to the label of "no class", for class-conditional families.
        adapt: Last changes to the network's config before a student is written.
        image_condition: The picture that is given beside x_t, in super-resolution.
        without: Optional components that are neither loaded nor written.
        size: From the pipeline to arguments of every call that follow from its configuration.
        pack: From (latents, constant arguments of the call) to what the network sees, where that is a permutation.
        unpack: The inverse of `pack`.
        set_size: From (network, height and width of x_t) to whether the class's own default size is now that one.
        cut: From (pipeline, what `decode` gives, arguments of every call) to what the pipeline returns of it.
        output_field: Where the pipeline's output has its results: "images", "frames" or "audios".
        on_pixels: Whether `decode` is given pixels, such as to threshold them, and no latents.
    """

    name: str
    pipelines: tuple[str, ...]
    network: str
    schedule: Callable[[Any], Schedule]
    decode: Callable[[Any, Tensor], Tensor] | None
    one_step: Callable[[Any, str, float], Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)
    result: Callable[[Any], Tensor] = lambda output: output.images * 2 - 1
    guidance: str | None = "guidance_scale"
    guidance_input: str | None = None
    prompt: str = "prompt"
    sign: float = 1.0
    export_arguments: Mapping[str, Any] = field(
        default_factory=lambda: {"num_inference_steps": 1, "guidance_scale": 1.0}
    )
    null_class: Callable[[Any], int] | None = None
    adapt: Callable[[nn.Module], None] = lambda network: None
    image_condition: ImageCondition | None = None
    without: tuple[str, ...] = ()
    size: Callable[[Any], Mapping[str, Any]] = lambda pipeline: {}
    pack: Callable[[Tensor, Mapping[str, Any]], Tensor] = lambda latents, constant: latents
    unpack: Callable[[Tensor, Mapping[str, Any]], Tensor] = lambda packed, constant: packed
    set_size: Callable[[Any, tuple[int, int]], bool] = lambda network, size: False
    cut: Callable[[Any, Tensor, Mapping[str, Any]], Tensor] = lambda pipeline, decoded, arguments: decoded
    output_field: str = "images"
    on_pixels: bool = False

    @property
    def has_decoder(self) -> bool:
        """Whether the network works on latents, which a decoder makes images of."""
        return self.decode is not None and not self.on_pixels

    def with_arguments(self, arguments: Mapping[str, Any]) -> PipelineSpec:
        """Return the family with these arguments in every call."""
        return replace(self, arguments={**self.arguments, **arguments}, given={**self.given, **arguments})

    def call(
        self, pipeline: Any, conditions: Sequence[Any], arguments: Mapping[str, Any], *, seeds: Sequence[int] = ()
    ) -> Any:
        """Call the stock pipeline for some prompts (or labels) and return what it returns.

        Args:
            pipeline: The pipeline.
            conditions: Prompts, or labels.
            arguments: Further arguments of its call; they win over the family's own.
            seeds: One for each image; the global random state if there are none.
        """
        generators = [torch.Generator().manual_seed(seed) for seed in seeds] or None
        given = {self.prompt: list(conditions), "generator": generators, **self.size(pipeline), **self.arguments}
        if self.image_condition is not None:
            given |= self.image_condition.arguments(
                self.image_condition.example(pipeline, len(conditions)), self.image_condition.level
            )
        return pipeline(**{**given, **arguments})

    def sort_call(self, call: Call, pipeline: Any) -> Call:
        """Return a recorded call with x_t alone as its noisy input."""
        if self.image_condition is None:
            return call
        return split(
            call, self.image_condition.name, self.image_condition.channels(getattr(pipeline, self.network).config)
        )

    def calls(
        self,
        pipeline: Any,
        conditions: Sequence[Any],
        scale: float,
        until: Any = None,
        *,
        seeds: Sequence[int] = (),
        arguments: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[Call]:
        """Return the first network call of the pipeline for these conditions; with `until` all of its first step."""
        given = {"num_inference_steps": 2, **self.guidance_argument(scale), **arguments}
        run = lambda: self.call(pipeline, conditions, given, seeds=seeds)  # noqa: E731 - passed on at once
        return [self.sort_call(call, pipeline) for call in record(run, getattr(pipeline, self.network), until)]

    def one_step_time(self, pipeline: Any) -> float:
        """Return the time that an exported student's plain call gives its network, which computes nothing here."""
        run = lambda: self.call(pipeline, examples(self, 1), self.export_arguments)  # noqa: E731 - passed on at once
        (call,) = record(run, getattr(pipeline, self.network))
        return float(call.net_time.reshape(-1)[0])

    @torch.no_grad()
    def plain_call(self, pipeline: Any, signature: Signature, num: int) -> tuple[Tensor, Tensor, Cond]:
        """Return (images in [-1, 1], the noise they came from, their conditions) of an exported student's plain call."""
        conditions = examples(self, num)
        seen: list[Call] = []
        hook = getattr(pipeline, self.network).register_forward_pre_hook(
            lambda _network, args, kwargs: seen.append(as_call(args, kwargs)), with_kwargs=True
        )
        try:
            output = self.call(pipeline, conditions, {**self.export_arguments, "output_type": "pt"}, seeds=range(num))
        finally:
            hook.remove()
        if len(seen) != 1 or len(seen[0].x_t) != num:
            raise RuntimeError(f"the exported pipeline's plain call evaluated its network {len(seen)} times, not once")
        call = self.sort_call(seen[0], pipeline)
        eps = self.unpack(call.x_t, signature.constant)
        return self.result(output), eps, signature.conditions(call)

    def signature(self, pipeline: Any) -> tuple[Signature, Call]:
        """Return (how the pipeline calls its network, seen in calls for one image and for two; the call for one)."""
        one, two = (self.calls(pipeline, examples(self, num), 1.0, seeds=range(num))[0] for num in (1, 2))
        return Signature.of(one, two, None if self.image_condition is None else self.image_condition.name), one

    @torch.no_grad()
    def encode(self, pipeline: Any, signature: Signature, prompts: Sequence[Any], seeds: Sequence[int] = ()) -> Cond:
        """Return the conditions that the pipeline makes of prompts, one row each.

        Args:
            pipeline: The pipeline.
            signature: How it calls its network.
            prompts: The prompts.
            seeds: For what the pipeline draws on the way; 0, 1, ... if there are none.
        """
        (call,) = self.calls(pipeline, prompts, 1.0, seeds=seeds or range(len(prompts)))
        return signature.conditions(call)

    @torch.no_grad()
    def null_conditions(self, pipeline: Any, signature: Signature, negative_prompt: str | None = None) -> Cond:
        """Return the conditions of the unguided half of a guided step; {} if the pipeline does not guide.

        A pipeline either calls its network once with both halves, "no prompt" first, or twice, the prompt first.

        Args:
            pipeline: The pipeline.
            signature: How it calls its network.
            negative_prompt: In the place of "no prompt".
        """
        if self.guidance is None:
            return {}
        own = {} if negative_prompt is None else {"negative_prompt": [negative_prompt]}
        calls = self.calls(pipeline, examples(self, 1), 2.0, pipeline.scheduler, seeds=(0,), arguments=own)
        rows = signature.conditions(calls[-1])
        if len(calls) == 1 and all(len(value) == 1 for value in rows.values()):
            return {}
        kept = () if self.image_condition is None else self.image_condition.kept
        return {name: value[:1] for name, value in rows.items() if name not in kept}

    @contextmanager
    def encoded(self, pipeline: Any, signature: Signature, cond: Cond) -> Iterator[None]:
        """Let the pipeline's network see these conditions in place of those of the prompts that it is called for."""

        def put(_network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            call = self.sort_call(as_call(args, kwargs), pipeline)
            args, named = signature.arguments(call.x_t, call.net_time, cond)
            return args, {**named, "return_dict": kwargs.get("return_dict", True)}

        hook = getattr(pipeline, self.network).register_forward_pre_hook(put, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def guidance_argument(self, scale: float) -> dict[str, Any]:
        """Return the argument that sets the guidance scale, if the pipeline has one."""
        return {} if self.guidance is None else {self.guidance: scale}


def examples(family: PipelineSpec, num: int) -> list[Any]:
    """Return some valid prompts or labels."""
    return [0] * num if family.prompt == "class_labels" else list(EXAMPLE_PROMPTS[:num])
