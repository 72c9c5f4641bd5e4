"""Anchors: what the pool holds, how it is kept, and what a training makes of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs_helpers import FAST, NULL_CLASS, Interruption, interrupt_at, restored, same_state, teacher_folder

import onestill
from onestill.data.conditions import LabelConditions
from onestill.diffusion.process import CosineVP
from onestill.objectives.anchors import Anchors, joined, read_anchors, roll_out, write_anchors
from onestill.runs.build import prepare
from onestill.runs.resume import pool_settings
from onestill.sampling.generate import teacher_generator
from onestill.teachers.closed_form import GaussianTeacher
from onestill.teachers.guidance import Guided
from onestill.teachers.load import load_teacher
from onestill.training.config import make_config
from onestill.training.trainer import Trainer

POOL: dict[str, Any] = {"anchor_fraction": 0.5, "num_anchors": 10, "num_anchor_steps": 3}


def pool(num: int = 10, **settings: Any) -> Anchors:
    teacher = Guided(load_teacher(teacher_folder("class"), null_class=NULL_CLASS), 2.0)
    values: dict[str, Any] = {"num_steps": 4, "solver": "midpoint", "t_min": 0.0, "batch_size": 4, **settings}
    generator = torch.Generator().manual_seed(0)
    return joined(list(roll_out(teacher, LabelConditions((0, 1, 2)), num, generator=generator, **values)))


def test_an_anchor_is_the_end_of_the_teachers_own_sampling() -> None:
    anchors = pool()
    assert anchors.eps.shape == anchors.signal.shape == (10, 1, 8, 8)
    teacher = Guided(load_teacher(teacher_folder("class"), null_class=NULL_CLASS), 2.0)
    expected = teacher_generator(teacher, num_steps=4, solver="midpoint")(anchors.eps, anchors.chosen)
    # The same sums in batches of another size.
    torch.testing.assert_close(anchors.signal, expected, atol=1e-5, rtol=1e-5)


def test_anchors_of_a_closed_form_reach_the_exact_map() -> None:
    teacher = GaussianTeacher(torch.tensor([0.5, -0.3]), 0.6, CosineVP())
    generator = torch.Generator().manual_seed(0)
    settings: dict[str, Any] = {"num_steps": 64, "solver": "midpoint", "t_min": 0.0, "generator": generator}
    anchors = joined(list(roll_out(teacher, LabelConditions(), 100, **settings)))
    # From pure noise to data: eq. (17) at s = 0.
    exact = torch.tensor([0.5, -0.3]) + 0.6 * anchors.eps
    assert (anchors.signal - exact).abs().max() < 4e-3


def test_draws_are_rows_of_the_pool_and_belong_together() -> None:
    anchors = pool()
    drawn = anchors.draw(50, torch.Generator().manual_seed(1))
    rows = [int((anchors.eps == eps).flatten(1).all(1).nonzero()) for eps in drawn.eps]
    assert torch.equal(drawn.signal, anchors.signal[rows])
    assert torch.equal(drawn.chosen["class_labels"], anchors.chosen["class_labels"][rows])
    assert len(set(rows)) > 5


def test_a_file_is_read_only_for_what_it_was_made_with(tmp_path: Path) -> None:
    path, generator = tmp_path / "anchors.safetensors", torch.Generator().manual_seed(3)
    assert read_anchors(path, {"seed": 0}, generator) is None
    write_anchors(anchors := pool(), torch.Generator().manual_seed(5), path, {"seed": 0, "teacher": "a"})
    assert [p.name for p in tmp_path.iterdir()] == ["anchors.safetensors"]
    assert read_anchors(path, {"teacher": "b", "seed": 0}, generator) is None
    assert generator.initial_seed() == 3 and torch.equal(
        generator.get_state(), torch.Generator().manual_seed(3).get_state()
    )
    found = read_anchors(path, {"teacher": "a", "seed": 0}, generator)
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(5).get_state())
    assert found is not None and torch.equal(found.signal, anchors.signal) and torch.equal(found.eps, anchors.eps)
    assert torch.equal(found.chosen["class_labels"], anchors.chosen["class_labels"])


def test_at_the_exact_student_an_anchor_costs_nothing(tmp_path: Path) -> None:
    # With the teacher's own signal in the place of the student's, only bootstrap rows are left in the loss.
    values = {"teacher": str(teacher_folder()), "output_dir": tmp_path / "run", **FAST, **POOL, "boundary_weight": 0}
    prepared = prepare(make_config(values))
    trainer = Trainer(prepared.config, prepared.teacher, prepared.student, prepared.conditions, "x")
    (tmp_path / "run").mkdir()
    assert sum(trainer.make_anchors()) == 10
    assert trainer.anchors is not None
    with torch.no_grad():
        before = trainer._loss()
        images = trainer.student(trainer.anchors.eps, None, 0.0, {})
        trainer.anchors = Anchors(trainer.anchors.eps, images, {})
        trainer.generator.manual_seed(0)
        after = trainer._loss()
    assert after < before


def test_a_resumed_run_with_anchors_is_uninterrupted_bit_by_bit(tmp_path: Path) -> None:
    settings = {**FAST, **POOL, "checkpointing_steps": 2, "show_progress": False}
    onestill.distill(teacher_folder(), tmp_path / "one", **settings)
    with pytest.raises(Interruption):
        onestill.distill(teacher_folder(), tmp_path / "two", on_step=interrupt_at(3), **settings)
    # Whether the pool is still there or is made again, it is the same one.
    (tmp_path / "two" / "anchors-0.safetensors").unlink()
    onestill.distill(teacher_folder(), tmp_path / "two", resume_from_checkpoint="latest", **settings)
    assert same_state(tmp_path / "one" / "checkpoint-4", tmp_path / "two" / "checkpoint-4")


def test_a_pool_that_was_stopped_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trainer(name: str) -> Trainer:
        own: dict[str, Any] = {"teacher": str(teacher_folder("class")), "null_class": NULL_CLASS, "guidance_scale": 2.0}
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.yaml").touch()
        own |= {"output_dir": tmp_path / name, "resume_from_checkpoint": "latest"}
        prepared = prepare(make_config({**own, **FAST, **POOL}))
        return Trainer(prepared.config, prepared.teacher, prepared.student, prepared.conditions, "x")

    whole = trainer("whole")
    assert list(whole.make_anchors()) == [4, 4, 2]
    for num in (stopped := trainer("run")).make_anchors():
        assert num == 4
        stopped.stop_requested = True
    assert stopped.anchors is None
    monkeypatch.setattr("onestill.training.trainer.ANCHOR_SECONDS", 0.0)
    killed = trainer("run").make_anchors()
    assert [next(killed) for _ in range(3)] == [4, 4, 2], (
        "what is there comes first; the second batch is written by now"
    )
    for left, expected in ((trainer("run"), [8, 2]), (trainer("run"), [10])):
        assert list(left.make_anchors()) == expected
        assert left.anchors is not None and whole.anchors is not None
        assert torch.equal(left.anchors.eps, whole.anchors.eps) and torch.equal(
            left.anchors.signal, whole.anchors.signal
        )
        assert torch.equal(left.anchors.chosen["class_labels"], whole.anchors.chosen["class_labels"])


def test_a_file_that_is_broken_is_made_again(tmp_path: Path) -> None:
    settings = {**FAST, **POOL, "checkpointing_steps": 2, "show_progress": False}
    onestill.distill(teacher_folder(), tmp_path / "one", **settings)
    with pytest.raises(Interruption):
        onestill.distill(teacher_folder(), tmp_path / "two", on_step=interrupt_at(3), **settings)
    path = tmp_path / "two" / "anchors-0.safetensors"
    whole = path.read_bytes()
    for broken in (b"", whole[: len(whole) // 2]):
        path.write_bytes(broken)
        assert read_anchors(path, {}, torch.Generator()) is None
    onestill.distill(teacher_folder(), tmp_path / "two", resume_from_checkpoint="latest", **settings)
    assert same_state(tmp_path / "one" / "checkpoint-4", tmp_path / "two" / "checkpoint-4")
    assert path.stat().st_size == len(whole)


def test_another_optimiser_takes_the_pool_that_is_there(tmp_path: Path) -> None:
    values = {"teacher": str(teacher_folder()), "output_dir": tmp_path, **FAST, **POOL}
    plain = pool_settings(make_config(values))
    assert pool_settings(make_config({**values, "learning_rate": 1e-2, "max_train_steps": 7})) == plain
    for other in ({"train_batch_size": 8}, {"num_anchors": 11}, {"seed": 1}, {"mixed_precision": "bf16"}):
        assert pool_settings(make_config({**values, **other})) != plain


def test_a_run_begun_again_with_other_settings_makes_a_pool_of_its_own(tmp_path: Path) -> None:
    settings = {**FAST, **POOL, "show_progress": False}
    other = {"guidance_scale": 3.0, "null_class": NULL_CLASS, "class_labels": [1]}
    onestill.distill(teacher_folder("class"), tmp_path / "clean", **other, **settings)
    own = {"guidance_scale": 2.0, "null_class": NULL_CLASS}
    with pytest.raises(Interruption):  # after its pool, before its first checkpoint
        onestill.distill(teacher_folder("class"), tmp_path / "run", on_step=interrupt_at(1), **own, **settings)
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    onestill.distill(teacher_folder("class"), tmp_path / "run", resume_from_checkpoint="latest", **other, **settings)
    assert same_state(tmp_path / "clean" / "checkpoint-4", tmp_path / "run" / "checkpoint-4")


def test_anchors_pull_the_student_to_the_teachers_images(tmp_path: Path) -> None:
    settings = {**FAST, "max_train_steps": 25, "train_batch_size": 8, "learning_rate": 3e-3, "show_progress": False}
    teacher = load_teacher(teacher_folder())
    eps = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(9))
    target = teacher_generator(teacher, num_steps=12, solver="midpoint")(eps, {})
    errors = []
    for fraction in (0.0, 0.5):
        run = tmp_path / f"run-{fraction}"
        onestill.distill(teacher_folder(), run, anchor_fraction=fraction, num_anchors=100, **settings)
        student = restored(run)
        with torch.no_grad():
            errors.append(float((student(eps, None, 0.0, {}) - target.clamp(-10, 10)).square().mean()))
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"anchor_fraction": 0.9, "train_batch_size": 4},
            "--boundary_fraction 0.125 and --anchor_fraction 0.9 leave no",
        ),
        ({"anchor_fraction": 1.0}, "--anchor_fraction: input should be less than 1, got 1.0"),
        ({"num_anchors": 0}, "--num_anchors: input should be greater than or equal to 1"),
        ({"num_anchor_steps": 0}, "--num_anchor_steps: input should be greater than or equal to 1"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_config({"teacher": "digits", "output_dir": "run", **settings})
