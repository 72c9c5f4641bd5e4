"""The page that a student is played with on: what it shows, by gradio; what it does, by a script of its own."""

from __future__ import annotations

import html
import json
import os
from typing import TYPE_CHECKING, Any

from onestill.pages.config import NUM_SEEDS
from onestill.pages.page import read_part
from onestill.pages.player import Played

if TYPE_CHECKING:
    import gradio
    from starlette.types import ASGIApp

MOST_BUTTONS = 20
"""Labels that have a button each; of more one is typed."""
NUM_GALLERY = 12
_FONTS = ("system-ui", "-apple-system", "Segoe UI", "DejaVu Sans", "sans-serif")


def playground(played: Played) -> ASGIApp:
    """Return the page as an application; nothing of it is asked of another machine."""
    # Read when gradio is imported: it would send home that it was, and ask for its newest version.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import fastapi
    import gradio

    theme = gradio.themes.Default(
        primary_hue="orange", neutral_hue="slate", font=_FONTS, font_mono=("ui-monospace", "monospace")
    )
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    return gradio.mount_gradio_app(
        app,
        _blocks(played),
        "/",
        theme=theme,
        css=read_part("playground.css"),
        js=read_part("playground.js"),
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        show_error=False,
        allowed_paths=[],
        blocked_paths=["/"],
        max_file_size=0,
    )


def _blocks(played: Played) -> gradio.Blocks:
    import gradio

    with gradio.Blocks(analytics_enabled=False, title=f"{played.name} · onestill") as blocks:
        gradio.HTML(_head(played), elem_id="head")
        asked = _what(played)
        with gradio.Row(elem_id="main"):
            with gradio.Column(scale=3, min_width=300):
                gradio.HTML(read_part("playground.html"), elem_id="shown")
            with gradio.Column(scale=2, min_width=260, elem_id="controls"):
                asked |= _how(played)
                seeds = gradio.Button(f"Show {NUM_GALLERY} seeds from here", elem_id="ask-gallery")
                has_teacher = played.teacher is not None
                beside = gradio.Button("Draw it with the teacher too", elem_id="ask-teacher", visible=has_teacher)
        gradio.HTML('<div id="gallery"></div>', elem_id="seeds")
        names, parts = list(asked), list(asked.values())
        triggers = [blocks.load, *(part.change for part in parts)]  # also of what is pasted, or said
        for where, what in ((triggers, "draw"), ([seeds.click], "gallery"), ([beside.click], "teacher")):
            gradio.on(where, fn=None, inputs=parts, outputs=None, js=_call(what, names), show_progress="hidden")
    return blocks


def _call(what: str, names: list[str]) -> str:
    """Return the script of an event, which may come before the page's own script is there."""
    asked = f"Object.fromEntries({json.dumps(names)}.map((name, i) => [name, values[i]]))"
    return (
        f"(...values) => {{ const asked = {asked}; window.onestillAsked = asked; "
        f"window.onestill?.{what}(asked); return []; }}"
    )


def _head(played: Played) -> str:
    size = " × ".join(map(str, played.sampler.sample_shape[1:]))
    of = "latents" if played.sampler.has_decoder else "pixels"
    facts = f"one seed is one picture · {size} {of} · {played.device.type}"
    return f"<h1>{_escaped(played.name)}</h1><p>{_escaped(facts)}</p>"


def _escaped(text: str) -> str:
    """Return text as HTML that gradio's own templates find nothing in."""
    return html.escape(text).replace("$", "&#36;").replace("{", "&#123;").replace("}", "&#125;")


def _what(played: Played) -> dict[str, Any]:
    """Return the part that says what is drawn, by the name of its field in `Asked`; none where there is no choice."""
    import gradio

    labels = played.sampler.labels
    if played.sampler.takes_text:
        prompt = gradio.Textbox(
            played.prompt, label="Prompt", placeholder="what to draw", lines=1, max_lines=4, elem_id="prompt"
        )
        return {"prompt": prompt}
    if not labels:
        return {}
    if len(labels) <= MOST_BUTTONS:
        choices = [(str(label), label) for label in labels]
        return {"class_label": gradio.Radio(choices, value=labels[0], label="Label", elem_id="class_label")}
    said = f"Label, {min(labels)} to {max(labels)}"
    return {"class_label": gradio.Number(labels[0], precision=0, label=said, elem_id="class_label")}


def _how(played: Played) -> dict[str, Any]:
    """Return the parts that say how it is drawn, by the names of their fields in `Asked`: what the student takes."""
    import gradio

    info = "between two whole numbers, the noise on the way" if played.glides else None
    step = 0.01 if played.glides else 1
    found: dict[str, Any] = {
        "seed": gradio.Slider(
            played.seed, played.seed + NUM_SEEDS, played.seed, step=step, label="Seed", info=info, elem_id="seed"
        )
    }
    if (scales := played.guidance_range) is not None:
        w = played.guidance_scale
        found["guidance_scale"] = gradio.Slider(*scales, w, step=0.1, label="Guidance scale", elem_id="guidance_scale")
    fewest, most = played.steps
    if fewest < most:
        found["num_inference_steps"] = gradio.Slider(
            fewest, most, fewest, step=1, label="Steps", elem_id="num_inference_steps"
        )
    if (times := played.times) is not None:
        said = "0 is the finished picture" + ("; others are for one step" if most > 1 else "")
        found["target_time"] = gradio.Slider(
            0, int(100 * times[1]) / 100, 0, step=0.01, label="Target time", info=said, elem_id="target_time"
        )
    return found
