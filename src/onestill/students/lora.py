"""LoRA students: the teacher's own weights, and beside some layers a trained update of low rank, W + (alpha / r) B A.

Teacher and student share one set of base weights: the student's network has modules of its own around the very
parameters of the teacher's. The adapters exist in the student's modules only, so nothing has to be switched on and
off, and no exception, no other user of the teacher and no recomputation in a backward pass can meet the wrong state.

A plain LoRA file has no place for the target time, which is a constant added to the time embedding. It needs none:
in one step the pipeline's time is one number, the last layer of the time embedding sees one fixed vector h, and the
update u h^T / |h|^2 adds exactly u.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from onestill.teachers.pipelines.teacher import PipelineTeacher

LORA_FOLDER, SCHEDULER_FILE = "lora", "scheduler_config.json"
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
    """What is trained beside the teacher's weights.

    Attributes:
        rank: Rank r of every update.
        alpha: Updates are scaled by alpha / r; alpha is r if None.
        target_modules: Ends of names of the layers to adapt; the default is chosen from the network if empty.
    """

    rank: int
    alpha: float | None = None
    target_modules: tuple[str, ...] = ()


def attach(network: nn.Module, lora: Lora) -> None:
    """Give a network adapters that add nothing yet, in place; they alone are trainable.

    Raises:
        ValueError: If peft is not installed, no layer fits, no layer has so high a rank, or one cannot take it.
    """
    names = target_layers(network, lora.target_modules)
    if lora.rank > (full := max(min(weight.flatten(1).shape) for weight in _weights(network, names))):
        raise ValueError(
            f"--lora_rank {lora.rank}: no adapted layer of {type(network).__name__} has more than rank {full}; give a smaller "
            "one (16 to 128 are usual), or leave --lora_rank out and train all weights"
        )
    peft = _peft()
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.rank if lora.alpha is None else lora.alpha,
        target_modules="|".join(map(re.escape, names)),
    )
    try:
        peft.inject_adapter_in_model(config, network)
    except ValueError as error:
        raise ValueError(f"--lora_rank {lora.rank} does not fit this network: {error}") from error
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def target_layers(network: nn.Module, wanted: tuple[str, ...] = ()) -> list[str]:
    """Return the names of the layers to adapt.

    The default: attention projections and feed-forwards; every layer where those are scarce, as in pixel U-Nets.

    Args:
        network: A network without adapters.
        wanted: Names, or their last parts; each must be found.

    Raises:
        ValueError: If there is no such layer.
    """
    # A grouped convolution could be trained, but peft cannot merge it afterwards.
    layers = {n: m for n, m in network.named_modules() if isinstance(m, Layer) and getattr(m, "groups", 1) == 1}
    if missing := [end for end in wanted if not _ending(layers, (end,))]:
        known = sorted({name.rsplit(".", 1)[-1] for name in layers if not name[-1].isdigit()})
        raise ValueError(
            f"--lora_target_modules {' '.join(missing)}: no Linear or ungrouped Conv layer of {type(network).__name__} has "
            f"a name that ends so; last parts of names are {', '.join(known) or 'none'}"
        )
    found = _ending(layers, wanted or ATTENTION_AND_FEED_FORWARD)
    num, total = (sum(layers[name].weight.numel() for name in names) for names in (found, layers))
    if not wanted and num < SCARCE * total:
        found = list(layers)
    if not found:
        raise ValueError(
            f"--lora_rank: {type(network).__name__} has no Linear or ungrouped Conv layer that an update of low rank could stand "
            "beside; distil without --lora_rank"
        )
    return found


def _ending(layers: Mapping[str, nn.Module], ends: tuple[str, ...]) -> list[str]:
    return [name for name in layers if any(f".{name}".endswith(f".{end}") for end in ends)]


def _weights(network: nn.Module, names: list[str]) -> Iterator[Tensor]:
    for name in names:
        weight = network.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        yield weight


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ValueError("--lora_rank needs peft, which is not installed: pip install 'onestill[lora]'") from None
    return peft


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
    """Return A and B by stock layer name, alpha / r multiplied into B: the file needs no alpha beside it.

    Args:
        network: A network with adapters.
        without: Parts of the network to leave out.
    """
    found: dict[str, Tensor] = {}
    for name, layer in adapters(network):
        if any(f"{name}.".startswith(f"{part}.") for part in without):
            continue
        (key,) = layer.lora_A
        found[f"{name}.lora_A.weight"] = layer.lora_A[key].weight.detach().cpu().clone()
        found[f"{name}.lora_B.weight"] = layer.lora_B[key].weight.detach().cpu() * layer.scaling[key]
    return found


# The file


def write_lora(
    teacher: PipelineTeacher, network: nn.Module, embeddings: Mapping[str, Tensor], net_time: float, folder: Path
) -> None:
    """Write `pytorch_lora_weights.safetensors` for the teacher's own pipeline, and the scheduler of its one step.

    Args:
        teacher: The teacher.
        network: The student's network with its adapters.
        embeddings: For each time embedding the constant that it is to give, by name; it replaces its adapters.
        net_time: The time that the one step gives the network.
        folder: Where to.
    """
    spec, family = teacher.spec, teacher.pipeline_spec
    tensors = adapter_tensors(network, without=tuple(embeddings))
    tensors |= constant_updates(teacher, net_time, embeddings)
    save = type(teacher.pipeline).save_lora_weights
    save(folder, **{f"{family.network}_lora_layers": tensors}, safe_serialization=True)
    family.one_step(teacher.pipeline, spec.prediction_type, spec.process.level(spec.t_max)[0]).save_pretrained(folder)


@torch.no_grad()
def constant_updates(teacher: PipelineTeacher, net_time: float, embeddings: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the updates of rank 1 that give each time embedding its constant in the one step at `net_time`."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    network: Any = teacher.network

    def see(name: str, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[name] = (inputs[0][0].double().cpu(), output[0].double().cpu())

    hooks = [
        network.get_submodule(f"{name}.linear_2").register_forward_hook(
            lambda _m, inputs, output, name=name: see(name, inputs, output)
        )
        for name in embeddings
    ]
    weight = next(network.parameters())
    probe = torch.zeros(1, *teacher.spec.sample_shape, device=weight.device, dtype=weight.dtype)
    cond = {name: value.to(weight.device) for name, value in teacher.example_rows(1).items()}
    try:
        teacher.call(network, probe, torch.full((1,), net_time, device=weight.device, dtype=weight.dtype), cond)
    finally:
        for hook in hooks:
            hook.remove()
    found: dict[str, Tensor] = {}
    for name, (h, output) in seen.items():
        u = embeddings[name].double().cpu() - output
        found[f"{name}.linear_2.lora_A.weight"] = (h / h.norm())[None].float()
        found[f"{name}.linear_2.lora_B.weight"] = (u / h.norm())[:, None].float()
    return found


def load_with_lora(teacher: PipelineTeacher, folder: Path) -> Any:
    """Return the teacher's own pipeline, loaded afresh, with a LoRA file and the scheduler beside it."""
    kind = json.loads((folder / SCHEDULER_FILE).read_text(encoding="utf-8"))["_class_name"]
    scheduler = getattr(diffusers, kind).from_pretrained(folder, local_files_only=True)
    pipeline = teacher.load_afresh({"scheduler": scheduler})
    pipeline.load_lora_weights(folder, local_files_only=True, use_safetensors=True)
    return pipeline
