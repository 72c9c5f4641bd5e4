"""The model card of an exported student."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from onestill.teachers.teacher_spec import TeacherSpec, Threshold

TABLE_START, TABLE_END = "<!-- onestill evaluate: start -->", "<!-- onestill evaluate: end -->"
TEXT_TO = {"images": "text-to-image", "frames": "text-to-video", "audios": "text-to-audio"}
NOISE_LEVEL = "onestill_noise_level"
GUIDANCE_SCALE, NEGATIVE_PROMPT, NULL_CLASS, CLASS_LABELS, THRESHOLDING = (
    "onestill_guidance_scale",
    "onestill_negative_prompt",
    "onestill_null_class",
    "onestill_class_labels",
    "onestill_thresholding",
)
BASE_CALL = """base = DiffusionPipeline.from_pretrained("path/to/the/student/of/the/first/stage")
small = base({prompt}, num_inference_steps=1, guidance_scale=1.0).images
"""
CHECKED = """- Safety checker: the teacher's, as it was; this folder's own call blackens what it flags. The self-check below and all
  numbers of `onestill evaluate` are without it, for student and teacher alike.
"""
LICENSE = ("license", "license_name", "license_link")
NO_TABLE = "Not evaluated yet: `onestill evaluate --student RUN` writes the table here."


def is_card(path: Path) -> bool:
    """Return whether a file is a card of this package, filled in by somebody or not."""
    return path.is_file() and TABLE_START in path.read_text(encoding="utf-8", errors="replace")


@dataclass(frozen=True)
class Distilled:
    """What a card says for programs of what was distilled, which a teacher beside the student is to have too.

    Attributes:
        guidance_scale: w; None if it is not known.
        negative_prompt: What took the place of "no prompt" in the guidance, if something did.
        null_class: The teacher's label of "no class", where its folder does not say.
        class_labels: The labels that the student was trained on; empty if on all, or if there are none.
        threshold: What took the place of the thresholding of the teacher's own scheduler, if something did.
    """

    guidance_scale: float | None = None
    negative_prompt: str | None = None
    null_class: int | None = None
    class_labels: tuple[int, ...] = ()
    threshold: Threshold | None = None


@dataclass(frozen=True)
class Facts:
    """What a card says besides what the teacher's spec knows.

    Attributes:
        guidance: How guidance was distilled, in words.
        distilled: The same and more, for programs; the null class is taken from the spec.
        prompt: One to show the call with.
        training: Steps, batch, time and hardware, in words.
        settings: Command or settings that made it.
        license: The teacher's license: the lines of a card's front matter, `license` and, for one that the hub does not
            know ("other"), `license_name` and `license_link`; read from the card in its folder if empty.
        lora: What the student is as a LoRA, in words; not said if empty.
        size: Arguments of the call it was distilled at, in words; not said if empty.
        checked: Whether the folder's own call runs a safety checker.
    """

    guidance: str = "none"
    distilled: Distilled = Distilled()
    prompt: str = "a photo of a cat"
    training: str = ""
    settings: str = ""
    license: Mapping[str, str] = field(default_factory=dict)
    lora: str = ""
    size: str = ""
    checked: bool = False


def write_card(
    folder: Path,
    spec: TeacherSpec,
    facts: Facts,
    self_check: float,
    arguments: Mapping[str, Any] | None = None,
    returns: str = "images",
    *,
    noise_level: int | None = None,
) -> Path:
    """Write README.md into an exported folder and return its path.

    Args:
        folder: The folder.
        spec: What is known of the teacher.
        facts: What is known of the run.
        self_check: Largest difference between the folder and the student.
        arguments: For a stock pipeline of a family: what its plain one-step call is given besides the condition.
        returns: Where that call's output has its results: "images", "frames" or "audios".
        noise_level: For a student that enlarges pictures: how much noise is mixed into them.
    """
    front = _front_matter(spec, facts, arguments is not None, returns)
    if noise_level is not None:
        front |= {NOISE_LEVEL: noise_level}
        arguments = {**(arguments or {}), "noise_level": noise_level}
    body = _body(spec, facts, self_check, arguments, returns, enlarges=noise_level is not None)
    text = f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n{body}"
    path = folder / "README.md"
    path.write_text(text, encoding="utf-8")
    return path


def write_table(folder: Path, table: str) -> None:
    """Put a measured table into the card of an exported folder, in place of the one there."""
    path = folder / "README.md"
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    pattern = re.compile(re.escape(TABLE_START) + ".*?" + re.escape(TABLE_END), re.DOTALL)
    if pattern.search(text):
        path.write_text(pattern.sub(lambda _: f"{TABLE_START}\n{table}\n{TABLE_END}", text), encoding="utf-8")


def teacher_license(folder: Path, source: str = "") -> dict[str, str]:
    """Return what the card in a teacher's folder says of its license, in the front matter's own words.

    Args:
        folder: The folder.
        source: What the teacher was asked for as. A link to a file beside the card is kept for a hub id alone, as an
            address: that file does not come along.

    Returns:
        Nothing if the card names no license or more than one.
    """
    front = _read_front_matter(folder)
    found = {key: front[key] for key in LICENSE if isinstance(front.get(key), str)}
    if "license" not in found:
        return {}
    link = found.get("license_link", "https://")
    if not link.startswith(("https://", "http://")):
        del found["license_link"]
        if _is_hub_id(source):
            found["license_link"] = f"https://huggingface.co/{source}/blob/main/{link.removeprefix('./')}"
    return found


def distilled(folder: Path | None) -> Distilled:
    """Return what the card of an exported folder says of what was distilled; what is written wrongly is left out."""
    front = {} if folder is None else _read_front_matter(folder)
    scale, prompt, null = (front.get(name) for name in (GUIDANCE_SCALE, NEGATIVE_PROMPT, NULL_CLASS))
    labels, threshold = front.get(CLASS_LABELS), front.get(THRESHOLDING)
    return Distilled(
        float(scale) if isinstance(scale, (int, float)) else None,
        prompt if isinstance(prompt, str) else None,
        null if isinstance(null, int) else None,
        tuple(labels) if isinstance(labels, list) and all(isinstance(label, int) for label in labels) else (),
        _read_threshold(threshold),
    )


def _read_threshold(said: object) -> Threshold | None:
    match said:
        case {
            "mode": "none" | "static" | "dynamic" as mode,
            "limit": int() | float() as limit,
            "ratio": int() | float() as ratio,
        }:
            return Threshold(mode, float(limit), float(ratio))
    return None


def noise_level(folder: Path) -> int | None:
    """Return the noise level of the pictures that an exported student enlarges, or None if its card names none."""
    found = _read_front_matter(folder).get(NOISE_LEVEL)
    return found if isinstance(found, int) else None


def _read_front_matter(folder: Path) -> dict[str, Any]:
    """Return the front matter of the card in a folder; {} if there is none that parses."""
    path = folder / "README.md"
    if not path.is_file():
        return {}
    match = re.match(r"---\n(.*?)\n---", path.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        front = yaml.safe_load(match.group(1)) if match else None
    except yaml.YAMLError:
        return {}
    return front if isinstance(front, dict) else {}


def _is_hub_id(source: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None and not Path(source).exists()


def _front_matter(spec: TeacherSpec, facts: Facts, is_stock: bool, returns: str) -> dict[str, object]:
    front: dict[str, object] = {
        "library_name": "diffusers" if is_stock or spec.family == "unet2d" else "onestill",
        "pipeline_tag": TEXT_TO[returns] if spec.text else "unconditional-image-generation",
        "tags": ["diffusers", "distillation", "one-step", "data-free", "onestill"],
    }
    if _is_hub_id(spec.source):
        front |= {"base_model": spec.source, "base_model_relation": "finetune"}
    front |= facts.license
    said = facts.distilled
    written = {
        GUIDANCE_SCALE: said.guidance_scale,
        NEGATIVE_PROMPT: said.negative_prompt,
        NULL_CLASS: spec.null_class if spec.family == "unet2d" else None,  # others' pipelines know their own
        CLASS_LABELS: list(said.class_labels) or None,
        THRESHOLDING: None if said.threshold is None else asdict(said.threshold),
    }
    return front | {key: value for key, value in written.items() if value is not None}


def _body(
    spec: TeacherSpec,
    facts: Facts,
    self_check: float,
    arguments: Mapping[str, Any] | None,
    returns: str,
    *,
    enlarges: bool = False,
) -> str:
    shape, labels = " x ".join(map(str, spec.sample_shape)), (facts.distilled.class_labels or tuple(spec.labels))[:4]
    prompt = json.dumps(facts.prompt, ensure_ascii=False)  # in the quotation marks of everything around it
    if arguments is not None or spec.family == "unet2d":
        call = (
            "from diffusers import DiffusionPipeline\n\n"
            'pipe = DiffusionPipeline.from_pretrained("path/to/this/folder")\n'
            f"{BASE_CALL.format(prompt=prompt) if enlarges else ''}"
            f"{returns} = pipe({_arguments(spec, prompt, labels, arguments, 'image=small' if enlarges else '')}).{returns}  # one network evaluation"
        )
    else:
        call = (
            "from onestill import load_module\n\n"
            'generate = load_module("path/to/this/folder", MyNetwork())\n'
            "images = generate(noise, {})  # one network evaluation"
        )
    name = Path(spec.source).name or "a network"
    given = " and prompts" if spec.text else " and class labels" if spec.num_classes else ""
    return f"""# One-step student of {name}

Distilled with onestill from {name} ({spec.family}, {spec.prediction_type}, samples {shape}) by BOOT
(Gu et al., arXiv 2306.05544). **No training data was used**: only noise{given}.

```python
{call}
```

- Guidance distilled in: {facts.guidance}. Do not guide again.
- Training: {facts.training or "not recorded"}.
- Settings: {facts.settings or "see config.yaml of the run"}.
{f"- Size: {facts.size}.{chr(10)}" if facts.size else ""}{f"- LoRA: {facts.lora}.{chr(10)}" if facts.lora else ""}{CHECKED if facts.checked else ""}- Self-check: this folder, loaded afresh, differs from the student by at most {self_check:.1e} (same noise, images in [-1, 1]).

## Measured

{TABLE_START}
{NO_TABLE}
{TABLE_END}
"""


def _arguments(
    spec: TeacherSpec, prompt: str, labels: tuple[int, ...], arguments: Mapping[str, Any] | None, picture: str = ""
) -> str:
    """Return the arguments of the plain one-step call."""
    asked = f"class_labels={list(labels)}"
    if arguments is None:
        return f"batch_size={len(labels)}, {asked}" if labels else "batch_size=4"
    first = [prompt if spec.text else asked, *([picture] if picture else [])]
    given = [*first, *(f"{name}={value!r}" for name, value in arguments.items())]
    return ", ".join(given)
