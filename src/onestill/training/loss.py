"""The loss of one forward pass: the rows of all objectives, each regressed on its target."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from onestill.core.tensors import Cond
from onestill.objectives.base import Batch


def joined_inputs(batches: Sequence[Batch], t_max: float) -> tuple[Tensor, Tensor | None, Tensor, Cond]:
    """Return (x_r, r, s, cond) of several batches, one after the other; r is None where every row starts at t_max."""
    first = batches[0]
    if len(batches) == 1:
        return first.x, first.r, first.s, first.cond
    cond = {name: torch.cat([batch.cond[name] for batch in batches]) for name in first.cond}
    r = None
    if any(batch.r is not None for batch in batches):
        r = torch.cat([torch.full_like(batch.s, t_max) if batch.r is None else batch.r for batch in batches])
    return torch.cat([batch.x for batch in batches]), r, torch.cat([batch.s for batch in batches]), cond


def targets(batches: Sequence[Batch], y: Tensor) -> Tensor:
    """Return what the predictions `y` are regressed on, without gradient."""
    parts = torch.split(y.detach(), [len(batch.s) for batch in batches])
    with torch.no_grad():
        found = [b.target(part) if callable(b.target) else b.target for b, part in zip(batches, parts, strict=True)]
    return found[0] if len(found) == 1 else torch.cat([target.to(found[0]) for target in found])


def squared_residuals(y: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared difference of each row, [B]."""
    return (y - target).square().flatten(1).mean(1)


def shares(batches: Sequence[Batch]) -> Tensor:
    """Return the share of the whole mean that each row's step is, [B] float64."""
    return torch.cat([torch.ones_like(batch.s) if batch.share is None else batch.share for batch in batches])


def robust_factors(batches: Sequence[Batch], residuals: Tensor, exponent: float, constant: float) -> Tensor:
    """Return sg(residual / rho^2 + c)^-k, eq. (24), [B].

    It is 1 where the target is made of the prediction: the difference of the two is a gradient there, no residual.
    """
    of_f = residuals.detach() / shares(batches).to(residuals) ** 2
    is_fixed = torch.cat([torch.full_like(batch.s, not callable(batch.target), dtype=torch.bool) for batch in batches])
    return torch.where(is_fixed.to(residuals.device), (of_f + constant) ** -exponent, 1.0).to(residuals)


def regression(residuals: Tensor, weights: Tensor, mean: Tensor) -> Tensor:
    """Return sum over m of 1 / |m| sum over rows i of w_i residual_i; `mean`, [B] integers, is the m of each row."""
    counts = torch.bincount(mean)[mean]
    return (weights.to(residuals) * residuals / counts.to(residuals)).sum()
