"""The loop: what is drawn, what is saved, what comes back, and how it ends."""

import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from runs_helpers import (
    FAST,
    NULL_CLASS,
    Interruption,
    as_flags,
    call_cli,
    go_on_with,
    interrupt_at,
    same_state,
    snapshot,
    start_cli,
    teacher_folder,
    wait_for,
)
from safetensors.torch import load_file
from torch import Tensor

import onestill
from onestill.core.settings import read_yaml
from onestill.runs.build import Run, build_run
from onestill.runs.distill import RunResult
from onestill.runs.load import load_student
from onestill.training.checkpoint import list_checkpoints, read_checkpoint, step_of, write_checkpoint
from onestill.training.config import make_config
from onestill.training.loss import regression
from onestill.training.trainer import NonFiniteLossError, Trainer
from onestill.training.watch import StepLog, residual_by_time

GUIDANCE = {"null_class": NULL_CLASS, "guidance_scale_min": 1.0, "guidance_scale_max": 3.0}


def make_trainer(tmp_path: Path, kind: str = "plain", **settings: Any) -> tuple[Trainer, Run]:
    values = {**FAST, "teacher": str(teacher_folder(kind)), "output_dir": tmp_path / "run", **settings}
    prepared = build_run(make_config(values))
    trainer = Trainer(prepared.config, prepared.student, prepared.conditions, prepared.fingerprints)
    return trainer, prepared


def distil(output_dir: Path, kind: str = "plain", **settings: Any) -> RunResult:
    return onestill.distill(teacher_folder(kind), output_dir, show_progress=False, **{**FAST, **settings})


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def parameters(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.student.named_parameters()}


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    assert one and set(one) == set(two)
    return all(torch.equal(value, two[name]) for name, value in one.items())


# Every choice runs


@pytest.mark.parametrize(
    "choice",
    [
        {"time_sampling": "uniform", "solver": "ddim", "bootstrap_weight": "inverse_rho"},
        {"time_sampling": "s_first", "solver": "heun", "bootstrap_weight": "velocity"},
        {"time_sampling": "progressive", "solver": "midpoint", "bootstrap_weight": "none"},
        {"boundary_weight": 0},
        {"ema_width": 0},
        {"ema_target_decay": 0.9},
        {"anchor_fraction": 0.5, "num_anchors": 6, "num_anchor_steps": 2, "boundary_weight": 0},
        {"gradient_checkpointing": True},
        {"thresholding": "dynamic", "threshold_limit": 2},
        {"t_min": 0.1, "t_max": 0.9, "lr_scheduler": "linear"},
        {"lr_scheduler": "cosine", "adam_weight_decay": 0.1},
    ],
    ids=str,
)
def test_every_choice_trains(tmp_path: Path, choice: dict[str, Any]) -> None:
    trainer, _ = make_trainer(tmp_path, max_train_steps=2, **choice)
    before = parameters(trainer)
    trainer.config.output_dir.mkdir()
    assert sum(num for _, num in trainer.prepare()) == choice.get("num_anchors", 0)
    logs = list(trainer.steps())
    assert [log.step for log in logs] == [1, 2]
    assert all(math.isfinite(log.loss) and log.grad_norm > 0 for log in logs)
    assert not equal(before, parameters(trainer))


def test_averages_are_kept_only_where_asked(tmp_path: Path) -> None:
    def groups(**settings: Any) -> set[str]:
        trainer, _ = make_trainer(tmp_path / str(settings), max_train_steps=2, **settings)
        return set(read_checkpoint(list(trainer.steps())[-1].checkpoint or Path()).tensors)

    always = {"student", "student-optimizer", "random"}
    assert groups(ema_width=0) == always
    assert groups(ema_width=0, ema_target_decay=0.5) == always | {"student-target_ema"}
    assert groups(ema_width=0.2, num_ema_snapshots=0) == always | {"student-ema"}
    assert groups(ema_width=0.2) == always | {"student-ema", "student-ema_beside"}


def test_the_averages_follow_the_weights(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path, max_train_steps=6, ema_width=0.2, ema_target_decay=0.5, learning_rate=1e-2)
    expected: dict[str, Tensor] = {}
    for log in trainer.steps():
        # Of the target: the first update copies, then its decay is the same.
        for name, value in parameters(trainer).items():
            n = log.step - 1
            old = expected.get(name, value)
            expected[name] = old + (1 - 0.5) * (value - old) if n else value
    kept = trainer.trained[0].averages
    found = dict(zip(expected, kept["target_ema"].shadow_params, strict=True))
    assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in expected.items())
    assert kept["ema"].optimization_step == 6
    with trainer.trained[0].averaged():
        assert equal(parameters(trainer), dict(zip(expected, kept["ema"].shadow_params, strict=True)))
    assert not equal(parameters(trainer), dict(zip(expected, kept["ema"].shadow_params, strict=True)))


def test_the_average_is_what_the_target_uses(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path, ema_target_decay=0.5)
    (boot,) = trainer.objectives
    follower = boot.context.target_student
    x, t = torch.randn(3, 1, 8, 8), torch.full((3,), 0.5, dtype=torch.float64)
    assert follower is not trainer.student
    assert torch.equal(follower(x, None, t, {}), trainer.student(x, None, t, {}))
    for value in trainer.trained[0].averages["target_ema"].shadow_params:
        value.mul_(1.1)
    assert not torch.equal(follower(x, None, t, {}), trainer.student(x, None, t, {}))
    target = boot.batch(4).target
    for value in trainer.trained[0].averages["target_ema"].shadow_params:
        value.mul_(1.1)
    trainer.generator.manual_seed(trainer.config.seed)
    assert not torch.equal(boot.batch(4).target, target)


def test_the_teacher_is_never_touched(tmp_path: Path) -> None:
    trainer, prepared = make_trainer(tmp_path, "class", learning_rate=1e-2, **GUIDANCE)
    network: Any = prepared.teacher.unguided.network
    before = prepared.teacher.unguided.fingerprint()
    list(trainer.steps())
    assert prepared.teacher.unguided.fingerprint() == before
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())
    mine = {p.data_ptr() for p in trainer.student.parameters()}
    assert mine and not mine & {p.data_ptr() for p in network.parameters()}


TOY = {
    "max_train_steps": 60, "train_batch_size": 8, "learning_rate": 1e-2, "lr_scheduler": "cosine", "delta": 0.25,
    "solver": "ddim", "ema_width": 0, "num_teacher_steps": 4, "num_validation_images": 16, "checkpointing_steps": 1000,
}  # fmt: skip


def test_the_loss_falls(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path, bootstrap_weight="none", **TOY)
    losses = [log.loss for log in trainer.steps()]
    # 0.35 to 0.51 on six seeds.
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_the_student_nears_the_teacher(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path, bootstrap_weight="velocity", **TOY)
    _, before = trainer.validate()
    list(trainer.steps())
    # 0.55 to 0.58 on three seeds.
    assert trainer.validate()[1] < 0.75 * before


def test_the_schedule_of_the_learning_rate_ends_where_it_says(tmp_path: Path) -> None:
    trainer, _ = make_trainer(
        tmp_path, max_train_steps=6, lr_scheduler="linear", lr_warmup_steps=2, gradient_accumulation_steps=2
    )
    rates = [log.learning_rate / 1e-4 for log in trainer.steps()]
    assert rates == pytest.approx([0, 0.5, 1, 0.75, 0.5, 0.25])
    assert trainer.trained[0].learning_rate == pytest.approx(0)


def test_accumulated_gradients_are_the_mean_over_the_forward_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same draws in each pass, two passes make the very step of one; the sum of both halves is exact."""

    def run(num: int) -> dict[str, Tensor]:
        trainer, _ = make_trainer(tmp_path / str(num), gradient_accumulation_steps=num, max_train_steps=2)
        draw = trainer._losses

        def again() -> Any:
            trainer.generator.manual_seed(trainer.progress.step)
            return draw()

        monkeypatch.setattr(trainer, "_losses", again)
        list(trainer.steps())
        return parameters(trainer)

    assert equal(run(1), run(2))


def test_an_optimiser_step_counts_all_its_images(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path, gradient_accumulation_steps=3, max_train_steps=2)
    for log in trainer.steps():
        assert log.images_per_second * log.seconds_per_step == pytest.approx(3 * FAST["train_batch_size"])


# Random numbers


def test_training_depends_on_the_seed_and_on_no_other_random_state(tmp_path: Path) -> None:
    def run(name: str, state: int, **settings: Any) -> dict[str, Tensor]:
        torch.manual_seed(state)
        trainer, _ = make_trainer(tmp_path / name, "class", **GUIDANCE, **settings)
        for _ in trainer.steps():
            torch.rand(3)
        return parameters(trainer)

    first = run("a", 1)
    assert equal(first, run("b", 2))
    assert not equal(first, run("c", 1, seed=1))


def test_looking_changes_nothing(tmp_path: Path) -> None:
    def run(name: str, **watching: Any) -> dict[str, Tensor]:
        trainer, _ = make_trainer(tmp_path / name, **watching)
        list(trainer.steps())
        return parameters(trainer)

    often = run("often", validation_steps=1, logging_steps=1, checkpointing_steps=1, num_time_bins=3)
    assert equal(often, run("never"))


def test_the_global_random_state_is_left_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    distil(tmp_path / "run", "class", max_train_steps=2, **GUIDANCE)
    assert torch.equal(torch.get_rng_state(), before)


# Interrupted and resumed


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("plain", {}),
        ("plain", {"ema_width": 0, "gradient_accumulation_steps": 2}),
        (
            "class",
            {
                **GUIDANCE,
                "ema_target_decay": 0.9,
                "gradient_accumulation_steps": 2,
                "lr_scheduler": "cosine",
                "lr_warmup_steps": 2,
                "time_sampling": "progressive",
            },
        ),
    ],
    ids=["default", "no average", "everything"],
)
def test_resumed_is_uninterrupted_bit_by_bit(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    settings = {**settings, "max_train_steps": 6, "checkpointing_steps": 3, "logging_steps": 1, "learning_rate": 1e-2}
    straight = distil(tmp_path / "straight", kind, **settings)
    with pytest.raises(Interruption):
        distil(tmp_path / "resumed", kind, on_step=interrupt_at(5), **settings)
    torch.manual_seed(12345)  # a new process has another state
    resumed = distil(tmp_path / "resumed", kind, resume_from_checkpoint="latest", **settings)

    assert resumed.step == straight.step == 6
    assert same_state(tmp_path / "straight" / "checkpoint-6", tmp_path / "resumed" / "checkpoint-6")
    weights = "pipeline/unet/diffusion_pytorch_model.safetensors"
    assert equal(load_file(tmp_path / "straight" / weights), load_file(tmp_path / "resumed" / weights))
    # The log tells of each step once, although steps 4 and 5 were done twice.
    keys = ("step", "loss", "grad_norm", "learning_rate", "residual_by_time")
    rows = [[{key: row[key] for key in keys} for row in metrics(tmp_path / name)] for name in ("straight", "resumed")]
    assert [row["step"] for row in rows[0]] == [1, 2, 3, 4, 5, 6]
    assert rows[0] == rows[1]


def test_a_longer_run_is_the_long_run_bit_by_bit(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"learning_rate": 1e-2, "lr_warmup_steps": 2, "anchor_fraction": 0.25, "num_anchors": 8}
    distil(tmp_path / "straight", max_train_steps=6, **settings)
    distil(tmp_path / "longer", max_train_steps=4, **settings)
    (tmp_path / "longer" / "pipeline" / "README.md").write_text("of the shorter one")
    (tmp_path / "longer" / "evaluation").mkdir()
    (tmp_path / "longer" / "evaluation" / "report.json").write_text("of the shorter one")
    result = distil(tmp_path / "longer", max_train_steps=6, resume_from_checkpoint="latest", **settings)
    assert (result.step, result.num_trained) == (6, 2)
    assert (tmp_path / "longer" / "evaluation-4" / "report.json").read_text() == "of the shorter one"
    assert not (tmp_path / "longer" / "evaluation").exists(), "nobody takes its numbers for the longer run's"
    assert same_state(tmp_path / "straight" / "checkpoint-6", tmp_path / "longer" / "checkpoint-6")
    weights = "pipeline/unet/diffusion_pytorch_model.safetensors"
    assert equal(load_file(tmp_path / "straight" / weights), load_file(tmp_path / "longer" / weights))
    assert "6 steps of 4 images" in (tmp_path / "longer" / "pipeline" / "README.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="max_train_steps: 6 -> 4.*only a run with a constant"):
        distil(tmp_path / "longer", max_train_steps=4, resume_from_checkpoint="latest", **settings)


def test_a_longer_run_that_is_cut_is_not_taken_for_the_short_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, again = tmp_path / "run", {"max_train_steps": 8, "checkpointing_steps": 2, "resume_from_checkpoint": "latest"}
    distil(run, checkpointing_steps=2)
    short = load_file(run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(Interruption):
        distil(run, on_step=interrupt_at(7), **again)
    # What is there is of the longer run, up to its last checkpoint; the short one is kept under another name.
    assert equal(load_file(run / "pipeline-4" / "unet" / "diffusion_pytorch_model.safetensors"), short)
    assert not (run / "pipeline").exists() and load_student(run).pipeline is None
    assert load_student(run / "pipeline-4").pipeline == run / "pipeline-4"
    with monkeypatch.context() as patch:
        patch.setattr("onestill.runs.distill.export_student", interrupt_at(0))
        with pytest.raises((Interruption, TypeError)):
            distil(run, **again)
    result = distil(run, **again)
    assert (result.step, result.num_trained) == (8, 0) and result.export_error is not None
    assert "8 steps of 4 images" in (run / "pipeline" / "README.md").read_text(encoding="utf-8")
    assert not equal(load_file(run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"), short)
    assert distil(run, **again).export_error is None, "it is finished now"


def test_a_longer_run_keeps_the_warm_up_it_began_with(tmp_path: Path) -> None:
    for scheduler in ("constant", "constant_with_warmup"):
        straight, longer = tmp_path / f"straight-{scheduler}", tmp_path / f"longer-{scheduler}"
        distil(straight, max_train_steps=30, lr_warmup_steps=1, lr_scheduler=scheduler)
        distil(longer, max_train_steps=10, lr_scheduler=scheduler)
        distil(longer, max_train_steps=30, lr_scheduler=scheduler, resume_from_checkpoint="latest")
        assert same_state(straight / "checkpoint-30", longer / "checkpoint-30")
        assert read_yaml(longer / "config.yaml")["lr_warmup_steps"] == 1
    with pytest.raises(ValueError, match="lr_warmup_steps: 1 -> 7"):
        distil(longer, max_train_steps=40, lr_warmup_steps=7, resume_from_checkpoint="latest")


@pytest.mark.parametrize("settings", [{"lr_scheduler": "cosine"}, {"time_sampling": "progressive"}])
def test_a_run_whose_steps_know_its_length_does_not_become_longer(tmp_path: Path, settings: dict[str, Any]) -> None:
    distil(tmp_path / "run", lr_warmup_steps=1, **settings)
    before = snapshot(tmp_path / "run")
    with pytest.raises(ValueError, match="max_train_steps: 4 -> 6.*only a run with a constant lr_scheduler"):
        distil(tmp_path / "run", lr_warmup_steps=1, max_train_steps=6, resume_from_checkpoint="latest", **settings)
    assert snapshot(tmp_path / "run") == before


def test_resume_of_a_finished_run_only_exports(tmp_path: Path) -> None:
    first = distil(tmp_path / "run")
    again = distil(tmp_path / "run", resume_from_checkpoint="latest")
    assert again.step == first.step == 4 and again.pipeline == first.pipeline
    assert again.checkpoint == tmp_path / "run" / "checkpoint-4"


def test_resume_from_a_named_checkpoint_into_a_new_folder(tmp_path: Path) -> None:
    straight = distil(tmp_path / "a", checkpointing_steps=2)
    resumed = distil(tmp_path / "b", checkpointing_steps=2, resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert straight.checkpoint is not None and resumed.checkpoint is not None
    assert same_state(straight.checkpoint, resumed.checkpoint)
    assert not (tmp_path / "b" / "checkpoint-2").exists()


def test_resume_takes_the_name_of_a_checkpoint_of_the_run(tmp_path: Path) -> None:
    with pytest.raises(Interruption):
        distil(tmp_path / "run", checkpointing_steps=2, on_step=interrupt_at(3))
    assert distil(tmp_path / "run", checkpointing_steps=2, resume_from_checkpoint="checkpoint-2").step == 4


def test_resume_latest_without_a_checkpoint_starts_from_the_beginning(tmp_path: Path) -> None:
    result = distil(tmp_path / "run", resume_from_checkpoint="latest")
    assert result.step == 4
    straight = distil(tmp_path / "straight")
    assert straight.checkpoint is not None and result.checkpoint is not None
    assert same_state(straight.checkpoint, result.checkpoint)


def test_corrupt_newest_checkpoint_falls_back_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {**FAST, "checkpointing_steps": 1}
    with pytest.raises(Interruption):
        distil(tmp_path / "run", on_step=interrupt_at(3), **settings)
    path = tmp_path / "run" / "checkpoint-3" / "student-optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    onestill.distill(teacher_folder(), tmp_path / "run", resume_from_checkpoint="latest", **settings)
    said = capsys.readouterr().err
    assert "checkpoint-3 is corrupt" in said and "falling back to the one before" in said
    assert f"resuming from {tmp_path / 'run' / 'checkpoint-2'}" in said
    straight = distil(tmp_path / "straight", **settings)
    assert straight.checkpoint is not None
    assert same_state(straight.checkpoint, tmp_path / "run" / "checkpoint-4")


LONG = {**FAST, "max_train_steps": 45, "train_batch_size": 2, "checkpointing_steps": 3, "ema_target_decay": 0.9}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint at the end of `LONG`, never interrupted."""
    result = distil(tmp_path_factory.mktemp("straight") / "run", **LONG)
    assert result.checkpoint is not None
    return result.checkpoint


def go_on(run: Path) -> Path:
    outcome = call_cli(
        "distill", "--teacher", teacher_folder(), "--output_dir", run, "--resume_from_checkpoint", "latest", *as_flags(LONG)
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    return run / "checkpoint-45"


def test_killed_and_resumed_is_uninterrupted_bit_by_bit(tmp_path: Path, uninterrupted: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    process = start_cli(log, "distill", "--teacher", teacher_folder(), "--output_dir", run, *as_flags(LONG))
    # At a moment that no one chose: within the steps after one of the first checkpoints, often inside of a write.
    wait_for(run / f"checkpoint-{random.SystemRandom().randrange(3, 27, 3)}", process, log)
    time.sleep(random.SystemRandom().uniform(0, 0.05))
    process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    found = list_checkpoints(run)
    assert found and all(read_checkpoint(folder).values["progress"]["step"] == step_of(folder) for folder in found)
    assert same_state(go_on(run), uninterrupted)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_signals_save_and_exit_cleanly(tmp_path: Path, uninterrupted: Path, number: int, code: int) -> None:
    run, log = tmp_path / "my run", tmp_path / "log"
    # No checkpoint is due before the end: what is there afterwards was written because of the signal.
    settings = {**LONG, "checkpointing_steps": 1000, "logging_steps": 1}
    process = start_cli(log, "distill", "--teacher", teacher_folder(), "--output_dir", run, *as_flags(settings))
    wait_for(run / "logs" / "metrics.jsonl", process, log)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(60)
    said = log.read_text(encoding="utf-8")
    assert process.exitcode == code, said
    assert "Traceback" not in said and "Error" not in said
    (folder,) = list_checkpoints(run)
    assert 0 < step_of(folder) < 45
    assert f"stopped at step {step_of(folder)}; state saved in {folder}. Go on with: onestill distill" in said
    assert not (run / "pipeline").exists()
    # What is printed works as it stands: without the flags of before, and with a space in the path.
    outcome = call_cli(*go_on_with(said))
    assert outcome.code == 0, outcome.err
    assert same_state(run / "checkpoint-45", uninterrupted)


def test_all_processes_stop_after_the_same_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that reached another process only stops this one too, or both would wait for each other."""
    trainer, _ = make_trainer(tmp_path)
    others = iter([0.0, 0.0, 1.0])
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", property(lambda _: 2))
    monkeypatch.setattr(trainer.accelerator, "reduce", lambda asked, _: asked + next(others))
    assert [log.step for log in trainer.steps()] == [1, 2] and trainer.stop_requested


def test_handlers_of_signals_are_put_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    distil(tmp_path / "run", max_train_steps=2)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# Losses that are not finite


def spoil(monkeypatch: pytest.MonkeyPatch, calls: set[int] | range) -> None:
    """Make the loss of these forward passes, counted from 1, NaN."""
    real, count = regression, 0

    def spoiled(*args: Any) -> Tensor:
        nonlocal count
        count += 1
        return real(*args) * (math.nan if count in calls else 1)

    monkeypatch.setattr("onestill.training.trainer.regression", spoiled)


def test_a_nonfinite_loss_is_skipped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, {2, 3, 6})
    trainer, _ = make_trainer(
        tmp_path, max_train_steps=8, max_nonfinite_steps=3, ema_target_decay=0.5, logging_steps=1, learning_rate=1e-2,
        lr_scheduler="linear",
    )  # fmt: skip
    weights, averages, state = [parameters(trainer)], [], []
    for log in trainer.steps():
        weights.append(parameters(trainer))
        kept = trainer.trained[0].averages
        averages.append(kept["ema"].optimization_step)
        state.append(kept["target_ema"].optimization_step)
        assert log.nonfinite_steps == [0, 1, 2, 2, 2, 3, 3, 3][log.step - 1]
    # Step 1 is at learning rate 0, the first of the warm-up.
    unchanged = [equal(a, b) for a, b in pairwise(weights)]
    assert unchanged == [True, True, True, False, False, True, False, False]
    assert averages == state == [1, 1, 1, 2, 3, 3, 4, 5]
    assert all(value.isfinite().all() for value in weights[-1].values())
    assert trainer.trained[0].learning_rate == pytest.approx(0)
    # Every line is JSON, which has no NaN.
    rows = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "run/logs/metrics.jsonl").open()]
    assert [row["nonfinite_steps"] for row in rows] == [0, 1, 2, 2, 2, 3, 3, 3]
    assert rows[1]["loss"] == "nan"


def test_one_bad_pass_of_several_spoils_the_step_and_not_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, {3})
    trainer, _ = make_trainer(tmp_path, gradient_accumulation_steps=2, lr_scheduler="constant")
    weights = [parameters(trainer)]
    weights += [parameters(trainer) for _ in trainer.steps()]
    assert [equal(a, b) for a, b in pairwise(weights)] == [False, True, False, False]


def test_too_many_in_a_row_stop_the_run_with_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, range(4, 100))
    run = tmp_path / "run"
    arguments = [
        "distill", "--teacher", teacher_folder(), "--output_dir", run,
        *as_flags({**FAST, "max_train_steps": 50, "checkpointing_steps": 3, "max_nonfinite_steps": 4}),
    ]  # fmt: skip
    outcome = call_cli(*arguments)
    assert outcome.code == 1
    assert "not finite 4 times in a row, up to step 7" in outcome.words
    assert "--learning_rate" in outcome.words and "Traceback" not in outcome.err
    assert f"the last good checkpoint is {run / 'checkpoint-6'}" in outcome.words
    assert not (run / "pipeline").exists()
    good = read_checkpoint(run / "checkpoint-6")
    assert all(value.isfinite().all() for value in good.tensors["student"].values())

    # Going on from there into the same wall names the checkpoint that was gone on from.
    outcome = call_cli(*arguments, "--resume_from_checkpoint", "latest")
    assert outcome.code == 1 and f"the last good checkpoint is {run / 'checkpoint-6'}" in outcome.words


def test_a_disk_that_fills_up_stops_the_run_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, save = tmp_path / "run", Trainer.save

    def full(trainer: Trainer) -> Path:
        if trainer.progress.step > 2:
            raise OSError(28, "No space left on device")
        return save(trainer)

    monkeypatch.setattr(Trainer, "save", full)
    flags = as_flags({**FAST, "checkpointing_steps": 2})
    outcome = call_cli("distill", "--teacher", teacher_folder(), "--output_dir", run, *flags)
    assert outcome.code == 1 and "Traceback" not in outcome.err
    assert f"stopped: the run in {run} cannot be written: no space left on the disk" in outcome.words
    assert "what was saved is kept" in outcome.words
    monkeypatch.undo()
    assert call_cli(*go_on_with(outcome.err)).code == 0


def test_without_a_checkpoint_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, range(1, 100))
    with pytest.raises(NonFiniteLossError, match="not finite 2 times in a row, up to step 2; no checkpoint"):
        distil(tmp_path / "run", max_nonfinite_steps=2)


# What is shown


def test_metrics_tell_of_the_run(tmp_path: Path) -> None:
    distil(tmp_path / "run", max_train_steps=7, logging_steps=3, num_time_bins=5, train_batch_size=16)
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [3, 6, 7]
    known = {field.name for field in fields(StepLog)}
    for row in rows:
        assert set(row) <= known
        assert {"loss", "grad_norm", "learning_rate", "seconds_per_step", "images_per_second"} <= set(row)
        bins = row["residual_by_time"]
        assert len(bins) == 5 and any(value is not None for value in bins)
        assert all(value is None or value >= 0 for value in bins)
    assert rows[-1]["validation_rms"] > 0 and Path(rows[-1]["picture"]).is_file()


def test_residuals_are_those_of_the_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bin's number is the mean over all bootstrap rows since the last line, in units of f."""
    seen: list[tuple[Tensor, Tensor]] = []
    count = residual_by_time

    def keep(residuals: Tensor, rho: Tensor, s: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        seen.append((residuals.detach().double() / rho**2, s))
        return count(residuals, rho, s, *rest)

    monkeypatch.setattr("onestill.training.watch.residual_by_time", keep)
    trainer, _ = make_trainer(tmp_path, max_train_steps=3, logging_steps=3, num_time_bins=2, train_batch_size=16)
    (log,) = [log for log in trainer.steps() if log.residual_by_time]
    assert len(seen) == 3 and all(len(values) == 16 - 2 for values, _ in seen)
    values, times = (torch.cat(parts) for parts in zip(*seen, strict=True))
    expected = [values[times < 0.5].mean().item(), values[times >= 0.5].mean().item()]
    assert log.residual_by_time == pytest.approx(expected)


def test_pictures_grow_with_the_run(tmp_path: Path) -> None:
    distil(tmp_path / "run", validation_steps=2, max_train_steps=5)
    found = sorted((tmp_path / "run" / "samples").iterdir())
    assert [path.name for path in found] == ["step-000002.png", "step-000004.png", "step-000005.png"]
    for path in found:
        with Image.open(path) as picture:
            picture.load()
            assert picture.width > 100 and picture.height > 100


def test_tensorboard_is_written_on_request(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    distil(tmp_path / "run", report_to="tensorboard", logging_steps=2, num_time_bins=2)
    (path,) = (tmp_path / "run" / "logs").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(path.parent))
    events.Reload()
    assert {"loss", "learning_rate", "validation_rms"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["samples"]
    assert [event.step for event in events.Scalars("loss")] == [2, 4]
    assert any(name.startswith("residual/") for name in events.Tags()["scalars"])
    # The others are written all the same.
    assert len(metrics(tmp_path / "run")) == 2


# Precision and processes


def test_bf16_trains_and_exports(tmp_path: Path) -> None:
    result = distil(tmp_path / "run", mixed_precision="bf16", gradient_accumulation_steps=2)
    # The export is checked in full precision; bf16 would differ by 1e-2.
    assert result.export_error is not None and result.export_error < 1e-5
    assert result.checkpoint is not None
    tensors = read_checkpoint(result.checkpoint).tensors
    assert all(value.dtype == torch.float32 for value in tensors["student"].values())
    full = distil(tmp_path / "full", gradient_accumulation_steps=2)
    assert full.checkpoint is not None and not same_state(result.checkpoint, full.checkpoint)


def test_two_processes_train_one_student(tmp_path: Path) -> None:
    """`torchrun`, as a user starts it: one checkpoint, one log, one export; resumed with as many, refused with fewer."""
    run = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    settings = {**FAST, "max_train_steps": 3, "logging_steps": 1, "ema_width": "0.09,0.1"}
    arguments = ["distill", "--teacher", str(teacher_folder()), "--output_dir", str(run), *as_flags(settings)]
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port),
            "-m", "onestill", *arguments,
        ],
        capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.count("loads with plain diffusers") == 1
    assert done.stdout.count("distance: ") == done.stdout.count("what helps most") == 1, (
        "the first process alone says it"
    )
    assert done.stdout.count("average: width 0.") == 1
    (folder,) = list_checkpoints(run)
    checkpoint = read_checkpoint(folder)
    assert [width for width, _ in checkpoint.values["ema_distances"]] == [0.09, 0.1]
    assert checkpoint.values["num_processes"] == 2
    # Each process draws its own noise.
    states = checkpoint.tensors["random"]
    assert set(states) == {"0", "1"} and not torch.equal(states["0"], states["1"])
    assert [row["step"] for row in metrics(run)] == [1, 2, 3]
    assert onestill.sample(run, num_images=2).shape == (2, 1, 8, 8)

    outcome = call_cli(*arguments, "--resume_from_checkpoint", "latest")
    assert outcome.code == 2 and "was trained by 2 processes, not 1" in outcome.words


def test_a_checkpoint_of_another_student_is_refused(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path)
    checkpoint = read_checkpoint(list(trainer.steps())[-1].checkpoint or Path())
    checkpoint.tensors["student"].popitem()
    other, _ = make_trainer(tmp_path / "other")
    with pytest.raises(ValueError, match="not this student's"):
        other.restore(read_checkpoint(write_checkpoint(tmp_path / "cut", 4, checkpoint)))
