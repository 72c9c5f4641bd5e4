"""A budget: measured, planned around what is given, kept by a run that goes on; and recipes, which are settings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from runs_helpers import FAST, as_flags, assert_refused, call_cli, same_state, snapshot, teacher_folder

import onestill
from onestill.core.errors import FoundWarning
from onestill.core.settings import read_yaml
from onestill.objectives.anchors import Anchors
from onestill.objectives.boot import Boot
from onestill.objectives.registry import rows_of
from onestill.runs import plan as room
from onestill.runs.build import configured_teacher
from onestill.runs.folder import RunFolder
from onestill.runs.plan import LEAST_STEPS, Speed, fit, measure
from onestill.teachers.load import load_teacher
from onestill.training.config import DistillConfig, make_config
from onestill.training.recipes import PLANNED, RECIPES, as_budget, in_time, seconds_of_budget
from onestill.training.trainer import Trainer

SPEED = Speed({0.0: 0.1}, call=0.001, drawing=0.001, opening=5.0)
SMALL: dict[str, Any] = {name: value for name, value in FAST.items() if name not in PLANNED}


def planned(budget: str, speed: Speed = SPEED, in_file: int | None = None, **settings: Any) -> room.Plan:
    return fit(make_config({"teacher": "x", "output_dir": "run", "budget": budget, **settings}), speed, in_file)


@pytest.mark.parametrize("budget", ["60s", "30m", "8h", "2d"])
@pytest.mark.parametrize("settings", [{}, {"anchor_fraction": 0.1}, {"anchor_fraction": 0}, {"num_anchors": 400}])
def test_the_parts_of_a_plan_fill_the_budget_and_no_more(budget: str, settings: dict[str, Any]) -> None:
    found = planned(budget, **settings)
    config, steps = found.config, found.config.max_train_steps
    assert sum(found.parts.values()) == pytest.approx(seconds_of_budget(budget), abs=0.2) and config.budget is None
    assert steps * SPEED.step == pytest.approx(found.parts["steps"], abs=0.1)
    assert config.lr_warmup_steps == min(100, steps // 10) and 9 <= steps / config.validation_steps <= 10
    seconds = config.checkpointing_steps * SPEED.step
    assert config.checkpointing_steps == steps or (60 <= seconds <= 1800 and seconds <= seconds_of_budget(budget) / 9)
    assert f"{steps:,} steps of 100 ms" in found.words and f"plan for {budget}" in found.words
    if "num_anchors" in settings:
        assert found.parts["anchors"] == pytest.approx(400 * 17 * SPEED.call)
    elif config.anchor_fraction:
        rows = rows_of(config, 64)[Anchors] * steps
        item = 17 * SPEED.call  # 16 DPM-Solver++ steps, the last in two
        assert config.num_anchors <= rows and found.parts["anchors"] == pytest.approx(config.num_anchors * item)
        share = found.parts["anchors"] / (found.parts["anchors"] + found.parts["steps"])
        assert share == pytest.approx(0.2, abs=0.01) or (share < 0.2 and config.num_anchors > 0.99 * rows)
        assert f"{config.num_anchors:,} anchors" in found.words
    else:
        assert "anchors" not in found.parts


def test_what_is_given_is_kept_and_planned_around() -> None:
    usual = planned("30m", anchor_fraction=0.75)
    own = {"num_anchors": 50, "lr_warmup_steps": 7, "checkpointing_steps": 11, "validation_steps": 13}
    found = planned("30m", anchor_fraction=0.75, **own)
    assert {name: getattr(found.config, name) for name in own} == own
    assert found.config.max_train_steps > usual.config.max_train_steps
    more = planned("30m", anchor_fraction=0.75, num_anchors=40_000)
    assert more.config.max_train_steps < usual.config.max_train_steps
    doubled = planned("30m", anchor_fraction=0.75, gradient_accumulation_steps=2)
    assert doubled.config.max_train_steps == usual.config.max_train_steps, "what a step takes has been measured"


def test_prompts_that_take_too_long_are_fewer() -> None:
    slow = Speed({0.0: 0.1}, call=0.001, encoding=0.1)
    assert planned("1h", slow, 100).config.num_prompts is None
    found = planned("1h", slow, 1_000_000)
    assert found.parts["prompts"] == pytest.approx(0.2 * 0.95 * 3600, rel=0.01)
    assert found.config.num_prompts == pytest.approx(found.parts["prompts"] / 0.1, abs=1)
    kept = planned("1h", slow, 1_000_000, num_prompts=20_000)
    assert kept.config.num_prompts == 20_000 and kept.parts["prompts"] == 2000
    with pytest.raises(onestill.SettingError, match="is too short"):
        planned("1h", slow, 1_000_000, num_prompts=40_000)


def test_a_step_that_becomes_slower_counts_as_long_as_it_does() -> None:
    late = Speed({0.0: 0.1, 0.2: 0.3}, call=0.001)
    assert late.step == pytest.approx(0.2 * 0.1 + 0.8 * 0.3)
    found = planned("30m", late)
    assert f"300 ms from step {round(0.2 * found.config.max_train_steps):,} on" in found.words


def test_a_budget_that_is_too_short_says_which_is_enough() -> None:
    for settings in ({}, {"anchor_fraction": 0}, {"num_anchors": 10_000}):
        with pytest.raises(onestill.SettingError) as refused:
            planned("11s", **settings)
        text = str(refused.value)
        assert "budget='11s': is too short: a step takes 100 ms" in text and f"{LEAST_STEPS} steps" in text
        said = re.search(r"give at least (\S+?)(,|$)", text)
        assert said is not None and ("or lower num_anchors" in text) is ("num_anchors" in settings)
        enough = planned(said[1], **settings).config.max_train_steps
        assert LEAST_STEPS <= enough < 1.6 * LEAST_STEPS


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("8h", 28800), ("2d", 172800), ("1.5h", 5400)]
)
def test_budgets_are_read(text: str, seconds: float) -> None:
    assert seconds_of_budget(text) == seconds
    assert seconds <= seconds_of_budget(as_budget(seconds)) <= 1.1 * seconds
    assert in_time(seconds) in ("90 seconds", "30 minutes", "8.0 hours", "2.0 days", "90 minutes")


# On a machine


def test_measuring_changes_nothing_and_sees_objectives_that_begin_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    teacher = load_teacher(str(teacher_folder()))
    weights = {name: value.clone() for name, value in teacher.network.state_dict().items()}
    config = make_config({**SMALL, "teacher": str(teacher_folder()), "output_dir": "run", "anchor_fraction": 0.5})
    monkeypatch.setattr("onestill.objectives.anchors.Anchors.begins", classmethod(lambda *_: 0.25))
    seen: set[float] = set()
    update = Trainer.update
    monkeypatch.setattr(Trainer, "update", lambda self: seen.add(round(self._share_done(), 2)) or update(self))
    before = torch.get_rng_state()
    speed = measure(config, teacher)
    assert list(speed.steps) == [0.0, 0.25] and seen == {0.0, 0.25} and min(speed.steps.values()) > 0 < speed.call
    assert torch.equal(before, torch.get_rng_state()) and list(tmp_path.iterdir()) == []
    assert all(torch.equal(value, weights[name]) for name, value in teacher.network.state_dict().items())


def test_text_teachers_are_measured_without_their_prompts(tmp_path: Path) -> None:
    settings = {"teacher": "glyphs", "train_batch_size": 3, "guidance_scale": 3.0, "device": "cpu"}
    config = make_config({**settings, "output_dir": tmp_path, "prompt_cache_dir": tmp_path / "cache"})
    teacher = load_teacher("glyphs")
    speed = measure(config, teacher)
    assert speed.encoding > 0 and not teacher.encoders_released and list(tmp_path.iterdir()) == []


def measured(monkeypatch: pytest.MonkeyPatch, speed: Speed | None) -> None:
    def found(*_: Any) -> Speed:
        assert speed is not None, "nothing is measured"
        return speed

    monkeypatch.setattr(room, "measure", found)
    monkeypatch.setattr(room, "LEAST_STEPS", 2)


def test_a_run_with_a_budget_records_its_plan_and_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, settings = tmp_path / "run", as_flags({**SMALL, "anchor_fraction": 0.5})
    command = ("distill", teacher_folder(), "--output_dir", run, *settings)
    # So fast that all fits, and so that a few steps are left of three seconds.
    measured(monkeypatch, Speed({0.0: 0.5}, call=0.001))
    dry = call_cli(*command, "--budget", "3s", "--dry_run")
    assert dry.code == 0 and "plan for 3s" in dry.words and not run.exists()
    first = call_cli(*command, "--budget", "3s")
    assert first.code == 0 and "plan for 3s" in first.words, first
    written = read_yaml(run / "config.yaml")
    steps = written["max_train_steps"]
    assert 2 <= steps <= 6 and written["budget"] is None and RunFolder(run).facts.budget == "3s"  # type: ignore[union-attr]
    assert 2 * steps <= written["num_anchors"] < 2 * (steps + 1) and written["lr_warmup_steps"] == 0

    measured(monkeypatch, None)
    again = call_cli(*command, "--budget", "3s", "--resume_from_checkpoint", "latest")
    assert again.code == 0 and "nothing was left to train" in again.out, again
    before = snapshot(run)
    other = call_cli(*command, "--budget", "1h", "--resume_from_checkpoint", "latest")
    assert_refused(other, "--budget 1h: the run in")
    assert "was begun with 3s" in other.words and snapshot(run) == before
    longer = ("distill", "--config", run / "config.yaml", "--resume_from_checkpoint", "latest")
    assert call_cli(*longer, "--max_train_steps", steps + 2).code == 0
    assert RunFolder(run).facts.budget == "3s"  # type: ignore[union-attr]
    # By its configuration it is the same run elsewhere, without a measurement.
    assert call_cli("distill", "--config", run / "config.yaml", "--output_dir", tmp_path / "two").code == 0
    assert same_state(run / f"checkpoint-{steps + 2}", tmp_path / "two" / f"checkpoint-{steps + 2}")


def test_a_run_that_was_killed_before_its_first_checkpoint_keeps_its_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(monkeypatch, Speed({0.0: 0.5}, call=0.001))
    own = {**SMALL, "anchor_fraction": 0.5, "show_progress": False, "budget": "3s"}

    def killed(*_: Any) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Boot, "batch", killed)
        with pytest.raises(RuntimeError, match="killed"):
            onestill.distill(teacher_folder(), tmp_path / "run", **own)
    measured(monkeypatch, None)
    steps = RunFolder(tmp_path / "run").config.max_train_steps
    result = onestill.distill(teacher_folder(), tmp_path / "run", resume_from_checkpoint="latest", **own)
    assert result.step == steps and result.pipeline is not None
    onestill.distill(teacher_folder(), tmp_path / "none", max_train_steps=2, num_anchors=4, **{**own, "budget": None})
    with pytest.raises(onestill.SettingError, match="was begun without one"):
        onestill.distill(teacher_folder(), tmp_path / "none", resume_from_checkpoint="latest", **own)


def test_too_short_a_budget_is_one_line_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "measure", lambda *_: Speed({0.0: 60.0}, call=1.0))
    for command in ("distill", "inspect"):
        outcome = call_cli(
            command, teacher_folder(), "--output_dir", tmp_path / "run", "--budget", "10m", "--anchor_fraction", 0
        )
        assert_refused(outcome, "--budget 10m: is too short: a step takes 60 seconds on this machine")
        assert "give at least 115m" in outcome.words and list(tmp_path.iterdir()) == []


def test_inspect_shows_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "measure", lambda *_: Speed({0.0: 0.1}, call=0.001))
    outcome = call_cli("inspect", teacher_folder(), "--budget", "30m", "--anchor_fraction", 0.75, "--device", "cpu")
    assert outcome.code == 0 and "plan for 30m, by the speed of this machine as it is now" in " ".join(
        outcome.out.split()
    )
    found = onestill.inspect_teacher(teacher_folder(), budget="30m", anchor_fraction=0.75, device="cpu")
    assert f"{found.max_train_steps:,} steps of 100 ms" in found.plan and f"{found.num_anchors:,} anchors" in found.plan
    assert onestill.inspect_teacher(teacher_folder(), device="cpu").plan == ""


# What wins over what


def test_a_recipe_is_the_settings_it_stands_for(tmp_path: Path) -> None:
    boot = make_config({"teacher": "x", "output_dir": "run", "recipe": "boot"})
    paper = {"solver": "ddim", "bootstrap_weight": "inverse_rho", "time_sampling": "uniform", "anchor_fraction": 0.0}
    assert {name: getattr(boot, name) for name in paper} == paper and boot.boundary_weight > 0
    assert set(RECIPES["boot"]) <= set(DistillConfig.model_fields)
    default, usual = (make_config({"teacher": "x", "output_dir": "run", **r}) for r in ({"recipe": "default"}, {}))
    assert default == usual
    # By hand wins; over a file's method the recipe that is asked for beside it does, and the file's own settings stay.
    assert make_config({"teacher": "x", "output_dir": "run", "recipe": "boot", "solver": "heun"}).solver == "heun"
    path = tmp_path / "c.yaml"
    path.write_text("teacher: x\noutput_dir: run\nrecipe: boot\nsolver: midpoint\nlearning_rate: 0.5\n")
    assert make_config({}, path).solver == "midpoint" and make_config({}, path).bootstrap_weight == "inverse_rho"
    again = make_config({"recipe": "boot"}, path)
    assert again.solver == "ddim" and again.learning_rate == 0.5
    assert make_config({"recipe": "default"}, path).solver == usual.solver


def test_flags_of_length_win_over_a_files(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("teacher: x\noutput_dir: run\nbudget: 30m\nnum_prompts: 9\n")
    assert (made := make_config({"max_train_steps": 7}, path)).budget is None and made.max_train_steps == 7
    path.write_text("teacher: x\noutput_dir: run\nmax_train_steps: 7\nnum_anchors: 9\nnum_prompts: 9\n")
    with pytest.warns(FoundWarning, match="budget plans max_train_steps, num_anchors anew; give them beside it"):
        made = make_config({"budget": "30m"}, path)
    assert made.budget == "30m" and not {"max_train_steps", "num_anchors"} & made.model_fields_set
    assert made.num_prompts == 9, "which bounds the cache on the disk"


def test_a_budget_in_the_file_keeps_what_stands_beside_it(tmp_path: Path) -> None:
    (path := tmp_path / "c.yaml").write_text("teacher: x\noutput_dir: run\nbudget: 30m\nnum_anchors: 9\n")
    assert make_config({}, path).num_anchors == 9


@pytest.mark.parametrize("given", ["budget: 2", "budget: 2.5", "budget: 1h30m"])
def test_a_budget_that_is_no_time_says_how_to_write_one(given: str, tmp_path: Path) -> None:
    (path := tmp_path / "c.yaml").write_text(f"teacher: x\noutput_dir: run\n{given}\n")
    with pytest.raises(ValueError, match="is no time; give a number with s, m, h or d, such as 30m"):
        make_config({}, path)


def test_a_pool_given_by_hand_is_named_where_it_is_what_takes_long() -> None:
    config = make_config({"teacher": "x", "output_dir": "y", "budget": "2m", "num_anchors": 100_000})
    with pytest.raises(ValueError, match="for 100,000 anchors; give at least .*, or lower num_anchors"):
        fit(config, Speed({0.0: 0.1}, call=0.001))


def test_many_passes_of_a_step_are_measured_as_one(tmp_path: Path) -> None:
    own = {"teacher": str(teacher_folder()), "output_dir": tmp_path / "run", "train_batch_size": 4, "device": "cpu"}
    one, many = (
        measure(config := make_config({**own, "gradient_accumulation_steps": num}), configured_teacher(config))
        for num in (1, 500)
    )
    assert 100 < many.step / one.step < 2500, "a few of 500 passes, timed, would take minutes"


def test_a_boot_run_records_what_it_is(tmp_path: Path) -> None:
    own = {name: value for name, value in FAST.items() if name not in RECIPES["boot"]}
    onestill.distill(teacher_folder(), tmp_path / "run", recipe="boot", show_progress=False, **own)
    written = read_yaml(tmp_path / "run" / "config.yaml")
    assert written["recipe"] == "boot" and {name: written[name] for name in RECIPES["boot"]} == dict(RECIPES["boot"])
