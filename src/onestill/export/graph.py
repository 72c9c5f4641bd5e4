"""A student as a graph that other programs run: its times are constants in it, and any number of pictures goes through.

What a network asks of the number of pictures while it is traced, such as whether there are 64, is answered for those of
the trace and not written down: it is for speed, and the checks of a format run other numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from onestill.core.reading import reason
from onestill.core.tensors import Cond
from onestill.students.bake import constants
from onestill.students.injection import time_embeddings
from onestill.students.one_step import FewSteps, OneStep
from onestill.teachers.base import Teacher


class Drawing(nn.Module):
    """From noise [B, *sample_shape] and inputs of B rows, in the order of `names`, to what a student draws.

    Attributes:
        step: The student's one step, or its few.
        names: The conditions that its inputs are; that which `encoder` makes of its one input, if there is one.
        encoder: From token ids [B, L] to that condition; None if the inputs are the conditions.
        finish: From samples to pictures; None if the samples are asked for.
    """

    def __init__(
        self,
        step: OneStep,
        names: Sequence[str],
        encoder: nn.Module | None = None,
        finish: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.step, self.names, self.encoder, self.finish = step, tuple(names), encoder, finish

    def forward(self, noise: Tensor, *inputs: Tensor) -> Tensor:
        """Return pictures, or samples."""
        with unguarded(noise):
            rows = inputs if self.encoder is None else (self.encoder(*inputs),)
            sample = self.step(noise, dict(zip(self.names, rows, strict=True)))
            return sample if self.finish is None else self.finish(sample)


class Finish(nn.Module):
    """What a teacher's decoder makes of samples, in [-1, 1] where they are pictures."""

    def __init__(self, teacher: Teacher, *, clamps: bool) -> None:
        super().__init__()
        self.decode, self.clamps = teacher.decode, clamps
        # What `decode` computes with: a trace wants to see it.
        self.vae = getattr(getattr(teacher, "pipeline", None), "vae", None) if teacher.has_decoder else None

    def forward(self, sample: Tensor) -> Tensor:
        """Return the pictures of samples."""
        with unguarded(sample):
            pictures = self.decode(sample)
            return pictures.clamp(-1, 1) if self.clamps else pictures


class _Constant(nn.Module):
    """In the place of the last layer of a time embedding: row k of [K, E] in its k-th call, and again from the first."""

    rows: Tensor

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows.clone())
        self.calls, self.wide = 0, False

    def forward(self, h: Tensor) -> Tensor:
        k, self.calls = self.calls % len(self.rows), self.calls + 1
        row = self.rows[k : k + 1].to(h.dtype)
        return row.expand(h.shape[0], -1) if self.wide else row


@torch.no_grad()
def fold_time(step: OneStep, teacher: Teacher, eps: Tensor, cond: Cond) -> None:
    """Let a step's network have constants in place of its time embeddings, and one time in place of one for each picture.

    A constant of one row is no computation, whatever follows it; of a network that wants a row for each picture, as
    the step shows on `eps` and `cond`, they are repeated.
    """
    told = [head["net_time"] for head in step.heads] if isinstance(step, FewSteps) else [step.net_time]
    network, call, layers = step.network, step.call, []
    if time_embeddings(network):
        for name, rows in constants(teacher, network, told).items():
            layers.append(_Constant(rows.float()))
            network.set_submodule(name, layers[-1])
    turns = itertools.cycle(told)

    def call_at_one_time(net: Callable[..., Any], x: Tensor, net_time: Tensor, cond: Cond) -> Tensor:
        return call(net, x, net_time.new_full((1,), next(turns)), cond)

    step.call = call_at_one_time
    try:
        found = step(eps, cond)
        is_whole = found.shape == eps.shape
    except (RuntimeError, ValueError):
        is_whole = False
    if not is_whole:
        step.call = call
        for layer in layers:
            layer.wide, layer.calls = True, 0


@torch.no_grad()
def traced(module: nn.Module, inputs: Sequence[Tensor]) -> Any:
    """Return the `ExportedProgram` of a module that takes these inputs, for any number of rows.

    It has what it computes with and no more: no example inputs, which its file would hold as a pickle, and not the
    lines of the files that it was traced from. ValueError if it cannot be traced.
    """
    batch, *more = [{0: torch.export.Dim("batch")}] * len(inputs)
    varied = (batch, tuple(more)) if more else (batch,)
    try:
        program = torch.export.export(module, tuple(inputs), dynamic_shapes=varied, strict=False)
    except Exception as error:  # whatever its own code raises when its numbers are not known
        raise ValueError(f"torch.export cannot trace it: {reason(error)}") from error
    program.example_inputs = None
    _drop_unused(program)
    for node in program.graph.nodes:
        for trace in ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node"):
            node.meta.pop(trace, None)
    return program


def _drop_unused(program: Any) -> None:
    """Drop what nothing depends on, and the weights that only that used, such as an encoder's beside a decoder."""
    graph, signature = program.graph, program.graph_signature
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:  # which would keep what nothing else uses
            graph.erase_node(node)
    graph.eliminate_dead_code()
    unused = {node.name: node for node in graph.nodes if node.op == "placeholder" and not node.users}
    kept = []
    for entry in signature.input_specs:
        if entry.arg.name in unused and entry.target is not None:
            graph.erase_node(unused[entry.arg.name])
            for held in (program.state_dict, program.constants):
                held.pop(entry.target, None)
        else:
            kept.append(entry)
    signature.input_specs[:] = kept
    program.graph_module.recompile()


@contextmanager
def unguarded(x: Tensor) -> Iterator[None]:
    """Write down nothing of what is asked of the number of rows of `x` while it is traced."""
    rows = x.shape[0]
    if isinstance(rows, torch.SymInt):
        with rows.node.shape_env.suppress_guards():
            yield
    else:
        yield
