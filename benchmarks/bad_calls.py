"""Bad Python calls, made from the signatures: every public function with every argument of other types and values.

    python benchmarks/bad_calls.py [--every N] [--show WORD]

Each call must end in a ValueError or a TypeError of one line that names the argument, write nothing, and take less than
ten seconds. The table has a row for each kind of ending.
"""

from __future__ import annotations

import argparse
import collections
import collections.abc
import inspect
import itertools
import math
import os
import tempfile
import time
import types
import typing
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union

import numpy as np
import torch
from torch import nn

import onestill
from onestill.core.settings import Settings, about
from onestill.export.config import ExportConfig
from onestill.runs.export import export
from onestill.sampling.config import DrawSettings, SamplerSettings
from onestill.sampling.samplers.network import StudentSampler
from onestill.students.student import Student

LONGEST = 10.0
NAMES = {
    "source": "teacher",
    "arguments": "height",
    "folder": "output",
    "to_seed": "seed",
    "prediction_type": "prediction type",
}
"""What else an argument may be called by who refuses it: by the setting that it is."""


class Thing:
    """Nothing that anybody could want."""

    def __repr__(self) -> str:
        return "a thing\nof two lines"


class Network(nn.Module):
    """A small network with classes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, net_time: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@dataclass(frozen=True)
class Call:
    """A call with one argument that is wrong."""

    function: str
    argument: str
    value: Any
    make: Callable[[], object]

    def __str__(self) -> str:
        try:
            shown = " ".join(repr(self.value).split())[:60]
        except ValueError:
            shown = f"a {type(self.value).__name__}"
        return f"{self.function}({self.argument}={shown})"


def numbers() -> Iterator[int]:
    """Yield numbers: a generator, which is no list."""
    yield from (0, 1)


ANYTHING = (Thing(), Thing, 1j, numbers, len)
"""What is none of the kinds below, but for what can be called."""
WRONG: dict[Any, tuple[Any, ...]] = {
    int: (
        "x",
        "",
        2.5,
        math.nan,
        math.inf,
        b"3",
        [1, 2],
        {},
        True,
        10**400,
        -(10**30),
        np.bool_(True),
        np.array([1, 2]),
    ),
    float: ("x", "", math.nan, -math.inf, b"3", [1.0], {}, True, 10**400, torch.zeros(2), np.float32(math.nan)),
    bool: ("perhaps", 7, 2.5, [], {}, b"", math.nan),
    str: (3, 2.5, True, [], {}, b"x", "\ud800", torch.zeros(2)),
    Path: (3, 2.5, True, [], {}, b"x", "\ud800", "a\0b"),
    Literal: ("no such word", 3, True, [], b"x"),
    torch.Tensor: ([1.0], "x", 3, True, np.zeros(3), {}, b"x"),
    Callable: (3, "x", [], {}, b"x", torch.zeros(2)),
    dict: (3, "x", [1], {1: 2}, b"x", True),
    list: (3, 2.5, {}, {"a": 1}, (i for i in range(3)), [None], [Thing()], [[1, [2]]], b"xy", True, torch.tensor(True)),
}


def kinds_of(hint: Any) -> list[Any]:
    """Return the alternatives of an annotation."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return [kind for part in typing.get_args(hint) for kind in kinds_of(part)]
    if typing.get_origin(hint) is typing.Annotated:
        return kinds_of(typing.get_args(hint)[0])
    return [hint]


def wrong_for(hint: Any) -> list[Any]:
    """Return values that an annotation does not allow."""
    kinds = [kind for kind in kinds_of(hint) if kind is not type(None)]
    if Any in kinds:
        return []
    found: list[Any] = [] if type(None) in kinds_of(hint) else [None]
    tables = []
    for kind in kinds:
        origin = typing.get_origin(kind)
        base = kind if origin is None else origin
        if base in (list, tuple, collections.abc.Sequence):
            inner = typing.get_args(kind)[0]
            inner = typing.get_args(inner)[0] if typing.get_origin(inner) is typing.Annotated else inner
            own = [[value] for value in (("x",) if inner in (int, float) else (3,))]
            tables.append((*WRONG[list], *own, *([[True], [math.nan]] if inner in (int, float) else ["a single text"])))
        elif base in (dict, collections.abc.Mapping):
            tables.append(WRONG[dict])
        elif base is collections.abc.Callable:
            tables.append(WRONG[Callable])
        elif base in WRONG:
            tables.append(WRONG[base])
        else:
            tables.append(
                ("x", 3, True, [], {}, b"x", 2.5, torch.zeros(2), *([kind] if isinstance(kind, type) else []))
            )
    keys = [{key_of(value): value for value in table} for table in tables]
    for key, value in (keys[0] if keys else {}).items():
        if all(key in other for other in keys[1:]):
            found.append(value)
    calls = any(typing.get_origin(kind) is collections.abc.Callable or kind is Callable for kind in kinds)
    return found + [value for value in ANYTHING if not (calls and callable(value))]


def key_of(value: Any) -> str:
    """Return what tells values apart."""
    try:
        return f"{type(value).__name__} {value!r}"
    except ValueError:
        return f"{type(value).__name__} of many digits"


def beyond(name: str, model: type[Settings]) -> list[Any]:
    """Return numbers outside the limits of a setting."""
    found = []
    for limit in model.model_fields[name].metadata:
        for word, away in (("ge", -1), ("gt", 0), ("le", 1), ("lt", 0)):
            if (value := getattr(limit, word, None)) is not None:
                found.append(value + away)
    return found


def subjects() -> dict[str, tuple[Callable[..., object], dict[str, Any], type[Settings] | None]]:
    """Return what is called: by name, the function, arguments that are right, and the model of its settings."""
    process = onestill.CosineVP()
    mixture = onestill.MixtureTeacher(torch.eye(3, 4), 0.1, process, conditional=True)
    module = onestill.module_teacher(Network(), process, "v_prediction", (4,))
    student = Student(module)
    teacher_sampler = onestill.load_sampler(teacher=mixture, num_inference_steps=1, device="cpu")
    student_sampler = StudentSampler(student)
    draws = {"num_images": 2, "seed": 0}
    found: dict[str, tuple[Callable[..., object], dict[str, Any], type[Settings] | None]] = {
        "distill": (
            onestill.distill,
            {"teacher": module, "output_dir": "run", "dry_run": True, "show_progress": False, "device": "cpu"},
            onestill.DistillConfig,
        ),
        "inspect_teacher": (onestill.inspect_teacher, {"teacher": module, "device": "cpu"}, onestill.DistillConfig),
        "sample": (
            onestill.sample,
            {"teacher": mixture, "num_images": 1, "num_inference_steps": 1, "device": "cpu"},
            onestill.SampleConfig,
        ),
        "load_sampler": (onestill.load_sampler, {"teacher": mixture, "device": "cpu"}, SamplerSettings),
        "evaluate": (onestill.evaluate, {"student": "no-run", "device": "cpu"}, onestill.EvaluateConfig),
        "export": (export, {"student": "no-run", "output": "out"}, ExportConfig),
        "export_student": (onestill.export_student, {"student": student, "folder": "out"}, None),
        "load_module": (onestill.load_module, {"folder": "no-folder", "network": Network()}, None),
        "load_teacher": (onestill.load_teacher, {"source": "digits"}, None),
        "module_teacher": (
            onestill.module_teacher,
            {"network": Network(), "process": process, "prediction_type": "sample", "sample_shape": (4,)},
            None,
        ),
        "guided": (onestill.guided, {"teacher": mixture, "guidance_scale": 2.0}, None),
        "interpolate": (
            onestill.interpolate,
            {"sampler": teacher_sampler, "num_images": 2, "to_seed": 1},
            DrawSettings,
        ),
        "fixed_noise": (onestill.fixed_noise, {"sampler": teacher_sampler, **draws}, DrawSettings),
        "guidance_sweep": (
            onestill.guidance_sweep,
            {"sampler": teacher_sampler, "guidance_scales": [1.0, 2.0], **draws},
            DrawSettings,
        ),
        "student_trajectory": (
            onestill.student_trajectory,
            {"sampler": student_sampler, "target_times": [0.0, 0.5], **draws},
            DrawSettings,
        ),
        "Student": (onestill.Student, {"teacher": module}, None),
        "GaussianTeacher": (onestill.GaussianTeacher, {"mean": torch.zeros(2), "std": 1.0, "process": process}, None),
        "MixtureTeacher": (onestill.MixtureTeacher, {"means": torch.eye(2), "std": 1.0, "process": process}, None),
        "VE": (onestill.VE, {}, None),
        "FlowMatching": (onestill.FlowMatching, {}, None),
        "CosineVP": (onestill.CosineVP, {}, None),
        "DiscreteVP": (onestill.DiscreteVP, {"alphas_cumprod": torch.linspace(0.9, 0.1, 5)}, None),
        "DistillConfig": (onestill.DistillConfig, {"teacher": "digits", "output_dir": "run"}, onestill.DistillConfig),
        "SampleConfig": (onestill.SampleConfig, {"teacher": "digits"}, onestill.SampleConfig),
        "EvaluateConfig": (onestill.EvaluateConfig, {"student": "no-run"}, onestill.EvaluateConfig),
    }
    for name, sampler in (("teacher's sampler", teacher_sampler), ("student's sampler", student_sampler)):
        rows = sampler.conditions(2)
        found |= {
            f"{name}.images": (sampler.images, {"seeds": [0, 1], "rows": rows}, None),
            f"{name}.conditions": (sampler.conditions, {"num": 2}, None),
            f"{name}.warnings": (sampler.warnings, {"prompts": []}, None),
            f"{name}.at": (sampler.at, {}, None),
        }
    return found


# What the types allow and the meaning does not.
MEANT: dict[str, dict[str, tuple[Any, ...]]] = {
    "distill": {
        "teacher": ("", "no/such/folder", Network(), "/dev/null", "x" * 5000, "~unknown/x"),
        "device": ("gpu", "cuda:99", "meta", "cuda:-1", ""),
        "revision": ("main",),
        "variant": ("fp16",),
        "cache_dir": ("here",),
        "class_labels": ([0], (5,), torch.tensor([1])),
        "prompts": (["a"],),
        "no_such": (1,),
        "network": (Network,),
    },
    "inspect_teacher": {"teacher": (Network(), ""), "device": ("gpu", "cuda:99"), "t_max": (0.0,), "revision": ("main",)},
    "sample": {
        "device": ("gpu", "cuda:99", "meta", "xpu"),
        "class_labels": ([3], [-1], [0, 99], torch.tensor([7]), np.array([True, False]), torch.tensor([0.5]), [True]),
        "prompts": (["a cat"], "a cat"),
        "seed": (-1, 2**63, 10**30),
        "guidance_scale": (-1.0,),
        "interpolate": (1, "run"),
        "guidance_scales": ([1, 1], ["a"], [-1]),
        "target_times": ([0.5], "x"),
        "student": ("run", "", "\0"),
        "output": ("picture.jpg.exe", "a\0.png"),
        "negative_prompt": ("\ud800", b"x", 3),
    },
    "load_sampler": {"student": ("run", ""), "device": ("gpu",), "num_inference_steps": (0,), "solver": ("euler",)},
    "evaluate": {"student": ("", "no-run", "x" * 5000), "steps": ([], [0], [1, 1], "a,b"), "num_samples": (1, 0, -5)},
    "export": {"student": ("no-run", "")},
    "export_student": {
        "t": (-0.5, 1.5, 1e308),
        "guidance_scale": (2.0, -1.0),
        "format": ("", "onnx", "pipeline", "pixel"),
        "folder": ("/dev/null/x", "x" * 300),
    },
    "load_module": {"network": (Network,), "folder": ("", "/dev/null", "x" * 5000)},
    "load_teacher": {
        "source": ("", "no such", "~unknown/x", "x" * 5000, "/dev/null"),
        "device": ("gpu", "cuda:99", "", "cuda:-1", "meta"),
        "arguments": ({"height": "x"}, {"height": 8}, [("height", 8)]),
        "t_max": (0.0, 1.5, -1.0),
        "null_class": (-1, 99),
    },
    "module_teacher": {
        "prediction_type": ("", "x_0", "v"),
        "sample_shape": ((), (0,), (-1, 8), (8.5,), "88"),
        "num_classes": (0, -1),
        "null_class": (-1, 5),
        "t_max": (0.0, -1.0, 1.5),
        "sigma_data": (0.0, -1.0),
        "process": ("flow", onestill.FlowMatching),
    },
    "guided": {"guidance_scale": (-1.0,)},
    "interpolate": {
        "sampler": ("run", Path("run")),
        "num_images": (1, 0, -3),
        "to_seed": (-1, 0, 2**63),
        "seed": (-1, 2**64),
        "class_labels": ([0, 1], [9], [True], "0"),
        "prompts": ("a cat", ["a", "b"]),
    },
    "fixed_noise": {"sampler": ("run",), "num_images": (0, 99), "class_labels": ([7], [True], [0.5], torch.eye(2))},
    "guidance_sweep": {"guidance_scales": ([], [1, 1], [-1], ["a"], "1,2", 3)},
    "student_trajectory": {"target_times": ([], [0, 0], [-1], [2], ["a"], 0.5)},
    "Student": {"guidance_range": ((1.0,), (1, 2, 3), (2.0, 1.0), ("a", "b"), (-1.0, 2.0)), "network": (Network,)},
    "GaussianTeacher": {"std": (0.0, -1.0), "t_max": (0.0, 2.0)},
    "MixtureTeacher": {"means": (torch.zeros(3), torch.zeros(0, 2)), "std": (0.0, -1.0), "t_max": (0.0, 2.0)},
    "VE": {"sigma_min": (0.0, -1.0, 100.0), "sigma_max": (0.001,), "rho": (0.0, -1.0), "time_input": ("", "t")},
    "FlowMatching": {"shift": (0.0, -1.0)},
    "DiscreteVP": {
        "alphas_cumprod": (
            torch.zeros(0),
            torch.tensor(0.5),
            torch.zeros(2, 2),
            torch.tensor([0.1, 0.9]),
            torch.tensor([math.nan, 0.1]),
            torch.tensor([2.0, 0.1]),
            torch.tensor([0.9, -0.1]),
            torch.tensor([True, False]),
        )
    },
    "teacher's sampler.images": {
        "seeds": ([-1, 0], [0, 2**70], [0.5, 1], [True, False], "01", torch.zeros(2, 3), torch.zeros(3, 4), [0]),
        "batch_size": (0, -1),
    },
    "teacher's sampler.conditions": {
        "num": (-1,),
        "class_labels": ([9], [True], [0.5], "0"),
        "prompts": ("a cat", ["a"]),
        "seed": (-1,),
    },
    "student's sampler.at": {"target_time": (-1.0, 2.0), "guidance_scale": (2.0,)},
    "teacher's sampler.at": {"target_time": (0.5,), "guidance_scale": (-1.0,)},
}  # fmt: skip


def table(every: int = 1) -> list[Call]:
    """Return the calls, every so-many of them."""
    made = []
    for name, (function, right, model) in subjects().items():
        hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)  # type: ignore[misc]
        hints = {key: hint for key, hint in hints.items() if key in inspect.signature(function).parameters}
        if model is not None:
            hints |= {key: field.annotation for key, field in model.model_fields.items() if key not in hints}
        wrong = {key: wrong_for(hint) for key, hint in hints.items() if key != "settings"}
        if model is not None:
            for key in model.model_fields:
                wrong[key] = [*wrong.get(key, []), *beyond(key, model)]
                if about(model.model_fields[key], "commas"):  # a number alone is a list of one
                    wrong[key] = [value for value in wrong[key] if type(value) not in (int, float)]
        for key, values in MEANT.get(name, {}).items():
            wrong[key] = [*wrong.get(key, []), *values]
        for key, values in wrong.items():
            made += [Call(name, key, value, _bound(function, {**right, key: value})) for value in values]
        required = [
            key
            for key, p in inspect.signature(function).parameters.items()
            if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        ]
        for key in required:
            made.append(Call(name, key, "(left out)", _bound(function, {k: v for k, v in right.items() if k != key})))
    return list(itertools.islice(made, 0, None, every))


def _bound(function: Callable[..., object], arguments: dict[str, Any]) -> Callable[[], object]:
    return lambda: function(**arguments)


def verdict(call: Call, place: Path) -> str:
    """Make a call in an empty folder; return "" if it is refused as it should be, else what it did instead."""
    started = time.perf_counter()
    said = "accepted"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call.make()
    except (ValueError, TypeError) as error:
        text = str(error)
        said = ""
        if len(text.splitlines()) != 1:
            said = "not one line"
        elif not any(name in text for name in (call.argument, NAMES.get(call.argument, call.argument))):
            said = "does not name the argument"
        elif "\ufffd" in text or len(text) > 1200:
            said = "too long"
        if said:
            said += f": {type(error).__name__}: {text[:300]}"
    except Exception as error:
        said = f"{type(error).__name__}: {str(error)[:300]}"
    if any(place.iterdir()):
        return f"wrote {[path.name for path in place.iterdir()]}; {said}"
    return said or ("too slow" if time.perf_counter() - started > LONGEST else "")


def main() -> None:
    """Make the calls and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="Every so-many calls of the table.")
    parser.add_argument("--show", default="", help="Show only calls with this in them.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    calls, endings = table(options.every), collections.Counter()
    started = time.perf_counter()
    for call in calls:
        if options.show not in str(call):
            continue
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            said = verdict(call, Path(folder))
            os.chdir("/")
        endings[said.split(":")[0] or "refused in one line that names the argument"] += 1
        if said:
            print(f"{call}\n    {said}")
    print(f"\n| ending | of {sum(endings.values()):,} calls |\n|---|---|")
    for ending, num in endings.most_common():
        print(f"| {ending} | {num:,} |")
    print(f"\n{time.perf_counter() - started:.0f} seconds")


if __name__ == "__main__":
    main()
