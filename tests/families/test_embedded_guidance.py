"""A guidance scale that is an input of the network, as in Flux: chosen, told to the teacher, kept by the run."""

from __future__ import annotations

import functools
import json
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pipelines import ARGUMENTS
from runs_helpers import ALONE, as_flags, call_cli, copied
from test_conformance import PARITY, conditions_of, folder_of, noise_of, teacher_of
from torch import Tensor

import onestill
from onestill.core.tensors import as_times
from onestill.diffusion.trajectory import Trajectory
from onestill.runs.build import build_run
from onestill.teachers.guidance import guided
from onestill.teachers.pipelines.capture import watch
from onestill.teachers.pipelines.schedulers import times_of
from onestill.training.config import make_config

SETTINGS: dict[str, Any] = {
    **ARGUMENTS["flux"],
    "device": "cpu",
    "train_batch_size": 2,
    **ALONE,
    "max_train_steps": 2,
    "checkpointing_steps": 1,
    "num_validation_images": 1,
    "num_teacher_steps": 1,
}
SIZE = as_flags(ARGUMENTS["flux"])


@functools.cache
def place() -> Path:
    """Return a folder with prompts, p.txt: read only."""
    folder = Path(tempfile.mkdtemp(prefix="onestill-embedded-"))
    (folder / "p.txt").write_text("red\nblue\na cat\n")
    return folder


def command(folder: Path, *more: object, name: str = "flux") -> list[object]:
    prompts = ["--prompt_file", place() / "p.txt", "--prompt_cache_dir", place() / "cache"]
    return ["distill", "--teacher", folder_of(name), "--output_dir", folder, *prompts, *as_flags(SETTINGS), *more]


@functools.cache
def run(*flags: object) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="onestill-embedded-run-")) / "run"
    outcome = call_cli(*command(folder, *flags))
    assert outcome.code == 0, outcome.err
    return folder


def last_state(scale: float | None) -> tuple[Tensor, Tensor, list[float]]:
    """Return (noise, the state after four of the pipeline's own steps at a guidance scale, their times)."""
    teacher = teacher_of("flux")
    family, pipeline, usual = teacher.pipeline_spec, teacher.pipeline, teacher.pipeline.scheduler
    stock = family.schedule(pipeline).stock
    given: dict[str, Any] = {"num_inference_steps": 4, **({} if scale is None else {"guidance_scale": scale})}
    pipeline.scheduler = stock
    try:
        found = watch(
            lambda: teacher.calls(teacher.calls.examples(2), given, seeds=(0, 1)), teacher.network, stock, 4  # type: ignore[arg-type]
        )  # fmt: skip
    finally:
        pipeline.scheduler = usual
    x_t, end = (family.unpack(x, teacher.signature.constant) for x in found[:2])
    return x_t, end, list(times_of(stock, teacher.spec.process))


def test_four_steps_at_a_scale_are_the_pipelines_own() -> None:
    teacher = teacher_of("flux")
    assert (teacher.guidance_input, teacher.usual_guidance, teacher.can_guide) == ("guidance", 3.5, False)
    usual = last_state(None)[1]
    for scale in (5.0, 3.5):
        x, theirs, times = last_state(scale)
        told, cond = guided(teacher, scale), conditions_of(teacher)
        assert told.evaluations == 1
        for t, s in pairwise(times):
            x = Trajectory(teacher.spec.process, t).state(told.denoised(x, t, cond), x, as_times(s, 2))
        assert (x - theirs).abs().max() / theirs.abs().max() <= PARITY
        assert ((theirs - usual).abs().max() > 1e-3) == (scale != 3.5)


def test_outside_an_interval_the_network_is_told_one() -> None:
    teacher = teacher_of("flux")
    x, cond = noise_of(teacher, 2), conditions_of(teacher)
    found = guided(teacher, 5.0, interval=(0.2, 0.6))
    for t, scale in ((0.9, 1.0), (0.6, 5.0), (0.2, 1.0)):
        assert torch.equal(found.denoised(x, t, cond), guided(teacher, scale).denoised(x, t, cond))
        assert found.evaluations_at(t) == 1
    rows = found.denoised(x, torch.tensor([0.9, 0.5]).double(), cond)
    each = torch.cat(
        [guided(teacher, w).denoised(x, t, cond)[i : i + 1] for i, (w, t) in enumerate(((1, 0.9), (5, 0.5)))]
    )
    torch.testing.assert_close(rows, each, rtol=0, atol=1e-5)


class MeanColour:
    """Features that need no network."""

    name = "mean colour"

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3))


def test_a_run_keeps_its_scale() -> None:
    folder = run("--guidance_scale", 5)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["guidance_scale"] == 5
    card = (folder / "pipeline" / "README.md").read_text(encoding="utf-8")
    assert (
        "embedded guidance 5, an input of the teacher's network; leave the call's guidance_scale at its default, 3.5"
        in card
    )
    assert 'pipe("a photo of a cat", num_inference_steps=1, height=16' in card
    report = onestill.evaluate(
        folder,
        features=MeanColour(),
        num_samples=10,
        steps=(1,),
        num_reference_steps=1,
        speed=False,
        device="cpu",
        output=folder / "e",
    )
    assert report.protocol.guidance_scale == 5
    flags = ["--config", folder / "config.yaml", "--output_dir", folder, "--resume_from_checkpoint", "latest"]
    outcome = call_cli("distill", *flags, "--guidance_scale", 4)
    assert outcome.code == 2 and "was trained with other settings: guidance_scale: 5.0 -> 4.0" in outcome.words
    assert call_cli("distill", *flags).code == 0
    outcome = call_cli("sample", "--student", folder, "--prompt", "red", "--guidance_scale", 4)
    assert outcome.code == 2 and "this student was distilled with w = 5 fixed" in outcome.words


def test_the_teacher_is_told_it_and_the_student_is_not() -> None:
    config = {**SETTINGS, "teacher": str(folder_of("flux")), "output_dir": place() / "none"}
    config |= {"prompt_file": place() / "p.txt", "prompt_cache_dir": place() / "cache"}
    prepared = build_run(make_config({**config, "guidance_scale": 5}))
    teacher, cond = teacher_of("flux"), conditions_of(teacher_of("flux"))
    x = noise_of(teacher, 2)
    found = prepared.teacher.denoised(x, 0.5, cond)
    torch.testing.assert_close(found, teacher.denoised(x, 0.5, {**cond, "guidance": torch.full((2,), 5.0)}))
    assert (found - teacher.denoised(x, 0.5, cond)).abs().max() > 1e-4
    # So a call of the exported folder that says nothing of guidance is the student's.
    assert cond["guidance"].tolist() == [3.5, 3.5]


def test_the_pipelines_own_scale_is_used_and_recorded_where_none_is_named(tmp_path: Path) -> None:
    folder = copied(run(), tmp_path / "run")
    assert yaml.safe_load((folder / "config.yaml").read_text())["guidance_scale"] == 3.5
    assert "embedded guidance 3.5," in (folder / "pipeline" / "README.md").read_text(encoding="utf-8")
    assert call_cli(*command(folder, "--resume_from_checkpoint", "latest")).code == 0
    flags = ["inspect", "--teacher", folder_of("flux"), "--device", "cpu", *SIZE]
    assert "an input of the network, 3.5;" in call_cli(*flags).out
    found = json.loads(call_cli(*flags, "--guidance_scale", 5, "--json").out)
    assert (found["guidance"], found["guidance_scale"]) == ("embedded", 5)


def test_a_teacher_samples_at_a_scale() -> None:
    draw = functools.partial(
        onestill.sample, teacher=teacher_of("flux"), prompts=["red"], num_images=1, num_inference_steps=2, device="cpu"
    )
    usual = draw()
    assert torch.equal(usual, draw(guidance_scale=3.5)) and (usual - draw(guidance_scale=5)).abs().max() > 1e-4
    source = onestill.load_sampler(teacher=teacher_of("flux"), num_inference_steps=2, device="cpu")
    sheet = onestill.guidance_sweep(source, [1.0, 5.0], prompts=["red"])
    torch.testing.assert_close(sheet.images[1, :1], draw(guidance_scale=5), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("flux", ["--guidance_scale", 5, "--negative_prompt", "red"], "has no null condition that it could replace"),
        (
            "flux-schnell",
            ["--guidance_scale", 5],
            "--guidance_scale 5: needs a null condition, and a flux pipeline has none",
        ),
    ],
)
def test_what_is_refused(name: str, flags: list[object], words: str, tmp_path: Path) -> None:
    outcome = call_cli(*command(tmp_path / "run", *flags, name=name))
    assert outcome.code == 2 and words in outcome.words, outcome.err
    assert len(outcome.err.splitlines()) == 1 and not (tmp_path / "run").exists()
