"""How far a student is from its teacher: measured beside the teacher's own few steps, and said at the end of a run."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from runs_helpers import ALONE, FAST, as_flags, call_cli, copied, finished_run, teacher_folder
from torch import nn

import onestill
from onestill.core.errors import named
from onestill.core.tensors import noise
from onestill.data.conditions import VALIDATION_SEED
from onestill.diffusion.process import CosineVP
from onestill.runs.build import build_run
from onestill.runs.distill import what_helps
from onestill.sampling.generate import student_generator, teacher_generator
from onestill.teachers.module import module_teacher
from onestill.training.config import make_config
from onestill.training.distance import Distance, nearest
from onestill.training.trainer import Trainer


@pytest.mark.parametrize(
    ("student", "few", "words"),
    [
        (0.2, {1: 0.5, 2: 0.3, 4: 0.1}, "between the teacher's own 2 steps (0.3) and 4 steps (0.1)"),
        (0.6, {1: 0.5}, "no nearer than the teacher's own 1 step (0.5)"),
        (0.05, {1: 0.5, 2: 0.3}, "nearer than the teacher's own 2 steps (0.3)"),
        (0.05, {}, "0.05 from the teacher's 50 steps (RMS of 8 images from the same noise)"),
        (math.nan, {1: 0.5}, "nan from the teacher's 50 steps"),
    ],
)
def test_the_words(student: float, few: dict[int, float], words: str) -> None:
    text = str(Distance(student, few, 50, 8))
    assert words in text and ("than" in text or "between" in text) == bool(few and math.isfinite(student))


class Ring(nn.Module):
    """tanh of x_t: a denoiser whose few steps differ from its many."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Conv2d(1, 1, 1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh((1 + t.reshape(-1, 1, 1, 1)) * x + self.scale(x))


def test_the_numbers_are_those_of_the_samplers_and_no_random_state_is_touched(tmp_path: Path) -> None:
    teacher = module_teacher(Ring(), CosineVP(), "sample", (1, 4, 4))
    own = {**FAST, "output_dir": tmp_path / "run", "num_teacher_steps": 30, "num_validation_images": 5}
    run = build_run(make_config({**own, "teacher": "python object", "t_max": teacher.spec.t_max}), teacher)
    trainer = Trainer(run.config, run.student, run.conditions, run.fingerprints)
    assert trainer.distance(60) is None
    list(trainer.steps())
    before = torch.get_rng_state(), trainer.generator.get_state()
    found = trainer.distance(60)
    assert found is not None and all(map(torch.equal, before, (torch.get_rng_state(), trainer.generator.get_state())))
    eps = noise(range(VALIDATION_SEED, VALIDATION_SEED + 5), (1, 4, 4))
    many = teacher_generator(run.teacher, num_steps=30)(eps, {})

    def rms(x: torch.Tensor) -> float:
        return float((x - many).square().mean().sqrt())

    with trainer.averaged():
        assert found.student == pytest.approx(rms(student_generator(run.student, t=run.config.t_min)(eps, {})))
    assert found.few_steps and (found.teacher_steps, found.num_images) == (30, 5)
    for num, d in found.few_steps.items():
        assert d == pytest.approx(rms(teacher_generator(run.teacher, num_steps=num)(eps, {})))
    *farther, last = found.few_steps.values()
    assert all(d > found.student for d in farther) and (last <= found.student or 16 in found.few_steps)
    spent = trainer.distance(-1)
    assert spent is not None and spent.few_steps == {}, "no teacher is asked when the time is over"


def test_a_run_ends_by_saying_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {**FAST, "max_train_steps": 1, "lr_warmup_steps": 0, "num_teacher_steps": 3}
    flags = as_flags({**settings, "anchor_fraction": 0.5})
    outcome = call_cli("distill", teacher_folder(), "--output_dir", tmp_path / "a", *flags)
    assert outcome.code == 0 and "distance: " in outcome.out and "the teacher's 3 steps" in outcome.out, outcome
    assert "teacher's own" in outcome.out and "what helps most from here: --max_train_steps 2\n" in outcome.out
    result = onestill.distill(teacher_folder(), tmp_path / "b", **{**settings, "train_batch_size": 8})
    said = capsys.readouterr().err
    assert "what helps most from here: anchor_fraction 1, in a new run" in said and str(result.distance) in said


def test_what_was_finished_is_not_measured(tmp_path: Path) -> None:
    run = copied(finished_run(), tmp_path / "run")
    shutil.rmtree(run / "pipeline")
    go_on = ("distill", "--config", run / "config.yaml", "--output_dir", run, "--resume_from_checkpoint", "latest")
    outcome = call_cli(*go_on)
    assert outcome.code == 0 and "distance: not measured" in outcome.out
    assert "distance" not in call_cli(*go_on).out


def test_anchors_are_advised_where_there_are_few(tmp_path: Path) -> None:
    base = {"teacher": "x", "output_dir": tmp_path}
    assert "anchor_fraction" in what_helps(make_config({**base, **ALONE, "boundary_weight": 0.0}))
    assert what_helps(make_config({**base, "recipe": "boot"})) == f"{named('recipe')} default, in a new run"
    assert what_helps(make_config(base), budget="90m") == f"{named('budget')} 180m, in a new run"
    assert "60, in a new run" in what_helps(make_config({**base, "max_train_steps": 30}))
    for many in ({**ALONE, "anchor_fraction": 0.5}, {**ALONE, "anchor_fraction": 0.75}):
        assert "max_train_steps" in what_helps(make_config({**base, "max_train_steps": 30, **many}))
        assert "60" in what_helps(make_config({**base, "max_train_steps": 30, **many}))


def test_the_first_stays_unless_another_is_nearer_beyond_doubt() -> None:
    generator = torch.Generator().manual_seed(0)
    first = 1 + torch.rand(64, generator=generator)
    noise = torch.randn(64, generator=generator)
    noise -= noise.mean()
    noise /= noise.std()
    # The standard error of the difference is 0.1 / 8.
    far, near = first - 0.1 * noise - 0.03, first - 0.1 * noise - 0.02
    assert nearest({0.1: first, 0.2: near}) == 0.1 and nearest({0.1: first, 0.2: far}) == 0.2
    assert nearest({0.1: first, 0.2: near, 0.3: far, 0.4: first - 0.5}) == 0.4
    assert nearest({0.1: first, 0.2: first + 1}) == 0.1 and nearest({0.1: first}) == 0.1
    assert nearest({0.1: first, 0.2: torch.full((64,), torch.nan)}) == 0.1
