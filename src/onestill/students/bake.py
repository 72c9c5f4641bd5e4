"""A student's network with its target times written into the weights: a stock network of its class.

One target time is a constant, eq. (13). Several are a constant each at the times that the network is told, eq. (30).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

from onestill.core.errors import SettingError
from onestill.students.injection import TimeEmbeddingInjection, last_layer, last_name, observe, time_embeddings
from onestill.students.lora import merge
from onestill.students.student import Student
from onestill.teachers.base import Teacher

NO_TIME = "its network's time embedding cannot be reached, and biases hold one target time"
APART, DEPENDENT = 1e-2, 1e-5
"""Least share of the largest singular value of the h_k that the smallest should have, and must: weights grow by its inverse."""
FAR = 1000.0
"""What networks made for times of 0 to 1 are told for 1 where such times hardly differ to them."""
STEP = 8.0
"""The distance between two times before an activation: half of it is on or off for SiLU."""


@torch.no_grad()
def bake(student: Student, t: float = 0.0, guidance_scale: float | None = None) -> nn.Module:
    """Return a stock network with the target time (and the guidance scale) written into its weights, on the CPU.

    For every time embedding fed by the time: weight 0, bias the embedding of start level and target time,
    so the network ignores the time it is given, eq. (13). Without a reachable time embedding the target time
    goes into the layers' biases and the network must still be given the start level's time. A guidance scale of None
    is the middle of the range. The student's device, which its training has filled, never holds the copy.
    """
    times = torch.tensor([t], dtype=torch.float64)
    extra = student.embedding(times, student.with_scale({}, guidance_scale, 1))[0]
    network = _merged(student)
    if isinstance(student.injection, TimeEmbeddingInjection):
        teacher, own, t_max = student.teacher, student.network, student.spec.t_max
        names = time_embeddings(network)
        at_start = observe(teacher, own, names, lambda x_t, cond: teacher.denoised_by(own, x_t, t_max, cond))
        for name, (_, output) in at_start.items():
            layer = last_layer(network.get_submodule(name))
            layer.weight.zero_()
            layer.bias.copy_(output[0])
    student.injection.bake(network, extra)
    return network


@torch.no_grad()
def bake_steps(
    student: Student, num_steps: int, t: float = 0.0, guidance_scale: float | None = None
) -> tuple[nn.Module, list[float]]:
    """Return (a stock network with K target times written into its weights, the times that tell it which), on the CPU.

    Step k goes from the start level t_k to t_{k+1}, the last to t, eq. (28). Where the native times of the start levels
    hardly differ to the network, it is told others.

    Raises:
        SettingError: If no time embedding can be reached, or it holds fewer levels.
    """
    if not isinstance(student.injection, TimeEmbeddingInjection):
        raise SettingError("num_inference_steps", num_steps, NO_TIME, "export it for one")
    levels, cond = student.levels(num_steps), student.with_scale({}, guidance_scale, num_steps)
    extra = student.embedding(torch.tensor([*levels[1:], t], dtype=torch.float64), cond).double().cpu()
    network, teacher = _merged(student), student.teacher
    times = student.spec.process.net_time(torch.tensor(levels, dtype=torch.float64)).tolist()
    found = embedded(teacher, network, times)
    wanted = {name: output + extra for name, (_, output) in found.items()}
    told = times if all(_lie_apart(h) for h, _ in found.values()) else [FAR * level for level in levels]
    tell(teacher, network, wanted, told)
    return network, told


@torch.no_grad()
def embedded(
    teacher: Teacher, network: nn.Module, net_times: Sequence[float], names: Iterable[str] = ()
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (input [K, D], output [K, E]) of layers, or the last ones of time embeddings, when told K times, by name."""
    names = tuple(names) or tuple(last_name(network, name) for name in time_embeddings(network))
    rows: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    for net_time in net_times:
        told = lambda x_t, cond, at=net_time: teacher.call(network, x_t, torch.full((1,), at).to(x_t), cond)  # noqa: E731 - bound
        for name, row in observe(teacher, network, names, told).items():
            rows[name].append(row)
    joined = {
        name: [torch.cat(parts).double().cpu() for parts in zip(*found, strict=True)] for name, found in rows.items()
    }
    return {name: (h, output) for name, (h, output) in joined.items()}


@torch.no_grad()
def tell(teacher: Teacher, network: nn.Module, wanted: Mapping[str, Tensor], net_times: Sequence[float]) -> None:
    """Let time embeddings give these outputs [K, E], by the last layer's name, when told these times, eq. (30).

    Where the h_k hardly differ, the layer before is replaced by one that tells these K times apart and no others.
    """
    flat = [name for name, (h, _) in embedded(teacher, network, net_times).items() if not _lie_apart(h)]
    ahead = {name: network.get_submodule(name.rpartition(".")[0]) for name in flat}
    firsts = [f"{name.rpartition('.')[0]}.linear_1" for name, module in ahead.items() if _has_units(module)]
    for name, (features, _) in (embedded(teacher, network, net_times, firsts) if firsts else {}).items():
        _sharpen(network.get_submodule(name), features)
    for name, (h, output) in embedded(teacher, network, net_times).items():
        layer: Any = network.get_submodule(name)
        layer.weight.add_(((wanted[name] - output).T @ dual_basis(h)).to(layer.weight))


def dual_basis(h: Tensor) -> Tensor:
    """Return g [K, D] with <g_j, h_k> = 1 where j = k, else 0; SettingError if the h_k [K, D] do not lie apart at all."""
    if not _lie_apart(h, DEPENDENT):
        why = "the teacher's time embedding does not tell so many levels apart"
        raise SettingError("num_inference_steps", len(h), why, "export it for fewer")
    return torch.linalg.pinv(h).T if len(h) > 1 else h / h.square().sum()


def tells_apart(teacher: Teacher, network: nn.Module, net_times: Sequence[float]) -> bool:
    """Return whether the last layer of every time embedding alone can hold a constant for each of K times."""
    return all(_lie_apart(h) for h, _ in embedded(teacher, network, net_times).values())


def _lie_apart(h: Tensor, share: float = APART) -> bool:
    values = torch.linalg.svdvals(h)
    return len(values) == len(h) and bool(values[-1] > share * values[0])


def _has_units(embedding: nn.Module) -> bool:
    """Return whether the first layer of a time embedding feeds SiLU units and has a bias."""
    if not isinstance(embedding, TimestepEmbedding):
        return False
    first: Any = embedding.linear_1
    return isinstance(embedding.act, nn.SiLU) and first.bias is not None


def _sharpen(layer: Any, features: Tensor) -> None:
    """Let a layer of SiLU units step up at one of K features [K, D] each, along the direction in which they follow each other."""
    centre, order = features.mean(0), torch.arange(len(features), dtype=features.dtype)
    along = torch.linalg.pinv(features - centre, rtol=APART) @ (order - order.mean())
    places = (features - centre) @ along
    scale = STEP / places.sort()[0].diff().min().clamp(min=1e-9)
    num = min(len(places), layer.out_features)
    layer.weight.zero_()
    layer.bias.zero_()
    layer.weight[:num] = (scale * along).to(layer.weight)
    layer.bias[:num] = (STEP / 2 - scale * (places + along @ centre))[:num].to(layer.bias)


def constants(teacher: Teacher, network: nn.Module, net_times: Sequence[float]) -> dict[str, Tensor]:
    """Return what each time embedding of a baked network gives when told K times, [K, E], by its last layer's name."""
    if ignores_time(network):
        layers = {last_name(network, name): network.get_submodule(name) for name in time_embeddings(network)}
        return {
            name: last_layer(embedding).bias.detach().expand(len(net_times), -1) for name, embedding in layers.items()
        }
    return {name: output for name, (_, output) in embedded(teacher, network, net_times).items()}


def ignores_time(network: object) -> bool:
    """Return whether a network has no use for the time it is given, as a baked one: eq. (13)."""
    if not isinstance(network, nn.Module):
        return False
    layers = [last_layer(network.get_submodule(name)) for name in time_embeddings(network)]
    return bool(layers) and all(not layer.weight.any() for layer in layers)


def _merged(student: Student) -> nn.Module:
    """Return a copy of a student's network on the CPU, updates of low rank added to its weights, without hooks."""
    network = _copy_on_cpu(student.network)
    merge(network)
    for module in network.modules():
        module._forward_hooks.clear()
    return network


def _copy_on_cpu(network: nn.Module) -> nn.Module:
    """Return a copy of a network, whose weights are copied to the CPU one by one."""
    copies: dict[int, Any] = {id(buffer): buffer.detach().to("cpu", copy=True) for buffer in network.buffers()}
    for weight in network.parameters():
        copies[id(weight)] = nn.Parameter(weight.detach().to("cpu", copy=True), weight.requires_grad)
    return copy.deepcopy(network, copies)
