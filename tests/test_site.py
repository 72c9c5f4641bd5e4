"""The site, unbuilt: every page is in its navigation, every link leads somewhere, what is made of the code is the code."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import pytest
import typer
from markdown.extensions.toc import slugify
from mkdocs.config import load_config
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import Files, get_files
from mkdocs.structure.nav import get_navigation
from mkdocs.structure.pages import Page

import onestill
from onestill import cli
from onestill.evaluation.config import EvaluateConfig
from onestill.training.config import DistillConfig

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def config() -> Any:
    return load_config(str(ROOT / "mkdocs.yml"))


@pytest.fixture(scope="module")
def hooks(config: Any) -> ModuleType:
    """docs/hooks.py, as mkdocs has loaded it."""
    found: ModuleType = config.hooks["docs/hooks.py"]
    return found


@pytest.fixture(scope="module")
def files(config: Any) -> Files:
    found: Files = config.plugins.on_files(get_files(config), config=config)
    get_navigation(found, config)  # gives each file its page
    return found


@pytest.fixture(scope="module")
def pages(config: Any, hooks: ModuleType, files: Files) -> dict[str, Page]:
    """Every page by its place, read and not rendered."""
    found = {}
    for file in files.documentation_pages():
        assert file.page is not None
        file.page.read_source(config)
        file.page.markdown = hooks.on_page_markdown(file.page.markdown, file.page, config, files)
        found[file.src_uri] = file.page
    return found


def in_navigation(config: Any) -> list[str]:
    entries = [entry for section in config.nav for entry in next(iter(section.values()))]
    return [place for entry in entries for place in entry.values()]


def prose(page: Page) -> str:
    return re.sub(r"^```.*?^```", "", page.markdown or "", flags=re.S | re.M)


def anchors(page: Page) -> set[str]:
    """Return the anchors of a page's headings, with the numbers that repeated ones get."""
    found: list[str] = []
    for title in re.findall(r"^#+ (.*)$", prose(page), re.M):
        given = re.search(r" \{ #(\S+) \}$", title)
        slug = given[1] if given else slugify(re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title), "-")
        found.append(slug if slug not in found else f"{slug}_{found.count(slug)}")
    return set(found)


def test_every_page_is_in_the_navigation_once(config: Any, pages: dict[str, Page]) -> None:
    assert {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")} < pages.keys()
    named = in_navigation(config)
    assert sorted(named) == sorted(pages) and len(named) == len(set(named))


def test_every_link_of_the_site_leads_somewhere(pages: dict[str, Page]) -> None:
    found, dead = 0, []
    for place, page in pages.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
            if re.match(r"\w+:", link):
                continue
            found += 1
            path, _, anchor = link.partition("#")
            target = (
                Path("/", PurePosixPath(place).parent, path).resolve().relative_to("/").as_posix() if path else place
            )
            there = target in pages or (ROOT / "docs" / target).is_file()
            if not there or (anchor and anchor not in anchors(pages[target])):
                dead.append(f"{place}: {link}")
    assert found > 40 and not dead


def test_a_link_holds_in_the_repository_and_on_the_site(hooks: ModuleType) -> None:
    readme = "[a](docs/guide/runs.md#which-average) [b](#how-good) [c](https://example.org) [d](CHANGELOG.md)"
    assert hooks.moved(readme, "index.md") == (
        "[a](guide/runs.md#which-average) [b](#how-good) [c](https://example.org) [d](project/changelog.md)"
    )
    assert hooks.moved("[README](../../README.md) ![](../images/walk.png)", "guide/using.md") == (
        "[README](../index.md) ![](../images/walk.png)"
    )
    assert hooks.moved("```\n[a](LICENSE)\n```\n", "index.md") == "```\n[a](LICENSE)\n```\n"
    with pytest.raises(PluginError, match=r"README.md: the link to 'LICENSE' leads to no page of the site"):
        hooks.moved("[a](LICENSE)", "index.md")


def test_a_build_that_is_not_made_of_the_code_is_refused(hooks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"docs/hooks.py has no words for settings of type <class 'complex'>"):
        hooks.kind(complex, [])
    monkeypatch.delitem(hooks.ROOMS, "runs")
    with pytest.raises(PluginError, match=r"onestill.distill lives in 'runs', for which docs/hooks.py has no title"):
        hooks.title_of("distill")


def test_the_tables_are_the_settings(pages: dict[str, Page]) -> None:
    text = pages["reference/settings.md"].markdown or ""
    parts = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]  # a group
    assert list(parts) == list(commands)
    for name, model in (("distill", DistillConfig), ("evaluate", EvaluateConfig)):
        rows = re.findall(r"^\| `(\w+)` \|", parts[name], re.M)
        assert sorted(rows) == sorted(model.model_fields) and len(rows) > 25
    assert "| `t_max` | number above 0 to 1 | – |" in parts["distill"]
    assert re.search(
        r"^\| `steps` \| list: whole number from 1 to 10,000, with commas \| `50,10,4,1` \| Steps",
        parts["evaluate"],
        re.M,
    )
    assert re.search(r"^\| `speed` \| yes or no \| yes \| Time the rows\. \|$", parts["evaluate"], re.M)
    assert re.search(r"^\| `seed` \| whole number from 0 below 2\^63 \| `0` \|", parts["sample"], re.M)
    assert "| `student` | path | required |" in parts["export"]
    assert "It takes every setting of [distill](#distill)." in parts["inspect"] and "| `--json` |" in parts["inspect"]
    assert "| `--max_train_steps` | Steps, if not the demo's own" in parts["demo"]


def test_every_public_name_has_its_docstring(pages: dict[str, Page]) -> None:
    told = re.findall(r"^::: onestill\.[\w.]+\.(\w+)$", pages["reference/python.md"].markdown or "", re.M)
    assert sorted(told) == sorted(onestill.__all__)


def test_llms_txt_names_every_page(config: Any, hooks: ModuleType, pages: dict[str, Page]) -> None:
    made = hooks.texts(list(pages.values()), config)
    listed = re.findall(r"^- \[.+?\]\((.+?)\): \S.*\.+$", made["llms.txt"], re.M)
    assert sorted(listed) == sorted(["llms-full.txt", *(f"{place.removesuffix('.md')}.txt" for place in pages)])
    assert {*listed, "llms.txt"} == made.keys()
    assert made["llms.txt"].startswith(f"# onestill\n\n> {config.site_description}\n\n## Start\n")
    full = made["llms-full.txt"]
    assert (
        all(made[place] in full for place in {*listed} - {"llms-full.txt"})
        and "\n::: " not in full
        and "<div" not in full
    )
    assert "### sample\n\n```python\nonestill.sample(" in full and onestill.sample.__doc__.splitlines()[0] in full  # type: ignore[union-attr]  # has one
    assert r"\tag{20}" in full, "formulas are as they were written"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("# Title\n\n**One** [link](a.md) with `code`. Two.", "One link with code."),
        ("# Title\n\n```sh\nrun\n```\n\n- Ctrl-C stops: it saves.", "Ctrl-C stops: it saves."),
        (f"# Title\n\n{'word ' * 100}", f"{'word ' * 48}..."),
    ],
)
def test_a_page_is_said_in_a_sentence(hooks: ModuleType, text: str, said: str) -> None:
    assert hooks.first_sentence(text) == said


def test_formulas_are_mathml(hooks: ModuleType) -> None:
    drawn = hooks.on_page_content(r'<p><span class="arithmatex">\(x &lt; \log w\)</span></p>', None, None, None)
    assert drawn.startswith('<p><math xmlns="http://www.w3.org/1998/Math/MathML" display="inline">')
    assert '<mi>log</mi><mspace width="0.17em" />' in drawn and "&#x0003C;" in drawn
    numbered = hooks.on_page_content('<div class="arithmatex">\\[\nx \\sim N, \\tag{1}\n\\]</div>', None, None, None)
    assert numbered.startswith('<div class="formula" id="eq-1"><math') and numbered.endswith(
        "</math><span>(1)</span></div>"
    )
    assert "&#x0223C;" in numbered and "tag" not in numbered
    assert hooks.mathml(r"\big\lVert x \big\rVert", "inline").count("‖</mo>") == 2
    with pytest.raises(PluginError, match="holds .nonsense, which latex2mathml does not know"):
        hooks.mathml(r"x \nonsense", "inline")


def test_nothing_is_fetched_from_elsewhere(config: Any) -> None:
    assert config.theme["font"] is False and not config.extra_javascript and "analytics" not in config.extra
    for sheet in config.extra_css:
        assert "//" not in re.sub(r"/\*.*?\*/", "", (ROOT / "docs" / sheet).read_text(encoding="utf-8"), flags=re.S)
