"""Which extractor an evaluation looks through: what the setting `features` names, and what it is if it names none."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from onestill.core.errors import SettingError, named
from onestill.core.files import PICKLE_SUFFIXES
from onestill.core.tensors import as_times, broadcast, noise, to_device
from onestill.evaluation.classifier import ConvFeatures
from onestill.evaluation.features import ClassifierFeatures, FeatureExtractor, MiddleFeatures
from onestill.evaluation.inception import load_inception
from onestill.evaluation.pretrained import HUB_ID, TransformersFeatures
from onestill.teachers.base import Teacher
from onestill.teachers.load import EMBEDDED

MIDDLE_LOG_SNR = 2.0
_GIVE = "a .safetensors file written by ConvFeatures.save, or a transformers vision model"
_OTHERS = f"give {named('features')} {_GIVE}, by folder or id"


def choose_features(
    spec: str, teacher: Teacher, *, local_files_only: bool, device: torch.device, weights: Path | None = None
) -> FeatureExtractor:
    """Return the extractor that `features` names: teacher, an embedded teacher's name, inception, a file, a folder or an id.

    "auto" is an embedded teacher's classifier where the teacher is one, else the teacher's own; `weights` are the file of
    "inception".
    """
    if spec == "inception" and weights is not None:
        return load_inception(weights, device=device)
    if spec == "auto":
        spec = teacher.spec.source if teacher.spec.source in EMBEDDED else "teacher"
    if spec == "teacher":
        return teacher_features(teacher, device)
    if spec in EMBEDDED:
        return ClassifierFeatures(ConvFeatures.load(EMBEDDED[spec].folder / "classifier.safetensors", device=device))
    return load_features(spec, local_files_only=local_files_only, device=device)


def load_features(spec: str, *, local_files_only: bool = False, device: str | torch.device = "cpu") -> FeatureExtractor:
    """Return the extractor of a file written by `ConvFeatures.save`, or a transformers model's folder or hub id.

    Raises:
        SettingError: If there is no such file or folder, it is a pickle, or it is of another kind.
    """
    path, suffix = Path(spec), Path(spec).suffix.lower()
    if suffix in PICKLE_SUFFIXES and not path.is_dir():
        why = f"is a pickle ({suffix}), which can run code when it is opened"
        raise SettingError("features", spec, why, f"give {_GIVE} with safetensors weights")
    if suffix == ".safetensors" or path.is_file():
        try:
            return ClassifierFeatures(ConvFeatures.load(path, device=device))
        except SettingError as error:
            raise error.about("features", spec) from None
    if not path.is_dir() and not HUB_ID.fullmatch(spec):
        raise SettingError("features", spec, "no such file or folder", f"give {_GIVE}, by folder or id")
    return TransformersFeatures(spec, local_files_only=local_files_only, device=device)


def teacher_features(teacher: Teacher, device: torch.device) -> FeatureExtractor:
    """Return the teacher's own middle features of slightly noised images, as an extractor.

    The noise is fixed (one seed) and its level is log-SNR 2, where networks see structure more than noise.

    Raises:
        SettingError: If the teacher has no network with a middle.
    """
    teacher = teacher.unguided
    network = teacher.network
    if not isinstance(network, nn.Module):
        why = "this teacher is a plain callable without middle features"
        raise SettingError("features", "teacher", why, _OTHERS)
    process = teacher.spec.process
    t = float(process.time_at_log_snr(torch.tensor([MIDDLE_LOG_SNR], dtype=torch.float64)))
    fixed = noise([0], teacher.spec.sample_shape)

    def look(images: Tensor) -> None:
        alpha, sigma = (broadcast(v, images) for v in process.alpha_sigma(as_times(t, len(images))))
        # What the images show is not said: the null condition where there is one, else the same for all.
        cond = to_device(teacher.null_rows(teacher.example_rows(len(images))), device)
        if (condition := teacher.image_condition) is not None:
            # Each image beside itself made small, as a super-resolution network expects.
            small = torch.nn.functional.interpolate(images, scale_factor=1 / condition.usual_factor, mode="area")
            cond |= to_device(teacher.picture_rows(small, fixed.expand_as(images)), device)
        teacher.denoised((alpha * images + sigma * fixed.to(images)).to(device), t, cond)

    middle = _middle_of(network) or _middle_layer(network, look, noise([1, 2], teacher.spec.sample_shape))
    name = f"the teacher's own {middle}{' of latents' if teacher.has_decoder else ''} at log-SNR {MIDDLE_LOG_SNR:g}"
    return MiddleFeatures(network, look, submodule=middle, name=name, of_latents=teacher.has_decoder)


def _middle_of(network: nn.Module) -> str:
    """Return the name of the middle of a U-Net: where there is no middle block, that of its last block down; "" if none."""
    if isinstance(getattr(network, "mid_block", None), nn.Module):
        return "mid_block"
    if (blocks := getattr(network, "down_blocks", ())) and hasattr(network, "mid_block"):
        return f"down_blocks.{len(blocks) - 1}"
    return ""


def _middle_layer(network: nn.Module, look: Callable[[Tensor], None], images: Tensor) -> str:
    """Return the name of the middle one of the layers that are called once and see which of two images it is."""
    seen: dict[str, list[Tensor]] = {}
    layers = {
        name: part for name, part in network.named_modules() if isinstance(part, (nn.Linear, nn.Conv1d, nn.Conv2d))
    }
    with ExitStack() as hooks, torch.no_grad():
        for name, layer in layers.items():
            note = lambda _, __, out, name=name: seen.setdefault(name, []).append(out)  # noqa: E731 - bound
            hooks.enter_context(layer.register_forward_hook(note))
        if layers:
            look(images)
    once = {name: found[0] for name, found in seen.items() if len(found) == 1 and len(found[0]) == len(images)}
    names = [name for name, (one, other) in once.items() if not torch.equal(one, other)]
    if not names:
        why = f"{type(network).__name__} has neither a mid_block nor another layer that sees each image once"
        raise SettingError("features", "teacher", why, _OTHERS)
    return names[len(names) // 2]
