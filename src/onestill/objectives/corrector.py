"""The endpoint corrector: the student's own law is moved towards the teacher's, at every level of noise, eqs. (25)-(27).

A second network psi, the critic, learns to denoise what the student draws. Where it and the teacher differ on one noisy
picture, the two laws do: that difference is the gradient of their KL divergence (variational score distillation, Wang
et al. 2305.16213; one-step students, Luo et al. 2305.18455, Yin et al. 2311.18828). No data is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import model_validator

from onestill.core.errors import SettingError, named
from onestill.core.settings import MOST_GUIDANCE, Settings, setting
from onestill.objectives.anchors import Anchors, AnchorSettings
from onestill.objectives.base import Batch, Context, Cost, Objective
from onestill.objectives.boot import OBJECTIVE, BootSettings, row_weights
from onestill.objectives.flow_map import FlowMap, FlowMapSettings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from onestill.core.tensors import Cond
    from onestill.teachers.base import Teacher
    from onestill.teachers.teacher_spec import TeacherSpec

Normalizer = Literal["dmd", "inverse_sigma", "none"]
CORRECTOR = 3  # its mean
FLOOR = 1e-5
MEMORY = 0.98
"""Share of the student's spread that is kept from one batch to the next: about 50 batches are looked at."""


class CorrectorSettings(Settings):
    """How many rows the corrector takes, since when, how strong it is, and how its critic is trained."""

    corrector_fraction: float = setting(
        0.25,
        OBJECTIVE,
        "Share of the batch that a second network, a critic of the student's pictures, corrects; 0 leaves both out.",
        ge=0,
        lt=1,
    )
    corrector_path_fraction: float = setting(
        0.5,
        OBJECTIVE,
        "Share of those rows that begin on the student's own way, where it is trained for several steps.",
        ge=0,
        le=1,
    )
    corrector_weight: float = setting(0.3, OBJECTIVE, "Weight of that correction.", gt=0, le=1e6)
    corrector_begin: float = setting(0.2, OBJECTIVE, "Share of the run before it begins.", ge=0, lt=1)
    corrector_warmup: float = setting(
        0.02, OBJECTIVE, "Share of the run after that in which only the critic learns.", ge=0, lt=1
    )
    corrector_normalizer: Normalizer = setting("dmd", OBJECTIVE, "What the correction is scaled by.")
    corrector_filter: bool = setting(
        False, OBJECTIVE, "Take out of the correction what cannot be told from the critic's own error."
    )
    corrector_level_min: float = setting(
        0.02, OBJECTIVE, "Least noise that pictures are compared at, and that rows begin at, in t / t_max.", gt=0, lt=1
    )
    corrector_level_max: float = setting(0.98, OBJECTIVE, "Most noise that they are compared at.", gt=0, le=1)
    corrector_min_spread: float = setting(
        0.9,
        OBJECTIVE,
        "Where the student's pictures of one condition differ by less than this share of what they did when the "
        "corrector began, it steps back; 0 lets it go on.",
        ge=0,
        lt=1,
    )
    corrector_learning_rate: float | None = setting(
        None, OBJECTIVE, "Peak learning rate of the critic; the student's if not given.", gt=0, le=10
    )
    corrector_adam_beta1: float = setting(0.0, OBJECTIVE, "AdamW beta 1 of the critic.", ge=0, lt=1)
    corrector_rows: int = setting(1, OBJECTIVE, "Rows of the critic for each row that is corrected.", ge=1, le=100)
    corrector_merge: float = setting(
        0.0, OBJECTIVE, "Share of the student's weights that the critic takes over in each step.", ge=0, lt=1
    )
    corrector_guidance_scale: float | None = setting(
        None, OBJECTIVE, "w of the teacher that the corrector asks; the run's if not given.", ge=0, le=MOST_GUIDANCE
    )
    corrector_guidance_interval_min: float | None = setting(
        None, OBJECTIVE, "It guides at levels t above this only; the run's if neither is given ...", ge=0, lt=1
    )
    corrector_guidance_interval_max: float | None = setting(None, OBJECTIVE, "... and up to this.", gt=0, le=1)

    @property
    def corrector_guidance_interval(self) -> tuple[float, float] | None:
        """(low, high): the corrector's teacher is guided where low < t <= high; None if nothing is said."""
        low, high = self.corrector_guidance_interval_min, self.corrector_guidance_interval_max
        return None if low is high is None else (low or 0.0, 1.0 if high is None else high)

    @model_validator(mode="after")
    def _has_its_time_and_its_levels(self) -> Self:
        if self.corrector_fraction > 0 and self.corrector_begin + self.corrector_warmup >= 1:
            given = self.corrector_begin, self.corrector_warmup
            why = "together are all of the run, so nothing is ever corrected"
            raise SettingError(("corrector_begin", "corrector_warmup"), given, why, "lower one of them")
        levels = self.corrector_level_min, self.corrector_level_max
        for name, ends in {"level": levels, "guidance_interval": self.corrector_guidance_interval}.items():
            if ends is not None and ends[0] >= ends[1]:
                why = f"must be below {named(f'corrector_{name}_max')}, {ends[1]:g}"
                raise SettingError(f"corrector_{name}_min", ends[0], why)
        return self


class _Read(CorrectorSettings, FlowMapSettings, AnchorSettings, BootSettings):
    """What the corrector reads: its rows are weighted as those of the bootstrap, and begin where others do."""


class Corrector(Objective[_Read]):
    """Rows to t_min whose target is y - (beta / 2) D, eq. (26), in a mean of their own.

    They begin at noise x_a or, where the student draws in several steps, at its own state on the way.

    Every two rows share a condition: the student's spread is how far their pictures are apart.
    """

    name = "corrector"
    Settings = CorrectorSettings

    def __init__(self, context: Context) -> None:
        from onestill.core.tensors import laid_bare

        super().__init__(context)
        # The student before its first step is the teacher, eq. (12), and takes all that decides its law: a drawn
        # guidance scale too. Frozen weights stay shared.
        self.networks = {"psi": laid_bare(context.student.twin())}  # type: ignore[operator]  # a Student, which rooms above make
        self.teacher = teacher_of(self.settings, context.teacher)
        self._began: tuple[Tensor | float, int] = 0.0, 0  # sum and number of the spreads before the first correction
        self._spread: Tensor | float = 0.0

    @classmethod
    def num_rows(cls, settings: Any, batch_size: int, left: int) -> int:
        return 2 * max(1, round(settings.corrector_fraction * batch_size / 2)) if settings.corrector_fraction > 0 else 0

    @classmethod
    def begins(cls, settings: Any) -> float:
        return float(settings.corrector_begin)

    @classmethod
    def follows_length(cls, settings: Any) -> bool:
        return bool(settings.corrector_begin + settings.corrector_warmup > 0)

    @classmethod
    def in_words(cls, settings: Any) -> str:
        return f"a corrector on {settings.corrector_fraction:.0%} of the rows, weight {settings.corrector_weight:g}"

    @classmethod
    def cost(cls, settings: Any, batch_size: int) -> Cost:
        return Cost(student=1 + path_share(settings), teacher=1, learned=settings.corrector_rows, networks=1)

    @classmethod
    def learning_rate(cls, settings: Any, network: str) -> float | None:
        rate: float | None = settings.corrector_learning_rate
        return rate

    @classmethod
    def adam_beta1(cls, settings: Any, network: str) -> float | None:
        return float(settings.corrector_adam_beta1)

    @classmethod
    def check(cls, settings: Any, teacher: Teacher) -> None:
        scale, interval = settings.corrector_guidance_scale, settings.corrector_guidance_interval
        ends = ("corrector_guidance_interval_min", "corrector_guidance_interval_max")
        if scale is not None and not teacher.can_guide and teacher.guidance_input is None:
            why = "needs a teacher with a null condition, and this one has none that is known"
            raise SettingError("corrector_guidance_scale", scale, why, "leave it out")
        if interval is None:
            return
        is_fixed = settings.guidance_range is None or scale is not None
        if is_fixed and (settings.guidance_scale if scale is None else scale) == 1:
            todo = f"give a {named('corrector_guidance_scale')} other than 1, or leave it out"
            raise SettingError(ends, interval, "says at which levels guidance acts, and w = 1 is none", todo)
        first, last = levels(settings, teacher.spec)
        if interval[0] >= last or interval[1] < first:
            why = f"holds none of the levels that the corrector looks at, {first:.3g} to {last:.3g}"
            raise SettingError(ends, interval, why)

    def state(self) -> dict[str, float]:
        return {"spread": float(self._spread), "spread_sum": float(self._began[0]), "spread_num": self._began[1]}

    def restore(self, state: dict[str, float]) -> None:
        import torch

        total, self._spread = (
            torch.tensor(state[name], device=self.context.device) for name in ("spread_sum", "spread")
        )
        self._began = total, int(state["spread_num"])

    def batch(self, num: int) -> Batch:
        import torch

        from onestill.core.tensors import float32_or_more, to_device

        context, settings = self.context, self.settings
        trajectory, generator = context.teacher.spec.trajectory, context.generator
        eps = torch.randn(num, *context.teacher.spec.sample_shape, generator=generator)
        chosen = context.conditions.choose(num // 2, generator)
        pairs = {name: value.repeat_interleave(2, 0) for name, value in chosen.items()}
        cond = to_device(context.conditions.rows(pairs), context.device)
        t = torch.full((num,), trajectory.t_max, dtype=torch.float64)
        s = torch.full((num,), settings.t_min, dtype=torch.float64)
        weights = row_weights(settings.bootstrap_weight, trajectory, t, s).float()
        x, r = trajectory.start(eps.to(context.device)), None
        if on_the_way := 2 * self._drawn_pairs(path_share(settings) * num / 2):
            first, last = levels(settings, context.teacher.spec)
            first, last, r = max(first, settings.t_min), max(last, settings.t_min), t.clone()
            r[:on_the_way] = first + (last - first) * torch.rand(on_the_way, generator=generator, dtype=torch.float64)
            some = {name: value[:on_the_way] for name, value in cond.items()}
            with torch.no_grad(), context.autocast():
                y_r = float32_or_more(context.student(x[:on_the_way], None, r[:on_the_way], some))
            x = torch.cat([trajectory.state(y_r, x[:on_the_way], r[:on_the_way]).to(x), x[on_the_way:]])

        def target(y: Tensor) -> Tensor:
            return self.target(y, cond)

        return Batch(x, s, cond, target, weights, torch.full((num,), CORRECTOR), r=r)

    def _drawn_pairs(self, wanted: float) -> int:
        """Return a whole number of pairs whose mean is `wanted`: the two of a pair begin alike."""
        import torch

        more = wanted % 1 > 0 and float(torch.rand(1, generator=self.context.generator)) < wanted % 1
        return int(wanted) + more

    def target(self, y: Tensor, cond: Cond) -> Tensor:
        """Return y - (beta / 2) D for predictions y [B, ...], y itself as long as only the critic learns."""
        from onestill.core.tensors import broadcast, float32_or_more

        context, settings = self.context, self.settings
        y, spec = float32_or_more(y), context.teacher.spec
        strength = self._look(spread(y))
        if strength is None:
            return y
        r, x_r = self._noised(y)
        learned = float32_or_more(self.networks["psi"](x_r, r, r, cond))
        if settings.corrector_guidance_scale is not None:
            cond = {name: value for name, value in cond.items() if name != "guidance_scale"}
        given = self.teacher.denoised(x_r, r, cond)
        found = correction(y, learned, given, filtered=settings.corrector_filter)
        scale = factor(settings.corrector_normalizer, spec, r, y, given)
        return y - 0.5 * settings.corrector_weight * strength * broadcast(scale, y) * found

    def own_loss(self, batch: Batch, y: Tensor) -> Tensor:
        """Return the critic's loss, eq. (27): its mean squared error in the units of the network's own output."""
        import torch

        from onestill.core.tensors import float32_or_more

        num, psi = self.settings.corrector_rows, self.networks["psi"]
        if self.settings.corrector_merge > 0:
            merge(psi, self.context.student, self.settings.corrector_merge)
        y = float32_or_more(y).repeat(num, *[1] * (y.ndim - 1))
        cond = {name: torch.cat([value] * num) for name, value in batch.cond.items()}
        r, x_r = self._noised(y)
        errors = (float32_or_more(psi(x_r, r, r, cond)) - y).square().flatten(1).mean(1)
        return (output_weights(self.context.teacher.spec, r).to(errors) * errors).mean()

    def _noised(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return (levels r [B] float64, alpha_r y + sigma_r n), r uniform in t, with new noise n."""
        import torch

        from onestill.core.tensors import broadcast

        context, settings, spec = self.context, self.settings, self.context.teacher.spec
        low, high = levels(settings, spec)
        r = low + (high - low) * torch.rand(len(y), generator=context.generator, dtype=torch.float64)
        n = torch.randn(y.shape, generator=context.generator).to(y)
        alpha, sigma = (broadcast(level, y) for level in spec.process.alpha_sigma(r))
        return r, alpha * y + sigma * n

    def _look(self, now: Tensor) -> Tensor | None:
        """Take the spread of a batch in; return the strength of its correction, in [0, 1], None if there is none yet."""
        settings, (total, num) = self.settings, self._began
        self._spread = now if num == 0 else MEMORY * self._spread + (1 - MEMORY) * now
        if num == 0 or self.context.progress() < settings.corrector_begin + settings.corrector_warmup:
            self._began = total + now, num + 1
            return None
        least = settings.corrector_min_spread
        # All of it down to the least share, none of it as far below.
        return ((self._spread * num / (total + 1e-30) - least) / (1 - least) + 1).clamp(0, 1)


def path_share(settings: Any) -> float:
    """Return the share of the rows that begin on the student's way: none where it is not trained from there."""
    is_map = any(kind.is_map(settings) for kind in (Anchors, FlowMap))
    return float(settings.corrector_path_fraction if is_map else 0)


def levels(settings: Any, spec: TeacherSpec) -> tuple[float, float]:
    """Return the cleanest and the noisiest level t that pictures are compared at."""
    low, high = (spec.t_max * level for level in (settings.corrector_level_min, settings.corrector_level_max))
    return max(low, spec.process.t_min), high


def teacher_of(settings: Any, teacher: Teacher) -> Teacher:
    """Return the teacher of D: as guided as the run's, but at the scale and in the interval that are named."""
    from onestill.teachers.guidance import guided
    from onestill.teachers.teacher_spec import NO_THRESHOLD

    scale, interval = settings.corrector_guidance_scale, settings.corrector_guidance_interval
    if scale is None and interval is None:
        return teacher
    return guided(
        teacher,
        settings.guidance_scale if scale is None else scale,
        drawn=scale is None and settings.guidance_range is not None,
        threshold=getattr(teacher, "threshold", NO_THRESHOLD),
        interval=teacher.guidance_interval if interval is None and scale != 1 else interval,
    )


def spread(y: Tensor) -> Tensor:
    """Return the variance of pictures of one condition, from pairs of them [2 N, ...], mean over N and dimensions."""
    return (y[::2] - y[1::2]).square().mean() / 2


def correction(y: Tensor, learned: Tensor, given: Tensor, *, filtered: bool = False) -> Tensor:
    """Return D = f_psi - f, eq. (25), [B, ...], of the critic's prediction and the teacher's for one noisy picture y.

    `filtered` takes out D's component along f_psi - y: given x_r, the mean of that is the critic's own error.
    """
    found = learned - given
    if not filtered:
        return found
    error = (learned - y).flatten(1)
    share = (found.flatten(1) * error).sum(1) / error.square().sum(1).clamp(min=FLOOR**2)
    return found - (share[:, None] * error).view_as(found)


def factor(normalizer: Normalizer, spec: TeacherSpec, r: Tensor, y: Tensor, given: Tensor) -> Tensor:
    """Return what each row's D is multiplied by, [B]: 1 / mean |y - f| (DMD), 1 / sigma_r, or 1."""
    import torch

    if normalizer == "dmd":
        return 1 / (y - given).abs().flatten(1).mean(1).clamp(min=FLOOR)
    return 1 / spec.process.alpha_sigma(r)[1] if normalizer == "inverse_sigma" else torch.ones_like(r)


def output_weights(spec: TeacherSpec, r: Tensor) -> Tensor:
    """Return 1 / c_out^2 of eq. (3), [B] float64: an error of f in it is one of the network's own output."""
    from onestill.diffusion.prediction import preconditioning

    return preconditioning(spec.prediction_type, *spec.process.alpha_sigma(r), spec.sigma_data).c_out ** -2


def merge(psi: nn.Module, student: nn.Module, share: float) -> None:
    """Move the critic's trained weights by a share of the way to the student's, in place."""
    import torch

    with torch.no_grad():
        for own, other in zip(psi.parameters(), student.parameters(), strict=True):
            if own.requires_grad:
                own.lerp_(other, share)
