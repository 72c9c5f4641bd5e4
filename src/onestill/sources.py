"""What generates images, whatever it is: a student, a teacher, an exported pipeline; prompts and decoding included."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from onestill import card
from onestill.chain import BaseStudent, check_shape, second_noise, seeded_rows
from onestill.config import DistillConfig
from onestill.export import load_pipeline
from onestill.sampler import Generate, Rows, student_generator, teacher_generator
from onestill.student import Student
from onestill.teachers import encoders
from onestill.teachers.base import NetworkTeacher, Teacher
from onestill.teachers.family import Family, examples
from onestill.teachers.generic import plain_family
from onestill.teachers.load import FAMILY_OF_PIPELINE, read_index
from onestill.teachers.pipeline import PipelineTeacher, read_call
from onestill.teachers.recording import Signature, record
from onestill.teachers.stock import load_stock
from onestill.teachers.unet2d import PIPELINES as UNET2D_PIPELINES
from onestill.tensors import Cond


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

    base: BaseStudent | None = None
    noise_level: int | None = None

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
            raise ValueError(
                "--prompt was given, but this teacher takes no text; use --class_labels where it has classes"
            )
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


def student_source(
    student: Student,
    name: str,
    run: Path,
    config: DistillConfig,
    *,
    t: float,
    guidance_scale: float | None,
    device: torch.device,
    base_student: BaseStudent | None = None,
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
    base: NetworkTeacher,
    fitted: Teacher,
    *,
    num_steps: int,
    device: torch.device,
    solver: str = "ddim",
    base_student: BaseStudent | None = None,
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
    calls = num_steps * fitted.calls * (1 if solver == "ddim" else 2)
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
    base: NetworkTeacher,
    network: Generate,
    *,
    name: str,
    labels: tuple[int, ...],
    run: Path | None = None,
    config: DistillConfig | None = None,
    num_steps: int = 1,
    calls: int = 1,
    clips: bool = False,
    base_student: BaseStudent | None = None,
) -> Source:
    """Return a source around what a network makes: prompts are encoded before it, latents decoded behind it."""
    decodes = isinstance(base, PipelineTeacher) and base.family.latents
    clips = clips or (isinstance(base, PipelineTeacher) and base.family.decode is not None)
    encode = base.encode if isinstance(base, PipelineTeacher) and base.spec.text else None
    if isinstance(base, PipelineTeacher) and base_student is not None:
        encoders.share(base.pipeline, base_student.teacher.pipeline)

    def latents(eps: Tensor, rows: Rows) -> Tensor:
        if isinstance(base, PipelineTeacher) and base_student is not None:
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
        arguments=base.family.asked if isinstance(base, PipelineTeacher) else {},
        base=base_student,
        noise_level=base.picture.level if isinstance(base, PipelineTeacher) and base_student is not None else None,
    )


def _with_guidance(generate: Generate, guidance_scale: float) -> Generate:
    return lambda eps, cond: generate(eps, {**cond, "guidance_scale": torch.full((len(eps),), guidance_scale)})


def enlarges(folder: Path) -> bool:
    """Return whether an exported pipeline enlarges the picture of an earlier stage."""
    try:
        family = FAMILY_OF_PIPELINE.get(read_index(folder, str(folder))["_class_name"])
    except ValueError:
        return False  # opening it says what is wrong
    return family is not None and family.beside is not None


def open_pipeline(
    folder: Path,
    device: torch.device,
    run: Path | None = None,
    config: DistillConfig | None = None,
    base_student: BaseStudent | None = None,
) -> Source:
    """Return the one step of an exported pipeline: its own components, on noise that is given.

    Args:
        folder: The exported pipeline.
        device: Where it goes.
        run: The run it comes from, if it does.
        config: That run's configuration.
        base_student: The student that draws the pictures that the pipeline enlarges, if it does.

    Raises:
        ValueError: If it does not load.
    """
    try:
        index = read_index(folder, "the folder")
        class_name = index["_class_name"]
        if class_name not in UNET2D_PIPELINES:
            pipeline = load_stock(getattr(diffusers, class_name), folder).to(device)
            family = FAMILY_OF_PIPELINE.get(class_name) or plain_family(index, pipeline)
            family = family.asking(read_call(folder))
            if base_student is not None:
                return _open_enlarging(family, pipeline, folder, device, run, config, base_student)
            return _open_family(family, pipeline, folder, device, run, config)
        pipeline = load_pipeline(folder, device)
        network = pipeline.unet.config
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"--student {folder} does not load: {str(error).splitlines()[0]}") from error
    size = network.sample_size
    shape = (network.in_channels, *((size, size) if isinstance(size, int) else size))
    null_class, chosen = (None, ()) if config is None else (config.null_class, config.class_labels)
    labels = chosen or tuple(i for i in range(network.num_class_embeds or 0) if i != null_class)
    return Source(f"the student in {folder}", _one_step(pipeline), shape, labels, folder=folder, run=run, config=config)


def _one_step(pipeline: Any) -> Generate:
    """Return an exported pipeline's one step, its own network and scheduler, on noise that is given."""
    scheduler, network = pipeline.scheduler, pipeline.unet
    scheduler.set_timesteps(1)
    t = scheduler.timesteps[0]

    @torch.no_grad()
    def generate(eps: Tensor, cond: Cond) -> Tensor:
        x = eps.to(network.device) * scheduler.init_noise_sigma
        labels = cond["class_labels"].to(network.device) if "class_labels" in cond else None
        images: Tensor = scheduler.step(network(x, t, class_labels=labels).sample, t, x).prev_sample
        return images

    return generate


def _open_family(
    family: Family, pipeline: Any, folder: Path, device: torch.device, run: Path | None, config: DistillConfig | None
) -> Source:
    """Return the plain call of an exported pipeline of a family, on noise that is given."""
    network, arguments = getattr(pipeline, family.network), dict(family.export_arguments)
    (seen,) = record(lambda: family.call(pipeline, examples(family, 1), arguments), network)
    noise = family.unpack(family.sort_call(seen, pipeline).x_t, seen.arguments)
    takes_noise = "latents" in inspect.signature(pipeline.__call__).parameters
    text = family.prompt == "prompt"

    def call(output_type: str) -> Callable[[Tensor, Rows], Any]:
        def generate(eps: Tensor, rows: Rows) -> Any:
            asked, packed = rows["prompt"] if text else rows["class_labels"].tolist(), eps.to(device)
            packed = family.pack(packed, seen.arguments)
            if takes_noise:
                return family.call(pipeline, asked, {**arguments, "output_type": output_type, "latents": packed})
            with _noise(pipeline, packed):
                return family.call(pipeline, asked, {**arguments, "output_type": output_type})

        return generate

    @functools.cache
    def signature() -> Signature:
        return family.signature(pipeline)[0]

    def generate(eps: Tensor, rows: Rows) -> Tensor:
        if not text or "prompt" in rows:
            return family.result(images(eps, rows)).float().clamp(-1, 1)
        with family.encoded(pipeline, signature(), rows):
            return family.result(images(eps, {"prompt": [""] * len(eps)})).float().clamp(-1, 1)

    images, latents = call("pt"), call("latent")
    classes = 0 if family.null_class is None else family.null_class(network.config)
    chosen = () if config is None else config.class_labels
    return Source(
        f"the student in {folder}",
        generate,
        tuple(noise.shape[1:]),
        chosen or tuple(range(classes)),
        folder=folder,
        run=run,
        config=config,
        text=text,
        latents=(lambda eps, rows: latents(eps, rows)[0]) if takes_noise and family.latents else None,
        decodes=family.latents,
        encode=(lambda prompts: family.encode(pipeline, signature(), prompts)) if text else None,
        arguments=family.asked,
    )


def _open_enlarging(
    family: Family,
    pipeline: Any,
    folder: Path,
    device: torch.device,
    run: Path | None,
    config: DistillConfig | None,
    base: BaseStudent,
) -> Source:
    """Return the plain call of an exported pipeline that enlarges the pictures of a base student."""
    assert family.beside is not None
    network, arguments, beside = getattr(pipeline, family.network), dict(family.export_arguments), family.beside
    (seen,) = record(lambda: family.call(pipeline, examples(family, 1), arguments), network)
    shape = tuple(family.sort_call(seen, pipeline).x_t.shape[1:])
    check_shape(base, shape)
    encoders.share(pipeline, base.teacher.pipeline)
    recorded = card.noise_level(folder) if config is None else config.noise_level
    level = beside.level if recorded is None else recorded

    def generate(eps: Tensor, rows: Rows) -> Tensor:
        pictures = base.seeded(rows["seed"], rows["prompt"])
        given = {**arguments, **beside.arguments(pictures.to(device), level), "output_type": "pt"}
        # Its first draw is where it starts, its second the noise in the picture.
        with _noise(pipeline, eps.to(device), second_noise(rows["seed"], shape).to(device)):
            return family.result(family.call(pipeline, rows["prompt"], given)).float().clamp(-1, 1)

    return Source(
        f"the student in {folder}",
        generate,
        shape,
        (),
        folder=folder,
        run=run,
        config=config,
        calls=2,
        text=True,
        arguments=family.asked,
        decodes=family.latents,
        base=base,
        noise_level=level,
    )


@contextmanager
def _noise(pipeline: Any, *draws: Tensor) -> Iterator[None]:
    """Let a pipeline that takes no `latents` draw given noise, in this order: its module uses `randn_tensor`."""
    module: Any = sys.modules[type(pipeline).__module__]
    draw, given = module.randn_tensor, list(draws)

    def drawn(shape: Sequence[int], *args: Any, **kwargs: Any) -> Any:
        return given.pop(0) if given and tuple(shape) == tuple(given[0].shape) else draw(shape, *args, **kwargs)

    module.randn_tensor = drawn
    try:
        yield
    finally:
        module.randn_tensor = draw
