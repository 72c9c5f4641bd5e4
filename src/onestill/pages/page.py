"""A page: one file with everything in it, that opens from the disk and asks nothing of a network."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onestill.core.writing import written

if TYPE_CHECKING:
    from jinja2 import Environment

    from onestill.pages.gallery import Gallery
    from onestill.pages.plots import Plot

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class PageTable:
    """A table: titles, rows of text, which of them stand out, and lines beneath."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: Sequence[int] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Code:
    """Lines to copy, with what they are for."""

    title: str
    text: str


@dataclass(frozen=True)
class Page:
    """What a page shows, from above to below; what is empty is left out.

    Attributes:
        title: Its title.
        lead: What matters most, in a sentence or a few.
        facts: Names with values, such as the teacher's.
        warnings: What has to be known first.
        tables: Tables of numbers.
        plots: Plots, two beside each other where there is room.
        gallery: Pictures of the same noise.
        sheets: Whole pictures that are there as files, by title.
        codes: Commands and programs.
        settings: A table that is folded away at first.
        made: What made the page.
    """

    title: str
    lead: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = ()
    warnings: Sequence[str] = ()
    tables: Sequence[PageTable] = ()
    plots: Sequence[Plot] = ()
    gallery: Gallery | None = None
    sheets: Sequence[tuple[str, str]] = ()
    codes: Sequence[Code] = ()
    settings: PageTable | None = None
    made: str = ""

    def html(self) -> str:
        """Return it as HTML; whatever text is in it stays text."""
        script, style = (read_part(name) for name in ("page.js", "page.css"))
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        drawn = [plot for plot in self.plots if plot.has_points]
        shown = None if self.gallery is None else {"rows": self.gallery.rows, "captions": list(self.gallery.captions)}
        return (
            _templates()
            .get_template("page.html")
            .render(page=self, plots=drawn, shown=shown, script=script, style=style, script_digest=digest)
        )

    def write(self, path: Path) -> None:
        """Write it, whole or not at all; what was there under that name is replaced."""
        with written(path, overwrite=True) as partial:
            partial.write_text(self.html(), encoding="utf-8")


@functools.cache
def read_part(name: str) -> str:
    """Return the text of a part that every page has."""
    return (TEMPLATES / name).read_text(encoding="utf-8")


@functools.cache
def _templates() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
