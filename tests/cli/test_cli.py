"""The commands as users type them: parse, call, print."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from runs_helpers import (
    FAST,
    NULL_CLASS,
    as_flags,
    call_cli,
    copied,
    finished_run,
    go_on_with,
    snapshot,
    teacher_folder,
)
from safetensors.torch import load_file

import onestill
from onestill.cli import distill as distill_command
from onestill.cli.output import quiet
from onestill.core.settings import read_yaml
from onestill.data.prompt_cache import BATCH_SIZE, PromptCache
from onestill.objectives.anchors import Anchors
from onestill.pages.plots import plot_files
from onestill.runs import demo
from onestill.runs.distill import RunResult
from onestill.teachers.load import EMBEDDED
from onestill.training.config import DistillConfig

FEW = ["--num_samples", 12, "--steps", "2,1", "--num_reference_steps", 2, "--device", "cpu"]


def test_help_and_version() -> None:
    outcome = call_cli("--help")
    assert outcome.code == 0
    for command in ("distill", "inspect", "sample", "evaluate", "compare", "export", "demo"):
        assert command in outcome.out
        assert call_cli(command, "-h").code == 0
    assert call_cli("--version").out.strip() == f"onestill {onestill.__version__}"


def test_the_installed_command_and_the_module_are_the_same() -> None:
    for command in ([sys.executable, "-m", "onestill"], [str(Path(sys.executable).with_name("onestill"))]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=120, check=True)
        assert done.stdout.strip() == f"onestill {onestill.__version__}"


def test_help_shows_defaults_and_panels() -> None:
    text = " ".join(call_cli("distill", "--help").out.split())
    assert "[default: midpoint]" in text and "[default: 0.04]" in text and "[required]" in text
    for panel in ("Teacher", "Objective", "Optimisation", "Run", "Watching"):
        assert panel in text


def test_help_has_every_flag_in_full_on_a_narrow_terminal() -> None:
    command = [sys.executable, "-m", "onestill", "distill", "--help"]
    narrow = {**os.environ, "COLUMNS": "80"}
    text = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=narrow).stdout
    assert max(map(len, text.splitlines())) <= 80
    assert {f"--{name}" for name in DistillConfig.model_fields} <= set(re.findall(r"--\w+", text))
    assert "--pretrained_model_name_or_path" in text and "--no_gradient_checkpointing" in text


def test_a_hub_that_does_not_answer_is_not_heard_again_and_again() -> None:
    logger = logging.getLogger("huggingface_hub.utils._http")  # says "Retrying in 1s [Retry 1/5]."
    logging.getLogger("huggingface_hub").setLevel(logging.WARNING)
    quiet()
    assert not logger.isEnabledFor(logging.WARNING) and logger.isEnabledFor(logging.ERROR)


# distill


def test_distill_trains_exports_and_says_what_is_next(tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = call_cli("distill", "--teacher", teacher_folder(), "--output_dir", run, *as_flags(FAST))
    assert outcome.code == 0, outcome.err
    assert "unet2d, v_prediction, 1x8x8, start level t = 1" in outcome.words
    assert f"{run / 'pipeline'}: loads with plain diffusers" in outcome.out
    assert "self-check against the student" in outcome.out and f"onestill evaluate --student {run}" in outcome.out
    assert "4/4" in outcome.err  # the progress bar
    assert (run / "pipeline" / "model_index.json").is_file()


def test_a_run_of_relative_paths_opens_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (there := tmp_path / "there").mkdir()
    shutil.copytree(teacher_folder(), there / "t")
    monkeypatch.chdir(there)
    outcome = call_cli("distill", "--teacher", "t", "--output_dir", "run", *as_flags(FAST))
    assert outcome.code == 0, outcome.err
    assert "run/pipeline: loads with plain diffusers" in outcome.out  # as it was given
    monkeypatch.chdir(tmp_path)
    run = there / "run"
    outcome = call_cli("sample", "--student", run / "checkpoint-4", "--num_images", 2, "--output", "x.png")
    assert outcome.code == 0, outcome.err
    outcome = call_cli("distill", "--config", run / "config.yaml", "--resume_from_checkpoint", "latest")
    assert "resume_from_checkpoint: null" in (run / "config.yaml").read_text(encoding="utf-8")
    assert outcome.code == 0 and "was finished before" in outcome.out, outcome.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there", "x.png"]
    # A copy goes on where it lies, not where it lay.
    copied(run, tmp_path / "copy")
    shutil.rmtree(run)
    outcome = call_cli("distill", "--config", tmp_path / "copy/config.yaml", "--resume_from_checkpoint", "latest")
    assert outcome.code == 0 and "copy/pipeline was finished before" in outcome.out, outcome.err
    assert not run.exists()


def test_flags_win_over_the_file_and_dashes_are_underscores(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"teacher: {teacher_folder()}\ntrain-batch-size: 4\ndelta: 0.3\nlr_warmup_steps: 0\n")
    outcome = call_cli(
        "distill", "--config", path, "--output-dir", tmp_path / "run", "--max-train-steps", 2, "--delta", 0.2,
        "--num-teacher-steps", 2, "--device", "cpu", "--class-labels", 1, "--class_labels", 2, "--null-class", 3,
        "--pretrained_model_name_or_path", teacher_folder("class"), "--no_allow_tf32", "--guidance-scale", 1.5,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    written = read_yaml(tmp_path / "run" / "config.yaml")
    assert written["teacher"] == str(teacher_folder("class")) and written["delta"] == 0.2
    assert written["train_batch_size"] == 4 and written["class_labels"] == [1, 2]
    assert written["guidance_scale"] == 1.5


def test_python_flags_and_yaml_make_the_same_run(tmp_path: Path) -> None:
    settings = {**FAST, "max_train_steps": 2, "delta": 0.3, "learning_rate": 1e-3}
    (tmp_path / "run.yaml").write_text("\n".join(f"{name}: {value}" for name, value in settings.items()))
    given = ["--teacher", teacher_folder(), "--output_dir"]
    assert call_cli("distill", *given, tmp_path / "flags", *as_flags(settings)).code == 0
    assert call_cli("distill", *given, tmp_path / "yaml", "--config", tmp_path / "run.yaml").code == 0
    onestill.distill(teacher_folder(), tmp_path / "python", show_progress=False, **settings)
    weights = [
        load_file(tmp_path / name / "pipeline/unet/diffusion_pytorch_model.safetensors")
        for name in ("flags", "yaml", "python")
    ]
    assert weights[0]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]) and torch.equal(value, weights[2][name])


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    outcome = call_cli("distill", "--teacher", teacher_folder(), "--output_dir", tmp_path / "run", "--dry_run")
    assert outcome.code == 0 and "nothing was written" in outcome.words
    assert list(tmp_path.iterdir()) == []


def test_resume_says_where_from(tmp_path: Path) -> None:
    run = copied(finished_run(), tmp_path / "run")
    outcome = call_cli(
        "distill", "--config", finished_run() / "config.yaml", "--output_dir", run, "--resume_from_checkpoint", "latest"
    )
    assert outcome.code == 0, outcome.err
    assert f"resuming from {run / 'checkpoint-4'}" in outcome.words


# Ctrl-C. In the midst of the steps it is a signal that the training catches: test_trainer.py


def interrupted(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def test_ctrl_c_while_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onestill.runs.plan.planned_run", interrupted)
    outcome = call_cli("distill", "--teacher", teacher_folder(), "--output_dir", tmp_path / "run")
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "stopped before the first step; nothing was written\n")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onestill.runs.distill.make_trainer", interrupted)
    outcome = call_cli("distill", "--teacher", teacher_folder(), "--output_dir", tmp_path / "run")
    assert outcome.code == 130 and outcome.err.endswith("\nstopped before the first step; nothing was written\n")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_encoding_says_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = PromptCache._write

    def write_one(cache: PromptCache, rows: dict[str, torch.Tensor]) -> None:
        if any(tmp_path.rglob("*.safetensors")):
            raise KeyboardInterrupt
        write(cache, rows)

    monkeypatch.setattr(PromptCache, "_write", write_one)
    monkeypatch.setattr("onestill.data.prompt_cache.LARGEST_SHARD", 1)  # then a shard is one batch of the encoder
    outcome = call_cli(
        "distill", "--teacher", "glyphs", "--output_dir", tmp_path / "run", "--prompt_cache_dir", tmp_path / "cache",
        "--num_prompts", 100, *as_flags(FAST),
    )  # fmt: skip
    assert outcome.code == 130 and "encoding" in outcome.err  # the progress bar
    (shard,) = tmp_path.rglob("*.safetensors")
    last = f"stopped before the first step; {BATCH_SIZE} encoded prompts are kept in {shard.parent}, nothing else was written"
    assert outcome.err.splitlines()[-1] == last
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_ctrl_c_while_making_anchors_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"

    prepare = Anchors.prepare

    def one(anchors: Anchors) -> Iterator[int]:
        for num in prepare(anchors):
            yield num
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Anchors, "prepare", one)
        outcome = call_cli(
            "distill", "--teacher", teacher_folder(), "--output_dir", run, *as_flags(FAST), "--anchor_fraction", 0.5,
            "--num_anchors", 20,
        )  # fmt: skip
    assert outcome.code == 130
    assert f"stopped before the first step; state saved in {run / 'checkpoint-0'}. Go on with" in outcome.err
    again = call_cli(*go_on_with(outcome.err))
    assert again.code == 0 and "loads with plain diffusers" in again.out, again.err


def test_ctrl_c_after_the_last_step_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("onestill.runs.distill.export_student", interrupted)
        outcome = call_cli("distill", "--teacher", teacher_folder(), "--output_dir", run, *as_flags(FAST))
    assert outcome.code == 130 and "stopped after the last step; what was saved is kept. Go on with" in outcome.err
    again = call_cli(*go_on_with(outcome.err))
    assert again.code == 0 and f"{run / 'pipeline'}: loads with plain diffusers" in again.out
    assert "was finished before" in call_cli(*go_on_with(outcome.err)).out


def test_ctrl_c_before_a_resumed_run_goes_on_says_how_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = copied(finished_run(), tmp_path / "run")
    for name in ("checkpoint-4", "pipeline"):
        shutil.rmtree(run / name)
    config = ["distill", "--config", run / "config.yaml", "--output_dir", run, "--resume_from_checkpoint", "latest"]
    with monkeypatch.context() as patch:
        patch.setattr("onestill.training.trainer.Trainer.restore", interrupted)
        outcome = call_cli(*config)
    assert outcome.code == 130 and "stopped before the first step; what was saved is kept. Go on with" in outcome.err
    again = call_cli(*go_on_with(outcome.err))
    assert again.code == 0 and f"resuming from {run / 'checkpoint-2'}" in again.err


def test_several_processes_go_on_as_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    # Whose arguments those of the one process are: test_trainer.py
    assert distill_command.go_on(Path("run")).startswith(
        "torchrun --nproc_per_node 2 -m onestill distill --config run/"
    )


def test_ctrl_c_in_other_commands_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onestill.runs.export.write_student", interrupted)
    outcome = call_cli("export", "--student", finished_run(), "--output", tmp_path / "out")
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "stopped\n")


def test_ctrl_c_in_the_training_of_a_demo_ends_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = RunResult(tmp_path / "demo", step=1, stopped_by=signal.SIGINT)
    monkeypatch.setattr(demo, "distill", lambda *_, **__: stopped)
    monkeypatch.setattr(demo, "evaluate", lambda *_, **__: pytest.fail("it went on"))
    outcome = call_cli("demo", "digits", "--output_dir", tmp_path / "demo")
    assert outcome.code == 130 and outcome.out == "" and "start the demo again with the same command" in outcome.words


def test_ctrl_c_in_a_demo_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "demo"

    def stop(*_: object, **__: object) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text("teacher: digits\n")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_demo", stop)
    outcome = call_cli("demo", "digits", "--output_dir", folder)
    assert outcome.code == 130 and go_on_with(outcome.err)[:3] == ["distill", "--config", str(folder / "config.yaml")]
    (folder / "pipeline").mkdir()
    assert go_on_with(call_cli("demo", "digits", "--output_dir", folder).err) == ["evaluate", str(folder)]


# inspect


@pytest.mark.parametrize(("kind", "conditioning"), [("plain", "none"), ("class", "class"), ("epsilon", "none")])
def test_inspect_json(kind: str, conditioning: str) -> None:
    outcome = call_cli("inspect", "--teacher", teacher_folder(kind), "--json", "--device", "cpu")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    required = {"family", "process", "prediction_type", "conditioning", "sample_shape", "num_parameters", "t_max"}
    assert required <= set(found)
    assert (found["family"], found["process"], found["conditioning"]) == ("unet2d", "vp", conditioning)
    assert found["prediction_type"] == ("epsilon" if kind == "epsilon" else "v_prediction")
    assert found["sample_shape"] == [1, 8, 8] and 0.7 < found["t_max"] <= 1 and found["t_max_reason"]
    network: Any = onestill.load_teacher(teacher_folder(kind)).network
    assert found["num_parameters"] == sum(p.numel() for p in network.parameters())
    assert found["estimated_memory_gb"] > 0 and found["estimated_seconds_per_step"] > 0
    assert found["folder"] == str(teacher_folder(kind)) and found["max_train_steps"] == 10_000
    assert found["num_anchors"] == 30_000 and found["estimated_seconds_per_anchor"] > 0


def test_inspect_is_readable_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = call_cli("inspect", "--teacher", teacher_folder("class"), "--null_class", NULL_CLASS, "--device", "cpu")
    assert outcome.code == 0
    for words in ("3 classes, null class 3", "1 x 8 x 8", "t_max = 1", "GB and", "at the network's time embedding"):
        assert words in outcome.out
    assert list(tmp_path.iterdir()) == []


def test_inspect_says_at_which_levels_guidance_acts() -> None:
    given = ["inspect", teacher_folder("class"), "--null_class", NULL_CLASS, "--device", "cpu", "--guidance_scale", 2]
    shown = call_cli(*given, "--guidance_interval_max", 0.8).out
    assert "u + w (c - u) at 0 < t <= 0.8 alone: --guidance_scale" in " ".join(shown.split())
    assert json.loads(call_cli(*given, "--json").out)["guidance_interval"] is None


def test_inspect_says_what_the_whole_run_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    # Three passes of eight images.
    monkeypatch.setattr("onestill.runs.inspect.seconds_of", lambda call, device: 3 * 0.008)
    settings = ("--train_batch_size", 16, "--max_train_steps", 3000, "--corrector_fraction", 0, "--device", "cpu")
    outcome = call_cli("inspect", "--teacher", teacher_folder(), *settings, "--anchor_fraction", 0)
    # A pass with gradients, one without, and two of the teacher's, of 16 images: 64 ms.
    assert "0.064 s per step on cpu, batch 16; 3,000 steps take 3 minutes" in " ".join(outcome.out.split())
    anchors = ("--anchor_fraction", 0.5, "--num_anchors", 100_000, "--num_anchor_steps", 100)
    outcome = call_cli("inspect", "--teacher", teacher_folder(), *settings, *anchors)
    said = " ".join(outcome.out.split())
    assert "0.04 s per step" in said and "3,000 steps take 2 minutes, 100,000 anchors 2.8 hours more" in said


def test_inspect_counts_the_batch_and_the_solver() -> None:
    def memory(*flags: object) -> float:
        outcome = call_cli("inspect", "--teacher", teacher_folder(), "--json", "--device", "cpu", *flags)
        return float(json.loads(outcome.out)["estimated_memory_gb"])

    small, large, no_average = memory(), memory("--train_batch_size", 640), memory("--ema_width", 0)
    # Activations grow with the batch and weights do not; the average is one more copy of the weights.
    assert 2 * small < large < 10 * small and no_average < small


# sample


def test_sample_writes_a_grid_a_tensor_or_a_folder(tmp_path: Path) -> None:
    run = finished_run()
    common = ["--num_images", 6, "--seed", 3, "--device", "cpu"]
    outcome = call_cli("sample", "--student", run, "--output", tmp_path / "deep" / "grid.png", *common)
    assert outcome.code == 0, outcome.err
    assert "6 images, seeds 3..8" in outcome.out
    with Image.open(tmp_path / "deep" / "grid.png") as picture:
        assert picture.size == (3 * 112 + 4 * 8, 2 * 112 + 3 * 8)  # no words: nothing tells the images apart
    assert call_cli("sample", "--student", run, "--output", tmp_path / "x.safetensors", *common).code == 0
    images = load_file(tmp_path / "x.safetensors")["images"]
    assert torch.equal(images, onestill.sample(run, num_images=6, seed=3))
    assert call_cli("sample", "--student", run, "--output", tmp_path / "folder", *common).code == 0
    names = sorted(path.name for path in (tmp_path / "folder").iterdir())
    assert names == [f"{seed:06d}.png" for seed in range(3, 9)]


def test_sample_says_which_label_each_picture_has(tmp_path: Path) -> None:
    for labels, rows in (([], 3), ([1], 0)):
        flags = [part for label in labels for part in ("--class_labels", label)]
        path = tmp_path / f"{len(labels)}.png"
        common = ["--student", finished_run("class"), "--num_images", 6, "--output", path, *flags]
        assert call_cli("sample", *common).code == 0
        plain = 112 * 2 + 8 * 3
        with Image.open(path) as picture:
            assert picture.width == 3 * 112 + 4 * 8 and (picture.height > plain) is bool(rows)


def test_sample_from_run_checkpoint_and_pipeline_agree(tmp_path: Path) -> None:
    run = finished_run("class")
    images = []
    for i, student in enumerate((run, run / "checkpoint-4", run / "pipeline")):
        path = tmp_path / f"{i}.safetensors"
        assert call_cli("sample", "--student", student, "--output", path, "--num_images", 6, "--seed", 1).code == 0
        images.append(load_file(path)["images"])
    assert (images[1] - images[0]).abs().max() <= 1e-5 and (images[2] - images[0]).abs().max() <= 1e-5


def test_sample_of_a_teacher(tmp_path: Path) -> None:
    outcome = call_cli(
        "sample", "--teacher", teacher_folder("class"), "--null_class", NULL_CLASS, "--guidance_scale", 2,
        "--num_inference_steps", 2, "--solver", "heun", "--class_labels", 1, "--num_images", 2, "--output",
        tmp_path / "x.safetensors",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    expected = onestill.sample(
        teacher=teacher_folder("class"), null_class=NULL_CLASS, guidance_scale=2, num_inference_steps=2, solver="heun",
        class_labels=[1], num_images=2,
    )  # fmt: skip
    assert torch.equal(load_file(tmp_path / "x.safetensors")["images"], expected)


def test_sample_replaces_only_when_told(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_text("precious")
    arguments = ["sample", "--student", finished_run(), "--output", path, "--num_images", 1, "--seed", 7]
    outcome = call_cli(*arguments)
    assert outcome.code == 2 and "--overwrite" in outcome.words and path.read_text() == "precious"
    assert call_cli(*arguments, "--overwrite").out == f"1 image, seed 7 -> {path}\n"
    with Image.open(path) as picture:
        picture.load()


# evaluate


def test_evaluate_writes_prints_and_fills_the_card(tmp_path: Path) -> None:
    run = copied(finished_run("class"), tmp_path / "run")
    outcome = call_cli("evaluate", "--student", run, *FEW)
    assert outcome.code == 0, outcome.err
    for words in ("DDIM-2", "student", "NFE", "FD", "seeds 0..11", "mid_block", "images per row"):
        assert words in outcome.out
    names = {path.name for path in (run / "evaluation").iterdir()}
    assert names == {
        "report.html",
        "report.json",
        "report.md",
        "samples.png",
        *plot_files("quality-steps", "quality-time"),
    }
    table = (run / "evaluation" / "report.md").read_text(encoding="utf-8")
    assert table in (run / "pipeline" / "README.md").read_text(encoding="utf-8")

    again = call_cli("evaluate", "--student", run, *FEW)
    assert again.code == 2 and "--overwrite" in again.words
    other = call_cli("evaluate", "--student", run, *FEW, "--output", tmp_path / "b", "--no_speed", "--json")
    report = json.loads(other.out)
    assert [row["name"] for row in report["rows"]] == ["DDIM-2", "DDIM-1", "student"]
    assert report["rows"][0]["images_per_second"] is None
    assert report == json.loads((tmp_path / "b" / "report.json").read_text(encoding="utf-8"))


# export


def test_export(tmp_path: Path) -> None:
    outcome = call_cli("export", "--student", finished_run() / "checkpoint-2", "--output", tmp_path / "out")
    assert outcome.code == 0 and "self-check against the student" in outcome.out
    assert call_cli("sample", "--student", tmp_path / "out", "--output", tmp_path / "x.png").code == 0
    assert call_cli("export", "--student", finished_run(), "--output", tmp_path / "out").code == 2


# demo


SMALL = {"train_batch_size": 8, "num_teacher_steps": 2, "num_validation_images": 2, "num_anchor_steps": 3}


def make_small(monkeypatch: pytest.MonkeyPatch, teacher: str) -> None:
    usual = demo.DEMOS[teacher]
    few = {"num_samples": 12, "batch_size": 4} if teacher == "glyphs" else {"num_samples": 40}
    evaluation = {**usual.evaluation, **few, "steps": (4, 1)}
    small = replace(usual, distillation={**usual.distillation, **SMALL}, evaluation=evaluation)
    monkeypatch.setitem(demo.DEMOS, teacher, small)


def test_demo_end_to_end_at_three_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch, "digits")
    run = tmp_path / "demo"
    outcome = call_cli("demo", "digits", "--output_dir", run, "--max_train_steps", 3)
    assert outcome.code == 0, outcome.err
    for words in ("DDIM-4", "DDIM-1", "student", "label", "img/s", "real digits"):
        assert words in outcome.out
    with Image.open(run / "demo.png") as picture:
        assert picture.width > 500
    report = json.loads((run / "evaluation" / "report.json").read_text(encoding="utf-8"))
    assert all(row["label_accuracy"] is not None for row in report["rows"])
    assert report["protocol"]["num_reference_images"] > 1000
    assert (run / "pipeline" / "model_index.json").is_file()

    # A second demo, of whatever, replaces the first only when told, and only once everything is known to fit.
    before = snapshot(run)
    for teacher in ("digits", "glyphs"):
        outcome = call_cli("demo", teacher, "--output_dir", run, "--max_train_steps", 3)
        assert outcome.code == 2 and "--overwrite" in outcome.words
        assert call_cli("demo", teacher, "--output_dir", run, "--overwrite", "--device", "gpu").code == 2
    assert snapshot(run) == before


def test_demo_of_text_is_the_usual_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch, "glyphs")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = tmp_path / "demo"
    outcome = call_cli("demo", "--output_dir", run, "--max_train_steps", 3)
    assert outcome.code == 0, outcome.err
    for words in ("DDIM-4", "DDIM-1", "student", "img/s", "real glyphs"):
        assert words in outcome.out
    with Image.open(run / "demo.png") as picture:
        assert picture.width > 500 and picture.height > 300
    held_out = (EMBEDDED["glyphs"].folder / "heldout.txt").read_text(encoding="utf-8").splitlines()
    assert set(demo.PROMPTS) <= set(held_out)


def test_demo_of_an_unknown_teacher(tmp_path: Path) -> None:
    outcome = call_cli("demo", "letters", "--output_dir", tmp_path / "demo")
    assert outcome.code == 2 and "glyphs, digits" in outcome.words and not (tmp_path / "demo").exists()


def test_demo_never_removes_another_run(tmp_path: Path) -> None:
    run = copied(finished_run(), tmp_path / "run")
    before = snapshot(run)
    outcome = call_cli("demo", "--output_dir", run, "--overwrite")
    assert outcome.code == 2 and "holds another run" in outcome.words and snapshot(run) == before
