"""Small helpers on tensors and modules.

Times and the coefficients computed from them live on the CPU in float64 (they are one number per image);
`broadcast` brings them to the images only at the end, so no coefficient loses digits to the images' dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

P = ParamSpec("P")
R = TypeVar("R")

PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)

SELF_CHECK_TOLERANCE = 1e-4
"""The largest difference between what is computed here and what diffusers does of the same, in images of [-1, 1]."""

Cond = dict[str, Tensor]
"""What conditions an image: named tensors with the batch as first axis. Empty for unconditional teachers."""


def as_times(t: float | Tensor, num: int) -> Tensor:
    """Return `t` as a float64 CPU tensor of shape [num]."""
    times = torch.as_tensor(t, dtype=torch.float64, device="cpu").reshape(-1)
    if times.numel() not in (1, num):
        raise ValueError(f"{times.numel()} times were given for {num} images; give one, or one for each image")
    return times.expand(num)


def broadcast(values: Tensor, x: Tensor) -> Tensor:
    """Return `values` [B] as [B, 1, ..., 1] with the dtype and device of `x` [B, ...]."""
    return values.to(device=x.device, dtype=x.dtype).reshape(-1, *([1] * (x.ndim - 1)))


def float32_or_more(x: Tensor) -> Tensor:
    """Return `x` in float32, or untouched where it is float64: heads, losses and steps never run lower."""
    return x if x.dtype == torch.float64 else x.float()


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Return `function` running in full precision even inside somebody's autocast: for checks to 1e-4 and below."""

    @functools.wraps(function)
    def plain(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return plain


def noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Return standard normal noise [N, *shape], row i from its own generator seeded by seeds[i].

    Drawn on the CPU in float32, as diffusers draws for a list of CPU generators: the same seed is the same
    image here, there, on any device, and in any batch.
    """
    rows = [torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.cat(rows) if rows else torch.empty(0, *shape)


def to_device(cond: Cond, device: torch.device | str) -> Cond:
    """Return the conditions on `device`."""
    return {name: value.to(device) for name, value in cond.items()}


def row_bytes(cond: Cond) -> int:
    """Return the size of one row of conditions."""
    return sum(value[:1].numel() * value.element_size() for value in cond.values())


def num_parameters(module: nn.Module) -> int:
    """Return the number of scalar parameters of `module`."""
    return sum(p.numel() for p in module.parameters())


def bare(module: nn.Module) -> nn.Module:
    """Return the module inside what `torch.compile`, DataParallel and DistributedDataParallel put around one."""
    while True:
        inner = module.module if isinstance(module, PARALLEL) else vars(module)["_modules"].get("_orig_mod")
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def laid_bare(module: nn.Module) -> nn.Module:
    """Return `bare(module)`, changed in place: no part of it is wrapped either, so that all names are plain ones.

    What accelerate's `prepare` puts into the place of a `forward` goes too: it brings an autocast of its own.
    """
    module = bare(module)
    for part in module.modules():
        part._modules.update({name: bare(child) for name, child in part._modules.items() if child is not None})
        if vars(part).pop("_original_forward", None) is not None:
            vars(part).pop("forward", None)
    return module


def refuse_non_finite(module: nn.Module, name: str) -> None:
    """Raise ValueError naming the first of a module's tensors that holds non-finite numbers, if one does."""
    for key, value in module.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(f"the weights hold non-finite numbers (NaN or infinity): {key!r} of the {name}")
