"""What a network may predict, and the linear map from its output to x_0: c_skip x_t + c_out network(c_in x_t)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PREDICTION_TYPES = ("sample", "epsilon", "v_prediction", "velocity", "edm")


class Preconditioning(NamedTuple):
    """denoised = c_skip x_t + c_out network(c_in x_t), eq. (3); one number per image each."""

    c_in: Tensor
    c_skip: Tensor
    c_out: Tensor


def output_coefficients(prediction_type: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Return (a, b) with network output = a x_0 + b eps, eq. (2); ValueError for another prediction type."""
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    known = {"sample": (one, zero), "epsilon": (zero, one), "v_prediction": (-sigma, alpha), "velocity": (-one, one)}
    if prediction_type in known:
        return known[prediction_type]
    raise ValueError(f"unknown prediction type {prediction_type!r}; known: {', '.join(PREDICTION_TYPES)}")


def preconditioning(prediction_type: str, alpha: Tensor, sigma: Tensor, sigma_data: float = 0.5) -> Preconditioning:
    """Return the linear map that turns a network's output into x_0, eq. (3).

    With output = a x_0 + b eps and x_t = alpha x_0 + sigma eps: x_0 = (b x_t - sigma output) / (alpha b - sigma a).
    "edm" is the preconditioning of Karras et al. (2206.00364, table 1) for a network that is not yet wrapped:
    c_in = 1 / sqrt(sigma^2 + sigma_data^2), c_skip = sigma_data^2 c_in^2, c_out = sigma sigma_data c_in, where
    sigma_data is the standard deviation of the data.
    """
    one = torch.ones_like(alpha)
    if prediction_type == "sample":
        return Preconditioning(one, torch.zeros_like(alpha), one)
    if prediction_type == "edm":
        c_in = (sigma**2 + sigma_data**2).rsqrt()
        return Preconditioning(c_in, (sigma_data * c_in) ** 2, sigma * sigma_data * c_in)
    a, b = output_coefficients(prediction_type, alpha, sigma)
    determinant = alpha * b - sigma * a
    return Preconditioning(one, b / determinant, -sigma / determinant)
