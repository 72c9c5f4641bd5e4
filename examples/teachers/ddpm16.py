"""Train a DDPM as in the paper of that name: epsilon, linear betas, 1,000 steps, no conditions; 16x16 colour pictures.

The pictures are rendered here: one shape (disc, ring, square, triangle, cross) in one of seven colours on dark grey,
tilted, shifted and scaled a little. The result is a stock diffusers folder (`DDPMPipeline`).

    python examples/teachers/ddpm16.py --output_dir runs/ddpm16-teacher

Seed 0: 4,000 steps of 32 pictures on one CPU core. `samples.png` shows 50 pictures, 50 DDIM steps each.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm.auto import trange

from onestill.runs.load import load_sampler
from onestill.sampling.pictures import save_grid

SIZE = 16
SHAPES = ("disc", "ring", "square", "triangle", "cross")
COLORS = (
    (225, 35, 45), (35, 150, 65), (40, 75, 220), (250, 220, 50), (60, 205, 225), (150, 50, 185), (250, 250, 250),
)  # fmt: skip
BACKGROUND = 40
REFERENCE_SEED = 1_000_000
_SUPERSAMPLING = 8


def render_masks(num: int, generator: np.random.Generator) -> Tensor:
    """Return the coverage in [0, 1] of `num` shapes, [num, 1, 16, 16], the kinds in turn."""
    canvas = SIZE * _SUPERSAMPLING
    masks = []
    for i in range(num):
        radius = canvas * generator.uniform(0.28, 0.38)
        center, turn = canvas / 2 + canvas * generator.uniform(-0.09, 0.09, 2), np.pi / 4 + generator.uniform(-0.2, 0.2)
        image = Image.new("L", (canvas, canvas))
        _draw(ImageDraw.Draw(image), SHAPES[i % len(SHAPES)], center, radius, turn)
        masks.append(np.asarray(image.reduce(_SUPERSAMPLING)))
    return torch.from_numpy(np.stack(masks))[:, None] / 255


def _draw(draw: ImageDraw.ImageDraw, shape: str, center: np.ndarray, radius: float, turn: float) -> None:
    if shape in ("disc", "ring"):
        draw.ellipse([*(center - radius), *(center + radius)], fill=255)
        if shape == "ring":
            draw.ellipse([*(center - radius / 2), *(center + radius / 2)], fill=0)
        return
    if shape == "cross":
        long, short = 1.1 * radius, 0.4 * radius
        arms = [[(-long, -short), (long, -short), (long, short), (-long, short)]]
        arms.append([(y, x) for x, y in arms[0]])
    else:
        num = {"triangle": 3, "square": 4}[shape]
        angles = 2 * np.pi * np.arange(num) / num
        arms = [list(zip(1.15 * radius * np.cos(angles), 1.15 * radius * np.sin(angles), strict=True))]
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    for arm in arms:
        draw.polygon([tuple(center + rotation @ np.array(corner)) for corner in arm], fill=255)


def render(num: int, seed: int, masks: Tensor | None = None) -> Tensor:
    """Return pictures [num, 3, 16, 16] in [-1, 1]; with some of `masks`, or with a mask of its own for each."""
    generator = np.random.default_rng(seed)
    chosen = render_masks(num, generator) if masks is None else masks[generator.integers(len(masks), size=num)]
    palette = torch.tensor(COLORS)[:, :, None, None] / 127.5 - 1
    front = palette[generator.integers(len(COLORS), size=num)]
    return torch.lerp(torch.full_like(front, BACKGROUND / 127.5 - 1), front, chosen)


def build_pipeline() -> DDPMPipeline:
    """Return the untrained pipeline: 0.74 million weights, attention at 4x4."""
    unet = UNet2DModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        block_out_channels=(24, 32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=8,
    )
    return DDPMPipeline(unet, DDPMScheduler(beta_schedule="linear", prediction_type="epsilon", clip_sample=False))


def train(pipeline: DDPMPipeline, args: argparse.Namespace) -> None:
    """Train the pipeline's network; its averaged weights stay in it."""
    unet, scheduler, batch = pipeline.unet, pipeline.scheduler, args.train_batch_size
    masks = render_masks(args.num_masks, np.random.default_rng(args.seed))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.learning_rate, weight_decay=0.01, fused=True)
    schedule: Any = get_scheduler(
        "cosine", optimizer, num_warmup_steps=args.max_train_steps // 20, num_training_steps=args.max_train_steps
    )
    ema = EMAModel(unet.parameters(), decay=0.9995, use_ema_warmup=True, power=0.75, foreach=True)
    for step in (bar := trange(args.max_train_steps)):
        x_0 = render(batch, args.seed + step, masks)
        eps = torch.randn_like(x_0)
        # Stratified times: the variance of the loss falls, the expectation stays.
        index = ((torch.arange(batch) + torch.rand(batch)) / batch * 1000).long()
        prediction = unet(scheduler.add_noise(x_0, eps, index), index).sample
        loss = torch.nn.functional.mse_loss(prediction, eps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    ema.copy_to(unet.parameters())


def main(argv: Sequence[str] | None = None) -> None:
    """Train and save the teacher, and draw with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_train_steps", type=int, default=4000)
    parser.add_argument("--train_batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--num_masks", type=int, default=10_000, help="shapes rendered before the training")
    parser.add_argument("--num_sample_images", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    started, pipeline = time.monotonic(), build_pipeline()
    train(pipeline, args)
    pipeline.save_pretrained(args.output_dir, safe_serialization=True)
    seconds = time.monotonic() - started
    images = load_sampler(teacher=args.output_dir, device="cpu").images(range(args.num_sample_images), {})
    save_grid(images, args.output_dir / "samples.png", size=4 * SIZE)
    print(f"{args.max_train_steps} steps, seed {args.seed}, {seconds:.0f} s -> {args.output_dir}")


if __name__ == "__main__":
    main()
