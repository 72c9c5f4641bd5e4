"""The one contract of a sampler: `sampler(eps, rows)`, from noise and what is to be drawn to images in [-1, 1].

A new kind of sampler is a subclass with a name, a shape and that one method; see docs/extending.md.
"""

from __future__ import annotations

import textwrap
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from onestill.core.arguments import Count, Label, checked
from onestill.core.errors import NOT_GIVEN, SettingError, named
from onestill.core.tensors import Cond
from onestill.data.cascade import FirstStage
from onestill.sampling.generate import Rows, check_seeds, generate_images
from onestill.teachers.prompt_limits import PromptLimit


class Sampler(ABC):
    """Something that generates images.

    Attributes:
        name: What it is, in words.
        sample_shape: Shape of the noise of one image.
        labels: Labels that it can draw; empty if it takes none.
        num_steps: Steps per image.
        evaluations: Network evaluations per image.
        takes_text: Whether it takes prompts.
        has_decoder: Whether its network works on latents, which a decoder makes images of.
        gives_latents: Whether `latents` gives those.
        can_decode: Whether `decode` makes images of them.
        arguments: Arguments of every call of its pipeline that were given, such as a size.
        first_stage: The student that draws what is enlarged here, in one evaluation more; None where nothing is.
        noise_level: How much noise is mixed into its pictures.
    """

    _made_by = "open one with onestill.load_sampler"
    name: str
    sample_shape: tuple[int, ...]
    labels: tuple[int, ...] = ()
    num_steps: int = 1
    evaluations: int = 1
    takes_text: bool = False
    has_decoder: bool = False
    gives_latents: bool = False
    can_decode: bool = False
    arguments: Mapping[str, Any] = MappingProxyType({})
    first_stage: FirstStage | None = None
    noise_level: int | None = None

    @abstractmethod
    def __call__(self, eps: Tensor, rows: Rows) -> Tensor:
        """Return images, [B, C, H, W] in [-1, 1].

        Prompts are encoded and latents decoded here: the time of a call is what a user waits.

        Args:
            eps: Standard normal noise, [B, *sample_shape].
            rows: What is drawn, B rows each, as `conditions` gives it; rows of `encode` may take the place of the
                prompts.
        """

    def latents(self, eps: Tensor, rows: Rows) -> Tensor:
        """Return what the decoder makes the images of, where `gives_latents`."""
        raise NotImplementedError(f"{self.name} gives no latents")

    def decode(self, latents: Tensor) -> Tensor:
        """Return the images of latents, where `can_decode`."""
        raise NotImplementedError(f"{self.name} does not decode apart from its call")

    def encode(self, prompts: Sequence[str]) -> Cond:
        """Return the encoded conditions of prompts, one row each, where `takes_text`."""
        raise NotImplementedError(f"{self.name} takes no text")

    @property
    def prompt_limits(self) -> tuple[PromptLimit, ...]:
        """The numbers of tokens of a prompt that its text encoders take; asking costs one encoding."""
        return ()

    @checked()
    def at(
        self,
        *,
        guidance_scale: float | None = None,
        target_time: float | None = None,
        num_inference_steps: int | None = None,
    ) -> Sampler:
        """Return the same at another guidance scale w, target time t or number of steps, if given; nothing is loaded twice.

        Raises:
            SettingError: If it cannot, as an exported folder, or was not trained for it.
        """
        steps = None if num_inference_steps == self.num_steps else num_inference_steps
        given = {"guidance_scale": guidance_scale, "target_time": target_time, "num_inference_steps": steps}
        for setting, value in given.items():
            if value is not None:
                raise SettingError(setting, value, f"{self.name} has it baked in", "give the folder of its run")
        return self

    @checked()
    def images(
        self, seeds: Sequence[int] | Tensor, rows: Rows, *, batch_size: Count = 64, show_progress: bool = False
    ) -> Tensor:
        """Return the images of `seeds`, or of noise, one for each row, as `generate_images` does."""
        check_seeds(seeds, self.sample_shape)
        if other := [name for name, values in rows.items() if len(values) != len(seeds)]:
            why = f"has {len(rows[other[0]])} of {other[0]!r} for {len(seeds)} seeds"
            raise SettingError("rows", why=why, todo="make them with the sampler's conditions(num)")
        return generate_images(self, seeds, self.sample_shape, rows, batch_size=batch_size, show_progress=show_progress)

    @checked()
    def conditions(
        self, num: Label, class_labels: Sequence[int] = (), prompts: Sequence[str] = (), *, seed: Label = 0
    ) -> Rows:
        """Return what `num` images of seed, seed + 1, ... show: going round `prompts` or `class_labels`.

        Where neither is given, seed i has label i modulo the number of all labels: one seed is one image.

        Raises:
            SettingError: If labels or prompts are given to a sampler without, none to one that needs them, or a label
                is unknown.
        """
        self._check(class_labels, prompts)
        if self.takes_text:
            rows: Rows = {"prompt": [prompts[i % len(prompts)] for i in range(num)]}
            return rows if self.first_stage is None else {**rows, "seed": list(range(seed, seed + num))}
        labels, first = class_labels or self.labels, 0 if class_labels else seed
        drawn = [labels[i % len(labels)] for i in range(first, first + num)] if labels else []
        return {"class_labels": torch.tensor(drawn)} if labels else {}

    def _check(self, class_labels: Sequence[int], prompts: Sequence[str]) -> None:
        if len(prompts) and not self.takes_text:
            instead = f"say what to draw with {named('class_labels')}" if self.labels else "leave it out"
            raise SettingError("prompts", NOT_GIVEN, f"{self.name} takes no text", instead)
        if class_labels and not self.labels:
            why = f"{self.name} {'takes prompts' if self.takes_text else 'is unconditional'}"
            raise SettingError("class_labels", list(class_labels), why, "leave it out")
        if unknown := sorted(set(class_labels) - set(self.labels)):
            raise SettingError("class_labels", unknown, f"{self.name} knows {self.labels[0]} to {max(self.labels)}")
        if self.takes_text and not len(prompts):
            todo = f"say what to draw with it, or with {named('prompt_file')}"
            raise SettingError("prompts", NOT_GIVEN, f"{self.name} takes text", todo)

    @checked()
    def warnings(self, prompts: Sequence[str]) -> list[str]:
        """Return a line for each limit of the text encoders that some of the prompts exceed: they are cut there."""
        texts, found = list(dict.fromkeys(prompts)), []
        for limit in self.prompt_limits if texts else ():
            long = [text for text, exceeds in zip(texts, limit.are_exceeded(texts), strict=True) if exceeds]
            if long:
                first = repr(textwrap.shorten(long[0], 80, placeholder=" ..."))
                found.append(f"{limit.warning(len(long))}{': ' if len(long) == 1 else ', first '}{first}")
        return found
