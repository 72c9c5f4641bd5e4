"""The student: a copy of the teacher that is told the target time and predicts the signal there.

Its own time input stays at the start level, the level its noise really has, and a new embedding of the target
time (and of the guidance scale, where that is drawn) enters beside it. The new part's last layer is zero, so
before training y(x_a, t) = f(x_a, t_max) for every t, exactly, eq. (12); f without guidance and thresholding.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from onestill.core.tensors import Cond, as_times
from onestill.students.lora import Lora, attach, merge
from onestill.teachers.base import Teacher
from onestill.teachers.teacher_spec import TeacherSpec

TIME_CHANNELS = 128
# Timesteps sees 1000 times its input's scale: target times of 0..1 as the 0..1000 it is made for.
TIME_SCALE = 1000.0
GUIDANCE_SCALE = 100.0
TIME_EMBEDDINGS = ("time_embedding", "timestep_embedder", "time_embedder", "timestep_proj", "time_step_proj")


class Embedding(nn.Module):
    """Fourier features of one number per image, then a two-layer perceptron.

    Args:
        num_features: Width of the output.
        scale: Factor on the input before the features.
        starts_at_zero: Whether the last layer is zero at first. Where more layers follow that are zero (the bias
            fallback) it must not be: two zero layers in a row have no gradient.
    """

    def __init__(self, num_features: int, scale: float, *, starts_at_zero: bool = True) -> None:
        super().__init__()
        self.scale = scale
        self.features = Timesteps(TIME_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.mlp = TimestepEmbedding(TIME_CHANNELS, num_features)
        if starts_at_zero:
            nn.init.zeros_(self.mlp.linear_2.weight)
            nn.init.zeros_(self.mlp.linear_2.bias)

    def forward(self, values: Tensor) -> Tensor:
        """Return [B, num_features] for values [B]."""
        weight = self.mlp.linear_1.weight
        return self.mlp(self.features(values.to(weight.device) * self.scale).to(weight.dtype))


class Injection(nn.Module):
    """Where the new embedding enters a network. Hooks, so that the network keeps its stock class and names."""

    num_features: int

    def __init__(self) -> None:
        super().__init__()
        self._extra: Tensor | None = None

    def hold(self, extra: Tensor | None) -> None:
        """Set what the next forward pass adds, [B, num_features], or clear it."""
        self._extra = extra

    def checkpointed(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a part of the network whose activations the backward pass computes again, when nothing is held any more.

        What gradient checkpointing of diffusers calls in place of its own function.
        """
        extra = self._extra

        def again(*inputs: Any) -> Any:
            held, self._extra = self._extra, extra
            try:
                return function(*inputs)
            finally:
                self._extra = held

        return checkpoint(again, *args, use_reentrant=False)

    @abstractmethod
    def bake(self, network: nn.Module, extra: Tensor) -> None:
        """Write a constant `extra` [num_features] into a copy of the network, eq. (13)."""


class TimeEmbeddingInjection(Injection):
    """Added to the output of the network's own `TimestepEmbedding`s, the exact place where its time enters."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        names = time_embeddings(network)
        self.num_features = last_layer(network.get_submodule(names[0])).out_features
        for name in names:
            network.get_submodule(name).register_forward_hook(lambda _m, _a, out: self._add(out))

    def _add(self, output: Tensor) -> Tensor:
        return output if self._extra is None else output + self._extra.to(output.dtype)

    def bake(self, network: nn.Module, extra: Tensor) -> None:
        for name in time_embeddings(network):
            layer = last_layer(network.get_submodule(name))
            layer.bias.data.add_(extra.to(layer.bias))


class BiasInjection(Injection):
    """The fallback for networks whose time embedding cannot be reached: a bias on every layer with weights.

    Each `Linear` and `ConvNd` gets its own zero-initialised linear map of the embedding, added to its output
    channels. That is what a time embedding amounts to inside most networks, and it bakes into the layers' biases.

    Args:
        network: The network.
        num_features: Width of the shared embedding.

    Raises:
        ValueError: If the network has no such layer.
    """

    def __init__(self, network: nn.Module, num_features: int = 128) -> None:
        super().__init__()
        self.num_features = num_features
        self.maps = nn.ModuleDict()
        for name, layer in _weighted_layers(network):
            channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
            self.maps[name.replace(".", "/")] = zero = nn.Linear(num_features, channels)
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)
            layer.register_forward_hook(lambda m, _a, out, zero=zero: self._add(m, out, zero))
        if not self.maps:
            raise ValueError(
                "the teacher's network has no Linear or Conv layer that a target time could enter; "
                "pass a torch.nn.Module of the student as `network=`"
            )

    def _add(self, layer: nn.Module, output: Tensor, zero: nn.Linear) -> Tensor:
        if self._extra is None:
            return output
        bias = zero(self._extra.to(zero.weight.dtype)).to(output.dtype)
        if isinstance(layer, nn.Linear):
            return output + bias.reshape(len(bias), *([1] * (output.ndim - 2)), -1)
        return output + bias.reshape(*bias.shape, *([1] * (output.ndim - 2)))

    def bake(self, network: nn.Module, extra: Tensor) -> None:
        for name, layer in _weighted_layers(network):
            bias = self.maps[name.replace(".", "/")](extra).detach()
            old = layer.bias
            layer.bias = nn.Parameter(bias.to(layer.weight.device) if old is None else old.detach() + bias.to(old))


def time_embeddings(network: nn.Module) -> list[str]:
    """Return the names of the embeddings that are fed by the time, not by classes or guidance.

    They are `TimestepEmbedding`s, or of plain layers; either way with a linear layer at their end. An activation
    behind it would undo the baking; such a network takes the fallback.
    """
    return [
        name
        for name, module in network.named_modules()
        if name.rsplit(".", 1)[-1] in TIME_EMBEDDINGS
        and (
            (isinstance(module, TimestepEmbedding) and module.post_act is None)
            or (isinstance(module, nn.Sequential) and isinstance(module[-1], nn.Linear))
        )
    ]


def last_layer(embedding: nn.Module) -> nn.Linear:
    """Return the linear layer at the end of a time embedding."""
    layer = embedding[-1] if isinstance(embedding, nn.Sequential) else embedding.linear_2
    assert isinstance(layer, nn.Linear)
    return layer


def ignores_time(network: object) -> bool:
    """Return whether a network has no use for the time it is given, as that of an exported student: eq. (13)."""
    if not isinstance(network, nn.Module):
        return False
    layers = [last_layer(network.get_submodule(name)) for name in time_embeddings(network)]
    return bool(layers) and all(not layer.weight.any() for layer in layers)


def refuse_student(teacher: Teacher) -> None:
    """Raise ValueError if a teacher is an exported student, which knows one step and no other."""
    if ignores_time(teacher.network):
        raise ValueError(
            f"--teacher {teacher.spec.source} is a one-step student: its network has no use for the time that it is given. "
            "Name the teacher of many steps that it was distilled from; --student draws with what is there"
        )


def _weighted_layers(network: nn.Module) -> list[tuple[str, Any]]:
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [(name, module) for name, module in network.named_modules() if isinstance(module, kinds)]


class Student(nn.Module):
    """y(x_r, r, s, cond): the signal of the teacher's ODE at the target time s, from its state at a level r, eq. (12).

    Kept in evaluation mode during training too: dropout would break the exact start and blur the target.

    Args:
        teacher: The teacher to copy; its head and its way of calling the network are used, never its weights.
        guidance_range: Range of the guidance scale, if the student is to take it as an input.
        network: A network to train in place of a copy of the teacher's; needs the same inputs and output.
        lora: Train updates of low rank beside the teacher's own weights, which are shared, instead of a copy.

    Raises:
        ValueError: If the teacher has no weights and no network is given, or the LoRA does not fit the network.
    """

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
            raise ValueError("--lora_rank trains beside the teacher's own weights; leave `network=` out")
        self._teacher = teacher
        self.guidance_range, self.lora = guidance_range, lora
        if lora is not None:
            self.network = teacher.share_network()
        else:
            self.network = teacher.copy_network() if network is None else network.eval()
        self.injection: Injection = (
            TimeEmbeddingInjection(self.network) if time_embeddings(self.network) else BiasInjection(self.network)
        )
        width, direct = self.injection.num_features, isinstance(self.injection, TimeEmbeddingInjection)
        self.target_embedding = Embedding(width, TIME_SCALE, starts_at_zero=direct)
        self.guidance_embedding = Embedding(width, GUIDANCE_SCALE, starts_at_zero=direct) if guidance_range else None
        if lora is not None:
            # Last: the way in has found the layers by their stock names, and stays hooked to them.
            attach(self.network, lora)

    @property
    def teacher(self) -> Teacher:
        """The teacher whose head and way of calling the network are used."""
        return self._teacher

    @property
    def spec(self) -> TeacherSpec:
        """What is known of the teacher."""
        return self._teacher.spec

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
        extra = self._extra(as_times(s, len(x_r)), cond)
        cond = {name: value for name, value in cond.items() if name != "guidance_scale"}
        self.injection.hold(extra)
        try:
            return self._teacher.denoised_by(self.network, x_r, self.spec.t_max if r is None else r, cond)
        finally:
            self.injection.hold(None)

    def train(self, mode: bool = True) -> Student:
        """Stay in evaluation mode, whatever `mode` says."""
        return super().train(False)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass to save memory.

        Raises:
            ValueError: If the network has no support for it.
        """
        enable = getattr(self.network, "enable_gradient_checkpointing", None)
        if enable is None:
            raise ValueError(f"--gradient_checkpointing: {type(self.network).__name__} has no support for it")
        enable(self.injection.checkpointed)

    @torch.no_grad()
    def bake(self, t: float = 0.0, guidance_scale: float | None = None) -> nn.Module:
        """Return a stock network with the target time (and the guidance scale) written into its weights, on the CPU.

        For every time embedding fed by the time: weight 0, bias the embedding of start level and target time,
        so the network ignores the time it is given, eq. (13). Without a reachable time embedding the target time
        goes into the layers' biases and the network must still be given the start level's time. The device the student
        is on, which its training has filled, never holds the copy.

        Args:
            t: Target time.
            guidance_scale: w, for students that take it; the middle of their range if None.
        """
        extra = self._extra(torch.tensor([t], dtype=torch.float64), self.with_scale({}, guidance_scale, 1))[0]
        network = _copy_on_cpu(self.network)
        merge(network)
        _remove_hooks(network)
        if isinstance(self.injection, TimeEmbeddingInjection):
            self._bake_start_level(network)
        self.injection.bake(network, extra)
        return network

    def with_scale(self, cond: Cond, guidance_scale: float | None, num: int) -> Cond:
        """Return conditions of `num` rows with w, the middle of the range if None; as they are if none is taken."""
        if self.guidance_range is None:
            return cond
        w = sum(self.guidance_range) / 2 if guidance_scale is None else guidance_scale
        return {**cond, "guidance_scale": torch.full((num,), w)}

    def _bake_start_level(self, network: Any) -> None:
        """Make every time embedding of `network` constant: what the student's own gives at the start level."""
        seen: dict[str, Tensor] = {}
        hooks = [
            self.network.get_submodule(name).register_forward_hook(
                lambda _m, _a, out, name=name: seen.update({name: out})
            )
            for name in time_embeddings(network)
        ]
        weight = next(self.network.parameters())
        probe = torch.zeros(1, *self.spec.sample_shape, device=weight.device, dtype=weight.dtype)
        cond = {name: value.to(weight.device) for name, value in self._teacher.example_rows(1).items()}
        self._teacher.denoised_by(self.network, probe, self.spec.t_max, cond)
        for hook in hooks:
            hook.remove()
        for name, value in seen.items():
            layer = last_layer(network.get_submodule(name))
            layer.weight.zero_()
            layer.bias.copy_(value[0])

    def _extra(self, t: Tensor, cond: Cond) -> Tensor:
        extra = self.target_embedding(t)
        if self.guidance_embedding is not None:
            if "guidance_scale" not in cond:
                raise ValueError("this student takes the guidance scale as an input; give cond['guidance_scale']")
            extra = extra + self.guidance_embedding(cond["guidance_scale"])
        return extra


def _copy_on_cpu(network: nn.Module) -> nn.Module:
    """Return a copy of a network, whose weights are copied to the CPU one by one."""
    copies: dict[int, Any] = {}
    for tensor in (*network.parameters(), *network.buffers()):
        copied = tensor.detach().to("cpu", copy=True)
        is_parameter = isinstance(tensor, nn.Parameter)
        copies[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if is_parameter else copied
    return copy.deepcopy(network, copies)


def _remove_hooks(network: nn.Module) -> None:
    for module in network.modules():
        module._forward_hooks.clear()
