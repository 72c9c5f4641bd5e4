"""Power-function averages: their definition, other widths rebuilt from snapshots, and the files that those are."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from onestill.core.errors import FoundWarning, SettingError
from onestill.core.files import read_hashed
from onestill.core.writing import WriteError
from onestill.training import averages
from onestill.training.averages import (
    FOLDER,
    PowerAverage,
    Profile,
    Tracks,
    combination,
    exponent,
    forget_after,
    reach,
    snapshot_steps,
    write_snapshot,
)
from onestill.training.config import make_config

WIDTHS = (0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.25)


def config_of(**settings: Any) -> Any:
    return make_config({"teacher": "x", "output_dir": "y", **settings})


def width_of(gamma: float) -> float:
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


@pytest.mark.parametrize(
    ("width", "gamma"), [(0.05, 16.97), (0.1, 6.94), (0.15, 3.56), (0.2, 1.83), (0.0905, 7.99), (0.2886, 0.0)]
)
def test_the_exponent_is_that_of_the_width(width: float, gamma: float) -> None:
    assert exponent(width) == pytest.approx(gamma, abs=6e-3)
    assert width_of(exponent(width)) == pytest.approx(width, rel=1e-9)


def test_the_width_is_the_standard_deviation_of_its_profile() -> None:
    times = (np.arange(10**6) + 0.5) / 10**6
    for width in WIDTHS:
        density = (exponent(width) + 1) * times ** exponent(width) / 10**6
        mean = (density * times).sum()
        assert math.sqrt((density * (times - mean) ** 2).sum()) == pytest.approx(width, rel=1e-5)


@pytest.mark.parametrize("width", WIDTHS)
def test_an_average_is_its_sum(width: float) -> None:
    """By (33): update i of n weighs (i / n)^(gamma + 1) - ((i - 1) / n)^(gamma + 1)."""
    values = torch.randn(50, 7, generator=torch.Generator().manual_seed(1))
    weights = nn.Parameter(values[0].clone())
    average, edges = PowerAverage([weights], width), (np.arange(51) / 50) ** (exponent(width) + 1)
    for value in values:
        weights.data = value
        average.step([weights])
    expected = (torch.from_numpy(np.diff(edges))[:, None] * values.double()).sum(0)
    assert (average.shadow_params[0].double() - expected).abs().max() < 1e-6


# What is rebuilt


class Walk:
    """Weights that walk at random from somewhere, with their averages, and what a run would keep of them."""

    def __init__(self, folder: Path, num_steps: int = 1000, **settings: Any) -> None:
        config = config_of(max_train_steps=num_steps, **settings)
        generator = torch.Generator().manual_seed(2)
        weights = nn.Parameter(torch.zeros(4000))
        self.folder, self.num_steps = folder, num_steps
        names = dict(zip(("ema", "ema_beside"), config.ema_tracks, strict=False))
        self.direct = {width: PowerAverage([weights], width) for width in {*WIDTHS, 0.035, 0.055, *names.values()}}
        kept = snapshot_steps(config)
        for step in range(1, num_steps + 1):
            weights.data += torch.randn(4000, generator=generator)
            for average in self.direct.values():
                average.step([weights])
            own = {name: {"w": self.direct[width].shadow_params[0]} for name, width in names.items()}
            self.tracks = Tracks(names, own, step)
            if step in kept:
                write_snapshot(folder, step, self.tracks)

    def error(self, width: float) -> float:
        found, exact = self.tracks.at(width, self.folder, self.num_steps)["w"], self.direct[width].shadow_params[0]
        assert found.dtype == exact.dtype
        return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("own", [0.05, 0.09, 0.2])
def test_other_widths_are_rebuilt_from_snapshots(tmp_path: Path, own: float) -> None:
    walk = Walk(tmp_path, ema_width=own)
    # The narrowest needs a narrow average beside it.
    errors = {width: walk.error(width) for width in WIDTHS if own < 0.2 or width > 0.03}
    assert max(errors.values()) < 0.01, errors
    assert walk.error(own) == 0.0, "its own is kept"


def test_the_expected_error_is_that_of_random_walks(tmp_path: Path) -> None:
    walk = Walk(tmp_path, ema_width=0.09, num_ema_snapshots=3)
    kept = [Profile(0.09, n) for n in (250, 500, 750)] + [Profile(0.045, n) for n in (250, 500, 750)]
    for width in (0.035, 0.055, 0.07, 0.14):
        _, expected = combination([*kept, Profile(0.09, 1000), Profile(0.045, 1000)], Profile(width, 1000))
        assert walk.error(width) == pytest.approx(expected, rel=0.15)


def test_what_the_weights_have_in_common_stays_as_it_is() -> None:
    found = [Profile(0.09, n) for n in (100, 200, 300)]
    for width in WIDTHS:
        c, error = combination(found, Profile(width, 300))
        assert sum(c) == pytest.approx(1, abs=1e-9) and error >= 0
    c, error = combination(found, found[1])
    assert c == pytest.approx([0, 1, 0], abs=1e-6) and error < 1e-6


def test_long_runs_have_no_numbers_that_are_too_large() -> None:
    found = [Profile(width, n) for n in (10**7, 10**8) for width in (0.01, 0.02)]
    c, error = combination(found, Profile(0.015, 10**8))
    assert all(map(math.isfinite, c)) and math.isfinite(error)


def test_a_width_out_of_reach_is_refused_with_the_range(tmp_path: Path) -> None:
    walk = Walk(tmp_path, ema_width=0.09, num_ema_snapshots=2)
    profiles = [Profile(width, n) for width in (0.09, 0.045) for n in (333, 667, 1000)]
    low, high = reach(profiles, Profile(0.09, 1000))
    assert 0.03 < low < 0.045 and 0.1 < high < 0.2
    with pytest.raises(SettingError, match=rf"ema_width=0.25: .*between {low:.3g} and {high:.3g}"):
        walk.tracks.at(0.25, tmp_path, 1000)
    walk.tracks.at(high, tmp_path, 1000), walk.tracks.at(low, tmp_path, 1000)
    with pytest.raises(SettingError, match="there is no average"):
        Tracks({}, {}, 0).at(0.1, tmp_path, 5)


# The files


def test_snapshots_depend_on_the_length_of_the_run_alone() -> None:
    assert snapshot_steps(config_of(max_train_steps=9000)) == tuple(range(1000, 9000, 1000))
    assert snapshot_steps(config_of(max_train_steps=9000, checkpointing_steps=7, train_batch_size=3)) == tuple(
        range(1000, 9000, 1000)
    )
    assert snapshot_steps(config_of(max_train_steps=4)) == (1, 2, 3)
    assert snapshot_steps(config_of(max_train_steps=9000, ema_width=0)) == ()
    assert snapshot_steps(config_of(max_train_steps=9000, num_ema_snapshots=0)) == ()


def test_snapshots_are_whole_or_not_there_and_later_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tracks(num: int) -> Tracks:
        return Tracks({"ema": 0.1}, {"ema": {"a.b": torch.full((2, 3), float(num))}}, num)

    write_snapshot(tmp_path, 1, tracks(0))
    assert not (tmp_path / FOLDER).exists(), "there is nothing to average before the first update"
    for step in (2, 4, 6):
        write_snapshot(tmp_path, step, tracks(step))

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(averages, "save_hashed", fail)
        with pytest.raises(WriteError, match="no space left"):
            write_snapshot(tmp_path, 8, tracks(8))
    (first, second, third) = sorted((tmp_path / FOLDER).iterdir())
    assert torch.equal(read_hashed(second)[0]["ema/a.b"], torch.full((2, 3), 4.0))
    forget_after(tmp_path, 4)
    assert first.exists() and second.exists() and not third.exists()
    first.write_bytes(first.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="step-000000002"):
        tracks(4).at(0.1001, tmp_path, 4)
    with pytest.warns(FoundWarning, match="step-000000002.* rebuilt without it"):
        forget_after(tmp_path, 4)
    assert sorted((tmp_path / FOLDER).iterdir()) == [second]


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())
