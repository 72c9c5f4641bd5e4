"""The settings of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, model_validator

from onestill.core.errors import SettingError, named, plain
from onestill.core.settings import MOST_GUIDANCE, MOST_LABELS, MOST_ROWS, MOST_WIDTH, Label, setting
from onestill.diffusion.names import SolverName
from onestill.students.settings import FEW_STEPS
from onestill.teachers.settings import IntervalSettings, StoredSettings

Format = Literal["json", "markdown", "csv", "latex"]
"""Forms of a table that other programs read."""
Protocol = Literal["fid50k"]
PROTOCOLS: Final[Mapping[str, Mapping[str, Any]]] = {
    "fid50k": {"num_samples": 50_000, "seed": 0, "class_labels": (), "features": "inception"}
}
"""What is the same wherever a number goes by the name of a protocol."""
STUDENT, IMAGES, MEASURES, REPORT = "Student and teacher", "Images", "Measures", "Report"


class EvaluateConfig(IntervalSettings, StoredSettings):
    """How a student's one step, or few, are compared with its teacher's many."""

    student: Path = setting(..., STUDENT, "Folder of a run, a checkpoint-N folder, or an exported pipeline.")
    teacher: str | None = setting(None, STUDENT, "The teacher; that of the run if not given.", path=True)
    guidance_scale: float | None = setting(
        None,
        STUDENT,
        "w of the teacher's rows; as distilled if not given: as the card or the run says.",
        ge=0,
        le=MOST_GUIDANCE,
    )
    ema_width: tuple[Annotated[float, Field(ge=0, le=MOST_WIDTH)], ...] = setting(
        (),
        STUDENT,
        "Relative width of the average of the weights of a run, 0 for the weights themselves; a row for each, with "
        "commas. That of the run if not given.",
        commas=True,
    )
    null_class: int | None = setting(
        None, STUDENT, "The teacher's label for 'no class'; that of the run.", ge=0, le=MOST_LABELS
    )
    negative_prompt: str | None = setting(
        None, STUDENT, "In place of 'no prompt' in the teacher's guidance; that of the run."
    )
    base_student: Path | None = setting(
        None, STUDENT, "For super-resolution: who draws what every row enlarges; that of the run."
    )
    device: str = setting("auto", STUDENT, "auto, cpu, cuda, cuda:N or mps.")
    local_files_only: bool = setting(False, STUDENT, "Never use the network.")
    num_samples: int = setting(2000, IMAGES, "Images per row of the table.", ge=10, le=1_000_000)
    steps: tuple[Annotated[int, Field(ge=1, le=10_000)], ...] = setting(
        (50, 10, 4, 1), IMAGES, "Steps of the teacher's rows, with commas.", commas=True
    )
    solver: tuple[SolverName, ...] = setting(
        ("ddim",), IMAGES, "Solvers of the teacher's rows, with commas: ddim,dpmsolver++.", commas=True
    )
    student_steps: tuple[Annotated[int, Field(ge=1, le=FEW_STEPS)], ...] = setting(
        (), IMAGES, "Steps of the student's rows, with commas: 1,4. One, or those exported, if not given.", commas=True
    )
    class_labels: tuple[Label, ...] = setting((), IMAGES, "Label to go round; repeat for more. All if not given.")
    prompts: tuple[str, ...] = setting((), IMAGES, "What to draw, for text students; repeat for more.")
    prompt_file: Path | None = setting(
        None,
        IMAGES,
        "Prompts instead: a .txt, .jsonl or .csv in UTF-8. If there are neither: the held-out prompts of an embedded "
        "teacher, where its images are the reference or its own prompts were those of the run; else those of the run.",
    )
    prompt_field: str | None = setting(None, IMAGES, "Field of the prompt in a .jsonl or .csv; 'prompt' if not given.")
    seed: int = setting(0, IMAGES, "Seed of the first image; image i has seed + i, in every row.", ge=0, lt=2**63)
    batch_size: int = setting(
        64, IMAGES, "Images in one network call, and the large batch of the speeds.", ge=1, le=MOST_ROWS
    )
    reference: str = setting(
        "auto",
        MEASURES,
        "teacher (its own samples: no data needed), an embedded teacher's name (its real images), a folder, an .npz of "
        "a mean and a covariance ('mu', 'sigma'), or auto: the embedded images where the teacher is embedded and the "
        "features see images, else teacher.",
        path=True,
    )
    num_reference_steps: int = setting(100, MEASURES, "DDIM steps of the teacher as reference.", ge=1, le=10_000)
    features: str = setting(
        "auto",
        MEASURES,
        "teacher (its own middle features), digits or glyphs (their classifier, which also judges labels or prompts), "
        f"inception (the network of the FID, from {named('features_weights')}), a .safetensors file of ConvFeatures, a "
        "transformers vision model by folder or id, or auto.",
        path=True,
    )
    features_weights: Path | None = setting(
        None,
        MEASURES,
        f"For {named('features')} inception: pt_inception-2015-12-05-6726825d.pth, or a .safetensors of its tensors.",
    )
    save_reference: Path | None = setting(
        None,
        MEASURES,
        "An .npz to write the mean and covariance of the reference's features to; another evaluation may be compared "
        "with it.",
    )
    protocol: Protocol | None = setting(
        None,
        MEASURES,
        "fid50k: 50,000 images of seeds 0..49999, all labels in turn, Inception features. What it sets cannot be set "
        "otherwise beside it; the reference and the teacher's rows can.",
    )
    resamples: int = setting(
        1000,
        MEASURES,
        "Resamples of the images by which each number has its 95% interval; 0 for no intervals.",
        ge=0,
        le=100_000,
    )
    clip: str | None = setting(
        None,
        MEASURES,
        "A transformers CLIP model, folder or hub id: adds the CLIP score of images and prompts.",
        path=True,
    )
    speed: bool = setting(True, MEASURES, "Time the rows.")
    output: Path | None = setting(
        None,
        REPORT,
        "Folder of report.json, report.md and samples.png; the command takes RUN/evaluation, or beside an export "
        "FOLDER-evaluation, if it is not given.",
    )
    overwrite: bool = setting(False, REPORT, "Replace what is there.")

    @model_validator(mode="before")
    @classmethod
    def _as_its_protocol(cls, data: Any) -> Any:
        name = data.get("protocol") if isinstance(data, dict) else None
        fixed = PROTOCOLS.get(name, {}) if isinstance(name, str) else {}
        for setting_name, value in fixed.items():
            given = data.get(setting_name, value)
            if plain(given) != plain(value):
                why = f"{named('protocol')} {name} has {plain(value) or 'all of them, in turn'}"
                raise SettingError(setting_name, given, why, "leave out one of the two")
        return {**data, **fixed} if fixed else data

    @model_validator(mode="after")
    def _weights_fit(self) -> Self:
        if self.features == "inception" and self.features_weights is None:
            why = f"is needed by {named('features')} inception, which is never downloaded"
            raise SettingError(
                "features_weights", why=why, todo="give the path of pt_inception-2015-12-05-6726825d.pth"
            )
        if self.features != "inception" and self.features_weights is not None:
            why = f"is for {named('features')} inception alone, and they are {self.features}"
            raise SettingError("features_weights", self.features_weights, why, "leave it out")
        return self

    @model_validator(mode="after")
    def _is_enough_to_measure(self) -> Self:
        for name, what in (
            ("steps", "numbers"),
            ("solver", "solvers"),
            ("student_steps", "numbers"),
            ("ema_width", "numbers"),
        ):
            values = getattr(self, name)
            if len(set(values)) != len(values) or (name in ("steps", "solver") and not values):
                raise SettingError(name, values, f"must be different {what}")
        if self.seed >= 2**63 - self.num_samples:
            raise SettingError("seed", self.seed, f"must be between 0 and 2^63 minus {named('num_samples')}")
        return self
