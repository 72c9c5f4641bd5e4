"""How stock pipelines are called, and how what they answer is read by watching them: the same in all families."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from onestill.core.tensors import Cond
from onestill.teachers.pipelines.capture import Call, Signature, as_call, record, seen_calls, split, walk
from onestill.teachers.pipelines.spec import PipelineSpec

EXAMPLE_PROMPTS = ("a photo", "a drawing of it")
"""The prompts of calls whose pictures do not matter."""
FIRST_STEPS = 4
"""Steps of calls that end in their first: the fewest that every scheduler takes (PNDM's begins with four)."""


@dataclass(frozen=True)
class PipelineCalls:
    """The calls of a stock pipeline, and what is known of pipelines of its kind."""

    spec: PipelineSpec
    pipeline: Any

    @property
    def network(self) -> Any:
        """The component that denoises."""
        return getattr(self.pipeline, self.spec.network)

    def examples(self, num: int) -> list[Any]:
        """Return some valid prompts or labels."""
        return [0] * num if self.spec.prompt == "class_labels" else list(EXAMPLE_PROMPTS[:num])

    def __call__(self, conditions: Sequence[Any], arguments: Mapping[str, Any], *, seeds: Sequence[int] = ()) -> Any:
        """Call the pipeline for some prompts (or labels) and return what it returns.

        `arguments` win over the family's own; without seeds, one for each image, the global random state draws.
        """
        generators = [torch.Generator().manual_seed(seed) for seed in seeds] or None
        given = {self.spec.prompt: list(conditions), "generator": generators}
        given |= {**self.spec.size(self.pipeline), **self.spec.arguments}
        if (condition := self.spec.image_condition) is not None:
            given |= condition.arguments(condition.example(self.pipeline, len(conditions)), condition.level)
        return self.pipeline(**{**given, **arguments})

    def sorted(self, call: Call) -> Call:
        """Return a recorded call with x_t alone as its noisy input."""
        condition = self.spec.image_condition
        return call if condition is None else split(call, condition.name, condition.channels(self.network.config))

    def first_calls(
        self,
        conditions: Sequence[Any],
        scale: float,
        until: Any = None,
        *,
        seeds: Sequence[int] = (),
        arguments: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[Call]:
        """Return the first network call of the pipeline for these conditions; with `until` all of its first step."""
        most = self.pipeline.scheduler.config.get("num_train_timesteps", FIRST_STEPS)  # few in a one-step schedule
        given = {"num_inference_steps": min(FIRST_STEPS, most), **self.spec.guidance_argument(scale), **arguments}
        run = lambda: self(conditions, given, seeds=seeds)  # noqa: E731 - passed on at once
        return [self.sorted(call) for call in record(run, self.network, until)]

    def one_step_time(self) -> float:
        """Return the time that an exported student's plain call gives its network, which computes nothing here."""
        run = lambda: self(self.examples(1), self.spec.export_arguments)  # noqa: E731 - passed on at once
        (call,) = record(run, self.network)
        return float(call.net_time.reshape(-1)[0])

    @property
    def num_steps(self) -> int:
        """The steps of an exported student's plain call."""
        return int(self.spec.export_arguments["num_inference_steps"])

    def step_times(self) -> list[float]:
        """Return the times that an exported student's plain call gives its network, one for each step."""
        run = lambda: self(self.examples(1), self.spec.export_arguments)  # noqa: E731 - passed on at once
        calls = walk(run, self.network, self.pipeline.scheduler, self.num_steps)
        self._check(calls)
        return [float(call.net_time.reshape(-1)[0]) for call in calls]

    def _check(self, calls: Sequence[Call], num: int = 1) -> None:
        if len(calls) != self.num_steps or any(len(call.x_t) != num for call in calls):
            often = "once" if self.num_steps == 1 else f"{self.num_steps} times"
            found = f"{len(calls)} times, not {often}"
            raise RuntimeError(f"the exported pipeline's plain call evaluated its network {found}")

    @torch.no_grad()
    def plain_call(self, signature: Signature, num: int) -> tuple[Tensor, Tensor, Cond]:
        """Return (images in [-1, 1], the noise they came from, their conditions) of an exported student's plain call."""
        with seen_calls(self.network) as calls:
            arguments = {**self.spec.export_arguments, "output_type": "pt"}
            output = self(self.examples(num), arguments, seeds=range(num))
        self._check(calls, num)
        call = self.sorted(calls[0])
        eps = self.spec.unpack(call.x_t, signature.constant)
        return self.spec.result(output), eps, signature.conditions(call)

    def signature(self) -> tuple[Signature, Call]:
        """Return (how the pipeline calls its network, seen in calls for one image and for two; the call for one)."""
        one, two = (self.first_calls(self.examples(num), 1.0, seeds=range(num))[0] for num in (1, 2))
        condition = self.spec.image_condition
        return Signature.of(one, two, None if condition is None else condition.name), one

    @torch.no_grad()
    def encode(self, signature: Signature, prompts: Sequence[Any], seeds: Sequence[int] = ()) -> Cond:
        """Return the conditions of prompts, one row each; what is drawn on the way has the seeds 0, 1, ... if none."""
        (call,) = self.first_calls(prompts, 1.0, seeds=seeds or range(len(prompts)))
        return signature.conditions(call)

    @torch.no_grad()
    def null_conditions(self, signature: Signature, negative_prompt: str | None = None) -> Cond:
        """Return the conditions of the unguided half of a guided step; {} if the pipeline does not guide.

        A pipeline either calls its network once with both halves, "no prompt" first, or twice, the prompt first.
        """
        if self.spec.guidance is None:
            return {}
        own = {} if negative_prompt is None else {"negative_prompt": [negative_prompt]}
        calls = self.first_calls(self.examples(1), 2.0, self.pipeline.scheduler, seeds=(0,), arguments=own)
        rows = signature.conditions(calls[-1])
        if len(calls) == 1 and all(len(value) == 1 for value in rows.values()):
            return {}
        kept = () if self.spec.image_condition is None else self.spec.image_condition.kept
        return {name: value[:1] for name, value in rows.items() if name not in kept}

    def guidance_input(self, signature: Signature, one: Call) -> str | None:
        """Return the condition that tells the network the guidance scale of a pipeline that does not guide, if one does.

        `one` is the call for one image at the scale 1: what is another at 2 is that condition.
        """
        if self.spec.guidance is None:
            return None
        (call,) = self.first_calls(self.examples(1), 2.0, seeds=(0,))
        before, after = signature.conditions(one), signature.conditions(call)
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        return changed[0] if len(changed) == 1 else None

    @property
    def usual_guidance(self) -> float:
        """The guidance scale of a call that names none."""
        parameter = inspect.signature(type(self.pipeline).__call__).parameters.get("guidance_scale")
        default = None if parameter is None else parameter.default
        return float(default) if isinstance(default, (int, float)) else 1.0

    @contextmanager
    def encoded(self, signature: Signature, cond: Cond) -> Iterator[None]:
        """Let the pipeline's network see these conditions in place of those of the prompts that it is called for."""

        def put(_network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            call = self.sorted(as_call(args, kwargs))
            args, named = signature.arguments(call.x_t, call.net_time, cond)
            return args, {**named, "return_dict": kwargs.get("return_dict", True)}

        with self.network.register_forward_pre_hook(put, with_kwargs=True):
            yield
