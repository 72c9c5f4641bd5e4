"""Classifier-free guidance, thresholding, and the conditions that they are given."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from onestill.core.errors import SettingError
from onestill.core.tensors import Cond
from onestill.data.conditions import LabelConditions, check_labels
from onestill.diffusion.process import CosineVP, DiscreteVP
from onestill.diffusion.trajectory import SOLVERS, uniform_times
from onestill.sampling.samplers.network import TeacherSampler
from onestill.teachers.base import Teacher
from onestill.teachers.closed_form import GaussianTeacher, MixtureTeacher
from onestill.teachers.guidance import Guided, Thresholded, guided
from onestill.teachers.teacher_spec import Threshold

MEANS = torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, -1.0]], dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Counting(Teacher):
    """A teacher that keeps what it is asked."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher, self.spec = teacher, teacher.spec
        self.asked: list[tuple[Tensor, float | Tensor, Cond]] = []

    def denoised(self, x_t: Tensor, t: float | Tensor, cond: Cond) -> Tensor:
        self.asked.append((x_t, t, cond))
        return self.teacher.denoised(x_t, t, cond)


def conditional() -> Counting:
    return Counting(MixtureTeacher(MEANS, 0.4, CosineVP(), conditional=True))


# Guidance


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 7.5])
def test_guidance_is_the_formula(scale: float) -> None:
    teacher, x, labels = conditional(), normal(6, 2), torch.tensor([0, 1, 2, 0, 1, 2])
    t = torch.linspace(0.2, 0.9, 6, dtype=torch.float64)
    with_class = teacher.denoised(x, t, {"class_labels": labels})
    without = teacher.denoised(x, t, {"class_labels": torch.full_like(labels, 3)})
    found = Guided(teacher, scale).denoised(x, t, {"class_labels": labels})
    # Float64; two terms in another order.
    torch.testing.assert_close(found, without + scale * (with_class - without), rtol=0, atol=1e-13)
    assert not torch.allclose(with_class, without, atol=0.01), "the classes must differ for this to be a test"


def test_guided_prediction_is_one_batch_of_two() -> None:
    teacher, x, labels = conditional(), normal(4, 2), torch.tensor([0, 1, 2, 0])
    t = torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    guided = Guided(teacher, 3.0)
    guided.denoised(x, t, {"class_labels": labels})
    assert len(teacher.asked) == 1 and guided.evaluations == 2
    states, times, cond = teacher.asked[0]
    assert torch.equal(states, torch.cat([x, x])) and torch.equal(times, torch.cat([t, t]))  # type: ignore[arg-type]
    assert torch.equal(cond["class_labels"], torch.tensor([0, 1, 2, 0, 3, 3, 3, 3]))


def test_one_is_no_guidance_and_one_call() -> None:
    teacher, x, cond = conditional(), normal(4, 2), {"class_labels": torch.tensor([0, 1, 2, 3])}
    guided = Guided(teacher, 1.0)
    assert torch.equal(guided.denoised(x, 0.5, cond), teacher.teacher.denoised(x, 0.5, cond))
    assert len(teacher.asked) == 1 and len(teacher.asked[0][0]) == 4 and guided.evaluations == 1


def test_null_class_is_not_guided_away() -> None:
    teacher, x, cond = conditional(), normal(4, 2), {"class_labels": torch.full((4,), 3)}
    expected = teacher.denoised(x, 0.5, cond)
    torch.testing.assert_close(Guided(teacher, 5.0).denoised(x, 0.5, cond), expected, rtol=0, atol=1e-14)


def test_drawn_scales_are_each_images_own() -> None:
    teacher, x, labels = conditional(), normal(4, 2), torch.tensor([0, 1, 2, 0])
    scales = torch.tensor([0.0, 1.0, 2.5, 4.0], dtype=torch.float64)
    guided = Guided(teacher, drawn=True)
    found = guided.denoised(x, 0.4, {"class_labels": labels, "guidance_scale": scales})
    assert guided.evaluations == 2
    for i, scale in enumerate(scales.tolist()):
        alone = Guided(teacher, scale).denoised(x[i : i + 1], 0.4, {"class_labels": labels[i : i + 1]})
        torch.testing.assert_close(found[i : i + 1], alone, rtol=0, atol=1e-13)
    assert all("guidance_scale" not in cond for _, _, cond in teacher.asked), "the teacher's network does not take it"


def test_drawn_scales_win_over_the_fixed_one() -> None:
    teacher, x, labels = conditional(), normal(2, 2), torch.tensor([0, 1])
    cond = {"class_labels": labels, "guidance_scale": torch.tensor([3.0, 3.0]).double()}
    expected = Guided(teacher, 3.0).denoised(x, 0.4, {"class_labels": labels})
    torch.testing.assert_close(Guided(teacher, 9.0).denoised(x, 0.4, cond), expected, rtol=0, atol=1e-14)


def test_calls_multiply_through_the_wrappers() -> None:
    teacher = conditional()
    assert Thresholded(Guided(teacher, 2.0), Threshold("static")).evaluations == 2
    assert Thresholded(Guided(teacher), Threshold("static")).evaluations == 1
    assert Guided(teacher).spec is teacher.spec


# On an interval of levels


def test_guidance_acts_inside_its_interval_alone() -> None:
    teacher, x, labels = conditional(), normal(6, 2), torch.tensor([0, 1, 2, 0, 1, 2])
    t = torch.tensor([0.1, 0.2, 0.3, 0.6, 0.60001, 1.0], dtype=torch.float64)
    found = Guided(teacher, 3.0, interval=(0.2, 0.6)).denoised(x, t, {"class_labels": labels})
    assert [len(x) for x, _, _ in teacher.asked] == [6 + 2], "two rows are inside: the lower end is not, the upper is"
    plain = conditional().denoised(x, t, {"class_labels": labels})
    everywhere = Guided(conditional(), 3.0).denoised(x, t, {"class_labels": labels})
    inside = torch.tensor([False, False, True, True, False, False])
    torch.testing.assert_close(found, torch.where(inside[:, None], everywhere, plain), rtol=0, atol=1e-13)
    assert not torch.allclose(plain, everywhere, atol=0.01)


@pytest.mark.parametrize(("t", "rows"), [(0.3, 8), (0.1, 4), (0.9, 4)])
def test_a_batch_outside_the_interval_costs_one_evaluation(t: float, rows: int) -> None:
    teacher, x, labels = conditional(), normal(4, 2), torch.tensor([0, 1, 2, 0])
    guided = Guided(teacher, 3.0, interval=(0.2, 0.6))
    for times in (t, torch.full((4,), t).double()):
        guided.denoised(x, times, {"class_labels": labels})
        assert len(teacher.asked[-1][0]) == rows
    assert guided.evaluations_at(t) == rows / 4 and guided.evaluations == 2
    assert Thresholded(guided, Threshold("static")).evaluations_at(t) == rows / 4


def test_drawn_scales_and_the_interval() -> None:
    teacher, x, labels = conditional(), normal(4, 2), torch.tensor([0, 1, 2, 0])
    t, scales = torch.tensor([0.9, 0.5, 0.3, 0.1]).double(), torch.tensor([2.0, 3.0, 4.0, 5.0]).double()
    guided = Guided(teacher, drawn=True, interval=(0.2, 0.6))
    found = guided.denoised(x, t, {"class_labels": labels, "guidance_scale": scales})
    for i, scale in enumerate([1.0, 3.0, 4.0, 1.0]):
        alone = Guided(teacher, scale).denoised(x[i : i + 1], t[i : i + 1], {"class_labels": labels[i : i + 1]})
        torch.testing.assert_close(found[i : i + 1], alone, rtol=0, atol=1e-13)


def test_the_whole_range_is_no_interval_to_the_bit() -> None:
    x, cond, t = normal(3, 2), {"class_labels": torch.tensor([0, 1, 2])}, torch.tensor([0.001, 0.5, 1.0]).double()
    found = Guided(conditional(), 3.0, interval=(0.0, 1.0)).denoised(x, t, cond)
    assert torch.equal(found, Guided(conditional(), 3.0).denoised(x, t, cond))


def test_levels_of_a_grid_are_met_in_spite_of_rounding() -> None:
    guided = Guided(conditional(), 3.0, interval=(0.1, 0.3))
    times = uniform_times(1.0, 10)
    assert times[7] > 0.3 and times[9] != 0.1, "or this tests nothing"
    assert [i for i, t in enumerate(times) if guided.evaluations_at(t) == 2] == [7, 8]


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_sampler_counts_the_evaluations_that_it_makes(scale: float) -> None:
    for solver in SOLVERS:
        teacher = conditional()
        interval = None if scale == 1 else (0.2, 0.6)
        sampler = TeacherSampler(guided(teacher, scale, interval=interval), num_steps=10, solver=solver)
        sampler(normal(3, 2), {"class_labels": torch.tensor([0, 1, 2])})
        assert sum(len(x) for x, _, _ in teacher.asked) == 3 * sampler.evaluations
    assert sampler.at(guidance_scale=1.0).evaluations == 10
    assert sampler.at(guidance_scale=1.0).at(guidance_scale=5.0).teacher.guidance_interval == interval


@pytest.mark.parametrize(
    ("interval", "named", "why"),
    [
        ((0.8, 0.8), "guidance_interval_min", "must be below guidance_interval_max, 0.8"),
        ((0.75, 1.0), "guidance_interval_min", "start level t_max = 0.7"),
        ((0.0, 0.0005), "guidance_interval_max", "is below 0.001"),
    ],
)
def test_intervals_without_a_guided_level_are_refused(interval: tuple[float, float], named: str, why: str) -> None:
    process = DiscreteVP(DDIMScheduler().alphas_cumprod)
    teacher = MixtureTeacher(MEANS, 0.4, process, 0.7, conditional=True)
    with pytest.raises(SettingError, match=re.escape(why)) as error:
        guided(teacher, 3.0, interval=interval)
    assert error.value.settings[0] == named


# Who can be guided


@pytest.mark.parametrize(("scale", "drawn"), [(2.0, False), (0.0, False), (1.0, True)])
def test_guidance_needs_a_null_class(scale: float, drawn: bool) -> None:
    unconditional = GaussianTeacher(MEANS[0], 0.4, CosineVP())
    words = "_min and guidance_scale_max: need" if drawn else f"={scale:g}: needs"
    with pytest.raises(ValueError, match=rf"guidance_scale{words} a teacher with a null class.*no classes"):
        Guided(unconditional, scale, drawn=drawn)
    nameless = conditional()
    nameless.spec = replace(nameless.spec, null_class=None)
    with pytest.raises(ValueError, match="none that is known.*null_class"):
        Guided(nameless, scale, drawn=drawn)


def test_unconditional_teachers_pass_through() -> None:
    teacher, x = GaussianTeacher(MEANS[0], 0.4, CosineVP()), normal(3, 2)
    assert torch.equal(Guided(teacher).denoised(x, 0.5, {}), teacher.denoised(x, 0.5, {}))


# Thresholding


@pytest.mark.parametrize("shape", [(8, 1, 8, 8), (4, 3, 6, 4)])
@pytest.mark.parametrize(("limit", "ratio"), [(1.0, 0.995), (2.0, 0.9), (1.5, 0.5)])
def test_dynamic_thresholding_is_diffusers_own(shape: tuple[int, ...], limit: float, ratio: float) -> None:
    scheduler = DDIMScheduler(thresholding=True, sample_max_value=limit, dynamic_thresholding_ratio=ratio)
    # From images inside [-1, 1] to images far outside, in one batch.
    x_0 = torch.randn(shape) * torch.linspace(0.2, 3, shape[0]).reshape(-1, 1, 1, 1)
    assert torch.equal(Threshold("dynamic", limit, ratio)(x_0), scheduler._threshold_sample(x_0))


def test_dynamic_thresholding_looks_at_each_image_alone() -> None:
    x_0 = torch.stack([torch.full((1, 4, 4), 0.5), torch.full((1, 4, 4), 3.0)])
    found = Threshold("dynamic", limit=4.0)(x_0)
    # Below 1 nothing happens; an image of threes is divided by its quantile, three.
    assert torch.equal(found, torch.stack([torch.full((1, 4, 4), 0.5), torch.ones(1, 4, 4)]))


@pytest.mark.parametrize("limit", [1.0, 2.0])
def test_static_thresholding_is_clipping(limit: float) -> None:
    x_0 = 3 * torch.randn(4, 1, 8, 8)
    assert torch.equal(Threshold("static", limit)(x_0), x_0.clamp(-limit, limit))
    assert float(x_0.abs().max()) > limit


def test_no_thresholding_changes_nothing() -> None:
    x_0 = 3 * torch.randn(4, 1, 8, 8)
    assert Threshold()(x_0) is x_0


def test_thresholding_comes_after_guidance() -> None:
    teacher, x, cond = conditional(), normal(5, 2), {"class_labels": torch.tensor([0, 1, 2, 0, 1])}
    guided = Guided(teacher, 6.0)
    raw = guided.denoised(x, 0.5, cond)
    assert float(raw.abs().max()) > 1
    found = Thresholded(guided, Threshold("static")).denoised(x, 0.5, cond)
    assert torch.equal(found, raw.clamp(-1, 1))


# Conditions


@given(num=st.integers(1, 50), seed=st.integers(0, 10**6))
def test_drawn_conditions_are_in_range(num: int, seed: int) -> None:
    drawn = LabelConditions((2, 5, 7), (1.5, 4.0)).choose(num, torch.Generator().manual_seed(seed))
    assert drawn["class_labels"].shape == drawn["guidance_scale"].shape == (num,)
    assert set(drawn["class_labels"].tolist()) <= {2, 5, 7}
    assert bool(((drawn["guidance_scale"] >= 1.5) & (drawn["guidance_scale"] <= 4.0)).all())


def test_draws_come_from_the_generator_alone() -> None:
    conditions = LabelConditions((0, 1, 2), (1.0, 2.0))
    torch.manual_seed(1)
    one = conditions.choose(20, torch.Generator().manual_seed(4))
    torch.manual_seed(2)
    two = conditions.choose(20, torch.Generator().manual_seed(4))
    assert all(torch.equal(one[name], two[name]) for name in ("class_labels", "guidance_scale"))


def test_every_label_is_drawn_alike() -> None:
    labels = LabelConditions((3, 4, 9)).choose(9000, torch.Generator().manual_seed(0))["class_labels"]
    counts = torch.stack([(labels == label).sum() for label in (3, 4, 9)])
    # 3000 each; the standard deviation of a count is 45.
    assert int((counts - 3000).abs().max()) < 200


def test_grids_go_round_the_labels() -> None:
    grid = LabelConditions((2, 5), (1.0, 4.0)).grid(5)
    assert grid["class_labels"].tolist() == [2, 5, 2, 5, 2]
    assert grid["guidance_scale"].tolist() == [2.5] * 5
    assert LabelConditions().grid(3) == {} == LabelConditions().choose(3, torch.Generator())


def test_labels_are_checked_against_the_teacher() -> None:
    spec = conditional().spec
    assert check_labels((), spec) == (0, 1, 2)
    assert check_labels((2, 0), spec) == (2, 0)
    with pytest.raises(ValueError, match="class_labels=3: is the null class, which means 'no class'"):
        check_labels((3,), spec)
    with pytest.raises(ValueError, match=r"class_labels=\[4, 9\]: the teacher's classes are 0 to 2"):
        check_labels((9, 1, 4), spec)
    with pytest.raises(ValueError, match=r"class_labels=\[1\]: the teacher is unconditional"):
        check_labels((1,), GaussianTeacher(MEANS[0], 0.4, CosineVP()).spec)
