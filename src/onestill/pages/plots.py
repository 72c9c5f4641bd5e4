"""Plots: a few curves on two axes, as SVG that takes the page's own ink, and as PNG."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onestill.core.writing import writing, written

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#0a0b0c"
"""What the plots are drawn in; on a page it becomes the colour of the text around, in light and in dark."""
STUDENT, TEACHERS = "#e0662a", ("#4c86c6", "#8a6fc9", "#3f9f8f", "#b07a3a", "#8b93a1")
OTHERS = (STUDENT, *TEACHERS)
SIZE, DPI = (6.2, 3.5), 150


@dataclass(frozen=True)
class Curve:
    """Points (x, y) under one name; `dots` alone, a line, or both; a colour of its own if none is given.

    Points where either number is not finite, or is missing, are left out.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    color: str = ""
    line: bool = True
    dots: bool = False
    dashed: bool = False

    def points(self, *, positive: tuple[bool, bool]) -> tuple[list[float], list[float]]:
        """Return what can be drawn: on a logarithmic axis, what is above 0."""
        found = [(x, y) for x, y in zip(self.x, self.y, strict=True) if y is not None]
        kept = [
            point
            for point in found
            if all(math.isfinite(v) and (v > 0 or not is_log) for v, is_log in zip(point, positive, strict=True))
        ]
        return [x for x, _ in kept], [y for _, y in kept]


@dataclass(frozen=True)
class Plot:
    """Curves on two axes, with what is to be said of them."""

    name: str
    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    log: tuple[bool, bool] = (False, False)
    caption: str = ""
    levels: dict[str, float] = field(default_factory=dict)
    ticks: Sequence[float] = ()

    @property
    def has_points(self) -> bool:
        """Whether there is anything to draw."""
        return any(curve.points(positive=self.log)[0] for curve in self.curves)

    def svg(self) -> str:
        """Return it as an <svg> element for a page, in the ink of the text around it."""
        text = io.StringIO()
        self._saved(text, format="svg", transparent=True)
        found = text.getvalue()
        element = found[found.index("<svg") :].replace(INK, "currentColor")
        # The size is the page's; what the picture shows is said to those who cannot see it.
        element = re.sub(r'<svg ([^>]*?)(?:width|height)="[^"]*" ?', r"<svg \1", element, count=1)
        element = re.sub(r'<svg ([^>]*?)(?:width|height)="[^"]*" ?', r"<svg \1", element, count=1)
        element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
        # Several are in one page, where an id is there once.
        return re.sub(r'(\bid="|xlink:href="#|href="#|url\(#)', rf"\g<1>{self.name}-", element)

    def save(self, folder: Path) -> None:
        """Write it as `NAME.svg` and `NAME.png` on white, for papers and slides."""
        for name in plot_files(self.name):
            with written(folder / name, overwrite=True) as partial:
                self._saved(partial, format=name[-3:], dpi=DPI, facecolor="white")

    def _saved(self, target: Any, **how: Any) -> None:
        import matplotlib

        # Text stays text; ids depend on the plot alone, so that the same plot is the same file.
        style: Any = {
            **matplotlib.rcParamsDefault,
            "svg.fonttype": "none",
            "svg.hashsalt": self.name,
            "font.family": "sans-serif",
            "font.size": 9,
            "text.parse_math": False,
        }
        with matplotlib.rc_context(style), writing(f"the plot {self.name}"):
            metadata = {"Date": None} if how["format"] == "svg" else {}
            self._figure().savefig(target, metadata=metadata, **how)

    def _figure(self) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        free = iter(color for color in OTHERS * 2 if color not in {curve.color for curve in self.curves})
        for curve in self.curves:
            x, y = curve.points(positive=self.log)
            how: dict[str, Any] = {
                "linestyle": ("--" if curve.dashed else "-") if curve.line else "none",
                "linewidth": 1.6,
            }
            marker: dict[str, Any] = {"marker": "o", "markersize": 4.5} if curve.dots or len(x) == 1 else {}
            axes.plot(x, y, label=_text(curve.name), color=curve.color or next(free), **how, **marker)
        for name, level in self.levels.items():
            axes.axhline(level, color=INK, linewidth=0.8, linestyle=":", alpha=0.6)
            axes.annotate(
                _text(name),
                (1, level),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                size=7.5,
                color=INK,
            )
        axes.set(xlabel=_text(self.x), ylabel=_text(self.y))
        for set_scale, is_log in zip((axes.set_xscale, axes.set_yscale), self.log, strict=True):
            if is_log and self.has_points:
                set_scale("log")
        self._tidy(axes)
        return figure

    def _tidy(self, axes: Any) -> None:
        """Set ticks, rules and the legend of a figure's axes."""
        from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

        plain = FuncFormatter(lambda value, _: _number(value))
        for axis, is_log in zip((axes.xaxis, axes.yaxis), self.log, strict=True):
            axis.set_major_formatter(plain)
            low, high = axis.get_view_interval()
            # Within a decade few of the main ticks are seen, or none.
            axis.set_minor_formatter(plain if is_log and low > 0 and high / low < 20 else NullFormatter())
            axis.set_tick_params(which="minor", labelsize=7)
        if self.ticks:
            axes.set_xticks(list(self.ticks))
            axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(visible=True, color=INK, alpha=0.12, linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
        axes.tick_params(which="both", colors=INK)
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
        if len(self.curves) > 1:
            axes.legend(frameon=False, fontsize=8, labelcolor=INK)


def plot_files(*names: str) -> list[str]:
    """Return the names of the files that plots of these names are saved in."""
    return [f"{name}.{form}" for name in names for form in ("svg", "png")]


def _number(value: float) -> str:
    """Return a number as it stands beside an axis."""
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e6):
        return f"{value:.3g}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"


def _text(name: str) -> str:
    """Return a name as matplotlib shows it: one that begins with an underline it would leave out of the legend."""
    return f"\u200b{name}" if name.startswith("_") else name
