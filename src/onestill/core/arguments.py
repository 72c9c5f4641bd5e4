"""What a public function is given, against its annotations: `checked` takes what means the same and refuses the rest.

A wrong type that travels inwards ends in an AttributeError that names nothing the caller wrote. No torch is loaded here.
"""

from __future__ import annotations

import collections.abc
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar, Union

from onestill.core.errors import SettingError
from onestill.core.paths import name_fault
from onestill.core.settings import Settings, plain_value, refuse_unknown, text_fault

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Limits:
    """The numbers that an annotation allows: `Annotated[int, Limits(least=1)]`."""

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf

    def why_not(self, value: Any) -> str:
        """Return why a number is outside; "" if it is not, or is no number."""
        if not isinstance(value, (int, float)) or (self.least <= value <= self.most and value > self.above):
            return ""
        if value > self.most:
            return f"must be at most {self.most:g}"
        return f"must be above {self.above:g}" if value <= self.above else f"must be at least {self.least:g}"


Count = Annotated[int, Limits(least=1)]
Label = Annotated[int, Limits(least=0)]
Scale = Annotated[float, Limits(least=0)]
Positive = Annotated[float, Limits(above=0)]
Name = Annotated[str | Path, Limits()]
"""A path, or a name of something else: what is no path is refused by who looks for it."""
_WORDS = {int: "whole number", float: "number", bool: "truth value", str: "text", Path: "path"}
_LISTS = (list, tuple, collections.abc.Sequence)


class _Unfit(Exception):
    """A value is not what is annotated: why."""


def checked(settings: type[Settings] | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator that checks arguments against their annotations, and raises SettingError naming the first.

    `settings` is the model whose fields the function's `**settings` are; a name that is none of them is refused first.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        hints = functools.cache(lambda: typing.get_type_hints(function, include_extras=True))

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:
                return function(*args, **kwargs)  # Python's own words: what is missing, of which function
            if settings is not None:
                refuse_unknown(bound.arguments.get("settings", {}), settings.model_fields, "the configuration")
            for name, value in bound.arguments.items():
                if signature.parameters[name].kind is not inspect.Parameter.VAR_KEYWORD:
                    bound.arguments[name] = fitted(name, value, hints().get(name, Any))
            return function(*bound.args, **bound.kwargs)

        return call

    return decorate


def fitted(name: str, value: Any, hint: Any) -> Any:
    """Return a value as what is annotated; SettingError naming the argument if it is nothing of the kind."""
    kinds = _kinds(hint)
    try:
        if isinstance(value, (str, Path)) and Path in kinds and (why := text_fault(str(value)) or name_fault(value)):
            raise _Unfit(why)
        return _fit(value, hint)
    except _Unfit as error:
        todo = next((how for kind in kinds if (how := getattr(kind, "_made_by", ""))), "")
        raise SettingError(name, value, str(error), todo) from None


def _kinds(hint: Any) -> tuple[Any, ...]:
    """Return the alternatives that an annotation allows."""
    is_union = typing.get_origin(hint) in (Union, types.UnionType)
    return tuple(kind for part in typing.get_args(hint) for kind in _kinds(part)) if is_union else (hint,)


def _fit(value: Any, hint: Any) -> Any:
    reasons, kinds = [], [kind for kind in _kinds(hint) if kind is not type(None)]
    if value is None and len(kinds) < len(_kinds(hint)):
        return None
    for kind in kinds:
        try:
            return _fit_one(value, kind)
        except _Unfit as error:
            reasons.append(str(error))
    if len(kinds) == 1 or (isinstance(value, str) and not reasons[0].startswith("must be")):
        raise _Unfit(reasons[0])
    return _refuse(value, " or ".join(map(_words, kinds)))


def _fit_one(value: Any, kind: Any) -> Any:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        found = _fit(value, inner[0])
        if why := inner[1].why_not(found):
            raise _Unfit(why)
        return found
    if kind in (Any, object) or isinstance(kind, TypeVar):
        return value
    if kind in (int, float, bool):
        return _as_number(value, kind)
    if origin in _LISTS:
        return _as_list(value, kind)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if isinstance(value, str) and kind is str and (why := text_fault(value)):
        raise _Unfit(why)
    fits = callable(value) if origin is collections.abc.Callable else isinstance(value, origin or kind)
    if origin in (dict, collections.abc.Mapping):
        fits = fits and all(isinstance(name, inner[0]) for name in value)
    return value if fits else _refuse(value, _words(kind))


def _as_number(value: Any, kind: type) -> Any:
    found = plain_value(value)
    if isinstance(found, bool) or kind is bool:
        return found if isinstance(found, bool) and kind is bool else _refuse(value, _words(kind))
    if isinstance(found, float) and not math.isfinite(found):
        raise _Unfit("must be a finite number")
    if not isinstance(found, (int, float)) or (kind is int and found != int(found)):
        return _refuse(value, _words(kind))
    return kind(found) if abs(found) < 2**63 or isinstance(found, float) else _refuse(value, "smaller number")


def _as_list(value: Any, kind: Any) -> Any:
    found, inner, is_tuple = plain_value(value), typing.get_args(kind), typing.get_origin(kind) is tuple
    if isinstance(found, str) and inner[0] is str:
        raise _Unfit(f"is one text, and a list of them is needed: [{found[:40]!r}]")
    if not isinstance(found, Sequence) or isinstance(found, (str, bytes, bytearray)):
        return _refuse(value, _words(kind))
    if is_tuple and inner[-1] is not ... and len(found) != len(inner):
        raise _Unfit(f"must be {len(inner)}, {len(found)} were given")
    if isinstance(value, Sequence) and not isinstance(value, (list, tuple)):  # a range, or a file of prompts
        return value
    made = [_fit(each, inner[0]) for each in found]
    return tuple(made) if isinstance(value, tuple) or is_tuple else made


def _words(kind: Any) -> str:
    """Return an annotation in words, without its article."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return " or ".join(map(_words, _kinds(inner[0])))
    if origin in _LISTS:
        return f"list of {_words(inner[0])}s"
    if origin is collections.abc.Callable:
        return "function to call"
    return _WORDS.get(kind) or str(getattr(origin or kind, "__name__", kind))


def _refuse(value: Any, wanted: str) -> typing.NoReturn:
    found = f"the class {value.__name__}" if isinstance(value, type) else f"a {_words(type(value))}"
    raise _Unfit(f"must be a {wanted}{'' if value is None else f', not {found}'}")
