"""Train a CIFAR-10 teacher: a class-conditional diffusion model of 32x32 colour images.

The result is a stock diffusers folder (`ConsistencyModelPipeline`, the one stock class around `UNet2DModel`
that takes labels) with a v-prediction `DDIMScheduler` at zero terminal SNR. Classes 0-9 are CIFAR-10's, class
10 is the null class that makes classifier-free guidance possible.

    python examples/teachers/cifar10.py --data_dir DATA --output_dir runs/cifar10-teacher \
        --mixed_precision bf16 --compile --resume_from_checkpoint latest

The training comes in pieces: each stops after --max_minutes, and the same command goes on from there until
--max_train_steps; on a CPU to the bit as if it had never stopped. Every piece ends with

    model_index.json unet/ scheduler/   the teacher with averaged weights
    checkpoint-N/                       everything the next piece needs (safetensors and JSON)
    samples/step-N.png                  100 images in 50 DDIM steps, one class for each column
    images.safetensors                  the decoded archive
"""

from __future__ import annotations

import argparse
import copy
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from cifar10_data import NUM_CLASSES, SIZE, LabelledImages, load_images, to_floats
from diffusers import ConsistencyModelPipeline, DDIMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor

from onestill.core.devices import resolve_device
from onestill.runs.load import load_sampler
from onestill.sampling.pictures import save_grid
from onestill.training.checkpoint import (
    Checkpoint,
    list_checkpoints,
    read_latest,
    rotate,
    write_checkpoint,
)

NULL_CLASS = NUM_CLASSES
CACHE = "images.safetensors"
SIZES: dict[str, dict[str, Any]] = {
    # 35.8 million parameters, the shape of DDPM's network for CIFAR-10: attention at 16x16 and in the middle.
    "base": {
        "block_out_channels": (128, 256, 256, 256),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 64,
    },
    # 49 thousand, to try the script on a CPU.
    "toy": {
        "block_out_channels": (8, 8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
        "norm_num_groups": 4,
    },
}
FIXED = ("size", "train_batch_size", "learning_rate", "lr_warmup_steps", "label_dropout", "seed")
"""Settings that a later piece must not change."""


def build_pipeline(size: str) -> ConsistencyModelPipeline:
    """Return the untrained pipeline."""
    shape: Any = {"sample_size": SIZE, "in_channels": 3, "out_channels": 3}
    unet = UNet2DModel(num_class_embeds=NUM_CLASSES + 1, **shape, **SIZES[size])
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    return ConsistencyModelPipeline(unet=unet, scheduler=scheduler)


@dataclass(frozen=True)
class Batch:
    """One batch: x_t = alpha x_0 + sigma eps at the time `index`, the velocity to predict, and the labels."""

    x_t: Tensor
    velocity: Tensor
    index: Tensor
    labels: Tensor


class Training:
    """The teacher's training and all of its state.

    Every draw is from one generator on the device, which is part of the checkpoint.
    """

    def __init__(self, args: argparse.Namespace, images: LabelledImages, device: torch.device) -> None:
        self.args, self.device, self.images = args, device, images.to(device)
        torch.manual_seed(args.seed)
        self.pipeline = build_pipeline(args.size)
        self.network = self.pipeline.unet.to(device, memory_format=torch.channels_last).train()
        # `network` keeps its names and its class; `forward` is what runs.
        self.forward = torch.compile(self.network, dynamic=False) if args.compile else self.network
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(),
            lr=args.learning_rate,
            weight_decay=0.01,
            fused=device.type in ("cpu", "cuda"),
        )
        average: Any = {"decay": 0.9995, "use_ema_warmup": True, "power": 0.75, "foreach": True}
        self.ema = EMAModel(self.network.parameters(), **average)
        self.generator = torch.Generator(device).manual_seed(args.seed)
        self.step = 0
        alpha_squared = self.pipeline.scheduler.alphas_cumprod.double()
        self.alpha = alpha_squared.sqrt().float().to(device)
        self.sigma = (1 - alpha_squared).sqrt().float().to(device)

    def learning_rate(self) -> float:
        """Return the learning rate of the next step: linear warm-up, then half a cosine down to zero."""
        args = self.args
        warm = min(1.0, (self.step + 1) / max(1, args.lr_warmup_steps))
        return args.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * self.step / args.max_train_steps))

    def draw(self) -> Batch:
        """Return a batch of images, half of them mirrored, at stratified times."""
        num = self.args.train_batch_size
        random: Any = {"generator": self.generator, "device": self.device}
        rows = torch.randint(len(self.images.pixels), (num,), **random)
        pixels, labels = self.images.pixels[rows], self.images.labels[rows]
        mirrored = torch.rand(num, **random) < 0.5
        pixels = torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)
        labels = labels.masked_fill(torch.rand(num, **random) < self.args.label_dropout, NULL_CLASS)
        x_0 = to_floats(pixels).contiguous(memory_format=torch.channels_last)
        eps = torch.randn(x_0.shape, **random).contiguous(memory_format=torch.channels_last)
        # Stratified times: the variance of the loss falls, the expectation stays.
        shares = (torch.arange(num, device=self.device) + torch.rand(num, **random)) / num
        index = (shares * len(self.alpha)).long().clamp(max=len(self.alpha) - 1)
        alpha, sigma = (level[index, None, None, None] for level in (self.alpha, self.sigma))
        return Batch(alpha * x_0 + sigma * eps, alpha * eps - sigma * x_0, index, labels)

    def update(self) -> Tensor:
        """Do one optimiser step and return the loss, still on the device: nothing here waits for it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        batch = self.draw()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.mixed_precision == "bf16"):
            output = self.forward(batch.x_t, batch.index, class_labels=batch.labels).sample
        loss = torch.nn.functional.mse_loss(output.float(), batch.velocity)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.network.parameters())
        self.step += 1
        return loss.detach()

    def save(self) -> Path:
        """Write a checkpoint and, with averaged weights, the pipeline; return the checkpoint's folder."""
        folder = self.args.output_dir
        names = [name for name, _ in self.network.named_parameters()]
        tensors = {
            "network": dict(self.network.named_parameters()),
            "ema": dict(zip(names, self.ema.shadow_params, strict=True)),
            "optimizer": {
                f"{index}.{name}": torch.as_tensor(value)
                for index, state in self.optimizer.state_dict()["state"].items()
                for name, value in state.items()
            },
            "random": {self.device.type: self.generator.get_state()},
        }
        values = {
            "step": self.step,
            "ema_step": self.ema.optimization_step,
            "settings": {name: getattr(self.args, name) for name in FIXED},
        }
        written = write_checkpoint(folder, self.step, Checkpoint(tensors, values))
        rotate(folder, 2, newest=self.step)
        network = copy.deepcopy(self.network)
        self.ema.copy_to(network.parameters())
        averaged = ConsistencyModelPipeline(unet=network.cpu().eval(), scheduler=self.pipeline.scheduler)
        averaged.save_pretrained(folder, safe_serialization=True)
        return written

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: If it is of a training with other settings, or on another kind of device.
        """
        tensors, values = checkpoint.tensors, checkpoint.values
        before, now = values["settings"], {name: getattr(self.args, name) for name in FIXED}
        changes = [f"{name}: {before[name]} -> {now[name]}" for name in FIXED if before[name] != now[name]]
        if changes:
            raise ValueError(f"--resume_from_checkpoint: trained with other settings: {'; '.join(changes)}")
        if self.device.type not in tensors["random"]:
            raise ValueError(
                f"--resume_from_checkpoint: trained on {', '.join(tensors['random'])}, whose random numbers "
                f"cannot go on on {self.device.type}; choose another --device"
            )
        parameters = dict(self.network.named_parameters())
        for name, parameter in parameters.items():
            parameter.copy_(tensors["network"][name])
        # Fused AdamW and the averages go through memory in its order, so all that belongs to a parameter has
        # the parameter's own strides (channels last), which files do not keep.
        self.ema.shadow_params = [_like(tensors["ema"][name], parameters[name]) for name in parameters]
        self.ema.optimization_step = values["ema_step"]
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors["optimizer"].items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        for parameter, moments in self.optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                moments[name] = _like(moments[name], parameter)
        self.generator.set_state(tensors["random"][self.device.type])
        self.step = values["step"]


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    return torch.empty_like(parameter, requires_grad=False).copy_(value)


@contextmanager
def catching_signals() -> Iterator[list[int]]:
    """Yield a list that the first SIGINT or SIGTERM is added to; a second one acts as ever."""
    received: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, old[number])

    old = {int(number): signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def train_piece(training: Training, deadline: float, stopped: list[int]) -> None:
    """Train until the end, the deadline or a signal, at least for one step; print, and save now and then.

    Raises:
        RuntimeError: If the loss is not finite; the last checkpoint is from before.
    """
    args = training.args
    total, counted, since = torch.zeros((), device=training.device), 0, time.monotonic()
    while training.step < args.max_train_steps:
        total += training.update()
        counted += 1
        over = bool(stopped) or time.monotonic() >= deadline or training.step == args.max_train_steps
        saves = training.step % args.checkpointing_steps == 0
        if over or saves or training.step % args.logging_steps == 0:
            loss = float(total) / counted  # waits for the device, so the clock below is right
            if not math.isfinite(loss):
                raise RuntimeError(f"the loss is {loss} at step {training.step}; lower --learning_rate")
            now = time.monotonic()
            rate = counted * args.train_batch_size / (now - since)
            print(
                f"step {training.step:,}/{args.max_train_steps:,}  loss {loss:.4f}  {rate:,.0f} images/s  "
                f"{max(0.0, deadline - now) / 60:.1f} minutes left in this piece",
                flush=True,
            )
            if over:
                return
            if saves:
                training.save()
            total.zero_()
            counted, since = 0, time.monotonic()


def draw_samples(args: argparse.Namespace, step: int, device: torch.device) -> Path:
    """Draw images with the written pipeline, loaded afresh, in 50 DDIM steps; return the picture."""
    started = time.monotonic()
    folder, w, seeds = args.output_dir, args.guidance_scale, range(args.num_sample_images)
    # Loaded outside the lower precision, which its self-check would not pass.
    sampler = load_sampler(teacher=folder, device=str(device), guidance_scale=w, null_class=NULL_CLASS)
    with torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
        images = sampler.images(seeds, sampler.conditions(len(seeds)), batch_size=500)
    path = save_grid(images, args.output_dir / "samples" / f"step-{step:06d}.png", size=2 * SIZE)
    print(f"{len(images)} samples, {time.monotonic() - started:.0f} s -> {path}")
    return path


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder with cifar10-train.tar.xz")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_train_steps", type=int, default=14_000)
    parser.add_argument("--train_batch_size", type=int, default=256)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--lr_warmup_steps", type=int, default=500)
    parser.add_argument("--label_dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_minutes", type=float, default=8.0, help="stop cleanly after so many minutes")
    parser.add_argument("--resume_from_checkpoint", choices=["latest"], help="go on, or start")
    parser.add_argument("--checkpointing_steps", type=int, default=2000)
    parser.add_argument("--logging_steps", type=int, default=100)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--compile", action="store_true", help="minutes first, faster then")
    parser.add_argument("--size", choices=sorted(SIZES), default="base")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--num_sample_images", type=int, default=100, help="0 draws none")
    parser.add_argument("--guidance_scale", type=float, default=1.5, help="of the samples")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train one piece."""
    started = time.monotonic()
    args = parse(argv)
    resolve_device(args.device)
    resuming = bool(list_checkpoints(args.output_dir))
    if resuming and args.resume_from_checkpoint is None:
        raise ValueError(
            f"--output_dir {args.output_dir} holds a training; go on with --resume_from_checkpoint latest, "
            "or name another folder"
        )
    device = resolve_device(args.device)
    torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_tf32 = True
    images = load_images(args.data_dir, "train", args.output_dir / CACHE)
    print(f"{len(images.pixels):,} images, {time.monotonic() - started:.0f} s")
    training = Training(args, images, device)
    if resuming:
        folder, checkpoint, warnings = read_latest(args.output_dir)
        training.restore(checkpoint)
        for message in (*warnings, f"resuming from {folder}"):
            print(message)
    num = sum(p.numel() for p in training.network.parameters())
    print(f"{num / 1e6:.2f} million parameters on {device}, precision {args.mixed_precision}", flush=True)
    with catching_signals() as stopped:
        if training.step < args.max_train_steps:
            train_piece(training, started + 60 * args.max_minutes, stopped)
            print(f"wrote {training.save()} and the teacher in {args.output_dir}", flush=True)
    if stopped:
        raise SystemExit(128 + stopped[0])
    if args.num_sample_images:
        draw_samples(args, training.step, device)
    minutes, rest = (time.monotonic() - started) / 60, args.max_train_steps - training.step
    print(f"step {training.step:,} of {args.max_train_steps:,}, {minutes:.1f} minutes")
    if rest > 0:
        print(f"{rest:,} steps to go: the same command with --resume_from_checkpoint latest")


if __name__ == "__main__":
    main()
