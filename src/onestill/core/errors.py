"""Errors that know which setting they are about, and show its name as the surface at hand spells it.

A setting has one name and several spellings: a flag on the command line, `t_max=0.5` in Python. Code below the
command line never spells a flag: it raises `SettingError("t_max", 0.5, "must be above 0")`, and mentions another
setting inside a text with `named("t_min")`. Whoever shows the text chooses the spelling once.
"""

from __future__ import annotations

import enum
import functools
import re
import reprlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

# Around a mention of a setting inside a text; both are private-use characters, which no prompt and no path holds.
_OPEN, _CLOSE = "\ue000", "\ue001"


class _NotGiven(enum.Enum):  # which stays one and the same through pickle and copy
    NOT_GIVEN = enum.auto()


NOT_GIVEN: Final = _NotGiven.NOT_GIVEN
"""The value of a setting that is complained of for being absent, or whose value says nothing."""


def named(setting: str) -> str:
    """Return a mention of a setting for use inside a message; it is spelt when the message is shown."""
    return f"{_OPEN}{setting}{_CLOSE}"


def as_arguments(text: str) -> str:
    """Return a text with its mentions of settings as Python spells them: `t_max`."""
    return text.replace(_OPEN, "").replace(_CLOSE, "")


def as_flags(text: str) -> str:
    """Return a text with its mentions of settings as the command line spells them, as flags."""
    return text.replace(_OPEN, "--").replace(_CLOSE, "")


def mentions(text: str) -> list[str]:
    """Return the settings that a text mentions by `named`."""
    return re.findall(f"{_OPEN}(.*?){_CLOSE}", text)


class SettingError(ValueError):
    """A setting cannot be used: which, what was given, why, and what to do instead.

    Shown as `t_max=2: must be at most 1; leave it out` in Python; on the command line the setting is spelt as a flag
    and its value as it would be typed.

    Args:
        setting: Name of the setting, or of several that do not go together.
        given: Its value, or one for each name; `NOT_GIVEN` where there is none to show.
        why: What is wrong with it. May mention other settings by `named`.
        todo: What to do; may mention settings too. "" where `why` says it.
        where: What the error was found in, such as a teacher's folder; stands before everything else.
    """

    def __init__(
        self, setting: str | Sequence[str], given: Any = NOT_GIVEN, why: str = "", todo: str = "", *, where: str = ""
    ) -> None:
        self.settings = (setting,) if isinstance(setting, str) else tuple(setting)
        several = not isinstance(setting, str) and given is not NOT_GIVEN
        self.given: tuple[Any, ...] = tuple(given) if several else (given,) + (NOT_GIVEN,) * (len(self.settings) - 1)
        self.why, self.todo, self.where = why, todo, where
        super().__init__(as_arguments(self._text(_argument)))

    # An exception of several arguments is pickled by them, not by its text.
    def __reduce__(self) -> tuple[Any, ...]:
        several = len(self.settings) > 1
        names, values = (self.settings, self.given) if several else (self.settings[0], self.given[0])
        return functools.partial(type(self), where=self.where), (names, values, self.why, self.todo)

    def as_flags(self) -> str:
        """Return the message as the command line shows it."""
        return as_flags(self._text(_flag))

    def about(self, setting: str, given: Any) -> SettingError:
        """Return the same complaint of another setting, such as the list that the value came in."""
        return type(self)(setting, given, self.why, self.todo, where=self.where)

    def found_in(self, where: str) -> SettingError:
        """Return the same complaint, saying first what it was found in."""
        return type(self)(*self.__reduce__()[1][:4], where=where)

    def _text(self, spelt: Callable[[str, Any], str]) -> str:
        head = " and ".join(spelt(*pair) for pair in zip(self.settings, self.given, strict=True))
        where = f"{self.where}: " if self.where else ""
        return f"{where}{head}: {self.why}{'; ' if self.todo else ''}{self.todo}"


class SettingErrors(ValueError):
    """Several settings that cannot be used, all found at once; one line each."""

    def __init__(self, errors: Sequence[SettingError]) -> None:
        self.errors = tuple(errors)
        super().__init__("\n".join(map(str, self.errors)))

    def as_flags(self) -> str:
        """Return the messages as the command line shows them, a line each."""
        return "\n".join(error.as_flags() for error in self.errors)


class FoundWarning(UserWarning):
    """Something that was found, is worth a line, and is gone on after; the command line shows it as one.

    `text` may mention settings by `named`.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        super().__init__(as_arguments(text))


class RunError(RuntimeError):
    """Something that has begun cannot go on; `text` says why and what to do, and may mention settings by `named`."""

    def __init__(self, text: str) -> None:
        self.text = text
        super().__init__(as_arguments(text))

    def as_flags(self) -> str:
        """Return the message as the command line shows it."""
        return as_flags(self.text)


def shown_as_flags(error: BaseException) -> str:
    """Return any error's message as the command line shows it."""
    return error.as_flags() if isinstance(error, (SettingError, SettingErrors, RunError)) else str(error)


def found_in(where: str, error: ValueError) -> ValueError:
    """Return an error that says first what it was found in; one of a setting stays one."""
    return error.found_in(where) if isinstance(error, SettingError) else ValueError(f"{where}: {error}")


def in_short(error: BaseException, most: int = 200) -> str:
    """Return a foreign error's message on one line, of `most` characters at most."""
    return " ".join(str(error).split())[:most]


class _Short(reprlib.Repr):
    """Values as Python writes them, but short: a YAML file holds lists of lists that double at every level."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, LONGEST_SHOWN, LONGEST_SHOWN
        self.maxlist = self.maxtuple = self.maxdict = 16

    def repr_int(self, x: int, level: int) -> str:
        return f"{'-' if x < 0 else ''}1e+{int(abs(x).bit_length() * 0.30103)}" if abs(x) >= 10**LONGEST_INT else str(x)

    def repr(self, x: Any) -> str:
        return " ".join(super().repr(x).split())  # tensors and much else have lines


LONGEST_SHOWN, LONGEST_INT = 200, 30
_short = _Short().repr


def _cut(text: str) -> str:
    """Return a value as it is shown: the beginning of a long one, and how long it is."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN // 4]}... ({len(text):,} characters)"


def _flag(name: str, value: Any) -> str:
    if value is NOT_GIVEN:
        return f"--{name}"
    if isinstance(value, bool):
        return f"--{name if value else 'no_' + name}"
    if isinstance(value, Mapping):
        return f"--{name} {_short(dict(value))}"
    if isinstance(value, (list, tuple)):
        return f"--{name} {_cut(plain(value))}"
    # As it has to be typed; what breaks the line would break the message.
    return f"--{name} {shlex.quote(_cut(' '.join(value.split()) if isinstance(value, str) else plain(value)))}"


def plain(value: Any) -> str:
    """Return the value of a setting as it is typed: numbers in short, lists with commas."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(plain, value[:LONGEST_SHOWN])) if _is_flat(value) else _short(value)
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if isinstance(value, (str, Path)) else _short(value)


def _is_flat(values: Sequence[Any]) -> bool:
    return not any(isinstance(value, (list, tuple, Mapping)) for value in values)


def _argument(name: str, value: Any) -> str:
    if value is NOT_GIVEN:
        return name
    if isinstance(value, float):
        return f"{name}={value:g}"
    return f"{name}={repr(_cut(str(value))) if isinstance(value, Path) else _short(value)}"
