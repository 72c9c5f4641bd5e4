"""Students of networks of one's own: the weights, and the numbers of eqs. (19) and (29) in the folder's mark."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from onestill.core.arguments import checked
from onestill.core.errors import SettingError
from onestill.core.files import MARK_FILE, save_tensors
from onestill.core.reading import loading
from onestill.core.tensors import Cond, laid_bare, to_device
from onestill.export.base import Format
from onestill.sampling.generate import Generate
from onestill.students.bake import bake
from onestill.students.mark import read_mark
from onestill.students.model_card import Facts, evaluations
from onestill.students.one_step import Call, FewSteps, OneStep
from onestill.teachers.module import own_network

MODULE_WEIGHTS = "model.safetensors"


class ModuleFormat(Format):
    """The state of a network that is called as network(x, net_time, **conditions)."""

    def write(self, step: OneStep, folder: Path) -> None:
        # Copies: tensors that share memory, as tied weights do, are no safetensors.
        weights = {name: value.detach().contiguous().clone() for name, value in step.network.state_dict().items()}
        save_tensors(weights, folder / MODULE_WEIGHTS)

    def check(self, folder: Path) -> float:
        eps, cond = self.example(4)
        fresh = bake(self.student, self.t, self.guidance_scale)
        for parameter in fresh.parameters():
            parameter.data.zero_()
        generate = load_module(folder, fresh.to(self.device))
        found = generate(eps.to(self.device), to_device(cond, self.device))
        return float((found - self.expected(eps, cond)).abs().max())

    def code(self, facts: Facts) -> str:
        return (
            "from onestill import load_module\n\n"
            'generate = load_module("path/to/this/folder", MyNetwork())\n'
            f"images = generate(noise, {{}})  # {evaluations(self.num_steps)}"
        )


@checked()
def load_module(folder: str | Path, network: nn.Module) -> Generate:
    """Return generation by a module student that `export_student` wrote, in the steps that it was exported for.

    Args:
        folder: The exported folder.
        network: A fresh instance of the network that the teacher had; it receives the student's weights. What
            `torch.compile` and parallel wrappers put around it or its parts is taken off; half precision becomes
            float32.

    Raises:
        ValueError: If the folder is no exported module, or the weights are not of this network.
    """
    folder = Path(folder)
    if (mark := read_mark(folder)) is None or not (folder / MODULE_WEIGHTS).is_file():
        missing = MARK_FILE if mark is None else MODULE_WEIGHTS
        gone = "" if folder.is_dir() else "no such folder: it "
        raise SettingError("folder", folder, f"{gone}is no exported module: it has no {missing}")
    network = laid_bare(own_network(network))
    with loading(str(folder / MODULE_WEIGHTS)):
        weights = load_file(folder / MODULE_WEIGHTS)
    _add_missing_biases(network, weights)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        why = str(error).splitlines()[1].strip()
        raise ValueError(f"{folder}: the weights are not of this network: {why}") from error
    call: Call = lambda net, x, net_time, cond: net(x, net_time, **cond)  # noqa: E731 - one of two
    network.eval()
    step = (
        FewSteps(network, call, [head.model_dump() for head in mark.heads])
        if mark.heads
        else OneStep(network, call, **mark.head)
    )

    @torch.no_grad()
    def generate(eps: Tensor, cond: Cond) -> Tensor:
        return step(eps, cond)

    return generate


def _add_missing_biases(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give layers without a bias the one that baking wrote for them."""
    for name, layer in network.named_modules():
        key = f"{name}.bias"
        if key in weights and getattr(layer, "bias", key) is None:
            layer.bias = nn.Parameter(weights[key].clone())
