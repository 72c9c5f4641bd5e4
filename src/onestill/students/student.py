"""The student: a copy of the teacher that is told the target time and predicts the signal there.

Its own time input stays at the start level, the level its noise really has, and a new embedding of the target
time (and of the guidance scale, where that is drawn) enters beside it. The new part's last layer is zero, so
before training y(x_a, t) = f(x_a, t_max) for every t, exactly, eq. (12); f without guidance and thresholding.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from onestill.core.arguments import checked
from onestill.core.errors import SettingError
from onestill.core.patch import replaced
from onestill.core.tensors import Cond, as_times, laid_bare
from onestill.diffusion.trajectory import uniform_times
from onestill.students.injection import (
    BiasInjection,
    Embedding,
    Injection,
    TimeEmbeddingInjection,
    called_layers,
    time_embeddings,
)
from onestill.students.lora import Lora, attach
from onestill.teachers.base import Teacher
from onestill.teachers.module import own_network
from onestill.teachers.teacher_spec import TeacherSpec

# Embeddings see 1000 times a number: target times of 0..1 as the 0..1000 that they are made for.
TIME_SCALE = 1000.0
GUIDANCE_SCALE = 100.0


class Student(nn.Module):
    """y(x_r, r, s, cond): the signal of the teacher's ODE at the target time s, from its state at a level r, eq. (12).

    Kept in evaluation mode during training too: dropout would break the exact start and blur the target.

    Args:
        teacher: The teacher to copy; its head and its way of calling the network are used, never its weights.
        guidance_range: Range of the guidance scale, if the student is to take it as an input.
        network: A network to train in place of a copy of the teacher's; needs the same inputs and output. Compiled
            or parallel wrappers are taken off, and half precision becomes float32.
        lora: Train updates of low rank beside the teacher's own weights, which are shared, instead of a copy.

    Raises:
        ValueError: If the teacher has no weights and no network is given, or the LoRA does not fit the network.
    """

    @checked()
    def __init__(
        self,
        teacher: Teacher,
        *,
        guidance_range: tuple[float, float] | None = None,
        network: nn.Module | None = None,
        lora: Lora | None = None,
    ) -> None:
        super().__init__()
        if lora is not None and network is not None:
            why, todo = "trains beside the teacher's own weights", "leave `network=` out"
            raise SettingError("lora_rank", lora.rank, why, todo)
        if guidance_range is not None and not 0 <= guidance_range[0] < guidance_range[1]:
            raise SettingError("guidance_range", guidance_range, "must go from one scale, 0 at least, up to another")
        self.teacher, self.guidance_range, self.lora = teacher, guidance_range, lora
        if network is None:
            network = teacher.copy_network() if lora is None else teacher.share_network()
        else:
            network = laid_bare(own_network(network))
        self.network, direct = network.eval(), bool(time_embeddings(network))
        self.injection: Injection = (
            TimeEmbeddingInjection(network) if direct else BiasInjection(network, called_layers(teacher, network))
        )
        width = self.injection.num_features
        self.target_embedding = Embedding(width, TIME_SCALE, starts_at_zero=direct)
        self.guidance_embedding = Embedding(width, GUIDANCE_SCALE, starts_at_zero=direct) if guidance_range else None
        if lora is not None:
            # Last: the way in has found the layers by their stock names, and stays hooked to them.
            attach(network, lora)

    @property
    def spec(self) -> TeacherSpec:
        """What is known of the teacher."""
        return self.teacher.spec

    def forward(self, x_r: Tensor, r: float | Tensor | None, s: float | Tensor, cond: Cond) -> Tensor:
        """Return y_s, [B, *sample_shape], in float32 or more.

        Eq. (12) with a = r: the head and the network's own time are those of r, so that before training
        y(x_r, r, s) = f(x_r, r) for every s; the state at s follows by eq. (5), steps from r have the rho of eq. (6),
        both with a = r (`Trajectory.state`, `Trajectory.rho`).

        Args:
            x_r: State at the start level, [B, *sample_shape].
            r: Start level, one number or [B], in (0, t_max]; t_max if None.
            s: Target time, one number or [B], in [0, r].
            cond: Conditions, with "guidance_scale" [B] if the student takes it.
        """
        extra = self.embedding(as_times(s, len(x_r)), cond)
        cond = {name: value for name, value in cond.items() if name != "guidance_scale"}
        with replaced(self.injection, "extra", extra):
            return self.teacher.denoised_by(self.network, x_r, self.spec.t_max if r is None else r, cond)

    def twin(self) -> Student:
        """Return a student with trained parameters of its own, equal to these now, around the same frozen weights."""
        frozen = (t for t in (*self.parameters(), *self.buffers()) if not t.requires_grad)
        shared: dict[int, Any] = {id(self.teacher): self.teacher, **{id(t): t for t in frozen}}
        return copy.deepcopy(self, shared)

    def train(self, mode: bool = True) -> Student:
        """Stay in evaluation mode, whatever `mode` says."""
        return super().train(False)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass to save memory; SettingError if the network cannot."""
        enable = getattr(self.network, "enable_gradient_checkpointing", None)
        if enable is None:
            why = f"{type(self.network).__name__} has no support for it"
            raise SettingError("gradient_checkpointing", True, why, "leave it out")
        enable(self.injection.checkpointed)

    def levels(self, num_steps: int) -> list[float]:
        """Return the start levels t_1 = t_max > ... > t_K of K steps, a uniform grid in t, eq. (28)."""
        return uniform_times(self.spec.t_max, num_steps)[:-1]

    def chosen_scale(self, guidance_scale: float | None = None) -> float | None:
        """Return w, the middle of the range if None is given; None if the student takes none."""
        if self.guidance_range is None:
            return None
        return sum(self.guidance_range) / 2 if guidance_scale is None else guidance_scale

    def with_scale(self, cond: Cond, guidance_scale: float | None, num: int) -> Cond:
        """Return conditions of `num` rows with the chosen w; as they are if the student takes none."""
        w = self.chosen_scale(guidance_scale)
        return cond if w is None else {**cond, "guidance_scale": torch.full((num,), w)}

    def embedding(self, s: Tensor, cond: Cond) -> Tensor:
        """Return what enters the network beside its own time, [B, num_features]: e(s), or e(s) + e'(w)."""
        extra = self.target_embedding(s)
        if self.guidance_embedding is not None:
            if "guidance_scale" not in cond:
                raise ValueError("this student takes the guidance scale as an input; give cond['guidance_scale']")
            extra = extra + self.guidance_embedding(cond["guidance_scale"])
        return extra
