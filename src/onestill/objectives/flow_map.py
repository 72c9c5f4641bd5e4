"""The flow map: the student as a map between any two levels of one trajectory, eqs. (21)-(23).

Rows of eq. (10) start at noise and learn where its trajectory passes. These start at any level t and end at any r <= t,
so that the same network makes pictures in 1, 2, 4, ... steps: state by state, eq. (21). Their targets need no derivative
and no second network: a step of the teacher at one end of the way, and the student's own map for the rest of it. At the
clean end the step is that of eq. (10) with the start level t (Lagrangian), at the noisy one that of eq. (22) (Eulerian).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import model_validator

from onestill.core.errors import SettingError, named
from onestill.core.settings import Settings, setting
from onestill.objectives.anchors import AnchorSettings
from onestill.objectives.base import Batch, Cost, Objective
from onestill.objectives.boot import BOOTSTRAP, OBJECTIVE, BootSettings, bounded_sigma

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from onestill.core.tensors import Cond
    from onestill.diffusion.trajectory import Denoiser, Trajectory

    Step = Callable[..., Tensor]
    Map = Callable[[Tensor, Tensor, Tensor], Tensor]

States = Literal["student", "path", "anchors"]
Identity = Literal["mixed", "lagrangian", "eulerian"]


class FlowMapSettings(Settings):
    """Rows that start at any level."""

    flow_map_fraction: float = setting(
        0.0,
        OBJECTIVE,
        "Share of the batch that starts at any level, for students of several steps; 0 is none.",
        ge=0,
        le=1,
    )
    flow_map_diagonal: float = setting(
        0.5, OBJECTIVE, "Share of those that end where they start: regression on the teacher.", ge=0, le=1
    )
    flow_map_to_end: float = setting(
        0.25, OBJECTIVE, "Share of those that end at t_min; what is left ends in between.", ge=0, le=1
    )
    flow_map_delta: float = setting(1 / 25, OBJECTIVE, "Size in t of the teacher's step in their targets.", gt=0, lt=1)
    flow_map_states: States | None = setting(
        None,
        OBJECTIVE,
        "What they start from: the student's picture with noise, the student's own path, or anchors with noise; anchors "
        "if there are any, else the student's picture if not given.",
    )
    flow_map_identity: Identity = setting(
        "mixed",
        OBJECTIVE,
        "Where the teacher steps: at the clean end, at the noisy one, or at the clean one of those to t_min only.",
    )
    flow_map_weight: float = setting(1.0, OBJECTIVE, "Factor on the weight of those rows.", gt=0, le=1e6)

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        shares = {name: getattr(self, name) for name in ("flow_map_diagonal", "flow_map_to_end")}
        if sum(shares.values()) > 1:
            raise SettingError(list(shares), list(shares.values()), "are more than all of the rows")
        return self


class _Read(FlowMapSettings, AnchorSettings, BootSettings):
    """What flow-map rows read: their targets are made by the solver of the bootstrap."""


class FlowMap(Objective[_Read]):
    """Rows from x_t to r in the mean of the bootstrap: first those with r = t, then Lagrangian, then Eulerian ones."""

    name = "flow_map"
    Settings = FlowMapSettings

    @classmethod
    def num_rows(cls, settings: Any, batch_size: int, left: int) -> int:
        return max(1, round(settings.flow_map_fraction * batch_size)) if settings.flow_map_fraction > 0 else 0

    @classmethod
    def is_map(cls, settings: Any) -> bool:
        return bool(settings.flow_map_fraction > 0)

    @classmethod
    def in_words(cls, settings: Any) -> str:
        return f"a flow map on {settings.flow_map_fraction:.0%} of the rows, delta {settings.flow_map_delta:g}"

    @classmethod
    def cost(cls, settings: Any, batch_size: int) -> Cost:
        from onestill.diffusion.trajectory import CALLS_PER_STEP

        moving = 1 - settings.flow_map_diagonal
        teacher = settings.flow_map_diagonal + moving * CALLS_PER_STEP[settings.solver]
        return Cost(student=moving + (states_of(settings) != "anchors"), teacher=teacher)

    def batch(self, num: int) -> Batch:
        import torch

        from onestill.diffusion.trajectory import STEPS

        context, settings = self.context, self.settings
        generator, trajectory = context.generator, context.teacher.spec.trajectory
        u = torch.rand(2, num, generator=generator, dtype=torch.float64)
        place = (torch.arange(num) + torch.rand(1, generator=generator, dtype=torch.float64)) / num
        same = int((place < settings.flow_map_diagonal).sum())
        to_end = place < settings.flow_map_diagonal + settings.flow_map_to_end
        t, m, r = draw_levels(u, to_end, settings.flow_map_delta, settings.t_min, trajectory)
        last = {"eulerian": same, "mixed": int(to_end.sum()), "lagrangian": num}[settings.flow_map_identity]
        m[same:last] = torch.minimum(r + settings.flow_map_delta, t)[same:last]
        m[:same] = r[:same] = t[:same]
        with torch.no_grad(), context.autocast():
            x_t, cond = self._states(num, t)
            found, step = [], STEPS[settings.solver]
            for target, rows in (on_the_spot, (0, same)), (lagrangian, (same, last)), (eulerian, (last, num)):
                part = slice(*rows)
                some = {name: value[part] for name, value in cond.items()}
                student = lambda *levels, some=some: context.target_student(*levels, some)  # noqa: E731 - short
                if rows[0] < rows[1]:
                    levels = x_t[part], t[part], m[part], r[part]
                    found.append(target(step, trajectory, context.teacher.denoiser(some), student, *levels))
        share = step_share(trajectory, t, m, r)
        share[same:last] = trajectory.rho(m, r, t)[same:last]
        noisy = torch.where(torch.arange(num) < last, m, t)  # the noisy end of the teacher's step
        weights = settings.flow_map_weight / (share * bounded_sigma(trajectory, noisy) * bounded_sigma(trajectory, t))
        mean = torch.full((num,), BOOTSTRAP)
        return Batch(x_t, r, cond, torch.cat(found), weights.float(), mean, r=t, share=share)

    def _states(self, num: int, t: Tensor) -> tuple[Tensor, Cond]:
        """Return (states at the levels t, conditions) of new rows: alpha x + sigma n of a picture x, or on a path."""
        import torch

        from onestill.core.tensors import broadcast, to_device

        context, states, spec = self.context, states_of(self.settings), self.context.teacher.spec
        if states == "anchors":
            drawn = context.pools["anchors"].draw(num, context.generator)
            cond = to_device(context.conditions.rows(drawn.chosen), context.device)
            x_a, picture = spec.trajectory.start(drawn.eps.to(context.device)), drawn.signal.to(context.device)
        else:
            x_a, cond = context.draw(num)
            to = t if states == "path" else torch.full_like(t, self.settings.t_min)
            picture = context.target_student(x_a, None, to, cond)
        if states == "path":
            return spec.trajectory.state(picture, x_a, t), cond
        noise = torch.randn(num, *spec.sample_shape, generator=context.generator).to(picture)
        alpha, sigma = (broadcast(level, picture) for level in spec.process.alpha_sigma(t))
        return torch.where(broadcast(t >= spec.t_max, x_a).bool(), x_a, alpha * picture + sigma * noise), cond


def draw_levels(
    u: Tensor, to_end: Tensor, delta: float, t_min: float, trajectory: Trajectory
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (t, t', r): start levels, ends of the teacher's steps, targets; r <= t' < t, [B] float64.

    t ~ U[t_min + delta, t_max + delta] cut at t_max, so that the noise itself has rows as every other start. r is t_min
    where `to_end`, else r ~ U[t_min, t]. t' = max(t - delta, r), and r where the network has not been trained at that.
    `u` are uniform numbers in [0, 1), [2, B] float64.
    """
    import torch

    low = t_min + delta
    t = (low + u[0] * (trajectory.t_max - t_min)).clamp(max=trajectory.t_max)
    r = torch.where(to_end, t_min, t_min + u[1] * (t - t_min))
    m = torch.maximum(t - delta, r)
    return t, torch.where(m < trajectory.process.t_min, r, m), r


def on_the_spot(
    _step: Step,
    _trajectory: Trajectory,
    denoised: Denoiser,
    _student: Map,
    x_t: Tensor,
    t: Tensor,
    _m: Tensor,
    _r: Tensor,
) -> Tensor:
    """Return f(x_t, t), the target of rows with r = t."""
    return denoised(x_t, t)


def lagrangian(
    step: Step, trajectory: Trajectory, denoised: Denoiser, student: Map, x_t: Tensor, t: Tensor, m: Tensor, r: Tensor
) -> Tensor:
    """Return sg[y_m + rho (mean of f - y_m)], y_m = y(x_t, t, m), the right side of eq. (10) with a = t; r < m <= t."""
    import torch

    with torch.no_grad():
        return step(trajectory, denoised, x_t, student(x_t, t, m), m, r, t)


def eulerian(
    step: Step, trajectory: Trajectory, denoised: Denoiser, student: Map, x_t: Tensor, t: Tensor, m: Tensor, r: Tensor
) -> Tensor:
    """Return sg[(1 - rho') y(x_t', t', r) + rho' mean of f], the right side of eq. (22), [B, ...].

    It is a step (7) from t' to r on the signal that begins at t, with the student's own mean over [w_t', w_r] in the
    place of the teacher's. `t` > `m` = t' >= `r`, [B] float64; x_t, [B, ...]; `student` (x_r, r, s) -> y_s.
    """
    import torch

    from onestill.core.tensors import broadcast

    with torch.no_grad():
        mean = step(trajectory, denoised, x_t, torch.zeros_like(x_t), t, m, t)
        ahead = m > r
        # Where the teacher's step ends at r nothing is left to ask, and r = 0 is no level to start from.
        is_ahead, start = broadcast(ahead, mean).bool(), torch.where(ahead, m, t)
        x_m = torch.where(is_ahead, trajectory.state(mean, x_t, m, t), x_t)
        left = torch.where(is_ahead, student(x_m, start, r), mean)
        return mean + broadcast(trajectory.rho(start, r, t), mean) * (left - mean)


def step_share(trajectory: Trajectory, t: Tensor, m: Tensor, r: Tensor) -> Tensor:
    """Return c(t, t') / c(t, r), [B] float64 in (0, 1], eq. (23): 1 where r = t' or r = t.

    c(t, s) = alpha_s - alpha_t sigma_s / sigma_t. It is rho' sigma_t' / sigma_r, so a residual of eq. (22) over it is an
    error of f, as one of eq. (10) over rho; unlike rho' it is not 0 at r = 0.
    """
    import torch

    alpha, sigma = trajectory.process.alpha_sigma(t)
    step, whole = (a - alpha * s / sigma for a, s in map(trajectory.process.alpha_sigma, (m, r)))
    return torch.where(m > r, step / whole, torch.ones_like(step))


def states_of(settings: Any) -> States:
    """Return what flow-map rows start from: what is named, else anchors where there are any."""
    named_ones: States | None = settings.flow_map_states
    return named_ones or ("anchors" if settings.anchor_fraction > 0 else "student")


def check_flow_map(config: Any) -> None:
    """Raise SettingError if flow-map rows ask for what the rest of a configuration does not give."""
    if config.flow_map_fraction > 0 and config.flow_map_states == "anchors" and config.anchor_fraction == 0:
        raise SettingError("flow_map_states", "anchors", f"needs some: {named('anchor_fraction')} is 0")
