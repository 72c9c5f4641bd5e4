"""Train a network of one's own by flow matching, and open it through onestill's Python interface.

A small transformer on patches of 2x2 pixels that knows nothing of diffusers: times between 0 (clean) and 1 (noise)
enter through its own embedding, and it predicts the velocity eps - x_0 on x_t = (1 - t) x_0 + t eps. The data are the
1,797 real digits of scikit-learn (8x8 pixels), without their labels.

    python examples/teachers/flow.py --output_dir runs/flow-teacher

Seed 0: 3,000 steps of 64 pictures on one CPU core. The weights are `model.safetensors`, and
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
    """Attention and a perceptron, each scaled, shifted and gated by the time."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(approximate="tanh"), nn.Linear(3 * width, width))
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, tokens: Tensor, emb: Tensor) -> Tensor:
        scale_1, shift_1, gate_1, scale_2, shift_2, gate_2 = self.modulation(emb)[:, None].chunk(6, dim=-1)
        heads = self.qkv(_normed(tokens) * (1 + scale_1) + shift_1).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tokens = tokens + gate_1 * self.out(mixed)
        return tokens + gate_2 * self.mlp(_normed(tokens) * (1 + scale_2) + shift_2)


class FlowNetwork(nn.Module):
    """Velocities of pictures [B, 1, 8, 8] at times [B] in [0, 1]."""

    def __init__(self, width: int = 64, num_blocks: int = 4, num_heads: int = 4) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * torch.logspace(-1, 1.5, 32, 2))
        self.embed_time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.embed_patch = nn.Linear(4, width)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(num_blocks))
        self.last = nn.Linear(width, 4)

    def forward(self, x: Tensor, net_time: Tensor) -> Tensor:
        angles = net_time[:, None] * self.frequencies
        emb = self.embed_time(torch.cat([angles.sin(), angles.cos()], dim=1))
        tokens = self.embed_patch(functional.pixel_unshuffle(x, 2).flatten(2).mT) + self.position
        for block in self.blocks:
            tokens = block(tokens, emb)
        return functional.pixel_shuffle(self.last(_normed(tokens)).mT.unflatten(2, (4, 4)), 2)


def _normed(tokens: Tensor) -> Tensor:
    return functional.layer_norm(tokens, tokens.shape[-1:])


def open_teacher(folder: str | Path) -> ModuleTeacher:
    """Return the teacher that this script has written into a folder."""
    network = FlowNetwork()
    network.load_state_dict(load_file(Path(folder) / WEIGHTS))
    return as_teacher(network)


def as_teacher(network: nn.Module) -> ModuleTeacher:
    """Return the teacher around a network."""
    return onestill.module_teacher(network, onestill.FlowMatching(), "velocity", SHAPE)


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
    parser.add_argument("--max_train_steps", type=int, default=3000)
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
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
