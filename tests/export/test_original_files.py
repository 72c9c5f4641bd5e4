"""Students in the files that ComfyUI, A1111 and their kin read: names, numbers, and what such a program draws.

Nothing of those programs is here: what they do with a file is written down again, from the formulas of their samplers
and from how they look up names.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders import single_file_utils as stock
from runs_helpers import assert_refused, call_cli, finished_run, session_folder, snapshot
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextModelWithProjection

from onestill.core.errors import SettingError
from onestill.core.tensors import Cond
from onestill.export import original_names as names
from onestill.export.export import ExportError, export_student
from onestill.export.programs import Programs
from onestill.sampling.generate import student_generator
from onestill.students.lora import Lora
from onestill.students.one_step import one_step_of
from onestill.students.student import Student
from onestill.teachers.load import load_teacher
from onestill.teachers.pipelines.teacher import PipelineTeacher

sys.path.append(str(Path(__file__).parents[1] / "families"))
from components import clip_text, clip_tokenizer, vae
from pipelines import build
from vp_pipelines import cond_unet, stable_diffusion, vp_scheduler

NOISE = torch.Generator().manual_seed(3)


@torch.no_grad()
def trained(teacher: Any, lora: Lora | None = None) -> Student:
    """Return a student some way into a training: whatever starts at zero has moved."""
    torch.manual_seed(5)
    student, generator = Student(teacher, lora=lora), torch.Generator().manual_seed(1)
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return student


def teacher_of(pipeline: Any, folder: Path) -> PipelineTeacher:
    pipeline.save_pretrained(folder / "t")
    teacher = load_teacher(folder / "t")
    assert isinstance(teacher, PipelineTeacher)
    return teacher


XL: dict[str, Any] = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 8 + 6 * 4,
    "use_linear_projection": True,
}
SCHEDULE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def stable_diffusion_2(**scheduler: Any) -> StableDiffusionPipeline:
    """Return a tiny Stable Diffusion 2: OpenCLIP's text encoder and linear projections around its attention."""
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip_text(hidden_act="gelu"),
        tokenizer=clip_tokenizer(),
        unet=cond_unet(use_linear_projection=True),
        scheduler=vp_scheduler(**scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl() -> StableDiffusionXLPipeline:
    """Return a tiny SDXL whose text encoders differ in width, as those of the published one do."""
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip_text(),
        text_encoder_2=clip_text(CLIPTextModelWithProjection, 24, projection_dim=8, hidden_act="gelu"),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=cond_unet(cross_attention_dim=40, **XL),
        scheduler=EulerDiscreteScheduler(**SCHEDULE, steps_offset=1),
    )


# Names: derived from the two layouts, and turned back by diffusers' own reading of such files

THREE_BLOCKS: dict[str, Any] = {
    "block_out_channels": (4, 8, 8),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "transformer_layers_per_block": (1, 2, 1),
}


@pytest.mark.parametrize("more", [{}, XL])
def test_names_of_a_network_are_turned_back(more: dict[str, Any]) -> None:
    network = cond_unet(**THREE_BLOCKS, **more)
    state = network.state_dict()
    found = names.network_names(state, 2)
    assert len(set(found.values())) == len(found)
    original = {f"{names.NETWORK}{found[name]}": value for name, value in state.items()}
    back = stock.convert_ldm_unet_checkpoint(original, dict(network.config))
    assert set(back) == set(state) and all(back[name] is original[f"{names.NETWORK}{found[name]}"] for name in state)


def test_names_of_the_published_networks() -> None:
    # As in the files that their authors gave out, by which programs tell them apart.
    with torch.device("meta"):
        network = UNet2DConditionModel(block_out_channels=(32, 64, 128, 128), cross_attention_dim=768)
    found = names.network_names(network.state_dict(), 2).values()
    for name in ("input_blocks.3.0.op.weight", "input_blocks.11.0.in_layers.2.weight", "middle_block.2.out_layers.3.bias",
                 "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", "output_blocks.2.1.conv.weight",
                 "output_blocks.5.2.conv.weight", "output_blocks.11.0.skip_connection.weight", "out.2.weight"):  # fmt: skip
        assert name in found, name
    assert "output_blocks.11.2.conv.weight" not in found


def test_names_of_an_autoencoder_are_turned_back() -> None:
    blocks: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
    }
    network = AutoencoderKL(block_out_channels=(4, 8, 8), norm_num_groups=4, layers_per_block=2, **blocks)
    state = network.state_dict()
    original = {f"{names.VAE}{name}": value for name, value in names.vae_tensors(state).items()}
    assert original[f"{names.VAE}decoder.mid.attn_1.q.weight"].shape == (8, 8, 1, 1)
    back = stock.convert_ldm_vae_checkpoint(original, network.config)
    assert set(back) == set(state) and all(torch.equal(back[name], state[name]) for name in state)


def test_names_of_open_clip_are_turned_back() -> None:
    encoder = clip_text(CLIPTextModelWithProjection, projection_dim=8, hidden_act="gelu")
    original = {
        f"{names.OPEN_CLIP_XL}{name}": value for name, value in names.open_clip_tensors(encoder.state_dict()).items()
    }
    assert original[f"{names.OPEN_CLIP_XL}text_projection"].shape == (16, 8)
    back = stock.convert_open_clip_checkpoint(encoder, original, prefix=names.OPEN_CLIP_XL)
    state = encoder.state_dict()
    assert set(back) == set(state) and all(torch.equal(back[name], state[name]) for name in state)


# Files: what diffusers makes of them is the student

PIPELINES: dict[str, Callable[[], Any]] = {
    "sd-epsilon": lambda: build("sd-epsilon"),
    "sd-v-zero-snr": lambda: build("sd-v-zero-snr"),
    "sd-sample": lambda: stable_diffusion(prediction_type="sample"),
    "sd2-v": lambda: stable_diffusion_2(prediction_type="v_prediction"),
    "sdxl": stable_diffusion_xl,
}


@functools.cache
def exported(name: str) -> tuple[Student, Path, float]:
    """Return a student, the folder of its file, and how far that is off by its own check; read only."""
    folder = session_folder() / f"original-{name}"
    student = trained(teacher_of(PIPELINES[name](), folder))
    return student, folder / "out", export_student(student, folder / "out", format="single_file")


@pytest.mark.parametrize("name", PIPELINES)
def test_a_file_is_the_student(name: str) -> None:
    _, out, error = exported(name)
    assert error <= 1e-5
    (file,) = out.glob("*.safetensors")
    assert file.name == "t-1-step.safetensors"
    with safe_open(file, framework="pt") as opened:
        said, keys = opened.metadata(), set(opened.keys())
    is_v, kind = "-v" in name, "v1" if name in ("sd-epsilon", "sd-v-zero-snr", "sd-sample") else name
    assert ("v_pred" in keys, "ztsnr" in keys) == (is_v, name == "sd-v-zero-snr")
    assert said["modelspec.prediction_type"] == ("v" if is_v else "sample" if name == "sd-sample" else "epsilon")
    assert said["modelspec.resolution"] == "16x16"
    kinds = {"v1": "stable-diffusion-v1", "sd2-v": "stable-diffusion-v2-768-v", "sdxl": "stable-diffusion-xl-v1-base"}
    assert said["modelspec.architecture"] == kinds[kind]
    assert "sampler euler, scheduler sgm_uniform, 1 step, CFG 1" in said["modelspec.usage_hint"]
    # Nothing but the file and JSON: its configuration holds no weights, and says nothing of where they were.
    assert not any(str(session_folder()) in path.read_text() for path in (out / "config").rglob("*.json"))
    assert {path.suffix for path in (out / "config").rglob("*") if path.is_file()} == {".json"}


def test_a_file_for_other_programs_is_not_drawn_with_here() -> None:
    _, out, _ = exported("sd-epsilon")
    outcome = call_cli("sample", "--student", out, "--prompt", "red", "--output", "x.png")
    assert_refused(outcome, "was exported as single_file, for other programs; give the run's folder")


def test_a_file_of_several_steps_is_the_student(tmp_path: Path) -> None:
    student = trained(teacher_of(stable_diffusion_xl(), tmp_path))
    assert export_student(student, tmp_path / "out", format="single_file", num_inference_steps=4) <= 1e-5
    card = (tmp_path / "out" / "README.md").read_text()
    assert "t-4-step.safetensors" in card and "4 steps, CFG 1" in card
    assert "the sigmas 14.6146, 4.0817, 1.6129, 0.6932, 0.0000, for a node that takes sigmas" in card


# What other programs draw with them


def schedule(*, zero_snr: bool = False) -> Tensor:
    """Return sigma / alpha at each of the 1000 times, as such programs have them."""
    squares = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    if zero_snr:
        roots = squares.sqrt()
        squares = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
        squares[-1] = 4.8973451890853435e-08
    return ((1 - squares) / squares).sqrt()


Network = Callable[[Tensor, Tensor], Tensor]


def denoised(kind: str, network: Network, x: Tensor, sigma: float, sigmas: Tensor) -> Tensor:
    """Return the picture in a state x = picture + sigma noise, as each of the kinds of networks gives it."""
    size = (sigma**2 + 1) ** 0.5
    t = (sigmas.log() - math.log(sigma)).abs().argmin()
    if kind == "CONST":
        return x - sigma * network(x, t)
    output = network(x / size, t)
    return {"EPS": x - sigma * output, "V_PREDICTION": x / size**2 - sigma * output / size, "X0": output}[kind]


def euler(kind: str, network: Network, noise: Tensor, levels: list[float], sigmas: Tensor, *, first: str) -> Tensor:
    """Return what Euler steps down these levels make of noise, which is scaled at first by sigma, or as at a path's end."""
    scale = {"sigma": levels[0], "max_denoise": (1 + levels[0] ** 2) ** 0.5, "flow": 1.0}[first]
    x = scale * noise
    for sigma, after in zip(levels, [*levels[1:], 0.0], strict=True):
        x = x + (x - denoised(kind, network, x, sigma, sigmas)) / sigma * (after - sigma)
    return x


def seen(teacher: PipelineTeacher, network: Any, cond: Cond, net_time: float | None = None) -> Network:
    """Return a network as a function of its input and time alone; of the input alone if a time is given."""

    def call(x: Tensor, t: Tensor) -> Tensor:
        told = float(t) if net_time is None else net_time
        return teacher.call(network, x.float(), torch.full((len(x),), told), cond).double()

    return call


def example(student: Student, num: int = 3) -> tuple[Tensor, Cond]:
    noise = torch.randn(num, *student.spec.sample_shape, generator=NOISE)
    return noise, student.teacher.example_rows(num)


KINDS = {
    "sd-epsilon": "EPS",
    "sdxl": "EPS",
    "sd2-v": "V_PREDICTION",
    "sd-v-zero-snr": "V_PREDICTION",
    "sd-sample": "X0",
}


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_one_euler_step_of_another_program_is_the_student(name: str) -> None:
    student, out, _ = exported(name)
    teacher = student.teacher
    assert isinstance(teacher, PipelineTeacher)
    (file,), config = out.glob("*.safetensors"), out / "config"
    absent = {} if name == "sdxl" else {"safety_checker": None}
    unet = type(teacher.pipeline).from_single_file(str(file), config=str(config), local_files_only=True, **absent).unet
    noise, cond = example(student)
    expected = student_generator(student)(noise, cond)
    sigmas = schedule(zero_snr=name == "sd-v-zero-snr")
    network = seen(teacher, unet, cond)
    found = euler(KINDS[name], network, noise.double(), [float(sigmas[-1])], sigmas, first="max_denoise")
    off = float((found - expected).abs().max())
    # Zero SNR: those programs' largest sigma is 4519, so 2e-4 of the noise is there.
    assert off <= (1e-3 if name == "sd-v-zero-snr" else 1e-4 * max(1, float(expected.abs().max())))
    assert float((expected - noise).abs().max()) > 0.1, "a picture that is the noise would be right for no reason"
    # A1111's noise, scaled by sigma: what the card says is left of it is left.
    other = euler(KINDS[name], network, noise.double(), [float(sigmas[-1])], sigmas, first="sigma")
    card = (out / "README.md").read_text()
    says = "leaves 3 % of it in the picture" in card
    assert says == (KINDS[name] == "EPS")
    if says:
        size = float((1 + sigmas[-1] ** 2).sqrt() - sigmas[-1])
        assert 0.025 < size < 0.035 and float((other - expected).abs().max()) > 0.02


@torch.no_grad()
def test_euler_steps_down_the_levels_on_the_card_are_the_student(tmp_path: Path) -> None:
    teacher = teacher_of(build("sd-epsilon"), tmp_path)
    student = trained(teacher)
    export_student(student, tmp_path / "out", format="single_file", num_inference_steps=4)
    (file,), config = (tmp_path / "out").glob("*.safetensors"), str(tmp_path / "out" / "config")
    how: dict[str, Any] = {"config": config, "local_files_only": True, "safety_checker": None}
    unet = StableDiffusionPipeline.from_single_file(str(file), **how).unet
    noise, cond = example(student)
    expected = student_generator(student, num_steps=4)(noise, cond)
    levels, sigmas = Programs(student, 4).sigmas, schedule()
    found = euler("EPS", seen(teacher, unet, cond), noise.double(), levels, sigmas, first="max_denoise")
    assert float((found - expected).abs().max()) <= 1e-4 * max(1, float(expected.abs().max()))


@torch.no_grad()
def test_a_flow_from_its_end_is_the_student_too(tmp_path: Path) -> None:
    # The fourth kind: networks of SD3 and Flux, whose names other programs read as diffusers writes them.
    teacher = teacher_of(build("sd3"), tmp_path)
    student = trained(teacher)
    step, (noise, cond) = one_step_of(student), example(student, 2)
    network = seen(teacher, step.network, cond, step.net_time)
    found = euler("CONST", network, noise.double(), [1.0], torch.ones(1), first="flow")
    torch.testing.assert_close(found.float(), student_generator(student)(noise, cond), atol=1e-4, rtol=1e-4)


def test_other_start_levels_are_said(tmp_path: Path) -> None:
    pipeline = stable_diffusion()
    pipeline.scheduler = type(pipeline.scheduler)(beta_start=0.0001, beta_end=0.02)  # alpha is 0.0064 at its end
    student = trained(teacher_of(pipeline, tmp_path))
    assert student.spec.t_max < 1
    said = Programs(student, 1).words("file", "a checkpoint")
    (sigma,) = Programs(student, 1).sigmas
    assert f"this student at {sigma:.4f}, so their own step draws something else" in said
    assert f"`SamplerCustom` the sigmas {sigma:.4f}, 0" in said and "is this student's own" not in said


# LoRA files


def comfyui_map(original: dict[str, Tensor], layers: int, unet: Any) -> dict[str, str]:
    """Return what ComfyUI takes a LoRA's names for: original names, and diffusers' in Kohya's and an older spelling."""
    found: dict[str, str] = {}
    for name in original:
        if name.startswith(names.NETWORK) and name.endswith(".weight"):
            found["lora_unet_" + name.removeprefix(names.NETWORK).removesuffix(".weight").replace(".", "_")] = name
    for name, theirs in names.network_names(unet.state_dict(), layers).items():
        if name.endswith(".weight"):
            layer = name.removesuffix(".weight")
            found["lora_unet_" + layer.replace(".", "_")] = found["lycoris_" + layer.replace(".", "_")] = (
                names.NETWORK + theirs
            )
            old = layer.replace(".to_", ".processor.to_").removesuffix(".0" if layer.endswith(".to_out.0") else "\n")
            found[old] = found[f"unet.{old}"] = names.NETWORK + theirs
    return found


def layer_of(key: str) -> str:
    for end in (".lora_down.weight", ".lora_up.weight", ".alpha", ".lora_A.weight", ".lora_B.weight"):
        key = key.removesuffix(end)
    return key


@torch.no_grad()
@pytest.mark.parametrize(("name", "num"), [("sdxl", 1), ("sd-epsilon", 4)])
def test_a_second_lora_file_is_the_student_elsewhere(name: str, num: int, tmp_path: Path) -> None:
    teacher = teacher_of(PIPELINES[name](), tmp_path)
    layers = (
        ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "add_embedding.linear_1") if name == "sdxl" else ()
    )
    student, out = trained(teacher, Lora(2, 3.0, layers)), tmp_path / "out"
    assert export_student(student, out, format="lora", num_inference_steps=num) <= 1e-4
    files = {"pytorch_lora_weights.safetensors", f"t-{num}-step-comfyui.safetensors"}
    assert {path.name for path in out.iterdir()} == {*files, "scheduler_config.json", "README.md", "onestill.json"}
    second, first = (load_file(out / file) for file in sorted(files, reverse=True))
    assert len(second) == 3 * len(first) / 2 and all(f"{layer_of(key)}.alpha" in second for key in second)
    # Every key is claimed in the second file; in the first, attention's are not.
    original = names.original_tensors(load_teacher(tmp_path / "t").pipeline)  # type: ignore[attr-defined]  # of a pipeline
    claimed = comfyui_map(original, 1, teacher.network)
    assert {layer_of(key) for key in second} <= set(claimed)
    assert any("attn1_to_q" in key for key in second) and any("time_embedding_linear_2" in key for key in second)
    assert all(layer_of(key) not in claimed for key in first if "attn1.to_q" in key)
    # Added to the teacher's own weights as such a program does, it draws the student's pictures.
    for layer in {layer_of(key) for key in second}:
        up, down = second[f"{layer}.lora_up.weight"], second[f"{layer}.lora_down.weight"]
        weight = original[claimed[layer]]
        change = float(second[f"{layer}.alpha"]) / len(down) * up.flatten(1) @ down.flatten(1)
        original[claimed[layer]] = weight + change.reshape(weight.shape)
    config = {**teacher.network.config}
    unet = UNet2DConditionModel.from_config(config).eval()
    unet.load_state_dict(stock.convert_ldm_unet_checkpoint(original, config))
    noise, cond = example(student)
    sigmas = schedule()
    found = euler(
        "EPS", seen(teacher, unet, cond), noise.double(), Programs(student, num).sigmas, sigmas, first="max_denoise"
    )
    expected = student_generator(student, num_steps=num)(noise, cond)
    assert float((found - expected).abs().max()) <= 1e-4 * max(1, float(expected.abs().max()))


def test_a_lora_folder_is_called_as_its_card_says(tmp_path: Path) -> None:
    teacher = teacher_of(build("sd-epsilon"), tmp_path)
    student, out = trained(teacher, Lora(2)), tmp_path / "out"
    export_student(student, out, format="lora")
    card = (out / "README.md").read_text()
    assert 'pipe.scheduler = diffusers.DDIMScheduler.from_pretrained("path/to/this/folder")' in card
    assert "load_lora_weights" in card and "t-1-step-comfyui.safetensors" in card and "rank 2" in card
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "t", safety_checker=None)
    pipeline.load_lora_weights(out)  # of two files it takes its own
    assert pipeline.get_active_adapters() == ["default_0"]


def test_networks_of_other_families_have_one_file(tmp_path: Path) -> None:
    student = trained(teacher_of(build("sd3"), tmp_path), Lora(2))
    assert export_student(student, tmp_path / "out", format="lora") <= 1e-4
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["pytorch_lora_weights.safetensors"]


# Refusals, before any work


@pytest.mark.parametrize(
    ("name", "format", "words"),
    [
        ("sd3", "single_file", "is for Stable Diffusion 1.x, 2.x and XL, and this is a student of a StableDiffusion3Pipeline"),
        ("if", "single_file", "format='single_file': is for Stable Diffusion 1.x, 2.x and XL, and this is a student of a IF"),
        ("sdxl-statistics", "single_file", "has no place for the mean and deviation of these latents"),
        ("sdxl-zeros", "single_file", "is read by the widths of its two text encoders, and these have the same"),
        ("sd-epsilon", "lora", "there is no LoRA file of this student: it has no LoRA"),
    ],
)  # fmt: skip
def test_students_that_have_no_such_file(name: str, format: str, words: str, tmp_path: Path) -> None:
    student = Student(teacher_of(build(name), tmp_path))
    with pytest.raises(SettingError) as caught:
        export_student(student, tmp_path / "out", format=format)
    assert words in str(caught.value), caught.value
    assert not (tmp_path / "out").exists()


def test_a_network_with_other_layers_has_no_names(tmp_path: Path) -> None:
    pipeline = stable_diffusion()
    pipeline.unet = cond_unet(time_cond_proj_dim=8)
    student = Student(teacher_of(pipeline, tmp_path))
    with pytest.raises(SettingError, match=r"format='single_file': .*time_embedding.cond_proj.*no name in such files"):
        export_student(student, tmp_path / "out", format="single_file")


def test_the_command_refuses_by_name(tmp_path: Path) -> None:
    for format in ("single_file", "lora"):
        flags = ["--student", finished_run(), "--output", tmp_path / "out", "--format", format, "--device", "cpu"]
        assert_refused(call_cli("export", *flags), f"--format {format}: ")
    assert snapshot(tmp_path) == {}


def test_a_file_that_is_not_the_student_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = trained(teacher_of(build("sd-epsilon"), tmp_path))
    monkeypatch.setattr("onestill.export.single_file.original_tensors", lambda pipeline: {
        name: value * 1.01 for name, value in names.original_tensors(pipeline).items()
    })  # fmt: skip
    with pytest.raises(ExportError, match="self-check failed"):
        export_student(student, tmp_path / "out", format="single_file")
    assert not (tmp_path / "out").exists()
