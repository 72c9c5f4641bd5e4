"""LoRA students: the teacher's own weights, and beside some layers a trained update of low rank, W + (alpha / r) B A.

Teacher and student share one set of base weights: the student's network has modules of its own around the very
parameters of the teacher's. The adapters exist in the student's modules only, so nothing has to be switched on and
off, and no exception, no other user of the teacher and no recomputation in a backward pass can meet the wrong state.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from onestill.core.errors import SettingError

# Attention projections and the linear layers of feed-forwards, as diffusers names them.
ATTENTION_AND_FEED_FORWARD = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    "net.0.proj", "net.2", "proj_mlp",
)  # fmt: skip
# Where these hold less than this share of the weights, a student could hardly change: every layer is adapted.
SCARCE = 0.1
Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


@dataclass(frozen=True)
class Lora:
    """What is trained beside the teacher's weights: updates of rank r, scaled by alpha / r; alpha is r if None.

    `target_modules` are the ends of the names of the layers to adapt, chosen from the network if empty.
    """

    rank: int
    alpha: float | None = None
    target_modules: tuple[str, ...] = ()


def attach(network: nn.Module, lora: Lora) -> None:
    """Give a network adapters that add nothing yet, in place; they alone are trainable.

    Raises:
        SettingError: If peft is not installed, no layer fits, no layer has so high a rank, or one cannot take it.
    """
    names = target_layers(network, lora.target_modules)
    weights = (cast(Layer, network.get_submodule(name)).weight for name in names)
    if lora.rank > (full := max(min(weight.flatten(1).shape) for weight in weights)):
        why = f"no adapted layer of {type(network).__name__} has more than rank {full}"
        todo = "give a smaller one (16 to 128 are usual), or leave it out and train all weights"
        raise SettingError("lora_rank", lora.rank, why, todo)
    try:
        import peft
    except ImportError:
        todo = "pip install 'onestill[lora]'"
        raise SettingError("lora_rank", lora.rank, "needs peft, which is not installed", todo) from None
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.rank if lora.alpha is None else lora.alpha,
        target_modules="|".join(map(re.escape, names)),
    )
    try:
        peft.inject_adapter_in_model(config, network)
    except ValueError as error:
        raise SettingError("lora_rank", lora.rank, f"does not fit this network: {error}") from error
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def target_layers(network: nn.Module, wanted: tuple[str, ...] = ()) -> list[str]:
    """Return the names of the layers to adapt: the wanted, by names or last parts; SettingError if one is missing.

    The default: attention projections and feed-forwards; every layer where those are scarce, as in pixel U-Nets.
    """
    # A grouped convolution could be trained, but peft cannot merge it afterwards.
    layers = {n: m for n, m in network.named_modules() if isinstance(m, Layer) and getattr(m, "groups", 1) == 1}
    if missing := [end for end in wanted if not _ending(layers, (end,))]:
        known = sorted({name.rsplit(".", 1)[-1] for name in layers if not name[-1].isdigit()})
        why = f"no Linear or ungrouped Conv layer of {type(network).__name__} has a name that ends so"
        last_parts = f"last parts of names are {', '.join(known) or 'none'}"
        raise SettingError("lora_target_modules", missing, why, last_parts)
    found = _ending(layers, wanted or ATTENTION_AND_FEED_FORWARD)
    num, total = (sum(layers[name].weight.numel() for name in names) for names in (found, layers))
    if not wanted and num < SCARCE * total:
        found = list(layers)
    if not found:
        why = f"{type(network).__name__} has no Linear or ungrouped Conv layer that an update could stand beside"
        raise SettingError("lora_rank", why=why, todo="distil without it")
    return found


def _ending(layers: Iterable[str], ends: tuple[str, ...]) -> list[str]:
    return [name for name in layers if any(f".{name}".endswith(f".{end}") for end in ends)]


def adapters(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name of the layer, the layer with its adapter)."""
    yield from [(name, module) for name, module in network.named_modules() if hasattr(module, "lora_A")]


@torch.no_grad()
def merge(network: nn.Module) -> None:
    """Add the updates to a network's own weights and take the adapters away, in place: stock names again."""
    for name, layer in adapters(network):
        layer.merge()
        network.set_submodule(name, layer.get_base_layer())
    if hasattr(network, "peft_config"):
        del network.peft_config


@torch.no_grad()
def adapter_tensors(network: nn.Module, *, without: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Return A and B by stock layer name, alpha / r multiplied into B, `without` some parts of the network."""
    found: dict[str, Tensor] = {}
    for name, layer in adapters(network):
        if any(f"{name}.".startswith(f"{part}.") for part in without):
            continue
        (key,) = layer.lora_A
        found[f"{name}.lora_A.weight"] = layer.lora_A[key].weight.detach().cpu().clone()
        found[f"{name}.lora_B.weight"] = layer.lora_B[key].weight.detach().cpu() * layer.scaling[key]
    return found
