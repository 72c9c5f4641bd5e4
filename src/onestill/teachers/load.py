"""From a path, a hub id or an embedded name to a teacher; what cannot be one is refused by name."""

from __future__ import annotations

import difflib
import errno
import inspect
import json
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers

from onestill.core.arguments import Name, checked
from onestill.core.devices import resolve_device
from onestill.core.errors import SettingError, named
from onestill.core.files import MARK_FILE, RUN_FILE
from onestill.core.reading import loading, read_json
from onestill.teachers.base import Teacher
from onestill.teachers.pipelines.build import load_family
from onestill.teachers.pipelines.families import FAMILIES
from onestill.teachers.pipelines.generic import load_generic
from onestill.teachers.pipelines.single_file import folder_of
from onestill.teachers.pipelines.spec import PipelineSpec
from onestill.teachers.pixel import PIPELINES as UNET2D_PIPELINES
from onestill.teachers.pixel import load_unet2d
from onestill.teachers.settings import CALL_ARGUMENTS

UNREACHABLE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN)
FAMILY_OF_PIPELINE: dict[str, PipelineSpec] = {name: family for family in FAMILIES for name in family.pipelines}

_INPAINTING = (
    "its network is given a mask and a masked picture beside the noise, 9 channels; those would have to be drawn "
    "with every prompt, which needs pictures or a model that makes them"
)


REFUSED = {
    "StableDiffusionInpaintPipeline": _INPAINTING,
    "StableDiffusionXLInpaintPipeline": _INPAINTING,
    "ScoreSdeVePipeline": "score-SDE networks divide their output by sigma; wrap yours with onestill.module_teacher",
    "KarrasVePipeline": "its scheduler is a stochastic one without alphas_cumprod; wrap yours with onestill.module_teacher",
    "LatentConsistencyModelPipeline": (
        "it passes its scheduler `original_inference_steps`, which no scheduler but LCMScheduler takes. Its parts are those "
        "of a StableDiffusionPipeline, which a copy of the folder becomes with that as _class_name in model_index.json; "
        "its network is then told 7.5 by default, and 8.5, which is this pipeline's, with guidance_scale 8.5"
    ),
    "VQDiffusionPipeline": "it predicts discrete tokens, not a continuous signal",
    "AmusedPipeline": "it predicts masked tokens, not a continuous signal",
    "WuerstchenDecoderPipeline": "its cascade has no single trajectory from noise to image",
    "WuerstchenCombinedPipeline": "its cascade has no single trajectory from noise to image",
}

NOT_CHOSEN = (
    *("self", "prompt", "class_labels", "generator", "latents", "output_type", "return_dict", "num_inference_steps"),
    *("timesteps", "sigmas", "num_images_per_prompt", "prompt_embeds", "negative_prompt_embeds", "image", "batch_size"),
)
"""Arguments of a pipeline's call that are given here, or that would change what is made of noise and conditions."""


@dataclass(frozen=True)
class Embedded:
    """A teacher shipped inside the package.

    Attributes:
        folder: Its pipeline, with `classifier.safetensors` and the real `images.safetensors` for its evaluation.
        null_class: Its label of "no class".
        prompts: Prompts that a run takes if none are named; None if it takes no text.
        heldout: Prompts of its real images, which no run takes by itself: those of an evaluation if none are named.
        white: The largest value of the real images, which stands for 1.
    """

    folder: Path
    null_class: int | None = None
    prompts: Path | None = None
    heldout: Path | None = None
    white: int = 255


_HERE = Path(__file__).parents[1] / "embedded"
EMBEDDED = {
    "digits": Embedded(_HERE / "digits", null_class=10, white=16),
    "glyphs": Embedded(
        _HERE / "glyphs", prompts=_HERE / "glyphs" / "prompts.txt", heldout=_HERE / "glyphs" / "heldout.txt"
    ),
}


@checked()
def load_teacher(
    source: Name,
    *,
    revision: str | None = None,
    variant: str | None = None,
    original_config: str | Path | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    null_class: int | None = None,
    t_max: float | None = None,
    device: str = "cpu",
    arguments: Mapping[str, Any] | None = None,
) -> Teacher:
    """Return the teacher in a diffusers pipeline folder or file, of a hub id, or embedded under a name.

    Only safetensors are read and no remote code runs. Nothing is downloaded unless `source` is a hub id. All weights are
    loaded in float32, whatever their files hold.

    Args:
        source: A folder, a .safetensors of a whole pipeline, a hub id "owner/name", or an embedded teacher ("digits", "glyphs"; a folder of that name is "./digits").
        revision: Branch, tag or commit of the hub id.
        variant: Weights' variant such as "fp16".
        original_config: For one file: a folder or hub id of a pipeline of its architecture, or the YAML of the original
            training code; what the hub's cache has if None.
        cache_dir: Where downloads go, and the folder that a file is made into; the usual caches if None.
        local_files_only: Never use the network.
        null_class: The label that means "no class"; known for embedded teachers.
        t_max: Start level in (0, 1]; chosen from the process and the prediction type if None.
        device: Where the network goes.
        arguments: Arguments of every call of the pipeline, such as height, width or num_frames; its own defaults if
            None.

    Raises:
        ValueError: If there is no such teacher, the folder is no pipeline, the pipeline is not supported, its
            weights are pickles, missing or of the wrong shape, or the self-check against its scheduler fails.
    """
    source, device = str(source), str(resolve_device(device))
    if source in EMBEDDED and null_class is None:
        null_class = EMBEDDED[source].null_class
    folder = _find_folder(source, revision, variant, original_config, cache_dir, local_files_only)
    index = read_index(folder, source)
    class_name = index["_class_name"]
    if reason := REFUSED.get(class_name):
        supported = ", ".join(sorted([*UNET2D_PIPELINES, *FAMILY_OF_PIPELINE]))
        raise ValueError(f"{source}: a {class_name} cannot be a teacher: {reason}. Supported pipelines: {supported}")
    arguments = arguments or {}
    check_arguments(arguments, class_name)
    with loading(source, ValueError):
        teacher = _loaded(folder, index, source, variant, null_class, arguments)
        if t_max is not None:
            teacher = teacher.with_t_max(t_max)
        return teacher.to(device)


def _loaded(
    folder: Path,
    index: dict[str, Any],
    source: str,
    variant: str | None,
    null_class: int | None,
    arguments: Mapping[str, Any],
) -> Teacher:
    """Return the teacher in a pipeline's folder, by the kind of the pipeline."""
    class_name = index["_class_name"]
    if class_name in UNET2D_PIPELINES:
        return load_unet2d(folder, index, source, variant, null_class)
    if null_class is not None:
        raise SettingError("null_class", null_class, f"a {class_name} knows its own", "leave it out")
    if family := FAMILY_OF_PIPELINE.get(class_name):
        return load_family(family.with_arguments(arguments), folder, index, source, variant)
    return load_generic(folder, index, source, variant, arguments)


def check_arguments(arguments: Mapping[str, Any], class_name: str) -> None:
    """Raise ValueError if a pipeline's call has no such arguments, or they are not to be chosen.

    A class that is unknown is refused elsewhere.
    """
    cls = getattr(diffusers, class_name, None)
    if not inspect.isclass(cls):
        return
    taken = () if class_name in UNET2D_PIPELINES else inspect.signature(cls.__call__).parameters
    for name in arguments:
        if name in NOT_CHOSEN or name.startswith("callback"):
            why = "is no argument that can be chosen: calls are made with one of their own"
            raise SettingError(name, arguments[name], why, "leave it out")
        if name not in taken:
            known = [named(known) for known in CALL_ARGUMENTS if known in taken]
            has = f"it has {'' if known else 'none of '}{', '.join(known or map(named, CALL_ARGUMENTS))}"
            raise SettingError(name, arguments[name], f"the call of {class_name} has no such argument", has)


def _find_folder(
    source: str,
    revision: str | None,
    variant: str | None,
    original_config: str | Path | None,
    cache_dir: str | Path | None,
    offline: bool,
) -> Path:
    path, is_there = _look(source)
    is_file = is_there and path.is_file() and source not in EMBEDDED
    if original_config is not None and not is_file:
        why = "is the configuration of a teacher in one file, and this teacher is none"
        raise SettingError("original_config", str(original_config), why, "leave it out")
    if source in EMBEDDED:
        return EMBEDDED[source].folder
    if is_there and path.is_dir():
        return path
    if is_file:
        given, place = None if original_config is None else str(original_config), cache_dir and Path(cache_dir)
        return folder_of(path, source, given, place or None, offline=offline)
    if is_there:
        raise SettingError("teacher", source, "is no file", "give the folder of a diffusers pipeline")
    is_path = source.startswith((".", "/", "~"))
    if is_path or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        todo = "give a folder of a diffusers pipeline, a hub id 'owner/name', or an embedded teacher"
        why = f"no such {'folder' if is_path else 'teacher'}"
        raise SettingError("teacher", source, why, f"{_nearest(path)}{todo} ({', '.join(EMBEDDED)})")
    return _download(source, revision, variant, cache_dir, offline)


def _nearest(path: Path) -> str:
    """Return a question for the name that may have been meant, of those beside a path that is not there; "" if none is."""
    beside = []
    with suppress(OSError, ValueError):  # a parent that is no folder, or may not be read
        beside = sorted(each.name for each in path.parent.iterdir())[:1000]
    embedded = list(EMBEDDED) if path.parent == Path() else []
    found = difflib.get_close_matches(path.name[:80], [*embedded, *beside], n=1)
    return f"did you mean {str(path.with_name(found[0]))!r}? Else " if found else ""


def _look(source: str) -> tuple[Path, bool]:
    """Return (path, whether there is something); what cannot be a path, such as an endless name, is not there."""
    path = Path(source)
    try:
        path = path.expanduser()
        return path, bool(source) and path.exists()
    except (OSError, ValueError, RuntimeError):  # a home of nobody is the last
        return path, False


def _download(
    source: str, revision: str | None, variant: str | None, cache_dir: str | Path | None, offline: bool
) -> Path:
    from diffusers import DiffusionPipeline
    from huggingface_hub import hf_hub_download

    try:
        folder = Path(
            DiffusionPipeline.download(
                source,
                revision=revision,
                variant=variant,
                cache_dir=cache_dir,
                local_files_only=offline,
                use_safetensors=True,
                trust_remote_code=False,
            )
        )
    except Exception as error:  # the hub client raises many unrelated types; each means "not to be had"
        why = f"no such teacher: it is no folder here, and the hub gave no pipeline of that name: {_why_not(error, offline)}"
        raise SettingError("teacher", source, why) from error
    # Its card, which names its license, and the mark of a student are in no pipeline's download; there may be none.
    for name in ("README.md", MARK_FILE):
        with suppress(Exception):
            hf_hub_download(source, name, revision=revision, cache_dir=cache_dir, local_files_only=offline)
    return folder


def _why_not(error: BaseException, offline: bool) -> str:
    """Return why the hub gave nothing, and what to do."""
    from huggingface_hub import errors

    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    for kinds, reason in (
        (errors.GatedRepoError, "it is gated: accept its terms on its page, and log in with `hf auth login`"),
        (errors.RevisionNotFoundError, f"it has no such {named('revision')}"),
        (errors.RepositoryNotFoundError, "there is none, or it is private: log in with `hf auth login`"),
        (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE forbids the network, and it was not downloaded before"),
    ):
        if any(isinstance(each, kinds) for each in causes):
            return reason
    if any(map(_is_of_the_network, causes)):
        return "the hub cannot be reached, and it was not downloaded before"
    if offline and any(isinstance(each, errors.LocalEntryNotFoundError) for each in causes):
        return f"{named('local_files_only')} forbids the network, and it was not downloaded before"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _is_of_the_network(error: BaseException) -> bool:
    kinds = (socket.gaierror, ConnectionError, TimeoutError)
    return isinstance(error, kinds) or (isinstance(error, OSError) and error.errno in UNREACHABLE)


def read_index(folder: Path, source: str) -> dict[str, Any]:
    """Return the model_index.json of a pipeline's folder; ValueError if there is none, or a broken one."""
    path = folder / "model_index.json"
    if not path.is_file():
        if any((each / RUN_FILE).is_file() for each in (folder, folder.parent)):
            todo = f"name the teacher that it was distilled from; {named('student')} draws with it"
            raise SettingError("teacher", source, "is a run, whose student has one step", todo)
        around = f"around it, {str(folder.parent)!r}" if (folder.parent / "model_index.json").is_file() else ""
        todo = f"give the folder {around or 'that save_pretrained wrote'}"
        raise SettingError("teacher", source, "is no diffusers pipeline: it has no model_index.json", todo)
    try:
        index = read_json(path)
    except ValueError as error:
        raise ValueError(f"{source}: model_index.json does not parse: {error}") from error
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise ValueError(f"{source}: model_index.json names no pipeline class (_class_name)")
    for name, entry in index.items():
        if not isinstance(entry, list) or name.startswith("_"):
            continue
        if len(entry) != 2 or not all(part is None or isinstance(part, str) for part in entry):
            shown = json.dumps(entry)[:80]
            raise ValueError(f"{source}: model_index.json gives {name!r} as {shown}, not as [library, class]")
    return index
