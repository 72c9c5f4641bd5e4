"""LoRA students: the teacher's own weights and a trained update; exact at first, merged and resumable afterwards."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from runs_helpers import (
    FAST,
    Interruption,
    as_flags,
    call_cli,
    interrupt_at,
    same_state,
    snapshot,
    teacher_folder,
)
from torch import Tensor, nn

import onestill
import onestill.runs.export
from onestill.core.tensors import Cond, noise
from onestill.data.conditions import VALIDATION_SEED
from onestill.diffusion.process import CosineVP
from onestill.export.export import export_student
from onestill.runs.build import build_run, guided_as
from onestill.sampling.generate import generate_images, teacher_generator
from onestill.students.bake import bake
from onestill.students.lora import Lora, adapters, attach, merge, target_layers
from onestill.students.student import Student
from onestill.teachers.base import Teacher
from onestill.teachers.load import load_teacher
from onestill.teachers.module import module_teacher
from onestill.teachers.pixel import unet2d_teacher
from onestill.training.checkpoint import read_checkpoint
from onestill.training.config import make_config
from onestill.training.trainer import Trainer

Labels = Callable[[Teacher, int], Cond]
MakeNetwork = Callable[..., nn.Module]
LORA = {"lora_rank": 2, "lora_alpha": 4.0}


def starts(teacher: Teacher, num: int = 4) -> Tensor:
    return teacher.spec.trajectory.start(noise(range(num), teacher.spec.sample_shape))


def trained(student: Student) -> dict[str, Tensor]:
    return {name: p for name, p in student.named_parameters() if p.requires_grad}


@torch.no_grad()
def some_way_in(teacher: Teacher, size: float = 0.05, **lora: Any) -> Student:
    """Return a LoRA student whose every trained number has moved."""
    student = Student(teacher, lora=Lora(**{"rank": 2, "alpha": 4.0, **lora}))
    for parameter in trained(student).values():
        parameter.add_(size * torch.randn_like(parameter))
    return student


# One set of weights


@torch.no_grad()
def test_an_untrained_lora_student_is_the_teacher(kind: Teacher, labels_for: Labels) -> None:
    student, x_a, cond = Student(kind, lora=Lora(2)), starts(kind), labels_for(kind, 4)
    expected = kind.denoised(x_a, kind.spec.t_max, cond)
    rows = torch.tensor([0.0, 0.3, 0.8, 1.0], dtype=torch.float64) * kind.spec.t_max
    for t in (0.0, kind.spec.t_max, rows):
        # The very same weights, so to the bit.
        assert torch.equal(student(x_a, None, t, cond), expected)


def test_there_is_one_set_of_base_weights(kind: Teacher) -> None:
    assert isinstance(kind.network, nn.Module)
    names, student = set(kind.network.state_dict()), Student(kind, lora=Lora(2))
    theirs = {p.data_ptr() for p in kind.network.parameters()}
    frozen = {p.data_ptr() for p in student.parameters() if not p.requires_grad}
    assert frozen == theirs and frozen.isdisjoint(p.data_ptr() for p in trained(student).values())
    # The teacher's modules are its own: no adapter, no hook, no other name.
    assert set(kind.network.state_dict()) == names
    assert not any(m._forward_hooks for m in kind.network.modules()) and not list(adapters(kind.network))


def test_gradients_reach_adapters_and_embeddings_only(kind: Teacher, labels_for: Labels) -> None:
    student, before = some_way_in(kind), kind.fingerprint()
    x_a, cond = starts(kind), labels_for(kind, 4)
    alone = kind.denoised(x_a, 0.5, cond)
    assert {n.split(".")[0] for n in trained(student)} <= {"network", "target_embedding", "injection"}
    optimizer = torch.optim.AdamW(trained(student).values(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        student(x_a, None, 0.3, cond).square().mean().backward()
        assert not [name for name, p in trained(student).items() if p.grad is None]
        assert all(p.grad is None for p in student.parameters() if not p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    assert kind.fingerprint() == before
    assert torch.equal(kind.denoised(x_a, 0.5, cond), alone)


def test_an_untrained_adapter_can_learn(kind: Teacher, labels_for: Labels) -> None:
    student = Student(kind, lora=Lora(2))
    student(starts(kind), None, 0.3, labels_for(kind, 4)).square().mean().backward()
    second = [p for name, p in trained(student).items() if "lora_B" in name]
    # B starts at zero and A does not: two zeros in a row would never move.
    assert second and sum(bool(p.grad is not None and p.grad.any()) for p in second) > 0.8 * len(second)


@torch.no_grad()
def test_a_failing_call_leaves_the_teacher_alone(kind: Teacher, labels_for: Labels) -> None:
    student, x_a, cond = some_way_in(kind), starts(kind), labels_for(kind, 4)
    alone, mine = kind.denoised(x_a, 0.5, cond), student(x_a, None, 0.3, cond)
    with pytest.raises((RuntimeError, ValueError)):
        student(torch.zeros(4, 7, 8, 8), None, 0.3, cond)
    assert torch.equal(kind.denoised(x_a, 0.5, cond), alone)
    assert torch.equal(student(x_a, None, 0.3, cond), mine)
    assert not torch.equal(mine, Student(kind, lora=Lora(2))(x_a, None, 0.3, cond))


def test_a_rank_that_no_layer_has_is_refused(kind: Teacher) -> None:
    with pytest.raises(
        ValueError, match=r"lora_rank=1000000000: no adapted layer of \w+ has more than rank (\d+)"
    ) as caught:
        Student(kind, lora=Lora(10**9))
    full = int(str(caught.value).split("more than rank ")[1].split(";")[0])
    with pytest.raises(ValueError, match=f"lora_rank={full + 1}: "):
        Student(kind, lora=Lora(full + 1))
    assert list(adapters(Student(kind, lora=Lora(full)).network)), "the largest that is allowed"


@torch.no_grad()
def test_alpha_over_rank_scales_the_update() -> None:
    updates = []
    for alpha in (None, 8.0):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 5, bias=False))
        base: Any = network[0].weight
        attach(network, Lora(4, alpha))
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.fill_(0.1)
        before = base.clone()
        merge(network)
        assert type(network[0]) is nn.Linear
        updates.append(network[0].weight - before)
    torch.testing.assert_close(updates[1], 2 * updates[0])
    torch.testing.assert_close(updates[0], torch.full((5, 4), 4 * 0.1 * 0.1))


# Which layers


def test_default_is_attention_and_feed_forwards_where_there_are_enough(tiny_unet: MakeNetwork) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q, self.to_k, self.to_v = (nn.Linear(8, 8) for _ in range(3))
            self.to_out = nn.ModuleList([nn.Linear(8, 8), nn.Dropout()])
            self.ff = nn.ModuleDict({"net": nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(8, 8)}), nn.Dropout()])})
            self.norm = nn.Linear(8, 8)

    network = nn.ModuleDict({"block": Block(), "conv": nn.Conv2d(3, 3, 3)})
    assert target_layers(network) == [f"block.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj")]
    # In a pixel U-Net attention holds a few per cent of the weights.
    unet = tiny_unet()
    layers = [n for n, m in unet.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert target_layers(unet) == layers and any("conv1" in n for n in layers) and any("to_q" in n for n in layers)


def test_grouped_convolutions_are_left_out() -> None:
    # peft trains them and cannot merge them: the run would fail at its export.
    network = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1))
    assert target_layers(network) == ["1"]
    with pytest.raises(ValueError, match=r"lora_target_modules=\['0'\]: no Linear or ungrouped Conv"):
        target_layers(network, ("0",))


def test_named_layers_are_found_by_the_ends_of_their_names(tiny_unet: MakeNetwork) -> None:
    found = target_layers(tiny_unet(), ("to_q", "mid_block.resnets.0.conv1"))
    assert len(found) > 2 and all(name.endswith((".to_q", "mid_block.resnets.0.conv1")) for name in found)
    student = Student(unet2d_teacher(tiny_unet(), DDIMScheduler()), lora=Lora(2, None, ("to_q",)))  # type: ignore[arg-type]
    assert {name.rsplit(".", 1)[-1] for name, _ in adapters(student.network)} == {"to_q"}


def test_layers_that_are_not_there_are_refused_by_name(tiny_unet: MakeNetwork) -> None:
    with pytest.raises(
        ValueError, match=r"lora_target_modules=\['to_w', 'q'\]: no Linear or ungrouped Conv.*UNet2DModel.*to_q"
    ) as caught:
        target_layers(tiny_unet(), ("to_w", "to_q", "q"))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="lora_rank: ReLU has no Linear or ungrouped Conv layer.*distil without it"):
        target_layers(nn.ReLU())


# Refusals, before anything is written


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_rank": 0}, "lora_rank=0: .*at least 1"),
        ({"lora_rank": -3}, "lora_rank=-3: .*at least 1"),
        ({"lora_alpha": 4.0}, "lora_alpha=4: .*give lora_rank too"),
        (
            {"lora_rank": 2, "lora_target_modules": ("nowhere",)},
            r"lora_target_modules=\['nowhere'\]: no Linear or ungrouped Conv",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        onestill.distill(teacher_folder(), tmp_path / "run", show_progress=False, **{**FAST, **settings})
    assert snapshot(tmp_path) == {}


def test_without_peft_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    done = call_cli("distill", *as_flags({**FAST, "teacher": teacher_folder(), "output_dir": tmp_path / "r", **LORA}))
    assert (
        done.code == 2
        and "--lora_rank 2: needs peft, which is not installed; pip install 'onestill[lora]'" in done.words
    )
    assert snapshot(tmp_path) == {}


def test_a_network_of_ones_own_or_a_callable_is_refused(timed_network: MakeNetwork) -> None:
    teacher = module_teacher(lambda x, t: x, CosineVP(), "sample", (1, 8, 8))
    with pytest.raises(ValueError, match="lora_rank=2: trains beside the teacher's own weights.*`network=`"):
        Student(teacher, network=timed_network(), lora=Lora(2))
    with pytest.raises(ValueError, match="plain callable without weights"):
        Student(teacher, lora=Lora(2))


# Baking and exporting


@torch.no_grad()
def test_a_baked_lora_student_is_stock_and_leaves_the_weights_alone(kind: Teacher, labels_for: Labels) -> None:
    student, x_a, cond, print_before = some_way_in(kind), starts(kind), labels_for(kind, 4), kind.fingerprint()
    before = student(x_a, None, 0.2, cond)
    baked = bake(student, 0.2)
    assert type(baked) is type(kind.network) and not hasattr(baked, "peft_config")
    assert isinstance(kind.network, nn.Module)
    extra = set(baked.state_dict()) - set(kind.network.state_dict())
    assert all(name.endswith(".bias") and "lora" not in name for name in extra)
    for parameter in baked.parameters():
        parameter.zero_()
    assert torch.equal(student(x_a, None, 0.2, cond), before) and kind.fingerprint() == print_before


def test_the_merged_export_is_the_student(kind: Teacher, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export_student(some_way_in(kind), out) <= 1e-4
    assert not (out / "lora").exists()
    text = (out / "README.md").read_text()
    assert "LoRA: rank 2, merged" in text and "no LoRA file: the teacher's pipeline takes no LoRA files" in text


def test_the_embedded_digits_take_a_lora(tmp_path: Path) -> None:
    assert export_student(some_way_in(load_teacher("digits"), 0.01), tmp_path / "out") <= 1e-4


# Whole runs


def lora_run(folder: Path, **settings: Any) -> onestill.RunResult:
    settings = {**FAST, "learning_rate": 3e-3, "checkpointing_steps": 2, **LORA, **settings}
    return onestill.distill(teacher_folder(), folder, show_progress=False, **settings)


def test_a_run_trains_the_lora_only_and_says_what_is_exported(tmp_path: Path) -> None:
    settings = {**FAST, "teacher": str(teacher_folder()), "output_dir": tmp_path / "run", **LORA}
    done = call_cli("distill", *as_flags(settings))
    assert done.code == 0 and "takes no LoRA files, so the merged student alone is exported" in done.words
    checkpoint = read_checkpoint(tmp_path / "run" / "checkpoint-4")
    student = build_run(make_config({**settings, "output_dir": tmp_path / "other"})).student
    for group in ("student", "student-ema"):
        assert set(checkpoint.tensors[group]) == set(trained(student))
    assert all(name.split(".")[0] == "target_embedding" or "lora_" in name for name in checkpoint.tensors["student"])
    moments = {name.rpartition(".")[0] for name in checkpoint.tensors["student-optimizer"]}
    assert moments == set(trained(student))


@pytest.mark.parametrize(
    "settings",
    [{}, {"ema_target_decay": 0.9}, {"gradient_checkpointing": True}, {"mixed_precision": "bf16"}],
    ids=["plain", "target average", "checkpointing", "bf16"],
)
def test_resumed_is_uninterrupted_bit_by_bit(tmp_path: Path, settings: dict[str, Any]) -> None:
    whole = lora_run(tmp_path / "whole", **settings)
    assert whole.export_error is not None and whole.export_error <= 1e-4
    with pytest.raises(Interruption):
        lora_run(tmp_path / "cut", on_step=interrupt_at(3), **settings)
    lora_run(tmp_path / "cut", resume_from_checkpoint="latest", **settings)
    assert same_state(tmp_path / "whole" / "checkpoint-4", tmp_path / "cut" / "checkpoint-4")


def test_another_rank_does_not_go_on(tmp_path: Path) -> None:
    lora_run(tmp_path / "run", max_train_steps=2)
    for changed in ({"lora_rank": 3}, {"lora_alpha": 2.0}, {"lora_rank": None, "lora_alpha": None}):
        with pytest.raises(ValueError, match="trained with other settings: .*lora_"):
            lora_run(tmp_path / "run", max_train_steps=2, resume_from_checkpoint="latest", **changed)


def test_checkpoint_run_and_pipeline_sample_alike(tmp_path: Path) -> None:
    run = lora_run(tmp_path / "run").output_dir
    pipeline, checkpoint = (onestill.sample(run / name, num_images=4) for name in ("pipeline", "checkpoint-4"))
    torch.testing.assert_close(pipeline, checkpoint, rtol=0, atol=1e-4)
    assert not torch.equal(onestill.sample(run / "checkpoint-2", num_images=4), checkpoint)
    assert onestill.runs.export.export(run, tmp_path / "again") <= 1e-4


def test_validation_draws_the_teacher_without_the_lora(tmp_path: Path) -> None:
    settings = {**FAST, "teacher": str(teacher_folder()), "output_dir": tmp_path / "run", **LORA, "learning_rate": 1e-2}
    prepared = build_run(make_config(settings))
    trainer = Trainer(prepared.config, prepared.student, prepared.conditions, prepared.fingerprints)
    for _ in range(3):
        trainer.update()
    _, rms = trainer.validate()
    seeds = range(VALIDATION_SEED, VALIDATION_SEED + 2)
    fresh = guided_as(load_teacher(teacher_folder()), prepared.config)
    generate = teacher_generator(fresh, num_steps=2)
    assert trainer.watch.teacher_images is not None and rms > 0
    assert torch.equal(trainer.watch.teacher_images, generate_images(generate, seeds, (1, 8, 8), {}))


def test_inspect_counts_no_second_copy() -> None:
    found = {}
    for name, lora in {"full": {}, "lora": LORA}.items():
        flags = as_flags({"teacher": "digits", "device": "cpu", "train_batch_size": 2, **lora})
        done = call_cli("inspect", "--json", *flags)
        assert done.code == 0, done.err
        found[name] = json.loads(done.out)["estimated_memory_gb"]
    num = json.loads(done.out)["num_parameters"]
    # The full student's weights, gradients, two moments and average, less what the small updates have of those.
    assert found["full"] - found["lora"] > 0.7 * 5 * 4 * num / 1e9
