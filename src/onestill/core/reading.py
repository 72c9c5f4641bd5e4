"""Files that others may have written: read with bounds, and refused in one line that names them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from onestill.core.errors import RunError, in_short
from onestill.core.memory import is_out_of_memory

MOST_BYTES: Final = 64 * 2**20
"""The largest JSON file that is read: indices of hundreds of shards and tokenizers' rules have a few MB."""
DEEPEST: Final = 64
"""The deepest nesting of a JSON or YAML file of ours or of a model's configuration."""
MOST_YAML_BYTES: Final = 2**18
"""The longest YAML that is parsed: a configuration that lists 20,000 labels is shorter."""
MOST_ALIASES: Final = 16
"""How often a YAML text may repeat a part of itself: each time can double what it holds."""

M = TypeVar("M", bound="OwnFile")

# What libraries say of a file, and what it means for who has it; the first that matches.
_MEANINGS = (
    (
        r"bitsandbytes|quanti[sz]|No package metadata was found|torchao|gguf|optimum",
        "its weights are quantised, which a student cannot be trained on: give the folder of the unquantised model",
    ),
    (r"trust_remote_code|custom code|remote code", "it needs code of its own, which is never run"),
    (r"meta tensor|meta device", "some of its weights are missing from the files"),
    (
        r"HeaderTooLarge|InvalidHeader|HeaderTooSmall|MetadataIncomplete|header",
        "a file of its weights is no whole safetensors",
    ),
)


def read_text(path: Path, most_bytes: int = MOST_BYTES) -> str:
    """Return the text of a UTF-8 file; ValueError that names it if it is missing, too large or no text."""
    try:
        if not path.is_file():
            raise ValueError(f"{path} is missing" if not path.exists() else f"{path} is no file")
        size = path.stat().st_size
        if size > most_bytes:
            raise ValueError(f"{path} has {size} bytes; a file of its kind has at most {most_bytes}")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {in_short(error)}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or in_short(error)}") from error


def read_json(path: Path, most_bytes: int = MOST_BYTES) -> Any:
    """Return what a JSON file holds; ValueError that names it if it cannot be read, or nests deeper than `DEEPEST`."""
    return parse_json(read_text(path, most_bytes), str(path))


def parse_json(text: str, where: str) -> Any:
    """Return what a JSON text holds; ValueError that says `where` it is from if it is none, or nests too deep."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError(f"{where} is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{where} is no JSON: {in_short(error)}") from error
    if _is_deeper(found, DEEPEST):
        raise ValueError(f"{where} is nested deeper than {DEEPEST} levels")
    return found


def read_mapping(path: Path, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """Return the object in a JSON file; ValueError that names the file if it holds anything else."""
    found = read_json(path, most_bytes)
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, it holds {_kind(found)}")
    return found


class OwnFile(BaseModel):
    """What a JSON file of ours holds; read by `read_object`. Frozen; types are exact and unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def read_object(path: Path, model: type[M], most_bytes: int = MOST_YAML_BYTES) -> M:
    """Return what a JSON file of ours holds; ValueError that names the file if it is not that, or out of bounds."""
    return as_model(read_mapping(path, most_bytes), model, str(path))


def as_model(found: Mapping[str, Any], model: type[M], where: str) -> M:
    """Return plain values as a model of them; ValueError that says `where` they are from if they are none."""
    try:
        # As JSON, which knows no tuples and no paths: strict types would refuse lists in their place.
        return model.model_validate_json(json.dumps(found))
    except ValidationError as error:
        (first, *_) = error.errors(include_url=False)
        name, said = ".".join(map(str, first["loc"])), in_short(ValueError(first["msg"]))
        raise ValueError(f"{where} does not say what it should: {name[:80] or 'it'}: {said}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{where} does not say what it should: {in_short(error)}") from error


def parse_yaml(text: str, where: str) -> Any:
    """Return the plain values in a YAML text; ValueError that says `where` it is from if it is none.

    No tag makes an object; what is nested, repeats itself or is longer than the bounds above, or names a key twice, is
    refused before it is built.
    """
    if len(text) > MOST_YAML_BYTES:
        raise ValueError(f"{where} is no YAML of at most {MOST_YAML_BYTES} characters")
    try:
        _check_yaml(text, where)
        return yaml.load(text, Loader=_PlainLoader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise ValueError(f"{where} is no YAML{line}: {in_short(ValueError(error.problem or error.context))}") from error
    except Exception as error:  # values that their tag cannot be made of end in errors of every kind
        if isinstance(error, ValueError) and str(error).startswith(where):
            raise
        kind = "" if isinstance(error, (yaml.YAMLError, ValueError)) else f"{type(error).__name__}: "
        raise ValueError(f"{where} is no YAML: {kind}{in_short(error)}") from error


class _PlainLoader(yaml.SafeLoader):
    """Makes plain values alone, and takes no key twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.value in names:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
            names.add(str(key.value))
        return super().construct_mapping(node, deep)


def _check_yaml(text: str, where: str) -> None:
    """Refuse a YAML text by its events, one after the other, before anything is built of them."""
    open_parts: list[str | None] = []
    aliases = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_parts.append(event.anchor)
        elif isinstance(event, yaml.CollectionEndEvent):
            open_parts.pop()
        elif isinstance(event, yaml.AliasEvent):
            aliases += 1
            if event.anchor in open_parts:
                raise ValueError(f"{where} holds a part that holds itself")
        if len(open_parts) > DEEPEST:
            raise ValueError(f"{where} is nested deeper than {DEEPEST} levels")
        if aliases > MOST_ALIASES:
            raise ValueError(f"{where} repeats parts of itself more than {MOST_ALIASES} times")


@contextmanager
def loading(what: str, *passing: type[Exception]) -> Iterator[None]:
    """Turn whatever a library raises while it loads something into ValueError "`what` cannot be read: reason".

    Errors of our own settings pass as they are, as do an interrupt and memory that is not there.

    Args:
        what: What is loaded, as the user knows it: "FOLDER: text_encoder/", "FILE".
        passing: Kinds of exceptions that pass too, where what is called says by them what is wrong.
    """
    passed: tuple[type[Exception], ...] = (RunError, *passing)
    try:
        yield
    except passed:
        raise
    except Exception as error:
        is_ours = isinstance(error, ValueError) and type(error).__module__.startswith("onestill.")
        if is_ours or is_out_of_memory(error):
            raise
        raise ValueError(f"{what} cannot be read: {reason(error)}") from error


def reason(error: BaseException, most: int = 200) -> str:
    """Return a library's exception while loading in words for who has the file."""
    text = f"{type(error).__name__} {error}"
    for pattern, meaning in _MEANINGS:
        if re.search(pattern, text, re.IGNORECASE):
            return meaning
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    return in_short(error, most) or type(error).__name__


def _is_deeper(found: Any, levels: int) -> bool:
    now = [found]
    for _ in range(levels):
        inner = [v.values() if isinstance(v, Mapping) else v for v in now if isinstance(v, (Mapping, list))]
        now = [value for values in inner for value in values]
        if not now:
            return False
    return any(isinstance(value, (Mapping, list)) for value in now)


def _kind(found: Any) -> str:
    names = {list: "a list", str: "a text", int: "a number", float: "a number", bool: "a truth value"}
    return names.get(type(found), "nothing")
