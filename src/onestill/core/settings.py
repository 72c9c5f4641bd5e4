"""Settings: typed, flat models that flags, YAML files and Python arguments are all made from.

A room owns the settings it reads, as a subclass of `Settings`; a command's configuration inherits from those it needs,
which makes one flat model of them. No module of settings loads torch: a mistake in a command line is said at once.
"""

from __future__ import annotations

import difflib
import errno
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from onestill.core.errors import NOT_GIVEN, FoundWarning, SettingError, SettingErrors, as_arguments, mentions
from onestill.core.paths import name_fault, place_fault
from onestill.core.reading import MOST_YAML_BYTES, parse_yaml, read_text
from onestill.core.writing import write_text

S = TypeVar("S", bound="Settings")

MOST_STEPS: Final = 100_000_000
"""The most of anything that is counted in steps of a run, or in images or prompts that it draws."""
MOST_GUIDANCE: Final = 1_000.0
"""The largest guidance scale: beyond a hundred every prediction is its thresholding."""
MOST_LABELS: Final = 1_000_000
MOST_WIDTH: Final = 0.28
"""The largest relative width of an average of weights; the plain mean of all of a run has 0.289."""
MOST_ROWS: Final = 100_000
"""The largest batch: no machine holds the activations of more."""
LONGEST_TEXT: Final = 10_000
"""Characters of a text, such as a prompt: far more than any encoder reads, and few enough to split into tokens."""

Label = Annotated[int, Field(ge=0, le=MOST_LABELS)]
"""A class label in a list of them."""
CONFIGS = Path(__file__).parents[1] / "configs"
"""Settings for known teachers, which are found by name."""


def setting(
    default: Any,
    panel: str,
    description: str,
    *,
    may_change: bool = False,
    commas: bool = False,
    path: bool = False,
    **limits: Any,
) -> Any:
    """Return a field of a `Settings` model.

    Args:
        default: Its default; `...` if it has to be given.
        panel: The panel of the help that it stands in.
        description: What it is, for the help; may mention other settings by `onestill.core.errors.named`.
        may_change: Whether a run may be gone on with under another value, since what it ends in stays the same.
        commas: Whether it is a list that may be given as one text with commas, which its flag takes.
        path: Whether it may name a file or folder, among other things; every field of type Path does.
        limits: Limits on its value, as pydantic's `Field` takes them; a number has both an upper and a lower one.
    """
    said: dict[str, Any] = {"panel": panel, "may_change": may_change, "commas": commas, "path": path}
    said["mentions"] = mentions(description)
    return Field(default, description=as_arguments(description), json_schema_extra=said, **limits)


def about(field: FieldInfo, what: str) -> Any:
    """Return what `setting` was told of a field: "panel", "mentions", "may_change", "commas" or "path"."""
    extra = field.json_schema_extra
    assert isinstance(extra, dict), "fields of settings are made by `setting`"
    return extra[what]


def names_path(field: FieldInfo) -> bool:
    """Return whether a setting names a file or folder, or may."""
    return about(field, "path") or Path in (field.annotation, *get_args(field.annotation))


class Settings(BaseModel):
    """Some settings. Frozen; unknown names are refused; defaults are checked as well."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    def __init__(self, **settings: Any) -> None:
        """Take fields of `cls`, the model at hand; SettingError or `SettingErrors` if some are unusable."""
        try:
            super().__init__(**{name: plain_value(value) for name, value in settings.items()})
        except ValidationError as error:
            raise _explained(error) from None

    @field_validator("*", mode="before")
    @classmethod
    def _as_plain_values(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what would be taken for something else, and split one text with commas where a flag is that."""
        assert info.field_name is not None
        field = cls.model_fields[info.field_name]
        kinds = _kinds(field.annotation)
        if isinstance(value, Iterator):
            raise SettingError(info.field_name, value, f"must be a list, not a {type(value).__name__}")
        for each in value if isinstance(value, (list, tuple)) else [value]:
            if (isinstance(each, bool) and bool not in kinds) or isinstance(each, (bytes, bytearray)):
                raise SettingError(info.field_name, value, f"must be no {type(each).__name__}")
        if isinstance(value, (int, float)) and tuple in kinds and about(field, "commas"):
            return (value,)
        if isinstance(value, str) and tuple in kinds:
            if about(field, "commas"):
                return value.split(",")
            raise SettingError(info.field_name, value, "is one text", f"give a list of them: [{value[:40]!r}]")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _can_be_said(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        is_path = names_path(cls.model_fields[info.field_name])
        for text in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(text, (str, Path) if is_path else str):
                continue
            if fault := text_fault(str(text)) or (name_fault(text) if is_path else ""):
                raise SettingError(info.field_name, text, fault)
        return value

    @classmethod
    def said_of(cls, values: Mapping[str, Any], read: Mapping[str, Any], left_out: set[str]) -> str:
        """Return what to say of a file's settings that give way, which the user may not expect; rooms override this."""
        return ""

    @classmethod
    def overruled(cls, values: Mapping[str, Any], read: Mapping[str, Any]) -> set[str]:
        """Return the names that a file sets and that `values`, which win over it, exclude; rooms extend this."""
        return set()


def plain_value(value: Any) -> Any:
    """Return numbers of numpy and torch as Python's own, lists of them too, and devices by name; all else as it is."""
    if type(value) in (list, tuple):
        return type(value)(map(plain_value, value))
    if (type(value).__module__, type(value).__name__) == ("torch", "device"):
        return str(value)
    if isinstance(value, type) or not hasattr(value, "tolist") or not hasattr(value, "shape"):
        return value
    try:
        return value.tolist()
    except Exception:  # such as a tensor without numbers, on "meta"
        return value


def text_fault(text: str) -> str:
    """Return why a text cannot be used, whatever it is for; "" if it can."""
    if len(text) > LONGEST_TEXT:
        return f"has {len(text):,} characters; give at most {LONGEST_TEXT:,}"
    if "\0" in text:
        return "holds a zero byte"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "is no UTF-8 text; write it in UTF-8"
    return ""


def make(
    cls: type[S], values: Mapping[str, Any], config_file: str | Path | None = None, *, recorded: bool = False
) -> S:
    """Return the settings made of a YAML file and of `values`, which win.

    Args:
        cls: The model.
        values: Settings by name; None means "not given" where None is the default.
        config_file: A YAML file, or the name of a shipped one.
        recorded: Whether they say what was, not what is to be done: then its paths may have gone since.

    Raises:
        SettingError: If a name is unknown or a value is unusable; `SettingErrors` if several are.
    """
    read = {} if config_file is None else read_yaml(config_file)
    for names, where in ((read, str(config_file)), (values, "the configuration")):
        refuse_unknown(names, cls.model_fields, where)
    left_out = cls.overruled(values, read)
    if said := cls.said_of(values, read, left_out):
        warnings.warn(f"{config_file}: {said}", FoundWarning, stacklevel=2)
    merged = {**{name: value for name, value in read.items() if name not in left_out}, **values}
    origins = {name: str(config_file) for name in read if name not in values}
    try:
        made = cls(**merged)
    except (SettingError, SettingErrors) as error:
        found = error.errors if isinstance(error, SettingErrors) else (error,)
        placed = [_placed(each, origins) for each in found]
        raise placed[0] if len(placed) == 1 else SettingErrors(placed) from None
    if not recorded:
        _refuse_places(made, merged, origins)
    return made


def _placed(error: SettingError, origins: Mapping[str, str]) -> SettingError:
    """Return an error that says which file its setting comes from, if it comes from one."""
    files = {origins.get(name, "") for name in error.settings} - {""}
    return error.found_in(files.pop()) if len(files) == 1 and not error.where else error


def _refuse_places(made: Settings, given: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    """Raise SettingError if what lies at one of the paths that were given can be neither read nor replaced."""
    for name, field in type(made).model_fields.items():
        value = getattr(made, name)
        for each in value if isinstance(value, tuple) else (value,):
            if name in given and each is not None and names_path(field) and (fault := place_fault(each)):
                raise SettingError(name, each, fault, where=origins.get(name, ""))


def find_config(config_file: str | Path) -> Path:
    """Return the path of a YAML file that is named by its path, or by a shipped one's name."""
    if fault := text_fault(str(config_file)) or place_fault(config_file):
        raise SettingError("config", str(config_file), fault)
    path = Path(config_file).expanduser()
    if path.is_file() or path.suffix or len(path.parts) != 1:
        return path
    shipped = sorted(found.stem for found in CONFIGS.glob("*.yaml"))
    if path.name in shipped:
        return CONFIGS / f"{path.name}.yaml"
    near = difflib.get_close_matches(path.name, shipped, n=1)
    hint = f"did you mean {near[0]}?" if near else f"those shipped are {', '.join(shipped)}"
    raise SettingError("config", str(config_file), "no such file, and none of that name is shipped", hint)


def read_yaml(config_file: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file, or in a shipped one; SettingError if it is missing or holds none."""
    path = find_config(config_file)
    if not path.exists():
        raise SettingError("config", str(path), os.strerror(errno.ENOENT))
    try:
        content = parse_yaml(read_text(path, MOST_YAML_BYTES), "it")
    except ValueError as error:
        raise SettingError("config", str(path), str(error).removeprefix(f"{path} ").removeprefix("it ")) from error
    if not isinstance(content, dict):
        raise SettingError("config", str(path), f"must hold 'name: value' lines, it holds {type(content).__name__}")
    return {str(key).replace("-", "_"): value for key, value in content.items()}


def write_yaml(settings: Settings, path: Path) -> None:
    """Write resolved settings."""
    write_text(path, yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))


class UnknownSettingError(SettingError):
    """There is no setting of this name."""

    def _text(self, spelt: Any) -> str:
        near = f"; did you mean {self.todo!r}?" if self.todo else ""
        return f"{self.where}: unknown setting {self.settings[0]!r}{near}"


def refuse_unknown(values: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    """Raise SettingError naming each unknown key of `values` and the nearest known name."""
    names = [str(key)[:80] for key in values if key not in known][:20]
    near = [(name, difflib.get_close_matches(name, known, n=1)) for name in names]
    errors = [UnknownSettingError(name, todo=match[0] if match else "", where=where) for name, match in near]
    if errors:
        raise errors[0] if len(errors) == 1 else SettingErrors(errors)


def _kinds(annotation: Any) -> set[Any]:
    """Return the types that an annotation of a field names, those inside lists too."""
    parts = {part for inner in get_args(annotation) for part in _kinds(inner)}
    return parts | {get_origin(annotation) or annotation}


def _explained(error: ValidationError) -> SettingError | SettingErrors:
    """Return what pydantic found as errors of settings, one for each setting."""
    found: dict[str, SettingError] = {}
    for problem in error.errors():
        inner = problem.get("ctx", {}).get("error")
        if isinstance(inner, SettingError):
            found.setdefault(inner.settings[0], inner)
            continue
        name, message = str(problem["loc"][0]) if problem["loc"] else "config", problem["msg"]
        missing = problem["type"] == "missing"
        why = "is required" if missing else _in_words(message)
        given = NOT_GIVEN if missing else problem["input"]
        found.setdefault(name, SettingError(name, given, why))
    errors = list(found.values())
    return errors[0] if len(errors) == 1 else SettingErrors(errors)


# What pydantic says of a number beyond a bound, and the same as people say it.
_BOUNDS = (
    ("Input should be greater than or equal to", "must be at least"),
    ("Input should be less than or equal to", "must be at most"),
    ("Input should be greater than", "must be above"),
    ("Input should be less than", "must be below"),
    ("Input should be", "must be"),
)


def _in_words(message: str) -> str:
    """Return what pydantic says of a value in the words of every other message."""
    for theirs, ours in _BOUNDS:
        message = message.replace(theirs, ours)
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]
