"""The picture that a super-resolution network is given beside its noisy input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from onestill.core.tensors import Cond


@dataclass(frozen=True)
class ImageCondition:
    """A picture that the network is given beside its noisy input, as further channels; an earlier model draws it.

    Attributes:
        name: Name of the condition.
        kept: Names of all conditions that come with the picture: a guided step has them in both halves.
        channels: From the network's config to the number of noisy channels, which come first.
        example: From (pipeline, number of images) to some pictures in [-1, 1], [B, C, h, w].
        arguments: From (pictures, level) to the call's arguments that give them to the pipeline.
        rows: From (pipeline, pictures in [-1, 1], noise of the sample's shape, level) to the conditions in `kept`.
        num_levels: From the pipeline to the number of noise levels it knows.
        level: How much noise is mixed into the pictures.
        usual_factor: How many times larger than the picture the published networks' samples are.
    """

    name: str
    kept: tuple[str, ...]
    channels: Callable[[Any], int]
    example: Callable[[Any, int], Tensor]
    arguments: Callable[[Tensor, int], Mapping[str, Any]]
    rows: Callable[[Any, Tensor, Tensor, int], Cond]
    num_levels: Callable[[Any], int]
    level: int
    usual_factor: int
