"""The Dockerfile, unbuilt: what it copies exists, what it installs is pinned, what it calls is there, nobody is root."""

from __future__ import annotations

import re
import shlex
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def instructions() -> list[tuple[str, str]]:
    """Return what the Dockerfile does: an instruction and its line each, continued ones joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.M)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(words[0], words[1]) for line in lines if len(words := line.split(maxsplit=1)) == 2]


def lines_of(instruction: str) -> list[str]:
    return [line for name, line in instructions() if name == instruction]


def arguments() -> dict[str, str]:
    return {name: value for name, _, value in (line.partition("=") for line in lines_of("ARG"))}


def test_both_arguments_have_values() -> None:
    assert arguments().keys() == {"PYTHON", "DEVICE"} and all(arguments().values())
    assert lines_of("FROM") == ["python:${PYTHON}-slim"]
    # An argument before FROM is not known behind it: PYTHON is asked for there alone, DEVICE behind it.
    order = [f"{name} {line}" for name, line in instructions()]
    assert [line.split("=")[0] for line in order[:3]] == ["ARG PYTHON", "FROM python:${PYTHON}-slim", "ARG DEVICE"]


def test_its_python_is_one_that_the_package_runs_on() -> None:
    assert arguments()["PYTHON"] in SpecifierSet(PROJECT["requires-python"])


def test_a_device_is_one_of_two_and_any_other_is_refused() -> None:
    (line,) = [line for line in lines_of("RUN") if "DEVICE" in line]
    cases = dict(re.findall(r"(\w+|\*)\) (.*?) ;;", line))
    assert cases.keys() == {"cpu", "cuda", "*"} and arguments()["DEVICE"] == "cpu"
    assert "/whl/cpu " in cases["cpu"] and "whl" not in cases["cuda"] and "must be cpu or cuda" in cases["*"]
    assert cases["*"].endswith("exit 2")


def test_what_is_copied_exists_and_is_let_through() -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    let_through = {line[1:] for line in ignored if line.startswith("!")}
    assert ignored[0] == "*", "all that is not named stays out"
    copied = [name for line in lines_of("COPY") for name in line.split()[:-1]]
    assert {"constraints.txt", "pyproject.toml", "src"} <= {*copied} and {*copied} == let_through
    assert all((ROOT / name).exists() for name in copied)
    assert PROJECT["readme"] in copied and {*PROJECT["license-files"]} <= {*copied}
    assert any(fnmatch("src/onestill/__pycache__", line) for line in ignored)


def test_every_installation_is_pinned() -> None:
    installs = re.findall(r"pip install [^;&]*", " ; ".join(lines_of("RUN")))
    assert len(installs) == 4 and all("--constraint constraints.txt" in line for line in installs), installs
    (extras,) = re.findall(r'"\.\[(.*?)\]"', " ".join(installs))
    assert {*extras.split(",")} <= PROJECT["optional-dependencies"].keys()


def test_dependencies_are_a_layer_below_the_code() -> None:
    order = [f"{name} {line}" for name, line in instructions()]
    torch, rest, code = (
        next(i for i, line in enumerate(order) if part in line) for part in ('DEVICE" in', ".[all]", "COPY src")
    )
    assert torch < rest < code and "--no-deps ." in order[code + 1]


def test_it_starts_the_command_and_nobody_is_root() -> None:
    order = [f"{name} {line}" for name, line in instructions()]
    assert 'ENTRYPOINT ["onestill"]' in order and "onestill" in PROJECT["scripts"]
    (user,) = lines_of("USER")
    assert user == "onestill" and any(f"useradd --create-home --uid 1000 {user}" in line for line in lines_of("RUN"))
    behind = order[order.index(f"USER {user}") :]
    assert not any(line.startswith(("RUN", "COPY", "ADD")) for line in behind)
    # Nobody's folders: where it works and what it keeps, whoever `--user` makes of it.
    (made,) = [line for line in lines_of("RUN") if "mkdir --mode 1777" in line]
    kept = [word.split("=")[1] for line in lines_of("ENV") for word in shlex.split(line) if "/cache" in word]
    assert lines_of("WORKDIR")[-1] in made.split() and kept and all(path.startswith("/cache") for path in kept)


@pytest.mark.parametrize(
    "line", re.findall(r"^#     docker (.*)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.M)
)
def test_the_commands_above_it_are_of_its_arguments(line: str) -> None:
    words = shlex.split(re.split(r"\s{2,}#", line)[0])
    given = [words[i + 1].split("=") for i, word in enumerate(words) if word == "--build-arg"]
    assert words[0] in ("build", "run") and all(name in arguments() for name, _ in given)
