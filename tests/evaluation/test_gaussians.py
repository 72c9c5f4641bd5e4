"""Gaussians of features: distances between them, their derivatives, and files of means and covariances."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_metrics import golden, normal
from torchmetrics.image.fid import FrechetInceptionDistance

from onestill.evaluation.gaussians import (
    Gaussian,
    frechet,
    frechet_parts,
    gaussian_of,
    read_gaussian,
    write_gaussian,
)
from onestill.evaluation.metrics import _Identity


def test_the_distance_is_that_of_torchmetrics() -> None:
    real, fake = golden(80, 6, 0.0), golden(70, 6, 0.5) * 1.3
    theirs = FrechetInceptionDistance(_Identity(6))
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    assert frechet(gaussian_of(real), gaussian_of(fake)) == pytest.approx(float(theirs.compute()), rel=1e-9)


def test_parts_are_the_derivatives_by_the_weights() -> None:
    real, fake = gaussian_of(normal(90, 4)), normal(60, 4, seed=1) * 1.5 + 0.3

    def weighted(row: int, by: float) -> float:
        weights = torch.ones(60, dtype=torch.float64)
        weights[row] += by
        weights /= weights.sum()
        mean = weights @ fake
        around = fake - mean
        return frechet(real, Gaussian(mean, (around * weights[:, None]).T @ around * 60 / 59))

    distance, parts = frechet_parts(real, fake)
    assert distance == pytest.approx(frechet(real, gaussian_of(fake)), rel=1e-12)
    # More of one row moves the mean of all by its part less the mean of the parts.
    found = [(weighted(row, 1e-5) - weighted(row, -1e-5)) / 2e-5 * 60 for row in range(8)]
    assert found == pytest.approx((parts - parts.mean())[:8].tolist(), rel=1e-4)


def test_a_file_is_read_as_it_was_written_and_as_others_write(tmp_path: Path) -> None:
    gaussian = gaussian_of(normal(50, 5))
    write_gaussian(gaussian, tmp_path / "a.npz", features="mine", num_images=50)
    found = read_gaussian(tmp_path / "a.npz")
    assert torch.equal(found.mean, gaussian.mean) and torch.allclose(found.covariance, gaussian.covariance, rtol=1e-14)
    assert (found.features, found.num_images) == ("mine", 50)
    assert frechet(found, gaussian) == pytest.approx(0, abs=1e-12)
    mean, covariance = gaussian.mean.float().numpy(), gaussian.covariance.float().numpy()
    np.savez(tmp_path / "b.npz", mu=mean, sigma=covariance)
    found = read_gaussian(tmp_path / "b.npz")
    assert (found.features, found.num_images) == ("", None)
    assert frechet(found, gaussian) == pytest.approx(0, abs=1e-6)
    # What others keep by the names of ours says nothing.
    np.savez(tmp_path / "b.npz", mu=mean, sigma=covariance, features=np.zeros((9, 5)), num_images=np.array(-5))
    assert (read_gaussian(tmp_path / "b.npz").features, read_gaussian(tmp_path / "b.npz").num_images) == ("", None)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.npz", "b.npz"]


EYE = np.eye(3)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mean": np.zeros(3), "sigma": EYE}, "it has no 'mu'; it holds 'mean', 'sigma'"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"holds 'mu' of shape \[3\] and 'sigma' of shape \[4, 4\]"),
        ({"mu": np.zeros((1, 3)), "sigma": EYE}, r"holds 'mu' of shape \[1, 3\]"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"holds 'mu' of shape \[0\]"),
        ({"mu": np.full(3, np.nan), "sigma": EYE}, "holds NaN or infinity"),
        ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.inf)}, "holds NaN or infinity"),
        ({"mu": np.zeros(3), "sigma": np.triu(np.ones((3, 3)))}, "holds a 'sigma' that is not symmetric"),
        ({"mu": np.zeros(3), "sigma": np.diag([1.0, 1, -1])}, "is no covariance: its least eigenvalue is -1"),
        ({"mu": np.zeros(3, complex), "sigma": EYE}, "its 'mu' holds no real numbers, but complex128"),
        ({"mu": np.array([{}] * 3), "sigma": EYE}, "Object arrays cannot be loaded when allow_pickle=False"),
    ],
)
def test_what_is_no_mean_and_covariance_is_refused(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=f"^reference='.*a.npz': .*{message}.*; give an .npz with 'mu'"):
        read_gaussian(tmp_path / "a.npz")


def test_what_is_no_npz_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"text")
    with pytest.raises(ValueError, match="cannot be read: it is no .npz file"):
        read_gaussian(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="no such file"):
        read_gaussian(tmp_path / "b.npz")
