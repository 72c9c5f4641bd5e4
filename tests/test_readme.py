"""The README: its commands are commands, its Python names exist, and its tree is the files that are there."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer

import onestill
from onestill import cli

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = [
    line.split("   #")[0].strip() for block in re.findall(r"```sh\n(.*?)```", TEXT, re.S) for line in block.splitlines()
]
INLINE = [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", TEXT)]
COMMANDS = [code.replace(" ...", "") for code in [*SHELL, *INLINE] if code.startswith(("onestill ", "sample --"))]


def words_of(command: str) -> list[str]:
    """Return the words behind `onestill`; a command that is named without it is one too."""
    return shlex.split(command.removeprefix("onestill "))


def flags_of(name: str) -> set[str]:
    group = typer.main.get_command(cli.app)
    return {flag for parameter in group.commands[name].params for flag in (*parameter.opts, *parameter.secondary_opts)}


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 15 and {words_of(command)[0] for command in COMMANDS} >= {
        "distill",
        "sample",
        "inspect",
        "evaluate",
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_flags_that_exist(command: str) -> None:
    name, *rest = words_of(command)
    if rest:
        assert {word for word in rest if word.startswith("--")} <= flags_of(name), command


def test_flags_that_are_spoken_of_exist() -> None:
    known = set().union(*(flags_of(name) for name in typer.main.get_command(cli.app).commands))
    spoken = {flag for code in INLINE for flag in re.findall(r"--\w+", code)} - {"--no-deps"}
    assert len(spoken) > 25 and spoken <= known, spoken - known


def test_the_python_is_python_and_its_names_are_there() -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    used = set()
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "onestill":
                used.add(node.attr)
            if isinstance(node, ast.ImportFrom) and node.module == "onestill":
                used |= {alias.name for alias in node.names}
    assert used >= {"distill", "sample", "evaluate", "interpolate"} and all(hasattr(onestill, name) for name in used)


def test_the_pictures_and_documents_are_there() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", TEXT) if not link.startswith("http")]
    assert len(links) > 5 and not [link for link in links if not (ROOT / link).exists()]


def test_the_tree_names_every_file() -> None:
    (tree,) = re.findall(r"```\nsrc/onestill/\n(.*?)```", TEXT, re.S)
    named = set(re.findall(r"[\w/]+\.py", tree)) | set(re.findall(r"\w+/", tree))
    files = {path.name for path in (ROOT / "src" / "onestill").rglob("*.py") if not path.name.startswith("__")}
    commands = {path.name for path in (ROOT / "src" / "onestill" / "cli").glob("*.py")}  # one file for each command
    assert not files - commands - named, files - commands - named
    assert not {name for name in named if name.endswith(".py")} - files
