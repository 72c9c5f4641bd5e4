"""How far a student is from its teacher, on a yardstick that says something: the teacher's own few steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from torch import Tensor

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


@dataclass(frozen=True)
class Verdict:
    """Fréchet distances of held-out samples from the teacher's own law, of other noise, in some features.

    Attributes:
        teacher: Of the teacher's DDIM steps, by their number, rising.
        student: Of the student, by its number of steps.
        num_samples: How many samples each row has; distances of few samples are biased, all alike.
        features: What they are seen through.
        before: The student's in one step when it was looked at before; nan the first time.
    """

    teacher: Mapping[int, float]
    student: Mapping[int, float]
    num_samples: int
    features: str
    before: float = math.nan

    def steps(self, num: int = 1) -> float:
        """Return how many steps of the teacher the student's `num` are as good as; nan if no number says it.

        Interpolated in the logarithms of both, between the teacher's rows; its most steps for whatever is better.
        """
        found, rows = self.student[num], list(self.teacher.items())
        if not math.isfinite(found) or not all(0 < d < math.inf for d in self.teacher.values()):
            return math.nan
        if found <= rows[-1][1]:
            return rows[-1][0]
        for (few, far), (more, near) in reversed(list(pairwise(rows))):
            if near < found <= far:
                return float(few * (more / few) ** (math.log(far / found) / math.log(far / near)))
        return math.nan

    @property
    def is_falling(self) -> bool:
        """Whether the distance was still becoming less, by more than its noise."""
        return self.student[1] < 0.95 * self.before

    @property
    def in_short(self) -> str:
        """The numbers, for a title."""
        student, teacher = (", ".join(f"{d:.3g} in {n}" for n, d in of.items()) for of in (self.student, self.teacher))
        return f"{student}; teacher {teacher}"

    def __str__(self) -> str:
        said = [f"{_steps(k)} {'are' if k > 1 else 'is'} {self._as_good_as(k)}" for k in self.student]
        few, least = 8, self.steps()
        worse = few in self.teacher and not least >= few
        why = ", and was still falling" if self.is_falling else ""
        not_yet = f"; one step is not better than its {few} yet{why}" if worse else ""
        return f"{', '.join(said)}{not_yet} (Fréchet distance {self.in_short}; {self.num_samples:,} held-out samples, {self.features})"

    def _as_good_as(self, num: int) -> str:
        steps, first = self.steps(num), next(iter(self.teacher))
        if math.isnan(steps):
            return f"no better than the teacher's {_steps(first)}"
        return f"as good as the teacher's {_steps(round(steps))}"


def nearest(errors: Mapping[float, Tensor]) -> float:
    """Return which of several students is nearest to a teacher: the first, unless another is so beyond doubt.

    `errors` has the mean squared difference of each of the same N images, [N], by student. Another is nearer beyond doubt
    where the mean of what it has less, image by image, is above two standard errors; of those the one of the least mean.
    """
    first, *_ = errors
    better = [first]
    for name, found in errors.items():
        less = errors[first].double() - found.double()
        if less.mean() > 2 * less.std() / len(less) ** 0.5:
            better.append(name)
    return min(better, key=lambda name: float(errors[name].double().mean()))


def _steps(num: int) -> str:
    return f"{num} step{'s' if num != 1 else ''}"
