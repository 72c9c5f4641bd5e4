"""The maths against itself, against closed forms, and against diffusers: three tables.

python benchmarks/parity.py
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, UNet2DModel
from torch import Tensor

from onestill.core.tensors import as_times, broadcast, noise
from onestill.diffusion.prediction import preconditioning
from onestill.diffusion.process import VE, CosineVP, DiscreteVP, FlowMatching, Process
from onestill.diffusion.trajectory import STEPS, Trajectory, ddim_step, solve, uniform_times
from onestill.teachers.pixel import unet2d_teacher
from toys import gaussian


def processes() -> dict[str, Process]:
    """Return every process, the discrete one in its three usual schedules."""
    return {
        "VP linear": DiscreteVP(DDPMScheduler().alphas_cumprod),
        "VP cosine": DiscreteVP(DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod),
        "VP zero terminal SNR": DiscreteVP(DDIMScheduler(rescale_betas_zero_snr=True).alphas_cumprod),
        "cosine": CosineVP(),
        "VE": VE(),
        "flow": FlowMatching(),
        "flow, shift 3": FlowMatching(shift=3.0),
    }


def signal_against_state(process: Process, prediction: str, t_max: float, num_steps: int = 20) -> float:
    """Return the largest relative difference of 20 DDIM steps on the signal and on the state, float64."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 6, generator=generator, dtype=torch.float64) / 6**0.5
    eps = torch.randn(4, 6, generator=generator, dtype=torch.float64)

    def denoised(x: Tensor, t: Tensor) -> Tensor:
        c_in, c_skip, c_out = (broadcast(c, x) for c in preconditioning(prediction, *process.alpha_sigma(t)))
        return c_skip * x + c_out * torch.tanh(c_in * x @ weight)

    trajectory = Trajectory(process, t_max)
    x_a = trajectory.start(eps)
    times = uniform_times(t_max, num_steps, t_end=0.02)
    y = solve(trajectory, denoised, x_a, times, ddim_step)
    x = x_a
    for t, s in pairwise(times):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = process.level(t), process.level(s)
        f = denoised(x, as_times(t, len(x)))
        x = alpha_s * f + sigma_s * (x - alpha_t * f) / sigma_t
    by_signal = trajectory.state(y, x_a, as_times(times[-1], len(x)))
    return float((by_signal - x).abs().max() / x.abs().max())


def measured_order(step: str) -> float:
    """Return the order of a step on the Gaussian teacher between the starts of its clean range.

    From the exact signal at t = 0.8 to t = 0.2: the very first step from pure noise and the last to t = 0 are of
    infinite length in log-SNR, where no order is defined.
    """
    exact = gaussian()
    trajectory = exact.spec.trajectory
    x_a = trajectory.start(torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    start, end = (trajectory.signal(exact.exact_state(x_a, t), x_a, as_times(t, len(x_a))) for t in (0.8, 0.2))
    errors = []
    for num in (32, 64, 128, 256):
        y = start
        times = uniform_times(0.8, num, t_end=0.2)
        for t, s in pairwise(times):
            y = STEPS[step](trajectory, exact.denoiser({}), x_a, y, as_times(t, len(y)), as_times(s, len(y)))
        errors.append(float((y - end).square().mean().sqrt()))
    return math.log2(errors[-2] / errors[-1])


def tiny_unet(out_channels: int = 1, num_classes: int | None = None) -> UNet2DModel:
    """Return a small network with random weights."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=out_channels, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16, norm_num_groups=8, num_class_embeds=num_classes,
    )  # fmt: skip


@torch.no_grad()
def against_scheduler(scheduler: DDIMScheduler, out_channels: int = 1, num_steps: int = 10) -> float:
    """Return the largest difference to diffusers' own DDIM loop, relative to the images' size, float32."""
    network = tiny_unet(out_channels)
    teacher = unet2d_teacher(network, scheduler)
    eps = noise(range(4), teacher.spec.sample_shape)
    scheduler.set_timesteps(num_steps)
    theirs = eps
    for t in scheduler.timesteps:
        theirs = scheduler.step(network(theirs, t).sample[:, :1], t, theirs).prev_sample
    trajectory = Trajectory(teacher.spec.process, (int(scheduler.timesteps[0]) + 1) / 1000)
    ours = solve(trajectory, teacher.denoiser({}), eps, uniform_times(trajectory.t_max, num_steps), ddim_step)
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1))


def main() -> None:
    torch.set_num_threads(1)
    print("### DDIM on the signal = DDIM on the state (20 steps, float64)\n")
    print("| process | " + " | ".join(kinds := ("epsilon", "sample", "v_prediction", "velocity", "edm")) + " |")
    print("|---" * (len(kinds) + 1) + "|")
    worst = 0.0
    for name, process in processes().items():
        cells = []
        for kind in kinds:
            pure = 0.9 if kind == "epsilon" else 1.0
            errors = [signal_against_state(process, kind, t_max) for t_max in (pure, 0.7)]
            cells.append(f"{max(errors):.1e}")
            worst = max(worst, *errors)
        print(f"| {name} | " + " | ".join(cells) + " |")
    print(f"\nlargest: {worst:.1e} (must be <= 1e-10)\n")

    print("### Measured order of the steps (Gaussian teacher, t = 0.8 -> 0.2, 128 -> 256 steps)\n")
    print("| step | order |\n|---|---|")
    for step in STEPS:
        print(f"| {step} | {measured_order(step):.3f} |")

    print("\n### Our teacher sampling = diffusers' DDIMScheduler loop (10 steps, float32)\n")
    print("| prediction | largest relative difference |\n|---|---|")
    common = {"clip_sample": False, "timestep_spacing": "trailing"}
    for kind in ("epsilon", "v_prediction", "sample"):
        print(f"| {kind} | {against_scheduler(DDIMScheduler(prediction_type=kind, **common)):.1e} |")
    learned = DDIMScheduler(**common)
    print(f"| epsilon, learned variance | {against_scheduler(learned, out_channels=2):.1e} |")
    zero = DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, **common)
    print(f"| v_prediction, zero terminal SNR | {against_scheduler(zero):.1e} |")
    print(f"\nEDM: loading runs the self-check against {EDMEulerScheduler.__name__}: ", end="")
    from onestill.teachers.pixel import self_check

    edm = EDMEulerScheduler()
    print(f"{self_check(unet2d_teacher(tiny_unet(), edm), edm):.1e}")


if __name__ == "__main__":
    main()
