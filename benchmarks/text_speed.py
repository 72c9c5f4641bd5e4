"""One-step text-to-image against the teacher's 50 guided steps, both through diffusers' own call.

python benchmarks/text_speed.py --student RUN/pipeline              # the embedded glyphs as the teacher
Prompts are encoded and latents decoded in every call: it is what a user waits. Timed in turns within one process. A second
table has the parts of the student's call; what they leave of it is the pipeline's own code.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging

from onestill.evaluation.speed import compare
from onestill.teachers.load import EMBEDDED


def load(folder: Path) -> Any:
    """Return a stock pipeline that draws no progress bar."""
    pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def parts_of(pipeline: Any, prompts: list[str]) -> dict[str, Callable[[], object]]:
    """Return the parts of a Stable Diffusion's one step, each on its own."""
    hidden, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
    config = pipeline.unet.config
    latents = torch.randn(len(prompts), config.in_channels, config.sample_size, config.sample_size)
    t = pipeline.scheduler.timesteps[0]
    return {
        "network": torch.no_grad()(lambda: pipeline.unet(latents, t, encoder_hidden_states=hidden)),
        "decoder": torch.no_grad()(lambda: pipeline.vae.decode(latents)),
        "prompt": torch.no_grad()(lambda: pipeline.encode_prompt(prompts, "cpu", 1, False)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, required=True, help="an exported pipeline")
    parser.add_argument("--teacher", default="glyphs", help="a folder, or an embedded text teacher")
    parser.add_argument("--prompt", default="a bold red serif A on a yellow background")
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    teacher = load(EMBEDDED[args.teacher].folder if args.teacher in EMBEDDED else Path(args.teacher))
    student = load(args.student)

    def call(pipeline: Any, num: int, steps: int, scale: float) -> Callable[[], object]:
        prompts = [args.prompt] * num
        return lambda: pipeline(prompts, num_inference_steps=steps, guidance_scale=scale, output_type="pt")

    print(
        f"| batch ({args.threads} threads) | {args.num_inference_steps} guided steps | one step | ratio |\n|---|---|---|---|"
    )
    for num in (1, 16):
        calls = {
            "teacher": call(teacher, num, args.num_inference_steps, args.guidance_scale),
            "student": call(student, num, 1, 1.0),
        }
        seconds = compare(calls, repeats=args.repeats, warmup=1)
        ratio = seconds["teacher"] / seconds["student"]
        print(f"| {num} | {seconds['teacher'] * 1e3:.0f} ms | {seconds['student'] * 1e3:.1f} ms | {ratio:.1f} |")

    print("\n| batch | network | decoder | prompt | the whole call |\n|---|---|---|---|---|")
    for num in (1, 16):
        parts = {**parts_of(student, [args.prompt] * num), "call": call(student, num, 1, 1.0)}
        seconds = compare(parts, repeats=args.repeats, warmup=1)
        print(f"| {num} | " + " | ".join(f"{value * 1e3:.1f} ms" for value in seconds.values()) + " |")


if __name__ == "__main__":
    main()
