"""What public functions are given: types that mean the same are taken, others are refused by the argument's name."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import onestill
from onestill.core.arguments import Count, Positive, checked, fitted
from onestill.core.errors import SettingError
from onestill.training.config import DistillConfig

TABLE = Path(onestill.__file__).parents[2] / "benchmarks" / "bad_calls.py"


def bad_calls() -> Any:
    spec = importlib.util.spec_from_file_location("bad_calls", TABLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    __import__("sys").modules["bad_calls"] = module  # where its dataclass looks for its names
    spec.loader.exec_module(module)
    return module


def test_bad_calls_end_in_one_line_and_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = bad_calls()
    monkeypatch.chdir(tmp_path)
    # The settings of one model are one mechanism: every tenth of the long table, and all that means something.
    calls = bad.table()
    assert len(calls) > 1500
    some = [
        call
        for i, call in enumerate(calls)
        if i % 3 == 0 or (isinstance(call.value, str) and call.value in ("run", "gpu", "cuda:99", "a cat"))
    ]
    assert len(some) > 500
    wrong = {str(call): said for call in some if (said := bad.verdict(call, tmp_path))}
    assert not wrong, "\n".join(f"{call}: {said}" for call, said in wrong.items())


@pytest.mark.parametrize(
    ("value", "hint", "found"),
    [
        (np.int64(3), int, 3),
        (np.float64(3.0), int, 3),
        (torch.tensor(3), int, 3),
        (np.float32(0.5), float, 0.5),
        (2, float, 2.0),
        (np.bool_(True), bool, True),
        ("a", str | Path, "a"),
        (Path("a"), str | Path, Path("a")),
        ("a", Path, Path("a")),
        (np.array([1, 2]), Sequence[int], [1, 2]),
        (torch.tensor([1, 2]), tuple[int, ...], (1, 2)),
        (range(3), Sequence[int], range(3)),
        ((1, 2), tuple[float, float], (1.0, 2.0)),
        (None, Mapping[str, Any] | None, None),
        (len, Callable[..., Any], len),
        (5, Count, 5),
    ],
)
def test_what_means_the_same_is_taken(value: Any, hint: Any, found: Any) -> None:
    made = fitted("x", value, hint)
    assert made == found and type(made) is type(found)


@pytest.mark.parametrize(
    ("value", "hint", "words"),
    [
        (True, int, "must be a whole number, not a truth value"),
        (2.5, int, "must be a whole number"),
        (None, int, "must be a whole number"),
        (0, Count, "must be at least 1"),
        (0.0, Positive, "must be above 0"),
        (float("nan"), float, "finite"),
        (b"run", str | Path, "must be a text or path"),
        ("", Path, "is empty"),
        ("a\0", Path, "zero byte"),
        ("x" * 300, Path, "takes 255"),
        ("~no-such-user/x", Path, "no user"),
        ("\ud800", str, "UTF-8"),
        ("a cat", Sequence[str], "is one text"),
        ([True], Sequence[int], "must be a whole number"),
        ((i for i in "ab"), Sequence[str], "must be a list of texts, not a generator"),
        ((1.0,), tuple[float, float], "1 were given"),
        ({1: 2}, Mapping[str, Any], "must be a Mapping"),
        (torch.nn.Linear, torch.nn.Module, "not the class"),
        (10**4000, int, "smaller number"),
    ],
)
def test_what_does_not_is_refused_by_name(value: Any, hint: Any, words: str) -> None:
    with pytest.raises(SettingError, match=words) as error:
        fitted("thing", value, hint)
    assert str(error.value).startswith("thing=") and "\n" not in str(error.value) and len(str(error.value)) < 600


def test_what_is_wanted_says_how_it_is_made() -> None:
    with pytest.raises(SettingError, match="sampler='run'.*onestill.load_sampler"):
        onestill.fixed_noise("run")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="onestill.module_teacher"):
        onestill.guided(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def test_python_says_itself_what_is_missing() -> None:
    @checked()
    def function(first: int, *, second: str = "") -> int:
        return first

    assert function(np.int64(3)) == 3  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="first"):
        function()  # type: ignore[call-arg]


def test_settings_take_numbers_of_numpy_and_torch(tmp_path: Path) -> None:
    config = DistillConfig(
        teacher="digits",
        output_dir=tmp_path,
        max_train_steps=np.int64(50),
        class_labels=torch.tensor([1, 2]),
        learning_rate=np.float32(0.5),
        device=torch.device("cpu"),
    )
    assert (config.max_train_steps, config.lr_warmup_steps, config.class_labels) == (50, 5, (1, 2))
    assert config.learning_rate == 0.5 and config.device == "cpu"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("class_labels", [True], "no bool"),
        ("seed", True, "no bool"),
        ("output_dir", b"run", "no bytes"),
        ("negative_prompt", "\ud800", "UTF-8"),
        ("max_train_steps", 10**26, "at most"),
        ("validation_prompt", "a cat", "one text"),
    ],
)
def test_settings_refuse_what_would_count_as_something_else(name: str, value: Any, words: str) -> None:
    with pytest.raises(SettingError, match=f"{name}=.*{words}"):
        DistillConfig(**{"teacher": "digits", "output_dir": Path("run"), name: value})


def test_how_a_named_teacher_is_loaded_is_refused_with_an_object(tmp_path: Path) -> None:
    teacher = onestill.load_teacher("digits")
    with pytest.raises(SettingError, match="revision='main'.*object"):
        onestill.distill(teacher, tmp_path / "run", revision="main", dry_run=True)
