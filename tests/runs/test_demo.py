"""The demo: how long it takes is measured and said first, and decides how much of it is done."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs_helpers import same_state

from onestill.core.settings import read_yaml
from onestill.objectives.anchors import usual_anchors
from onestill.runs import demo
from onestill.runs.demo import DEMOS, Plan, plan
from onestill.runs.plan import Speed
from onestill.training.config import make_config

IDLE = {"glyphs": Speed({0.0: 0.28}, 0.0043), "digits": Speed({0.0: 0.136}, 0.00034)}
"""By the whole demo's time on two idle cores (docs/results.md), and by how a step compares with a call."""


def planned(teacher: str, times: float = 1, steps: int | None = None, images: int | None = None) -> Plan:
    chosen, speed = DEMOS[teacher], IDLE[teacher]
    config = make_config({"teacher": teacher, "output_dir": "demo", **chosen.distillation})
    taken = {name: getattr(config, name) for name in ("num_anchors", "num_anchor_steps", "anchor_solver")}
    settings = {**chosen.distillation, **taken}
    return plan(chosen, settings, Speed({0.0: times * speed.step}, times * speed.call), steps, images)


@pytest.mark.parametrize("teacher", list(DEMOS))
def test_how_much_is_done_follows_the_machine(teacher: str) -> None:
    full = DEMOS[teacher]
    steps, images = full.distillation["max_train_steps"], full.evaluation["num_samples"]
    for times in (0.1, 1, 1.2):  # as it always was
        found = planned(teacher, times)
        assert (found.settings["max_train_steps"], found.evaluation) == (steps, full.evaluation)
        assert (
            found.settings["num_anchors"] == usual_anchors(48 * steps if teacher == "digits" else 24 * steps)
            and "steps" not in found.words
        )
    minutes = round(planned(teacher).seconds / 60)
    assert 4 <= minutes <= 7 and f"about {minutes} minutes" in planned(teacher).words
    slow = planned(teacher, 2)
    assert steps / 3 < slow.settings["max_train_steps"] < steps and slow.seconds == pytest.approx(480)
    assert images / 3 < slow.evaluation["num_samples"] < images and "may differ between machines" in slow.words
    assert f"about 8 minutes on this machine, as it is now: {slow.settings['max_train_steps']:,} steps" in slow.words
    slowest = planned(teacher, 10)
    assert slowest.settings["max_train_steps"] == round(steps / 3) and slowest.seconds > 850
    assert f"about {round(slowest.seconds / 60)} minutes" in slowest.words and "worth looking at" in slowest.words


def test_steps_given_by_hand_are_taken_as_they_are() -> None:
    by_hand = planned("glyphs", 10, steps=840)
    assert by_hand.settings["max_train_steps"] == 840 and by_hand.settings["num_anchors"] == 840 * 24 // 16
    assert by_hand.evaluation == DEMOS["glyphs"].evaluation
    assert by_hand.seconds > 2 * planned("glyphs", 10).seconds and "steps" not in by_hand.words


def test_images_given_by_hand_are_taken_as_they_are() -> None:
    by_hand = planned("glyphs", 2, images=60)
    assert by_hand.evaluation == {**DEMOS["glyphs"].evaluation, "num_samples": 60}
    assert by_hand.settings["max_train_steps"] > planned("glyphs", 2).settings["max_train_steps"]
    both = planned("glyphs", 2, steps=30, images=60)
    assert (both.settings["max_train_steps"], both.evaluation["num_samples"]) == (30, 60)
    assert both.seconds < by_hand.seconds and both.seconds < planned("glyphs", 2, steps=30).seconds


def test_too_few_images_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_samples.*9"):
        demo.run_demo(tmp_path / "demo", teacher="digits", num_samples=9)
    assert not (tmp_path / "demo").exists()


def test_the_run_records_what_was_chosen_and_measuring_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"train_batch_size": 8, "num_validation_images": 1, "num_teacher_steps": 2, "num_anchor_steps": 3}
    few = {"max_train_steps": 6, "num_anchors": 24}
    usual = DEMOS["digits"]
    monkeypatch.setitem(DEMOS, "digits", replace(usual, distillation={**usual.distillation, **small, **few}))
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(demo, "evaluate", lambda *_, **how: seen.append(how))
    monkeypatch.setattr(demo, "draw", lambda *_: None)
    said: list[str] = []

    def run(folder: str, **settings: Any) -> Path:
        torch.manual_seed(3)
        demo.run_demo(tmp_path / folder, teacher="digits", say=said.append, **settings)
        return tmp_path / folder

    measured = run("measured", max_train_steps=2)
    assert [line for line in said if "minute" in line and "on this machine" in line] == [said[1]]
    monkeypatch.setattr(demo, "measure", lambda *_: Speed({0.0: 1e4}, 1e-9))  # so that the floor is what is left
    told = run("told")
    assert read_yaml(told / "config.yaml")["max_train_steps"] == 2
    assert read_yaml(told / "config.yaml")["num_anchors"] == read_yaml(measured / "config.yaml")["num_anchors"] == 8
    assert seen[-1]["num_samples"] == usual.evaluation["num_samples"] / 3 and any(
        "worth looking at" in line for line in said
    )
    assert same_state(measured / "checkpoint-2", told / "checkpoint-2")
