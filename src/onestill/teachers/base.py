"""The one contract of a teacher: `denoised(x_t, t, cond)`, its prediction of x_0."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from onestill.core.tensors import Cond, as_times, broadcast, float32_or_more
from onestill.diffusion.process import Process, head
from onestill.diffusion.trajectory import Denoiser, Trajectory


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
        prediction_type: One of `onestill.diffusion.process.PREDICTION_TYPES`, or "denoised" for closed forms.
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


class Teacher(ABC):
    """A pre-trained model that predicts x_0."""

    spec: TeacherSpec
    null_cond: Cond = MappingProxyType({})  # type: ignore[assignment]  # read only
    """The conditions of "no prompt", one row each; empty where the null condition is a label, or there is none."""
    example_cond: Cond = MappingProxyType({})  # type: ignore[assignment]  # read only
    """The conditions of some prompt, one row each; empty where labels or nothing condition the teacher."""
    folder: Path | None = None
    """Where it was loaded from, that of a hub id's files included; None of a teacher made in Python."""

    @property
    def can_guide(self) -> bool:
        """Whether there is a null condition, which guidance needs."""
        return bool(self.null_cond) or self.spec.null_class is not None

    @property
    def guidance_input(self) -> str | None:
        """Name of the condition that tells the network its guidance scale; None where that is no input of it."""
        return None

    @property
    def usual_guidance(self) -> float:
        """The guidance scale where none is named: what the pipeline tells its network, or 1, which is none."""
        return 1.0 if self.guidance_input is None else float(self.example_cond[self.guidance_input][0])

    def null_rows(self, cond: Cond) -> Cond:
        """Return `cond` with the null condition in place of what a prompt or a label sets."""
        if self.spec.null_class is not None:
            return {**cond, "class_labels": torch.full_like(cond["class_labels"], self.spec.null_class)}
        rows = {n: v.to(cond[n]).expand(len(cond[n]), *v.shape[1:]) for n, v in self.null_cond.items()}
        return {**cond, **rows}

    def example_rows(self, num: int) -> Cond:
        """Return some valid conditions, for looking at a network without caring what it draws."""
        if self.spec.num_classes is not None:
            return {"class_labels": torch.full((num,), self.spec.labels[0])}
        return {n: v.expand(num, *v.shape[1:]) for n, v in self.example_cond.items()}

    @abstractmethod
    def denoised(self, x_t: Tensor, t: float | Tensor, cond: Cond) -> Tensor:
        """Return f(x_t, t, cond), the prediction of x_0, in float32 or more.

        Args:
            x_t: State of the process, [B, *sample_shape].
            t: Time, one number or [B], in (0, 1].
            cond: Conditions with B rows each; {} if unconditional.
        """

    @property
    def calls(self) -> int:
        """Network evaluations in one call of `denoised`."""
        return 1

    def denoiser(self, cond: Cond) -> Denoiser:
        """Return `denoised` with the conditions fixed: what the steps of a trajectory take."""
        return lambda x_t, t: self.denoised(x_t, t, cond)


Call = Callable[[Callable[..., object], Tensor, Tensor, Cond], Tensor]
"""(network, scaled x_t, network time, cond) -> raw network output of the sample's shape."""


class NetworkTeacher(Teacher):
    """A teacher around a network, eq. (3): denoised = c_skip x_t + c_out network(c_in x_t, net_time(t), cond).

    Args:
        network: The network; put into evaluation mode, its parameters frozen.
        spec: What is known of it.
        call: How the network is called.
    """

    def __init__(self, network: Callable[..., object], spec: TeacherSpec, call: Call) -> None:
        self.network, self.spec, self.call = network, spec, call
        if isinstance(network, nn.Module):
            network.eval().requires_grad_(False)

    def denoised(self, x_t: Tensor, t: float | Tensor, cond: Cond) -> Tensor:
        return self.denoised_by(self.network, x_t, t, cond)

    def denoised_by(self, network: Callable[..., object], x_t: Tensor, t: float | Tensor, cond: Cond) -> Tensor:
        """Return `denoised` with another network in this one's place, such as a student's copy."""
        times = as_times(t, len(x_t))
        c_in, c_skip, c_out = head(
            self.spec.prediction_type, *self.spec.process.alpha_sigma(times), self.spec.sigma_data
        )
        net_time = self.spec.process.net_time(times).to(device=x_t.device, dtype=x_t.dtype)
        output = float32_or_more(self.call(network, broadcast(c_in, x_t) * x_t, net_time, cond))
        x_t = float32_or_more(x_t)
        return broadcast(c_skip, x_t) * x_t + broadcast(c_out, x_t) * output

    def copy_network(self) -> nn.Module:
        """Return a trainable copy of the network, in float32 and in evaluation mode (no dropout).

        Raises:
            ValueError: If the network is a plain function, which has no weights to copy.
        """
        if not isinstance(self.network, nn.Module):
            raise ValueError(
                "this teacher is a plain callable without weights, so the student cannot be a copy of it; "
                "pass a torch.nn.Module of the student as `network=`"
            )
        return copy.deepcopy(self.network).float().requires_grad_(True).eval()

    def share_network(self) -> nn.Module:
        """Return a network with modules of its own around this one's very parameters, frozen, in evaluation mode.

        What is hooked or put into its modules is not in this one's, and there is no second copy of the weights.

        Raises:
            ValueError: If the network is a plain function, which has no weights to share.
        """
        if not isinstance(self.network, nn.Module):
            raise ValueError("this teacher is a plain callable without weights, which nothing can be trained beside")
        shared = {id(tensor): tensor for tensor in (*self.network.parameters(), *self.network.buffers())}
        return copy.deepcopy(self.network, shared).eval()

    def decode(self, latents: Tensor) -> Tensor:
        """Return the images of what the network makes: the same, where it works on pixels."""
        return latents

    def to(self, device: torch.device | str) -> NetworkTeacher:
        """Move the network to `device`."""
        if isinstance(self.network, nn.Module):
            self.network.to(device)
        return self

    def fingerprint(self) -> str:
        """Return a short hash of the weights and of everything that decides its trajectories: the same teacher, or not."""
        spec, process = self.spec, self.spec.process
        times = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9, 1.0], dtype=torch.float64)
        numbers = [spec.t_max, spec.sigma_data]
        for values in (*process.alpha_sigma(times), process.net_time(times)):
            numbers += values.tolist()
        # Six digits: the last ones of a logarithm may differ between processors.
        facts = (
            spec.family,
            spec.sample_shape,
            spec.prediction_type,
            spec.num_classes,
            spec.null_class,
            spec.threshold,
            process.name,
            [f"{value:.6g}" for value in numbers],
        )
        digest = hashlib.sha256(repr(facts).encode())
        if isinstance(self.network, nn.Module):
            for name, value in self.network.state_dict().items():
                digest.update(name.encode())
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]
