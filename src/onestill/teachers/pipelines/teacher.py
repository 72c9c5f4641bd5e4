"""The teacher inside a stock pipeline: its prompts, its decoder, and the stock folder of its student."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import ConfigDict, Field, StrictBool
from torch import Tensor, nn

from onestill.core.errors import SettingError
from onestill.core.reading import OwnFile, read_object
from onestill.core.tensors import Cond
from onestill.teachers.base import NetworkTeacher, Teacher
from onestill.teachers.image_condition import ImageCondition
from onestill.teachers.pipelines import text_encoders as encoders
from onestill.teachers.pipelines import token_limits
from onestill.teachers.pipelines.calls import PipelineCalls
from onestill.teachers.pipelines.capture import Signature
from onestill.teachers.pipelines.folder import load_stock, options
from onestill.teachers.pipelines.spec import PipelineSpec
from onestill.teachers.prompt_limits import EXAMPLE, PromptLimit
from onestill.teachers.teacher_spec import TeacherSpec

CALL_FILE = "onestill_call.json"
"""In an exported folder: the arguments of the call that a student was distilled at, if any were asked for."""
CALL_NOTES = ("num_inference_steps", "scheduler")
"""What that file says besides, for readers: one step, and the class of the scheduler that makes it."""
SIZES = ("height", "width", "num_frames")
"""Arguments of a call that decide no condition of a prompt but by a value of its own, or its shape."""
PLAIN = (bool, int, float, str)


def _is_plain(value: Tensor) -> bool:
    return not value.is_complex() and (not value.is_floating_point() or torch.equal(value, value.round(decimals=3)))


class PipelineTeacher(NetworkTeacher):
    """A teacher inside a stock pipeline: besides its network it has prompts, a decoder, and a folder to write.

    Its text encoders may be released once the prompts are encoded; `signature` says how its network is called.
    """

    folder: Path
    student_format = "pipeline"

    def __init__(
        self,
        pipeline_spec: PipelineSpec,
        pipeline: Any,
        folder: Path,
        spec: TeacherSpec,
        signature: Signature,
        null_cond: Cond,
        example_cond: Cond,
        variant: str | None = None,
    ) -> None:
        super().__init__(getattr(pipeline, pipeline_spec.network), spec)
        self.pipeline_spec, self.pipeline, self.folder, self.variant = pipeline_spec, pipeline, folder, variant
        self.signature, self.null_cond, self.example_cond = signature, null_cond, example_cond
        self.arguments, self.output_field = pipeline_spec.given, pipeline_spec.output_field
        self.has_decoder, self.clamps = pipeline_spec.has_decoder, pipeline_spec.decode is not None
        self._encoders = tuple(encoders.parts(pipeline))

    def call(self, network: Callable[..., Any], x_t: Tensor, net_time: Tensor, cond: Cond) -> Tensor:
        x_t = self.pipeline_spec.pack(x_t, self.signature.constant)
        output = self.signature(network, x_t, net_time, cond)
        output = output[:, : x_t.shape[1]] if output.shape != x_t.shape else output
        return self.pipeline_spec.sign * self.pipeline_spec.unpack(output, self.signature.constant)

    def to(self, device: torch.device | str) -> Self:
        """Move the network, the decoder and the text encoders to `device`."""
        self.pipeline.to(device)
        return self

    @property
    def calls(self) -> PipelineCalls:
        """The calls of its pipeline."""
        return PipelineCalls(self.pipeline_spec, self.pipeline)

    @property
    def kind(self) -> str:
        return type(self.pipeline).__name__

    @property
    def guidance_input(self) -> str | None:
        name = self.pipeline_spec.guidance_input
        return name if name in self.example_cond else None

    @property
    def usual_guidance(self) -> float:
        return 1.0 if self.guidance_input is None else self.calls.usual_guidance

    def guidance_rows(self, scales: Tensor) -> Tensor:
        if (name := self.guidance_input) is None:
            return super().guidance_rows(scales)
        usual, embed = self.example_cond[name], getattr(self.pipeline, "get_guidance_scale_embedding", None)
        if usual.ndim == 2 and embed is not None:
            rows: Tensor = embed(scales.cpu().float() - 1, embedding_dim=usual.shape[1])
            return rows
        return scales * (usual.reshape(-1)[0] / self.usual_guidance).to(scales)

    def with_decoder(self, decode: Callable[[Any, Tensor], Tensor]) -> Self:
        """Return the teacher with another way of decoding its pipeline's latents."""
        return self._changed(pipeline_spec=replace(self.pipeline_spec, decode=decode))

    # Prompts

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], seeds: Sequence[int] = ()) -> Cond:
        self._refuse_released()
        return self.calls.encode(self.signature, prompts, seeds)

    @torch.no_grad()
    def encode_negative(self, prompt: str) -> Cond:
        self._refuse_released()
        return self.calls.null_conditions(self.signature, prompt)

    def _refuse_released(self) -> None:
        if self.encoders_released:
            raise RuntimeError("the text encoders of this teacher were released; load it again to encode prompts")

    def prompt_rows(self, cond: Cond) -> Cond:
        kept = () if self.image_condition is None else self.image_condition.kept
        return {name: value for name, value in cond.items() if name not in kept}

    def encoder_identity(self) -> str:
        with token_limits.listening(self.pipeline) as calls:
            rows = self.prompt_rows(self.encode([EXAMPLE, f"another {EXAMPLE}"]))
        # What no prompt changes, such as a size, is made of other things than the encoders. It counts by its values
        # where those are plain, such as 1024 or 3.5; where every device may round them in another way, all that they
        # may be made of counts.
        fixed = {name: value[0] for name, value in sorted(rows.items()) if torch.equal(value[0], value[1])}
        plain, arguments = all(map(_is_plain, fixed.values())), sorted(self.pipeline_spec.arguments.items())
        facts = (
            # The tokens show what the installed diffusers puts around a prompt, which no configuration holds.
            [(call.name, call.tokens) for call in calls],
            type(self.pipeline).__name__,
            [(name, tuple(v.shape[1:]), str(v.dtype)) for name, v in sorted(rows.items())],
            [(name, value) for name, value in arguments if name not in SIZES or not plain],
            {name: value.tolist() for name, value in fixed.items()}
            if plain
            else (encoders.plain_config(self.network.config), getattr(self.pipeline, "vae_scale_factor", None)),
        )
        return f"{self.pipeline_spec.name}-{encoders.identity(self.pipeline, facts)}"

    @functools.cached_property
    def prompt_limits(self) -> tuple[PromptLimit, ...]:
        with token_limits.listening(self.pipeline) as calls:
            self.encode([EXAMPLE])
        return token_limits.limits(calls)

    def negative_limits(self, prompt: str) -> list[PromptLimit]:
        with token_limits.listening(self.pipeline) as calls:
            self.encode_negative(EXAMPLE)
        return [limit for limit in token_limits.limits(calls) if limit.are_exceeded([prompt])[0]]

    @property
    def encoders_released(self) -> bool:
        return any(getattr(self.pipeline, name) is None for name in self._encoders)

    def release_encoders(self) -> None:
        encoders.release(self.pipeline)

    def share_encoders(self, other: Teacher) -> None:
        other.lend_encoders(self.pipeline)

    def lend_encoders(self, pipeline: Any) -> None:
        encoders.share(pipeline, self.pipeline)

    def has_encoders_of(self, other: Teacher) -> bool:
        other = other.unguided
        if not isinstance(other, PipelineTeacher):
            return False
        return encoders.identity(self.pipeline, ()) == encoders.identity(other.pipeline, ())

    def pictures_fingerprint(self) -> str:
        digest = hashlib.blake2b(f"{self.fingerprint()} {self.encoder_identity()}".encode(), digest_size=8)
        hashed = {self.pipeline_spec.network, *encoders.parts(self.pipeline)}
        for name, part in sorted(self.pipeline.components.items()):
            if name not in hashed and isinstance(part, nn.Module):
                encoders.add_module(digest, name, part)
        return digest.hexdigest()

    # Pictures

    @property
    def image_condition(self) -> ImageCondition | None:
        return self.pipeline_spec.image_condition

    def picture_rows(self, pictures: Tensor, noise: Tensor) -> Cond:
        if (condition := self.image_condition) is None:
            return super().picture_rows(pictures, noise)
        return condition.rows(self.pipeline, pictures, noise, condition.level)

    def with_image_condition(self, level: int, pictures: Tensor | None = None) -> Self:
        if self.image_condition is None:
            return super().with_image_condition(level, pictures)
        num_levels = self.image_condition.num_levels(self.pipeline)
        if not 0 <= level < num_levels:
            raise SettingError("noise_level", level, f"this {self.kind} knows the levels 0 to {num_levels - 1}")
        condition = replace(self.image_condition, level=level)
        if pictures is not None:
            examples = lambda _, num: pictures[[i % len(pictures) for i in range(num)]]  # noqa: E731 - passed on at once
            condition = replace(condition, example=examples)
        return self._changed(pipeline_spec=replace(self.pipeline_spec, image_condition=condition))

    def decode(self, latents: Tensor) -> Tensor:
        spec = self.pipeline_spec
        return (
            latents
            if spec.decode is None
            else spec.trim(self.pipeline, spec.decode(self.pipeline, latents), spec.arguments)
        )

    def bound(self, x_0: Tensor) -> Tensor:
        return self.decode(x_0) if self.pipeline_spec.on_pixels else x_0

    # Students

    @property
    def takes_lora_files(self) -> bool:  # type: ignore[override]  # of the pipeline's class
        save = getattr(type(self.pipeline), "save_lora_weights", None)
        return save is not None and f"{self.pipeline_spec.network}_lora_layers" in inspect.signature(save).parameters

    @property
    def bytes_besides(self) -> int:  # type: ignore[override]  # those of the parts that are loaded now
        parts = (p for p in self.pipeline.components.values() if isinstance(p, nn.Module) and p is not self.network)
        return sum(p.numel() * p.element_size() for part in parts for p in part.parameters())

    def why_not_in_steps(self, levels: Sequence[float]) -> str | None:
        if self.pipeline_spec.few_steps is None:
            return f"no stock scheduler walks a {self.kind} down a student's levels"
        try:
            self.pipeline_spec.few_steps(self.pipeline, self.spec, levels)
        except ValueError as error:
            return str(error)
        return None

    def check_start(self) -> None:
        spec = self.spec
        self.pipeline_spec.one_step(self.pipeline, spec.prediction_type, spec.process.level(spec.t_max)[0])

    @property
    def plain_arguments(self) -> dict[str, Any]:
        """The arguments of the plain call of an exported student, besides the condition."""
        return self.plain_call_arguments(1)

    def plain_call_arguments(self, num_steps: int) -> dict[str, Any]:
        """Return them for an exported student of several steps."""
        family = self.pipeline_spec.in_steps(num_steps)
        sizes = {**family.size(self.pipeline), **family.given}
        # Without it the pipeline would take the nearest of its own sizes.
        exact = ("use_resolution_binning",) if "height" in sizes else ()
        return {**family.export_arguments, **sizes, **{n: family.arguments[n] for n in exact if n in family.arguments}}

    def load_afresh(self, parts: Mapping[str, Any], *, with_checker: bool = False) -> Any:
        """Return the pipeline as `load_stock` reads it from where it was loaded, with `parts` in place of its own."""
        given = {**options(self.pipeline_spec.without, self.variant), **parts}
        return load_stock(type(self.pipeline), self.folder, given, with_checker=with_checker)


Plain = (
    StrictBool
    | Annotated[int, Field(strict=True, gt=-(2**31), lt=2**31)]
    | Annotated[float, Field(gt=-1e6, lt=1e6)]
    | str
)


class CallFile(OwnFile):
    """What `CALL_FILE` holds: plain arguments of a pipeline's call, sizes within bounds."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Plain]
    height: Annotated[int, Field(ge=1, le=2**14)] | None = None
    width: Annotated[int, Field(ge=1, le=2**14)] | None = None
    num_frames: Annotated[int, Field(ge=1, le=2**14)] | None = None
    max_sequence_length: Annotated[int, Field(ge=1, le=2**16)] | None = None


def read_call(folder: Path) -> dict[str, Any]:
    """Return the arguments of the call that the student in an exported folder was distilled at.

    Raises:
        ValueError: If its file holds anything else; which names a call takes its class says.
    """
    path = folder / CALL_FILE
    found = read_object(path, CallFile).model_dump(exclude_unset=True) if path.exists() else {}
    return {name: value for name, value in found.items() if name not in CALL_NOTES}
