"""Settings: what a list with commas is read as."""

from __future__ import annotations

import copy
import pickle

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
    assert caught.value.as_flags().startswith("--steps x: input should be a valid integer")
