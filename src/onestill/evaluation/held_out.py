"""A small Fréchet distance during a run: the student's samples of held-out noise beside the teacher's own few steps.

The reference is the teacher's own samples of other noise by midpoint steps, so no data is read. All rows share noise
and conditions, the features are those at hand, and how many samples there are follows from what they cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from onestill.core.devices import seconds_of
from onestill.core.errors import SettingError
from onestill.core.tensors import Cond, noise
from onestill.data.conditions import Conditions
from onestill.evaluation.choice import choose_features
from onestill.evaluation.features import FeatureExtractor, extract, sees_latents
from onestill.evaluation.metrics import frechet_distance
from onestill.objectives.registry import is_map
from onestill.sampling.generate import Generate, student_generator, teacher_generator
from onestill.students.student import Student
from onestill.training.config import DistillConfig
from onestill.training.distance import Verdict
from onestill.training.recipes import in_time

SHARE = 0.05
"""The largest share of a run that this takes."""
LEAST_SAMPLES, MOST_SAMPLES = 128, 2048
SHORTEST_RUN = 10.0
"""Seconds: nothing is measured of a run that is shorter."""
SEED, REFERENCE_SEED = 20_000_000, 30_000_000
FEW_STEPS = (1, 4, 8)
"""Steps of the teacher beside those of a run's pictures."""


@dataclass(frozen=True)
class _Eyes:
    """Features of samples, [N, D] on the CPU: at most half as many as there are samples, or a distance were all bias.

    Where there are more, they are projected on random directions, always the same, which keep every kind of difference
    in proportion. Without an extractor they are the samples' own numbers.
    """

    extractor: FeatureExtractor | None
    decode: Callable[[Tensor], Tensor]
    most: int

    @property
    def name(self) -> str:
        return "the samples' own numbers" if self.extractor is None else self.extractor.name

    def __call__(self, samples: Tensor) -> Tensor:
        if not samples.isfinite().all():
            raise ValueError("the teacher's samples hold NaN or infinity")
        if self.extractor is None:
            features = samples.flatten(1).double()
        else:
            seen = samples if sees_latents(self.extractor) else self.decode(samples).cpu().clamp(-1, 1)
            features = extract(self.extractor, seen).double()
        if (size := features.shape[1]) <= self.most:
            return features
        drawn = torch.randn(size, self.most, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
        return features @ torch.linalg.qr(drawn)[0]


class HeldOut:
    """Tells how good a student is by held-out samples; called where its exported weights are in place.

    No random state is touched. Every process of a run is to call it, and all find the same.

    Attributes:
        why: Why there is no verdict; "" if there is one, or nobody has asked yet.
    """

    def __init__(self, student: Student, conditions: Conditions, config: DistillConfig, device: torch.device) -> None:
        self.teacher, self.conditions, self.config, self.device = student.teacher, conditions, config, device
        numbers = (1, 4) if is_map(config) and not config.t_min else (1,)
        self.students = {k: student_generator(student, t=config.t_min, num_steps=k, device=device) for k in numbers}
        self.why, self._num, self._last = "", 0, math.nan
        self._rows: dict[int, float] = {}

    def __call__(self, run_seconds: float) -> Verdict | None:
        """Return how good the student is now; None if it would take too much of a run of so many seconds."""
        if not self._num and not self.why:
            with torch.random.fork_rng(devices=[]):  # networks are made from random numbers before they are loaded
                self.why = self._prepare(run_seconds)
        if self.why:
            return None
        found = dict.fromkeys(self.students, math.nan)
        with suppress(ValueError):  # of a student whose samples are not finite, which the run itself will say
            found |= {k: self._distance(generate) for k, generate in self.students.items()}
        verdict = Verdict(self._rows, found, self._num, self._eyes.name, self._last)
        self._last = found[1]
        return verdict

    def _prepare(self, run_seconds: float) -> str:
        """Choose features and the number of samples, and draw the teacher's; return why not, "" if all is done."""
        if run_seconds < SHORTEST_RUN:
            return f"a run of {in_time(run_seconds)} has no time for it"
        try:
            extractor = self._extractor()
            self._eyes = _Eyes(extractor, self.teacher.decode, LEAST_SAMPLES)
            steps = self._steps_of_teacher()
            wanted = self._samples_in(SHARE * run_seconds, steps)
            if wanted < LEAST_SAMPLES:
                needed = SHARE * run_seconds * LEAST_SAMPLES / max(wanted, 1)
                most = f"more than {SHARE:.0%} of its {in_time(run_seconds)} of steps"
                return f"{LEAST_SAMPLES} samples would take {in_time(needed)} of this run, {most}"
            self._num = min(wanted, MOST_SAMPLES)
            self._eyes = _Eyes(extractor, self.teacher.decode, self._num // 2)
            self._reference = self._features(self._exact(), REFERENCE_SEED)
            self._rows = {n: self._distance(self._of_teacher(n)) for n in steps}
        except ValueError as error:  # such as a teacher whose samples are not finite
            self._num = 0
            return str(error)
        return ""

    def _extractor(self) -> FeatureExtractor | None:
        """Return what samples are seen through; None of what is no picture, and of teachers without features."""
        if len(self.teacher.spec.sample_shape) == 3:
            with suppress(SettingError):
                return choose_features("auto", self.teacher, local_files_only=True, device=self.device)
        return None

    def _steps_of_teacher(self) -> tuple[int, ...]:
        many = self.config.num_teacher_steps
        return (*(n for n in FEW_STEPS if n < many), many)

    def _of_teacher(self, num_steps: int) -> Generate:
        return teacher_generator(self.teacher, num_steps=num_steps, device=self.device)

    def _exact(self) -> Generate:
        """Return the teacher in midpoint steps of as many calls as its most DDIM steps, or one more."""
        half = -(-self.config.num_teacher_steps // 2)
        return teacher_generator(self.teacher, num_steps=half, solver="midpoint", device=self.device)

    def _samples_in(self, seconds: float, steps: tuple[int, ...]) -> int:
        """Return how many samples every row can have in so many seconds, all pictures of the run included."""
        config, one, num = self.config, self._of_teacher(1), self.config.train_batch_size
        eps, cond = noise(range(num), self.teacher.spec.sample_shape), self._cond(num, SEED)
        found = one(eps, cond).cpu()
        parts = (lambda: one(eps, cond), lambda: self.students[1](eps, cond), lambda: self._eyes(found))
        call, draw, look = (min(seconds_of(part, self.device) for _ in range(2)) / num for part in parts)
        once = (sum(steps) + config.num_teacher_steps) * call + (len(steps) + 1) * look
        each = sum(self.students) * draw + len(self.students) * look
        times = -(-config.max_train_steps // config.validation_steps)
        (found_num,) = broadcast_object_list([int(seconds / (once + times * each))])
        return int(found_num)

    def _cond(self, num: int, seed: int) -> Cond:
        return self.conditions.rows(self.conditions.choose(num, torch.Generator().manual_seed(seed)))

    def _features(self, generate: Generate, seed: int) -> Tensor:
        chosen = self.conditions.choose(self._num, torch.Generator().manual_seed(seed))
        found, size = [], self.config.train_batch_size
        for first in range(0, self._num, size):
            rows = {name: value[first : first + size] for name, value in chosen.items()}
            seeds = range(seed + first, seed + min(first + size, self._num))
            found.append(
                self._eyes(generate(noise(seeds, self.teacher.spec.sample_shape), self.conditions.rows(rows)).cpu())
            )
        return torch.cat(found)

    def _distance(self, generate: Generate) -> float:
        return frechet_distance(self._reference, self._features(generate, SEED))
