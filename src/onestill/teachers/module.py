"""Any `torch.nn.Module` or callable as a teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from onestill.core.arguments import Count, Label, Positive, checked
from onestill.core.errors import SettingError, named
from onestill.core.memory import is_out_of_memory
from onestill.core.reading import reason
from onestill.core.tensors import Cond, bare
from onestill.diffusion.prediction import PREDICTION_TYPES
from onestill.diffusion.process import Process
from onestill.teachers.base import NetworkTeacher
from onestill.teachers.teacher_spec import NO_THRESHOLD, TeacherSpec, Threshold

HALVES = (torch.float16, torch.bfloat16)


class ModuleTeacher(NetworkTeacher):
    """A teacher whose network is called as network(x, net_time, **conditions)."""

    def call(self, network: Callable[..., Any], x_t: Tensor, net_time: Tensor, cond: Cond) -> Tensor:
        output = network(x_t, net_time, **cond)
        if not isinstance(output, Tensor) or not output.is_floating_point():
            kind, other = "a tensor", type(output).__name__
            if isinstance(output, Tensor):
                kind, other = "real numbers", str(output.dtype)
            why = f"must return {kind}, it returned {other}"
            raise SettingError("network", why=why, todo="wrap it in a module that returns the prediction alone")
        if output.shape != x_t.shape:
            why = f"returned shape {list(output.shape)} for input {list(x_t.shape)}"
            todo = f"wrap it so that it returns its prediction alone, or give another {named('sample_shape')}"
            raise SettingError("network", why=why, todo=todo)
        return output.to(x_t.dtype) if output.dtype == torch.float64 else output

    def first_call(self, eps: Tensor, network: Callable[..., object] | None = None) -> Tensor:
        network, x_t = self.network if network is None else network, self.spec.trajectory.start(eps)
        labels = [*self.spec.labels[:1], *self.spec.labels[-1:], self.spec.null_class]
        known = torch.tensor([label for label in labels if label is not None] or [0], device=eps.device)
        rows = {"class_labels": known[torch.arange(len(eps)) % len(known)]} if self.spec.labels else {}
        t_max = self.spec.t_max
        try:
            found, again = (self.denoised_by(network, x_t, t_max, rows) for _ in range(2))
        except SettingError:
            raise
        except Exception as error:  # whatever a network of somebody's raises
            if is_out_of_memory(error):
                raise
            call = f"network(x, t{', class_labels=...' if rows else ''})"
            why = f"cannot be called as {call} with x {list(x_t.shape)} and t [{len(x_t)}]: {reason(error)}"
            raise SettingError("network", why=why, todo=self._todo(network, x_t, rows)) from error
        if not found.isfinite().all():
            why = f"returns numbers that are not finite (NaN or infinity) at the start level t = {t_max:g}"
            raise SettingError("network", why=why, todo=f"look at its weights, or give a smaller {named('t_max')}")
        if (found - again).square().mean() > 1e-4 * found.square().mean():
            why = "returns something else when it is called again with the same input, in evaluation mode"
            raise SettingError("network", why=why, todo="take out what it draws itself, such as functional dropout")
        return found

    def _todo(self, network: Callable[..., Any], x: Tensor, rows: Cond) -> str:
        """Return what to do with a network that cannot be called, found by calling it in other ways."""
        t = self.spec.process.net_time(torch.full((len(x),), self.spec.t_max, dtype=torch.float64)).to(x)
        dtypes = {p.dtype for p in network.parameters()} if isinstance(network, nn.Module) else set()
        if others := dtypes - {x.dtype}:
            return f"its weights are {', '.join(map(str, others))}: convert it first, network.float()"
        labels, told = torch.zeros(len(x), dtype=torch.long, device=x.device), f"its time here is {float(t[0]):g}"
        whole = "it takes whole numbers as time, as an nn.Embedding does: wrap it in a module that rounds its time"
        ways: dict[str, Callable[[], object]] = {
            "it takes (t, x): wrap it in a module with forward(x, t), the noisy sample first": lambda: network(
                t, x, **rows
            ),
            f"{whole}, t.round().long(); {told}": lambda: network(x, t.round().long(), **rows),
            "it takes its time as [B, 1]: wrap it in a module that calls it with t[:, None]": lambda: network(
                x, t[:, None], **rows
            ),
            "it takes one time for the whole batch: wrap it in a module that takes one for each": lambda: network(
                x, t[0], **rows
            ),
            "it takes no time: wrap it in a module with forward(x, t)": lambda: network(x, **rows),
            f"it wants classes: give {named('num_classes')}": lambda: network(x, t, class_labels=labels),
        }
        if rows:
            other = "it takes its classes by another name: wrap it in a module with forward(x, t, class_labels)"
            none = f"it takes no class_labels: leave {named('num_classes')} out"
            ways |= {other: lambda: network(x, t, labels), none: lambda: network(x, t)}
        for words, call in ways.items():
            try:
                output = call()
            except Exception:
                continue
            if isinstance(output, Tensor) and output.shape == x.shape:
                return words
        given = "its arguments are the noisy sample, then the time of each image, then class_labels if it has classes"
        return f"{given}; {named('sample_shape')} is {self.spec.sample_shape}, and {told}"


@checked()
def module_teacher(
    network: Callable[..., object],
    process: Process,
    prediction_type: str,
    sample_shape: tuple[Count, ...],
    *,
    num_classes: Count | None = None,
    null_class: Label | None = None,
    t_max: float | None = None,
    threshold: Threshold = NO_THRESHOLD,
    sigma_data: Positive = 0.5,
) -> ModuleTeacher:
    """Return a teacher around your own network.

    The network is called as `network(x, net_time)` or, with classes, `network(x, net_time, class_labels=...)`;
    x is [B, *sample_shape], net_time [B] is `process.net_time(t)`. It returns a tensor of x's shape that holds
    what `prediction_type` says. A native EDM network D(x; sigma) is `VE(time_input="sigma")` with "sample".

    "velocity" is eps - x_0, from data to noise. A flow network that runs from noise to data predicts x_0 - eps: give
    its negative, and `FlowMatching(net_scale=-1.0, net_offset=1.0)` if its time is 0 at noise, (net_scale=1.0) if 1 at noise.

    The network is put into evaluation mode; weights in half precision become float32, which students are trained in.
    What `torch.compile`, DataParallel and DistributedDataParallel put around it is taken off.

    Args:
        network: A module, or any callable.
        process: The noise process it was trained on.
        prediction_type: One of `onestill.diffusion.prediction.PREDICTION_TYPES`.
        sample_shape: Shape of one sample without the batch axis.
        num_classes: Number of classes besides the null class; None if unconditional.
        null_class: The label of "no class", if there is one.
        t_max: Start level; chosen from the process and the prediction type if None.
        threshold: What the teacher's sampler does to x_0.
        sigma_data: Standard deviation of the data, for "edm".

    Raises:
        SettingError: If an argument is of another type, the prediction type is unknown or cannot start on this
            process, or the network is none or has no weights of its own yet.
    """
    _check(prediction_type, sample_shape)
    if null_class is not None and num_classes is None:
        raise SettingError("null_class", null_class, "is a label of classes", f"give {named('num_classes')} too")
    if t_max is not None:
        process.check_start_level(prediction_type, t_max)
    start, start_reason = process.start_level(prediction_type) if t_max is None else (t_max, "given")
    spec = TeacherSpec(
        family="module",
        source="",
        process=process,
        prediction_type=prediction_type,
        sample_shape=sample_shape,
        t_max=start,
        t_max_reason=start_reason,
        num_classes=num_classes,
        null_class=null_class,
        threshold=threshold,
        sigma_data=sigma_data,
    )
    return ModuleTeacher(own_network(network), spec)


def own_network(network: Any) -> Any:
    """Return a network of one's own as it is used: not wrapped, in float32 or more; SettingError if it is none."""
    if not callable(network) or isinstance(network, type):
        what = f"the class {network.__name__}" if isinstance(network, type) else f"of type {type(network).__name__}"
        raise SettingError("network", why=f"is {what}", todo="give a torch.nn.Module, an instance, or a function")
    if not isinstance(network, nn.Module):
        return network
    if isinstance(network, torch.jit.ScriptModule):
        why = "is TorchScript, whose layers nothing can be put into"
        raise SettingError("network", why=why, todo="give the module that it was made from")
    network = bare(network)
    if any(type(part).__module__.partition(".")[0] == "peft" for part in network.modules()):
        why = "holds adapters of peft, and a student is a copy of a whole network"
        raise SettingError("network", why=why, todo="merge them first: network.merge_and_unload()")
    if any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers())):
        raise SettingError("network", why="has weights on the device 'meta', which holds none", todo="load them first")
    if any(is_lazy(tensor) for tensor in (*network.parameters(), *network.buffers())):
        why = "has lazy layers, which have no weights before their first call"
        raise SettingError("network", why=why, todo="call it once, or load its weights, first")
    if others := [name for name, value in network.state_dict().items() if not isinstance(value, Tensor)]:
        why = f"has a state that is no tensor, {others[0]!r}, as quantised networks and an extra state have"
        raise SettingError("network", why=why, todo="give one whose weights and buffers are all there is")
    return network.float() if any(p.dtype in HALVES for p in network.parameters()) else network


def _check(prediction_type: str, sample_shape: tuple[int, ...]) -> None:
    """Refuse what has the right type, and is nothing that is known."""
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"unknown prediction type {prediction_type!r}; known: {', '.join(PREDICTION_TYPES)}")
    if not sample_shape:
        todo = "give sizes of at least 1 without the batch axis, such as (3, 32, 32)"
        raise SettingError("sample_shape", sample_shape, "is no shape of one sample", todo)
