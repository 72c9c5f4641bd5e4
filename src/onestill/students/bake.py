"""A student's network with its target time written into the weights, eq. (13): a stock network of its class."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from onestill.students.injection import TimeEmbeddingInjection, last_layer, observe, time_embeddings
from onestill.students.lora import merge
from onestill.students.student import Student


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
    network = _copy_on_cpu(student.network)
    merge(network)
    for module in network.modules():
        module._forward_hooks.clear()
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


def constants(network: nn.Module) -> dict[str, Tensor]:
    """Return what each time embedding of a baked network gives whatever the time, by name."""
    return {name: last_layer(network.get_submodule(name)).bias.detach() for name in time_embeddings(network)}


def ignores_time(network: object) -> bool:
    """Return whether a network has no use for the time it is given, as a baked one: eq. (13)."""
    if not isinstance(network, nn.Module):
        return False
    layers = [last_layer(network.get_submodule(name)) for name in time_embeddings(network)]
    return bool(layers) and all(not layer.weight.any() for layer in layers)


def _copy_on_cpu(network: nn.Module) -> nn.Module:
    """Return a copy of a network, whose weights are copied to the CPU one by one."""
    copies: dict[int, Any] = {id(buffer): buffer.detach().to("cpu", copy=True) for buffer in network.buffers()}
    for weight in network.parameters():
        copies[id(weight)] = nn.Parameter(weight.detach().to("cpu", copy=True), weight.requires_grad)
    return copy.deepcopy(network, copies)
