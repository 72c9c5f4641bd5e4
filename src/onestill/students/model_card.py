"""The model card of an exported student."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from onestill.core.errors import as_flags, named
from onestill.core.reading import OwnFile, as_model, parse_yaml, read_text
from onestill.core.writing import write_text
from onestill.teachers.base import Interval, Teacher
from onestill.teachers.teacher_spec import TeacherSpec, Threshold

TABLE_START, TABLE_END = "<!-- onestill evaluate: start -->", "<!-- onestill evaluate: end -->"
CARD_FILE = "README.md"
TEXT_TO = {"images": "text-to-image", "frames": "text-to-video", "audios": "text-to-audio"}
NOISE_LEVEL, GUIDANCE_SCALE, GUIDANCE_INTERVAL, NEGATIVE_PROMPT, NULL_CLASS, CLASS_LABELS, THRESHOLDING = (
    f"onestill_{name}"
    for name in (
        *("noise_level", "guidance_scale", "guidance_interval", "negative_prompt"),
        *("null_class", "class_labels", "thresholding"),
    )
)
CHECKED = """- Safety checker: the teacher's, as it was; this folder's own call blackens what it flags. The self-check below and all
  numbers of `onestill evaluate` are without it, for student and teacher alike.
"""
STEPS = """- One step, by this folder's own scheduler. It stays at the start until its last step, so 2, 4 or 8 steps draw the same
  picture at more cost; a `DDIMScheduler` or `DDPMScheduler` here refuses more than 16. Another scheduler in its place
  (DEIS, SASolver, multistep solvers with several steps) may draw something else, or black, without a word: keep this one.
"""
FEW = """- {steps}, by this folder's own scheduler: its levels and the times that its network is told are those of a call with
  `num_inference_steps={num}`, and the call above says it. Another number, or another scheduler, draws something else without a word.
"""
LICENSE = ("license", "license_name", "license_link")
NO_TABLE = as_flags(f"Not evaluated yet: `onestill evaluate {named('student')} RUN` writes the table here.")


@dataclass(frozen=True)
class Distilled:
    """What a card says for programs of what was distilled, which a teacher beside the student is to have too.

    Attributes:
        guidance_scale: w; None if it is not known.
        negative_prompt: What took the place of "no prompt" in the guidance, if something did.
        null_class: The teacher's label of "no class", where its folder does not say.
        class_labels: The labels that the student was trained on; empty if on all, or if there are none.
        threshold: What took the place of the thresholding of the teacher's own scheduler, if something did.
        guidance_interval: (low, high): guided at low < t <= high; None if at all levels.
    """

    guidance_scale: float | None = None
    negative_prompt: str | None = None
    null_class: int | None = None
    class_labels: tuple[int, ...] = ()
    threshold: Threshold | None = None
    guidance_interval: Interval | None = None


@dataclass(frozen=True)
class Facts:
    """What a card says besides what the teacher's spec knows.

    Attributes:
        guidance: How guidance was distilled, in words.
        distilled: The same and more, for programs; the null class is taken from the spec.
        prompt: One to show the call with.
        training: Steps, batch, time and hardware, in words.
        settings: Command or settings that made it.
        quality: How good it was at the end of the training, in words; not said if empty.
        license: The teacher's license: the lines of a card's front matter, `license` and, for one that the hub does not
            know ("other"), `license_name` and `license_link`; read from the card in its folder if empty.
        lora: What the student is as a LoRA, in words; not said if empty.
        size: Arguments of the call it was distilled at, in words; not said if empty.
        checked: Whether the folder's own call runs a safety checker.
        num_steps: The steps that it was exported for.
        programs: How other programs than diffusers draw with it, in words; not said if empty.
        is_told: Whether its network reads the time that it is told; a folder of one step does not.
        pictures: Some of its pictures, as (what each shows, its file in the folder), for the hub's page.
        relation: What it is to the teacher, as the hub says: "finetune" or "adapter".
        files: What its files take and give, in words; not said if empty.
    """

    guidance: str = "none"
    distilled: Distilled = Distilled()
    prompt: str = "a photo of a cat"
    training: str = ""
    settings: str = ""
    quality: str = ""
    license: Mapping[str, str] = field(default_factory=dict)
    lora: str = ""
    size: str = ""
    checked: bool = False
    num_steps: int = 1
    programs: str = ""
    is_told: bool = False
    pictures: tuple[tuple[str, str], ...] = ()
    relation: str = "finetune"
    files: str = ""


def write_card(
    folder: Path, teacher: Teacher, facts: Facts, self_check: float, *, library: str, code: str | tuple[str, str]
) -> None:
    """Write README.md into an exported folder, which `library` loads and `code`, or (language, code), draws with.

    `self_check` is the largest difference between the folder and the student.
    """
    front = yaml.safe_dump(_front_matter(teacher, facts, library), sort_keys=False)
    num = facts.num_steps
    few = FEW.format(num=num, steps="One step" if num == 1 else f"{num} steps")
    steps = STEPS if num == 1 and not facts.is_told else few
    code = f"```python\n{code}\n```" if isinstance(code, str) else "```{}\n{}\n```".format(*code)
    card = f"---\n{front}---\n\n{_body(teacher.spec, facts, self_check, code, steps * (library == 'diffusers'))}"
    write_text(folder / CARD_FILE, card)


def write_table(folder: Path, table: str) -> None:
    """Put a measured table into the card of an exported folder, in place of the one there."""
    path = folder / CARD_FILE
    if path.is_file():
        pattern = re.compile(re.escape(TABLE_START) + ".*?" + re.escape(TABLE_END), re.DOTALL)
        text = path.read_text(encoding="utf-8")
        write_text(path, pattern.sub(lambda _: f"{TABLE_START}\n{table}\n{TABLE_END}", text))


def add_results(folder: Path, name: str, results: Sequence[Mapping[str, Any]]) -> None:
    """Put measured results into the front matter of an exported folder's card, as the hub's model index of a name."""
    text, front = read_text(folder / CARD_FILE), _read_front_matter(folder)
    task = {"task": {"type": front.get("pipeline_tag", "unconditional-image-generation")}}
    front["model-index"] = [{"name": name, "results": [task | dict(result) for result in results]}]
    body = text.split("\n---", 1)[1]
    write_text(folder / CARD_FILE, f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---{body}")


def teacher_license(folder: Path, source: str = "") -> dict[str, str]:
    """Return what the card in a teacher's folder says of its license, in the front matter's words; {} if not one.

    A link to a file beside the card is kept where `source` is a hub id, as an address: that file does not come along.
    """
    try:
        front = _read_front_matter(folder)
    except ValueError:  # of others: a license that cannot be read is none
        return {}
    found = {key: front[key] for key in LICENSE if isinstance(front.get(key), str)}
    if "license" not in found:
        return {}
    link = found.get("license_link", "https://")
    if not link.startswith(("https://", "http://")):
        del found["license_link"]
        if is_hub_id(source):
            found["license_link"] = f"https://huggingface.co/{source}/blob/main/{link.removeprefix('./')}"
    return found


def distilled(folder: Path | None) -> Distilled:
    """Return what the card of an exported folder says of what was distilled; ValueError if that is out of order."""
    said, threshold = _Said() if folder is None else _read_said(folder), None
    if said.thresholding is not None:
        threshold = Threshold(**said.thresholding.model_dump())
    scale, interval = said.guidance_scale, said.guidance_interval
    return Distilled(scale, said.negative_prompt, said.null_class, said.class_labels, threshold, interval)


Label = Annotated[int, Field(ge=0, lt=2**31)]
_Level = Annotated[float, Field(ge=0, le=1)]


class _Thresholding(OwnFile):
    mode: Literal["none", "static", "dynamic"]
    limit: Annotated[float, Field(gt=0, lt=1e6)]
    ratio: Annotated[float, Field(gt=0, le=1)]


class _Said(OwnFile):
    """What a card's front matter says for programs: names without `PREFIX`."""

    noise_level: Annotated[int, Field(ge=0, le=1000)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, lt=1e6)] | None = None
    guidance_interval: tuple[_Level, _Level] | None = None
    negative_prompt: str | None = None
    null_class: Label | None = None
    class_labels: tuple[Label, ...] = ()
    thresholding: _Thresholding | None = None


def _read_said(folder: Path) -> _Said:
    """Return what the card of an exported folder says for programs; ValueError that names it if it is out of order."""
    front, prefix = _read_front_matter(folder), "onestill_"
    own = {str(key).removeprefix(prefix): value for key, value in front.items() if str(key).startswith(prefix)}
    return as_model(own, _Said, f"the front matter of {folder / CARD_FILE}")


def noise_level(folder: Path) -> int | None:
    """Return the noise level of the pictures that an exported student enlarges, or None if its card names none."""
    return _read_said(folder).noise_level


def _read_front_matter(folder: Path) -> dict[str, Any]:
    """Return the front matter of the card in a folder, {} if there is none; ValueError if it cannot be read."""
    path = folder / CARD_FILE
    front = (
        re.match(r"(?:\ufeff)?\s*---[ \t]*\n(.*?)\n---[ \t]*(?:\n|$)", read_text(path), re.DOTALL)
        if path.exists()
        else None
    )
    found = None if front is None else parse_yaml(front[1], f"the front matter of {path}")
    return found if isinstance(found, dict) else {}


def is_hub_id(source: str) -> bool:
    """Return whether a source is the id of a repository on the hub, and no path here."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None and not Path(source).exists()


def evaluations(num_steps: int) -> str:
    """Return how often the network is called, in words."""
    return "one network evaluation" if num_steps == 1 else f"{num_steps} network evaluations"


def stock_code(results: str, arguments: str, before: str = "", num_steps: int = 1) -> str:
    """Return the plain call of a stock pipeline's folder, for its card; `before` are lines before the call."""
    return (
        "from diffusers import DiffusionPipeline\n\n"
        'pipe = DiffusionPipeline.from_pretrained("path/to/this/folder")\n'
        f"{before}{results} = pipe({arguments}).{results}  # {evaluations(num_steps)}"
    )


def _in_words(num_steps: int) -> str:
    return "one" if num_steps == 1 else str(num_steps)


def shown_labels(spec: TeacherSpec, facts: Facts) -> list[int]:
    """Return some labels to show the call with; [] where none are known."""
    return list(facts.distilled.class_labels or spec.labels)[:4]


def _front_matter(teacher: Teacher, facts: Facts, library: str) -> dict[str, object]:
    spec, condition, steps = teacher.spec, teacher.image_condition, f"{_in_words(facts.num_steps)}-step"
    front: dict[str, object] = {
        "library_name": library,
        "pipeline_tag": TEXT_TO[teacher.output_field] if spec.text else "unconditional-image-generation",
        "tags": list(dict.fromkeys([library, "distillation", steps, "data-free", "onestill"])),
    }
    if is_hub_id(spec.source):
        front |= {"base_model": spec.source, "base_model_relation": facts.relation}
    front |= facts.license
    if facts.pictures:
        front["widget"] = [{"text": words, "output": {"url": file}} for words, file in facts.pictures]
    distilled = facts.distilled
    written = {
        GUIDANCE_SCALE: distilled.guidance_scale,
        GUIDANCE_INTERVAL: None if distilled.guidance_interval is None else list(distilled.guidance_interval),
        NEGATIVE_PROMPT: distilled.negative_prompt,
        NULL_CLASS: spec.null_class if teacher.records_null_class else None,
        CLASS_LABELS: list(distilled.class_labels) or None,
        THRESHOLDING: None if distilled.threshold is None else asdict(distilled.threshold),
        NOISE_LEVEL: None if condition is None else condition.level,
    }
    return front | {key: value for key, value in written.items() if value is not None}


def _body(spec: TeacherSpec, facts: Facts, self_check: float, code: str, steps: str) -> str:
    shape, name = " x ".join(map(str, spec.sample_shape)), Path(spec.source).name or "a network"
    given = " and prompts" if spec.text else " and class labels" if spec.num_classes else ""
    parts = (
        ("Quality", facts.quality),
        ("Size", facts.size),
        ("LoRA", facts.lora),
        ("Files", facts.files),
        ("Other programs", facts.programs),
    )
    more = "".join(f"- {name}: {said}.\n" for name, said in parts if said)
    return f"""# {_in_words(facts.num_steps).capitalize()}-step student of {name}

Distilled with onestill from {name} ({spec.family}, {spec.prediction_type}, samples {shape}).
**No training data was used**: only noise{given}.

{code}

{steps}- Guidance distilled in: {facts.guidance}. Do not guide again.
- Training: {facts.training or "not recorded"}.
- Settings: {facts.settings or "see config.yaml of the run"}.
{more}{CHECKED if facts.checked else ""}- Self-check: this folder, loaded afresh, differs from the student by at most {self_check:.1e} (same noise, images in [-1, 1]).

## Measured

{TABLE_START}
{NO_TABLE}
{TABLE_END}
"""
