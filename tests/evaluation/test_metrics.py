"""Metrics against closed forms, direct sums, a reference implementation and golden values."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from onestill.evaluation import metrics
from onestill.evaluation.metrics import (
    frechet_distance,
    kernel_distance,
    label_accuracy,
    precision_recall,
    sample_warning,
)


def normal(num: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exactly_gaussian(num: int, mean: Tensor, covariance: Tensor, seed: int = 0) -> Tensor:
    """Features whose *sample* mean and covariance are the given ones, so that no sampling error is left."""
    x = normal(num, len(mean), seed)
    x = x - x.mean(dim=0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), x.T, upper=False)
    coloured: Tensor = (torch.linalg.cholesky(covariance) @ white).T + mean
    return coloured


def golden(num: int, dim: int, phase: float) -> Tensor:
    """Features by arithmetic alone: the same on any machine and any version."""
    index = torch.arange(num * dim, dtype=torch.float64)
    return (index * index * 0.37 + phase).sin().view(num, dim)


# Fréchet distance


def test_distance_of_diagonal_gaussians() -> None:
    mean_r, mean_f = torch.tensor([0.0, 1.0, -2.0]).double(), torch.tensor([3.0, 1.0, 0.0]).double()
    var_r, var_f = torch.tensor([1.0, 4.0, 0.25]).double(), torch.tensor([9.0, 1.0, 0.25]).double()
    expected = (mean_r - mean_f).square().sum() + (var_r.sqrt() - var_f.sqrt()).square().sum()
    found = frechet_distance(
        exactly_gaussian(200, mean_r, var_r.diag()), exactly_gaussian(300, mean_f, var_f.diag(), seed=1)
    )
    assert found == pytest.approx(float(expected), rel=1e-9)


def test_distance_of_covariances_that_do_not_commute() -> None:
    a, b = (torch.tensor(rows, dtype=torch.float64) for rows in ([[2, 1], [1, 2]], [[3, 0], [0, 1]]))
    # In two dimensions Tr sqrt(AB) = sqrt(Tr AB + 2 sqrt(det AB)).
    root = math.sqrt(float((a @ b).trace()) + 2 * math.sqrt(float(torch.linalg.det(a @ b))))
    expected = float(a.trace() + b.trace()) - 2 * root
    zero = torch.zeros(2, dtype=torch.float64)
    found = frechet_distance(exactly_gaussian(50, zero, a), exactly_gaussian(60, zero, b, seed=1))
    assert found == pytest.approx(expected, rel=1e-9)


def test_distance_of_identical_features_is_zero() -> None:
    features = normal(100, 16)
    assert frechet_distance(features, features.clone()) == pytest.approx(0, abs=1e-9)
    # A singular covariance (fewer images than dimensions) loses half the digits under the root.
    assert frechet_distance(features[:8], features[:8]) == pytest.approx(0, abs=1e-5)


def test_distance_is_symmetric_and_survives_a_far_origin() -> None:
    real, fake = normal(200, 8), 1.5 * normal(300, 8, seed=1) + 0.3
    there = frechet_distance(real, fake)
    assert frechet_distance(fake, real) == pytest.approx(there, rel=1e-9)
    assert frechet_distance(real + 1e6, fake + 1e6) == pytest.approx(there, rel=1e-6)


def test_distance_does_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = normal(60, 4), normal(50, 4, seed=1)
    whole = frechet_distance(real, fake), precision_recall(real, fake)
    monkeypatch.setattr(metrics, "_CHUNK", 16)
    assert frechet_distance(real, fake) == pytest.approx(whole[0], rel=1e-12)
    assert precision_recall(real, fake) == whole[1]


def test_distance_against_scipy() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    real, fake = golden(80, 6, 0.0), golden(70, 6, 0.5) * 1.3
    root = linalg.sqrtm(real.T.cov().numpy() @ fake.T.cov().numpy())
    expected = float((real.mean(0) - fake.mean(0)).square().sum()) + np.trace(
        real.T.cov().numpy() + fake.T.cov().numpy() - 2 * root.real
    )
    assert frechet_distance(real, fake) == pytest.approx(expected, rel=1e-9)


def test_golden_values() -> None:
    real, fake = golden(80, 6, 0.0), golden(70, 6, 0.5) * 1.3
    assert frechet_distance(real, fake) == pytest.approx(GOLDEN_FRECHET, rel=1e-8)
    # All rows in one subset: no random draw that another version of torch might make differently.
    assert kernel_distance(real[:70], fake, subset_size=70, num_subsets=1)[0] == pytest.approx(GOLDEN_KERNEL, rel=1e-8)
    assert precision_recall(real, fake) == pytest.approx(GOLDEN_PRECISION_RECALL, abs=1e-12)


GOLDEN_FRECHET = 0.32947476687726596
GOLDEN_KERNEL = -0.02441381293080891
GOLDEN_PRECISION_RECALL = (62 / 70, 79 / 80)


# Kernel distance


def test_kernel_distance_is_the_unbiased_sum() -> None:
    real, fake = normal(20, 5), normal(20, 5, seed=1) + 0.2
    # One subset of all rows: the order does not matter, so the sum can be written out.
    found, deviation = kernel_distance(real, fake, subset_size=20, num_subsets=1)
    kernel = [[(x @ y.T / 5 + 1) ** 3 for y in (real, fake)] for x in (real, fake)]
    off_diagonal = [(kernel[i][i].sum() - kernel[i][i].trace()) / (20 * 19) for i in (0, 1)]
    expected = off_diagonal[0] + off_diagonal[1] - 2 * kernel[0][1].mean()
    assert found == pytest.approx(float(expected), rel=1e-9) and deviation == 0


def test_kernel_distance_of_one_distribution_is_zero_on_average() -> None:
    values = [
        kernel_distance(normal(64, 8, seed=i), normal(64, 8, seed=i + 1), subset_size=64, num_subsets=1)[0]
        for i in range(0, 200, 2)
    ]
    # The mean of independent draws lies within 4 of its standard errors but once in 16,000 seeds.
    assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(len(values))
    assert min(values) < 0 < max(values)


def test_kernel_distance_is_seeded_and_leaves_the_global_state_alone() -> None:
    real, fake = normal(50, 4), normal(50, 4, seed=1)
    before = torch.get_rng_state()
    first = kernel_distance(real, fake, subset_size=10, num_subsets=5)
    torch.rand(3)
    assert kernel_distance(real, fake, subset_size=10, num_subsets=5) == first
    assert kernel_distance(real, fake, subset_size=10, num_subsets=5, seed=1) != first
    torch.set_rng_state(before)
    kernel_distance(real, fake, subset_size=10, num_subsets=5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("subset_size", "num_subsets", "message"),
    [
        (51, 1, "subset_size must lie between 2 and the smaller set, got 51 for 60 real and 50 generated"),
        (1, 1, "subset_size must lie between 2"),
        (10, 0, "num_subsets must be at least 1, got 0"),
    ],
)
def test_kernel_distance_says_what_is_wrong(subset_size: int, num_subsets: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernel_distance(normal(60, 4), normal(50, 4), subset_size=subset_size, num_subsets=num_subsets)


# Precision and recall


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("shift", [0.0, 1.0, 3.0])
def test_precision_and_recall_against_prdc(k: int, shift: float) -> None:
    prdc = pytest.importorskip("prdc")
    real, fake = normal(120, 6), 0.7 * normal(90, 6, seed=1) + shift
    expected = prdc.compute_prdc(real.numpy(), fake.numpy(), nearest_k=k)
    found = precision_recall(real, fake, k=k)
    assert found == pytest.approx((expected["precision"], expected["recall"]), abs=1e-12)


def test_precision_and_recall_by_hand() -> None:
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    # Two on the line, two far from it and from each other's balls.
    fake = torch.tensor([[0.5], [1.5], [100.0], [102.0]])
    assert precision_recall(real, fake, k=1) == (0.5, 0.75)


def test_precision_sees_quality_and_recall_sees_diversity() -> None:
    real = normal(400, 4)
    narrow, wide = 0.1 * normal(400, 4, seed=1), 4 * normal(400, 4, seed=2)
    precision, recall = precision_recall(real, narrow)
    assert precision > 0.95 and recall < 0.1
    precision, recall = precision_recall(real, wide)
    assert precision < 0.5 and recall > 0.9
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, real + 1000) == (0, 0)


@pytest.mark.parametrize("k", [0, 50])
def test_precision_says_what_is_wrong_with_k(k: int) -> None:
    with pytest.raises(ValueError, match=f"k must lie between 1 .*, got k={k} for 60 real and 50 generated"):
        precision_recall(normal(60, 4), normal(50, 4), k=k)


# What all refuse


@pytest.mark.parametrize("metric", [frechet_distance, kernel_distance, precision_recall])
@pytest.mark.parametrize(
    ("real", "fake", "message"),
    [
        (torch.zeros(1, 4), torch.zeros(5, 4), "at least 2 real images are needed, got 1"),
        (torch.zeros(5, 4), torch.zeros(1, 4), "at least 2 generated images are needed, got 1"),
        (torch.zeros(5, 4), torch.zeros(5, 3), "one extractor, got 4 and 3 dimensions"),
        (torch.zeros(5, 4, 1), torch.zeros(5, 4), r"real features must be \[N, D\], got shape \[5, 4, 1\]"),
        (torch.zeros(5, 4), torch.full((5, 4), torch.inf), "generated features hold NaN or infinity"),
    ],
)
def test_metrics_say_what_is_wrong_with_features(metric: object, real: Tensor, fake: Tensor, message: str) -> None:
    assert callable(metric)
    with pytest.raises(ValueError, match=message):
        metric(real, fake)


def test_too_few_images_for_the_dimensions_are_warned_about() -> None:
    assert sample_warning(65, 1000, 64) is None
    message = sample_warning(1000, 64, 64)
    assert message is not None and "1000 real and 64 generated images in 64 feature dimensions" in message


# Label accuracy


def test_label_accuracy() -> None:
    logits = torch.tensor([[3.0, 1.0], [0.0, 1.0], [2.0, 1.0], [5.0, 1.0]])
    assert label_accuracy(logits, torch.tensor([0, 1, 1, 0])) == 0.75


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(4, dtype=torch.long), r"got \[3, 2\] and \[4\]"),
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), "N >= 1"),
        (torch.zeros(2, 2), torch.tensor([0, 2]), r"labels must lie in 0..1 .*, got 0..2"),
    ],
)
def test_label_accuracy_says_what_is_wrong(logits: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        label_accuracy(logits, labels)
