"""A pool of teacher trajectories: drawn from, written while it is made, and read again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from onestill.core.reading import loading
from onestill.core.writing import writing

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

    from onestill.core.tensors import Cond

STOPS = 2
"""How many states on the way of a trajectory are kept of each."""


@dataclass(frozen=True)
class Pool:
    """Teacher trajectories: their two ends, and stops on the way if any are kept.

    Attributes:
        eps: Noise, [N, *sample_shape].
        signal: The teacher's signal at t_min from that noise, [N, *sample_shape].
        chosen: Which conditions, N rows each: choices, since what the networks are given may be far larger.
        path: If anything on the way is kept, "stops", falling times [N, S] float64, and "states" there, [N, S, ...].
    """

    eps: Tensor
    signal: Tensor
    chosen: Cond
    path: Mapping[str, Tensor] = field(default_factory=dict)

    def hash(self, identity: Mapping[str, object]) -> str:
        """Return a hash of what it was made with, a dash, and a hash of all of it."""
        from onestill.core.files import hash_of

        made_with = hash_of({}, {"made_with": json.dumps(identity, sort_keys=True)})
        return f"{made_with[:16]}-{hash_of(self.tensors(), {})}"

    def fits(self, most: int, shape: tuple[int, ...]) -> bool:
        """Return whether these are at most so many anchors, all parts alike, of samples of this shape."""
        parts, num = self.tensors(), len(self.eps)
        alike = all(len(value) == num for value in parts.values())
        on_the_way = {name: tuple(value.shape) for name, value in self.path.items()}
        expected = {"stops": (num, STOPS), "states": (num, STOPS, *shape)} if self.path else {}
        return num <= most and alike and self.eps.shape == self.signal.shape == (num, *shape) and on_the_way == expected

    def tensors(self) -> dict[str, Tensor]:
        """Return all of it, by the names in its file."""
        chosen = {f"chosen.{name}": value.contiguous() for name, value in self.chosen.items()}
        return {"eps": self.eps, "signal": self.signal, **self.path, **chosen}

    def draw(self, num: int, generator: torch.Generator) -> Pool:
        """Return `num` anchors of the pool, with replacement."""
        import torch

        rows = torch.randint(len(self.eps), (num,), generator=generator)
        chosen, path = ({name: value[rows] for name, value in part.items()} for part in (self.chosen, self.path))
        return Pool(self.eps[rows], self.signal[rows], chosen, path)


def joined(batches: list[Pool]) -> Pool:
    """Return batches of anchors as one pool."""
    import torch

    first = batches[0]
    if len(batches) == 1:
        return first
    eps, signal = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("eps", "signal"))
    chosen = {name: torch.cat([batch.chosen[name] for batch in batches]) for name in first.chosen}
    return Pool(eps, signal, chosen, {name: torch.cat([batch.path[name] for batch in batches]) for name in first.path})


def write_pool(pool: Pool, generator: torch.Generator, path: Path, identity: Mapping[str, object]) -> None:
    """Write a pool, whole or its first batches, with the generator as the last batch left it, in one rename."""
    from onestill.core.files import save_hashed

    partial, said = path.with_suffix(".partial"), {"made_with": json.dumps(identity, sort_keys=True)}
    try:
        with writing(path):
            save_hashed({**pool.tensors(), "generator": generator.get_state()}, partial, said)
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_pool(path: Path, identity: Mapping[str, object], generator: torch.Generator) -> Pool | None:
    """Return the pool in a file, or None if none of this identity is there; the generator goes on where it ended.

    Raises:
        ValueError: If the file is not what was written.
    """
    from onestill.core.files import read_hashed

    if not path.exists():
        return None
    tensors, said = read_hashed(path)
    if said.get("made_with") != json.dumps(identity, sort_keys=True):
        return None
    with loading(str(path)):
        generator.set_state(tensors["generator"])
        chosen = {name.removeprefix("chosen."): value for name, value in tensors.items() if name.startswith("chosen.")}
        on_the_way: Cond = {name: tensors[name] for name in ("stops", "states") if name in tensors}
        return Pool(tensors["eps"], tensors["signal"], chosen, on_the_way)
