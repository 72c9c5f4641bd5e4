"""Settings: what a list with commas is read as."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest

from onestill.core.errors import NOT_GIVEN, SettingError
from onestill.core.settings import Settings, make, setting


class Listed(Settings):
    steps: tuple[int, ...] = setting((50, 10), "A", "Steps.", commas=True)


@pytest.mark.parametrize("given", ["4,3", [4, 3], ("4", 3)])
def test_a_list_may_be_given_with_commas(given: object) -> None:
    assert make(Listed, {"steps": given}).steps == (4, 3)
    assert make(Listed, {}).steps == (50, 10)


@pytest.mark.parametrize(
    "error", [SettingError("steps", why="is required"), SettingError(["a", "b"], [1, 2.5], "clash")]
)
def test_an_error_says_the_same_in_another_process(error: SettingError) -> None:
    for again in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert (str(again), again.as_flags(), again.given) == (str(error), error.as_flags(), error.given)
    assert str(SettingError("steps", NOT_GIVEN, "is required")) == "steps: is required"


def test_what_is_no_number_is_named() -> None:
    with pytest.raises(SettingError) as caught:
        make(Listed, {"steps": "4,x"})
    assert caught.value.as_flags().startswith("--steps x: must be a valid integer")


def _models(cls: type[Settings] = Settings) -> Iterator[type[Settings]]:
    for model in cls.__subclasses__():
        if model.__module__.startswith("onestill."):
            yield model
        yield from _models(model)


def _unbounded(annotation: Any, limits: Iterable[Any]) -> bool:
    """Return whether a type holds a number that has no upper or no lower bound."""
    if get_origin(annotation) is Annotated:
        inner, *said = get_args(annotation)
        return _unbounded(inner, [limit for info in said for limit in getattr(info, "metadata", [info])])
    if parts := [part for part in get_args(annotation) if part not in (type(None), ...)]:
        return get_origin(annotation) is not Literal and any(_unbounded(part, limits) for part in parts)
    kinds = {type(limit).__name__ for limit in limits}
    return annotation in (int, float) and not (kinds & {"Ge", "Gt"} and kinds & {"Le", "Lt"})


def test_every_number_of_every_setting_has_both_bounds() -> None:
    from onestill import cli  # which imports every model

    assert cli.app is not None and len(set(_models())) >= 12
    for model in set(_models()):
        for name, field in model.model_fields.items():
            assert not _unbounded(field.annotation, field.metadata), f"{model.__name__}.{name}"


class Placed(Settings):
    where: Path | None = setting(None, "A", "Where.")
    what: str | None = setting(None, "A", "What.", path=True)
    said: str | None = setting(None, "A", "Said.")


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("~nobody-of-that-name/x", "there is no user nobody-of-that-name"),
        ("a" * 256, "holds a name of 256 bytes"),
        ("a/" * 2000, "is longer than the 3,800 bytes"),
        ("a\0b", "zero byte"),
        ("/dev/null", "is a device, a pipe or a socket"),
        ("file/x", "file is no folder"),
        ("", "is empty"),
        ("\udcff", "no UTF-8"),
    ],
)
@pytest.mark.parametrize("name", ["where", "what"])
def test_paths_that_no_system_takes(
    name: str, given: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    value = Path(given) if name == "where" and given else given
    with pytest.raises(SettingError, match=f"^{name}=.*{why}"):
        make(Placed, {name: value})


def test_what_is_recorded_may_have_gone(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "c.yaml").write_text(f"where: {tmp_path}/file/x\n")
    assert make(Placed, {}, tmp_path / "c.yaml", recorded=True).where == tmp_path / "file" / "x"
    with pytest.raises(SettingError, match=r"c\.yaml: where=.*file is no folder"):
        make(Placed, {}, tmp_path / "c.yaml")


def test_a_text_without_end_is_refused_and_shown_in_short() -> None:
    with pytest.raises(SettingError, match="has 2,000,000 characters; give at most 10,000") as caught:
        make(Placed, {"said": "a" * 2_000_000})
    assert len(str(caught.value)) < 400 and len(caught.value.as_flags()) < 400


def test_errors_of_several_settings_name_the_file(tmp_path: Path) -> None:
    from onestill.training.config import make_config

    (tmp_path / "c.yaml").write_text("teacher: digits\noutput_dir: run\nt_min: 0.9\nt_max: 0.5\n")
    with pytest.raises(SettingError, match=r"c\.yaml: t_min=0\.9: must be below t_max"):
        make_config({}, tmp_path / "c.yaml")
