"""An export ends a run whose device is full: one more network at a time, and no text encoder, goes there."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from test_conformance import folder_of, perturbed
from torch import Tensor, nn
from transformers import CLIPTextModel

from onestill.export.export import export_student
from onestill.export.pipeline import computing_on
from onestill.students.lora import Lora
from onestill.students.student import Student
from onestill.teachers.load import load_teacher

META = torch.device("meta")


def networks() -> list[nn.Module]:
    return [found for found in gc.get_objects() if isinstance(found, UNet2DConditionModel)]


@pytest.mark.parametrize("rank", [0, 2])
def test_one_more_network_is_alive_and_text_encoders_stay(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = load_teacher(folder_of("sd-epsilon"))
    student = Student(teacher, lora=Lora(rank)) if rank else perturbed(teacher)
    gc.collect()
    known = {id(network) for network in networks()}
    alive: list[int] = []
    moved: set[type] = set()  # a module in a list would stay alive
    load, move = StableDiffusionPipeline.from_pretrained, nn.Module.to

    def counted(*args: Any, **kwargs: Any) -> Any:
        pipeline = load(*args, **kwargs)
        alive.append(len([network for network in networks() if id(network) not in known]))
        return pipeline

    def seen(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        moved.add(type(module))
        return move(module, *args, **kwargs)

    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", counted)
    monkeypatch.setattr(nn.Module, "to", seen)
    assert export_student(student, tmp_path / "out") <= 1e-4
    # What is written; it again, checked; with a LoRA the teacher's own, checked with the file.
    assert alive == [1] * (3 if rank else 2)
    assert UNet2DConditionModel in moved and CLIPTextModel not in moved


class Part:
    """A module that notes where it was sent."""

    def __init__(self) -> None:
        self.places: list[str] = []

    def to(self, place: torch.device | str) -> None:
        self.places.append(str(place))

    def decode(self, latents: Tensor, *, scale: Tensor) -> tuple[Tensor]:
        assert latents.device == scale.device == META
        if latents.ndim > 1:
            raise RuntimeError("out of memory")
        return (torch.ones(1),)


def test_a_module_is_elsewhere_for_its_call_only() -> None:
    part = Part()
    with computing_on(META, (part, "decode"), (None, "forward")):
        (made,) = part.decode(torch.zeros(2), scale=torch.ones(1))
        assert made.device.type == "cpu" and part.places == ["meta", "cpu"]
        with pytest.raises(RuntimeError, match="out of memory"):
            part.decode(torch.zeros(2, 2), scale=torch.ones(1))
        assert part.places == ["meta", "cpu"] * 2
    assert "decode" not in vars(part)
