"""What differs between the families of diffusers' pipelines, and what is the same in all of them.

A family is a short description: which pipelines, which component denoises, how its schedule is to be read. The
rest is done here, once: loading, the conditions of a prompt and of no prompt (by watching the pipeline, see
`recording`), the self-check against the pipeline's own call, and writing a student as a stock folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from onestill.process import FlowMatching, Process, choose_t_max
from onestill.teachers import encoders
from onestill.teachers.base import NetworkTeacher, TeacherSpec, Threshold
from onestill.teachers.recording import Call, Signature, as_call, asked_shift, record, split, watch
from onestill.teachers.schedulers import times_of
from onestill.tensors import Cond, as_times, refuse_non_finite
from onestill.trajectory import Trajectory

SELF_CHECK_TOLERANCE = 1e-4
INDEX = "model_index.json"
CALL_FILE = "onestill_call.json"
"""In an exported folder: the arguments of the call that a student was distilled at, if any were asked for."""
PLAIN = (bool, int, float, str)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Schedule:
    """A pipeline's schedule in our terms.

    Attributes:
        process: The noise process.
        prediction_type: What the network predicts, after `Family.sign`.
        stock: A deterministic scheduler of diffusers on the same schedule, for the self-check.
        threshold: What the pipeline's own sampler does to x_0.
    """

    process: Process
    prediction_type: str
    stock: Any
    threshold: Threshold = field(default_factory=Threshold)


@dataclass(frozen=True)
class Beside:
    """A picture that the network is given beside its noisy input, as further channels; an earlier model draws it.

    Attributes:
        name: Name of the condition.
        kept: Names of all conditions that come with the picture: a guided step has them in both halves.
        channels: From the network's config to the number of noisy channels, which come first.
        example: From (pipeline, number of images) to some pictures in [-1, 1], [B, C, h, w].
        arguments: From (pictures, level) to the call's arguments that give them to the pipeline.
        rows: From (pipeline, pictures in [-1, 1], noise of the sample's shape, level) to the conditions in `kept`.
        num_levels: From the pipeline to the number of noise levels it knows.
        level: How much noise is mixed into the pictures.
        usual_factor: How many times larger than the picture the published networks' samples are.
    """

    name: str
    kept: tuple[str, ...]
    channels: Callable[[Any], int]
    example: Callable[[Any, int], Tensor]
    arguments: Callable[[Tensor, int], Mapping[str, Any]]
    rows: Callable[[Any, Tensor, Tensor, int], Cond]
    num_levels: Callable[[Any], int]
    level: int
    usual_factor: int


@dataclass(frozen=True)
class Family:
    """A family of pipelines.

    Attributes:
        name: Short name, such as "stable_diffusion".
        pipelines: Class names of the pipelines.
        network: The component that denoises: "unet" or "transformer".
        schedule: From the pipeline to its schedule.
        decode: From (pipeline, what the network makes) to images; None where that is the images already.
        one_step: From (pipeline, prediction_type, alpha at the start level) to the scheduler of an exported student.
        arguments: Arguments of every call of the pipeline.
        asked: Those of them that were asked for, such as a size.
        result: From what a call with output_type="pt" returns to images in [-1, 1], as `decode` gives them.
        guidance: Name of the call's argument for the guidance scale; None if it has none.
        prompt: Name of the call's argument for conditions: "prompt" or "class_labels".
        sign: Factor on the network's output that makes it what the prediction type says.
        export_arguments: Arguments of the plain call of an exported student, besides the condition.
        null_class: From the network's config to the label of "no class", for class-conditional families.
        adapt: Last changes to the network's config before a student is written.
        beside: The picture that is given beside x_t, in super-resolution.
        without: Optional components that are neither loaded nor written.
        size: From the pipeline to arguments of every call that follow from its configuration.
        pack: From (latents, constant arguments of the call) to what the network sees, where that is a permutation.
        unpack: The inverse of `pack`.
        set_size: From (network, height and width of x_t) to whether the class's own default size is now that one.
        cut: From (pipeline, what `decode` gives, arguments of every call) to what the pipeline returns of it.
        returns: Where the pipeline's output has its results: "images", "frames" or "audios".
        on_pixels: Whether `decode` is given pixels, such as to threshold them, and no latents.
    """

    name: str
    pipelines: tuple[str, ...]
    network: str
    schedule: Callable[[Any], Schedule]
    decode: Callable[[Any, Tensor], Tensor] | None
    one_step: Callable[[Any, str, float], Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    asked: Mapping[str, Any] = field(default_factory=dict)
    result: Callable[[Any], Tensor] = lambda output: output.images * 2 - 1
    guidance: str | None = "guidance_scale"
    prompt: str = "prompt"
    sign: float = 1.0
    export_arguments: Mapping[str, Any] = field(
        default_factory=lambda: {"num_inference_steps": 1, "guidance_scale": 1.0}
    )
    null_class: Callable[[Any], int] | None = None
    adapt: Callable[[nn.Module], None] = lambda network: None
    beside: Beside | None = None
    without: tuple[str, ...] = ()
    size: Callable[[Any], Mapping[str, Any]] = lambda pipeline: {}
    pack: Callable[[Tensor, Mapping[str, Any]], Tensor] = lambda latents, constant: latents
    unpack: Callable[[Tensor, Mapping[str, Any]], Tensor] = lambda packed, constant: packed
    set_size: Callable[[Any, tuple[int, int]], bool] = lambda network, size: False
    cut: Callable[[Any, Tensor, Mapping[str, Any]], Tensor] = lambda pipeline, decoded, arguments: decoded
    returns: str = "images"
    on_pixels: bool = False

    @property
    def latents(self) -> bool:
        """Whether the network works on latents, which a decoder makes images of."""
        return self.decode is not None and not self.on_pixels

    def asking(self, arguments: Mapping[str, Any]) -> Family:
        """Return the family with these arguments in every call."""
        return replace(self, arguments={**self.arguments, **arguments}, asked={**self.asked, **arguments})

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
        if self.beside is not None:
            given |= self.beside.arguments(self.beside.example(pipeline, len(conditions)), self.beside.level)
        return pipeline(**{**given, **arguments})

    def sort_call(self, call: Call, pipeline: Any) -> Call:
        """Return a recorded call with x_t alone as its noisy input."""
        if self.beside is None:
            return call
        return split(call, self.beside.name, self.beside.channels(getattr(pipeline, self.network).config))

    @torch.no_grad()
    def plain_call(self, pipeline: Any, teacher: PipelineTeacher, num: int) -> tuple[Tensor, Tensor, Cond]:
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
        eps = self.unpack(call.x_t, teacher.signature.constant)
        return self.result(output), eps, teacher.signature.conditions(call)

    def signature(self, pipeline: Any) -> tuple[Signature, Call]:
        """Return (how the pipeline calls its network, seen in calls for one image and for two; the call for one)."""
        one, two = (_calls(self, pipeline, examples(self, num), 1.0, seeds=range(num))[0] for num in (1, 2))
        return Signature.of(one, two, None if self.beside is None else self.beside.name), one

    @torch.no_grad()
    def encode(self, pipeline: Any, signature: Signature, prompts: Sequence[Any], seeds: Sequence[int] = ()) -> Cond:
        """Return the conditions that the pipeline makes of prompts, one row each.

        Args:
            pipeline: The pipeline.
            signature: How it calls its network.
            prompts: The prompts.
            seeds: For what the pipeline draws on the way; 0, 1, ... if there are none.
        """
        (call,) = _calls(self, pipeline, prompts, 1.0, seeds=seeds or range(len(prompts)))
        return signature.conditions(call)

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

    def guided(self, scale: float) -> dict[str, Any]:
        """Return the argument that sets the guidance scale, if the pipeline has one."""
        return {} if self.guidance is None else {self.guidance: scale}


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

    def of_prompts(self, cond: Cond) -> Cond:
        """Return the conditions that prompts decide: without those that come with a picture, if the teacher takes one."""
        kept = () if self.family.beside is None else self.family.beside.kept
        return {name: value for name, value in cond.items() if name not in kept}

    def encoder_identity(self) -> str:
        """Return a name for what turns prompts into conditions: the same name is the same conditions."""
        facts = (
            type(self.pipeline).__name__,
            encoders.plain_config(self.network.config),  # type: ignore[attr-defined]  # a pipeline's network has one
            getattr(self.pipeline, "vae_scale_factor", None),
            sorted(self.family.arguments.items()),
            [
                (name, tuple(v.shape[1:]), str(v.dtype))
                for name, v in sorted(self.of_prompts(self.example_cond).items())
            ],
        )
        return f"{self.family.name}-{encoders.identity(self.pipeline, facts)}"

    @property
    def prompt_limit(self) -> int | None:
        """The most tokens of a prompt that the text encoders take; None if that is not known."""
        return encoders.limit(self.pipeline, self.family.asked.get("max_sequence_length"))

    def are_cut(self, prompts: Sequence[str]) -> list[bool]:
        """Return whether each prompt is longer than that."""
        return encoders.are_cut(self.pipeline, prompts, self.family.asked.get("max_sequence_length"))

    @property
    def encoders_released(self) -> bool:
        """Whether the text encoders have left memory, so that `encode` is over."""
        return bool(self._released)

    def release_encoders(self) -> None:
        """Let the text encoders and tokenizers go; `encode` is over, everything else stays."""
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

    def load_afresh(self, parts: Mapping[str, Any]) -> Any:
        """Return the pipeline as `load_stock` reads it from where it was loaded, with `parts` in place of its own."""
        return load_stock(type(self.pipeline), self.folder, _options(self.family.without, self.variant) | dict(parts))

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
        self.load_afresh(parts).save_pretrained(folder, safe_serialization=True)
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


def load_stock(cls: Any, folder: Path, parts: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """Return a stock pipeline; safetensors only, no remote code, no network, and no text on the screen.

    Args:
        cls: Its class.
        folder: Its folder.
        parts: Components in the place of the folder's, and options of `from_pretrained`.
    """
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    # Some pipelines ask for a part they can do without, such as a third text encoder, unless told it is absent.
    absent = {name: None for name, entry in index.items() if entry == [None, None]}
    pipeline = cls.from_pretrained(
        folder, use_safetensors=True, local_files_only=True, trust_remote_code=False, **{**absent, **parts}
    )
    pipeline.set_progress_bar_config(disable=True)
    if getattr(pipeline, "watermark", None) is not None:
        pipeline.watermark = None  # SDXL marks its pictures where a package for it happens to be installed
    return pipeline


def load_family(
    family: Family, folder: Path, index: dict[str, Any], source: str, variant: str | None
) -> PipelineTeacher:
    """Return the teacher in the folder of a stock pipeline, after the self-check.

    Raises:
        ValueError: If a component is missing or a pickle, does not load, or the self-check fails.
    """
    cls = getattr(diffusers, index["_class_name"])
    pipeline = load_pipeline(folder, index, source, variant, family.without)
    try:
        return pipeline_teacher(family, pipeline, folder, source, variant)
    except ValueError as error:
        raise ValueError(f"{source}: {_naming_flags(str(error), family.asked)}") from error
    except (RuntimeError, AttributeError, TypeError, LookupError) as error:
        absent = [n for n, part in pipeline.components.items() if part is None and n.startswith(("text", "token"))]
        why = f": {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if absent:
            why = (
                f" without {' and '.join(absent)}, which encode its prompts: use a folder that holds the whole pipeline"
            )
        raise ValueError(f"{source}: the {cls.__name__} does not run{why}") from error


def _naming_flags(message: str, asked: Mapping[str, Any]) -> str:
    """Return a pipeline's message behind the flags of the arguments it speaks of."""
    flags = [f"--{name} {value}" for name, value in asked.items() if name in message.lower()]
    said = " ".join(message.split())
    return f"{' '.join(flags)}: {said}" if flags and not said.startswith("--") else said


def load_pipeline(
    folder: Path, index: dict[str, Any], source: str, variant: str | None, without: tuple[str, ...] = ()
) -> Any:
    """Return the stock pipeline in a folder, with the class that its index names.

    Args:
        folder: The folder.
        index: Its model_index.json.
        source: Its name in messages.
        variant: Weights' variant.
        without: Optional components that are not loaded.

    Raises:
        ValueError: If a component is missing or a pickle, or it does not load.
    """
    check_components(folder, {n: part for n, part in index.items() if n not in without}, source, variant)
    try:
        return load_stock(getattr(diffusers, index["_class_name"]), folder, _options(without, variant))
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, ImportError) as error:
        raise ValueError(f"{source}: the pipeline does not load: {' '.join(str(error).split())[:300]}") from error


def _options(without: Sequence[str], variant: str | None) -> dict[str, Any]:
    """Return what `load_stock` is told of the components that are not loaded and of the weights' variant."""
    return {**dict.fromkeys(without), **({"variant": variant} if variant else {})}


def check_components(folder: Path, index: dict[str, Any], source: str, variant: str | None = None) -> None:
    """Raise ValueError if a component that the index names has no folder, or only pickles for weights."""
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or entry[1] is None:
            continue
        if not (folder / name).is_dir():
            raise ValueError(f"{source}: the folder {name}/ ({entry[1]}) is missing, which model_index.json names")
        files = [p.name for p in (folder / name).iterdir()]
        if pickles := [f for f in files if f.endswith(PICKLES)]:
            if not any(f.endswith(".safetensors") for f in files):
                raise ValueError(
                    f"{source}: {name}/ holds only the pickle {pickles[0]}, which can run code when loaded. Convert it "
                    "once where you trust it, with save_pretrained of its class"
                )
        elif variant and not any(f".{variant}." in f for f in files if f.endswith(".safetensors")):
            weights = [f for f in files if f.endswith(".safetensors")]
            if weights and name in ("unet", "transformer"):
                raise ValueError(f"{source}: --variant {variant}: {name}/ holds {', '.join(weights)}")


def pipeline_teacher(
    family: Family, pipeline: Any, folder: Path, source: str = "", variant: str | None = None
) -> PipelineTeacher:
    """Return the teacher inside a pipeline loaded from `folder`, after the self-check.

    Raises:
        ValueError: If the pipeline's schedule or its way of calling the network is not supported, or the
            self-check fails.
    """
    network = getattr(pipeline, family.network)
    schedule = family.schedule(pipeline)
    t_max, reason = choose_t_max(schedule.process, schedule.prediction_type)
    _check_channels(family, network.config)
    signature, one = family.signature(pipeline)
    process = _with_shift(schedule.process, family, pipeline)
    null_class = None if family.null_class is None else family.null_class(network.config)
    spec = TeacherSpec(
        family=family.name,
        source=source,
        process=process,
        prediction_type=schedule.prediction_type,
        sample_shape=tuple(family.unpack(one.x_t, signature.constant).shape[1:]),
        t_max=t_max,
        t_max_reason=reason,
        num_classes=null_class,
        null_class=null_class,
        threshold=schedule.threshold,
        text=family.prompt == "prompt",
    )
    _check_size(family, pipeline, spec.sample_shape)
    null = {} if null_class is not None else _null_conditions(family, pipeline, signature)
    teacher = PipelineTeacher(family, pipeline, folder, spec, signature, null, signature.conditions(one), variant)
    self_check(teacher, schedule.stock)
    if isinstance(vae := getattr(pipeline, "vae", None), nn.Module):
        refuse_non_finite(vae, "vae")  # which the steps above do not use
    return teacher


def examples(family: Family, num: int) -> list[Any]:
    """Return some valid prompts or labels."""
    return [0] * num if family.prompt == "class_labels" else ["a photo", "a drawing of it"][:num]


def _check_channels(family: Family, config: Any) -> None:
    """Raise ValueError if the network returns less than its noisy input, and so is given more than that."""
    noisy = config.get("in_channels") if family.beside is None else family.beside.channels(config)
    output = config.get("out_channels")
    if noisy and output and output < noisy:
        raise ValueError(
            f"the network takes {noisy} channels and returns {output}: the others hold a mask or a picture "
            "(inpainting, image to image), which would have to be given with every prompt, so it is not supported"
        )


def _check_size(family: Family, pipeline: Any, sample_shape: tuple[int, ...]) -> None:
    """Raise ValueError if the pipeline rounded a size that was asked for, which some do without a word."""
    asked = family.asked
    spatial = getattr(pipeline, "vae_scale_factor_spatial", getattr(pipeline, "vae_scale_factor", None))
    temporal = getattr(pipeline, "vae_scale_factor_temporal", None)
    made = {}
    if spatial is None and getattr(pipeline, "vae", None) is None:
        spatial = 1
    if spatial is not None and len(sample_shape) >= 3:
        made = {"height": sample_shape[-2] * spatial, "width": sample_shape[-1] * spatial}
    if temporal is not None and len(sample_shape) == 4:
        made["num_frames"] = (sample_shape[-3] - 1) * temporal + 1
    rounded = [name for name in made if name in asked and asked[name] != made[name]]
    if rounded:
        flags = " ".join(f"--{name} {asked[name]}" for name in rounded)
        nearest = " ".join(f"--{name} {made[name]}" for name in rounded)
        raise ValueError(f"{flags}: a {type(pipeline).__name__} cannot make that and rounds it; ask for {nearest}")


def _calls(
    family: Family,
    pipeline: Any,
    conditions: Sequence[Any],
    scale: float,
    until: Any = None,
    *,
    seeds: Sequence[int] = (),
) -> list[Call]:
    """Return the first network call of the pipeline for these conditions; with `until` all of its first step."""
    given = {"num_inference_steps": 2, **family.guided(scale)}
    run = lambda: family.call(pipeline, conditions, given, seeds=seeds)  # noqa: E731 - passed on at once
    return [family.sort_call(call, pipeline) for call in record(run, getattr(pipeline, family.network), until)]


def _with_shift(process: Process, family: Family, pipeline: Any) -> Process:
    """Return the process under the shift that the pipeline asks a "dynamic" scheduler for, itself elsewhere."""
    if not isinstance(process, FlowMatching) or not pipeline.scheduler.config.get("use_dynamic_shifting", False):
        return process
    run = lambda: family.call(pipeline, examples(family, 1), {"num_inference_steps": 2})  # noqa: E731 - passed on at once
    shift = asked_shift(run, getattr(pipeline, family.network), pipeline.scheduler)
    return FlowMatching(shift, process.net_scale, process.net_offset)


def _null_conditions(family: Family, pipeline: Any, signature: Signature) -> Cond:
    """Return the conditions of the unguided half of a guided step; {} if the pipeline does not guide.

    A pipeline either calls its network once with both halves, "no prompt" first, or twice, the prompt first.
    """
    if family.guidance is None:
        return {}
    calls = _calls(family, pipeline, examples(family, 1), 2.0, pipeline.scheduler)
    rows = signature.conditions(calls[-1])
    if len(calls) == 1 and all(len(value) == 1 for value in rows.values()):
        return {}
    kept = () if family.beside is None else family.beside.kept
    return {name: value[:1] for name, value in rows.items() if name not in kept}


@torch.no_grad()
def self_check(teacher: PipelineTeacher, stock: Any, num_steps: int = 2) -> float:
    """Compare some guided steps of ours with the pipeline's own call; return the largest relative difference.

    The pipeline runs with `stock`, a deterministic scheduler on its own schedule.

    Raises:
        ValueError: If they differ by more than 1e-4.
    """
    family, pipeline = teacher.family, teacher.pipeline
    scale, conditions, usual = 2.0 if teacher.can_guide else 1.0, examples(family, 2), pipeline.scheduler
    pipeline.scheduler = stock
    try:
        x_t, theirs = watch(
            lambda: family.call(
                pipeline, conditions, {"num_inference_steps": num_steps, **family.guided(scale)}, seeds=(0, 1)
            ),
            teacher.network,  # type: ignore[arg-type]  # a pipeline's network is a module
            stock,
            num_steps,
        )
    finally:
        pipeline.scheduler = usual
    x_t, theirs = (family.unpack(x[:2], teacher.signature.constant) for x in (x_t, theirs))
    x_t = x_t[:, : teacher.spec.sample_shape[0]]
    times = times_of(stock, teacher.spec.process)
    cond = teacher.encode(conditions)
    ours = x_t
    for t, s in pairwise(times):
        f = teacher.denoised(ours, t, cond)
        if scale != 1:
            without = teacher.denoised(ours, t, teacher.null_rows(cond))
            f = without + scale * (f - without)
        ours = Trajectory(teacher.spec.process, t).state(f, ours, as_times(s, 2))
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    if not error <= SELF_CHECK_TOLERANCE:
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module):
                refuse_non_finite(part, name)
        raise ValueError(
            f"self-check failed: {num_steps} steps of onestill and of {type(pipeline).__name__} differ by {error:.1e} "
            f"(allowed {SELF_CHECK_TOLERANCE:.0e}): the pipeline does not do what its configuration says"
        )
    return error
