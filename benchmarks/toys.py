"""Closed-form teachers with a small network as the student: seconds each, and the exact answer is known.

python benchmarks/toys.py --seeds 2
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from onestill.diffusion.process import CosineVP
from onestill.diffusion.trajectory import midpoint_step, solve, uniform_times
from onestill.runs.build import build_run
from onestill.runs.distill import carry_out
from onestill.teachers.base import Teacher
from onestill.teachers.closed_form import GaussianTeacher, MixtureTeacher
from onestill.teachers.module import module_teacher
from onestill.training.config import make_config


class PointNetwork(nn.Module):
    """A perceptron on points with the time embedding of a diffusers network."""

    def __init__(self, dimension: int, width: int = 128) -> None:
        super().__init__()
        self.time_proj = Timesteps(64, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(64, width)
        self.first = nn.Linear(dimension, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.last = nn.Linear(width, dimension)

    def forward(self, x: Tensor, net_time: Tensor) -> Tensor:
        emb = self.time_embedding(self.time_proj(net_time).to(x.dtype))
        h = self.first(x)
        for layer in self.layers:
            h = h + layer(nn.functional.silu(h + emb))
        return self.last(nn.functional.silu(h))


def gaussian() -> GaussianTeacher:
    """Return the exact teacher of N((0.5, -0.3), 0.6^2 I)."""
    return GaussianTeacher(torch.tensor([0.5, -0.3]), 0.6, CosineVP())


def mixture() -> MixtureTeacher:
    """Return the exact teacher of five Gaussians on an uneven ring."""
    angle = torch.tensor([0.2, 1.5, 2.6, 4.0, 5.2])
    radius = torch.tensor([1.0, 1.3, 0.9, 1.2, 1.1])
    means = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    return MixtureTeacher(means, 0.3, CosineVP())


BOOTSTRAP: dict[str, Any] = {
    "anchor_fraction": 0.0, "corrector_fraction": 0.0, "bootstrap_weight": "velocity", "boundary_weight": 1.0,
}  # fmt: skip
"""What these benchmarks were made of: the bootstrap with second-order steps, and no pool or critic."""


def as_network_teacher(exact: Teacher) -> Teacher:
    """Return the exact teacher as any callable is given to onestill."""
    return module_teacher(
        lambda x, net_time: exact.denoised(x, net_time, {}),
        exact.spec.process,
        "sample",
        exact.spec.sample_shape,
    )


def exact_map(exact: Teacher, eps: Tensor, num_steps: int = 400) -> Tensor:
    """Return the ODE's end for each noise, by a fine midpoint solver in float64."""
    times = uniform_times(1.0, num_steps)
    x_a = exact.spec.trajectory.start(eps.double())
    return solve(exact.spec.trajectory, exact.denoiser({}), x_a, times, midpoint_step).float()


def distilled_error(exact: Teacher, *, num_test: int = 4000, **settings: Any) -> float:
    """Distil `exact` into a `PointNetwork` and return the RMS distance of its one-step samples to the exact map.

    RMS is over coordinates, on seeds that training never saw.
    """
    torch.manual_seed(settings.get("seed", 0))
    defaults = dict(
        train_batch_size=512, learning_rate=2e-3, lr_scheduler="cosine", max_train_steps=3000, lr_warmup_steps=50,
        checkpointing_steps=10**6, validation_steps=10**6, logging_steps=10**6, device="cpu", num_teacher_steps=1,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        config = make_config({"teacher": "exact", "output_dir": f"{folder}/run", **BOOTSTRAP, **defaults, **settings})
        prepared = build_run(config, as_network_teacher(exact), PointNetwork(*exact.spec.sample_shape))
        trained = carry_out(prepared, show_progress=False)
        assert trained.pipeline is not None
        from onestill.export.module import load_module

        generate = load_module(trained.pipeline, PointNetwork(*exact.spec.sample_shape))
        eps = torch.randn(num_test, *exact.spec.sample_shape, generator=torch.Generator().manual_seed(10**6))
        return math.sqrt((generate(eps, {}) - exact_map(exact, eps)).square().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("| teacher | seed | RMS to the exact map, one step | seconds |\n|---|---|---|---|")
    for name, exact in {"Gaussian": gaussian(), "2-D mixture": mixture()}.items():
        for seed in range(args.seeds):
            started = time.monotonic()
            error = distilled_error(exact, seed=seed)
            print(f"| {name} | {seed} | {error:.4f} | {time.monotonic() - started:.0f} |", flush=True)


if __name__ == "__main__":
    main()
