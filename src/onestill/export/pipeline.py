"""Students of pipelines: the stock folder with another network and scheduler, its LoRA file, and the checks of both.

A run is at its end here and its device as full as it ever was. So all is loaded and written on the CPU, one pipeline
after the other, and what a self-check computes on the student's own device is one call of one module at a time: two
devices differ by more than an export may (TF32 convolutions, for one), and text encoders need not be there at all.
"""

from __future__ import annotations

import functools
import gc
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from torch import nn

from onestill.core.patch import replaced
from onestill.core.writing import write_text
from onestill.export.base import Format
from onestill.export.lora_file import LORA_FOLDER, load_with_lora, why_no_file, write_lora
from onestill.students.bake import constants, tell, tells_apart
from onestill.students.model_card import Facts, shown_labels, stock_code
from onestill.students.one_step import FewSteps, OneStep
from onestill.students.student import Student
from onestill.teachers.pipelines.calls import PipelineCalls
from onestill.teachers.pipelines.folder import INDEX, has_checker, load_stock
from onestill.teachers.pipelines.spec import PipelineSpec
from onestill.teachers.pipelines.teacher import CALL_FILE, CALL_NOTES, PLAIN, PipelineTeacher
from onestill.teachers.pipelines.walks import walks

FIRST_STAGE = """base = DiffusionPipeline.from_pretrained("path/to/the/student/of/the/first/stage")
small = base({prompt}, num_inference_steps=1, guidance_scale=1.0).images
"""


class PipelineFormat(Format):
    """The teacher's own pipeline around the student's network: its steps, no guidance, everything else stock.

    Where a size was asked for and the class takes its default size from the network, that is the student's.
    """

    library = "diffusers"

    def __init__(
        self, student: Student, t: float = 0.0, guidance_scale: float | None = None, num_steps: int = 1
    ) -> None:
        super().__init__(student, t, guidance_scale, num_steps)
        self.teacher = cast(PipelineTeacher, student.teacher)
        self.own = self.plain = self.teacher.pipeline_spec.in_steps(num_steps)
        """How the folder is called: without the size, if that is its default."""

    def write(self, step: OneStep, folder: Path) -> None:
        self.plain.adapt(step.network)
        pipeline, net_times = self.assembled(step, with_checker=True)
        pipeline.save_pretrained(folder, safe_serialization=True)
        _keep_facts(self.teacher.folder / INDEX, folder / INDEX)
        kept = {name: value for name, value in self.plain.given.items() if isinstance(value, PLAIN)}
        notes = dict(zip(CALL_NOTES, (self.num_steps, type(pipeline.scheduler).__name__), strict=True))
        write_text(folder / CALL_FILE, json.dumps(kept | notes) + "\n")
        if why_no_file(self.student) is None:
            self.write_lora_file(step, pipeline, net_times, folder / LORA_FOLDER)

    def assembled(self, step: OneStep, *, with_checker: bool = False) -> tuple[Any, list[float]]:
        """Return (the teacher's pipeline around a student's network, with its scheduler; the times that K steps tell it)."""
        spec, pipeline_spec, network = self.teacher.spec, self.plain, step.network
        size = (spec.sample_shape[-2], spec.sample_shape[-1])
        if "height" in pipeline_spec.given and pipeline_spec.set_size(network, size):
            rest = {name: value for name, value in pipeline_spec.arguments.items() if name not in ("height", "width")}
            self.plain = replace(pipeline_spec, arguments=rest)
        schedulers = self.schedulers()
        parts = {pipeline_spec.network: network, "scheduler": schedulers[0]}
        pipeline = self.teacher.load_afresh(parts, with_checker=with_checker)
        return pipeline, self._tell(step, pipeline, schedulers)

    def write_lora_file(self, step: OneStep, pipeline: Any, net_times: Sequence[float], folder: Path) -> bool:
        """Write the student as a LoRA file, if the teacher's time embedding tells its steps apart; return whether it does."""
        teacher = self.teacher
        if net_times and not tells_apart(teacher, teacher.network, net_times):
            return False
        net_times = net_times or [PipelineCalls(self.plain, pipeline).one_step_time()]
        wanted = constants(teacher, step.network, net_times)
        write_lora(teacher, self.student.network, wanted, net_times, pipeline.scheduler, folder)
        return True

    def check(self, folder: Path) -> float:
        error = self.difference(self.plain, load_stock(type(self.teacher.pipeline), folder))
        if not (folder / LORA_FOLDER).is_dir():
            return error
        gc.collect()  # what was checked
        # This pipeline is the teacher's own, whose default size is another.
        with_lora = load_with_lora(self.teacher, folder / LORA_FOLDER)
        return max(error, self.difference(self.own, with_lora))

    def schedulers(self) -> Sequence[Any]:
        """Return the schedulers that the folder may have."""
        pipeline, spec = self.teacher.pipeline, self.teacher.spec
        if self.num_steps == 1:
            return [self.plain.one_step(pipeline, spec.prediction_type, spec.process.level(spec.t_max)[0])]
        assert self.plain.few_steps is not None, "asked of by `why_not_in_steps`"
        return self.plain.few_steps(pipeline, spec, self.student.levels(self.num_steps))

    def _tell(self, step: OneStep, pipeline: Any, schedulers: Sequence[Any]) -> list[float]:
        """Give a pipeline the scheduler that its call walks the levels with, and its network the times told; return these.

        One step tells nothing: its network ignores the time.
        """
        if not isinstance(step, FewSteps):
            return []
        calls, levels = PipelineCalls(self.plain, pipeline), self.student.levels(self.num_steps)
        for scheduler in schedulers:
            pipeline.register_modules(scheduler=scheduler)
            with computing_on(self.device, (calls.network, "forward")):
                net_times = calls.step_times()
            if walks(scheduler, self.student.spec, levels):
                native = [head["net_time"] for head in step.heads]
                tell(self.teacher, step.network, constants(self.teacher, step.network, native), net_times)
                return net_times
        raise RuntimeError(
            f"its call with {self.num_steps} steps sets its scheduler to other levels than the student's"
        )

    def code(self, facts: Facts) -> str:
        teacher, condition = self.teacher, self.teacher.image_condition
        prompt = json.dumps(facts.prompt, ensure_ascii=False)  # in the quotation marks of everything around it
        first = prompt if teacher.spec.text else f"class_labels={shown_labels(teacher.spec, facts)}"
        given, before = teacher.plain_call_arguments(self.num_steps), ""
        if condition is not None:
            first, before = f"{first}, image=small", FIRST_STAGE.format(prompt=prompt)
            given = {**given, "noise_level": condition.level}
        arguments = ", ".join([first, *(f"{name}={value!r}" for name, value in given.items())])
        return stock_code(teacher.output_field, arguments, before, self.num_steps)

    def facts(self, folder: Path, facts: Facts) -> Facts:
        given = ", ".join(f"{name} {value}" for name, value in self.teacher.arguments.items())
        is_default = self.plain is not self.own
        default = "this folder's default size is that one too" if is_default else "the folder's defaults are others"
        size = f"{given}, as distilled and as in the call above; {default}" if given else facts.size
        return replace(facts, checked=has_checker(folder), size=size)

    def difference(self, pipeline_spec: PipelineSpec, pipeline: Any) -> float:
        """Return the largest difference of images between the plain call of a pipeline, on the CPU, and the student."""
        calls, decoder = PipelineCalls(pipeline_spec, pipeline), getattr(pipeline, "vae", None)
        with computing_on(self.device, (calls.network, "forward"), (decoder, "decode")):
            images, eps, cond = calls.plain_call(self.teacher.signature, 2)
        expected = self.teacher.decode(self.expected(eps, cond))
        return float((images.clamp(-1, 1) - expected.cpu().clamp(-1, 1)).abs().max())


def _keep_facts(old: Path, new: Path) -> None:
    """Add what a pipeline's index says and its class does not write again, such as DiT's names of classes."""
    facts, written = (json.loads(path.read_text(encoding="utf-8")) for path in (old, new))
    missing = {key: value for key, value in facts.items() if key not in written and not key.startswith("_")}
    if missing:
        write_text(new, json.dumps({**written, **missing}, indent=2) + "\n")


@contextmanager
def computing_on(device: torch.device, *methods: tuple[Any, str]) -> Iterator[None]:
    """Let modules on the CPU compute on a device: each, but None, goes there for a call of its method, and back."""

    def there(module: nn.Module, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)  # pipelines read its signature
        def call(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = send_to_device((args, kwargs), device)
            try:
                module.to(device)
                return send_to_device(method(*args, **kwargs), torch.device("cpu"))
            finally:
                module.to("cpu")

        return call

    with ExitStack() as stack:
        for module, name in methods:
            if module is not None:
                stack.enter_context(replaced(module, name, there(module, getattr(module, name))))
        yield
