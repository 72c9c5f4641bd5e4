"""What the site has that docs/ has not: the repository's own pages, two pages made from the code, formulas, llms.txt.

mkdocs calls the functions named `on_...`. Everything here is made anew at each build, so that it cannot differ from the
code: settings from the models that the commands are made of, Python names from `onestill.__all__`.
"""

from __future__ import annotations

import html
import inspect
import os.path
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, get_args, get_origin

import annotated_types
import typer
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic.fields import FieldInfo

import onestill
from onestill import cli
from onestill.cli.fields import MODEL
from onestill.core.errors import plain
from onestill.core.settings import Settings, about

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
}
"""Files of the repository that are pages of the site, by their places there and here."""
SETTINGS, PYTHON = "reference/settings.md", "reference/python.md"
ROOMS = {
    "runs": "Runs",
    "sampling": "Exploring a sampler",
    "teachers": "Teachers",
    "students": "Students",
    "export": "Exporting",
    "diffusion": "Noise processes",
    "core": "Settings and errors",
}
"""The title that the public names of each room stand under, in this order; the settings of every room under the last."""
KINDS = {bool: "yes or no", int: "whole number", float: "number", str: "text", Path: "path"}
DELIMITERS = {"lVert": "‖", "rVert": "‖", "langle": "⟨", "rangle": "⟩"}
"""What latex2mathml does not know by name behind `\\big`."""
LONGEST_SENTENCE = 240

# Which pages there are


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    made = {place: (ROOT / name).read_text(encoding="utf-8") for name, place in PAGES.items()}
    for place, text in {**made, SETTINGS: settings_page(), PYTHON: python_page()}.items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return a page with its links, which hold in the repository, as they hold on the site."""
    return moved(markdown, page.file.src_uri)


def moved(markdown: str, place: str) -> str:
    """Return the page at `place` with the links that leave it as they hold on the site; those in code stay.

    Raises PluginError if one leads to what is no page of the site.
    """
    source = PurePosixPath({here: there for there, here in PAGES.items()}.get(place, f"docs/{place}"))

    def link(match: re.Match[str]) -> str:
        path, mark, anchor = match[1].partition("#")
        if not path or re.match(r"\w+:", path):
            return match[0]
        target = os.path.normpath(source.parent / path)
        there = PAGES.get(target, target.removeprefix("docs/") if target.startswith("docs/") else "")
        if not there:
            raise PluginError(f"{source}: the link to {match[1]!r} leads to no page of the site")
        return f"]({os.path.relpath(there, PurePosixPath(place).parent)}{mark}{anchor})"

    parts = re.split(r"(^```.*?^```)", markdown, flags=re.S | re.M)
    return "".join(part if part.startswith("```") else re.sub(r"\]\(([^)\s]+)\)", link, part) for part in parts)


# Formulas


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return a page with its formulas as MathML, which browsers draw without any script."""
    return re.sub(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', formula, html, flags=re.S)


def formula(match: re.Match[str]) -> str:
    """Return one formula; one that stands alone may have a number, which becomes its anchor."""
    latex = html.unescape(match[2]).strip()
    if match[1] == "span":
        return mathml(latex, "inline")
    number = re.search(r"\\tag\{(\w+)\}", latex)
    drawn = mathml(latex.replace(number[0], "") if number else latex, "block")
    if number is None:
        return f'<div class="formula">{drawn}</div>'
    return f'<div class="formula" id="eq-{number[1]}">{drawn}<span>({number[1]})</span></div>'


def mathml(latex: str, display: str) -> str:
    """Return a formula as MathML, with room behind the names of functions; PluginError if a command is not known."""
    plainly = re.sub(r"(?<=\\big|\\Big)\\(\w+)", lambda name: DELIMITERS.get(name[1], name[0]), latex)
    made = convert(plainly, display=display)
    if unknown := re.search(r"\\\w+", made):
        raise PluginError(f"the formula {latex!r} holds {unknown[0]}, which latex2mathml does not know")
    apart = re.sub(r"(<mi>(?:cos|exp|log|sin)</mi>)(?!<mo)", r'\1<mspace width="0.17em" />', made)
    return apart.replace("<mi>&#x0007E;</mi>", "<mo>&#x0223C;</mo>")  # "distributed as" is no tilde


# Settings


def settings_page() -> str:
    """Return the page of every command's settings."""
    parts = [
        "# Every setting",
        "A setting is a flag (`--t_max 0.9`), a line of a `--config` file (`t_max: 0.9`) and an argument in Python "
        "(`t_max=0.9`); a *yes or no* is turned on by `--name` and off by `--no_name`, and a list is a flag that is "
        "repeated, or one text with commas where that is said. These tables are made from the models that read "
        "them. How to choose is in [the guide](../guide/settings.md).",
    ]
    seen: dict[type[Settings], str] = {}
    for name, command in typer.main.get_command(cli.app).commands.items():  # type: ignore[attr-defined]  # a group
        (info,) = [each for each in cli.app.registered_commands if (each.name or each.callback.__name__) == name]  # type: ignore[union-attr]  # all have one
        model = vars(info.callback).get(MODEL)
        parts += [f"## {name}", " ".join((command.help or "").split())]
        if model in seen:
            parts.append(f"It takes every setting of [{seen[model]}](#{seen[model]}).")
        elif model is not None:
            seen[model] = name
            parts += tables(model)
        own = [p for p in command.params if p.name not in {*getattr(model, "model_fields", ()), "word", "help"}]
        if own:
            rows = [f"| `{max(p.opts, key=len)}` | {cell(p.help or '')} |" for p in own]
            parts.append(table("On the command line", ["flag or argument", "what it is"], rows, of=name))
    return "\n\n".join(parts) + "\n"


def tables(model: type[Settings]) -> Iterator[str]:
    """Return a table for each panel of a model."""
    panels: dict[str, list[str]] = {}
    for name, field in sorted(model.model_fields.items(), key=lambda item: not item[1].is_required()):
        words = [f"`{name}`", *map(cell, (taken(field), default(field), described(field)))]
        panels.setdefault(about(field, "panel"), []).append(f"| {' | '.join(words)} |")
    for title, rows in panels.items():
        yield table(title, ["setting", "takes", "default", "what it is"], rows, of=model.__name__)


def table(title: str, columns: list[str], rows: list[str], of: str) -> str:
    """Return a table under a heading that no other command's has."""
    slug = re.sub(r"\W+", "-", f"{of}-{title}".lower()).strip("-")
    head = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
    lines = "\n".join(rows)
    return f'### {title} {{ #{slug} }}\n\n<div class="settings" markdown>\n\n{head}\n{lines}\n\n</div>'


def cell(text: str) -> str:
    """Return a text as it can stand in a table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def described(field: FieldInfo) -> str:
    """Return the description of a field, with the settings that it mentions as code."""
    text = field.description or ""
    for mention in about(field, "mentions"):
        text = re.sub(rf"(?<!`)\b{mention}\b(?!`)", f"`{mention}`", text)
    return f"{text} May change when a run goes on." if about(field, "may_change") else text


def default(field: FieldInfo) -> str:
    """Return the default of a field in words."""
    if field.is_required():
        return "required"
    if field.default in (None, ()):
        return "–"
    return ("yes" if field.default else "no") if isinstance(field.default, bool) else f"`{plain(field.default)}`"


def taken(field: FieldInfo) -> str:
    """Return what a field takes, in words, with its limits."""
    return f"{kind(field.annotation, field.metadata)}{', with commas' if about(field, 'commas') else ''}"


def kind(annotation: Any, limits: list[Any]) -> str:
    """Return a type with its limits in words; ValueError for one that has none here."""
    inner = get_args(annotation)
    origin = get_origin(annotation)
    if origin is Annotated:
        held = [each for part in inner[1:] for each in (part.metadata if isinstance(part, FieldInfo) else [part])]
        return kind(inner[0], held)
    if origin is Literal:
        return " · ".join(f"`{word}`" for word in inner)
    if origin is tuple:
        return f"list: {kind(inner[0], [])}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(kind(each, limits) for each in inner if each is not type(None))
    if annotation not in KINDS:
        raise ValueError(f"docs/hooks.py has no words for settings of type {annotation}")
    return " ".join(filter(None, [KINDS[annotation], *map(bound, limits)]))


def bound(limit: Any) -> str:
    """Return one limit of a number in words."""
    for cls, name, words in (
        (annotated_types.Ge, "ge", "from"),
        (annotated_types.Gt, "gt", "above"),
        (annotated_types.Le, "le", "to"),
        (annotated_types.Lt, "lt", "below"),
    ):
        if isinstance(limit, cls):
            value = getattr(limit, name)
            power = isinstance(value, int) and value >= 2**53
            return f"{words} {f'2^{value.bit_length() - 1}' if power else f'{value:,}'}"
    return ""


# Python


def python_page() -> str:
    """Return the page of the public names, by the rooms that they live in; mkdocstrings fills in their docstrings."""
    text = ["# Python", *[" ".join(each.split()) if "    " not in each else f"```python\n{inspect.cleandoc(each)}\n```"
            for each in re.split(r"\n\n|\n(?=t = )", (onestill.__doc__ or "").strip())]]  # fmt: skip
    for title in dict.fromkeys(ROOMS.values()):
        text += [f"## {title}", *(entry(name) for name in onestill.__all__ if title_of(name) == title)]
    return "\n\n".join(text) + "\n"


def title_of(name: str) -> str:
    """Return the title that a public name stands under; PluginError if the site has none for its room."""
    value = getattr(onestill, name)
    room = "core" if is_settings(value) else value.__module__.split(".")[1]
    if room not in ROOMS:
        raise PluginError(f"onestill.{name} lives in {room!r}, for which docs/hooks.py has no title in ROOMS")
    return ROOMS[room]


def is_settings(value: Any) -> bool:
    """Return whether a public name is a model of settings."""
    return inspect.isclass(value) and issubclass(value, Settings)


def entry(name: str) -> str:
    """Return what mkdocstrings is told of a public name; of settings the tables say the fields."""
    value = getattr(onestill, name)
    told = f"::: {value.__module__}.{name}"
    if not is_settings(value):
        return told
    return f"{told}\n    options:\n      members: false\n      show_signature: false\n\nIts fields: [every setting](settings.md)."


def in_words(match: re.Match[str]) -> str:
    """Return the signature and docstring of a public name, as llms-full.txt has them."""
    value = getattr(onestill, match[1].rpartition(".")[2])
    signature = "" if is_settings(value) else inspect.signature(value)
    return f"### {value.__name__}\n\n```python\nonestill.{value.__name__}{signature}\n```\n\n{inspect.getdoc(value)}"


# For readers that are programs


def on_env(env: Any, config: MkDocsConfig, files: Files) -> Any:
    """Add llms.txt, llms-full.txt and every page's Markdown as a text beside it, now that all pages are read."""
    pages = [file.page for file in files.documentation_pages() if file.page is not None]
    for place, text in texts(pages, config).items():
        files.append(File.generated(config, place, content=text))
    return env


def texts(pages: list[Page], config: MkDocsConfig) -> dict[str, str]:
    """Return the files for readers that are programs, by place: the list of pages, all of them, and each alone."""
    found = {page.file.src_uri: (page, as_text(page.markdown or "")) for page in pages}
    listed = [f"# {config.site_name}", f"> {config.site_description}"]
    whole: list[str] = []
    files: dict[str, str] = {}
    for section in config.nav or []:
        ((title, entries),) = section.items()
        lines = []
        for name, place in (item for entry in entries for item in entry.items()):
            page, text = found[place]
            beside = place.removesuffix(".md") + ".txt"
            lines.append(f"- [{name}]({config.site_url or ''}{beside}): {first_sentence(text)}")
            whole.append(f"<!-- {page.file.dest_uri} -->\n\n{text}")
            files[beside] = text
        listed.append("\n".join([f"## {title}", "", *lines]))
    full = f"{config.site_url or ''}llms-full.txt"
    listed.append(f"## All of it\n\n- [llms-full.txt]({full}): every page above in one file.")
    return {**files, "llms.txt": "\n\n".join(listed) + "\n", "llms-full.txt": "\n\n".join(whole)}


def as_text(markdown: str) -> str:
    """Return a page's Markdown without what only the site reads: docstrings in full, plain headings and tables."""
    text = re.sub(r"^::: onestill\.([\w.]+)$(\n {4}.*)*", in_words, markdown, flags=re.M)
    text = re.sub(r"^</?div.*>\n\n?", "", text, flags=re.M)
    return re.sub(r"^(#+ .*) \{ #\S+ \}$", r"\1", text, flags=re.M).strip() + "\n"


def first_sentence(text: str) -> str:
    """Return the first sentence of a page's prose, without its marks."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    paragraphs = (" ".join(each.split()) for each in re.split(r"\n\n+", prose))
    first = next((each.removeprefix("- ") for each in paragraphs if each and not re.match(r"[#!|<>$]", each)), "")
    plainly = re.sub(r"\[([^]]*)\]\([^)]*\)|\*+|`", lambda match: match[1] or "", first)
    sentence = re.split(r"(?<=[a-z)]\.) ", plainly)[0].rstrip(".:")
    return (
        f"{sentence}." if len(sentence) <= LONGEST_SENTENCE else f"{sentence[:LONGEST_SENTENCE].rsplit(' ', 1)[0]} ..."
    )
