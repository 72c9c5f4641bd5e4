"""Folders of diffusers' pipelines: what of them is loaded, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import diffusers
import torch

from onestill.core.errors import NOT_GIVEN, SettingError, in_short, named
from onestill.core.files import PICKLE_SUFFIXES, variant_of

INDEX = "model_index.json"
CHECKER = "safety_checker"
NETWORKS = ("unet", "transformer")


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
    """
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    # Some pipelines ask for a part they can do without, such as a third text encoder, unless told it is absent.
    absent = {name: None for name, entry in index.items() if entry == [None, None]}
    pipeline = cls.from_pretrained(
        folder,
        dtype=torch.float32,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        **{**absent, **parts},
    )
    pipeline.set_progress_bar_config(disable=True)
    if getattr(pipeline, "watermark", None) is not None:
        pipeline.watermark = None  # SDXL marks its pictures where a package for it happens to be installed
    if not with_checker and hasattr(pipeline, "run_safety_checker"):
        pipeline.safety_checker = None  # a pipeline that has this method does without
    return pipeline


def load_pipeline(
    folder: Path, index: dict[str, Any], source: str, variant: str | None, without: tuple[str, ...] = ()
) -> Any:
    """Return the stock pipeline in a folder, with the class that its index names, but for the components `without`.

    Raises:
        ValueError: If a component is missing or a pickle, or it does not load.
    """
    check_components(folder, {n: part for n, part in index.items() if n not in without}, source, variant)
    try:
        return load_stock(getattr(diffusers, index["_class_name"]), folder, options(without, variant))
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, ImportError) as error:
        raise ValueError(f"{source}: the pipeline does not load: {in_short(error, 300)}") from error


def has_checker(folder: Path) -> bool:
    """Return whether the pipeline in a folder has a safety checker, which its own call runs."""
    entry = json.loads((folder / INDEX).read_text(encoding="utf-8")).get(CHECKER)
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
