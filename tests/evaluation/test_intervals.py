"""Intervals: those of means by their closed form, of distances by other draws, of classes in turn by theirs."""

import numpy as np
import pytest
import torch
from test_metrics import normal

from onestill.evaluation.gaussians import frechet, frechet_parts, gaussian_of
from onestill.evaluation.intervals import interval, intervals
from onestill.evaluation.metrics import inception_score, kernel_distance, kernel_parts


def half(low_high: tuple[float, float]) -> float:
    return (low_high[1] - low_high[0]) / 2


def test_the_interval_of_a_mean_is_that_of_the_normal_law() -> None:
    rows = normal(400, 1)[:, 0]
    low, high = interval(float(rows.mean()), rows, 2000)
    expected = 1.96 * float(rows.std()) / 20
    assert low == pytest.approx(float(rows.mean()) - expected, abs=0.1 * expected)
    assert high == pytest.approx(float(rows.mean()) + expected, abs=0.1 * expected)
    assert interval(float(rows.mean()), rows, 2000) == (low, high), "the draws are always the same"
    moved = interval(5.0, rows, 2000)
    assert (moved[0] + moved[1]) / 2 == pytest.approx(5, abs=0.01), "a derivative may have any mean"


def test_the_interval_of_a_distance_is_what_other_images_make_of_it() -> None:
    real = gaussian_of(normal(600, 6))

    def draw(seed: int) -> torch.Tensor:
        return normal(300, 6, seed=seed) * 1.2 + 0.2

    found = [frechet(real, gaussian_of(draw(seed))) for seed in range(1, 81)]
    halves = [half(interval(0.0, frechet_parts(real, draw(seed))[1], 400)) for seed in range(1, 11)]
    assert np.mean(halves) == pytest.approx(1.96 * np.std(found), rel=0.3)


def test_the_interval_of_a_kernel_distance_is_what_other_images_make_of_it() -> None:
    real, whole = normal(200, 4), {"subset_size": 200, "num_subsets": 1}
    found = [kernel_distance(real, normal(200, 4, seed=seed) + 0.4, **whole)[0] for seed in range(1, 61)]
    halves = [half(interval(0.0, kernel_parts(real, normal(200, 4, seed=s) + 0.4), 400)) for s in range(1, 11)]
    assert np.mean(halves) == pytest.approx(1.96 * np.std(found), rel=0.3)


def test_classes_in_turn_are_drawn_again_within_themselves() -> None:
    classes = torch.arange(400) % 4
    rows = normal(400, 1)[:, 0] + 10 * classes
    apart, alike = (half(interval(0.0, rows, 1000, given)) for given in (classes, None))
    assert apart == pytest.approx(1.96 / 20, rel=0.15) and alike > 8 * apart
    # Where each is there once there is nothing to draw again but the others.
    once = intervals({"a": 0.0}, {"a": rows}, 1000, torch.arange(400))
    assert half(once["a"]) == pytest.approx(alike)


def test_no_share_goes_beyond_0_and_1_and_no_resamples_are_no_intervals() -> None:
    hits = torch.tensor([True] * 19 + [False])
    values, parts = {"precision": 0.95}, {"precision": hits}
    low, high = intervals(values, parts, 1000)["precision"]
    assert 0.8 <= low < 0.95 < high == 1
    assert intervals(values, parts, 0) == {}
    assert (
        intervals({"inception_score": 1.001}, {"inception_score": normal(20, 1)[:, 0]}, 1000)["inception_score"][0] == 1
    )


def test_the_inception_score_by_hand() -> None:
    sure = torch.eye(4).repeat(5, 1) * 1000
    # Each part of two images says two classes for certain: exp(log 2).
    score, parts = inception_score(sure)
    assert score == pytest.approx(2) and parts.tolist() == pytest.approx([2 * np.log(2)] * 20)
    assert inception_score(sure, splits=1)[0] == pytest.approx(4)
    assert inception_score(torch.zeros(20, 4))[0] == pytest.approx(1)
    with pytest.raises(ValueError, match=r"N >= 10, got \[9, 4\]"):
        inception_score(torch.zeros(9, 4))
