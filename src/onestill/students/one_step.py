"""What a student is at the end: one evaluation of a stock network between two numbers, eq. (19)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from onestill.core.tensors import Cond, float32_or_more
from onestill.diffusion.prediction import preconditioning
from onestill.students.bake import bake
from onestill.students.student import Student

Call = Callable[[Callable[..., Any], Tensor, Tensor, Cond], Tensor]
"""(network, its noisy input, its time [B], conditions) -> its output, [B, *sample_shape]."""


class OneStep(nn.Module):
    """y = a eps + b F(c eps, tau; cond), eq. (19); a plain module, which `torch.export` traces.

    F is the network with the target time baked in, called by `call`; tau, `net_time`, is its time at the start level.
    """

    def __init__(self, network: nn.Module, call: Call, *, a: float, b: float, c: float, net_time: float) -> None:
        super().__init__()
        self.network, self.call = network, call
        self.a, self.b, self.c, self.net_time = a, b, c, net_time
        self.head = {"a": a, "b": b, "c": c, "net_time": net_time}

    def forward(self, eps: Tensor, cond: Cond) -> Tensor:
        """Return the sample of noise eps [B, *sample_shape] in float32 or more."""
        net_time = torch.full((eps.shape[0],), self.net_time, dtype=eps.dtype, device=eps.device)
        output = self.call(self.network, self.c * eps, net_time, cond)
        return self.a * float32_or_more(eps) + self.b * float32_or_more(output)


def one_step_of(student: Student, t: float = 0.0, guidance_scale: float | None = None) -> OneStep:
    """Return the one step of a student from noise, on the CPU: c_skip, c_out and c_in at its start level times |x_a|.

    With x_a = k eps, k^2 = alpha_a^2 + sigma_a^2, eq. (4): a = k c_skip, b = c_out and c = k c_in, eq. (3). The
    target time t and the guidance scale are baked in, see `bake`.
    """
    spec = student.spec
    start = torch.tensor([spec.t_max], dtype=torch.float64)
    alpha, sigma = spec.process.alpha_sigma(start)
    c_in, c_skip, c_out = preconditioning(spec.prediction_type, alpha, sigma, spec.sigma_data)
    k = torch.hypot(alpha, sigma)
    return OneStep(
        bake(student, t, guidance_scale),
        student.teacher.call,
        a=float(c_skip * k),
        b=float(c_out),
        c=float(c_in * k),
        net_time=float(spec.process.net_time(start)),
    )
