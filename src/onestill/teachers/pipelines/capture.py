"""How a stock pipeline calls its network, learned by watching it do so once.

Every text pipeline of diffusers encodes its prompt in its own way and hands the result to the network under its
own names. All of them end in one call, network(x_t, time, conditions). Watching that call gives the conditions
of a prompt, those of "no prompt", the place of x_t and of the time, and everything else that stays as it is; no
pipeline's encoding has to be written again, and none can be written wrongly.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from onestill.core.patch import replaced
from onestill.core.tensors import Cond

X_NAMES, TIME_NAMES = ("sample", "hidden_states", "latent_model_input"), ("timestep", "timesteps")


@dataclass(frozen=True)
class Call:
    """One call of a network: its noisy input, its time, and every argument by position or name."""

    x_t: Tensor
    net_time: Tensor
    arguments: Mapping[str, Any]


class _Stop(Exception):
    """Ends a pipeline once enough has been seen."""


@torch.no_grad()
def record(run: Callable[[], object], network: nn.Module, until: Any = None) -> list[Call]:
    """Return the calls of `network` while `run` runs.

    Args:
        run: Calls the pipeline.
        network: Its denoising network.
        until: The pipeline's scheduler, to end at its first step: the network answers, and all calls of one whole
            step are seen. None to end at the first call, before the network computes anything.

    Raises:
        ValueError: If the pipeline never calls the network as network(x_t, time, ...).
    """
    stepped = nullcontext() if until is None else replaced(until, "step", _stop)
    with suppress(_Stop), seen_calls(network, most=1 if until is None else None) as calls, stepped:
        run()
    if not calls:
        raise ValueError("the pipeline did not call its network")
    return calls


@torch.no_grad()
def watch(
    run: Callable[[], object], network: nn.Module, scheduler: Any, num_steps: int, decoder: Any = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (first noisy input, last state, what the decoder is given) of a pipeline, and end it there.

    Args:
        run: Calls the pipeline, for `num_steps` steps.
        network: Its denoising network.
        scheduler: Its scheduler.
        num_steps: How many steps.
        decoder: Its autoencoder; None to end it at its last step.
    """
    decoded: list[Tensor] = []

    def decode(z: Tensor, *_args: Any, **_kwargs: Any) -> None:
        decoded.append(z)
        raise _Stop

    to_the_end = nullcontext() if decoder is None else replaced(decoder, "decode", decode)
    most = num_steps if decoder is None else None
    with suppress(_Stop), seen_calls(network) as calls, _seen_states(scheduler, most) as states, to_the_end:
        run()
    return calls[0].x_t, states[-1], decoded[0] if decoded else None


@torch.no_grad()
def walk(run: Callable[[], object], network: nn.Module, scheduler: Any, num_steps: int) -> list[Call]:
    """Return the calls of `network` in all steps of a pipeline, which computes only the first, and end it there."""
    forward = network.forward
    outputs: list[Any] = []

    @functools.wraps(forward)  # pipelines may read its signature
    def first(*args: Any, **kwargs: Any) -> Any:
        if not outputs:
            outputs.append(forward(*args, **kwargs))
        return outputs[0]

    stepped, computed = _seen_states(scheduler, num_steps), replaced(network, "forward", first)
    with suppress(_Stop), seen_calls(network) as calls, stepped, computed:
        run()
    return calls


@torch.no_grad()
def finish(run: Callable[[], Any], scheduler: Any) -> tuple[Any, Tensor]:
    """Return (what a pipeline's call returns, the last state of its scheduler)."""
    with _seen_states(scheduler) as states:
        output = run()
    return output, states[-1]


def requested_shift(run: Callable[[], object], network: nn.Module, scheduler: Any) -> float:
    """Return the time shift that a pipeline gives a scheduler with dynamic shifting, by the argument `mu`."""
    shifts: list[float] = []
    set_timesteps = scheduler.set_timesteps

    @functools.wraps(set_timesteps)  # pipelines read its signature
    def see(*args: Any, **kwargs: Any) -> Any:
        shifts.append(kwargs["mu"])
        return set_timesteps(*args, **kwargs)

    with replaced(scheduler, "set_timesteps", see):
        record(run, network)
    linear = scheduler.config.get("time_shift_type", "exponential") == "linear"
    return shifts[0] if linear else math.exp(shifts[0])


@contextmanager
def seen_calls(network: nn.Module, most: int | None = None) -> Iterator[list[Call]]:
    """Collect the calls of a network; the call that makes it `most` ends the pipeline before anything is computed."""
    calls: list[Call] = []

    def see(_network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(as_call(args, kwargs))
        if len(calls) == most:
            raise _Stop

    with network.register_forward_pre_hook(see, with_kwargs=True):
        yield calls


@contextmanager
def _seen_states(scheduler: Any, most: int | None = None) -> Iterator[list[Tensor]]:
    """Collect the states that a scheduler's steps lead to; the step that makes it `most` ends the pipeline."""
    states: list[Tensor] = []
    step = scheduler.step

    @functools.wraps(step)  # pipelines read its signature
    def see(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        states.append(result[0] if isinstance(result, tuple) else result.prev_sample)
        if len(states) == most:
            raise _Stop
        return result

    with replaced(scheduler, "step", see):
        yield states


def _stop(*_args: Any, **_kwargs: Any) -> None:
    raise _Stop


def as_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    """Return the arguments of one call of a network, sorted into x_t, time and the rest."""
    arguments: dict[str, Any] = {str(i): value for i, value in enumerate(args)} | dict(kwargs)
    arguments = {name: value for name, value in arguments.items() if value is not None and name != "return_dict"}
    x_name = next((name for name in ("0", *X_NAMES) if isinstance(arguments.get(name), Tensor)), None)
    t_name = next((name for name in ("1", *TIME_NAMES) if name in arguments), None)
    if x_name is None or t_name is None:
        raise ValueError(f"its network is not called as network(x_t, time, ...) but with {', '.join(arguments)}")
    x_t, net_time = arguments.pop(x_name), torch.as_tensor(arguments.pop(t_name))
    return Call(x_t, net_time, {f"@{x_name}": None, f"@{t_name}": None, **_flat(arguments)})


def split(call: Call, name: str, channels: int) -> Call:
    """Return a call whose x_t is its first `channels` channels; the further ones become the argument `name`."""
    arguments = {**call.arguments, name: call.x_t[:, channels:]}
    return Call(call.x_t[:, :channels], call.net_time, arguments)


def _flat(arguments: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one, with dots in the names."""
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Signature:
    """How a network is called: where x_t and the time go, and what is the same in every call.

    Attributes:
        x_name: Position or name of the noisy input.
        time_name: Position or name of the time.
        per_image: Names of the conditions: tensors with one row for each image.
        constant: Every other argument.
        channels_name: Name of the condition that is given as further channels of the noisy input, if there is one.
    """

    x_name: str
    time_name: str
    per_image: tuple[str, ...]
    constant: Mapping[str, Any]
    channels_name: str | None = None

    @classmethod
    def of(cls, one: Call, two: Call, channels_name: str | None = None) -> Signature:
        """Return the signature seen in the calls for one image and for two: what grew is per image."""
        x_name, time_name = (name[1:] for name in list(one.arguments)[:2])
        rest = {name: value for name, value in one.arguments.items() if not name.startswith("@")}
        grown = [n for n, v in rest.items() if isinstance(v, Tensor) and v.ndim and v.shape[0] * 2 == _rows(two, n)]
        constant = {name: value for name, value in rest.items() if name not in grown}
        return cls(x_name, time_name, tuple(grown), constant, channels_name)

    def conditions(self, call: Call) -> Cond:
        """Return the conditions of a recorded call."""
        return {name: call.arguments[name].detach().cpu() for name in self.per_image}

    def __call__(self, network: Callable[..., Any], x_t: Tensor, net_time: Tensor, cond: Cond) -> Tensor:
        """Call `network` as the pipeline does and return its output."""
        args, kwargs = self.arguments(x_t, net_time, cond)
        output = network(*args, **{**kwargs, "return_dict": False})
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def arguments(self, x_t: Tensor, net_time: Tensor, cond: Cond) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of the network's call, by position and by name, without `return_dict`."""
        named = {**self.constant, **{name: cond[name] for name in self.per_image}}
        named = {name: _to(value, x_t.device) for name, value in named.items()}
        if self.channels_name is not None:
            x_t = torch.cat([x_t, named.pop(self.channels_name).to(x_t.dtype)], dim=1)
        named |= {self.x_name: x_t, self.time_name: net_time}
        positions = sorted(int(name) for name in named if name.isdigit())
        args = tuple(named.pop(str(i)) for i in positions)
        return args, _nested(named)


def _rows(call: Call, name: str) -> int:
    value = call.arguments.get(name)
    return value.shape[0] if isinstance(value, Tensor) and value.ndim else -1


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return type(value)(_to(v, device) for v in value) if isinstance(value, (tuple, list)) else value


def _nested(named: Mapping[str, Any]) -> dict[str, Any]:
    """Return names with dots as nested dictionaries, the inverse of `_flat`."""
    found: dict[str, Any] = {}
    for name, value in named.items():
        place = found
        *path, last = name.split(".")
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return found
