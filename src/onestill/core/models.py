"""Models of other libraries in the folders of others: whole, from safetensors alone, and no larger than their files.

Nothing of such a folder is trusted. What it says of itself is read here first, with bounds; then its library builds
and fills the model, and what it was built of is counted on the way, so that a configuration of a few bytes cannot ask
for more than there are weights for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import torch
from safetensors import safe_open
from torch import nn
from torch.nn.modules import module as hooks

from onestill.core.files import PICKLE_SUFFIXES, variant_of
from onestill.core.memory import is_out_of_memory
from onestill.core.patch import replaced
from onestill.core.reading import loading, read_mapping

LARGEST: Final = 2**24
"""The largest whole number in a configuration: tables and lists of that length are a few hundred MB."""
LARGEST_SIDE: Final = 2**12
"""The largest side of a picture, or of what it is decoded from."""
TOO_LARGE: Final = "its configuration describes a larger model than its files hold"
_NO_LIMIT: Final = (int(1e30), 1e30, None)
_FEW_BYTES: Final = 2**28  # of files that fill no memory: what is not to be had was asked for by the configuration
_MOST: Final = {"sample_size": LARGEST_SIDE, "model_max_length": 2**18}
_SMALL: Final = 2**24  # numbers that a model may hold whatever its files do
_MERGE = "load it with peft, merge (merge_and_unload), and save the model again"
_CAUSES: Final = (
    (r"lora_|base_layer", f"they hold a LoRA that is not merged: {_MERGE}"),
    (r"_orig_mod\.", "they were saved from a compiled model: save the model inside of it (its _orig_mod)"),
    (r"(^|\.)module\.", "they were saved from a wrapped model: save the model inside of it (its module)"),
    (r"quant|absmax|qweight|_scale_inv", "they are quantised: give the folder of the unquantised model"),
)


class Loaded(NamedTuple):
    """A model, the names that its files lack (of those that may be lacking), and those that it has no place for."""

    model: Any
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def load_model(
    cls: Any,
    folder: Path | str,
    what: str,
    options: Mapping[str, Any] = MappingProxyType({}),
    *,
    may_lack: str | None = None,
    offline: bool = True,
) -> Loaded:
    """Return the model of a folder, or of a hub id, complete: each of its tensors is in its files, in its shape.

    Args:
        cls: Its class, of diffusers or transformers.
        folder: Its folder; a hub id goes to the library as it is, and is held to the same but for the sizes.
        what: What it is to the user, "FOLDER: text_encoder/"; each message begins with it.
        options: Further options of the class's `from_pretrained`, such as a variant or a dtype.
        may_lack: A pattern of names that its files may lack, searched in each.
        offline: Never ask the network.

    Raises:
        ValueError: If it cannot be read, names a pickle, lacks a tensor, or asks for more than its files hold.
    """
    place, bounds = Path(folder), (10**12, 10**7)
    given = {"use_safetensors": True, "local_files_only": offline, "output_loading_info": True, **options}
    with loading(what):
        if place.is_dir():
            check_configs(place)
            bounds = held(weight_files(place, options.get("variant")))
        with within(*bounds), replaced(torch, "load", _refuse_pickle):
            model, info = cls.from_pretrained(folder, ignore_mismatched_sizes=True, **given)
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if lacking := [name for name in missing if not (may_lack and re.search(may_lack, name))]:
        raise ValueError(f"{what}: the weights lack {_shown(lacking)}: {_cause(unexpected)}")
    if wrong := sorted(info["mismatched_keys"]):
        name, found, wanted = wrong[0]
        shapes = f"such as {name!r}, {list(found)} where its configuration asks for {list(wanted)}"
        raise ValueError(f"{what}: {len(wrong)} of the weights have another shape, {shapes}")
    return Loaded(model, tuple(missing), tuple(unexpected))


def check_configs(folder: Path) -> None:
    """Raise ValueError if the configurations of a component do not parse, have absurd numbers or ask for other weights."""
    for path in sorted(folder.glob("*config.json")):
        config = read_mapping(path)
        # Prompts are padded to a tokenizer's length; 10^30 there is "no limit", which nothing is padded to.
        unlimited = path.name == "tokenizer_config.json" and config.get("model_max_length", 0) in _NO_LIMIT
        _check_numbers({**config, "model_max_length": 0} if unlimited else config, path.name)
        if config.get("quantization_config") is not None:
            raise ValueError(f"{path.name} has a quantization_config")
        if config.get("transformers_weights") is not None:
            raise ValueError(f"{path.name} takes its weights from another file ({config['transformers_weights']!r})")
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"it holds an adapter that is not merged (adapter_config.json): {_MERGE}")


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """Return the safetensors of a folder that a model is read from, its shards where it has an index.

    Raises:
        ValueError: If an index, of whichever variant, names a file that is not beside it or is no safetensors.
    """
    for path in sorted(folder.glob("*.index*.json")):
        _check_shards(path)
    return sorted(path for path in folder.glob("*.safetensors") if variant_of(path.name) == variant)


def _check_shards(path: Path) -> None:
    names = read_mapping(path).get("weight_map")
    if not isinstance(names, dict):
        raise ValueError(f"{path.name} names no weights (weight_map)")
    for name in set(map(str, names.values())):
        shown = repr(name[:80])
        if name.endswith(PICKLE_SUFFIXES):
            raise ValueError(f"{path.name} names the pickle {shown}, which can run code when loaded")
        if PurePosixPath(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise ValueError(f"{path.name} names {shown}, which is no safetensors file beside it")
        if not (path.parent / name).is_file():
            raise ValueError(f"{path.name} names {shown}, which is missing")


def _check_numbers(config: Mapping[str, Any], where: str) -> None:
    todo: list[tuple[str, Any]] = list(config.items())
    while todo:
        name, value = todo.pop()
        if isinstance(value, Mapping):
            todo += value.items()
        elif isinstance(value, list):
            todo += [(name, each) for each in value]
        elif isinstance(value, int) and abs(value) > (most := _MOST.get(name, LARGEST)):
            raise ValueError(
                f"{where} says {str(name)[:40]!r}: {value if value < 10**20 else '10^20 and more'}, above {most}"
            )


def held(files: Sequence[Path]) -> tuple[int, int]:
    """Return how many numbers and how many tensors the files hold, at most."""
    num_bytes = num_tensors = 0
    for path in files:
        if not path.is_file():
            raise ValueError(f"{path.name} is no file")
        num_bytes += path.stat().st_size
        with safe_open(path, framework="pt") as file:  # which reads no header above 100 MB
            num_tensors += len(file.keys())
    return num_bytes, num_tensors


@contextmanager
def within(num_numbers: int, num_tensors: int) -> Iterator[None]:
    """Stop the building of modules at several times what their files hold: tied weights and loading count as well."""
    most_numbers, most_parts = 4 * num_numbers + _SMALL, 40 * num_tensors + 10_000
    numbers = parts = 0

    def count(module: nn.Module, name: str, part: Any) -> None:
        nonlocal numbers, parts
        parts += 1
        numbers += part.numel() if isinstance(part, torch.Tensor) else 0
        if numbers > most_numbers or parts > most_parts:
            raise ValueError(TOO_LARGE)

    places = (hooks.register_module_parameter_registration_hook, hooks.register_module_module_registration_hook)
    handles = [register(count) for register in places]
    try:
        yield
    except Exception as error:  # a tensor is made before it is registered
        if is_out_of_memory(error) and num_numbers < _FEW_BYTES:
            raise ValueError(TOO_LARGE) from error
        raise
    finally:
        for handle in handles:
            handle.remove()


def _refuse_pickle(*args: Any, **kwargs: Any) -> Any:
    raise ValueError("its weights are a pickle, which can run code when loaded")


def _shown(names: Sequence[str]) -> str:
    return f"{len(names)} of the network's tensors, such as {', '.join(map(repr, names[:3]))}"


def _cause(unexpected: Sequence[str]) -> str:
    for pattern, cause in _CAUSES:
        if any(re.search(pattern, name) for name in unexpected):
            return cause
    if unexpected:
        return f"they hold {len(unexpected)} of other names, such as {unexpected[0]!r}: another class or version wrote them"
    return "the files are incomplete, or another class or version wrote them; download or save them again"
