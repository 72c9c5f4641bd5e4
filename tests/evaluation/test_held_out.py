"""How good a student is, said during its run: a held-out Fréchet distance beside the teacher's own few steps."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from runs_helpers import ALONE, FAST, as_flags, call_cli, same_state, teacher_folder
from torch import nn

import onestill
from onestill.core.tensors import noise
from onestill.diffusion.process import CosineVP
from onestill.evaluation import held_out
from onestill.evaluation.choice import teacher_features
from onestill.evaluation.features import extract
from onestill.evaluation.held_out import REFERENCE_SEED, SEED, HeldOut
from onestill.evaluation.metrics import frechet_distance
from onestill.runs.build import build_run
from onestill.runs.distill import make_trainer, what_helps
from onestill.sampling.generate import student_generator, teacher_generator
from onestill.teachers.module import module_teacher
from onestill.training.config import make_config
from onestill.training.distance import Verdict

TEACHER = {1: 8.0, 4: 2.0, 8: 1.0, 50: 0.5}
OWN: dict[str, Any] = {**FAST, "num_teacher_steps": 10, "train_batch_size": 32}


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs of a second be judged, by as many samples as they get."""
    monkeypatch.setattr(held_out, "SHORTEST_RUN", 0.0)
    monkeypatch.setattr(held_out, "SHARE", 1e9)
    monkeypatch.setattr(held_out, "MOST_SAMPLES", 64)


@pytest.mark.parametrize(
    ("student", "steps", "words"),
    [
        (0.4, 50, "1 step is as good as the teacher's 50 steps ("),
        (1.0, 8, "as good as the teacher's 8 steps ("),
        (math.sqrt(0.5), math.sqrt(400), "as good as the teacher's 20 steps ("),
        (4.0, 2, "as good as the teacher's 2 steps; one step is not better than its 8 yet ("),
        (9.0, math.nan, "no better than the teacher's 1 step; one step is not better than its 8 yet ("),
        (math.nan, math.nan, "no better than the teacher's 1 step"),
    ],
)
def test_the_words(student: float, steps: float, words: str) -> None:
    found = Verdict(TEACHER, {1: student}, 256, "eyes")
    assert found.steps() == pytest.approx(steps, nan_ok=True) and words in str(found)
    assert "256 held-out samples, eyes" in str(found) and "0.5 in 50" in found.in_short


def test_what_is_falling_still_is_said_and_needs_time() -> None:
    falling, still = (Verdict(TEACHER, {1: 4.0, 4: 0.4}, 256, "eyes", before=before) for before in (5.0, 4.1))
    assert "yet, and was still falling" in str(falling) and "falling" not in str(still)
    assert "4 steps are as good as the teacher's 50 steps" in str(still)
    config = make_config({"teacher": "x", "output_dir": "run", **ALONE, "boundary_weight": 0.0})
    assert "max_train_steps" in what_helps(config, is_falling=True) and "anchor" in what_helps(config)


def judged(folder: Path, **own: Any) -> tuple[Any, HeldOut]:
    run = build_run(make_config({**OWN, "teacher": str(teacher_folder()), "output_dir": folder, **own}))
    trainer = make_trainer(run)
    assert isinstance(trainer.watch.judge, HeldOut)
    return trainer, trainer.watch.judge


@pytest.mark.usefixtures("hurried")
def test_the_numbers_are_those_of_the_metrics(tmp_path: Path) -> None:
    trainer, judge = judged(tmp_path / "run", flow_map_fraction=0.25)
    before = torch.get_rng_state(), trainer.generator.get_state()
    found = judge(100.0)
    assert found is not None and judge.why == ""
    assert all(map(torch.equal, before, (torch.get_rng_state(), trainer.generator.get_state())))
    assert list(found.teacher) == [1, 4, 8, 10] and list(found.student) == [1, 4] and math.isnan(found.before)
    teacher, eyes = trainer.teacher, teacher_features(trainer.teacher, torch.device("cpu"))

    def features(generate: Any, seed: int) -> torch.Tensor:
        return extract(eyes, generate(noise(range(seed, seed + 64), (1, 8, 8)), {}).clamp(-1, 1))

    real = features(teacher_generator(teacher, num_steps=5, solver="midpoint"), REFERENCE_SEED)
    assert real.shape[1] <= 32, "so that none is left out"
    for num, distance in found.teacher.items():
        assert distance == pytest.approx(
            frechet_distance(real, features(teacher_generator(teacher, num_steps=num), SEED))
        )
    for num, distance in found.student.items():
        own = student_generator(trainer.student, num_steps=num)
        assert distance == pytest.approx(frechet_distance(real, features(own, SEED)), rel=1e-5)
    again = judge(100.0)
    assert again is not None and again.student == found.student and again.before == found.student[1]


def test_it_takes_a_bounded_share_of_the_run_or_is_left_out_with_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, judge = judged(tmp_path / "a")
    assert judge(1.0) is None and judge.why == "a run of 1 seconds has no time for it"
    monkeypatch.setattr(held_out, "seconds_of", lambda call, _: 1.6)  # 0.05 for each of 32 images
    calls = (1 + 4 + 8 + 10 + 10) + 5 + 2  # of the teacher, for its features, for the one picture of the student
    _, judge = judged(tmp_path / "b")
    needed = 0.05 * calls * held_out.LEAST_SAMPLES / held_out.SHARE
    assert judge(0.99 * needed) is None and "128 samples would take" in judge.why
    _, judge = judged(tmp_path / "c")
    found = judge(1.5 * needed)
    assert found is not None and found.num_samples == pytest.approx(1.5 * 128, abs=1)


class Bare(nn.Module):
    """A network of one's own without a middle block; what it makes of the time alone is no feature of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.of_time, self.first, self.last = (
            nn.Linear(1, 4),
            nn.Conv2d(1, 4, 3, padding=1),
            nn.Conv2d(4, 1, 3, padding=1),
        )

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(torch.tanh(self.first(x) + self.of_time(t.reshape(-1, 1))[:, :, None, None]))
        return found


class Nothing(nn.Module):
    """A teacher of points."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layer(torch.cat([x, t.reshape(-1, 1)], dim=1))
        return found


@pytest.mark.usefixtures("hurried")
def test_every_teacher_has_some_features(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for network, shape, name in (
        (Bare(), (1, 4, 4), "the teacher's own last at log-SNR 2"),
        (lambda x, _: torch.tanh(x), (1, 4, 4), "the samples' own numbers"),
        (Nothing(), (2,), "the samples' own numbers"),
    ):
        teacher = module_teacher(network, CosineVP(), "sample", shape)
        own = {**OWN, "output_dir": tmp_path / "run", "teacher": "python object", "t_max": teacher.spec.t_max}
        trained = None if isinstance(network, nn.Module) else Bare()
        run = build_run(make_config(own), teacher, trained)
        found = HeldOut(run.student, run.conditions, run.config, torch.device("cpu"))(100.0)
        assert found is not None and found.features == name
        assert all(math.isfinite(d) for d in (*found.teacher.values(), *found.student.values()))


@pytest.mark.usefixtures("hurried")
def test_text_is_drawn_with_and_seen_as_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out, "MOST_SAMPLES", 24)
    own = {"train_batch_size": 16, "num_teacher_steps": 2, "num_prompts": 8, "prompt_cache_dir": tmp_path / "cache"}
    own |= {"guidance_scale_min": 1.0, "guidance_scale_max": 3.0}
    _, judge = judged(tmp_path / "run", teacher="glyphs", **own)
    found = judge(100.0)
    assert found is not None and found.num_samples == 24 and found.features.startswith("ConvFeatures")
    assert all(map(math.isfinite, (*found.teacher.values(), found.student[1])))


@pytest.mark.usefixtures("hurried")
def test_what_cannot_be_measured_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, judge = judged(tmp_path / "run")
    monkeypatch.setattr(judge, "_exact", lambda: lambda eps, _: eps / 0)
    assert judge(100.0) is None and "NaN or infinity" in judge.why and judge(100.0) is None
    _, judge = judged(tmp_path / "other")
    judge.students[1] = lambda eps, _: eps / 0
    found = judge(100.0)
    assert found is not None and math.isnan(found.student[1]) and "no better" in str(found)


@pytest.mark.usefixtures("hurried")
def test_a_run_says_it_everywhere_and_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = as_flags({**OWN, "validation_steps": 2})
    titles: list[str] = []
    save = held_out_pictures()
    monkeypatch.setattr(
        "onestill.sampling.pictures.save_rows", lambda *a, **k: titles.append(k["title"]) or save(*a, **k)
    )
    outcome = call_cli("distill", teacher_folder(), "--output_dir", tmp_path / "a", *flags)
    assert outcome.code == 0 and "  quality: 1 step is " in outcome.out and "the teacher's" in outcome.out, outcome
    lines = [json.loads(line) for line in (tmp_path / "a/logs/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "held_out" in line] == [2, 4]
    last = lines[-1]["held_out"]
    assert last["num_samples"] == 64 and list(last["teacher"]) == ["1", "4", "8", "10"]
    assert f"held out {last['student']['1']:.3g} in 1; teacher" in titles[-1] and titles[-1].startswith("step 4: ")
    assert "- Quality: 1 step is " in (tmp_path / "a/pipeline/README.md").read_text(encoding="utf-8")
    monkeypatch.setattr(held_out, "SHORTEST_RUN", 1e9)
    result = onestill.distill(
        teacher_folder(), tmp_path / "b", **{**OWN, "validation_steps": 2, "show_progress": False}
    )
    assert result.verdict is None and "has no time for it" in result.unjudged and result.distance is not None
    assert f"quality: not measured during the run: {result.unjudged}" in result.closing()
    assert same_state(tmp_path / "a/checkpoint-4", tmp_path / "b/checkpoint-4")


def held_out_pictures() -> Any:
    from onestill.sampling.pictures import save_rows

    return save_rows
