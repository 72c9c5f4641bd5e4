"""Power-function averages of the weights of a training, and averages of other widths from a few of their snapshots.

The width of an average is the standard deviation, over time, of what it is an average of, in lengths of the training so
far: docs/method.md, (33). A run writes its averages every so often to `averages/`, hashed, each file whole or not there.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor, nn

from onestill.core.errors import FoundWarning, SettingError
from onestill.core.files import read_hashed, save_hashed
from onestill.core.reading import loading
from onestill.core.settings import MOST_WIDTH
from onestill.core.writing import written
from onestill.training.checkpoint import Checkpoint, Tensors
from onestill.training.config import LEAST_WIDTH, DistillConfig

FOLDER: Final = "averages"
LARGEST_ERROR: Final = 0.01
"""The largest expected error of an average that is rebuilt, of its own distance from the first weights."""
STEP: Final = 0.005
"""Between the widths that are tried for the range that can be reached."""


def exponent(width: float) -> float:
    """Return gamma of the power-function average of a relative width, by (33); 0 is the plain mean."""
    square = width**2
    roots = np.roots([square, 7 * square, 16 * square - 1, 12 * square - 1])
    return float(max(roots.real[np.abs(roots.imag) < 1e-9]))


class PowerAverage(EMAModel):  # type: ignore[misc]  # diffusers has no types
    """A running average with beta_n = (1 - 1/n)^(gamma + 1), (33): the n-th update weighs as the power gamma of its time.

    Args:
        parameters: What is averaged.
        width: Its relative width.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], width: float) -> None:
        super().__init__(parameters, foreach=True)
        self.gamma = exponent(width)

    def get_decay(self, optimization_step: int) -> float:
        """Return beta_n of update n, from 1; the first one copies."""
        return float((1 - 1 / optimization_step) ** (self.gamma + 1))


@dataclass(frozen=True)
class Profile:
    """Which average: its relative width, and the number n of updates in it."""

    width: float
    num: int


def combination(found: Sequence[Profile], wanted: Profile) -> tuple[list[float], float]:
    """Return (c, error): the average `wanted` is nearest to sum_i c_i of the averages `found`, by (34).

    The error is what is to be expected if the weights walk at random, over the distance of the wanted average from the
    first weights.
    """
    gammas = np.array([exponent(profile.width) for profile in [*found, wanted]])
    nums = np.array([float(profile.num) for profile in [*found, wanted]])
    products = _products(gammas, nums)
    gram, right, square = products[:-1, :-1], products[:-1, -1], products[-1, -1]
    scale = np.sqrt(np.diag(gram))
    # With a multiplier for sum_i c_i = 1: what the weights have in common stays as it is.
    system = np.zeros((len(scale) + 1, len(scale) + 1))
    system[:-1, :-1] = gram / scale[:, None] / scale
    system[-1, :-1] = system[:-1, -1] = 1 / scale
    c = np.linalg.lstsq(system, np.append(right / scale, 1.0), rcond=1e-13)[0][:-1] / scale
    error = max(0.0, float(square - 2 * c @ right + c @ gram @ c)) / float(square)
    return [float(each) for each in c], error**0.5


def _products(gammas: NDArray[np.float64], nums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the inner products of (34), of all pairs."""
    a, least = gammas + 1, np.minimum(nums[:, None], nums)
    x = (least / nums[:, None]) ** a[:, None]
    y = x.T
    mixed = a[:, None] + a + 1
    result: NDArray[np.float64] = least * (1 - x / (a[:, None] + 1) - y / (a + 1) + x * y / mixed)
    return result


def reach(found: Sequence[Profile], near: Profile) -> tuple[float, float]:
    """Return the narrowest and the widest average, from `near` on, that can be rebuilt well of as many updates."""

    def is_good(width: float) -> bool:
        return LEAST_WIDTH <= width <= MOST_WIDTH and combination(found, Profile(width, near.num))[1] <= LARGEST_ERROR

    low = high = near.width
    while is_good(low - STEP):
        low -= STEP
    while is_good(high + STEP):
        high += STEP
    return low, high


@dataclass(frozen=True)
class Tracks:
    """The averages of a training at one moment, by name: widths, tensors by name, and how many updates are in them."""

    widths: Mapping[str, float]
    tensors: Mapping[str, Tensors]
    num: int

    def at(self, width: float, output_dir: Path, step: int) -> Tensors:
        """Return the average of a width at this moment, with the help of the run's snapshots up to `step`, (34).

        Raises:
            SettingError: If they do not reach so far; names the range that they reach.
            ValueError: If a snapshot is not what was written.
        """
        for name, own in self.widths.items():
            if own == width:
                return self.tensors[name]
        now = {name: Profile(each, self.num) for name, each in self.widths.items()}
        files = {path: _profiles(path) for path in _snapshots(output_dir) if _step_of(path) <= step}
        profiles = [profile for each in (*files.values(), now) for profile in each.values()]
        if not self.num:
            raise SettingError("ema_width", width, "cannot be had: there is no average", "give 0, the last weights")
        _check_reach(width, profiles, Profile(self.widths["ema"], self.num))
        c, _ = combination(profiles, Profile(width, self.num))
        sums: dict[str, Tensor] = {}
        for path, held in files.items():
            found = read_hashed(path)[0]
            for average in held:
                _add(sums, _group(found, average), c.pop(0))
        for average in now:
            _add(sums, self.tensors[average], c.pop(0))
        return {name: total.to(self.tensors["ema"][name].dtype) for name, total in sums.items()}


def _check_reach(width: float, profiles: Sequence[Profile], own: Profile) -> None:
    """Raise SettingError if a width cannot be rebuilt from averages, of which `own` is the last of the run's own."""
    if combination(profiles, Profile(width, own.num))[1] > LARGEST_ERROR:
        low, high = reach(profiles, own)
        found = f"one between {low:.3g} and {high:.3g}" if low < high else f"{low:.3g}"
        why = "cannot be rebuilt from the averages that the run keeps"
        raise SettingError("ema_width", width, why, f"give {found}, or 0 for the weights themselves")


def _add(sums: dict[str, Tensor], part: Tensors, c: float) -> None:
    """Add c times some tensors to sums in float64 on the CPU."""
    for name, value in part.items():
        term = c * value.detach().to("cpu", torch.float64)
        sums[name] = sums[name].add_(term) if name in sums else term


def weights_of(output_dir: Path, checkpoint: Checkpoint, width: float | None = None) -> Tensors:
    """Return the student's weights in a checkpoint of the run in a folder: their average of a relative width.

    None is what the run exports, 0 the weights themselves. Raises as `Tracks.at`.
    """
    values, tensors = checkpoint.values, checkpoint.tensors
    if width is None:
        width = values["ema_width"]
    if not width:
        return tensors["student"]
    of_student = values["trained"]["student"]
    widths, num = of_student["widths"], of_student["averages"].get("ema", 0)
    kept = {name: tensors[f"student-{name}"] for name in widths}
    return Tracks(widths, kept, num).at(width, output_dir, values["progress"]["step"])


def write_snapshot(output_dir: Path, step: int, tracks: Tracks) -> None:
    """Keep the averages after a step in the run's folder, whole or not at all; nothing before the first update."""
    if not tracks.num:
        return
    tensors = {
        f"{average}/{name}": value.detach().cpu().contiguous()
        for average, found in tracks.tensors.items()
        for name, value in found.items()
    }
    said = {"num": str(tracks.num), **{name: repr(width) for name, width in tracks.widths.items()}}
    with written(output_dir / FOLDER / f"step-{step:09d}.safetensors") as partial:
        save_hashed(tensors, partial, said)


def forget_after(output_dir: Path, step: int) -> None:
    """Remove snapshots of later steps, which come again, and with a warning those that are not what was written."""
    for path in _snapshots(output_dir):
        try:
            if _step_of(path) <= step:
                read_hashed(path)
                continue
        except ValueError as error:
            warnings.warn(f"{error}: other averages are rebuilt without it", FoundWarning, stacklevel=3)
        path.unlink()


def _snapshots(output_dir: Path) -> list[Path]:
    return sorted((output_dir / FOLDER).glob("step-*.safetensors"))


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _profiles(path: Path) -> dict[str, Profile]:
    """Return which averages a snapshot holds, by name."""
    with loading(str(path)), safe_open(path, framework="pt") as file:
        said = file.metadata() or {}
        names = dict.fromkeys(name.split("/")[0] for name in file.keys())  # noqa: SIM118 - not a dictionary
        return {name: Profile(float(said[name]), int(said["num"])) for name in names}


def _group(tensors: Tensors, average: str) -> Tensors:
    return {name.split("/", 1)[1]: value for name, value in tensors.items() if name.startswith(f"{average}/")}


def snapshot_steps(config: DistillConfig) -> tuple[int, ...]:
    """Return the steps after which a run keeps its averages beside its checkpoints, evenly over it but for its end."""
    num, steps = config.num_ema_snapshots if config.ema_tracks else 0, config.max_train_steps
    found = {round(i * steps / (num + 1)) for i in range(1, num + 1)}
    return tuple(sorted(step for step in found if 0 < step < steps))


def check_widths(config: DistillConfig) -> None:
    """Raise SettingError if a run will not reach one of the several widths that it is to choose from."""
    own, *others = config.ema_width
    end = Profile(own, config.max_train_steps)
    profiles = [Profile(width, n) for n in (*snapshot_steps(config), end.num) for width in config.ema_tracks]
    for width in others:
        _check_reach(width, profiles, end)
