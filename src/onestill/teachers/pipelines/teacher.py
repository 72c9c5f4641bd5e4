"""The teacher inside a stock pipeline: its prompts, its decoder, and the stock folder of its student."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onestill.core.tensors import Cond
from onestill.teachers.base import NetworkTeacher, TeacherSpec
from onestill.teachers.pipelines import text_encoders as encoders
from onestill.teachers.pipelines import token_limits as tokenizing
from onestill.teachers.pipelines.capture import Signature
from onestill.teachers.pipelines.folder import INDEX, load_stock, options
from onestill.teachers.pipelines.spec import Beside, Family

CALL_FILE = "onestill_call.json"
"""In an exported folder: the arguments of the call that a student was distilled at, if any were asked for."""
SIZES = ("height", "width", "num_frames")
"""Arguments of a call that decide no condition of a prompt but by a value of its own, or its shape."""
PLAIN = (bool, int, float, str)


def _is_plain(value: Tensor) -> bool:
    return not value.is_complex() and (not value.is_floating_point() or torch.equal(value, value.round(decimals=3)))


class PipelineTeacher(NetworkTeacher):
    """A teacher inside a stock pipeline: besides its network it has prompts, a decoder, and a folder to write.

    Args:
        family: Its family.
        pipeline: The pipeline; its text encoders may be released once the prompts are encoded.
        folder: Where it was loaded from.
        spec: What is known of it.
        signature: How its network is called.
        null_cond: The conditions of "no prompt", one row; empty if the pipeline has no guidance.
        example_cond: Those of some prompt.
        variant: The variant of its weights, such as "fp16".
    """

    folder: Path

    def __init__(
        self,
        family: Family,
        pipeline: Any,
        folder: Path,
        spec: TeacherSpec,
        signature: Signature,
        null_cond: Cond,
        example_cond: Cond,
        variant: str | None = None,
    ) -> None:
        super().__init__(getattr(pipeline, family.network), spec, self._call)
        self.family, self.pipeline, self.folder, self.variant = family, pipeline, folder, variant
        self.signature, self.null_cond, self.example_cond = signature, null_cond, example_cond
        self._released: list[bool] = []  # shared by shallow copies, as the pipeline is

    def _call(self, network: Callable[..., object], x_t: Tensor, net_time: Tensor, cond: Cond) -> Tensor:
        x_t = self.family.pack(x_t, self.signature.constant)
        output = self.signature(network, x_t, net_time, cond)
        output = output[:, : x_t.shape[1]] if output.shape != x_t.shape else output
        return self.family.sign * self.family.unpack(output, self.signature.constant)

    def to(self, device: torch.device | str) -> PipelineTeacher:
        """Move the network, the decoder and the text encoders to `device`."""
        self.pipeline.to(device)
        return self

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], seeds: Sequence[int] = ()) -> Cond:
        """Return the conditions of prompts, one row each; `seeds` for what the pipeline draws on the way.

        Raises:
            RuntimeError: If the text encoders were released.
        """
        if self.encoders_released:
            raise RuntimeError("the text encoders of this teacher were released; load it again to encode prompts")
        return self.family.encode(self.pipeline, self.signature, prompts, seeds)

    @torch.no_grad()
    def encode_negative(self, prompt: str) -> Cond:
        """Return the conditions that a prompt makes in the place of "no prompt", one row.

        They may differ from `encode`: some pipelines put words of their own before a prompt, and none before this one.

        Raises:
            RuntimeError: If the text encoders were released.
        """
        if self.encoders_released:
            raise RuntimeError("the text encoders of this teacher were released; load it again to encode prompts")
        return self.family.null_conditions(self.pipeline, self.signature, prompt)

    def of_prompts(self, cond: Cond) -> Cond:
        """Return the conditions that prompts decide: without those that come with a picture, if the teacher takes one."""
        kept = () if self.family.beside is None else self.family.beside.kept
        return {name: value for name, value in cond.items() if name not in kept}

    def encoder_identity(self) -> str:
        """Return a name for what turns prompts into conditions: the same name is the same conditions.

        Raises:
            RuntimeError: If the text encoders were released.
        """
        with tokenizing.listening(self.pipeline) as heard:
            rows = self.of_prompts(self.encode([tokenizing.EXAMPLE, f"another {tokenizing.EXAMPLE}"]))
        # What no prompt changes, such as a size, is made of other things than the encoders. It counts by its values
        # where those are plain, such as 1024 or 3.5; where every device may round them in another way, all that they
        # may be made of counts.
        fixed = {name: value[0] for name, value in sorted(rows.items()) if torch.equal(value[0], value[1])}
        plain = all(map(_is_plain, fixed.values()))
        facts = (
            # The tokens show what the installed diffusers puts around a prompt, which no configuration holds.
            [(call.name, call.tokens) for call in heard],
            type(self.pipeline).__name__,
            [(name, tuple(v.shape[1:]), str(v.dtype)) for name, v in sorted(rows.items())],
            [(name, value) for name, value in sorted(self.family.arguments.items()) if name not in SIZES or not plain],
            {name: value.tolist() for name, value in fixed.items()} if plain else self._made_of(),
        )
        return f"{self.family.name}-{encoders.identity(self.pipeline, facts)}"

    def _made_of(self) -> tuple[object, ...]:
        network: Any = self.network  # that of a pipeline has a configuration
        return encoders.plain_config(network.config), getattr(self.pipeline, "vae_scale_factor", None)

    @property
    def guidance_input(self) -> str | None:
        name = self.family.guidance_input
        return name if name in self.example_cond else None

    def _heard(self) -> list[tokenizing.Heard]:
        """Return how the pipeline calls its tokenizers for a prompt."""
        with tokenizing.listening(self.pipeline) as heard:
            self.encode([tokenizing.EXAMPLE])
        return heard

    @functools.cached_property
    def prompt_limits(self) -> tuple[tokenizing.Limit, ...]:
        """The numbers of tokens of a prompt that its text encoders take, the smallest first; () if none is known."""
        return tokenizing.limits(self._heard())

    def cuts(self, prompts: Sequence[str]) -> list[int]:
        """Return which of those limits each prompt exceeds, as a number: bit i for the i-th."""
        return tokenizing.exceeded(self.prompt_limits, prompts)

    def negative_limits(self, prompt: str) -> list[tokenizing.Limit]:
        """Return which limits of a prompt in the place of "no prompt" this one exceeds."""
        with tokenizing.listening(self.pipeline) as heard:
            self.encode_negative(tokenizing.EXAMPLE)
        return [limit for limit in tokenizing.limits(heard) if limit.are_exceeded([prompt])[0]]

    @property
    def encoders_released(self) -> bool:
        """Whether the text encoders have left memory, so that `encode` is over."""
        return bool(self._released)

    def release_encoders(self) -> None:
        """Let the text encoders go and all else that only `encode` needs, which is over."""
        encoders.release(self.pipeline)
        self._released.append(True)

    @torch.no_grad()
    def one_step(self, eps: Tensor, cond: Cond) -> Tensor:
        """Return the images of one step from pure noise: of an exported student, loaded as a teacher, its pictures."""
        return self.decode(self.denoised(eps, 1.0, cond))

    @torch.no_grad()
    def rows_beside(self, base: Callable[[Tensor, Cond], Tensor], eps: Tensor, base_cond: Cond, noise: Tensor) -> Cond:
        """Return the conditions made of the pictures that an earlier model draws: what a chain of students needs.

        They take the place of those that `encode` made of an example picture.

        Args:
            base: The earlier model's generation: (eps, cond) -> pictures in [-1, 1], [B, C, h, w], such as the
                `one_step` of its exported student.
            eps: Its noise, [B, ...].
            base_cond: Its conditions.
            noise: Noise of this teacher's sample shape, for pipelines that blur the pictures with some.

        Raises:
            ValueError: If this teacher takes no picture.
        """
        self.picture  # noqa: B018 - before the earlier model is put to work
        return self.picture_rows(base(eps, base_cond), noise)

    @property
    def picture(self) -> Beside:
        """What is known of the picture that the teacher takes; ValueError if it takes none."""
        if self.family.beside is None:
            raise ValueError(f"a {type(self.pipeline).__name__} takes no picture of an earlier model")
        return self.family.beside

    def picture_rows(self, pictures: Tensor, noise: Tensor) -> Cond:
        """Return the conditions made of pictures [B, C, h, w] in [-1, 1] and of `noise` [B, *sample_shape].

        Raises:
            ValueError: If this teacher takes no picture.
        """
        return self.picture.rows(self.pipeline, pictures, noise, self.picture.level)

    def set_picture(self, level: int, pictures: Tensor | None = None) -> None:
        """Set the noise level of the pictures, and the pictures of its checks; changes the teacher in place.

        Args:
            level: How much noise is mixed into each picture.
            pictures: Some real ones, [N, C, h, w] in [-1, 1], which example calls go round from now on; None to
                leave what they have.

        Raises:
            ValueError: If this teacher takes no picture.
        """
        beside = replace(self.picture, level=level)
        if pictures is not None:
            beside = replace(beside, example=lambda _, num: pictures[[i % len(pictures) for i in range(num)]])
        self.family = replace(self.family, beside=beside)

    def decode(self, latents: Tensor) -> Tensor:
        """Return the images of latents; pixels are images already."""
        family = self.family
        if family.decode is None:
            return latents
        return family.cut(self.pipeline, family.decode(self.pipeline, latents), family.arguments)

    def check_start(self) -> None:
        """Raise ValueError if no stock pipeline could start an exported student at this start level."""
        spec = self.spec
        self.family.one_step(self.pipeline, spec.prediction_type, spec.process.level(spec.t_max)[0])

    @property
    def plain_arguments(self) -> dict[str, Any]:
        """The arguments of the plain call of an exported student, besides the condition."""
        family = self.family
        sizes = {**family.size(self.pipeline), **family.asked}
        # Without it the pipeline would take the nearest of its own sizes.
        exact = ("use_resolution_binning",) if "height" in sizes else ()
        return {**family.export_arguments, **sizes, **{n: family.arguments[n] for n in exact if n in family.arguments}}

    def load_afresh(self, parts: Mapping[str, Any], *, with_checker: bool = False) -> Any:
        """Return the pipeline as `load_stock` reads it from where it was loaded, with `parts` in place of its own."""
        given = options(self.family.without, self.variant) | dict(parts)
        return load_stock(type(self.pipeline), self.folder, given, with_checker=with_checker)

    def write_student(self, network: nn.Module, folder: Path) -> Family:
        """Write the pipeline with a student in its network's place: one step, no guidance, everything else stock.

        Where a size was asked for and the class takes its default size from the network, that is the student's.

        Args:
            network: The student's network with the target time baked in.
            folder: An empty folder.

        Returns:
            The family of the folder's plain call: without the size, if that is its default.
        """
        family, spec = self.family, self.spec
        family.adapt(network)
        plain = family
        if "height" in family.asked and family.set_size(network, (spec.sample_shape[-2], spec.sample_shape[-1])):
            rest = {name: value for name, value in family.arguments.items() if name not in ("height", "width")}
            plain = replace(family, arguments=rest)
        alpha = spec.process.level(spec.t_max)[0]
        parts = {family.network: network, "scheduler": family.one_step(self.pipeline, spec.prediction_type, alpha)}
        self.load_afresh(parts, with_checker=True).save_pretrained(folder, safe_serialization=True)
        _keep_facts(self.folder / INDEX, folder / INDEX)
        if kept := {name: value for name, value in family.asked.items() if isinstance(value, PLAIN)}:
            (folder / CALL_FILE).write_text(json.dumps(kept) + "\n", encoding="utf-8")
        return plain


def _keep_facts(old: Path, new: Path) -> None:
    """Add what a pipeline's index says and its class does not write again, such as DiT's names of classes."""
    facts, written = (json.loads(path.read_text(encoding="utf-8")) for path in (old, new))
    missing = {key: value for key, value in facts.items() if key not in written and not key.startswith("_")}
    if missing:
        new.write_text(json.dumps({**written, **missing}, indent=2) + "\n", encoding="utf-8")


def read_call(folder: Path) -> dict[str, Any]:
    """Return the arguments of the call that the student in an exported folder was distilled at.

    Raises:
        ValueError: If they do not parse.
    """
    path = folder / CALL_FILE
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not isinstance(found, dict) or not all(isinstance(value, PLAIN) for value in found.values()):
        raise ValueError(f"{CALL_FILE} holds no arguments of a call")
    return found
