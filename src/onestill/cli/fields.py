"""Flags made from the fields of a command's settings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional, get_args, get_origin

import typer
from pydantic import BaseModel

from onestill.cli.values import PARSERS
from onestill.core.errors import SettingError, plain

ALIASES = {"teacher": ["--pretrained_model_name_or_path"], "prompts": ["--prompt"]}
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML file of these settings; flags win.", parser=PARSERS[Path])
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def from_config(
    model: type[BaseModel], *, positional: str = "", unneeded: str = ""
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give `command(settings, ...)` one flag per field of a model, so that flags and model cannot differ.

    A flag that is not given is absent from `settings`: then the YAML file or the model's default holds. The setting
    `positional` may be given without its flag; `unneeded` is one that the model requires and the command does not.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        found = inspect.signature(command, eval_str=True).parameters.values()
        own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in found if p.name != "settings"]

        def wrapped(**given: Any) -> None:
            word = given.pop(WORD, None)
            settings = {name: given.pop(name) for name in model.model_fields}
            if word:
                settings[positional] = _one_of(positional, word, settings[positional])
            command({name: value for name, value in settings.items() if value is not None and value != []}, **given)

        parameters = [_parameter(name, info, name == unneeded) for name, info in model.model_fields.items()]
        if positional:
            parameters.append(_word(positional, get_origin(model.model_fields[positional].annotation) is tuple))
        # typer reads a function's signature from here; mypy does not know that functions may have one of their own.
        wrapped.__signature__ = inspect.Signature([*parameters, *own])  # type: ignore[attr-defined]  # inspect reads it
        wrapped.__annotations__ = {p.name: p.annotation for p in [*parameters, *own]}
        wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
        vars(wrapped)[MODEL] = model
        return wrapped

    return decorate


WORD = "word"
MODEL = "settings_model"
"""The attribute of a command's function that holds the model of its settings, for what lists them."""


def _word(setting: str, is_list: bool) -> inspect.Parameter:
    """Return the parameter of the word, or of the words, that stand for a setting without its flag."""
    metavar = f"[{setting.upper()}]{'...' if is_list else ''}"
    argument = typer.Argument(metavar=metavar, help=f"The same as --{setting}.", show_default=False)
    kind: Any = list[str] if is_list else str
    annotation = Annotated[Optional[kind], argument]  # noqa: UP045 - made at run time
    return inspect.Parameter(WORD, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _one_of(setting: str, word: str | list[str], flag: Any) -> Any:
    """Return the value of a setting that is given as a word, or as words, and perhaps by its flag too."""
    if isinstance(word, list):
        return [*word, *(flag or ())]
    if flag is not None and str(flag) != word:
        raise SettingError(
            setting, str(flag), f"{plain(word)!r} is given without a flag, which means the same", "give one"
        )
    return word


def _parameter(name: str, info: Any, unneeded: bool) -> inspect.Parameter:
    """Return the keyword parameter, and with it the flag, of one field."""
    told = info.json_schema_extra or {}
    kind = str if told.get("commas") else _plain_type(info.annotation)
    names = [f"--{name}/--no_{name}" if kind is bool else f"--{name}", *ALIASES.get(name, [])]
    default = "" if info.default in (None, ()) else f" [default: {plain(info.default)}]"
    shown = f"{_flagged(info.description, told)}{' [required]' if info.is_required() and not unneeded else default}"
    parser = PARSERS.get(get_args(kind)[0] if get_origin(kind) is list else kind)
    option = typer.Option(*names, help=shown, rich_help_panel=told.get("panel"), show_default=False, parser=parser)
    annotation = Annotated[Optional[kind], option]  # type: ignore[valid-type]  # noqa: UP045 - made at run time
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _flagged(description: str, told: dict[str, Any]) -> str:
    """Return a description with the settings that it mentions as flags."""
    for mention in told.get("mentions", ()):
        description = re.sub(rf"\b{mention}\b", f"--{mention}", description)
    return description


def _plain_type(annotation: Any) -> Any:
    """Return what typer should parse for a field's type: X of X | None, list[int] of tuple[int, ...]."""
    if get_origin(annotation) is tuple:
        inner = get_args(annotation)[0]
        return list[get_args(inner)[0] if get_origin(inner) is Annotated else inner]  # type: ignore[misc]  # at run time
    options = [a for a in get_args(annotation) if a is not type(None)]
    return options[0] if type(None) in get_args(annotation) else annotation
