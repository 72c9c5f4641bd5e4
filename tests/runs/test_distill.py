"""A whole run: checked before anything is written, trained, exported; in Python and with any module."""

import json
import shutil
import signal
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs_helpers import (
    FAST,
    NULL_CLASS,
    Interruption,
    copied,
    finished_run,
    interrupt_at,
    restored,
    snapshot,
    teacher_folder,
    tiny_network,
    write_teacher,
    zero_snr_scheduler,
)
from safetensors.torch import load_file
from torch import nn

import onestill
from onestill.core.devices import resolve_device
from onestill.core.errors import FoundWarning
from onestill.core.files import check_writable
from onestill.core.settings import read_yaml
from onestill.diffusion.process import CosineVP
from onestill.runs.build import build_run, check_tracker, guided_as, with_embedded_prompts
from onestill.runs.distill import RunResult, distilled_facts
from onestill.runs.folder import check_output_dir, is_run
from onestill.teachers.guidance import Guided, Thresholded
from onestill.teachers.load import load_teacher
from onestill.teachers.module import module_teacher
from onestill.teachers.pixel import unet2d_teacher
from onestill.training.checkpoint import read_checkpoint
from onestill.training.config import make_config


def distil(output_dir: Path, **settings: Any) -> RunResult:
    settings = {"teacher": teacher_folder(), "show_progress": False, **FAST, **settings}
    return onestill.distill(settings.pop("teacher"), output_dir, **settings)


def test_layout_of_a_run() -> None:
    run = finished_run()
    names = {name for name in snapshot(run) if "/" not in name}
    # checkpoint-2 and checkpoint-4 of 4 steps: the newest two are kept.
    whole = {"checkpoint-2", "checkpoint-4", "pipeline", "averages"}
    assert names == whole | {"config.yaml", "logs", "samples", "teacher.json"}
    assert (run / "logs" / "metrics.jsonl").is_file()
    assert [path.name for path in (run / "samples").iterdir()] == ["step-000004.png"]
    pipeline = set(snapshot(run / "pipeline"))
    assert {"README.md", "model_index.json", "unet/config.json", "scheduler/scheduler_config.json"} <= pipeline
    assert not [name for name in snapshot(run) if Path(name).name.startswith(".") or "partial" in name]
    assert not [name for name in snapshot(run) if name.endswith((".bin", ".pt", ".pth", ".pkl"))]


def test_what_a_run_returns(tmp_path: Path) -> None:
    steps: list[int] = []
    result = distil(tmp_path / "run", on_step=lambda log: steps.append(log.step))
    assert steps == [1, 2, 3, 4]
    run = tmp_path / "run"
    expected = RunResult(run, 4, run / "pipeline", run / "checkpoint-4", result.export_error, num_trained=4)
    said = {"distance": None, "ema_width": 0.0, "unjudged": "", "advice": ""}
    assert result.ema_width > 0 and replace(result, **said) == expected
    assert result.export_error is not None and result.export_error < 1e-5
    assert is_run(run)


def test_the_resolved_configuration_lies_beside_the_run(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("max_train_steps: 3\ndelta: 0.2\nlr_warmup_steps: 0\n")
    settings = {name: value for name, value in FAST.items() if name not in ("max_train_steps", "lr_warmup_steps")}
    onestill.distill(teacher_folder(), tmp_path / "run", config_file=path, delta=0.25, show_progress=False, **settings)
    written = read_yaml(tmp_path / "run" / "config.yaml")
    assert (written["max_train_steps"], written["delta"], written["solver"]) == (3, 0.25, "midpoint")
    assert make_config({}, tmp_path / "run" / "config.yaml").output_dir == tmp_path / "run"


@pytest.mark.parametrize("kind", ["plain", "class", "drawn", "null_first"])
def test_exported_is_the_averaged_student(kind: str) -> None:
    """Plain diffusers on the folder against the student with the averaged weights of the checkpoint, same noise."""
    from diffusers import DiffusionPipeline

    from onestill.core.tensors import noise

    run = finished_run(kind)
    pipeline = DiffusionPipeline.from_pretrained(run / "pipeline", use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    student = restored(run)
    labels = [1, 2, 1, 2, 1] if kind != "plain" else None
    cond = {} if labels is None else {"class_labels": torch.tensor(labels)}
    if kind == "drawn":
        cond["guidance_scale"] = torch.full((5,), 2.0)
    with torch.no_grad():
        expected = student(noise(range(5), (1, 8, 8)), None, 0.0, cond).clamp(-1, 1)
    generators = [torch.Generator().manual_seed(seed) for seed in range(5)]
    found = pipeline(batch_size=5, class_labels=labels, generator=generators, output_type="pt").images * 2 - 1
    # Float32 sums in another order.
    assert (found - expected).abs().max() <= 1e-5

    # And it is the average, not the last weights: they are not the same student.
    tensors = read_checkpoint(run / "checkpoint-4").tensors
    assert not all(torch.equal(value, tensors["student"][name]) for name, value in tensors["student-ema"].items())
    last = load_file(run / "pipeline/unet/diffusion_pytorch_model.safetensors")["mid_block.resnets.0.conv1.weight"]
    assert torch.equal(last, tensors["student-ema"]["network.mid_block.resnets.0.conv1.weight"])


def test_dry_run_checks_everything_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = onestill.distill(teacher_folder(), tmp_path / "a" / "run", dry_run=True, **FAST)
    assert result == RunResult(tmp_path / "a" / "run") and list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="no null class|none that is known|no classes"):
        onestill.distill(teacher_folder(), tmp_path / "run", dry_run=True, guidance_scale=2, **FAST)
    assert list(tmp_path.iterdir()) == []


def test_unknown_settings_are_refused_in_python_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown setting 'learning_rat'; did you mean 'learning_rate'"):
        onestill.distill(teacher_folder(), tmp_path / "run", learning_rat=1e-4)
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_object_is_distilled(tmp_path: Path) -> None:
    teacher = unet2d_teacher(tiny_network(), zero_snr_scheduler())
    result = distil(tmp_path / "run", teacher=teacher, t_max=0.9)
    assert result.pipeline is not None and onestill.sample(result.pipeline, num_images=2).shape == (2, 1, 8, 8)
    # The same weights, so the same run: only the start level differs.
    assert read_yaml(tmp_path / "run" / "config.yaml")["t_max"] == 0.9
    loaded = onestill.load_teacher(teacher_folder())
    assert loaded.fingerprint() == teacher.fingerprint()


class Tiny(nn.Module):
    """A network of nobody's family, for points in the plane."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 2))

    def forward(self, x: torch.Tensor, net_time: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.cat([x, net_time[:, None] / 1000], 1))


def test_any_module_is_distilled(tmp_path: Path) -> None:
    teacher = onestill.module_teacher(Tiny(), CosineVP(), "v_prediction", (2,))
    result = distil(tmp_path / "run", teacher=teacher)
    assert result.pipeline is not None
    generate = onestill.load_module(result.pipeline, Tiny())
    assert generate(torch.randn(5, 2), {}).shape == (5, 2)
    (picture,) = (tmp_path / "run" / "samples").iterdir()
    assert picture.stat().st_size > 1000  # a scatter plot
    with pytest.raises(ValueError, match=r"network of your own; load it in Python with onestill\.load_module"):
        onestill.sample(result.pipeline)


def test_a_plain_function_needs_a_network_for_the_student(tmp_path: Path) -> None:
    teacher = onestill.module_teacher(lambda x, net_time: -x, CosineVP(), "v_prediction", (2,))
    with pytest.raises(ValueError, match="pass a torch.nn.Module of the student as `network=`"):
        distil(tmp_path / "run", teacher=teacher)
    assert list(tmp_path.iterdir()) == []
    assert distil(tmp_path / "run", teacher=teacher, network=Tiny()).step == 4


def test_labels_and_guidance_reach_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    real = Guided.denoised

    def denoised(self: Guided, x: Any, t: Any, cond: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.append(cond)
        return real(self, x, t, cond)

    monkeypatch.setattr(Guided, "denoised", denoised)
    distil(
        tmp_path / "run", teacher=teacher_folder("class"), class_labels=[0, 2], null_class=NULL_CLASS,
        guidance_scale_min=1.5, guidance_scale_max=2.5, train_batch_size=32,
    )  # fmt: skip
    training = [cond for cond in seen if len(cond["class_labels"]) == 32]
    assert training
    assert set(torch.cat([cond["class_labels"] for cond in training]).tolist()) == {0, 2}
    scales = torch.cat([cond["guidance_scale"] for cond in training])
    assert 1.5 <= scales.min() < 1.7 and 2.3 < scales.max() <= 2.5


@pytest.mark.parametrize(
    ("settings", "guided", "mode"),
    [
        ({}, 1.0, "static"),  # this scheduler clips, so its teacher is clipped
        ({"thresholding": "none"}, 1.0, None),
        ({"thresholding": "dynamic", "threshold_limit": 2, "null_class": 3, "guidance_scale": 3}, 3.0, "dynamic"),
    ],
)
def test_the_teacher_is_guided_and_thresholded_as_asked(
    settings: dict[str, Any], guided: float, mode: str | None
) -> None:
    config = make_config({**FAST, "teacher": "x", "output_dir": "y", **settings})
    teacher = guided_as(load_teacher(teacher_folder("class"), null_class=config.null_class), config)
    if mode is None:
        assert isinstance(teacher, Guided)
        return
    assert isinstance(teacher, Thresholded) and teacher.threshold.mode == mode
    assert isinstance(teacher.teacher, Guided) and teacher.teacher.guidance_scale == guided


def test_the_card_says_what_was_done(tmp_path: Path) -> None:
    text = (finished_run("class") / "pipeline" / "README.md").read_text(encoding="utf-8")
    assert "w = 2" in text and "No training data was used" in text and "4 steps of 4 images" in text
    drawn = make_config({}, finished_run("drawn") / "config.yaml")
    teacher = load_teacher(teacher_folder("class"), null_class=drawn.null_class)
    words = "in u + w (c - u), of a student trained on 1 to 3"
    assert distilled_facts(drawn, teacher).guidance == f"w = 2 {words}"
    assert distilled_facts(drawn, teacher, 1.5).guidance == f"w = 1.5 {words}"


def test_the_card_shows_a_prompt_of_an_embedded_teacher_and_none_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a secret\n")
    teacher, given = load_teacher("glyphs"), {"teacher": "glyphs", "output_dir": tmp_path / "run"}
    embedded = with_embedded_prompts(make_config(given))
    shown = distilled_facts(embedded, teacher).prompt
    assert embedded.prompt_file is not None and shown == embedded.prompt_file.read_text().splitlines()[0]
    own = make_config({**given, "prompt_file": tmp_path / "p.txt"})
    assert distilled_facts(own, teacher).prompt == "a photo of a cat"


def test_a_run_in_a_thread_needs_no_signals(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    results: list[RunResult] = []
    thread = threading.Thread(target=lambda: results.append(distil(tmp_path / "run", max_train_steps=2)))
    thread.start()
    thread.join()
    assert results[0].step == 2 and signal.getsignal(signal.SIGTERM) == before


def test_prepare_writes_nothing_and_says_what_it_will_do(tmp_path: Path) -> None:
    prepared = build_run(make_config({**FAST, "teacher": str(teacher_folder()), "output_dir": tmp_path / "run"}))
    assert prepared.resume is None and prepared.messages == () and list(tmp_path.iterdir()) == []
    config = make_config(
        {**FAST, "teacher": str(teacher_folder()), "output_dir": tmp_path / "run", "resume_from_checkpoint": "latest"}
    )
    assert "holds no checkpoint yet" in build_run(config).messages[0] and list(tmp_path.iterdir()) == []


# Checks of the machine


def test_devices() -> None:
    resolve_device("auto")
    resolve_device("cpu")
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("gpu", "cuda:99", "meta", ""):
        with pytest.raises(ValueError, match=f"device='{name}'"):
            resolve_device(name)


def test_trackers() -> None:
    check_tracker(None)
    with pytest.raises(ValueError, match="report_to='tensorbored': is unknown; accelerate has"):
        check_tracker("tensorbored")


def test_output_folders(tmp_path: Path) -> None:
    check_output_dir(tmp_path, resuming=False)  # empty
    check_output_dir(tmp_path / "new" / "deep", resuming=False)
    (tmp_path / "file").write_text("")
    for folder, message in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "run", "is no folder"),
        (tmp_path, "holds other files"),
        (finished_run(), "holds another run"),
    ):
        with pytest.raises(ValueError, match=f"output_dir='{folder}': .*{message}"):
            check_output_dir(folder, resuming=False)
    check_output_dir(finished_run(), resuming=True)
    with pytest.raises(ValueError, match="holds other files"):
        check_output_dir(tmp_path, resuming=True)


def test_a_file_is_writable_where_its_folder_is(tmp_path: Path) -> None:
    (tmp_path / "old.png").write_text("")
    for path in (tmp_path, tmp_path / "old.png", tmp_path / "new.png", tmp_path / "a" / "b"):
        check_writable(path, "output")
    with pytest.raises(ValueError, match="output=.*: cannot be there: .* is no folder"):
        check_writable(tmp_path / "old.png" / "below", "output")


def test_no_warning_reaches_the_user(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert distil(tmp_path / "run").pipeline is not None


def test_the_log_is_complete_json(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (finished_run() / "logs" / "metrics.jsonl").open(encoding="utf-8")]
    assert [row["step"] for row in rows] == [4]


def test_a_teacher_object_and_its_start_level_are_remembered(tmp_path: Path) -> None:
    teacher = load_teacher(teacher_folder("class"), null_class=NULL_CLASS, t_max=0.8)
    distil(tmp_path / "run", teacher=teacher, guidance_scale=2.0, learning_rate=3e-3)
    config = read_yaml(tmp_path / "run" / "config.yaml")
    assert (config["t_max"], config["null_class"]) == (0.8, NULL_CLASS)
    exported = onestill.sample(tmp_path / "run", num_images=2)
    restored = onestill.sample(tmp_path / "run" / "checkpoint-4", num_images=2)
    assert (exported - restored).abs().max() <= 1e-5


def test_a_given_start_level_is_checked_and_leaves_the_object_alone(
    tmp_path: Path, plain_network: Callable[..., nn.Module]
) -> None:
    teacher = module_teacher(plain_network(), CosineVP(), "epsilon", (1, 8, 8))
    with pytest.raises(ValueError, match="t_max=1: is pure noise"):
        distil(tmp_path / "run", teacher=teacher, t_max=1.0)
    before = teacher.spec
    build_run(make_config({"teacher": "python object", "output_dir": tmp_path / "run", "t_max": 0.5}), teacher)
    assert teacher.spec is before


def test_another_null_class_than_the_objects_is_refused(tmp_path: Path) -> None:
    teacher = load_teacher(teacher_folder("class"))
    with pytest.raises(ValueError, match="null_class=1: was given with a teacher object"):
        distil(tmp_path / "run", teacher=teacher, null_class=1)
    null = load_teacher(teacher_folder("class"), null_class=2)
    with pytest.raises(ValueError, match="height=2: was given with a teacher object"):
        onestill.sample(teacher=null, height=2, width=2)


def test_a_teacher_that_changed_since_is_noticed(tmp_path: Path) -> None:
    teacher = write_teacher(tmp_path / "teacher", tiny_network(seed=4))
    distil(tmp_path / "run", teacher=teacher)
    shutil.rmtree(teacher)
    write_teacher(teacher, tiny_network(seed=5))
    for opened in (
        lambda: onestill.sample(tmp_path / "run" / "checkpoint-4"),
        lambda: onestill.evaluate(tmp_path / "run"),
    ):
        with pytest.raises(ValueError, match="is not the one it was distilled from"):
            opened()


def test_a_run_opens_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_teacher(tmp_path / "teacher", tiny_network())
    monkeypatch.chdir(tmp_path)
    distil(tmp_path / "run", teacher="teacher")
    monkeypatch.chdir("/")
    assert onestill.sample(tmp_path / "run" / "checkpoint-4", num_images=1).shape == (1, 1, 8, 8)


def test_a_run_of_a_network_of_ones_own_says_how_it_opens(
    tmp_path: Path, plain_network: Callable[..., nn.Module]
) -> None:
    distil(tmp_path / "run", teacher=module_teacher(plain_network(), CosineVP(), "v_prediction", (1, 8, 8)))
    with pytest.raises(ValueError, match="is a network of your own; load it in Python with onestill.load_module"):
        onestill.sample(tmp_path / "run")


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    run = copied(finished_run(), tmp_path / "run")
    (run / "pipeline" / "README.md").write_text("with a measured table")
    before = snapshot(run / "pipeline")
    settings = {
        name: value for name, value in read_yaml(run / "config.yaml").items() if name not in ("teacher", "output_dir")
    }
    settings["resume_from_checkpoint"] = "latest"
    result = onestill.distill(teacher_folder(), run, show_progress=False, **settings)
    assert result.num_trained == 0 and result.pipeline == run / "pipeline"
    assert snapshot(run / "pipeline") == before


def test_a_damaged_log_is_gone_on_with_and_kept_beside(tmp_path: Path) -> None:
    logs = tmp_path / "run" / "logs"
    with pytest.raises(Interruption):
        distil(tmp_path / "run", on_step=interrupt_at(3), logging_steps=1, checkpointing_steps=2)
    one, _two, three = (logs / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    damaged = [one, b'{"step": "x"}\n', b"\xff\n", b"[" * 9999 + b"\n", one, three]
    (logs / "metrics.jsonl").write_bytes(b"".join(damaged))
    with pytest.warns(FoundWarning, match=r"has 4 lines that cannot be read; it is kept as metrics-damaged-1\.jsonl"):
        distil(tmp_path / "run", resume_from_checkpoint="latest", logging_steps=1, checkpointing_steps=2)
    steps = [json.loads(line)["step"] for line in (logs / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 3, 4]
    assert (logs / "metrics-damaged-1.jsonl").read_bytes() == b"".join(damaged)


@pytest.mark.filterwarnings("ignore::onestill.core.errors.FoundWarning")
def test_a_run_begun_again_begins_its_log_again(tmp_path: Path) -> None:
    logs = tmp_path / "run" / "logs"
    logs.mkdir(parents=True)
    # Killed before its first checkpoint, in the middle of a line.
    (logs / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    (tmp_path / "run" / "config.yaml").write_text("teacher: x\n")
    distil(tmp_path / "run", resume_from_checkpoint="latest", logging_steps=1)
    steps = [json.loads(line)["step"] for line in (logs / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_a_short_run_has_a_short_warm_up() -> None:
    assert make_config({"teacher": "digits", "output_dir": "run", "max_train_steps": 20}).lr_warmup_steps == 2
    assert make_config({"teacher": "digits", "output_dir": "run"}).lr_warmup_steps == 100
