"""How far a student is from its teacher, on a yardstick that says something: the teacher's own few steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

FEW_STEPS: Final = (1, 2, 4, 8, 16)
"""Steps of the teacher's own sampler that the yardstick is made of."""


@dataclass(frozen=True)
class Distance:
    """Distances from what the teacher makes in many steps of the same noise under the same conditions.

    d(x) = sqrt(mean((x - x_many)^2)), over the N samples and all their elements, in the units of a sample: images in
    [-1, 1], or latents. The noise is that of the pictures that a run shows of itself, which no training has seen.

    Attributes:
        student: d of the student's one step.
        few_steps: d of the teacher's own DDIM steps by their number, rising, up to the first that is nearer.
        teacher_steps: How many steps `x_many` took.
        num_images: N.
    """

    student: float
    few_steps: Mapping[int, float]
    teacher_steps: int
    num_images: int

    def __str__(self) -> str:
        of = f"RMS of {self.num_images} image{'s' if self.num_images != 1 else ''} from the same noise"
        head = f"{self.student:.3g} from the teacher's {_steps(self.teacher_steps)} ({of})"
        if not all(map(math.isfinite, (self.student, *self.few_steps.values()))):
            return f"{head}, which no number of its own steps can be set beside"
        nearer = next((n for n, d in self.few_steps.items() if d <= self.student), None)
        farther = max((n for n, d in self.few_steps.items() if d > self.student), default=None)
        far, near = (f"{_steps(n)} ({self.few_steps[n]:.3g})" if n else "" for n in (farther, nearer))
        if far and near:
            return f"{head}: between the teacher's own {far} and {near}"
        if far or near:
            return f"{head}: {'nearer' if far else 'no nearer'} than the teacher's own {far or near}"
        return head


def _steps(num: int) -> str:
    return f"{num} step{'s' if num != 1 else ''}"
