"""Noise processes x_t = alpha_t x_0 + sigma_t eps.

t = 0 is clean and t = 1 is noise. A process gives alpha, sigma, the log-SNR and its inverse, the number the network
is handed for a time, and the level that a student of it starts from. Everything here is float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from onestill.core.arguments import Positive, checked
from onestill.core.errors import SettingError

EPSILON_MIN_ALPHA = 0.05
"""Smallest signal level at which a student of an epsilon network may start: x_0 is divided by it."""


class Process(ABC):
    """x_t = alpha_t x_0 + sigma_t eps for t in [0, 1], eq. (1) of docs/method.md.

    Subclasses return float64 tensors of the shape of `t`; alpha / sigma falls strictly with t, from infinity
    at t = 0 (sigma_0 = 0).
    """

    _made_by = "such as onestill.FlowMatching() or onestill.DiscreteVP(alphas_cumprod)"
    name: str
    t_min: float
    """The smallest time the network was trained at; below it, only the clean end t = 0 is meaningful."""

    @abstractmethod
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha_t, sigma_t)."""

    @abstractmethod
    def time_at_log_snr(self, log_snr: Tensor) -> Tensor:
        """Return the t at which log(alpha_t^2 / sigma_t^2) = log_snr."""

    @abstractmethod
    def net_time(self, t: Tensor) -> Tensor:
        """Return the number that the network takes for the time t."""

    def log_snr(self, t: Tensor) -> Tensor:
        """Return log(alpha_t^2 / sigma_t^2); +inf at t = 0 and -inf where alpha is 0."""
        alpha, sigma = self.alpha_sigma(t)
        return 2 * (alpha.log() - sigma.log())

    def level(self, t: float) -> tuple[float, float]:
        """Return (alpha_t, sigma_t) of one time as plain numbers."""
        alpha, sigma = self.alpha_sigma(torch.tensor([t], dtype=torch.float64))
        return float(alpha), float(sigma)

    def start_level(self, prediction_type: str) -> tuple[float, str]:
        """Return the start level t_max of a student, and the reason in a few words.

        x_0, v, velocity and EDM networks stay bounded at pure noise and start at t = 1. What an epsilon network says
        of x_0 is divided by alpha, so it starts at the noisiest time with alpha >= 0.05; ValueError if it cannot.
        """
        if prediction_type != "epsilon":
            return 1.0, f"{prediction_type} stays bounded at pure noise"
        alpha_end, _ = self.level(1.0)
        self._check_epsilon(alpha_end)
        if alpha_end >= EPSILON_MIN_ALPHA:
            return 1.0, f"alpha = {alpha_end:.3f} at t = 1 is large enough for an epsilon head"
        alpha = torch.tensor([EPSILON_MIN_ALPHA], dtype=torch.float64)
        t_max = float(self.time_at_log_snr(2 * (alpha / self._sigma_at(alpha)).log()))
        return t_max, f"the epsilon head divides by alpha: {alpha_end:.2g} at t = 1, {EPSILON_MIN_ALPHA} here"

    def check_start_level(self, prediction_type: str, t_max: float) -> None:
        """Raise SettingError if a start level is not in (t_min, 1], or is pure noise for an epsilon network."""
        if not self.t_min < t_max <= 1:
            raise SettingError("t_max", t_max, f"must be above {self.t_min:g} and at most 1")
        if prediction_type == "epsilon" and self.level(t_max)[0] == 0:
            why = "is pure noise, where an epsilon network says nothing of x_0"
            raise SettingError("t_max", t_max, why, "choose a smaller one")

    def _check_epsilon(self, alpha_end: float) -> None:
        """Raise ValueError if no student can be made of an epsilon network, where `alpha_end` is alpha at t = 1."""
        return None

    def _sigma_at(self, alpha: Tensor) -> Tensor:
        """Return the noise level where the signal level is `alpha`."""
        return (1 - alpha**2).sqrt()


class DiscreteVP(Process):
    """A variance-preserving process given by a scheduler's `alphas_cumprod`, continuous in time.

    Index i of N is the time (i + 1) / N, so the network's time is N t - 1, and DDIM with "trailing" spacing is
    a uniform grid in t. Between indices log(sigma / alpha) is linear in t. The two ends, where it is infinite,
    are linear in the ratio that is finite there: sigma / alpha below the first index, alpha / sigma above the
    last but one index when the terminal SNR is zero. Where the first index is clean (alpha = 1), it is the time 0
    itself: index i is the time i / (N - 1), and the network's time is (N - 1) t.

    Args:
        alphas_cumprod: alpha^2 at the N training times, in [0, 1], falling; ValueError if it is not. [N]
    """

    name = "vp"

    @checked()
    def __init__(self, alphas_cumprod: Tensor) -> None:
        squares = alphas_cumprod.detach().to(device="cpu", dtype=torch.float64)
        clean = _checked_levels(squares)
        squares = squares[clean:]
        self.last_clean = clean - 1
        """The index at t = 0, the last clean one; -1 where a schedule lists none."""
        self.num_cells = len(squares)
        self.t_min = 1 / self.num_cells
        # Knots of alpha and sigma; knot 0 is the clean end, which few schedulers store.
        self._alpha = torch.cat([torch.ones(1, dtype=torch.float64), squares.sqrt()])
        self._sigma = torch.cat([torch.zeros(1, dtype=torch.float64), (1 - squares).sqrt()])

    def time_of(self, index: float) -> float:
        """Return the time of an index of the scheduler's."""
        return (index - self.last_clean) / self.num_cells

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        place = t.to(torch.float64).clamp(0, 1) * self.num_cells
        low = place.floor().long().clamp(max=self.num_cells - 1)
        part = place - low
        a_0, a_1 = self._alpha[low], self._alpha[low + 1]
        s_0, s_1 = self._sigma[low], self._sigma[low + 1]
        # A pair (alpha, sigma) up to its norm, in each of the three kinds of cell.
        geometric = ((v_0.log() * (1 - part) + v_1.log() * part).exp() for v_0, v_1 in ((a_0, a_1), (s_0, s_1)))
        clean = (torch.ones_like(part), part * s_1 / a_1)
        noisy = ((1 - part) * a_0 / s_0, torch.ones_like(part))
        ends = zip(clean, noisy, geometric, strict=True)
        alpha, sigma = (torch.where(s_0 == 0, c, torch.where(a_1 == 0, n, g)) for c, n, g in ends)
        norm = torch.hypot(alpha, sigma)
        return alpha / norm, sigma / norm

    def time_at_log_snr(self, log_snr: Tensor) -> Tensor:
        log_ratio = -log_snr.to(torch.float64) / 2
        knots = self._sigma.log() - self._alpha.log()
        low = (torch.searchsorted(knots, log_ratio.contiguous(), right=True) - 1).clamp(0, self.num_cells - 1)
        k_0, k_1 = knots[low], knots[low + 1]
        geometric = (log_ratio - k_0) / (k_1 - k_0)
        clean = (log_ratio - k_1).exp()
        noisy = 1 - (k_0 - log_ratio).exp()
        part = torch.where(k_0.isinf(), clean, torch.where(k_1.isinf(), noisy, geometric))
        return ((low + part.clamp(0, 1)) / self.num_cells).clamp(0, 1)

    def net_time(self, t: Tensor) -> Tensor:
        return (t * self.num_cells + self.last_clean).clamp(min=0)

    def _check_epsilon(self, alpha_end: float) -> None:
        if alpha_end == 0:  # the output at the last step carries no image; continuous processes start earlier instead
            what = "an epsilon-prediction teacher with zero terminal SNR cannot be distilled"
            todo = "Use a teacher with v_prediction or sample prediction, or a schedule without rescale_betas_zero_snr"
            raise ValueError(f"{what}: at pure noise x_0 = (x - eps) / 0. {todo}")


def _checked_levels(squares: Tensor) -> int:
    """Return how many clean indices (alpha^2 = 1) a schedule begins with; ValueError, naming the index, if it is none."""
    what = "alphas_cumprod must be a one-dimensional falling sequence in [0, 1]"
    if squares.ndim != 1 or len(squares) < 2:
        raise ValueError(f"{what}; its shape is {list(squares.shape)}")
    shown = [f"{value:.9g}" for value in squares.tolist()]
    if len(outside := (~((squares >= 0) & (squares <= 1))).nonzero()):
        i = int(outside[0])
        raise ValueError(f"{what}: index {i} holds {shown[i]}. Mend the scheduler's betas, which must lie in [0, 1]")
    clean = int((squares == 1).long().cumprod(0).sum())
    rest = squares[clean:]
    if len(unfallen := (rest[1:] >= rest[:-1]).nonzero()):
        i = clean + int(unfallen[0])
        why, todo = f"index {i} holds {shown[i]} and index {i + 1} {shown[i + 1]}", "Mend the scheduler's betas"
        if squares[i] == squares[i + 1]:
            todo = f"Two times of one level cannot be told apart: give beta_{i + 1} a value above 6e-8, which float32 keeps"
        raise ValueError(f"{what}: {why}. {todo}")
    if len(rest) < 2 and not rest.any():
        raise ValueError(f"{what}: its {len(squares)} indices hold no level between the clean image and pure noise")
    return clean


class CosineVP(Process):
    """The continuous cosine process alpha = cos(pi t / 2), sigma = sin(pi t / 2); zero terminal SNR.

    The network's time is net_scale * t.
    """

    name = "cosine"
    t_min = 0.0

    @checked()
    def __init__(self, net_scale: float = 1.0) -> None:
        self.net_scale = net_scale

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = t.to(torch.float64) * (math.pi / 2)
        # sin of the complement is exactly 0 at t = 1, where cos(pi / 2) is 6e-17.
        return torch.sin(math.pi / 2 - angle), torch.sin(angle)

    def time_at_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.atan(torch.exp(-log_snr.to(torch.float64) / 2)) * (2 / math.pi)

    def net_time(self, t: Tensor) -> Tensor:
        return t * self.net_scale


class VE(Process):
    """The variance-exploding process of EDM (Karras et al., arXiv 2206.00364): alpha = 1, sigma on the rho-warp.

    sigma(t) = (sigma_min^(1/rho) + u (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho with u the position of t in
    [t_min, 1]; below t_min sigma falls linearly to 0, the clean end.

    Args:
        sigma_min: Noise level at t_min, in units of the data.
        sigma_max: Noise level at t = 1.
        rho: Exponent of the warp.
        time_input: What the network takes as its time: "log_sigma" is log(sigma) / 4, as EDM's raw network;
            "sigma" is sigma itself, as EDM's wrapped networks D(x; sigma).
    """

    name = "ve"
    t_min = 1e-3

    @checked()
    def __init__(
        self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: Positive = 7.0, time_input: str = "log_sigma"
    ) -> None:
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"need 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
        if time_input not in ("log_sigma", "sigma"):
            raise ValueError(f"time_input must be 'log_sigma' or 'sigma', got {time_input!r}")
        self.sigma_min, self.sigma_max, self.rho, self.time_input = sigma_min, sigma_max, rho, time_input
        self._low, self._high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.to(torch.float64)
        warped = (self._low + (t - self.t_min).clamp(min=0) / (1 - self.t_min) * (self._high - self._low)) ** self.rho
        return torch.ones_like(t), torch.where(t < self.t_min, t / self.t_min * self.sigma_min, warped)

    def time_at_log_snr(self, log_snr: Tensor) -> Tensor:
        sigma = torch.exp(-log_snr.to(torch.float64) / 2)
        place = (sigma ** (1 / self.rho) - self._low) / (self._high - self._low)
        warped = self.t_min + place * (1 - self.t_min)
        return torch.where(sigma < self.sigma_min, sigma / self.sigma_min * self.t_min, warped)

    def net_time(self, t: Tensor) -> Tensor:
        sigma = self.alpha_sigma(t)[1].clamp(min=self.sigma_min)
        return sigma if self.time_input == "sigma" else sigma.log() / 4

    def _check_epsilon(self, alpha_end: float) -> None:
        why = "its head multiplies every error by sigma, 80 and more at the start"
        todo = "Use prediction_type 'edm', or 'sample' for a wrapped network"
        what = "an epsilon-prediction network on a variance-exploding process cannot be distilled"
        raise ValueError(f"{what}: {why}. {todo}")


class LogSigmaVP(VE):
    """`VE` seen by a network of unit data, scaled to unit variance: alpha = 1 / sqrt(1 + s^2), sigma = s alpha.

    s is VE's sigma. So work networks in EDM's manner with sigma_data = 1 and v-prediction (CosXL): their input is
    x / sqrt(1 + s^2), their time log(s) / 4, and EDM's preconditioning is that of v-prediction here.
    """

    name = "log_sigma_vp"

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha = (1 + (ratio := super().alpha_sigma(t)[1]) ** 2).rsqrt()
        return alpha, ratio * alpha

    def net_time(self, t: Tensor) -> Tensor:
        return super().alpha_sigma(t)[1].clamp(min=self.sigma_min).log() / 4

    def _check_epsilon(self, alpha_end: float) -> None:
        return None


class FlowMatching(Process):
    """The linear path alpha = 1 - u, sigma = u with u = shift t / (1 + (shift - 1) t).

    Args:
        shift: Time shift as in diffusers' FlowMatchEulerDiscreteScheduler; 1 is none.
        net_scale: The network's time is net_offset + net_scale * u: 0 to 1000 as in diffusers, 0 to 1 with 1.
        net_offset: Its value at the clean end; with net_scale = -1 and net_offset = 1 it is 0 at noise and 1 at data.

    A network of prediction type "velocity" says eps - x_0 on it, whatever its time. One that was trained from noise to
    data says x_0 - eps: turn its sign too, by a module that returns its negative.
    """

    name = "flow"
    t_min = 0.0

    @checked()
    def __init__(self, shift: float = 1.0, net_scale: float = 1000.0, net_offset: float = 0.0) -> None:
        if shift <= 0:
            raise ValueError(f"shift must be positive, got {shift}")
        self.shift, self.net_scale, self.net_offset = shift, net_scale, net_offset

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.to(torch.float64)
        below = 1 + (self.shift - 1) * t
        return (1 - t) / below, self.shift * t / below

    def time_at_log_snr(self, log_snr: Tensor) -> Tensor:
        sigma = torch.sigmoid(-log_snr.to(torch.float64) / 2)
        return sigma / (self.shift - (self.shift - 1) * sigma)

    def net_time(self, t: Tensor) -> Tensor:
        return self.net_offset + self.net_scale * self.alpha_sigma(t)[1]

    def _sigma_at(self, alpha: Tensor) -> Tensor:
        return 1 - alpha
