"""Folders of diffusers' pipelines: what of them is loaded, and what is refused."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from onestill.core.errors import NOT_GIVEN, SettingError, named
from onestill.core.files import PICKLE_SUFFIXES, variant_of
from onestill.core.models import check_configs, load_model
from onestill.core.reading import loading, read_mapping

INDEX = "model_index.json"
CHECKER = "safety_checker"
NETWORKS = ("unet", "transformer")
# What a component may be: a network, a scheduler, a tokenizer or a processor.
_KINDS = (ModelMixin, diffusers.SchedulerMixin, transformers.utils.PushToHubMixin)


def load_stock(
    cls: Any, folder: Path, parts: Mapping[str, Any] = MappingProxyType({}), *, with_checker: bool = False
) -> Any:
    """Return a stock pipeline; safetensors only, no remote code, no network, and no text on the screen.

    Every part is in float32, whatever the dtype of its file: some libraries keep the file's and some do not, and parts
    of two dtypes neither run together nor make one export.

    Args:
        cls: Its class.
        folder: Its folder.
        parts: Components in the place of the folder's, and options of `from_pretrained`.
        with_checker: Keep its safety checker, which blackens what it flags: to write the pipeline, not to call it.

    Raises:
        ValueError: If a component lacks a tensor, needs code of its own, or cannot be read.
    """
    index = read_mapping(folder / INDEX)
    # Some pipelines ask for a part they can do without, such as a third text encoder, unless told it is absent.
    given = {**{name: None for name, entry in index.items() if entry == [None, None]}, **parts}
    for name, entry in index.items():
        if name not in given and not name.startswith("_") and isinstance(entry, list):
            given.update(_loaded(folder, name, entry, given.get("variant")))
    with loading(f"{folder}: the {cls.__name__}"):
        pipeline = cls.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, trust_remote_code=False, **given
        )
    pipeline.set_progress_bar_config(disable=True)
    if getattr(pipeline, "watermark", None) is not None:
        pipeline.watermark = None  # SDXL marks its pictures where a package for it happens to be installed
    if not with_checker and hasattr(pipeline, "run_safety_checker"):
        pipeline.safety_checker = None  # a pipeline that has this method does without
    return pipeline


def _loaded(folder: Path, name: str, entry: list[Any], variant: str | None) -> dict[str, Any]:
    """Return the network that a component is by its name; of others, which hold no weights, nothing.

    Where there are no files of the variant, nor plain ones, those of another are taken, as of a student saved again.
    """
    cls = component_class(folder, name, *entry)
    place = folder / name if (folder / name).is_dir() else folder  # some old folders keep their one network flat
    if not issubclass(cls, nn.Module):
        with loading(f"{folder}: {name}/"):
            check_configs(place)
        return {}
    there = {variant_of(path.name) for path in place.glob("*.safetensors")}
    chosen = next((each for each in (variant, None, *sorted(there - {None}, key=str)) if each in there), None)
    how = {"variant": chosen, "dtype": torch.float32}
    return {name: load_model(cls, place, f"{folder}: {name}/", how).model}


def component_class(folder: Path, name: str, library: Any, class_name: Any) -> Any:
    """Return the class of a component; ValueError if it is of neither library, and so needs code of its own."""
    homes = {"diffusers": diffusers, "transformers": transformers}
    home = homes.get(library) or (
        getattr(diffusers.pipelines, str(library), None) if str(library).isidentifier() else None
    )
    cls = getattr(home, str(class_name), None) if inspect.ismodule(home) else None
    if not inspect.isclass(cls) or not issubclass(cls, _KINDS) or issubclass(cls, DiffusionPipeline):
        why = "which neither diffusers nor transformers has" if cls is None else "which is no part of a pipeline"
        code = ": it would need code of its own, which is never run" if cls is None else ""
        shown = f"{library}.{class_name}"[:80]
        raise ValueError(f"{folder}: model_index.json says that {name!r} is a {shown}, {why}{code}")
    return cls


def pipeline_class(class_name: str) -> Any:
    """Return diffusers' pipeline of a name; ValueError if it has none."""
    cls = getattr(diffusers, class_name, None) if class_name.isidentifier() else None
    if not inspect.isclass(cls) or not issubclass(cls, DiffusionPipeline) or cls is DiffusionPipeline:
        raise ValueError(f"diffusers {diffusers.__version__} has no such pipeline")
    return cls


def load_pipeline(
    folder: Path, index: dict[str, Any], source: str, variant: str | None, without: tuple[str, ...] = ()
) -> Any:
    """Return the stock pipeline in a folder, with the class that its index names, but for the components `without`.

    Raises:
        ValueError: If a component is missing or a pickle, or it does not load.
    """
    check_components(folder, {n: part for n, part in index.items() if n not in without}, source, variant)
    try:
        return load_stock(pipeline_class(index["_class_name"]), folder, options(without, variant))
    except ValueError as error:
        message = str(error).removeprefix(f"{folder}: ")
        raise ValueError(f"{source}: the pipeline does not load: {message}") from error


def has_checker(folder: Path) -> bool:
    """Return whether the pipeline in a folder has a safety checker, which its own call runs."""
    entry = read_mapping(folder / INDEX).get(CHECKER)
    return isinstance(entry, list) and entry[1] is not None


def options(without: Sequence[str], variant: str | None) -> dict[str, Any]:
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
        weights = [f for f in files if f.endswith(".safetensors")]
        if (pickles := [f for f in files if f.endswith(PICKLE_SUFFIXES)]) and not weights:
            raise ValueError(
                f"{source}: {name}/ holds only the pickle {pickles[0]}, which can run code when loaded. Convert it "
                "once where you trust it, with save_pretrained of its class"
            )
        check_variant(name, weights, source, variant, may_lack=name not in NETWORKS)


def check_variant(name: str, weights: Sequence[str], source: str, variant: str | None, *, may_lack: bool) -> None:
    """Raise SettingError if a component's files of weights, if it has any, are all of another variant than is asked for.

    One that `may_lack` the variant is loaded from its plain files then, as diffusers does.
    """
    there = {variant_of(file) for file in weights}
    if not there or variant in there or (None in there and may_lack):
        return
    others = [f"{named('variant')} {each}" for each in sorted(there - {None}, key=str)]
    shown = f"{name}/ holds {', '.join(sorted(weights)[:3])}{', ...' if len(weights) > 3 else ''}"
    todo = " or ".join(["leave it out"] * (None in there) + [f"give {each}" for each in others])
    raise SettingError("variant", NOT_GIVEN if variant is None else variant, shown, todo, where=source)
