"""The Inception network of the FID, its weights read from a file by path, as an extractor of 2048 features.

Its structure is InceptionV3's, with what the TensorFlow graph of 2015 that all FIDs are measured by does otherwise: average
pools that do not count the border, a maximum pool in the last block, 1008 classes, and its own way to resize.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional

from onestill.core.errors import SettingError
from onestill.core.reading import loading
from onestill.evaluation.features import check_range

SHA256: Final = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Of the usual file: the only pickle that is ever opened. Its first digits alone could be met by another file."""
USUAL_FILE: Final = f"pt_inception-2015-12-05-{SHA256[:8]}.pth"
SIDE, FEATURES, CLASSES = 299, 2048, 1008
_MOST_BYTES = 2**28
_BATCH = 32
"""Images in one call, whatever the batch of the samples: 299 x 299 in 64 channels each."""


class InceptionFeatures:
    """The last pool of the Inception network, [N, 2048], of pictures as they are stored: rounded to 8 bits.

    Attributes:
        name: The extractor's name in a protocol, with the beginning of the weights' SHA-256.
    """

    def __init__(self, network: Inception, name: str) -> None:
        self.network, self.name = network, name

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return features [N, 2048] of images [N, 1 or 3, H, W] in [-1, 1]; grey ones are repeated to 3 channels."""
        check_range(images)
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            found = list(images.shape)
            raise ValueError(f"{self.name} sees grey or RGB images, [N, 1 or 3, H, W], and was given {found}")
        weight = self.network.fc.weight
        stored = ((images.to(weight) + 1) * 127.5).round().clamp(0, 255).expand(-1, 3, -1, -1)
        return torch.cat([self.network((resized(part) - 128) / 128) for part in torch.split(stored, _BATCH)])

    @torch.no_grad()
    def class_logits(self, features: Tensor) -> Tensor:
        """Return logits [N, 1008] of features [N, 2048], without the bias, as the Inception Score is measured by."""
        return features @ self.network.fc.weight.to(features).T


def load_inception(path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> InceptionFeatures:
    """Return the extractor with the weights of the usual file, or of a safetensors of the same tensors.

    The usual file is opened only if its SHA-256 is the known one, and read as tensors alone. What a safetensors holds cannot
    be told to be the same: its own SHA-256 is in the extractor's name.

    Raises:
        SettingError: If there is no such file, it is another one, or it does not hold the network's weights.
    """
    file = Path(path)
    is_pickle = file.suffix.lower() != ".safetensors"
    content = _content(file)
    digest = hashlib.sha256(content).hexdigest()
    if is_pickle and digest != SHA256:
        why = f"has the SHA-256 {digest[:8]}..., which is not that of {USUAL_FILE} ({SHA256[:8]}...), and is not opened"
        raise SettingError("features_weights", file, why, "give that file, or a .safetensors of its tensors")
    try:
        with loading("it"):
            found = torch.load(io.BytesIO(content), "cpu", weights_only=True) if is_pickle else load(content)
    except ValueError as error:
        raise SettingError("features_weights", file, str(error).removeprefix("it ")) from None
    del content
    with torch.device("meta"):
        network = Inception()
    network.load_state_dict(_fit(found, network, file), assign=True)
    network.to(device).eval().requires_grad_(False)
    kind = f"weights {digest[:8]}" if is_pickle else f"safetensors {digest[:8]}, not checked against {SHA256[:8]}"
    return InceptionFeatures(network, f"the Inception network of the FID ({kind})")


def resized(images: Tensor, side: int = SIDE) -> Tensor:
    """Return images [N, C, H, W] as [N, C, side, side], as TensorFlow 1 does it: pixel i is taken at i H / side.

    Bilinear between the two pixels beside that place, the last one repeated; not antialiased.
    """
    for axis in (2, 3):
        size = images.shape[axis]
        place = torch.arange(side, dtype=torch.float64, device="cpu") * size / side
        low = place.floor().long()
        high, share = (low + 1).clamp(max=size - 1).to(images.device), (place - low).to(images)
        below, above = images.index_select(axis, low.to(images.device)), images.index_select(axis, high)
        images = torch.lerp(below, above, share.view(-1, 1) if axis == 2 else share)
    return images


def _content(file: Path) -> bytes:
    """Return what a file of weights holds."""
    if not file.is_file():
        why = "is a folder" if file.is_dir() else "no such file"
        raise SettingError("features_weights", file, why, f"give {USUAL_FILE}, or a .safetensors of its tensors")
    if (size := file.stat().st_size) > _MOST_BYTES:
        raise SettingError("features_weights", file, f"has {size:,} bytes; {USUAL_FILE} has fewer than 100 million")
    try:
        return file.read_bytes()
    except OSError as error:
        raise SettingError("features_weights", file, f"cannot be read: {error.strerror}") from None


def _fit(found: object, network: nn.Module, file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file in float32, as the network takes them; SettingError if they are others."""
    counts = ".num_batches_tracked"  # of no use here, and not in every file
    given = found if isinstance(found, Mapping) else {}
    tensors = {n: v for n, v in given.items() if isinstance(v, Tensor) and not str(n).endswith(counts)}
    wanted = {name: value.shape for name, value in network.state_dict().items() if not name.endswith(counts)}
    why = ""
    if missing := sorted(wanted.keys() - tensors.keys()):
        why = f"lacks {missing[0]} of the network's weights"
    elif other := sorted(map(str, tensors.keys() - wanted.keys())):
        why = f"holds {other[0][:80]!r}, which the network has not"
    elif odd := [name for name in wanted if tensors[name].shape != wanted[name]]:
        why = f"holds {odd[0]} of shape {list(tensors[odd[0]].shape)}, and the network's has {list(wanted[odd[0]])}"
    elif odd := [name for name in wanted if not tensors[name].isfinite().all()]:
        why = f"holds NaN or infinity in {odd[0]}"
    if why:
        raise SettingError("features_weights", file, why, f"give {USUAL_FILE}, or a .safetensors of its tensors")
    zeros = {name: torch.zeros((), dtype=torch.long) for name in network.state_dict() if name.endswith(counts)}
    return {name: value.float() for name, value in tensors.items()} | zeros


# The network. Names of its parts are those of the file.


class _Step(NamedTuple):
    """One convolution: the name of its part, channels out, kernel (height, width), stride; those of stride 2 have no border."""

    name: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padded: bool = True


class _Conv(nn.Module):
    """A convolution without bias, a batch normalisation and a ReLU."""

    def __init__(self, channels: int, step: _Step) -> None:
        super().__init__()
        height, width = step.kernel
        padding = (height // 2, width // 2) if step.stride == 1 and step.padded else (0, 0)
        self.conv = nn.Conv2d(channels, step.width, step.kernel, step.stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(step.width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)))


class _Mixed(nn.Module):
    """Branches beside each other, their outputs side by side, that of a pool last.

    Args:
        channels: Channels in.
        branches: Chains of convolutions; the last two of a chain run beside each other where their names end in a and b.
        pool: "average" (the border not counted) or "maximum", 3 x 3; with `pooled`, at stride 1 and a convolution after it, else at stride 2.
        pooled: Channels of the convolution after the pool; 0 for none.
    """

    def __init__(self, channels: int, branches: Sequence[Sequence[_Step]], pool: str, pooled: int) -> None:
        super().__init__()
        self.pool, self.chains = pool, [[step.name for step in chain] for chain in branches]
        self.width = pooled or channels
        for chain in branches:
            width = channels
            for step in chain:
                self.add_module(step.name, _Conv(width, step))
                width = width if step.name.endswith("a") else step.width
            self.width += sum(step.width for step in chain if step.name[-1] in "ab") or width
        self.branch_pool = _Conv(channels, _Step("branch_pool", pooled)) if pooled else None

    def forward(self, x: Tensor) -> Tensor:
        outs = []
        for chain in self.chains:
            y = x
            for name in chain:
                out = self.get_submodule(name)(y)
                if name[-1] in "ab":
                    outs.append(out)
                else:
                    y = out
            if chain[-1][-1] not in "ab":
                outs.append(y)
        return torch.cat([*outs, self._pooled(x)], dim=1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.branch_pool is None:
            return functional.max_pool2d(x, 3, 2)
        if self.pool == "maximum":
            return self.branch_pool(functional.max_pool2d(x, 3, 1, 1))
        return self.branch_pool(functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False))


def _at_35(channels: int, pooled: int) -> _Mixed:
    one, five = [_Step("branch1x1", 64)], [_Step("branch5x5_1", 48), _Step("branch5x5_2", 64, (5, 5))]
    three = [_Step("branch3x3dbl_1", 64), *(_Step(f"branch3x3dbl_{i}", 96, (3, 3)) for i in (2, 3))]
    return _Mixed(channels, [one, five, three], "average", pooled)


def _to_17() -> _Mixed:
    three = [_Step("branch3x3dbl_1", 64), _Step("branch3x3dbl_2", 96, (3, 3)), _Step("branch3x3dbl_3", 96, (3, 3), 2)]
    return _Mixed(288, [[_Step("branch3x3", 384, (3, 3), 2)], three], "maximum", 0)


def _at_17(width: int) -> _Mixed:
    wide, high = (1, 7), (7, 1)
    seven = [
        _Step("branch7x7_1", width),
        _Step("branch7x7_2", width, wide),
        _Step("branch7x7_3", 192, high),
    ]
    twice = [
        _Step("branch7x7dbl_1", width),
        *(_Step(f"branch7x7dbl_{i}", width, high if i % 2 == 0 else wide) for i in (2, 3, 4)),
        _Step("branch7x7dbl_5", 192, wide),
    ]
    return _Mixed(768, [[_Step("branch1x1", 192)], seven, twice], "average", 192)


def _to_8() -> _Mixed:
    three = [_Step("branch3x3_1", 192), _Step("branch3x3_2", 320, (3, 3), 2)]
    seven = [_Step("branch7x7x3_1", 192), _Step("branch7x7x3_2", 192, (1, 7)), _Step("branch7x7x3_3", 192, (7, 1))]
    return _Mixed(768, [three, [*seven, _Step("branch7x7x3_4", 192, (3, 3), 2)]], "maximum", 0)


def _at_8(channels: int, pool: str) -> _Mixed:
    def split(name: str) -> list[_Step]:
        return [_Step(f"{name}a", 384, (1, 3)), _Step(f"{name}b", 384, (3, 1))]

    three = [_Step("branch3x3_1", 384), *split("branch3x3_2")]
    twice = [_Step("branch3x3dbl_1", 448), _Step("branch3x3dbl_2", 384, (3, 3)), *split("branch3x3dbl_3")]
    return _Mixed(channels, [[_Step("branch1x1", 320)], three, twice], pool, 192)


class Inception(nn.Module):
    """The network: images [N, 3, 299, 299] in, (pixel - 128) / 128; features [N, 2048] out."""

    def __init__(self) -> None:
        super().__init__()
        first = _Step("Conv2d_1a_3x3", 32, (3, 3), 2)
        second, third = _Step("Conv2d_2a_3x3", 32, (3, 3), padded=False), _Step("Conv2d_2b_3x3", 64, (3, 3))
        fourth, fifth = _Step("Conv2d_3b_1x1", 80), _Step("Conv2d_4a_3x3", 192, (3, 3), padded=False)
        width = 3
        for step in (first, second, third, fourth, fifth):
            self.add_module(step.name, _Conv(width, step))
            width = step.width
        self.stem = (first.name, second.name, third.name, "pool", fourth.name, fifth.name, "pool")
        blocks = {
            "Mixed_5b": _at_35(192, 32),
            "Mixed_5c": _at_35(256, 64),
            "Mixed_5d": _at_35(288, 64),
            "Mixed_6a": _to_17(),
            **{f"Mixed_6{name}": _at_17(width) for name, width in zip("bcde", (128, 160, 160, 192), strict=True)},
            "Mixed_7a": _to_8(),
            "Mixed_7b": _at_8(1280, "average"),
            "Mixed_7c": _at_8(2048, "maximum"),
        }
        for name, block in blocks.items():
            self.add_module(name, block)
        self.blocks = tuple(blocks)
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.stem:
            x = functional.max_pool2d(x, 3, 2) if name == "pool" else self.get_submodule(name)(x)
        for name in self.blocks:
            x = self.get_submodule(name)(x)
        return x.mean(dim=(2, 3))
