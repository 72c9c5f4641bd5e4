"""Train a network of one's own by flow matching, and open it through onestill's Python interface.

A residual perceptron on pixels that knows nothing of diffusers: times between 0 (clean) and 1 (noise)
enter through its own embedding, and it predicts the velocity eps - x_0 on x_t = (1 - t) x_0 + t eps. The data are the
1,797 real digits of scikit-learn (8x8 pixels), without their labels.

    python examples/teachers/flow.py --output_dir runs/flow-teacher

Seed 0: 16,000 steps of 128 pictures on one CPU core. The weights are `model.safetensors`, and
`samples.png` shows 50 pictures, 50 Euler steps each. `open_teacher` is all that distilling it needs:

    onestill.distill(open_teacher("runs/flow-teacher"), "runs/flow", max_train_steps=2000)
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import trange

import onestill
from onestill.sampling.generate import generate_images, teacher_generator
from onestill.sampling.pictures import save_grid
from onestill.teachers.module import ModuleTeacher

SHAPE = (1, 8, 8)
WEIGHTS = "model.safetensors"


class Block(nn.Module):
    """A perceptron, scaled, shifted and gated by the time."""

    def __init__(self, width: int, time_width: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(time_width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        scale, shift, gate = self.modulation(emb).chunk(3, dim=1)
        return h + gate * self.mlp(functional.layer_norm(h, h.shape[1:]) * (1 + scale) + shift)


class FlowNetwork(nn.Module):
    """Velocities of pictures [B, 1, 8, 8] at times [B] in [0, 1]."""

    def __init__(self, width: int = 192, time_width: int = 64, num_blocks: int = 4) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * torch.logspace(-1, 1.5, time_width // 2, 2))
        self.embed_time = nn.Sequential(nn.Linear(time_width, time_width), nn.SiLU())
        self.first = nn.Linear(math.prod(SHAPE), width)
        self.blocks = nn.ModuleList(Block(width, time_width) for _ in range(num_blocks))
        self.last = nn.Linear(width, math.prod(SHAPE))

    def forward(self, x: Tensor, net_time: Tensor) -> Tensor:
        angles = net_time[:, None] * self.frequencies
        emb, h = self.embed_time(torch.cat([angles.sin(), angles.cos()], dim=1)), self.first(x.flatten(1))
        for block in self.blocks:
            h = block(h, emb)
        return self.last(functional.layer_norm(h, h.shape[1:])).view_as(x)


def open_teacher(folder: str | Path) -> ModuleTeacher:
    """Return the teacher that this script has written into a folder."""
    network = FlowNetwork()
    network.load_state_dict(load_file(Path(folder) / WEIGHTS))
    return as_teacher(network)


def as_teacher(network: nn.Module) -> ModuleTeacher:
    """Return the teacher around a network."""
    return onestill.module_teacher(network, onestill.FlowMatching(net_scale=1.0), "velocity", SHAPE)


def train(network: nn.Module, args: argparse.Namespace) -> None:
    """Train the network; its averaged weights stay in it."""
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.learning_rate, weight_decay=0.01)
    schedule: Any = get_scheduler(
        "cosine", optimizer, num_warmup_steps=args.max_train_steps // 20, num_training_steps=args.max_train_steps
    )
    ema, batch = EMAModel(network.parameters(), decay=0.9995, use_ema_warmup=True, power=0.75), args.train_batch_size
    for step in (bar := trange(args.max_train_steps)):
        x_0 = images[torch.randint(len(images), (batch,))]
        eps = torch.randn_like(x_0)
        # Stratified times: the variance of the loss falls, the expectation stays.
        t = (torch.arange(batch) + torch.rand(batch)) / batch
        x_t = torch.lerp(x_0, eps, t[:, None, None, None])
        loss = functional.mse_loss(network(x_t, t), eps - x_0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(network.parameters())
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    ema.copy_to(network.parameters())


def main(argv: Sequence[str] | None = None) -> None:
    """Train and save the teacher, and draw with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_train_steps", type=int, default=16_000)
    parser.add_argument("--train_batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--num_sample_images", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    started, network = time.monotonic(), FlowNetwork()
    train(network, args)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), args.output_dir / WEIGHTS)
    seconds = time.monotonic() - started
    generate = teacher_generator(open_teacher(args.output_dir), num_steps=50)
    images = generate_images(generate, range(args.num_sample_images), SHAPE, {})
    save_grid(images.clamp(-1, 1), args.output_dir / "samples.png", size=64)
    print(f"{args.max_train_steps} steps, seed {args.seed}, {seconds:.0f} s -> {args.output_dir}")


if __name__ == "__main__":
    main()
