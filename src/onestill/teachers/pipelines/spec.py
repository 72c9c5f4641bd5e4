"""What differs between the families of diffusers' pipelines: a short description of each.

Which pipelines, which component denoises, how its schedule is to be read. What is the same in all of them, how they
are called and how their answers are read by watching them, is in `calls` and `capture`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from onestill.diffusion.process import Process
from onestill.teachers.image_condition import ImageCondition
from onestill.teachers.teacher_spec import TeacherSpec, Threshold


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
        few_steps: From (pipeline, the teacher's facts, start levels) to the schedulers that a student of several steps may
            be exported with, of which the first is taken that the pipeline's call sets to these levels; ValueError, or None
            here, if there is none.
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
        trim: From (pipeline, what `decode` gives, arguments of every call) to what the pipeline returns of it.
        output_field: Where the pipeline's output has its results: "images", "frames" or "audios".
        on_pixels: Whether `decode` is given pixels, such as to threshold them, and no latents.
    """

    name: str
    pipelines: tuple[str, ...]
    network: str
    schedule: Callable[[Any], Schedule]
    decode: Callable[[Any, Tensor], Tensor] | None
    one_step: Callable[[Any, str, float], Any]
    few_steps: Callable[[Any, TeacherSpec, Sequence[float]], Sequence[Any]] | None = None
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
    trim: Callable[[Any, Tensor, Mapping[str, Any]], Tensor] = lambda pipeline, decoded, arguments: decoded
    output_field: str = "images"
    on_pixels: bool = False

    @property
    def has_decoder(self) -> bool:
        """Whether the network works on latents, which a decoder makes images of."""
        return self.decode is not None and not self.on_pixels

    def with_arguments(self, arguments: Mapping[str, Any]) -> PipelineSpec:
        """Return the family with these arguments in every call."""
        return replace(self, arguments={**self.arguments, **arguments}, given={**self.given, **arguments})

    def in_steps(self, num_steps: int) -> PipelineSpec:
        """Return the family whose exported student is called with another number of steps."""
        return replace(self, export_arguments={**self.export_arguments, "num_inference_steps": num_steps})

    def guided_by(self, name: str) -> PipelineSpec:
        """Return the family of a pipeline whose network takes the guidance scale as the input `name`.

        Its calls leave the scale at the pipeline's own default; what the network is told else, is put there.
        """
        without = {key: value for key, value in self.export_arguments.items() if key != self.guidance}
        return replace(self, guidance=None, guidance_input=name, export_arguments=without)

    def guidance_argument(self, scale: float) -> dict[str, Any]:
        """Return the argument that sets the guidance scale, if the pipeline has one."""
        return {} if self.guidance is None else {self.guidance: scale}
