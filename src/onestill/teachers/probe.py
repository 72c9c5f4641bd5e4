"""What one call of a teacher at its start level tells: whether it can be called, and whether it is a denoiser there.

At the start level x_a is noise with next to no signal, and f(x_a) = E[x_0 | x_a]. Over the true states
E[f x_a] = E[x_0 x_a] = alpha S^2 and E[f^2] <= S^2, where S^2 = E[x_0^2] per number. With x_a = k eps,
k^2 = alpha^2 + sigma^2, the share of the noise that f repeats is therefore small,

    g = <f, eps> / <eps, eps> = alpha S^2 / k,

and 0 at pure noise. What is read with another sign or prediction type repeats the noise instead: g = 2 of a velocity
x_0 - eps, 1 / alpha of a v- or x_0-network read as epsilon, alpha - sigma of an epsilon network read as v, and
1 or 1 / alpha of an untrained network, whose output is small. A correlation alone does not tell: it is 1 of exact
Gaussians, whose g is tiny where alpha is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from onestill.core.tensors import noise
from onestill.teachers.base import Teacher
from onestill.teachers.teacher_spec import TeacherSpec

NUMBERS = 4096
"""Random numbers that a look takes at least, if it can: the error of a correlation is then 0.016."""
SHARE, CORRELATION, LARGE = 0.25, 0.3, 10.0
"""Smallest |g| and |correlation| to be doubted, and the largest RMS of f that is not."""
SCALE = 3.0
"""The largest RMS of data for which g = alpha S^2 / k is not doubted; at usual starts less than the 1 of epsilon read as x_0."""


@dataclass(frozen=True)
class Look:
    """What f(x_a) is like: the share g of the noise in it, the correlation of the two, and its RMS."""

    share: float
    correlation: float
    rms: float


@torch.no_grad()
def look(teacher: Teacher, device: torch.device | str, network: Callable[..., object] | None = None) -> Look:
    """Return what f is like at the start level, without guidance and thresholding, from one call on some seeds.

    Args:
        teacher: The teacher.
        device: Where a network without weights of its own computes; one with weights is called where they are.
        network: A network to call in the place of the teacher's.

    Raises:
        SettingError: If it is a network of one's own that cannot be called, or returns what is no finite sample.
    """
    shape, called = teacher.spec.sample_shape, teacher.network if network is None else network
    if isinstance(called, nn.Module):
        device = next((p.device for p in called.parameters()), device)
    num = min(max(3, math.ceil(NUMBERS / math.prod(shape))), 256)
    eps = noise(range(num), shape).to(device)
    return measured(teacher.unguided.first_call(eps, network), eps)


def measured(f: Tensor, eps: Tensor) -> Look:
    """Return what a prediction of x_0 is like beside the noise that it was made from, both [B, ...]."""
    f, eps = f.double(), eps.double()
    product, own, other = ((a * b).mean().item() for a, b in ((f, eps), (f, f), (eps, eps)))
    return Look(product / other, product / math.sqrt(max(own * other, 1e-300)), math.sqrt(own))


def doubts(found: Look, spec: TeacherSpec) -> str:
    """Return what speaks against a network, as read by its spec, being a denoiser; "" if nothing does."""
    alpha, sigma = spec.process.level(spec.t_max)
    largest = SHARE + SCALE**2 * alpha / math.hypot(alpha, sigma)
    repeats = abs(found.correlation) >= CORRELATION and not -SHARE <= found.share <= largest
    if not repeats and 0 < found.rms <= LARGE:
        return ""
    measured = f"{found.share:+.2f} of it, correlation {found.correlation:+.2f}, RMS {found.rms:.3g}"
    expected = "next to nothing of the noise, correlation below 0.2, and an RMS near that of the data"
    told = spec.process.net_time(torch.tensor(float(spec.t_max), dtype=torch.float64)).item()
    cause = f"the prediction type is not {spec.prediction_type!r} (that of its scheduler, or the one given)"
    if spec.prediction_type == "velocity":
        cause = "a velocity of the other sign (it is eps - x_0 here; negate yours if it is x_0 - eps)"
    where = f"what it predicts of x_0 from noise is {'very large' if found.rms else '0'}: {measured}"
    if repeats:
        where = f"what it predicts of x_0 at the start level repeats the noise: {measured}"
    return (
        f"{where}; a trained denoiser gives {expected}. Likely causes: {cause}, "
        f"another time (the network is told {told:.4g} there) or scale, or no training"
    )
