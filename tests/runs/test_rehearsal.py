"""What the end of a run would refuse is refused before its first step, and what ends it all the same loses nothing."""

from __future__ import annotations

import shlex
import shutil
from collections import namedtuple
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from runs_helpers import FAST, as_flags, assert_refused, call_cli, go_on_with, same_state, teacher_folder
from torch import Tensor, nn

import onestill
from onestill.core.errors import SettingError
from onestill.diffusion.process import CosineVP
from onestill.export.export import ExportError
from onestill.export.pixel import PixelFormat
from onestill.runs import rehearsal, space
from onestill.runs.build import Run, build_run, configure
from onestill.students.injection import TimeEmbeddingInjection
from onestill.students.student import Student
from onestill.teachers.module import module_teacher
from onestill.training.config import make_config

CHECK = PixelFormat.check


def prepared(folder: Path, **own: Any) -> Run:
    return build_run(make_config({**FAST, "teacher": str(teacher_folder()), "output_dir": folder, **own}))


def distill_words(folder: Path, **own: Any) -> list[str]:
    return ["distill", "--teacher", str(teacher_folder()), "--output_dir", str(folder), *as_flags({**FAST, **own})]


@pytest.mark.parametrize("flag", [[], ["--dry_run"]], ids=["distill", "dry run"])
@pytest.mark.parametrize(
    ("fails", "words"),
    [
        (lambda *_: 0.5, "self-check failed: the reloaded folder's images differ from the student's by 5.0e-01"),
        (lambda *_: {}["vae"], "a student of it cannot be exported"),
    ],
    ids=["differs", "a library's error"],
)
def test_what_cannot_be_exported_is_not_trained(
    fails: Any, words: str, flag: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PixelFormat, "check", fails)
    outcome = call_cli(*distill_words(tmp_path / "deep" / "run"), *flag)
    assert_refused(outcome, f"--teacher {teacher_folder()}: ")
    assert words in outcome.words and list(tmp_path.iterdir()) == []


def test_a_wrong_bake_shows_though_nothing_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepared(tmp_path / "run")
    monkeypatch.setattr(TimeEmbeddingInjection, "bake", lambda *_: None)
    with pytest.raises(ValueError, match="its one step's samples differ"):
        rehearsal.rehearse(run)


class CalledTwice(nn.Module):
    """A network that asks its time embedding for two times, which no constant can stand for."""

    def __init__(self, timed: nn.Module) -> None:
        super().__init__()
        self.timed, self.time_embedding, self.time_proj = timed, timed.time_embedding, timed.time_proj
        del timed.time_embedding, timed.time_proj

    def forward(self, x: Tensor, net_time: Tensor) -> Tensor:
        early, late = (self.time_embedding(self.time_proj(t).to(x.dtype)) for t in (net_time, net_time / 2))
        h = nn.functional.silu(self.timed.first(x) + early[..., None, None] - 3 * late[..., None, None])
        return self.timed.last(h)


def test_a_time_embedding_that_is_called_twice_is_refused(tmp_path: Path, timed_network: Any) -> None:
    teacher = module_teacher(CalledTwice(timed_network()), CosineVP(), "v_prediction", (1, 8, 8))
    with pytest.raises(ValueError, match=r"teacher='python object': .* cannot be exported, so none is trained"):
        onestill.distill(teacher, tmp_path / "run", show_progress=False, **FAST)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_for_several_steps_is_said_before(
    tmp_path: Path, plain_network: Any, timed_network: Any
) -> None:
    for network, words in (
        (
            plain_network(),
            "warning: the student can be exported for one step only: its network's time embedding cannot",
        ),
        (timed_network(), ""),
    ):
        teacher = module_teacher(network, CosineVP(net_scale=1000.0), "v_prediction", (1, 8, 8))
        for fraction in (0.0, 0.5):
            settings = {**FAST, "output_dir": tmp_path / "run", "flow_map_fraction": fraction}
            run = build_run(configure(teacher, settings), teacher)
            said = rehearsal.rehearse(run)
            assert len(said) == (1 if words and fraction else 0) and all(words in line for line in said), said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "own", [{}, {"lora_rank": 2}, {"flow_map_fraction": 0.5}], ids=["full", "lora", "several steps"]
)
def test_it_leaves_no_trace(own: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, kept = prepared(tmp_path / "run", **own), torch.get_rng_state()
    before = {name: value.clone() for name, value in run.student.state_dict().items()}
    assert rehearsal.rehearse(run) == () and list(tmp_path.iterdir()) == []
    assert torch.equal(torch.get_rng_state(), kept)
    assert all(torch.equal(value, before[name]) for name, value in run.student.state_dict().items())
    assert call_cli(*distill_words(tmp_path / "with", **own)).code == 0
    monkeypatch.setattr(rehearsal, "_on_one_process", lambda *_: None)
    assert call_cli(*distill_words(tmp_path / "without", **own)).code == 0
    assert same_state(*(tmp_path / name / "checkpoint-4" for name in ("with", "without")))


@pytest.mark.parametrize(("num", "words"), [(16, ""), (12, "in 8 steps"), (3, "in 2, 4, 8 steps"), (4, "in 8 steps")])
def test_numbers_of_steps_that_anchors_have_no_levels_for_are_said(num: int, words: str, tmp_path: Path) -> None:
    own = {"anchor_fraction": 0.5, "anchor_path_fraction": 0.5, "num_anchor_steps": num, "num_anchors": 4}
    said = [line for line in rehearsal.rehearse(prepared(tmp_path / "run", **own)) if "draw badly" in line]
    assert len(said) == bool(words) and all(words in line for line in said)
    assert not rehearsal.rehearse(prepared(tmp_path / "run", **own, flow_map_fraction=0.25)) or not words


def test_what_a_killed_one_left_is_in_nobodys_way(tmp_path: Path) -> None:
    left = tmp_path / "run" / rehearsal.REHEARSAL / "pipeline"
    left.mkdir(parents=True)
    run = prepared(tmp_path / "run")
    rehearsal.rehearse(run)
    assert list((tmp_path / "run").iterdir()) == []
    (tmp_path / "run" / ".config.yaml.partial-1.yaml").touch()
    prepared(tmp_path / "run")


def test_two_runs_of_one_name_that_begin_together_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (prepared(tmp_path / name / "run") for name in "ab")
    export, found = rehearsal.export_student, []

    def meanwhile(student: Student, folder: Path, **settings: Any) -> None:
        monkeypatch.setattr(rehearsal, "export_student", export)
        export(student, folder, **settings)
        rehearsal.rehearse(second)
        found.append((folder / "model_index.json").exists())

    monkeypatch.setattr(rehearsal, "export_student", meanwhile)
    rehearsal.rehearse(first)
    assert found == [True] and list(tmp_path.iterdir()) == []


def test_all_processes_refuse_what_one_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PixelFormat, "check", lambda *_: 0.5)
    monkeypatch.setattr(rehearsal, "num_processes", lambda: 2)
    # The second of two: it hears what the first found, and exports nothing itself.
    verdict = ValueError("found by the first")
    monkeypatch.setattr("accelerate.PartialState.is_main_process", False)
    monkeypatch.setattr("accelerate.utils.broadcast_object_list", lambda found: found.__setitem__(0, verdict))
    with pytest.raises(ValueError, match="found by the first"):
        rehearsal.rehearse(prepared(tmp_path / "run"))
    monkeypatch.setattr("accelerate.PartialState.is_main_process", True)
    monkeypatch.setattr("accelerate.utils.broadcast_object_list", lambda found: None)
    with pytest.raises(ValueError, match="so none is trained"):
        rehearsal.rehearse(prepared(tmp_path / "run"))


# The disk


def with_free(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 0, int(free)))


def test_the_estimate_is_what_is_written(tmp_path: Path) -> None:
    own = {"anchor_fraction": 0.5, "num_anchors": 8, "num_anchor_steps": 1, "checkpointing_steps": 1}
    found = space.space_of((run := prepared(tmp_path / "run", **own)).student, run.config)
    assert call_cli(*distill_words(tmp_path / "run", **own)).code == 0
    folder = tmp_path / "run"
    sizes = [sum(p.stat().st_size for p in (folder / n).rglob("*")) for n in ("checkpoint-4", "pipeline")]
    # Small files hold more names than numbers.
    assert found.checkpoint == pytest.approx(sizes[0], rel=0.3) and found.export == pytest.approx(sizes[1], rel=0.3)
    assert found.pools == 8 * 2 * 64 * 4 and found.num_checkpoints == 3
    said = call_cli("inspect", "--teacher", teacher_folder(), *as_flags({**FAST, **own})).out
    assert "disk" in said and "3 checkpoints at once, " in said and "export " in said and "anchors " in said


def test_a_pool_larger_than_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepared(tmp_path / "run", anchor_fraction=0.5, num_anchors=1000)
    needed = space.space_of(run.student, run.config)
    assert needed.pools == 1000 * 2 * 64 * 4
    for total, fits in ((needed.pools, True), (needed.pools - 1, False)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda total=total: namedtuple("memory", "total")(total))
        with nullcontext() if fits else pytest.raises(SettingError, match=r"num_anchors: takes 0\.51 MB of memory"):
            rehearsal.rehearse(run)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_refused_and_a_small_one_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared(tmp_path / "run", checkpointing_steps=1)
    needed = space.space_of(run.student, run.config)
    least = needed.checkpoint + needed.export + needed.pools + needed.snapshots
    with_free(monkeypatch, least - 1)
    assert_refused(call_cli(*distill_words(tmp_path / "run")), f"--output_dir {tmp_path / 'run'}: a checkpoint (")
    assert list(tmp_path.iterdir()) == []
    with_free(monkeypatch, needed.total - 1)
    assert "3 checkpoints, pools, averages and the export take" in rehearsal.rehearse(run)[0]
    with_free(monkeypatch, needed.total)
    assert rehearsal.rehearse(run) == ()


# An export that fails all the same


def test_a_failed_export_is_one_line_and_tried_again_with_what_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls = tmp_path / "run", []
    monkeypatch.setattr(PixelFormat, "check", lambda *args: calls.append(0) or (CHECK(*args) if len(calls) < 2 else 1))
    outcome = call_cli(*distill_words(run))
    assert outcome.code == 1 and "Traceback" not in outcome.err
    assert "stopped: export self-check failed: the reloaded folder's images differ" in outcome.words
    assert f"the trained student is kept in {run / 'checkpoint-4'}" in outcome.words and not (run / "pipeline").exists()
    monkeypatch.undo()
    (alone,) = [line.partition(": ")[2] for line in outcome.err.splitlines() if line.startswith("export it alone")]
    assert call_cli(*shlex.split(alone)[1:]).code == 0 and (run / "pipeline").is_dir()
    shutil.rmtree(run / "pipeline")
    assert call_cli(*go_on_with(outcome.err)).code == 0 and (run / "pipeline").is_dir()


def test_in_python_it_is_an_error_that_names_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(PixelFormat, "check", lambda *args: calls.append(0) or (CHECK(*args) if len(calls) < 2 else 1))
    with pytest.raises(ExportError, match="the trained student is kept in .*checkpoint-4"):
        onestill.distill(teacher_folder(), tmp_path / "run", show_progress=False, **FAST)
