"""What an evaluation compares with: the teacher's own samples, a folder of images, an embedded teacher's, a file of statistics."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from onestill.core.errors import SettingError, named
from onestill.core.files import check_writable
from onestill.evaluation.config import EvaluateConfig
from onestill.evaluation.features import FeatureExtractor, extract
from onestill.evaluation.gaussians import Gaussian, is_statistics, read_gaussian
from onestill.evaluation.picture_files import read_pictures
from onestill.evaluation.samples import Draw, Subjects
from onestill.sampling.samplers.base import Sampler
from onestill.teachers.load import EMBEDDED

REFERENCE_SEED = 10_000_000
TEACHERS_OWN = "the teacher's own"
"""How the name of a reference begins that the teacher has made itself."""


@dataclass(frozen=True)
class Reference:
    """What to compare with, what it is, and the prompts that it shows, if known.

    It is images [N, C, H, W], features [N, D] of what is not kept, or no more than a mean and a covariance of them.
    """

    images: Tensor | None
    name: str
    prompts: Sequence[str] = ()
    seen: Tensor | None = None
    gaussian: Gaussian | None = None

    def features(self, extractor: FeatureExtractor) -> Tensor | None:
        """Return features [N, D], None where nothing but a mean and a covariance is known."""
        return self.seen if self.images is None else extract(extractor, self.images)


def teacher_reference(
    sampler: Sampler,
    extractor: FeatureExtractor,
    subjects: Subjects,
    config: EvaluateConfig,
    *,
    show_progress: bool = False,
) -> Reference:
    """Return the features of the teacher's own many-step samples (or their latents), from seeds that no row uses."""
    num = config.num_samples
    first = REFERENCE_SEED if config.seed + num <= REFERENCE_SEED else config.seed + num
    rows = subjects.rows(sampler, num, seed=first)
    draw = Draw(sampler, range(first, first + num), rows, config.batch_size, show_progress)
    name = f"{TEACHERS_OWN} {sampler.num_steps}-step samples, seeds {first}.."
    return Reference(None, name, subjects.prompts, seen=draw.features(extractor))


def folder_reference(folder: Path, image_shape: Sequence[int]) -> Reference:
    """Return the images in a folder (searched recursively), all of which must have the teacher's size."""
    return Reference(read_pictures(folder, image_shape), f"the images in {folder.name}/")


def gaussian_reference(path: Path, extractor: FeatureExtractor, shape: Sequence[int]) -> Reference:
    """Return the mean and the covariance of features in a file, by its name and its SHA-256.

    Args:
        path: The file.
        extractor: The features that it has to be of.
        shape: Shape of what that looks at, without the batch.

    Raises:
        SettingError: If it is no such file, or of other features.
    """
    gaussian = read_gaussian(path)
    num, own = len(gaussian.mean), extract(extractor, torch.zeros(1, *shape)).shape[1]
    if num != own:
        why = f"is of features of length {num:,}, and those of {extractor.name} have {own:,}"
        raise SettingError("reference", path, why, f"name the features that it is of with {named('features')}")
    if gaussian.features not in ("", extractor.name):
        of = gaussian.features if gaussian.features.isprintable() else ascii(gaussian.features)
        raise SettingError("reference", path, f"is of other features: {of[:200]}, and not {extractor.name}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Reference(None, f"the mean and covariance in {path.name} (sha256 {digest[:12]})", gaussian=gaussian)


def check_save_reference(config: EvaluateConfig) -> None:
    """Raise SettingError if the statistics of the reference cannot be kept in the file that is named for them."""
    if (path := config.save_reference) is None:
        return
    if is_statistics(config.reference):
        why = f"is for a reference of images, and {named('reference')} is a file of statistics already"
        raise SettingError("save_reference", path, why, "leave it out")
    if path.suffix != ".npz" or path.is_dir():
        raise SettingError("save_reference", path, "is no name of an .npz file")
    check_writable(path, "save_reference")
    if path.exists() and not config.overwrite:
        raise SettingError("save_reference", path, "is there already", f"name another, or give {named('overwrite')}")


def embedded_reference(name: str) -> Reference:
    """Return the real images that an embedded teacher ships for evaluation."""
    teacher = EMBEDDED[name]
    images = load_file(teacher.folder / "images.safetensors")["images"]
    pictures = images.float() * (2 / teacher.white) - 1
    prompts = [] if teacher.heldout is None else teacher.heldout.read_text(encoding="utf-8").splitlines()
    return Reference(pictures, f"the {len(images):,} real {name} (only ever read by evaluate)", prompts)
