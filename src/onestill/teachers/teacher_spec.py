"""What is known of a teacher besides its weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from onestill.core.tensors import broadcast
from onestill.diffusion.process import Process
from onestill.diffusion.trajectory import Trajectory


@dataclass(frozen=True)
class Threshold:
    """What a pixel teacher's sampler does to the predicted x_0, eq. (15); never applied to the signal.

    The noise of the next state is then made of the thresholded x_0 too, as in DDPM's posterior and in diffusers'
    DDIM with `use_clipped_model_output=True`.

    Attributes:
        mode: "none", "static" (clip to +-limit) or "dynamic" (Saharia et al., 2205.11487: divide by the
            per-image quantile of |x_0|, kept in [1, limit], after clipping to it).
        limit: Largest magnitude.
        ratio: The quantile, "dynamic" only.
    """

    mode: str = "none"
    limit: float = 1.0
    ratio: float = 0.995

    def __call__(self, x_0: Tensor) -> Tensor:
        """Return the thresholded x_0 [B, ...]."""
        if self.mode == "none":
            return x_0
        if self.mode == "static":
            return x_0.clamp(-self.limit, self.limit)
        quantile = torch.quantile(x_0.flatten(1).abs(), self.ratio, dim=1).clamp(1.0, self.limit)
        bound = broadcast(quantile, x_0)
        return torch.minimum(torch.maximum(x_0, -bound), bound) / bound


NO_THRESHOLD = Threshold()


@dataclass(frozen=True)
class TeacherSpec:
    """Everything that is known of a teacher but its weights.

    Attributes:
        family: Short name of the adapter, such as "unet2d".
        source: Path or id it was loaded from; "" for objects made in Python.
        process: The noise process.
        prediction_type: One of `onestill.diffusion.prediction.PREDICTION_TYPES`, or "denoised" for closed forms.
        sample_shape: Shape of one sample without the batch axis, such as (C, H, W).
        t_max: The start level.
        t_max_reason: Why this one.
        num_classes: Classes that can be asked for, the null class not counted; None if unconditional.
        null_class: Label that means "no class"; None if there is none.
        threshold: What the teacher's own sampler does to x_0.
        sigma_data: Standard deviation of the data, for EDM preconditioning.
        text: Whether prompts condition it.
    """

    family: str
    source: str
    process: Process
    prediction_type: str
    sample_shape: tuple[int, ...]
    t_max: float
    t_max_reason: str
    num_classes: int | None = None
    null_class: int | None = None
    threshold: Threshold = NO_THRESHOLD
    sigma_data: float = 0.5
    text: bool = False

    @property
    def conditioning(self) -> str:
        """Return what conditions it: "text", "class" or "none"."""
        return "text" if self.text else "none" if self.num_classes is None else "class"

    @property
    def trajectory(self) -> Trajectory:
        """The teacher's ODE from its start level."""
        return Trajectory(self.process, self.t_max)

    @property
    def labels(self) -> list[int]:
        """The labels that can be asked for."""
        return [i for i in range((self.num_classes or 0) + 1) if i != self.null_class][: self.num_classes or 0]

    def facts(self) -> tuple[object, ...]:
        """Return all that decides its trajectories besides the weights, the process by its values at some times."""
        times = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9, 1.0], dtype=torch.float64)
        numbers = [self.t_max, self.sigma_data]
        for values in (*self.process.alpha_sigma(times), self.process.net_time(times)):
            numbers += values.tolist()
        known = (
            self.family,
            self.sample_shape,
            self.prediction_type,
            self.num_classes,
            self.null_class,
            self.threshold,
        )
        # Six digits: the last ones of a logarithm may differ between processors.
        return (*known, self.process.name, [f"{value:.6g}" for value in numbers])
