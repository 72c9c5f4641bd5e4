"""What an objective is: rows for the student's one forward pass, what they are regressed on, and networks of its own.

In each forward pass of training every objective gives some rows of one batch, and the loss is

    L = sum over means m of  1 / |m|  sum over rows i of m  w_i |y_i - target_i|^2 / D      (+ losses of own networks),

y_i being the student's prediction for row i and D the size of a sample; a row's mean is named by a number.
Modules of this room load torch inside functions only: their settings are read by every command line.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from onestill.core.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from onestill.core.tensors import Cond
    from onestill.data.conditions import Conditions
    from onestill.teachers.base import Teacher

S = TypeVar("S", bound=Settings)


@dataclass(frozen=True)
class Batch:
    """Rows of one forward pass of the student.

    Attributes:
        x: Start states, [B, *sample_shape].
        s: Target times, [B] float64.
        cond: Conditions, B rows each.
        target: What the predictions are regressed on, [B, *sample_shape]; or, from the predictions without their
            gradient to that: a target y - g gives y the gradient 2 w g.
        weights: Weight of each row's mean squared residual, [B].
        mean: Which mean a row enters, [B] integers.
        r: Start levels, [B] float64; None where all rows start at t_max.
        share: Share of the whole mean that a row's step is, rho of eq. (6), [B] float64; 1 if None. The residual over
            it is an error of f.
        is_profiled: Which rows the residual profile counts, [B] bool; none if None.
    """

    x: Tensor
    s: Tensor
    cond: Cond
    target: Tensor | Callable[[Tensor], Tensor]
    weights: Tensor
    mean: Tensor
    r: Tensor | None = None
    share: Tensor | None = None
    is_profiled: Tensor | None = None


@dataclass(frozen=True)
class Cost:
    """What an objective costs besides the student's forward and backward for each of its rows, in evaluations.

    Attributes:
        student: Evaluations of the student without gradient, per row.
        teacher: Calls of the guided teacher, per row.
        learned: Forward and backward passes of a network of the student's size, per row.
        pool: How many items are made before the first step.
        teacher_per_item: Calls of the guided teacher for each of them.
        samples_per_item: Tensors of a sample's shape that each keeps on the disk.
        networks: Networks of the student's size that are trained with it.
    """

    student: float = 0.0
    teacher: float = 0.0
    learned: float = 0.0
    pool: int = 0
    teacher_per_item: float = 0.0
    samples_per_item: int = 0
    networks: int = 0


@dataclass(frozen=True)
class Context:
    """What objectives are made of.

    Attributes:
        config: The run's configuration, which holds the settings of every objective.
        teacher: The teacher, guided and thresholded.
        student: The student: (x_r, r, s, cond) -> y_s. Objectives are made before its first step.
        target_student: What a target's own signal is asked of: the student, or its average.
        conditions: Where conditions are drawn from.
        generator: The run's own generator: what is drawn from it is the same after a resume.
        device: Where the networks are.
        autocast: The context in which networks are called.
        progress: The share of the training that is done, in [0, 1].
        batch_size: Rows in one forward pass.
        seed: Of pools, which have generators of their own.
        folder: The run's folder.
        process_index: Number of this process.
        num_processes: How many there are.
        identity: Everything that decides what a pool holds.
        pools: What objectives have prepared, by their names, for others to draw from.
    """

    config: Settings
    teacher: Teacher
    student: nn.Module
    target_student: nn.Module
    conditions: Conditions
    generator: torch.Generator
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]]
    progress: Callable[[], float]
    batch_size: int
    seed: int
    folder: Path
    process_index: int
    num_processes: int
    identity: Mapping[str, object]
    pools: dict[str, Any] = field(default_factory=dict)

    def draw(self, num: int) -> tuple[Tensor, Cond]:
        """Return (start states x_a, conditions) of `num` new rows, on the device, drawn from the run's generator."""
        import torch

        from onestill.core.tensors import to_device

        eps = torch.randn(num, *self.teacher.spec.sample_shape, generator=self.generator)
        cond = self.conditions.rows(self.conditions.choose(num, self.generator))
        return self.teacher.spec.trajectory.start(eps.to(self.device)), to_device(cond, self.device)


class Objective(ABC, Generic[S]):
    """A part of the loss. One file; registered by one line of `onestill.objectives.registry`.

    Attributes:
        name: Short name.
        Settings: Its settings: a model that the run's configuration inherits from.
        unit: What its pool is counted in, for progress bars.
        networks: Networks that are trained with it, by name. Each gets an optimiser, clipping and an average as the
            student's, and is in every checkpoint. After the objective is made, these are the ones to call.
        turn: When it is asked for its rows: after all of a lower one.
        pool_hash: Of its pool, which every checkpoint holds; "" before there is a whole one. Of a run that goes on,
            `prepare` is told the one that its pool had.
    """

    name: ClassVar[str]
    Settings: ClassVar[type[Settings]]
    unit: ClassVar[str] = "item"
    turn: ClassVar[int] = 0
    networks: dict[str, nn.Module]
    pool_hash: str = ""

    def __init__(self, context: Context) -> None:
        self.context, self.networks = context, {}

    @property
    def settings(self) -> S:
        """Its settings, as the run has them."""
        return self.context.config  # type: ignore[return-value]  # the configuration inherits from every `Settings`

    @classmethod
    @abstractmethod
    def num_rows(cls, settings: Any, batch_size: int, left: int) -> int:
        """Return how many rows of a batch it takes, 0 to leave it out; `left` are those that others have not taken."""

    @classmethod
    def begins(cls, settings: Any) -> float:
        """Return the share of the training, in [0, 1), after which it takes its rows; the others have them before."""
        return 0.0

    @classmethod
    def in_words(cls, settings: Any) -> str:
        """Return what a model card says of it; "" for nothing."""
        return ""

    @classmethod
    def follows_length(cls, settings: Any) -> bool:
        """Return whether what it does depends on how long the training is."""
        return cls.begins(settings) > 0

    @classmethod
    def is_map(cls, settings: Any) -> bool:
        """Return whether its rows start at any level, so that the student draws in several steps too."""
        return False

    @classmethod
    def cost(cls, settings: Any, batch_size: int) -> Cost:
        """Return what it costs besides the student's own training."""
        return Cost()

    @classmethod
    def learning_rate(cls, settings: Any, network: str) -> float | None:
        """Return the peak learning rate of one of its networks; None for the student's."""
        return None

    @classmethod
    def adam_beta1(cls, settings: Any, network: str) -> float | None:
        """Return AdamW's beta 1 for one of its networks; None for the student's."""
        return None

    @classmethod
    def check(cls, settings: Any, teacher: Teacher) -> None:
        """Raise SettingError if its settings do not fit the teacher, guided as the run says; before any work."""
        return None

    def prepare(self) -> Generator[int, None, None]:
        """Make its pool before the first step; yield how many items came each time.

        Whoever iterates may close the iterator between two items, when the run is to stop: what is made is kept then.
        """
        yield from ()

    @abstractmethod
    def batch(self, num: int) -> Batch:
        """Return `num` rows; every random number is drawn from the context's generator."""

    def state(self) -> dict[str, float]:
        """Return what changes besides its networks: numbers that every checkpoint holds and that are logged."""
        return {}

    def restore(self, state: dict[str, float]) -> None:
        """Go on from what `state` gave."""
        return None

    def own_loss(self, batch: Batch, y: Tensor) -> Tensor | None:
        """Return a loss of its networks, given the student's predictions for its rows, without gradient."""
        return None
