"""Where the target time enters a network: an embedding of it, added to the network's own embedding of its time.

Hooks do so, so that a network keeps its stock class and names. Either way in can be written into the weights
afterwards, for one target time, eq. (13).
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from onestill.core.patch import replaced
from onestill.core.tensors import Cond, to_device
from onestill.teachers.base import Teacher

TIME_CHANNELS = 128
TIME_EMBEDDINGS = ("time_embedding", "timestep_embedder", "time_embedder", "timestep_proj", "time_step_proj")


class Embedding(nn.Module):
    """Fourier features of `scale` times one number per image, then a perceptron of two layers, the last zero at first.

    It must not be zero where more layers follow that are (the bias fallback): two in a row have no gradient.
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
    extra: Tensor | None = None
    """What a forward pass adds, [B, num_features]; held for the time of that pass."""

    def checkpointed(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a part of the network whose activations the backward pass computes again, when `extra` is held no more.

        What gradient checkpointing of diffusers calls in place of its own function.
        """
        extra = self.extra

        def again(*inputs: Any) -> Any:
            with replaced(self, "extra", extra):
                return function(*inputs)

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
            # A method and no closure: a copy of the student has hooks of its own.
            network.get_submodule(name).register_forward_hook(self._add_to)

    def _add_to(self, _embedding: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output if self.extra is None else output + self.extra.to(output.dtype)

    def bake(self, network: nn.Module, extra: Tensor) -> None:
        for name in time_embeddings(network):
            layer = last_layer(network.get_submodule(name))
            layer.bias.data.add_(extra.to(layer.bias))


class BiasInjection(Injection):
    """The fallback for networks whose time embedding cannot be reached: a bias on every layer with weights.

    Each `Linear` and `ConvNd` among `names` gets its own zero-initialised linear map of the embedding, added to its
    output channels. That is what a time embedding amounts to inside most networks, and it bakes into the layers' biases.
    A layer that is never called as a module (`nn.MultiheadAttention` reads the weights of its `out_proj`) must not be
    named: its map would have no gradient, and what is baked from it no counterpart.
    """

    num_features = 128

    def __init__(self, network: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        self.maps = nn.ModuleDict()
        for name in names:
            layer: Any = network.get_submodule(name)
            channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
            self.maps[name.replace(".", "/")] = zero = nn.Linear(self.num_features, channels)
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)
            layer.register_forward_hook(functools.partial(self._add_to, zero=zero))
        if not self.maps:
            why = "the teacher's network calls no Linear or Conv layer that a target time could enter"
            raise ValueError(f"{why}; pass a torch.nn.Module of the student as `network=`")

    def _add_to(self, layer: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor, *, zero: nn.Linear) -> Tensor:
        if self.extra is None:
            return output
        bias = zero(self.extra.to(zero.weight.dtype)).to(output.dtype)
        if isinstance(layer, nn.Linear):
            return output + bias.reshape(len(bias), *([1] * (output.ndim - 2)), -1)
        return output + bias.reshape(*bias.shape, *([1] * (output.ndim - 2)))

    def bake(self, network: nn.Module, extra: Tensor) -> None:
        for name, zero in self.maps.items():
            layer: Any = network.get_submodule(name.replace("/", "."))
            bias, old = zero(extra).detach(), layer.bias
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


def last_name(network: nn.Module, embedding: str) -> str:
    """Return the name of that layer."""
    found = network.get_submodule(embedding)
    return f"{embedding}.{len(found) - 1 if isinstance(found, nn.Sequential) else 'linear_2'}"


class _Seen(Exception):
    """Ends a network's call once enough has been seen."""


def observe(
    teacher: Teacher, network: nn.Module, names: Iterable[str], run: Callable[[Tensor, Cond], object]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (input, output) of some modules of a network, by name, in one call `run(x_t = 0, some conditions)`.

    It ends where all of them have been called, which for time embeddings is at its beginning.
    """
    names = list(names)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, x: tuple[Tensor, ...], y: Tensor) -> None:
        seen[name] = (x[0].clone(), y.clone())
        if len(seen) == len(names):
            raise _Seen

    weight = next(network.parameters())
    x_t = torch.zeros(1, *teacher.spec.sample_shape, device=weight.device, dtype=weight.dtype)
    with ExitStack() as hooks:
        for name in names:
            hook = lambda _, x, y, name=name: keep(name, x, y)  # noqa: E731 - bound
            hooks.enter_context(network.get_submodule(name).register_forward_hook(hook))
        with suppress(_Seen):
            run(x_t, to_device(teacher.example_rows(1), weight.device))
    return seen


@torch.no_grad()
def called_layers(teacher: Teacher, network: nn.Module) -> list[str]:
    """Return the names of the `Linear` and `ConvNd` layers that a network calls at the start level."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    names = [name for name, module in network.named_modules() if isinstance(module, kinds)]
    if not names:
        return []
    seen: set[str] = set()
    with ExitStack() as hooks:
        # Hooked layers are called one by one, as in training, and not in a fused path of evaluation.
        for name in names:
            note = lambda *_, name=name: seen.add(name)  # noqa: E731 - bound
            hooks.enter_context(network.get_submodule(name).register_forward_hook(note))
        weight = next(network.parameters())
        x_t = torch.zeros(1, *teacher.spec.sample_shape, device=weight.device, dtype=weight.dtype)
        cond = to_device(teacher.example_rows(1), weight.device)
        teacher.denoised_by(network, x_t, teacher.spec.t_max, cond)
    return [name for name in names if name in seen]
