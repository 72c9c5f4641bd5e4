"""Teachers whose prediction is known in closed form: the oracles that everything is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from onestill.core.arguments import Positive, checked
from onestill.core.tensors import Cond, as_times, broadcast
from onestill.diffusion.process import Process
from onestill.teachers.base import Teacher
from onestill.teachers.teacher_spec import TeacherSpec


class GaussianTeacher(Teacher):
    """The exact teacher of data N(mean, std^2 I), eq. (16): f = mean + alpha std^2 / v^2 (x - alpha mean).

    v_t^2 = alpha_t^2 std^2 + sigma_t^2 is the variance of x_t. The ODE's solution is known too (`exact_state`).

    Args:
        mean: Mean of the data, of the sample's shape.
        std: Standard deviation of the data.
        process: The noise process.
        t_max: The start level.
    """

    @checked()
    def __init__(self, mean: Tensor, std: Positive, process: Process, t_max: float = 1.0) -> None:
        process.check_start_level("denoised", t_max)
        self.mean, self.std = mean, std
        self.spec = TeacherSpec("gaussian", "", process, "denoised", tuple(mean.shape), t_max, "given")

    def denoised(self, x_t: Tensor, t: float | Tensor, cond: Cond) -> Tensor:
        alpha, sigma = self.spec.process.alpha_sigma(as_times(t, len(x_t)))
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        mean = self.mean.to(x_t)
        return mean + broadcast(gain, x_t) * (x_t - broadcast(alpha, x_t) * mean)

    def exact_state(self, x_a: Tensor, s: float) -> Tensor:
        """Return x_s = alpha_s mean + v_s / v_a (x_a - alpha_a mean), the ODE's solution, eq. (17)."""
        alpha_a, sigma_a = self.spec.process.level(self.spec.t_max)
        alpha_s, sigma_s = self.spec.process.level(s)
        spread = ((alpha_s * self.std) ** 2 + sigma_s**2) ** 0.5 / ((alpha_a * self.std) ** 2 + sigma_a**2) ** 0.5
        mean = self.mean.to(x_a)
        return alpha_s * mean + spread * (x_a - alpha_a * mean)


class MixtureTeacher(Teacher):
    """The exact teacher of a mixture of K equally likely Gaussians N(mean_k, std^2 I), eq. (18).

    f = sum_k r_k(x) f_k(x), with f_k the Gaussian's prediction and r_k the softmax of
    -|x - alpha mean_k|^2 / (2 v^2). Class k is component k; class K is the null class, the whole mixture.

    Args:
        means: Means of the components, [K, D].
        std: Their standard deviation.
        process: The noise process.
        t_max: The start level.
        conditional: Whether labels choose the component.
    """

    @checked()
    def __init__(
        self, means: Tensor, std: Positive, process: Process, t_max: float = 1.0, *, conditional: bool = False
    ) -> None:
        if means.ndim != 2 or not len(means):
            raise ValueError(f"means must be of shape [K, D], K at least 1; it is {list(means.shape)}")
        process.check_start_level("denoised", t_max)
        self.means, self.std = means, std
        num = len(means) if conditional else None
        self.spec = TeacherSpec(
            "mixture", "", process, "denoised", (means.shape[1],), t_max, "given", num_classes=num, null_class=num
        )

    def denoised(self, x_t: Tensor, t: float | Tensor, cond: Cond) -> Tensor:
        alpha, sigma = (broadcast(v, x_t) for v in self.spec.process.alpha_sigma(as_times(t, len(x_t))))
        means = self.means.to(x_t)
        variance = alpha**2 * self.std**2 + sigma**2
        logits = -((x_t[:, None] - alpha[..., None] * means) ** 2).sum(-1) / (2 * variance)
        if "class_labels" in cond:
            labels = cond["class_labels"].to(x_t.device)[:, None]
            chosen = torch.arange(len(means), device=x_t.device) == labels
            logits = logits.masked_fill(~chosen & (labels < len(means)), -torch.inf)
        mean = logits.softmax(-1) @ means
        return mean + alpha * self.std**2 / variance * (x_t - alpha * mean)

    def draw(self, num: int, generator: torch.Generator) -> Tensor:
        """Return `num` samples of the data itself, [num, D]."""
        rows = torch.randint(len(self.means), (num,), generator=generator)
        return self.means[rows] + self.std * torch.randn(num, self.means.shape[1], generator=generator)
