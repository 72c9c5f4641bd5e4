"""Exported pipelines as sources: their own call, one step, on noise that is given."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from onestill.core.tensors import Cond
from onestill.data.cascade import FirstStage, check_shape, second_noise
from onestill.export.export import load_pipeline
from onestill.sampling.generate import Generate, Rows
from onestill.sampling.samplers import Source
from onestill.students import model_card as card
from onestill.students.student import ignores_time, time_embeddings
from onestill.teachers.load import FAMILY_OF_PIPELINE, read_index
from onestill.teachers.pipelines import token_limits as tokenizing
from onestill.teachers.pipelines.capture import Signature, record
from onestill.teachers.pipelines.folder import load_stock
from onestill.teachers.pipelines.generic import plain_family
from onestill.teachers.pipelines.spec import PipelineSpec, examples
from onestill.teachers.pipelines.teacher import read_call
from onestill.teachers.pixel import PIPELINES as UNET2D_PIPELINES
from onestill.teachers.prompt_limits import EXAMPLE, PromptLimit
from onestill.training.config import DistillConfig


def enlarges(folder: Path) -> bool:
    """Return whether an exported pipeline enlarges the picture of an earlier stage."""
    try:
        family = FAMILY_OF_PIPELINE.get(read_index(folder, str(folder))["_class_name"])
    except ValueError:
        return False  # opening it says what is wrong
    return family is not None and family.image_condition is not None


def open_pipeline(
    folder: Path,
    device: torch.device,
    run: Path | None = None,
    config: DistillConfig | None = None,
    base_student: FirstStage | None = None,
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
            family = family.with_arguments(read_call(folder))
            _check_steps(getattr(pipeline, family.network), folder)
            if base_student is not None:
                return _open_enlarging(family, pipeline, folder, device, run, config, base_student)
            return _open_family(family, pipeline, folder, device, run, config)
        pipeline = load_pipeline(folder, device)
        _check_steps(pipeline.unet, folder)
        network = pipeline.unet.config
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"--student {folder} does not load: {str(error).splitlines()[0]}") from error
    size = network.sample_size
    shape = (network.in_channels, *((size, size) if isinstance(size, int) else size))
    said = card.distilled(folder)
    null_class = said.null_class if config is None else config.null_class
    labels = (said.class_labels if config is None else config.class_labels) or tuple(
        i for i in range(network.num_class_embeds or 0) if i != null_class
    )
    return Source(f"the student in {folder}", _one_step(pipeline), shape, labels, folder=folder, run=run, config=config)


def _check_steps(network: nn.Module, folder: Path) -> None:
    # A student that was trained further by somebody may have weights there again, and its card.
    if time_embeddings(network) and not ignores_time(network) and not card.is_card(folder / "README.md"):
        raise ValueError("it is a pipeline of many steps, no one-step student; --teacher draws with it")


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
    family: PipelineSpec,
    pipeline: Any,
    folder: Path,
    device: torch.device,
    run: Path | None,
    config: DistillConfig | None,
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
    chosen = card.distilled(folder).class_labels if config is None else config.class_labels
    return Source(
        f"the student in {folder}",
        generate,
        tuple(noise.shape[1:]),
        chosen or tuple(range(classes)),
        folder=folder,
        run=run,
        config=config,
        text=text,
        latents=(lambda eps, rows: latents(eps, rows)[0]) if takes_noise and family.has_decoder else None,
        decodes=family.has_decoder,
        encode=(lambda prompts: family.encode(pipeline, signature(), prompts)) if text else None,
        limits=functools.partial(_limits, family, pipeline) if text else tuple,
        arguments=family.given,
    )


def _open_enlarging(
    family: PipelineSpec,
    pipeline: Any,
    folder: Path,
    device: torch.device,
    run: Path | None,
    config: DistillConfig | None,
    base: FirstStage,
) -> Source:
    """Return the plain call of an exported pipeline that enlarges the pictures of a base student."""
    assert family.image_condition is not None
    network, arguments, beside = (
        getattr(pipeline, family.network),
        dict(family.export_arguments),
        family.image_condition,
    )
    (seen,) = record(lambda: family.call(pipeline, examples(family, 1), arguments), network)
    shape = tuple(family.sort_call(seen, pipeline).x_t.shape[1:])
    check_shape(base, shape)
    base.teacher.lend_encoders(pipeline)
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
        arguments=family.given,
        decodes=family.has_decoder,
        base=base,
        noise_level=level,
        limits=functools.partial(_limits, family, pipeline),
    )


def _limits(family: PipelineSpec, pipeline: Any) -> tuple[PromptLimit, ...]:
    """Return the numbers of tokens of a prompt that the text encoders of an exported pipeline take."""
    arguments = dict(family.export_arguments)
    with tokenizing.listening(pipeline) as heard:
        record(lambda: family.call(pipeline, [EXAMPLE], arguments), getattr(pipeline, family.network))
    return tokenizing.limits(heard)


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
