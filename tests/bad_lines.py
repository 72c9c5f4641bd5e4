"""Bad command lines, made from the settings of every command: for each flag what it cannot take.

Each has to end within seconds with one line that names its flag, exit code 2, and nothing written. None gets as far as
a teacher, so all of them together take as long as reading a thousand command lines. `SETUP` makes what they name.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from onestill.cli.fields import ALIASES
from onestill.cli.guesses import NAMES
from onestill.core.settings import about, names_path
from onestill.evaluation.config import EvaluateConfig
from onestill.export.config import ExportConfig
from onestill.sampling.config import SampleConfig
from onestill.training.config import DistillConfig

COMMANDS = {
    "distill": (DistillConfig, {"teacher": "digits", "output_dir": "run"}),
    "inspect": (DistillConfig, {"teacher": "digits"}),
    "sample": (SampleConfig, {"student": "student", "output": "x.png"}),
    "evaluate": (EvaluateConfig, {"student": "student", "output": "report"}),
    "export": (ExportConfig, {"student": "student", "output": "out"}),
}
DEMO = {"output_dir": Path, "max_train_steps": int, "seed": int, "device": str}

DIGITS = "9" * 5000
WHOLE = [
    "",
    " ",
    "x",
    "1.5",
    "nan",
    "inf",
    "0x10",
    "٣",
    "1_000",
    "1e3",
    DIGITS,
    f"-{DIGITS}",
    "1" + "0" * 26,
    "-" + "9" * 26,
]
REAL = ["", " ", "x", "nan", "inf", "-inf", "1e400", "-1e308", "1e308", "0x1p3", "٣.٥", "1,5", DIGITS, "1e"]
TEXTS = ["\udcff", "x" * 2_000_000, "a\0b"]
PATHS = [
    "~nobody-of-that-name/x", "a" * 256, "b/" + "ü" * 200, "c/" * 2000, "/dev/null", "/dev/zero", "/dev/null/x",
    "file.txt/x", "file.txt/x/y", "pipe", "socket", "loop", "loop/x", "", "  ", "n\0n", "\udcff", "/dev/full",
]  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A command that must be refused, and the words that must be in what it says."""

    arguments: tuple[str, ...]
    words: str = ""
    yaml: str | None = None

    def __str__(self) -> str:
        return " ".join(word if len(word) < 40 else f"{word[:20]}...{len(word)}" for word in self.arguments)


def set_up(folder: Path) -> None:
    """Make what the lines name: a file, a pipe, a socket, a link to itself, and an empty folder as a student."""
    (folder / "file.txt").write_text("x")
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as bound:
        here = Path.cwd()
        os.chdir(folder)  # a socket's path has to be short
        bound.bind("socket")
        os.chdir(here)
    (folder / "loop").symlink_to("loop")
    (folder / "student").mkdir()


def lines() -> list[Line]:
    """Return all of them, always in the same order."""
    return [*_of_fields(), *_of_yaml(), *_of_demo(), *_of_configs(), *_of_words(), *_of_budgets(), *_of_guesses()]


def _of_fields() -> Iterator[Line]:
    for command, (model, usual) in COMMANDS.items():
        for name, field in model.model_fields.items():
            given = {key: value for key, value in usual.items() if key != name}
            if command == "sample" and name == "teacher":
                del given["student"]
            start = [command, *(word for key, value in given.items() for word in (f"--{key}", value))]
            for value in _bad_values(field):
                yield Line((*start, f"--{name}", value), f"--{name}")
            if bool in _kinds(field.annotation):
                yield Line((*start, f"--{name}=maybe"), f"--{name}")
            else:
                yield Line((*start, f"--{name}"), f"--{name}")
            yield Line((*start, f"--{name}zz", "1"), f"--{name}zz")


def _bad_values(field: Any) -> list[str]:
    kinds = _kinds(field.annotation)
    if Literal in kinds:
        return ["", "x", "DDIM"]
    if names_path(field):
        return PATHS
    if about(field, "commas"):
        return ["x", "1,,2", "1,nan", "1;2", "0x1,2", "1e400,1", DIGITS, "1,1" + "0" * 26]
    return WHOLE if int in kinds else REAL if float in kinds else [] if bool in kinds else TEXTS


def _kinds(annotation: Any) -> set[Any]:
    inner = [get_origin(annotation), *get_args(annotation)] if get_args(annotation) else [annotation]
    found = {kind for kind in inner if kind is not None}
    return found | {kind for part in found if get_args(part) for kind in _kinds(part)}


_ODD = ["[1, 2, [3]]", "{a: {b: c}}", "0x" + "f" * 5000, "2001-99-99", "!!python/object:os.system {}", "1e400", DIGITS]


def _of_yaml() -> Iterator[Line]:
    for command, (model, usual) in COMMANDS.items():
        if command == "export":
            continue
        for name in list(model.model_fields)[::3]:
            odd_here = [
                odd for odd in _ODD if odd != "1e400" or not _kinds(model.model_fields[name].annotation) & {str, Path}
            ]
            for odd in odd_here:
                rest = "".join(f"{key}: {value}\n" for key, value in usual.items() if key != name)
                yield Line((command, "--config", "c.yaml"), "c.yaml", f"{rest}{name}: {odd}\n")
        bombs = [
            "a: &a [x,x]\n"
            + "".join(f"{b}: &{b} [*{a},*{a},*{a},*{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
        ]
        bombs += [
            "a: " + "[" * 5000,
            "seed: " + "{a: " * 3000,
            "x",
            "- 1",
            "",
            "\0",
            "é: 1",
            "k" * 300_000 + ": 1",
            ": : :",
        ]
        bombs += ["? [1, 2]\n: 3", "teacher: *x", "%YAML 9\n---\n", "a: 1\n\tb: 2", "z" * 2000 + ": 1"]
        yield from (Line((command, "--config", "c.yaml"), "c.yaml", text) for text in bombs)
        bomb = "steps: &a [1,1]\n".replace("steps", next(iter(model.model_fields)))
        yield Line((command, "--config", "c.yaml"), "c.yaml", bomb)


def _of_demo() -> Iterator[Line]:
    for name, kind in DEMO.items():
        values = {Path: PATHS, int: WHOLE, str: ["gpu", "cuda:99", "cuda:" + "9" * 30, "", "\udcff"]}[kind]
        for value in values:
            yield Line(("demo", f"--{name}", value), f"--{name}")
    for teacher in ("x", "/dev/null", "", "a" * 300, "~nobody-of-that-name/x", "digitz"):
        yield Line(("demo", teacher), "teacher")


def _of_configs() -> Iterator[Line]:
    for command in ("distill", "inspect", "sample", "evaluate"):
        for path in [*PATHS, "none.yaml", "student", "sd16", "nothing/here.yaml"]:
            yield Line((command, "--config", path), "--config")


def _of_words() -> Iterator[Line]:
    for command, (_, usual) in COMMANDS.items():
        word = "teacher" if "teacher" in usual else "student"
        for path in PATHS:
            rest = [part for key, value in usual.items() if key != word for part in (f"--{key}", value)]
            yield Line((command, path, *rest), f"--{word}")
        yield Line((command, "one", f"--{word}", "two"), f"--{word} two")
        yield Line((command, "one", "two"), "unexpected extra argument")
        yield Line((command, "one", "two", "three"), "unexpected extra argument")
        yield Line((command[:-1],), "no such command")
        yield Line((command.upper(),), "no such command")


def _of_budgets() -> Iterator[Line]:
    for command in ("distill", "inspect"):
        start, text = (command, "digits", *("--output_dir", "run")), "teacher: digits\noutput_dir: run\nbudget: 8h\n"
        for time in (
            "",
            " ",
            "30",
            "m",
            "0m",
            "-5m",
            "1e3s",
            "nanh",
            "infd",
            "30 minutes",
            "1h30m",
            "366d",
            "٣m",
            "5M",
        ):
            yield Line((*start, f"--budget={time}"), "--budget")
        yield Line((*start, "--budget", "8h", "--max_train_steps", "5"), "--budget 8h and --max_train_steps 5")
        yield Line((command, "--config", "c.yaml"), "c.yaml: --budget", f"{text}max_train_steps: 5\n")
        yield Line((command, "--config", "c.yaml"), "c.yaml: --budget", text.replace("8h", "8"))


def _of_guesses() -> Iterator[Line]:
    for command, (model, _) in COMMANDS.items():
        for guess, meant in NAMES.items():
            has = [name for name in meant if name in model.model_fields]
            own = (
                "config",
                "json",
                "help",
                "dry_run",
                *(alias[2:] for aliases in ALIASES.values() for alias in aliases),
            )
            if has and len(guess) > 1 and guess not in model.model_fields and guess not in own:
                yield Line((command, f"--{guess}", "1"), f"no such option: --{guess}; did you mean --{has[0]}?")
