"""Averages in whole runs: other widths evaluated, sampled and exported, one chosen at the end, all of it after a crash."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs_helpers import (
    FAST,
    Interruption,
    assert_refused,
    call_cli,
    copied,
    finished_run,
    interrupt_at,
    same_state,
    snapshot,
    teacher_folder,
)
from torch import Tensor

import onestill
from onestill.core.errors import SettingError
from onestill.core.files import read_hashed
from onestill.runs.export import export
from onestill.runs.folder import RunFolder
from onestill.runs.load import restore_student, run_teacher
from onestill.training.averages import FOLDER, weights_of
from onestill.training.checkpoint import read_checkpoint

SEVERAL = (0.1, 0.05, 0.2)


def distil(folder: Path, **settings: Any) -> onestill.RunResult:
    settings = {**FAST, "max_train_steps": 40, "learning_rate": 1e-2, "checkpointing_steps": 7, **settings}
    return onestill.distill(teacher_folder(), folder, show_progress=False, **settings)


def same(one: tuple[dict[str, Tensor], dict[str, str]], two: tuple[dict[str, Tensor], dict[str, str]]) -> bool:
    return one[1] == two[1] and all(torch.equal(value, two[0][name]) for name, value in one[0].items())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of forty steps that keeps averages."""
    return distil(tmp_path_factory.mktemp("averages") / "run").output_dir


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> onestill.RunResult:
    """A run that chooses between widths at its end."""
    return distil(tmp_path_factory.mktemp("chosen") / "run", ema_width=SEVERAL)


def weights(run: Path, width: float | None, step: int = 40) -> dict[str, Tensor]:
    return weights_of(run, read_checkpoint(run / f"checkpoint-{step}"), width)


def test_snapshots_lie_evenly_over_the_run_and_hold_what_is_trained(run: Path) -> None:
    files = sorted((run / FOLDER).iterdir())
    assert [int(path.stem[5:]) for path in files] == [4, 9, 13, 18, 22, 27, 31, 36]
    tensors, said = read_hashed(files[0])
    names = set(read_checkpoint(run / "checkpoint-40").tensors["student"])
    assert set(tensors) == {f"{average}/{name}" for average in ("ema", "ema_beside") for name in names}
    assert said == {"num": "4", "ema": "0.09", "ema_beside": "0.045"}


def test_one_width_is_what_the_run_exports_and_zero_the_last_weights(run: Path) -> None:
    tensors = read_checkpoint(run / "checkpoint-40").tensors
    for width, group in ((None, "student-ema"), (0.09, "student-ema"), (0.045, "student-ema_beside"), (0, "student")):
        found = weights(run, width)
        assert all(torch.equal(value, tensors[group][name]) for name, value in found.items())


def test_sample_and_export_take_another_width(run: Path, tmp_path: Path) -> None:
    expected = onestill.sample(run, num_images=4, ema_width=0.15)
    usual, last = onestill.sample(run, num_images=4), onestill.sample(run, num_images=4, ema_width=0)
    assert (expected - usual).abs().max() > 1e-3 and (expected - last).abs().max() > 1e-3
    assert export(run, tmp_path / "wide", ema_width=0.15) <= 1e-5
    torch.testing.assert_close(onestill.sample(tmp_path / "wide", num_images=4), expected, rtol=0, atol=1e-5)
    assert "average of relative width 0.15" in (tmp_path / "wide" / "README.md").read_text(encoding="utf-8")
    student = restore_student(RunFolder(run), run_teacher(RunFolder(run), torch.device("cpu")), run, 0.15)
    found = weights(run, 0.15)
    assert all(torch.equal(value, found[name]) for name, value in student.named_parameters())


def test_a_checkpoint_on_the_way_has_the_averages_up_to_it(run: Path) -> None:
    wide = weights(run, 0.12, step=35)
    assert any(not torch.equal(value, wide[name]) for name, value in weights(run, None, step=35).items())
    assert any(not torch.equal(value, wide[name]) for name, value in weights(run, 0.12).items())


def test_several_widths_are_rows_of_one_network(run: Path) -> None:
    settings: dict[str, Any] = {"num_samples": 64, "steps": (2,), "num_reference_steps": 4}
    report = onestill.evaluate(run, ema_width=(0.15, 0, 0.09), **settings)
    rows = {row.name: row for row in report.rows}
    assert list(rows) == ["DDIM-2", "student, width 0.15", "student, width 0", "student, width 0.09"]
    speeds = {row.images_per_second for row in report.rows if row.is_student}
    assert len(speeds) == 1, "one network is timed once"
    for width in (0.15, 0, 0.09):
        (alone,) = [
            row for row in onestill.evaluate(run, ema_width=width, speed=False, **settings).rows if row.is_student
        ]
        assert alone.name == f"student, width {width:g}", "a table of one says which too"
        assert alone.frechet_distance == rows[alone.name].frechet_distance
    distances = [row.frechet_distance for row in report.rows]
    assert len(set(distances)) == len(distances)


@pytest.mark.parametrize("command", ["sample RUN --ema_width {} --output OUT/a.png", "evaluate RUN --ema_width {}",
                                     "export RUN --ema_width {} --output OUT/e"])  # fmt: skip
def test_what_cannot_be_had_is_one_line(run: Path, tmp_path: Path, command: str) -> None:
    before = snapshot(run)

    def call(width: str) -> Any:
        words = command.format(width).replace("RUN", str(run)).replace("OUT", str(tmp_path))
        return call_cli(*words.split())

    assert_refused(
        call("0.28"), "--ema_width 0.28: cannot be rebuilt from the averages that the run keeps; give one between"
    )
    assert_refused(call("0.3"), "--ema_width")
    assert_refused(call("-1"), "--ema_width")
    assert snapshot(run) == before and not list(tmp_path.iterdir())


def test_what_keeps_them_costs_and_is_said(run: Path, tmp_path: Path) -> None:
    def space(**settings: Any) -> Any:
        inspected = onestill.inspect_teacher(
            teacher_folder(), device="cpu", max_train_steps=40, corrector_fraction=0, **settings
        )
        return inspected.checkpoint_bytes, inspected.snapshot_bytes

    copy = sum(value.nbytes for value in read_checkpoint(run / "checkpoint-40").tensors["student"].values())
    assert space() == (5 * copy, 16 * copy)
    written = sum(path.stat().st_size for path in (run / FOLDER).iterdir())
    assert 16 * copy < written < 1.2 * 16 * copy + 8 * 40_000, "names and hashes weigh little"
    assert space(num_ema_snapshots=0) == (4 * copy, 0) and space(ema_width=0) == (3 * copy, 0)
    assert space(num_ema_snapshots=3, ema_target_decay=0.9) == (6 * copy, 6 * copy)


def test_a_run_without_averages_or_an_export_has_no_other(tmp_path: Path) -> None:
    run = distil(tmp_path / "raw", max_train_steps=2, ema_width=0).output_dir
    assert not (run / FOLDER).exists()
    assert torch.equal(onestill.sample(run / "checkpoint-2", ema_width=0), onestill.sample(run / "checkpoint-2"))
    with pytest.raises(SettingError, match="there is no average"):
        onestill.sample(run, ema_width=0.1)
    with pytest.raises(SettingError, match="exported pipeline"):
        onestill.sample(run / "pipeline", ema_width=0.1)
    with pytest.raises(SettingError, match="is the student's"):
        onestill.sample(teacher=teacher_folder(), ema_width=0.1)


def test_the_nearest_of_several_is_exported_and_said(chosen: onestill.RunResult) -> None:
    found = chosen.ema_distances
    assert tuple(found) == SEVERAL and chosen.ema_width == min(found, key=lambda width: found[width])
    assert len(set(found.values())) == 3
    assert chosen.closing()[0].startswith(f"average: width {chosen.ema_width:g}, of 0.1 (")
    run = chosen.output_dir
    values = read_checkpoint(run / "checkpoint-40").values
    assert values["ema_width"] == chosen.ema_width and dict(values["ema_distances"]) == found
    assert read_checkpoint(run / "checkpoint-35").values["ema_width"] == 0.1
    alone, usual = onestill.sample(run, num_images=4, ema_width=chosen.ema_width), onestill.sample(run, num_images=4)
    torch.testing.assert_close(alone, usual, rtol=0, atol=1e-5)
    assert "of relative width" in (run / "pipeline" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("step", [14, 40])
def test_chosen_after_a_crash_is_chosen_without(tmp_path: Path, chosen: onestill.RunResult, step: int) -> None:
    run = tmp_path / "run"
    with pytest.raises(Interruption):
        distil(run, ema_width=SEVERAL, on_step=interrupt_at(step + (step < 40) * 3))
    resumed = distil(run, ema_width=SEVERAL, resume_from_checkpoint="latest")
    assert same_state(run / "checkpoint-40", chosen.output_dir / "checkpoint-40")
    for path in (chosen.output_dir / FOLDER).iterdir():
        assert same(read_hashed(path), read_hashed(run / FOLDER / path.name))
    assert len(list((run / FOLDER).iterdir())) == 8
    assert resumed.ema_width == chosen.ema_width and resumed.ema_distances == chosen.ema_distances
    one, two = (snapshot(folder / "pipeline") for folder in (run, chosen.output_dir))
    assert {name: value for name, value in one.items() if name.endswith(".safetensors")}.items() <= two.items()


def test_a_width_that_the_end_will_not_reach_is_refused_before(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="ema_width=0.28: cannot be rebuilt .* between 0.0.* and 0.2") as refused:
        distil(tmp_path / "run", ema_width=(0.1, 0.28))
    assert refused.value.todo and not list(tmp_path.iterdir())
    words = ["--teacher", teacher_folder(), "--output_dir", tmp_path / "run", "--max_train_steps", 40]
    assert_refused(call_cli("distill", *words, "--ema_width", "0.1,0.28"), "--ema_width 0.28: cannot be rebuilt")


def test_a_longer_run_chooses_again_at_its_end(tmp_path: Path, chosen: onestill.RunResult) -> None:
    run = copied(chosen.output_dir, tmp_path / "run")
    longer = distil(
        run, max_train_steps=44, ema_width=SEVERAL, resume_from_checkpoint="latest", validation_steps=42,
        lr_warmup_steps=FAST["lr_warmup_steps"],
    )  # fmt: skip
    assert set(longer.ema_distances) == set(SEVERAL) and longer.ema_distances != chosen.ema_distances
    assert read_checkpoint(run / "checkpoint-42").values["ema_width"] == 0.1, "of the first, until the end"
    assert read_checkpoint(run / "checkpoint-44").values["ema_width"] == longer.ema_width
    lines = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines if "validation_rms" in line] == [40, 42, 44]


def test_what_was_lost_is_not_compared(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(Interruption):
        distil(run, ema_width=(0.1, 0.25), on_step=interrupt_at(39))
    for path in (run / FOLDER).iterdir():
        path.unlink()
    with pytest.warns(UserWarning, match="ema_width=0.25: .*it is not compared"):
        resumed = distil(run, ema_width=(0.1, 0.25), resume_from_checkpoint="latest")
    assert set(resumed.ema_distances) == {0.1} and resumed.ema_width == 0.1 and resumed.pipeline


def test_a_damaged_snapshot_is_left_out_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    with pytest.raises(Interruption):
        distil(run, on_step=interrupt_at(16))
    path = sorted((run / FOLDER).iterdir())[0]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.warns(UserWarning, match=f"{path.name} is not what was written: other averages are rebuilt without it"):
        distil(run, resume_from_checkpoint="latest")
    assert len(list((run / FOLDER).iterdir())) == 7
    assert weights(run, 0.07)


def test_a_finished_run_is_not_changed_by_what_reads_it(tmp_path: Path) -> None:
    run = copied(finished_run(), tmp_path / "run")
    before = snapshot(run)
    onestill.sample(run, num_images=1, ema_width=0.09)
    assert snapshot(run) == before
