"""`export` of runs and of their checkpoints: what is baked in, and what is never replaced."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from runs_helpers import (
    FAST,
    call_cli,
    copied,
    finished_run,
    snapshot,
    teacher_folder,
)

import onestill
from onestill.export.pixel import call_pipeline
from onestill.runs.export import export
from onestill.sampling.pictures import to_pil


def write_images(folder: Path, num: int = 12, size: int = 8) -> Path:
    folder.mkdir(parents=True)
    for i, picture in enumerate(to_pil(torch.rand(num, 1, size, size) * 2 - 1)):
        picture.save(folder / f"{i}.png")
    return folder


def test_export_of_a_run_and_of_a_checkpoint(tmp_path: Path) -> None:
    run = finished_run()
    assert export(run, tmp_path / "new") <= 1e-5
    assert set(snapshot(tmp_path / "new")) == set(snapshot(run / "pipeline"))
    same = "unet/diffusion_pytorch_model.safetensors"
    assert snapshot(tmp_path / "new")[same] == snapshot(run / "pipeline")[same]
    export(run / "checkpoint-2", tmp_path / "earlier")
    assert snapshot(tmp_path / "earlier")[same] != snapshot(run / "pipeline")[same]
    assert "exported from checkpoint-2" in (tmp_path / "earlier" / "README.md").read_text(encoding="utf-8")
    assert list(tmp_path.glob(".*")) == []


def test_export_bakes_target_time_and_guidance(tmp_path: Path) -> None:
    run = finished_run("drawn")
    export(run, tmp_path / "low", guidance_scale=1.5, target_time=0.5)
    baked = onestill.sample(tmp_path / "low", num_images=4)
    asked = onestill.sample(run, num_images=4, guidance_scale=1.5, target_time=0.5)
    assert (baked - asked).abs().max() <= 1e-5
    assert "w = 1.5" in (tmp_path / "low" / "README.md").read_text(encoding="utf-8")


def test_export_of_a_run_that_trains_several_steps(tmp_path: Path) -> None:
    run = onestill.distill(str(teacher_folder()), tmp_path / "run", **FAST, flow_map_fraction=0.5).output_dir
    assert export(run, tmp_path / "four", num_inference_steps=4) <= 1e-5
    exported = onestill.sample(tmp_path / "four", num_images=4)
    assert (exported - onestill.sample(run, num_images=4, num_inference_steps=4)).abs().max() <= 1e-5
    assert (exported - onestill.sample(run, num_images=4)).abs().max() > 1e-4
    images = call_pipeline(DiffusionPipeline.from_pretrained(tmp_path / "four"), range(4), None, 4)
    assert (exported - images).abs().max() <= 1e-5
    with pytest.raises(ValueError, match="num_inference_steps=2: .*exported for 4, and no other number"):
        onestill.sample(tmp_path / "four", num_inference_steps=2)
    with pytest.raises(ValueError, match="target_time=0.5: is of a single step"):
        export(run, tmp_path / "no", num_inference_steps=4, target_time=0.5)
    with pytest.raises(ValueError, match="num_inference_steps=9: must be at most 8"):
        export(run, tmp_path / "no", num_inference_steps=9)
    with pytest.raises(ValueError, match="num_inference_steps=4: this student was trained for one step"):
        export(finished_run(), tmp_path / "no", num_inference_steps=4)
    assert not (tmp_path / "no").exists()
    report = onestill.evaluate(
        tmp_path / "four", teacher=str(teacher_folder()), num_samples=12, steps=(2,), num_reference_steps=2, speed=False
    )
    assert [(row.name, row.num_steps) for row in report.rows] == [("DDIM-2", 2), ("student, 4 steps", 4)]
    both = call_cli(
        "export", run, "--num_inference_steps", 2, "--format", "diffusers,torch", "--output", tmp_path / "both"
    )
    # A pipeline is called with a number of steps; a graph holds them.
    said = {Path(line.split(": ")[0]).name: line for line in both.out.splitlines()}
    assert both.code == 0 and "call it with num_inference_steps=2" in said["diffusers"]
    assert "self-check" in said["torch"] and "call it" not in said["torch"]


def test_export_replaces_only_exports_and_only_when_told(tmp_path: Path) -> None:
    run, output = finished_run(), tmp_path / "out"
    export(run / "checkpoint-2", output)
    before = snapshot(output)
    with pytest.raises(ValueError, match=f"output=.*{output.name}': exists"):
        export(run, output)
    assert snapshot(output) == before
    export(run, output, overwrite=True)
    assert snapshot(output) != before and [path.name for path in tmp_path.iterdir()] == ["out"]

    precious = write_images(tmp_path / "holiday")
    with pytest.raises(ValueError, match="is no exported student, so overwrite does not replace it"):
        export(run, precious, overwrite=True)
    assert len(snapshot(precious)) == 12

    teacher = copied(teacher_folder(), tmp_path / "teacher")
    before = snapshot(teacher)
    with pytest.raises(ValueError, match="is no exported student, so overwrite does not replace it"):
        export(run, teacher, overwrite=True)
    assert snapshot(teacher) == before


@pytest.mark.parametrize(
    ("student", "arguments", "message"),
    [
        (lambda: "no/where", {}, "no such folder; give a run"),
        (lambda: teacher_folder(), {}, "is no run and no checkpoint-N folder"),
        (lambda: finished_run() / "samples", {}, "is corrupt"),
        (finished_run, {"guidance_scale": 2}, "distilled with w = 1 fixed"),
        (finished_run, {"target_time": 2}, "target_time=2: must be at most 1"),
        (finished_run, {"device": "gpu"}, "device='gpu'"),
        (lambda: finished_run("drawn"), {"guidance_scale": 9}, "outside 1 to 3"),
    ],
)
def test_export_refuses_and_writes_nothing(
    tmp_path: Path, student: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        export(student(), tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []
