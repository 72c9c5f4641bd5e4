"""What people type who know other programs: words without a flag, other names of flags, a run where a teacher is due."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs_helpers import assert_refused, call_cli, finished_run, teacher_folder

from onestill.cli.guesses import meant
from onestill.training.config import DistillConfig


@pytest.mark.parametrize(
    ("command", "typed", "ours"),
    [
        ("distill", "prompts", "prompt_file"),
        ("distill", "steps", "max_train_steps"),
        ("distill", "lr", "learning_rate"),
        ("distill", "batch_size", "train_batch_size"),
        ("distill", "model", "teacher"),
        ("distill", "output", "output_dir"),
        ("distill", "epochs", "max_train_steps"),
        ("distill", "fp16", "mixed_precision"),
        ("distill", "resolution", "height"),
        ("inspect", "model-path", "teacher"),
        ("sample", "n", "num_images"),
        ("sample", "steps", "num_inference_steps"),
        ("sample", "cfg", "guidance_scale"),
        ("sample", "out", "output"),
        ("evaluate", "pretrained_model_name_or_path", "teacher"),
        ("evaluate", "num_images", "num_samples"),
        ("export", "model", "student"),
        ("export", "output_dir", "output"),
        ("demo", "out", "output_dir"),
        ("demo", "gpu", "device"),
    ],
)
def test_other_names_are_answered_with_ours(command: str, typed: str, ours: str) -> None:
    outcome = call_cli(command, f"--{typed}", "1")
    if outcome.words.startswith("error: no such option"):
        assert outcome.code == 2 and outcome.words.endswith(f"did you mean --{ours}?")
    else:
        assert (command, typed) == ("evaluate", "pretrained_model_name_or_path")  # which it takes


def test_a_guess_of_what_a_command_has_not_is_answered_with_nothing() -> None:
    assert meant("--lr", ["--solver", "--student"]) == ""
    assert_refused(call_cli("sample", "run", "--lr", 3), "no such option: --lr")
    assert "did you mean" not in call_cli("sample", "run", "--lr", 3).words


def test_what_resembles_nothing_gets_no_hint() -> None:
    assert meant("--qqqqq", ["--seed", "--device"]) == ""


def test_a_word_without_a_flag_is_the_teacher_or_the_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("inspect", "distill"):
        rest = ["--output_dir", "run", "--device", "cpu"]
        assert_refused(
            call_cli(command, "nothing/here/at/all", *rest), "--teacher nothing/here/at/all: no such teacher"
        )
        assert_refused(call_cli(command, "a", "--teacher", "b", *rest), "--teacher b: 'a' is given without a flag")
    for command in ("sample", "evaluate", "export"):
        rest = ["--output", "x"]
        assert_refused(call_cli(command, "nothing", *rest), "--student nothing: ")
        assert_refused(call_cli(command, "a", "--student", "b", *rest), "--student b: 'a' is given without a flag")
    assert call_cli("sample", finished_run(), "--num_images", 1, "--output", "x.png").code == 0
    assert call_cli("sample", finished_run(), "--student", finished_run(), "--output", "y.png").code == 0


def test_a_name_that_is_nearly_one_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my-teacher/unet").mkdir(parents=True)
    Path("my-teacher/model_index.json").write_text("{}")
    for typed, near in (("digitz", "digits"), ("my_teacher", "my-teacher"), ("./my-techer", "my-teacher")):
        outcome = call_cli("inspect", typed)
        assert_refused(outcome, f"--teacher {typed}: no such")
        assert f"did you mean '{near}'? Else give a folder" in outcome.words
    assert "mean" not in call_cli("inspect", "qqqqq").words
    assert_refused(call_cli("inspect", "my-teacher/unet"), "give the folder around it, 'my-teacher'")
    assert_refused(
        call_cli("sample", "digits"), "--student digits: is a teacher, of many steps; --teacher digits draws with it"
    )


def test_an_alias_is_named_as_it_was_typed() -> None:
    given = ["inspect", "--device", "cpu"]
    assert call_cli(*given, "--pretrained-model-name-or-path", "no/such/thing").words.startswith(
        "error: --pretrained_model_name_or_path no/such/thing: no such"
    )
    assert call_cli(*given, "--teacher=no/such/thing").words.startswith("error: --teacher no/such/thing: ")


@pytest.mark.parametrize("part", ["", "checkpoint-2"])
def test_a_run_for_a_teacher_says_what_it_is(part: str) -> None:
    outcome = call_cli("inspect", finished_run() / part, "--device", "cpu")
    assert_refused(outcome, "is a run, whose student has one step; name the teacher that it was distilled from")


def test_inspect_needs_no_output_and_refuses_what_no_machine_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    helped = " ".join(call_cli("inspect", "--help").out.split())
    assert "Folder of the run. " in helped and "Folder of the run. [required]" not in helped
    monkeypatch.setattr("onestill.runs.inspect.MOST_MEMORY", 1e6)
    outcome = call_cli("inspect", teacher_folder(), "--device", "cpu", "--train_batch_size", 4)
    assert_refused(outcome, "--train_batch_size 4: a step takes 0 TB, which no machine has")


def test_descriptions_are_plain_and_the_help_spells_flags() -> None:
    assert all(ord(c) < 0xE000 for c in str(DistillConfig.model_json_schema()))
    assert "given with --height" in " ".join(call_cli("distill", "--help").out.split())


def test_a_file_inside_a_folder_that_the_system_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "run/config.yaml")

    monkeypatch.setattr("onestill.runs.load.check_folder", refuse)
    assert_refused(call_cli("sample", finished_run()), "run/config.yaml: permission denied")
