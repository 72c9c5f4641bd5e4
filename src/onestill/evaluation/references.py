"""What an evaluation compares with: the teacher's own samples, a folder of images, an embedded teacher's real ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from onestill.evaluation.config import EvaluateConfig
from onestill.evaluation.features import FeatureExtractor
from onestill.evaluation.picture_files import read_pictures
from onestill.evaluation.samples import Draw, Subjects
from onestill.sampling.samplers.base import Sampler
from onestill.teachers.load import EMBEDDED

REFERENCE_SEED = 10_000_000
TEACHERS_OWN = "the teacher's own"
"""How the name of a reference begins that the teacher has made itself."""


@dataclass(frozen=True)
class Reference:
    """Images [N, C, H, W] (or latents) to compare with, what they are, and the prompts that they show, if known."""

    images: Tensor
    name: str
    prompts: Sequence[str] = ()


def teacher_reference(
    sampler: Sampler,
    extractor: FeatureExtractor,
    subjects: Subjects,
    config: EvaluateConfig,
    *,
    show_progress: bool = False,
) -> Reference:
    """Return the teacher's own many-step samples (or their latents), from seeds that no row uses."""
    num = config.num_samples
    first = REFERENCE_SEED if config.seed + num <= REFERENCE_SEED else config.seed + num
    rows = subjects.rows(sampler, num, seed=first)
    draw = Draw(sampler, range(first, first + num), rows, config.batch_size, show_progress)
    name = f"{TEACHERS_OWN} {sampler.num_steps}-step samples, seeds {first}.."
    return Reference(draw.seen_by(extractor), name, subjects.prompts)


def folder_reference(folder: Path, image_shape: Sequence[int]) -> Reference:
    """Return the images in a folder (searched recursively), all of which must have the teacher's size."""
    return Reference(read_pictures(folder, image_shape), f"the images in {folder.name}/")


def embedded_reference(name: str) -> Reference:
    """Return the real images that an embedded teacher ships for evaluation."""
    teacher = EMBEDDED[name]
    images = load_file(teacher.folder / "images.safetensors")["images"]
    pictures = images.float() * (2 / teacher.white) - 1
    prompts = [] if teacher.heldout is None else teacher.heldout.read_text(encoding="utf-8").splitlines()
    return Reference(pictures, f"the {len(images):,} real {name} (only ever read by evaluate)", prompts)
