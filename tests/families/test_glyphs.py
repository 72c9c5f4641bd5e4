"""The embedded text-to-image teacher: what it is, that it draws what it is told, and a run on its own prompts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from clip_helpers import MAX_TOKENS, write_clip
from runs_helpers import call_cli, read_report
from safetensors.torch import load_file
from torch import Tensor

import onestill
from onestill.core.settings import read_yaml
from onestill.evaluation.classifier import ConvFeatures
from onestill.evaluation.clip import ClipScore
from onestill.evaluation.comparison import NO_KERNEL
from onestill.evaluation.heads import head_accuracies, head_hits, read_prompt
from onestill.evaluation.references import embedded_reference
from onestill.runs.evaluate import _held_out_prompts, _open_clip
from onestill.runs.folder import RunFolder
from onestill.teachers.load import EMBEDDED, load_teacher

GLYPHS = EMBEDDED["glyphs"]


def judge() -> ConvFeatures:
    return ConvFeatures.load(GLYPHS.folder / "classifier.safetensors")


def asked(prompts: list[str]) -> Tensor:
    """Return what the prompts ask for, [N, 5]."""
    classifier = judge()
    assert classifier.prompt_pattern is not None
    return torch.tensor([read_prompt(prompt, classifier.heads, classifier.prompt_pattern) for prompt in prompts])


def test_it_is_a_small_stable_diffusion() -> None:
    teacher = load_teacher("glyphs")
    assert (teacher.spec.family, teacher.spec.conditioning) == ("stable_diffusion", "text")
    assert teacher.spec.sample_shape == (4, 8, 8) and teacher.spec.t_max == 1 and teacher.can_guide
    assert sum(path.stat().st_size for path in GLYPHS.folder.rglob("*") if path.is_file()) <= 12_000_000


def test_the_reference_is_real_pictures_and_the_classifier_reads_them() -> None:
    reference = embedded_reference("glyphs")
    assert reference.images.shape[1:] == (3, 32, 32)
    assert reference.images.min() >= -1 and 0.9 < reference.images.max() <= 1
    labels = load_file(GLYPHS.folder / "images.safetensors")["labels"].long()
    hits = head_hits(judge()(reference.images[:100]), labels[:100], judge().heads)
    assert min(head_accuracies(hits, judge().heads).values()) >= 0.94


def test_it_draws_what_it_is_told() -> None:
    # Held-out combinations: a character, a color and a background that were never seen together.
    prompts = (GLYPHS.folder / "heldout.txt").read_text(encoding="utf-8").splitlines()[:24]
    images = onestill.sample(
        teacher="glyphs", prompts=prompts, num_images=24, num_inference_steps=20, guidance_scale=3, device="cpu"
    )
    assert images.shape == (24, 3, 32, 32)
    hits = head_hits(judge()(images), asked(prompts), judge().heads)
    shares = head_accuracies(hits, judge().heads)
    assert shares["color"] == shares["background"] == 1
    assert shares["character"] >= 23 / 24  # 95 in a hundred, as in docs/results.md


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("glyphs")
    result = onestill.distill(
        "glyphs", folder / "run", show_progress=False, device="cpu", guidance_scale=3.0, max_train_steps=2,
        train_batch_size=4, num_validation_images=2, num_teacher_steps=2, num_prompts=8,
        prompt_cache_dir=folder / "cache",
    )  # fmt: skip
    assert result.export_error is not None and result.export_error <= 1e-4
    return folder / "run"


def test_a_run_takes_its_own_prompts(run: Path) -> None:
    assert Path(read_yaml(run / "config.yaml")["prompt_file"]).name == "prompts.txt"
    prompt = "a bold red serif A on a yellow background"
    image = onestill.sample(run, prompts=[prompt], num_images=1, device="cpu")
    assert image.shape == (1, 3, 32, 32) and torch.isfinite(image).all()


FEW: dict[str, Any] = {"num_samples": 20, "steps": (4,), "num_reference_steps": 2, "speed": False}


def test_an_evaluation_judges_held_out_prompts(run: Path, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "tiny-clip")
    report = onestill.evaluate(run, clip=clip, device="cpu", **FEW)
    notes = report.protocol.notes
    assert report.protocol.reference == "the 480 real glyphs (only ever read by evaluate)"
    assert notes[0] == "prompts: 480 of heldout.txt, held-out ones, in turn"
    assert notes[1] == "prompt accuracy: what the classifier sees in 20 of 20 images a row"
    assert report.protocol.clip_model == "tiny-clip" and f"more than {MAX_TOKENS} tokens" in notes[-1]
    for row in report.rows:
        assert row.prompt_accuracy is not None and list(row.prompt_accuracy) == ["all", *judge().heads]
        assert row.clip_score is not None and row.label_accuracy is None
        # An unbiased estimate takes its two sets for independent, and these show the same captions.
        assert row.kernel_distance is None and row.frechet_distance is not None
    assert NO_KERNEL in notes and report.protocol.kernel_subset_size is None

    # The same numbers by hand, from the same pictures.
    prompts = (GLYPHS.folder / "heldout.txt").read_text(encoding="utf-8").splitlines()[:20]
    images = onestill.sample(run, prompts=prompts, num_images=20, device="cpu")
    hits = head_hits(judge()(images), asked(prompts), judge().heads)
    student = report.rows[-1]
    assert student.prompt_accuracy == pytest.approx(head_accuracies(hits, judge().heads))
    assert student.prompt_accuracy is not None and student.prompt_accuracy["background"] >= 0.9
    assert student.clip_score == pytest.approx(float(ClipScore(clip)(images, prompts).mean()), abs=1e-3)

    # Features that look at latents leave CLIP its pictures, and then there are no real ones to compare with.
    other = onestill.evaluate(run, clip=clip, features="teacher", device="cpu", **FEW)
    assert [row.clip_score for row in other.rows] == pytest.approx([row.clip_score for row in report.rows], abs=1e-3)
    assert "own 2-step samples" in other.protocol.reference and other.rows[0].prompt_accuracy is None
    assert other.protocol.notes[0] == notes[0]


def test_named_prompts_win_over_held_out_ones(run: Path, tmp_path: Path) -> None:
    clip, prompts = write_clip(tmp_path / "tiny-clip"), ["--prompt", "a cat", "--prompt", "a dog"]
    few = ["--num_samples", 20, "--steps", 4, "--no_speed", "--device", "cpu", "--output", tmp_path / "report"]
    outcome = call_cli("evaluate", "--student", run, *prompts, "--clip", clip, *few)
    assert outcome.code == 0, outcome.err
    report = read_report(tmp_path / "report")
    assert report.protocol.notes[0] == "prompts: 2 of given ones, in turn"
    assert "no prompt accuracy: no prompt is of the classifier's kind" in report.protocol.notes[1]
    assert report.rows[-1].kernel_distance is not None and NO_KERNEL not in report.protocol.notes
    assert report.rows[-1].prompt_accuracy is None and report.rows[-1].clip_score is not None
    assert "CLIP↑" in outcome.out and "prompt↑" not in outcome.out and "part by part" not in outcome.out


def test_held_out_prompts_take_the_place_of_the_teachers_own_only(run: Path) -> None:
    config = RunFolder(run).config
    mine = config.model_copy(update={"prompt_file": Path("mine.txt")})
    assert _held_out_prompts("teacher", "glyphs", config) == GLYPHS.heldout
    assert _held_out_prompts("teacher", "glyphs", mine) is None
    # Real pictures are compared with pictures of what they show.
    assert _held_out_prompts("glyphs", "glyphs", mine) == _held_out_prompts("glyphs", "x", mine) == GLYPHS.heldout
    assert _held_out_prompts("teacher", "glyphs", None) == GLYPHS.heldout
    assert _held_out_prompts("teacher", "x", config) is None and _held_out_prompts("digits", "digits", None) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"features": "teacher", "reference": "glyphs"},
            "reference='glyphs': holds images, and features teacher looks",
        ),
        ({"clip": "no where"}, "clip='no where': no such folder"),
        ({"clip": GLYPHS.folder / "text_encoder"}, "of type 'clip_text_model', and the CLIP score needs a whole CLIP"),
    ],
)
def test_evaluations_that_cannot_be_are_refused(run: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        onestill.evaluate(run, device="cpu", **{**FEW, **arguments})


def test_clip_refuses_what_is_no_picture_before_it_loads_anything() -> None:
    sound = SimpleNamespace(
        spec=SimpleNamespace(text=True, sample_shape=(4, 8)), decode=lambda latents: torch.zeros(len(latents), 2, 2048)
    )
    pair: Any = SimpleNamespace(teacher=sound, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"clip: CLIP sees pictures, .* this teacher makes \[2, 2048\]"):
        _open_clip("some/clip", pair, offline=True)
