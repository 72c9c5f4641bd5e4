"""Networks of the published sizes with random weights on a GPU: what a step takes, and whether the exports are exact.

python benchmarks/full_size.py --output_dir runs/full-size --device cuda
python benchmarks/full_size.py --output_dir runs/full-size --device cpu --tiny      # the same path in a minute

Stable Diffusion 1.5 (a U-Net of 860 million weights, 512 x 512) with a full and with a LoRA student, and SDXL (2.6 billion,
1024 x 1024) with a LoRA one; text encoders and autoencoders of their sizes, the words of `glyphs`. Random weights draw
noise: time, memory and the self-check of an export are those of any weights of this size. Lines of JSON as they come.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import onestill
from onestill.core.devices import resolve_device
from onestill.core.tensors import num_parameters
from onestill.runs.build import build_run
from onestill.runs.distill import carry_out
from onestill.runs.inspect import estimate
from onestill.teachers.load import EMBEDDED
from onestill.training.config import make_config
from onestill.training.watch import StepLog

SCHEDULER = DDIMScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
    steps_offset=1,
)  # fmt: skip
PROMPT = "an italic green serif A on a black background"


def tokenizer() -> CLIPTokenizer:
    """Return the tokenizer of `glyphs`, with the room of the published ones."""
    folder = EMBEDDED["glyphs"].folder / "tokenizer"
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77, local_files_only=True)


def text_encoder(cls: Any, width: int, layers: int, heads: int, act: str) -> Any:
    """Return a CLIP text encoder of a published size."""
    words = tokenizer()
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, hidden_act=act, projection_dim=width, bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    return cls(config).eval()


def autoencoder(widths: tuple[int, ...], sample_size: int, scale: float) -> AutoencoderKL:
    """Return the autoencoder of Stable Diffusion, or one as deep and thinner."""
    return AutoencoderKL(
        block_out_channels=widths, layers_per_block=2, latent_channels=4, sample_size=sample_size,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, scaling_factor=scale,
    ).eval()  # fmt: skip


def sd15(tiny: bool) -> StableDiffusionPipeline:
    """Return Stable Diffusion 1.5 with random weights."""
    cross = "CrossAttnDownBlock2D"
    network = UNet2DConditionModel(
        sample_size=8 if tiny else 64,
        block_out_channels=(32, 64, 64, 64) if tiny else (320, 640, 1280, 1280),
        down_block_types=(cross, cross, cross, "DownBlock2D"),
        cross_attention_dim=768,
        attention_head_dim=8,
    )
    return StableDiffusionPipeline(
        autoencoder((32, 32, 32, 32) if tiny else (128, 256, 512, 512), 512, 0.18215),
        text_encoder(CLIPTextModel, 768, 1 if tiny else 12, 12, "quick_gelu"),
        tokenizer(),
        network,
        SCHEDULER,
        None,
        None,
        requires_safety_checker=False,
    )


def sdxl(tiny: bool) -> StableDiffusionXLPipeline:
    """Return SDXL with random weights."""
    wide = 64 if tiny else 1280
    network = UNet2DConditionModel(
        sample_size=8 if tiny else 128,
        block_out_channels=(32, 64, 64) if tiny else (320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 1) if tiny else (1, 2, 10),
        attention_head_dim=(2, 4, 4) if tiny else (5, 10, 20),
        cross_attention_dim=768 + wide,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=wide + 6 * 256,
    )
    return StableDiffusionXLPipeline(
        vae=autoencoder((32, 32, 32, 32) if tiny else (128, 256, 512, 512), 1024, 0.13025),
        text_encoder=text_encoder(CLIPTextModel, 768, 2 if tiny else 12, 12, "quick_gelu"),
        text_encoder_2=text_encoder(CLIPTextModelWithProjection, wide, 2 if tiny else 32, 4 if tiny else 20, "gelu"),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=network,
        scheduler=SCHEDULER,
    )


TEACHERS: dict[str, Callable[[bool], Any]] = {"sd15": sd15, "sdxl": sdxl}
LORA = {"lora_rank": 64}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd15, LoRA": ("sd15", LORA),
    "sd15, LoRA and corrector": ("sd15", {**LORA, "corrector_fraction": 0.25, "corrector_begin": 0.2}),
    "sd15, LoRA, two-time": ("sd15", {**LORA, "flow_map_fraction": 0.5}),
    "sd15, full": ("sd15", {"gradient_checkpointing": True}),
    "sdxl, LoRA": ("sdxl", {**LORA, "gradient_checkpointing": True, "train_batch_size": 4}),
}
"""Teacher, and what its run has besides the settings that all have."""


def write(folder: Path, name: str, tiny: bool, device: torch.device) -> dict[str, Any]:
    """Write a teacher in half precision, as the published ones are; return its size."""
    torch.manual_seed(0)
    with torch.device(device):
        pipeline = TEACHERS[name](tiny)
    pipeline.to("cpu", torch.float16).save_pretrained(folder)
    return {"weights, millions": num_parameters(pipeline.unet) / 1e6}


def measure(teacher: Path, run: Path, settings: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Distil a few steps and export; return seconds of a step, peak memory beside the estimate, and the self-check."""
    started = time.monotonic()
    config = make_config(
        {
            "teacher": str(teacher), "output_dir": str(run), "device": str(device), "mixed_precision": "bf16",
            "prompt_file": str(EMBEDDED["glyphs"].prompts), "num_prompts": 64, "train_batch_size": 8,
            "max_train_steps": 14, "learning_rate": 1e-5, "num_validation_images": 1, "num_teacher_steps": 4,
            "prompt_cache_dir": str(run.parent / "cache"), "guidance_scale": 7.5, "allow_tf32": True, "anchor_fraction": 0.0, "corrector_fraction": 0.0, **settings,
        }
    )  # fmt: skip
    prepared = build_run(config)
    found: dict[str, Any] = {"loaded after, s": time.monotonic() - started}
    seconds: list[float] = []
    cuda = device.type == "cuda"
    if cuda:
        prepared.teacher.to(device)
        prepared.student.to(device)
        cost = estimate(prepared.student, config, device)
        found |= {"step, s, estimated": cost.step_seconds, "memory, GB, estimated": cost.memory / 1e9}
        torch.cuda.reset_peak_memory_stats()

    def note(log: StepLog) -> None:
        seconds.append(log.seconds_per_step)
        if cuda:
            found["memory, GB"] = torch.cuda.max_memory_allocated() / 1e9

    result = carry_out(prepared, show_progress=False, on_step=note)
    found["step, s"] = statistics.median(seconds[len(seconds) // 2 :])
    found |= {"images / s": config.train_batch_size / found["step, s"], "self-check": result.export_error}
    return found | {"all, s": time.monotonic() - started}


def few_steps(run: Path, device: torch.device, num: int) -> dict[str, Any]:
    """Export a two-time student in several steps; return the self-check."""
    started = time.monotonic()
    error = onestill.export(run, run.parent / f"{run.name}-{num}", num_inference_steps=num, device=str(device))
    return {"self-check": error, "all, s": time.monotonic() - started}


@torch.no_grad()
def plain(teacher: Path, student: Path, device: torch.device) -> dict[str, Any]:
    """Time diffusers' own calls in half precision: 50 guided steps of the teacher, one of the student."""
    times = {}
    for name, folder, call in (
        ("teacher, 50 steps", teacher, {"num_inference_steps": 50, "guidance_scale": 7.5}),
        ("student, 1 step", student, {"num_inference_steps": 1, "guidance_scale": 1.0}),
    ):
        pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16, local_files_only=True)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(device)
        pipeline(PROMPT, **{**call, "num_inference_steps": 1})  # warm
        seconds = []
        for _ in range(1 if call["num_inference_steps"] == 50 else 5):
            if device.type == "cuda":
                torch.cuda.synchronize()
            at = time.monotonic()
            pipeline(PROMPT, **call)
            seconds.append(time.monotonic() - at)
        times[f"{name}, s"] = statistics.median(seconds)
        del pipeline
    return times | {"times as fast": times["teacher, 50 steps, s"] / times["student, 1 step, s"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true", help="networks as deep and thin: to try the script")
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    args = parser.parse_args()
    device, folder = resolve_device(args.device), args.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    lines = (folder / "full-size.jsonl").open("a", encoding="utf-8")

    def say(what: str, call: Callable[[], dict[str, Any]]) -> bool:
        if device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            found = call()
        except Exception as error:  # one that fails must not take the others' numbers with it
            found = {"error": f"{type(error).__name__}: {error}"[:2000]}
        print(line := json.dumps({"what": what, **found}), flush=True)
        lines.write(line + "\n")
        lines.flush()
        return "error" not in found

    for name in args.only:
        teacher_name, settings = RUNS[name]
        teacher, run = folder / teacher_name, folder / name.replace(", ", "-").replace(" ", "-")
        if not teacher.exists() and not say(teacher_name, partial(write, teacher, teacher_name, args.tiny, device)):
            continue
        if not say(name, partial(measure, teacher, run, settings, device)):
            continue
        if name == "sd15, LoRA":
            say("sd15, plain diffusers", partial(plain, teacher, run / "pipeline", device))
        if settings.get("flow_map_fraction"):
            for num in (2, 4):
                say(f"{name}, {num} steps", partial(few_steps, run, device, num))
    if device.type == "cuda":
        print(json.dumps({"device": torch.cuda.get_device_name(device), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
