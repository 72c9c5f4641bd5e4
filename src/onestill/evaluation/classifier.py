"""The small convolutional classifier whose features and labels judge images of its own kind."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from onestill.core.errors import SettingError, in_short
from onestill.core.files import save_tensors
from onestill.core.models import LARGEST, held, within
from onestill.core.reading import parse_json
from onestill.core.writing import written
from onestill.evaluation.heads import heads_of, pattern_of

KIND = "onestill.ConvFeatures"
_NORM_GROUPS = 8
_MOST_BLOCKS = 32


class ConvFeatures(nn.Module):
    """A small convolutional classifier whose penultimate layer is the feature.

    Pre-activation residual stages, each halving the image and doubling the width, global mean pooling,
    `feature = SiLU(Linear(pooled))`, `logits = Linear(feature)`. Group normalisation, so that an image's
    features do not depend on its neighbours in the batch. Any image size that survives the halvings.

    Args:
        in_channels: Channels of the images.
        num_classes: Classes of the logits.
        width: Channels of the first stage, a multiple of 8; doubled at each further stage.
        num_stages: Resolutions; images are halved `num_stages - 1` times.
        blocks_per_stage: Residual blocks (of two convolutions) at each resolution.
        feature_dim: D, the length of a feature.
        dropout: Probability of dropping a feature before the last layer while training.

    Attributes:
        config: The arguments above.
        record: What is known about the weights (for example `held_out_accuracy`); saved with them. The properties
            `heads` and `prompt_pattern` read it, and raise ValueError where what it says of them does not fit.
        name: The extractor's name in a protocol; after `load` it carries a fingerprint of the file.

    Raises:
        ValueError: If a size is below 1 or `width` is not a multiple of 8.
    """

    def __init__(
        self,
        *,
        in_channels: int = 1,
        num_classes: int = 10,
        width: int = 32,
        num_stages: int = 2,
        blocks_per_stage: int = 1,
        feature_dim: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = {"in_channels": in_channels, "num_classes": num_classes, "width": width, "num_stages": num_stages}
        sizes |= {"blocks_per_stage": blocks_per_stage, "feature_dim": feature_dim}
        self.config: dict[str, int | float] = {**sizes, "dropout": dropout}
        for key, value in sizes.items():
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST:
                raise ValueError(f"{key} must be a whole number from 1 to {LARGEST}, got {str(value)[:40]}")
        if max(num_stages, blocks_per_stage) > _MOST_BLOCKS:
            raise ValueError(f"num_stages and blocks_per_stage must be at most {_MOST_BLOCKS}")
        if width % _NORM_GROUPS:
            raise ValueError(f"width must be a multiple of {_NORM_GROUPS}, got {width}")
        self.record: dict[str, Any] = {}
        self.name = f"ConvFeatures ({feature_dim}-d)"
        blocks: list[nn.Module] = []
        channels = width
        for stage in range(num_stages):
            for block in range(blocks_per_stage):
                wider = width * 2**stage
                blocks.append(_Block(channels, wider, stride=2 if stage and not block else 1))
                channels = wider
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1)
        self.blocks = nn.Sequential(*blocks, nn.GroupNorm(_NORM_GROUPS, channels), nn.SiLU())
        self.embed = nn.Linear(channels, feature_dim)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(feature_dim, num_classes)

    @property
    def heads(self) -> dict[str, tuple[str, ...]]:
        """The classes of each head, in the order of the logits side by side; empty where the record names none."""
        return heads_of(self.record, int(self.config["num_classes"]))

    @property
    def prompt_pattern(self) -> re.Pattern[str] | None:
        """How a prompt says what each head must see: one named group for each; None where the record has none."""
        return pattern_of(self.record, self.heads)

    def features(self, images: Tensor) -> Tensor:
        """Return the penultimate features [N, feature_dim] of images [N, in_channels, H, W] in [-1, 1].

        Raises:
            SettingError: If the images are not [N, in_channels, H, W].
        """
        channels = self.config["in_channels"]
        if images.ndim != 4 or images.shape[1] != channels:
            why = f"this classifier sees images of {channels} channel(s), [N, {channels}, H, W], and was given "
            todo = "choose what fits the teacher's images"
            raise SettingError("features", why=f"{why}{list(images.shape)}", todo=todo)
        pooled: Tensor = self.blocks(self.stem(images.to(self.stem.weight))).mean(dim=(2, 3))
        return functional.silu(self.embed(pooled))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [N, num_classes] of images [N, in_channels, H, W] in [-1, 1]."""
        logits: Tensor = self.head(self.dropout(self.features(images)))
        return logits

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights, `config` and `record` into one safetensors file."""
        target = Path(path)
        about = {"kind": KIND, "config": self.config, "record": self.record}
        weights = {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}
        with written(target) as partial:
            # One entry: safetensors writes several in random order, and equal weights should give equal files.
            save_tensors(weights, partial, {"onestill": json.dumps(about)})

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> "ConvFeatures":
        """Return the classifier of a file written by `save`, in evaluation mode.

        Raises:
            SettingError: If there is no such file, or it is not a `ConvFeatures` file.
        """
        source = Path(path)
        if not source.is_file():
            raise SettingError("path", source, "no such file")
        about = _read_about(source)
        if (kind := about.get("kind")) != KIND:
            why = f"was not written by ConvFeatures.save (its metadata says kind={kind!r}, wanted {KIND!r})"
            raise SettingError("path", source, why, "for a transformers model give its folder or id")
        try:
            # As large as its weights are: nothing is allocated for what the header says.
            with within(*held([source])), torch.device("meta"):
                model = cls(**about["config"])
            model.load_state_dict({key: value.float() for key, value in load_file(source).items()}, assign=True)
            model.record = dict(about.get("record", {}))
            _ = model.prompt_pattern  # and with it the heads: said now, not after the first row
        except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
            raise SettingError("path", source, f"is damaged or of another version: {in_short(error)}") from error
        accuracy, fingerprint = model.record.get("held_out_accuracy"), hashlib.sha256(source.read_bytes()).hexdigest()
        known = f", held-out accuracy {accuracy:.1%}" if isinstance(accuracy, float) else ""
        model.name = f"ConvFeatures ({model.config['feature_dim']}-d{known}, sha256 {fingerprint[:8]})"
        return model.to(device).eval().requires_grad_(False)


class _Block(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), the pre-activation residual block."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.norm_1 = nn.GroupNorm(_NORM_GROUPS, in_channels)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1)
        self.norm_2 = nn.GroupNorm(_NORM_GROUPS, out_channels)
        self.conv_2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv_1(functional.silu(self.norm_1(x)))
        result: Tensor = self.skip(x) + self.conv_2(functional.silu(self.norm_2(inner)))
        return result


def _read_about(source: Path) -> dict[str, Any]:
    """Return what a file says about itself; empty where it is not a file of this package."""
    try:
        with safe_open(source, framework="pt") as file:
            about = parse_json((file.metadata() or {}).get("onestill", "{}"), "what it says of itself")
            return about if isinstance(about, dict) else {}
    except (SafetensorError, ValueError, OSError) as error:
        raise SettingError("path", source, f"is not a readable safetensors file ({in_short(error)})") from error
