"""The student: exact before training, told the target time, trainable alone, and baked into a stock network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

from onestill.core.tensors import Cond, noise
from onestill.diffusion.process import CosineVP
from onestill.students.bake import bake
from onestill.students.injection import BiasInjection, TimeEmbeddingInjection, time_embeddings
from onestill.students.lora import Lora
from onestill.students.student import Student
from onestill.teachers.base import Teacher
from onestill.teachers.module import module_teacher

Labels = Callable[[Teacher, int], Cond]
MakeNetwork = Callable[..., nn.Module]


def starts(teacher: Teacher, num: int = 4) -> Tensor:
    return teacher.spec.trajectory.start(noise(range(num), teacher.spec.sample_shape))


def new_layers(student: Student) -> list[nn.Linear]:
    """Return the layers through which the target time (and w) comes in, last first; some of them start at zero."""
    embeddings = [student.target_embedding, student.guidance_embedding]
    layers: list[Any] = [e.mlp.linear_2 for e in embeddings if e is not None]
    return [*student.injection.maps.values(), *layers] if isinstance(student.injection, BiasInjection) else layers


@torch.no_grad()
def perturb(student: Student, size: float = 0.1) -> Student:
    """Give the zero layers random weights, as training would."""
    for layer in new_layers(student):
        layer.weight.normal_(0, size)
        layer.bias.normal_(0, size)
    return student


@torch.no_grad()
def raw_output(network: nn.Module, student: Student, x_a: Tensor, t: float, cond: Cond) -> Tensor:
    """Return what the head makes of `network`, which is told the time t."""
    teacher = student.teacher
    kept = teacher.call

    def call(asked: Any, x: Tensor, net_time: Tensor, given: Cond) -> Tensor:
        return kept(asked, x, student.spec.process.net_time(torch.full((len(x),), t).double()).to(net_time), given)

    teacher.call = call
    try:
        return teacher.denoised_by(network, x_a, student.spec.t_max, cond)
    finally:
        teacher.call = kept


# Before training


@torch.no_grad()
@pytest.mark.parametrize("guided", [False, True], ids=["", "guidance input"])
def test_untrained_student_is_the_teacher_at_the_start_level(
    teacher: Teacher, labels_for: Labels, guided: bool
) -> None:
    x_a, cond = starts(teacher), labels_for(teacher, 4)
    student = Student(teacher, guidance_range=(1.0, 4.0) if guided else None)
    expected = teacher.denoised(x_a, teacher.spec.t_max, cond)
    given = {**cond, "guidance_scale": torch.tensor([1.0, 2.0, 3.0, 4.0])} if guided else cond
    rows = torch.tensor([0.0, 0.3, 0.8, 1.0], dtype=torch.float64) * teacher.spec.t_max
    for t in (0.0, teacher.spec.t_max, rows):
        found = student(x_a, None, t, given)
        # Bit for bit the copied network's own: what the new part adds is 0.
        assert torch.equal(found, teacher.denoised_by(student.network, x_a, teacher.spec.t_max, cond))
        # A copy of the weights lies elsewhere in memory, where a kernel may sum in another order: one float32 ulp.
        assert float((found - expected).abs().max() / expected.abs().max().clamp(min=1)) <= 1e-6


@torch.no_grad()
def test_target_time_matters_once_trained(kind: Teacher, labels_for: Labels) -> None:
    x_a, cond = starts(kind), labels_for(kind, 4)
    student = perturb(Student(kind))
    a, b = student(x_a, None, 0.0, cond), student(x_a, None, 0.5 * kind.spec.t_max, cond)
    assert float((a - b).abs().max()) > 1e-4
    # And each row has its own.
    rows = torch.tensor([0.0, 0.5, 0.0, 0.5], dtype=torch.float64) * kind.spec.t_max
    mixed = student(x_a, None, rows, cond)
    torch.testing.assert_close(mixed[::2], a[::2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[1::2], b[1::2], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_each_row_may_start_from_a_level_of_its_own(kind: Teacher, labels_for: Labels) -> None:
    t_max = kind.spec.t_max
    x_r, cond, levels = starts(kind), labels_for(kind, 4), torch.tensor([1.0, 0.7, 0.4, 1.0]).double() * t_max
    untrained, trained = Student(kind), perturb(Student(kind))
    # (12) with a = r: before training the teacher's prediction at r, whatever the target time.
    for s in (0.0, levels / 2, levels):
        assert torch.equal(untrained(x_r, levels, s, cond), kind.denoised_by(untrained.network, x_r, levels, cond))
    found = trained(x_r, levels, levels / 4, cond)
    for i, level in enumerate(levels.tolist()):
        row, of_row = x_r[i : i + 1], {name: value[i : i + 1] for name, value in cond.items()}
        torch.testing.assert_close(found[i : i + 1], trained(row, level, level / 4, of_row), rtol=1e-4, atol=1e-4)
    assert torch.equal(trained(x_r, None, 0.2, cond), trained(x_r, t_max, 0.2, cond))
    assert float((found - trained(x_r, None, levels / 4, cond)).abs().max()) > 1e-4


@torch.no_grad()
def test_guidance_scale_matters_once_trained(kind: Teacher, labels_for: Labels) -> None:
    x_a, cond = starts(kind), labels_for(kind, 4)
    student = perturb(Student(kind, guidance_range=(1.0, 4.0)))
    a, b = (student(x_a, None, 0.0, {**cond, "guidance_scale": torch.full((4,), w)}) for w in (1.0, 4.0))
    assert float((a - b).abs().max()) > 1e-4


def test_guidance_scale_must_be_given(cases: dict[str, Any]) -> None:
    teacher = cases["class-null-last"].build()
    student = Student(teacher, guidance_range=(1.0, 4.0))
    with pytest.raises(ValueError, match="guidance scale as an input.*guidance_scale"):
        student(starts(teacher), None, 0.0, {"class_labels": torch.zeros(4, dtype=torch.long)})


def test_network_never_sees_the_guidance_scale(timed_network: MakeNetwork) -> None:
    teacher = module_teacher(timed_network(), CosineVP(), "sample", (1, 8, 8))
    student = Student(teacher, guidance_range=(1.0, 4.0))
    y = student(
        starts(teacher), None, 0.0, {"guidance_scale": torch.full((4,), 2.0)}
    )  # forward(x, net_time) takes no more
    assert y.shape == (4, 1, 8, 8)


# Training


def test_gradient_reaches_the_student_only(kind: Teacher, labels_for: Labels) -> None:
    student = perturb(Student(kind))
    before = kind.fingerprint()
    student(starts(kind), None, 0.3, labels_for(kind, 4)).square().mean().backward()
    network = kind.network
    assert isinstance(network, nn.Module)
    assert all(p.grad is None for p in network.parameters())
    grads = {name: p.grad for name, p in student.named_parameters() if p.requires_grad}
    unreached = [name for name, grad in grads.items() if grad is None]
    assert not unreached
    assert sum(bool(grad.any()) for grad in grads.values() if grad is not None) > 0.9 * len(grads)
    torch.optim.SGD(student.parameters(), 0.1).step()
    assert kind.fingerprint() == before


def test_target_time_can_be_learned_from_the_exact_start(kind: Teacher, labels_for: Labels) -> None:
    # What maps the embedding into the network must have a gradient at once. Were its input zero too, as two zero
    # layers in a row would make it, neither would ever have one, and the student would stay blind to its target time.
    student = Student(kind)
    student(starts(kind), None, 0.3, labels_for(kind, 4)).square().mean().backward()
    layer = new_layers(student)[0]
    assert layer.weight.grad is not None and bool(layer.weight.grad.any())


@pytest.mark.parametrize("name", ["ddim-v", "module-cosine-v", "module-flow-velocity"])
def test_few_steps_move_the_target_time(cases: dict[str, Any], name: str) -> None:
    teacher = cases[name].build()
    student, x_a = Student(teacher), starts(teacher)
    optimizer = torch.optim.Adam(student.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (student(x_a, None, 0.0, {}).square().mean() + (student(x_a, None, 0.7, {}) - 1).square().mean()).backward()
        optimizer.step()
    with torch.no_grad():
        assert float((student(x_a, None, 0.0, {}) - student(x_a, None, 0.7, {})).abs().max()) > 1e-5


@pytest.mark.parametrize("way", ["time embedding", "bias of every layer"])
@pytest.mark.parametrize("lora", [None, Lora(2)], ids=["full", "lora"])
def test_checkpointed_gradients_are_the_plain_ones(tiny_unet: MakeNetwork, way: str, lora: Lora | None) -> None:
    from onestill.teachers.pixel import unet2d_teacher

    network: Any = tiny_unet()
    if way == "bias of every layer":
        network.time_embedding.post_act = nn.SiLU()
    teacher = unet2d_teacher(network, DDIMScheduler(prediction_type="v_prediction"))
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        student = perturb(Student(teacher, lora=lora))
        if checkpointed:
            student.network.enable_gradient_checkpointing(student.injection.checkpointed)  # type: ignore[operator]
        rows = torch.tensor([0.0, 0.2, 0.5, 0.9], dtype=torch.float64)
        student(starts(teacher), None, rows, {}).square().mean().backward()
        found.append([p.grad for p in student.parameters() if p.requires_grad])
    assert isinstance(student.injection, BiasInjection) == (way == "bias of every layer")
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, rtol=0, atol=0)


def test_student_is_what_a_checkpoint_can_hold(kind: Teacher) -> None:
    student = perturb(Student(kind))
    fresh = Student(kind)
    fresh.load_state_dict(student.state_dict())
    assert {name.split(".")[0] for name in student.state_dict()} >= {"network", "target_embedding"}
    assert not any("_teacher" in name for name in student.state_dict()), "the teacher is not part of it"
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), fresh.parameters(), strict=True))


@torch.no_grad()
def test_student_stays_in_evaluation_mode(plain_network: MakeNetwork, tiny_unet: MakeNetwork) -> None:
    from diffusers import DDPMScheduler

    from onestill.teachers.pixel import unet2d_teacher

    networks = [
        module_teacher(plain_network(dropout=0.5), CosineVP(), "sample", (1, 8, 8)),
        unet2d_teacher(tiny_unet(dropout=0.5), DDPMScheduler()),  # type: ignore[arg-type]
    ]
    for teacher in networks:
        student = Student(teacher)
        assert student.train() is student
        assert not student.training and not any(module.training for module in student.modules())
        assert any(isinstance(m, nn.Dropout) and m.p == 0.5 for m in student.modules()), "there must be a dropout"
        x_a = starts(teacher)
        assert torch.equal(student(x_a, None, 0.2, {}), student(x_a, None, 0.2, {}))


@torch.no_grad()
def test_nothing_is_held_after_a_call_or_a_failure(kind: Teacher, labels_for: Labels) -> None:
    student, x_a, cond = perturb(Student(kind)), starts(kind), labels_for(kind, 4)
    alone = student.teacher.denoised_by(student.network, x_a, kind.spec.t_max, cond)
    student(x_a, None, 0.3, cond)
    assert torch.equal(student.teacher.denoised_by(student.network, x_a, kind.spec.t_max, cond), alone)
    with pytest.raises((RuntimeError, ValueError)):
        student(torch.zeros(4, 7, 8, 8), None, 0.3, cond)
    assert torch.equal(student.teacher.denoised_by(student.network, x_a, kind.spec.t_max, cond), alone)


# Where the target time enters


def test_time_embeddings_of_a_unet_are_found_and_classes_are_not(tiny_unet: MakeNetwork) -> None:
    assert time_embeddings(tiny_unet()) == ["time_embedding"]
    # A class embedding of the same kind must not be taken for the time's.
    assert time_embeddings(tiny_unet(class_embed_type="timestep")) == ["time_embedding"]


def test_way_in_is_the_networks_own_where_there_is_one(plain_network: MakeNetwork, timed_network: MakeNetwork) -> None:
    plain, timed = (module_teacher(n(), CosineVP(), "sample", (1, 8, 8)) for n in (plain_network, timed_network))
    assert isinstance(Student(plain).injection, BiasInjection)
    assert isinstance(Student(timed).injection, TimeEmbeddingInjection)


def test_time_embedding_with_an_activation_behind_it_takes_the_fallback(timed_network: MakeNetwork) -> None:
    # A constant bias before the activation would not be a constant added after it.
    network: Any = timed_network()
    network.time_embedding = TimestepEmbedding(16, 6, post_act_fn="silu")
    teacher = module_teacher(network, CosineVP(), "sample", (1, 8, 8))
    student = perturb(Student(teacher))
    assert isinstance(student.injection, BiasInjection)
    x_a = starts(teacher)
    found = raw_output(bake(student, 0.3), student, x_a, 1.0, {})
    torch.testing.assert_close(found, student(x_a, None, 0.3, {}), rtol=1e-5, atol=1e-5)


def test_fallback_reaches_every_layer(plain_network: MakeNetwork) -> None:
    injection = Student(module_teacher(plain_network(), CosineVP(), "sample", (1, 8, 8))).injection
    assert isinstance(injection, BiasInjection)
    assert {name: layer.out_features for name, layer in injection.maps.items()} == {
        "first": 6,
        "time": 6,
        "mix": 6,
        "last": 1,
    }


@torch.no_grad()
@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)), (3,)),
        (nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv1d(4, 2, 1, bias=False)), (2, 9)),
        (nn.Sequential(nn.Conv3d(1, 2, 1), nn.Tanh(), nn.Conv3d(2, 1, 1)), (1, 3, 3, 3)),
        (nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 4)), (5, 4)),
    ],
    ids=["points", "sequences", "volumes", "tokens"],
)
def test_fallback_on_samples_of_any_shape(network: nn.Module, shape: tuple[int, ...]) -> None:
    class Timeless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = network

        def forward(self, x: Tensor, net_time: Tensor) -> Tensor:
            return self.layers(x)

    teacher = module_teacher(Timeless(), CosineVP(), "sample", shape)
    x_a = starts(teacher, 3)
    student = Student(teacher)
    assert torch.equal(student(x_a, None, 0.3, {}), teacher.denoised(x_a, 1.0, {}))
    perturb(student)
    rows = torch.tensor([0.0, 0.4, 0.9], dtype=torch.float64)
    found = student(x_a, None, rows, {})
    assert found.shape == x_a.shape
    for i, t in enumerate(rows.tolist()):
        baked = raw_output(bake(student, t), student, x_a[i : i + 1], 1.0, {})
        # The bias is added before or after the sum: float32 rounding.
        torch.testing.assert_close(found[i : i + 1], baked, rtol=1e-5, atol=1e-6)


def test_callable_without_weights_is_refused() -> None:
    teacher = module_teacher(lambda x, t: x, CosineVP(), "sample", (2,))
    with pytest.raises(ValueError, match="plain callable without weights.*`network=`"):
        Student(teacher)


def test_network_without_layers_is_refused() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor, net_time: Tensor) -> Tensor:
            return x * self.scale

    with pytest.raises(ValueError, match="no Linear or Conv layer.*`network=`"):
        Student(module_teacher(Bare(), CosineVP(), "sample", (2,)))


def test_given_network_is_trained_in_the_copys_place(timed_network: MakeNetwork) -> None:
    teacher = module_teacher(lambda x, t: x, CosineVP(), "sample", (1, 8, 8))
    network = timed_network()
    student = Student(teacher, network=network)
    assert student.network is network
    found = student(starts(teacher), None, 0.2, {})
    assert torch.equal(found, network(starts(teacher), torch.ones(4)))
    found.square().mean().backward()
    assert all(p.grad is not None for p in network.parameters())


# Baking


@torch.no_grad()
def test_baked_network_is_the_student_at_that_time(teacher: Teacher, labels_for: Labels) -> None:
    x_a, cond = starts(teacher), labels_for(teacher, 4)
    student = perturb(Student(teacher))
    for t in (0.0, 0.4 * teacher.spec.t_max):
        baked = bake(student, t)
        expected = student(x_a, None, t, cond)
        found = raw_output(baked, student, x_a, teacher.spec.t_max, cond)
        # The embedding is rounded once more, to the bias it becomes: 1e-6 of the image, whose size is 20 for epsilon.
        assert float((found - expected).abs().max() / expected.abs().max().clamp(min=1)) <= 1e-6


@torch.no_grad()
def test_baked_network_ignores_the_time_it_is_given(kind: Teacher, labels_for: Labels) -> None:
    student, x_a, cond = perturb(Student(kind)), starts(kind), labels_for(kind, 4)
    baked = bake(student, 0.0)
    a, b = (raw_output(baked, student, x_a, t, cond) for t in (kind.spec.t_max, 0.1))
    if isinstance(student.injection, TimeEmbeddingInjection):
        assert torch.equal(a, b)
    else:
        assert not torch.equal(a, b), "the fallback must still be given the start level's time"


@torch.no_grad()
def test_baked_network_holds_the_guidance_scale(cases: dict[str, Any]) -> None:
    teacher = cases["class-null-last"].build()
    student = perturb(Student(teacher, guidance_range=(1.0, 4.0)))
    x_a, cond = starts(teacher), {"class_labels": torch.tensor([0, 1, 2, 3])}
    for asked, w in ((3.5, 3.5), (None, 2.5)):
        expected = student(x_a, None, 0.0, {**cond, "guidance_scale": torch.full((4,), w)})
        found = raw_output(bake(student, 0.0, asked), student, x_a, 1.0, cond)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_baking_leaves_the_student_alone(kind: Teacher, labels_for: Labels) -> None:
    student, x_a, cond = perturb(Student(kind)), starts(kind), labels_for(kind, 4)
    before = student(x_a, None, 0.2, cond)
    baked = bake(student, 0.0)
    for parameter in baked.parameters():
        parameter.zero_()
    assert torch.equal(student(x_a, None, 0.2, cond), before)


@torch.no_grad()
def test_baked_network_is_stock(kind: Teacher) -> None:
    student = perturb(Student(kind))
    baked = bake(student, 0.0)
    assert type(baked) is type(kind.network)
    assert not any(module._forward_hooks for module in baked.modules())
    names, stock = set(baked.state_dict()), set(kind.network.state_dict())  # type: ignore[union-attr]
    # Only layers that had no bias gain one.
    assert stock <= names and all(name.endswith(".bias") for name in names - stock)
    if isinstance(student.injection, TimeEmbeddingInjection):
        assert names == stock
    for module in baked.modules():
        if isinstance(module, TimestepEmbedding):
            assert not module.linear_2.weight.any()
