"""README and guide: commands are commands, Python names exist, links lead somewhere; the design's tree is the folders."""

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
README = ROOT / "README.md"
GUIDE = sorted((ROOT / "docs" / "guide").glob("*.md"))
PAGES = [README, ROOT / "docs" / "gallery.md", *GUIDE]
DOCUMENTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {page: page.read_text(encoding="utf-8") for page in DOCUMENTS}


def inline_code(text: str) -> list[str]:
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    return [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)]


def commands_of(text: str) -> list[str]:
    """Return the commands of a page, those in its prose too."""
    shell = [
        re.split(r"\s{2,}#", line)[0].strip()
        for block in re.findall(r"```sh\n(.*?)```", text, re.S)
        for line in block.splitlines()
    ]
    ours = [code for code in [*shell, *inline_code(text)] if code.startswith(("onestill ", "sample --", "export --"))]
    return [code.replace(" ...", "") for code in ours]


COMMANDS = sorted({command for page in PAGES for command in commands_of(TEXT[page])})


def words_of(command: str) -> list[str]:
    """Return the words behind `onestill`; a command that is named without it is one too."""
    return shlex.split(command.removeprefix("onestill "))


def flags_of(name: str) -> set[str]:
    group = typer.main.get_command(cli.app)
    flags = {flag for parameter in group.commands[name].params for flag in (*parameter.opts, *parameter.secondary_opts)}
    return flags | {"--help"}


def test_the_readme_is_one_page() -> None:
    assert len(TEXT[README].splitlines()) <= 130


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 25 and {words_of(command)[0] for command in COMMANDS} == {
        "distill",
        "sample",
        "inspect",
        "serve",
        "evaluate",
        "compare",
        "export",
        "demo",
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_flags_that_exist(command: str) -> None:
    name, *rest = words_of(command)
    if rest:
        assert {word for word in rest if word.startswith("--")} <= flags_of(name), command


@pytest.mark.parametrize("command", [command for command in COMMANDS if "--config" in command])
def test_a_config_that_is_named_exists(command: str) -> None:
    words = words_of(command)
    config = words[words.index("--config") + 1]
    assert config == "run.yaml" or (ROOT / "src" / "onestill" / "configs" / f"{config}.yaml").is_file()


def test_flags_that_are_spoken_of_exist() -> None:
    known = set().union(*(flags_of(name) for name in typer.main.get_command(cli.app).commands))
    spoken = {flag for page in PAGES for c in inline_code(TEXT[page]) for flag in re.findall(r"--\w+", c)}
    assert len(spoken) > 25 and spoken <= known, spoken - known


def test_the_python_is_python_and_its_names_are_there() -> None:
    used = set()
    for page in PAGES:
        for block in re.findall(r"```python\n(.*?)```", TEXT[page], re.S):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "onestill":
                    used.add(node.attr)
                if isinstance(node, ast.ImportFrom) and node.module == "onestill":
                    used |= {alias.name for alias in node.names}
    assert used >= {"distill", "sample", "evaluate", "interpolate"} and all(hasattr(onestill, name) for name in used)


def test_the_refusal_that_the_guide_shows_is_the_one(tmp_path: Path) -> None:
    (shown,) = re.findall(r"`--t_max 2: (.*?)` on the command line", TEXT[ROOT / "docs" / "guide" / "settings.md"])
    with pytest.raises(onestill.SettingError) as caught:
        onestill.distill("digits", tmp_path / "run", t_max=2)
    assert str(caught.value) == f"t_max=2: {shown}" and caught.value.as_flags() == f"--t_max 2: {shown}"


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.stem)
def test_the_pictures_and_documents_are_there(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", TEXT[page]) if not link.startswith("http")]
    assert not [link for link in links if not (page.parent / link).exists()]


def test_the_readme_leads_to_every_page_of_the_guide() -> None:
    assert len(GUIDE) > 5 and all(f"docs/guide/{page.name}" in TEXT[README] for page in GUIDE)


def test_the_tree_of_the_design_is_the_folders() -> None:
    (tree,) = re.findall(r"```\nsrc/onestill/\n(.*?)```", TEXT[ROOT / "docs" / "design.md"], re.S)
    named = re.findall(r"^ +([\w/]+)/  ", tree, re.M)
    package = ROOT / "src" / "onestill"
    folders = {path.parent.relative_to(package).as_posix() for path in package.rglob("__init__.py")} - {"."}
    assert {*named} == folders | {"embedded", "configs"}, "one line a folder"
    assert len(named) == len(set(named))


@pytest.mark.parametrize("page", [*PAGES, ROOT / "docs" / "design.md", ROOT / "CONTRIBUTING.md"], ids=lambda p: p.stem)
def test_files_that_are_spoken_of_exist(page: Path) -> None:
    package = ROOT / "src" / "onestill"
    spoken = {c for c in inline_code(TEXT[page]) if re.fullmatch(r"[\w.-]+(/[\w.-]+)*\.py", c)}
    missing = [
        c for c in spoken if not (ROOT / c).exists() and not (package / c).exists() and not any(package.rglob(c))
    ]
    assert not missing
