"""What a run, a sampling or an evaluation says when there is not enough memory for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from onestill.core.errors import RunError, in_short, named
from onestill.core.memory import enough_memory, is_out_of_memory
from onestill.core.writing import is_full, writing
from onestill.runs.inspect import estimate, less_memory

if TYPE_CHECKING:
    from onestill.runs.build import Run


def enough_for_images(num: int, what: str) -> AbstractContextManager[None]:
    """Return a context in which memory that is not enough for batches of `num` images is one line."""
    return enough_memory(f"{what} {num:,} images at once", f"lower {named('batch_size')}")


@contextmanager
def going_on(run: Run) -> Iterator[None]:
    """Let what ends a run that has begun be one line: too little memory, a full disk, a file that has gone."""
    config, shape = run.config, " x ".join(map(str, run.teacher.spec.sample_shape))
    what = f"{named('train_batch_size')} {config.train_batch_size:,} of {shape}"
    with enough_memory(what, less_memory(config, run.student), lambda: _predicted(run)):
        try:
            yield
        except (OSError, SafetensorError) as error:
            if is_out_of_memory(error):
                raise
            if is_full(error):
                with writing(f"the run in {config.output_dir}"):
                    raise
            raise RunError(f"the run in {config.output_dir} cannot go on: {in_short(error)}") from error


def _predicted(run: Run) -> str:
    device = next(run.student.parameters()).device
    cost = estimate(run.student, run.config, device, run.first_stage)
    return f"a step takes about {cost.memory / 1e9:.3g} GB, as onestill inspect says before a run"
