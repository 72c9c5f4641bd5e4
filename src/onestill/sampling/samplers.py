"""What generates images, whatever it is: a student, a teacher, an exported pipeline; prompts and decoding included."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onestill.core.tensors import Cond
from onestill.data.cascade import FirstStage, seeded_rows
from onestill.sampling.generate import Generate, Rows, student_generator, teacher_generator
from onestill.students.student import Student
from onestill.teachers.base import Teacher
from onestill.teachers.prompt_limits import PromptLimit
from onestill.training.config import DistillConfig


@dataclass(frozen=True)
class Source:
    """Something that generates images.

    Attributes:
        name: What it is, in words.
        generate: From noise and what is asked for (`conditions`) to images. Prompts are encoded and latents decoded
            in it: its time is what a user waits. Rows of `encode` may take the place of the prompts.
        sample_shape: Shape of the noise of one image.
        labels: Labels it can be asked for; empty if it takes none.
        folder: The exported pipeline it is, if it is one.
        run: The run it comes from, if it does.
        config: That run's configuration.
        num_steps: Steps per image.
        calls: Network evaluations per image.
        text: Whether it takes prompts.
        latents: The same up to the decoder, where there is one; None where the network works on pixels, or where an
            exported pipeline does not let its latents out.
        decodes: Whether there is a decoder.
        decode: From latents to the images of `generate`, where the two can be had apart.
        encode: From prompts to their encoded conditions, one row each; None where it takes no prompts.
        reopen: What `at` does: from (guidance scale, target time), None for what stays, to the source there.
        arguments: Arguments of every call of the pipeline that were asked for, such as a size.
        base: The student that draws what is enlarged here, in one evaluation more; None where nothing is.
        noise_level: How much noise is mixed into its pictures.
        limits: The numbers of tokens of a prompt that its text encoders take; asking costs one encoding.
    """

    name: str
    generate: Generate
    sample_shape: tuple[int, ...]
    labels: tuple[int, ...]
    folder: Path | None = None
    run: Path | None = None
    config: DistillConfig | None = None
    num_steps: int = 1
    calls: int = 1
    text: bool = False
    latents: Generate | None = None
    decodes: bool = False
    decode: Callable[[Tensor], Tensor] | None = None
    encode: Callable[[Sequence[str]], Cond] | None = None
    reopen: Callable[[float | None, float | None], Source] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    base: FirstStage | None = None
    noise_level: int | None = None
    limits: Callable[[], tuple[PromptLimit, ...]] = tuple

    def at(self, *, guidance_scale: float | None = None, target_time: float | None = None) -> Source:
        """Return the same at another guidance scale or target time; nothing is loaded twice.

        Args:
            guidance_scale: w; as it is if None.
            target_time: The student's target time; as it is if None.

        Raises:
            ValueError: If it cannot, as an exported folder, or was not trained for it.
        """
        if self.reopen is None:
            raise ValueError(f"{self.name} has its --guidance_scale and --target_time baked in")
        return self.reopen(guidance_scale, target_time)

    def conditions(self, num: int, chosen: tuple[int, ...] = (), prompts: Sequence[str] = (), *, seed: int = 0) -> Rows:
        """Return what `num` images are asked for: going round `prompts` or `chosen`.

        Where neither is given, seed i has label i modulo the number of all labels: one seed is one image.

        Args:
            num: How many.
            chosen: Labels to go round.
            prompts: Prompts to go round.
            seed: The first seed, of seed, seed + 1, ...

        Raises:
            ValueError: If labels or prompts are given to a source without, none to one that needs them, or a label
                is unknown.
        """
        if len(prompts) and not self.text:
            instead = "say what to draw with --class_labels" if self.labels else "leave it out"
            raise ValueError(f"--prompt was given, but {self.name} takes no text; {instead}")
        if chosen and not self.labels:
            takes = "takes prompts" if self.text else "is unconditional"
            raise ValueError(f"--class_labels {list(chosen)} was given, but {self.name} {takes}")
        if unknown := sorted(set(chosen) - set(self.labels)):
            raise ValueError(f"--class_labels {unknown}: {self.name} knows {self.labels[0]} to {max(self.labels)}")
        if self.text:
            if not len(prompts):
                raise ValueError(f"{self.name} takes text: say what to draw with --prompt or --prompt_file")
            asked: Rows = {"prompt": [prompts[i % len(prompts)] for i in range(num)]}
            return asked if self.base is None else {**asked, "seed": list(range(seed, seed + num))}
        labels, first = chosen or self.labels, 0 if chosen else seed
        rows = [labels[i % len(labels)] for i in range(first, first + num)] if labels else []
        return {"class_labels": torch.tensor(rows)} if labels else {}

    def warnings(self, prompts: Sequence[str]) -> list[str]:
        """Return a line for each limit of the text encoders that some of the prompts exceed: they are cut there."""
        texts, found = list(dict.fromkeys(prompts)), []
        for limit in self.limits() if texts else ():
            cut = [text for text, is_cut in zip(texts, limit.are_exceeded(texts), strict=True) if is_cut]
            if cut:
                first = repr(textwrap.shorten(cut[0], 80, placeholder=" ..."))
                found.append(f"{limit.warning(len(cut))}{': ' if len(cut) == 1 else ', first '}{first}")
        return found


def student_source(
    student: Student,
    name: str,
    run: Path,
    config: DistillConfig,
    *,
    t: float,
    guidance_scale: float | None,
    device: torch.device,
    base_student: FirstStage | None = None,
) -> Source:
    """Return the one step of a student, at the target time t and, if it takes one, a guidance scale."""
    base, generate = student.teacher, student_generator(student, t=t, device=device)
    if student.guidance_range is not None:
        w = sum(student.guidance_range) / 2 if guidance_scale is None else guidance_scale
        generate = _with_guidance(generate, w)
    labels = config.class_labels or tuple(base.spec.labels)
    return _around(
        base, generate, name=name, labels=labels, run=run, config=config, clips=True, base_student=base_student
    )


def teacher_source(
    base: Teacher,
    fitted: Teacher,
    *,
    num_steps: int,
    device: torch.device,
    solver: str = "ddim",
    base_student: FirstStage | None = None,
) -> Source:
    """Return the multi-step sampler of a teacher.

    Args:
        base: The teacher.
        fitted: The same, guided and thresholded already.
        num_steps: Steps.
        device: Where it is.
        solver: Kind of step.
        base_student: The student that draws the pictures that the teacher enlarges, if it does.
    """
    generate = teacher_generator(fitted, num_steps=num_steps, solver=solver, device=device)
    calls = num_steps * fitted.evaluations * (1 if solver == "ddim" else 2)
    name = f"the teacher {base.spec.source}"
    return _around(
        base,
        generate,
        name=name,
        labels=tuple(base.spec.labels),
        num_steps=num_steps,
        calls=calls,
        base_student=base_student,
    )


def _around(
    base: Teacher,
    network: Generate,
    *,
    name: str,
    labels: tuple[int, ...],
    run: Path | None = None,
    config: DistillConfig | None = None,
    num_steps: int = 1,
    calls: int = 1,
    clips: bool = False,
    base_student: FirstStage | None = None,
) -> Source:
    """Return a source around what a network makes: prompts are encoded before it, latents decoded behind it."""
    decodes = base.has_decoder
    clips = clips or base.clamps
    encode = base.encode if base.spec.text else None
    if base_student is not None:
        base.share_encoders(base_student.teacher)

    def latents(eps: Tensor, rows: Rows) -> Tensor:
        if base_student is not None:
            return network(eps, seeded_rows(base, base_student, rows["seed"], rows["prompt"]))
        return network(eps, encode(rows["prompt"]) if encode is not None and "prompt" in rows else rows)

    @torch.no_grad()
    def decode(made: Tensor) -> Tensor:
        images = base.decode(made)
        # As an exported pipeline leaves them.
        return images.clamp(-1, 1) if clips else images

    return Source(
        name,
        lambda eps, rows: decode(latents(eps, rows)),
        base.spec.sample_shape,
        labels,
        run=run,
        config=config,
        num_steps=num_steps,
        calls=calls + (base_student is not None),
        text=base.spec.text,
        latents=latents if decodes else None,
        decodes=decodes,
        decode=decode if decodes else None,
        encode=encode,
        arguments=base.arguments,
        base=base_student,
        limits=(lambda: base.prompt_limits) if base.spec.text else tuple,
        noise_level=None if base_student is None or base.image_condition is None else base.image_condition.level,
    )


def _with_guidance(generate: Generate, guidance_scale: float) -> Generate:
    return lambda eps, cond: generate(eps, {**cond, "guidance_scale": torch.full((len(eps),), guidance_scale)})
