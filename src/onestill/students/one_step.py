"""What a student is at the end: one evaluation of a stock network between two numbers, eq. (19), or a few of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from onestill.core.tensors import Cond, float32_or_more
from onestill.diffusion.prediction import preconditioning
from onestill.students.bake import bake, bake_steps
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


class FewSteps(OneStep):
    """y = y_K with y_k = a_k x_k + b_k F(c_k x_k, tau_k; cond), x_{k+1} = n_k x_k + m_k y_k and x_1 = eps, eq. (29).

    F is the network with the K target times baked in; `heads` are the numbers of each step by their names here, tau
    as `net_time`. `bound` is what is done to a y_k before it goes on.
    """

    def __init__(
        self,
        network: nn.Module,
        call: Call,
        heads: Sequence[Mapping[str, float]],
        bound: Callable[[Tensor], Tensor] = lambda y: y,
    ) -> None:
        first = {name: value for name, value in heads[0].items() if name in ("a", "b", "c", "net_time")}
        super().__init__(network, call, **first)
        self.heads, self.bound = tuple(dict(head) for head in heads), bound

    def forward(self, eps: Tensor, cond: Cond) -> Tensor:
        """Return the sample of noise eps [B, *sample_shape] in float32 or more."""
        x, y = float32_or_more(eps), eps
        for k, head in enumerate(self.heads):
            net_time = torch.full((eps.shape[0],), head["net_time"], dtype=eps.dtype, device=eps.device)
            output = self.call(self.network, (head["c"] * x).to(eps.dtype), net_time, cond)
            y = head["a"] * x + head["b"] * float32_or_more(output)
            if k + 1 < len(self.heads):
                x = head["n"] * x + head["m"] * self.bound(y)
        return y


def few_steps_of(student: Student, num_steps: int, t: float = 0.0, guidance_scale: float | None = None) -> FewSteps:
    """Return the K steps of a student from noise, on the CPU; the target times and the guidance scale are baked in.

    a, b and c are those of eq. (19) at each start level, without |x_a| but in the first step, and n and m the
    coefficients of eq. (5).
    """
    spec, levels = student.spec, torch.tensor(student.levels(num_steps), dtype=torch.float64)
    alpha, sigma = spec.process.alpha_sigma(levels)
    c_in, c_skip, c_out = preconditioning(spec.prediction_type, alpha, sigma, spec.sigma_data)
    next_alpha, next_sigma = (
        torch.cat([level[1:], level[:1]]) for level in (alpha, sigma)
    )  # that of the last is unused
    n, size = next_sigma / sigma, torch.ones_like(sigma)
    size[0] = torch.hypot(alpha[0], sigma[0])
    network, told = bake_steps(student, num_steps, t, guidance_scale)
    numbers = {"a": c_skip * size, "b": c_out, "c": c_in * size, "n": n * size, "m": next_alpha - alpha * n}
    numbers["net_time"] = torch.tensor(told)
    heads = [{name: float(value[k]) for name, value in numbers.items()} for k in range(num_steps)]
    return FewSteps(network, student.teacher.call, heads, student.teacher.bound)
