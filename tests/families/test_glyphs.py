"""The embedded text-to-image teacher: what it is, that it draws what it is told, and a run on its own prompts."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

import onestill
from onestill.config import read_yaml
from onestill.evaluation.classifier import ConvFeatures
from onestill.evaluation.run import embedded_reference
from onestill.teachers.load import EMBEDDED, load_teacher

GLYPHS = EMBEDDED["glyphs"]


def heads() -> dict[str, list[str]]:
    with safe_open(GLYPHS.folder / "images.safetensors", "pt") as file:
        found: dict[str, list[str]] = json.loads(file.metadata()["onestill"])["heads"]
    return found


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
    logits = ConvFeatures.load(GLYPHS.folder / "classifier.safetensors")(reference.images[:100])
    parts = logits.split([len(names) for names in heads().values()], dim=1)
    for part, truth in zip(parts, labels[:100].T, strict=True):
        assert (part.argmax(1) == truth).double().mean() >= 0.95


def test_it_draws_what_it_is_told() -> None:
    # Held-out combinations: a character, a color and a background that were never seen together.
    prompts = (GLYPHS.folder / "heldout.txt").read_text(encoding="utf-8").splitlines()[:24]
    images = onestill.sample(
        teacher="glyphs", prompts=prompts, num_images=24, num_inference_steps=20, guidance_scale=3, device="cpu"
    )
    assert images.shape == (24, 3, 32, 32)
    logits = ConvFeatures.load(GLYPHS.folder / "classifier.safetensors")(images)
    names = heads()
    parts = dict(zip(names, logits.split([len(n) for n in names.values()], dim=1), strict=True))
    guesses = [names["background"][i] for i in parts["background"].argmax(1).tolist()]
    right = [f"on a {guess} background" in prompt for guess, prompt in zip(guesses, prompts, strict=True)]
    assert sum(right) >= 22
    characters = [names["character"][i] for i in parts["character"].argmax(1).tolist()]
    assert sum(f" {guess} on " in prompt for guess, prompt in zip(characters, prompts, strict=True)) >= 16


def test_a_run_takes_its_own_prompts(tmp_path: Path) -> None:
    result = onestill.distill(
        "glyphs", tmp_path / "run", show_progress=False, device="cpu", guidance_scale=3.0, max_train_steps=2,
        train_batch_size=4, num_validation_images=2, num_teacher_steps=2, num_prompts=8,
        prompt_cache_dir=tmp_path / "cache",
    )  # fmt: skip
    assert result.export_error is not None and result.export_error <= 1e-4
    assert Path(read_yaml(tmp_path / "run" / "config.yaml")["prompt_file"]).name == "prompts.txt"
    prompt = "a bold red serif A on a yellow background"
    image = onestill.sample(tmp_path / "run", prompts=[prompt], num_images=1, device="cpu")
    assert image.shape == (1, 3, 32, 32) and torch.isfinite(image).all()
