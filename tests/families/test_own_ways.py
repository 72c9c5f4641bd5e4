"""What single families do that the others do not."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from pipelines import build
from test_conformance import conditions_of, noise_of, perturbed, teacher_of
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPTextConfig, CLIPVisionConfig
from vp_pipelines import if_parts, if_scheduler, if_unet

from onestill import distill, sample
from onestill.core.tensors import noise
from onestill.export.export import export_student
from onestill.teachers.guidance import Guided, Thresholded
from onestill.teachers.load import load_teacher
from onestill.teachers.pipelines.families.deepfloyd import NOISE_LEVEL, low_res_rows
from onestill.teachers.pipelines.teacher import PipelineTeacher


def recorded_steps(pipeline: Any, **call: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return (t, state, predicted x_0) of each step that a pipeline's own scheduler takes."""
    steps: list[tuple[Tensor, Tensor, Tensor]] = []
    step = pipeline.scheduler.step

    def see(output: Tensor, t: Tensor, state: Tensor, generator: Any = None, return_dict: bool = True) -> Any:
        result = step(output, t, state, generator=generator, return_dict=False)
        steps.append((t, state, result[1]))
        return result

    pipeline.scheduler.step = see
    pipeline(output_type="pt", **call)
    return steps


# Stable Diffusion


@pytest.mark.parametrize("name", ["sd-v", "sdxl-zeros"])
def test_the_default_guidance_guides_no_student_a_second_time(name: str, tmp_path: Path) -> None:
    export_student(perturbed(teacher_of(name)), tmp_path / "pipeline")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    sizes: list[int] = []
    pipeline.unet.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    draw = functools.partial(pipeline, "a photo", num_inference_steps=1, output_type="np")
    one, other = (draw(generator=torch.Generator().manual_seed(0), **given) for given in ({}, {"guidance_scale": 1.0}))
    assert (one.images == other.images).all()
    assert sizes == [1, 1]


@pytest.mark.parametrize(("name", "steps"), [("sd-epsilon", 50), ("sd-v", 50), ("sd-v-zero-snr", 50), ("if", 50)])
def test_more_steps_than_a_student_has_are_refused(name: str, steps: int, tmp_path: Path) -> None:
    export_student(perturbed(teacher_of(name)), tmp_path / "pipeline")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    with pytest.raises(ValueError, match=f"{steps} cannot be larger"):
        pipeline("a photo", num_inference_steps=steps)


# A safety checker


def flagging_everything(folder: Path) -> Path:
    """Write a Stable Diffusion whose safety checker flags every picture."""
    text = CLIPTextConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    image = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=4
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=image.to_dict(), projection_dim=8)
    checker = StableDiffusionSafetyChecker(config)
    checker.concept_embeds_weights.data.fill_(-2)  # cosines are larger
    extractor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    parts = {**build("sd-epsilon").components, "safety_checker": checker, "feature_extractor": extractor}
    StableDiffusionPipeline(**parts).save_pretrained(folder)
    return folder


def test_a_safety_checker_is_written_and_never_compared_with(tmp_path: Path) -> None:
    folder, out = flagging_everything(tmp_path / "sd"), tmp_path / "out"
    student = perturbed(load_teacher(folder))
    assert export_student(student, out) <= 1e-4
    assert "Safety checker" in (out / "README.md").read_text()
    pipeline = DiffusionPipeline.from_pretrained(out)
    theirs = pipeline("a photo", num_inference_steps=1, output_type="pt")
    assert theirs.nsfw_content_detected == [True] and theirs.images.abs().max() == 0, (
        "stock diffusers runs it as before"
    )
    kept = "safety_checker/model.safetensors"
    assert (out / kept).read_bytes() == (folder / kept).read_bytes()
    # Drawn by the exported folder and by the student: neither is blackened.
    images = sample(out, prompts=["a photo"], num_images=2)
    cond = student.teacher.encode(["a photo"] * 2)
    expected = student.teacher.decode(student(noise(range(2), (4, 8, 8)), None, 0.0, cond).detach()).clamp(-1, 1)
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)


def test_a_card_speaks_of_no_safety_checker_where_there_is_none(tmp_path: Path) -> None:
    export_student(perturbed(teacher_of("sd-epsilon")), tmp_path / "out")
    assert "Safety checker" not in (tmp_path / "out" / "README.md").read_text()


# Stable Diffusion XL


def test_no_prompt_of_sdxl_is_zero_where_its_configuration_says_so() -> None:
    zeros, encoded = teacher_of("sdxl-zeros"), teacher_of("sdxl-statistics")
    assert zeros.null_cond["encoder_hidden_states"].abs().max() == 0
    assert zeros.null_cond["added_cond_kwargs.text_embeds"].abs().max() == 0
    assert encoded.null_cond["encoder_hidden_states"].abs().max() > 0
    assert zeros.null_cond["added_cond_kwargs.time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]]


def test_the_autoencoders_statistics_are_used() -> None:
    teacher = teacher_of("sdxl-statistics")
    x = noise_of(teacher, 2)
    config = teacher.pipeline.vae.config
    mean, std = (torch.tensor(values).reshape(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std))
    expected = teacher.pipeline.vae.decode(x * std / config.scaling_factor + mean).sample
    torch.testing.assert_close(teacher.decode(x), expected, atol=0, rtol=0)


def test_pictures_are_compared_without_an_invisible_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl as module

    class Mark:
        def apply_watermark(self, images: Tensor) -> Tensor:
            return images + 1

    monkeypatch.setattr(module, "is_invisible_watermark_available", lambda: True)
    monkeypatch.setattr(module, "StableDiffusionXLWatermarker", Mark, raising=False)
    assert build("sdxl-zeros").watermark is not None, "a mark is needed for this to be a test"
    assert export_student(perturbed(teacher_of("sdxl-zeros")), tmp_path / "out") <= 1e-4


# DiT


def test_the_null_class_of_dit_is_its_last_label() -> None:
    spec = teacher_of("dit").spec
    assert (spec.num_classes, spec.null_class, spec.conditioning) == (1000, 1000, "class")
    assert spec.labels == list(range(1000))


def test_names_of_classes_survive_the_export(tmp_path: Path) -> None:
    build("dit").save_pretrained(tmp_path / "dit")
    index = json.loads((tmp_path / "dit" / "model_index.json").read_text())
    (tmp_path / "dit" / "model_index.json").write_text(json.dumps({**index, "id2label": {"7": "cock, rooster"}}))
    export_student(perturbed(load_teacher(tmp_path / "dit")), tmp_path / "out")
    exported = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert exported.get_label_ids(["rooster"]) == [7]


@pytest.mark.parametrize("name", ["dit", "pixart-sigma"])
def test_a_transformer_saved_under_its_old_class_loads(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path / "old")
    for file, entry in (("model_index.json", "transformer"), ("transformer/config.json", "_class_name")):
        path = tmp_path / "old" / file
        content = json.loads(path.read_text())
        content[entry] = ["diffusers", "Transformer2DModel"] if entry == "transformer" else "Transformer2DModel"
        path.write_text(json.dumps(content))
    old = load_teacher(tmp_path / "old")
    assert old.fingerprint() == teacher_of(name).fingerprint()
    assert export_student(perturbed(old), tmp_path / "out") <= 1e-4


# PixArt


def test_pixart_is_given_its_size_at_1024_pixels_only() -> None:
    large, small = teacher_of("pixart-alpha-1024"), teacher_of("pixart-alpha")
    assert large.example_cond["added_cond_kwargs.resolution"].tolist() == [[256, 256]]
    assert large.example_cond["added_cond_kwargs.aspect_ratio"].tolist() == [[1]]
    assert not [name for name in small.example_cond if name.startswith("added")]


def test_the_mask_of_a_prompt_is_a_condition() -> None:
    teacher = teacher_of("pixart-sigma")
    long, short = teacher.encode(["a photo of a red cat", ""])["encoder_attention_mask"].sum(1).tolist()
    assert long > short


# DeepFloyd IF


@pytest.mark.parametrize("name", ["if", "if-static"])
def test_thresholded_predictions_are_the_pipelines_own(name: str) -> None:
    # The pipeline's own DDPM steps, with their noise: what it makes of each state is x_0, guided, then thresholded.
    pipeline = build(name)
    call = {"prompt": ["a photo"], "num_inference_steps": 5, "guidance_scale": 3.0, "clean_caption": False}
    steps = recorded_steps(pipeline, generator=torch.Generator().manual_seed(0), **call)
    teacher = teacher_of(name)
    ours = Thresholded(Guided(teacher, 3.0), teacher.spec.threshold)
    plain = Guided(teacher, 3.0)
    cond = teacher.encode(["a photo"])
    assert len(steps) == 5
    for t, state, theirs in steps:
        time = (float(t) + 1) / 1000
        torch.testing.assert_close(ours.denoised(state, time, cond), theirs, atol=1e-4, rtol=1e-4)
    t, state, theirs = steps[0]
    apart = plain.denoised(state, (float(t) + 1) / 1000, cond) - theirs
    assert apart.abs().max() > 0.1, "thresholding must matter for this to be a test"


def test_the_exported_scheduler_thresholds_as_the_teachers(tmp_path: Path) -> None:
    for name, expected in (("if", (True, 0.95, 1.5)), ("if-static", (False, 0.995, 1.0))):
        export_student(perturbed(teacher_of(name)), tmp_path / name)
        config = json.loads((tmp_path / name / "scheduler" / "scheduler_config.json").read_text())
        assert config["_class_name"] == "DDPMScheduler"
        assert config["variance_type"] == "fixed_small"
        found = (config["thresholding"], config["dynamic_thresholding_ratio"], config["sample_max_value"])
        assert found == expected
        assert config["clip_sample"] == (name == "if-static")


def test_the_one_step_draws_no_noise(tmp_path: Path) -> None:
    export_student(perturbed(teacher_of("if")), tmp_path / "out")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    start = noise([3], (3, 8, 8))
    pipeline.prepare_intermediate_images = lambda *_args: start
    call = {"prompt": ["a photo"], "num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "pt"}
    one, two = (pipeline(generator=torch.Generator().manual_seed(seed), **call).images for seed in (0, 1))
    # 1e-10 times the noise: the variance's floor in DDPMScheduler.
    torch.testing.assert_close(one, two, atol=1e-6, rtol=0)


def test_a_folder_with_safety_checker_and_watermarker_loads_without_the_former(tmp_path: Path) -> None:
    from diffusers import IFPipeline
    from diffusers.pipelines.deepfloyd_if import IFSafetyChecker, IFWatermarker

    text = CLIPTextConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    image = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=4
    )
    checker = IFSafetyChecker(CLIPConfig(text_config=text.to_dict(), vision_config=image.to_dict(), projection_dim=8))
    parts = {"safety_checker": checker, "feature_extractor": CLIPImageProcessor(), "watermarker": IFWatermarker()}
    IFPipeline(unet=if_unet(), scheduler=if_scheduler(), **if_parts(**parts)).save_pretrained(tmp_path / "if")
    assert export_student(perturbed(load_teacher(tmp_path / "if")), tmp_path / "out") <= 1e-4
    exported = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert exported.safety_checker is None, "which stock diffusers could not load"
    assert exported.watermarker is not None
    assert exported.feature_extractor is not None


# Super-resolution


def test_low_resolution_rows_are_the_pipelines_own() -> None:
    teacher = teacher_of("if-super-resolution")
    pictures = teacher.image_condition.example(teacher.pipeline, 2)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    # The second draw of each seed's generator; the first is the large picture's noise.
    blur = torch.stack([[torch.randn(3, 16, 16, generator=g) for _ in range(2)][1] for g in generators])
    rows, theirs = low_res_rows(teacher.pipeline, pictures, blur), conditions_of(teacher)
    torch.testing.assert_close(rows["low_res"], theirs["low_res"], atol=1e-6, rtol=0)
    assert rows["class_labels"].tolist() == theirs["class_labels"].tolist() == [NOISE_LEVEL] * 2


def test_an_exported_student_loaded_as_a_teacher_draws_its_pictures(tmp_path: Path) -> None:
    export_student(perturbed(teacher_of("if")), tmp_path / "base")
    base = load_teacher(tmp_path / "base")
    assert isinstance(base, PipelineTeacher)
    prompts = ["a photo", "a red cat"]
    theirs = base.calls(
        prompts, {"output_type": "pt", "num_inference_steps": 1, "guidance_scale": 1.0}, seeds=(5, 6)
    ).images
    torch.testing.assert_close(base.one_step(noise([5, 6], (3, 8, 8)), base.encode(prompts)), theirs, atol=1e-4, rtol=0)


def test_a_chain_conditions_on_what_its_base_draws() -> None:
    base, teacher = teacher_of("if"), teacher_of("if-super-resolution")
    eps, blur, cond = noise_of(base, 2), noise_of(teacher, 2, seed=1), conditions_of(base)
    rows = teacher.picture_rows(base.one_step(eps, cond), blur)
    assert set(rows) == set(teacher.image_condition.kept)
    assert rows["low_res"].shape == (2, 3, 16, 16)
    x = noise_of(teacher, 2, seed=2)
    apart = teacher.denoised(x, 0.5, {**conditions_of(teacher), **rows}) - teacher.denoised(
        x, 0.5, conditions_of(teacher)
    )
    assert apart.abs().max() > 1e-3
    with pytest.raises(ValueError, match="this IFPipeline takes no picture of an earlier model"):
        base.picture_rows(base.one_step(eps, cond), blur)


def test_no_prompt_keeps_the_low_resolution_picture() -> None:
    teacher = teacher_of("if-super-resolution")
    cond = {**conditions_of(teacher), "low_res": noise_of(teacher, 2), "class_labels": torch.tensor([7, 8])}
    null = teacher.null_rows(cond)
    assert torch.equal(null["low_res"], cond["low_res"])
    assert null["class_labels"].tolist() == [7, 8]
    assert not torch.equal(null["encoder_hidden_states"], cond["encoder_hidden_states"])


def test_super_resolution_is_not_distilled_without_a_base_student(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="IFSuperResolutionPipeline enlarges the picture.*give that run"):
        distill(teacher_of("if-super-resolution"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
