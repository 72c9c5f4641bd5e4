"""Gaussians fitted to features: what a Fréchet distance compares, and the usual files of means and covariances."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from onestill.core.errors import SettingError
from onestill.core.reading import loading
from onestill.core.writing import written

MOST_FEATURES: Final = 2**14
"""The longest features of a file: its covariance has as many rows."""
_ASYMMETRY, _NEGATIVE = 1e-4, 1e-3
"""By how much a covariance may fail to be one, beside its largest value: files hold float32."""


@dataclass(frozen=True)
class Gaussian:
    """A mean [D] and a covariance [D, D], float64 on the CPU; of which features and of how many images, if that is known."""

    mean: Tensor
    covariance: Tensor
    features: str = ""
    num_images: int | None = None

    @cached_property
    def root(self) -> Tensor:
        """The symmetric square root of the covariance; ValueError if it has none, which no covariance does."""
        values, vectors = torch.linalg.eigh(self.covariance)
        if values[0] < -_NEGATIVE * values[-1].abs():
            raise ValueError(f"is no covariance: its least eigenvalue is {float(values[0]):.3g}")
        return vectors * values.clamp(min=0).sqrt() @ vectors.T


def is_statistics(source: str) -> bool:
    """Return whether a reference is named that is a file of a mean and a covariance."""
    return Path(source).suffix.lower() == ".npz" and not Path(source).is_dir()


def gaussian_of(features: Tensor) -> Gaussian:
    """Return the sample mean and the unbiased covariance of features [N, D], N >= 2."""
    rows = features.detach().cpu().double()
    mean = rows.mean(dim=0)
    rows = rows - mean
    return Gaussian(mean, rows.T @ rows / (len(rows) - 1))


def frechet(real: Gaussian, fake: Gaussian) -> float:
    """Return |mu_r - mu_f|^2 + Tr(S_r + S_f - 2 (S_r^(1/2) S_f S_r^(1/2))^(1/2)), at least 0."""
    return _distance(real, fake, torch.linalg.eigvalsh(real.root @ fake.covariance @ real.root))


def frechet_parts(real: Gaussian, features: Tensor) -> tuple[float, Tensor]:
    """Return `frechet` of features [N, D], and what each row contributes to it, to the first order, [N].

    That is the derivative of the distance by the weight of the row: with x less the mean mu_f and the map
    T = A (A S_f A)^(-1/2) A, A = S_r^(1/2), that carries one Gaussian to the other, 2 (mu_f - mu_r) . x +
    N / (N - 1) x . (1 - T) x.
    """
    fake = gaussian_of(features)
    rows = features.detach().cpu().double() - fake.mean
    values, vectors = torch.linalg.eigh(real.root @ fake.covariance @ real.root)
    kept = values > values[-1] * 1e-12
    half = real.root @ vectors[:, kept] * values[kept].pow(-0.25)
    curved = rows.square().sum(dim=1) - (rows @ half).square().sum(dim=1)
    parts = 2 * rows @ (fake.mean - real.mean) + curved * len(rows) / (len(rows) - 1)
    return _distance(real, fake, values), parts


def _distance(real: Gaussian, fake: Gaussian, values: Tensor) -> float:
    """Return the distance by the eigenvalues of S_r^(1/2) S_f S_r^(1/2)."""
    traces = real.covariance.trace() + fake.covariance.trace()
    found = (real.mean - fake.mean).square().sum() + traces - 2 * values.clamp(min=0).sqrt().sum()
    return max(float(found), 0.0)


def read_gaussian(path: Path) -> Gaussian:
    """Return the mean and the covariance in an .npz file: `mu` [D] and `sigma` [D, D], as FIDs are usually kept.

    Raises:
        SettingError: About `reference`, if it is no such file. Pickled arrays are not read.
    """
    if not path.is_file():
        raise SettingError("reference", path, "no such file", _WANTED)
    try:
        with loading("it"):
            found = _arrays(path)
            mean, covariance = (torch.from_numpy(found[name].astype(np.float64)) for name in ("mu", "sigma"))
        _check(mean, covariance)
        features, num = _said(found, "features", "U"), _said(found, "num_images", "iu")
        made = Gaussian(mean, (covariance + covariance.T) / 2, features or "", num if num and num > 0 else None)
        _check(made.mean, made.root)
    except ValueError as error:
        raise SettingError("reference", path, str(error).removeprefix("it "), _WANTED) from None
    return made


_WANTED = "give an .npz with 'mu' [D] and 'sigma' [D, D] of features"


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz file that are of use; ValueError if it lacks some, or they are too large or pickled."""
    if not zipfile.is_zipfile(path):
        raise ValueError("it is no .npz file")
    with zipfile.ZipFile(path) as archive:
        if any(entry.file_size > MOST_FEATURES**2 * 8 + 4096 for entry in archive.infolist()):
            raise ValueError(f"it holds an array of more than {MOST_FEATURES:,} x {MOST_FEATURES:,} numbers")
    with np.load(path, allow_pickle=False) as file:
        if missing := [name for name in ("mu", "sigma") if name not in file]:
            held = ", ".join(map(repr, file.files[:8])) or "nothing"
            raise ValueError(f"it has no {missing[0]!r}; it holds {held}")
        arrays = {name: file[name] for name in ("mu", "sigma", "features", "num_images") if name in file}
    if odd := [name for name in ("mu", "sigma") if arrays[name].dtype.kind not in "fiu"]:
        raise ValueError(f"its {odd[0]!r} holds no real numbers, but {arrays[odd[0]].dtype}")
    return arrays


def _said(arrays: Mapping[str, np.ndarray], name: str, kind: str) -> Any:
    """Return the one value of an array; None if there is none, or what others keep by that name."""
    array = arrays.get(name)
    return None if array is None or array.ndim or array.dtype.kind not in kind else array.item()


def _check(mean: Tensor, covariance: Tensor) -> None:
    """Raise ValueError if these are no mean and no covariance."""
    if mean.ndim != 1 or len(mean) < 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"holds 'mu' of shape {list(mean.shape)} and 'sigma' of shape {list(covariance.shape)}")
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise ValueError("holds NaN or infinity")
    if (covariance - covariance.T).abs().max() > _ASYMMETRY * covariance.abs().max():
        raise ValueError("holds a 'sigma' that is not symmetric, and is no covariance")


def write_gaussian(gaussian: Gaussian, path: Path, *, features: str, num_images: int) -> None:
    """Write an .npz file as `read_gaussian` and others read it, with what the features are and of how many images."""
    mean, covariance = gaussian.mean.numpy(), gaussian.covariance.numpy()
    with written(path, overwrite=True) as partial:
        np.savez(partial, mu=mean, sigma=covariance, features=np.array(features), num_images=np.array(num_images))
