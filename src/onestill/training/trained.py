"""Something that is trained: a module with its optimiser, its schedule and its averages, and the state of all of them.

Parameters are taken after `accelerator.prepare`, and state is read and written by name through
`torch.distributed.checkpoint.state_dict`, gathered on all processes: a sharded module has the state of a whole one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from onestill.training.averages import PowerAverage, Tracks
from onestill.training.config import OptimisationSettings

if TYPE_CHECKING:
    from onestill.training.checkpoint import Tensors


class Trained:
    """A module, its optimiser and its averages.

    Attributes:
        name: Its name in checkpoints.
        module: The module itself.
        model: The module as accelerate has prepared it, which is what is called for a loss.
        averages: Running averages of the trained parameters, by name: "ema" and "ema_beside", as `widths` has them, and
            "target_ema".
        widths: Relative widths of the first two, by name.

    Args:
        name: Its name in checkpoints.
        module: The module; what of it requires a gradient is trained.
        accelerator: The engine.
        config: Optimiser, schedule, clipping, average.
        learning_rate: Its own peak rate; that of `config` if None.
        widths: Relative widths of the averages that are kept, two at most.
        adam_beta1: Its own beta 1; that of `config` if None.
        follower: A copy of the module whose weights are the average "target_ema" of decay `follower_decay`.
        follower_decay: That decay, the same at every step.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        accelerator: Accelerator,
        config: OptimisationSettings,
        *,
        learning_rate: float | None = None,
        widths: Sequence[float] = (),
        adam_beta1: float | None = None,
        follower: nn.Module | None = None,
        follower_decay: float = 0.0,
    ) -> None:
        self.name, self.accelerator, self.max_grad_norm = name, accelerator, config.max_grad_norm
        rate = config.learning_rate if learning_rate is None else learning_rate
        assert rate is not None, "a run's is known when its student is"
        optimizer = torch.optim.AdamW(
            [p for p in module.parameters() if p.requires_grad],
            lr=rate,
            betas=(config.adam_beta1 if adam_beta1 is None else adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            eps=config.adam_epsilon,
            fused=accelerator.device.type in ("cpu", "cuda"),
        )
        self.module = module.to(accelerator.device)
        self.model, self.optimizer = accelerator.prepare(module, optimizer)
        self._optimizer = optimizer
        warmup, steps = config.lr_warmup_steps, config.max_train_steps
        self.schedule = get_scheduler(config.lr_scheduler, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
        self.widths = dict(zip(("ema", "ema_beside"), widths, strict=False))
        self.averages: dict[str, EMAModel] = {
            average: PowerAverage(self.parameters(), width) for average, width in self.widths.items()
        }
        if follower is not None:
            followed = EMAModel(self.parameters(), decay=follower_decay, min_decay=follower_decay, foreach=True)
            # The average's own tensors are the follower's weights: it changes with every update, and is kept once.
            weights = [p for p in follower.to(accelerator.device).parameters() if p.requires_grad]
            followed.shadow_params = [p.requires_grad_(False) for p in weights]
            self.averages["target_ema"] = followed

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return what is trained, by its name in the module."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def parameters(self) -> list[nn.Parameter]:
        """Return what is trained."""
        return list(self.named_parameters().values())

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def clip(self) -> Tensor:
        """Clip the gradient and return its norm before; the same on every process."""
        return torch.as_tensor(self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm))

    def average(self) -> None:
        """Let every average follow the parameters."""
        for average in self.averages.values():
            average.step(self.parameters())

    @property
    def tracks(self) -> Tracks:
        """The averages, as they are now, that any other is rebuilt from."""
        names = list(self.named_parameters())
        tensors = {name: dict(zip(names, self.averages[name].shadow_params, strict=True)) for name in self.widths}
        return Tracks(self.widths, tensors, self.averages["ema"].optimization_step if self.widths else 0)

    @contextmanager
    def averaged(self, weights: Tensors | None = None) -> Iterator[None]:
        """Put weights, the average "ema" if None, in the place of the parameters for a while; they stay without one."""
        if weights is None:
            weights = self.tracks.tensors.get("ema")
        if weights is None:
            yield
            return
        parameters = self.named_parameters()
        kept = {name: value.detach().cpu().clone() for name, value in parameters.items()}
        _copy(weights, parameters)
        try:
            yield
        finally:
            _copy(kept, parameters)

    def tensors(self) -> dict[str, Tensors]:
        """Return everything that changes, as groups of tensors by name: parameters, moments, averages."""
        names = list(self.named_parameters())
        groups: dict[str, Tensors] = {self.name: dict(self.named_parameters())}
        if self.optimizer.state:  # before the first step there is none, and asking for it would make some
            groups[f"{self.name}-optimizer"] = {
                f"{name}.{key}": torch.as_tensor(value)
                for name, state in self._optimizer_state(on_all=False).get("state", {}).items()
                for key, value in state.items()
            }
        for average, ema in self.averages.items():
            groups[f"{self.name}-{average}"] = dict(zip(names, ema.shadow_params, strict=True))
        return groups

    def values(self) -> dict[str, Any]:
        """Return what of the state is plain numbers."""
        return {
            "learning_rates": [group["lr"] for group in self.optimizer.param_groups],
            "averages": {average: ema.optimization_step for average, ema in self.averages.items()},
            "widths": self.widths,
        }

    def restore(self, tensors: Mapping[str, Tensors], values: Mapping[str, Any], step: int) -> None:
        """Put back what `tensors` and `values` gave after `step` steps."""
        load_parameters(self.module, tensors[self.name])
        self._restore_optimizer(tensors.get(f"{self.name}-optimizer", {}), values["learning_rates"])
        for average, ema in self.averages.items():
            # By name: a safetensors file lists its tensors in an order of its own.
            kept = dict(zip(self.named_parameters(), ema.shadow_params, strict=True))
            _copy(tensors[f"{self.name}-{average}"], kept)
            ema.optimization_step = values["averages"][average]
        self.schedule.last_epoch, self.schedule._step_count = step, step + 1

    def _optimizer_state(self, *, on_all: bool) -> dict[str, Any]:
        """Return the optimiser's whole state by names of parameters; {} on all processes but one unless `on_all`."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=not on_all)
        # Not accelerate's wrapper, whose step asks a scaler that has not begun.
        return get_optimizer_state_dict(self.model, self._optimizer, options=options)

    def _restore_optimizer(self, saved: Mapping[str, Tensor], learning_rates: list[float]) -> None:
        if saved:
            whole = self._optimizer_state(on_all=True)
            whole["state"] = {
                name: {key: saved.get(f"{name}.{key}", value) for key, value in state.items()}
                for name, state in whole["state"].items()
            }
            set_optimizer_state_dict(self.model, self._optimizer, whole, options=StateDictOptions(full_state_dict=True))
            for name, parameter in self.named_parameters().items():
                if f"{name}.step" not in saved:  # never had a gradient, and so no state
                    self.optimizer.state.pop(parameter, None)
        for parameter, state in self.optimizer.state.items():
            for key, value in state.items():
                if value.shape == parameter.shape and parameter.ndim > 0:
                    # The fused optimiser walks moments and weights in memory order: they must have the same strides.
                    state[key] = torch.empty_like(parameter).copy_(value)
        for group, rate in zip(self.optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = rate


def load_parameters(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put trained parameters into a module; ValueError if they are not this module's."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if {n: v.shape for n, v in tensors.items()} != {n: p.shape for n, p in trained.items()}:
        raise ValueError("the checkpoint's tensors are not this student's: another teacher, or other settings")
    _copy(tensors, trained)


@torch.no_grad()
def _copy(tensors: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    for name, value in into.items():
        value.copy_(tensors[name])
