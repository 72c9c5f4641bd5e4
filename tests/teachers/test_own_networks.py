"""Networks of one's own: one call before anything is written tells what they are called with, and what they are."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs_helpers import ALONE, call_cli
from torch import Tensor, nn

import onestill
from onestill.core.errors import SettingError
from onestill.core.tensors import laid_bare, noise
from onestill.diffusion.process import CosineVP, FlowMatching
from onestill.students.injection import BiasInjection
from onestill.teachers.closed_form import MixtureTeacher
from onestill.teachers.module import module_teacher
from onestill.teachers.probe import Look, doubts, look, measured
from onestill.training.trainer import unused_parameters

FAST: dict[str, Any] = {
    **ALONE, "device": "cpu", "train_batch_size": 4, "max_train_steps": 1, "lr_warmup_steps": 0, "num_validation_images": 1,
    "num_teacher_steps": 1, "show_progress": False,
}  # fmt: skip


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time, self.first = nn.Linear(1, 8), nn.Linear(4, 8)
        self.last, self.never = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x) + self.time(t[:, None])))


class Table(Net):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(1001, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.last(self.first(x) + self.table(t))


class WithMore(Net):
    def get_extra_state(self) -> object:
        return {"more": 1}


def wrong(change: Any, base: type[Net] = Net) -> nn.Module:
    """Return a network whose forward is `change(stock forward, x, t)`."""
    return type(
        "Changed", (base,), {"forward": lambda self, *args, **kw: change(super(type(self), self).forward, *args, **kw)}
    )()


WRONG = {
    "swapped": (lambda: wrong(lambda f, t, x: f(x, t)), "it takes \\(t, x\\)"),
    "tuple": (lambda: wrong(lambda f, x, t: (f(x, t),)), "must return a tensor, it returned tuple"),
    "output": (lambda: wrong(lambda f, x, t: SimpleNamespace(sample=f(x, t))), "it returned SimpleNamespace"),
    "shape": (lambda: wrong(lambda f, x, t: f(x, t)[:, :2]), "returned shape .*sample_shape"),
    "table": (Table, "takes whole numbers as time.*its time here is 1000"),
    "double": (lambda: Net().double(), "torch.float64: convert it first"),
    "not finite": (lambda: wrong(lambda f, x, t: f(x, t) / 0), "not finite"),
    "random": (lambda: wrong(lambda f, x, t: nn.functional.dropout(f(x, t))), "something else when it is called again"),
    "column": (lambda: wrong(lambda f, x, t: torch.cat([x, t], 1) @ torch.ones(5, 4)), "takes its time as \\[B, 1\\]"),
    "no time": (lambda: nn.Linear(4, 4), "it takes no time"),
    "classes": (lambda: wrong(lambda f, x, t, class_labels: f(x, t)), "it wants classes: give num_classes"),
    "complex": (lambda: wrong(lambda f, x, t: f(x, t) + 0j), "must return real numbers, it returned torch.complex64"),
    "without a word": (lambda: wrong(lambda f, x, t: {}["unsaid"[9:]]), "cannot be called"),
    "detached": (lambda: wrong(lambda f, x, t: f(x, t).detach()), "cannot be trained"),
    "no gradient": (lambda: wrong(torch.no_grad()(lambda f, x, t: f(x, t))), "cannot be trained"),
    "in place": (lambda: wrong(lambda f, x, t: f(x, t) + x.zero_()), "cannot be trained: .*inplace"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_called_is_told_before_anything_is_written(name: str, tmp_path: Path) -> None:
    make, words = WRONG[name]
    teacher = module_teacher(make(), FlowMatching(), "velocity", (4,))
    with pytest.raises(SettingError, match=f"network: .*{words}") as told:
        onestill.distill(teacher, tmp_path / "run", **FAST)
    assert "\n" not in str(told.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (Net(), "takes no class_labels: leave num_classes out"),
        (wrong(lambda f, x, t, y: f(x, t)), "takes its classes by another name"),
        (wrong(lambda f, x, t, class_labels: f(x, t) + nn.Embedding(3, 4)(class_labels)), "index out of range"),
    ],
)
def test_classes_are_tried_from_first_to_null(network: nn.Module, words: str) -> None:
    teacher = module_teacher(network, FlowMatching(), "velocity", (4,), num_classes=3, null_class=3)
    with pytest.raises(SettingError, match=words):
        look(teacher, "cpu")


def test_a_student_network_is_tried_too(tmp_path: Path) -> None:
    teacher = module_teacher(lambda x, t: 0.1 * x, CosineVP(), "sample", (4,))
    with pytest.raises(SettingError, match="it takes \\(t, x\\)"):
        onestill.distill(teacher, tmp_path / "run", network=WRONG["swapped"][0](), **FAST)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("setting", "given"),
    [
        ("process", None), ("process", FlowMatching), ("sample_shape", 4), ("sample_shape", (0,)),
        ("sample_shape", ()), ("sample_shape", (True,)), ("sample_shape", "33"), ("num_classes", -1),
        ("num_classes", True), ("num_classes", 2.5), ("null_class", 3), ("sigma_data", "x"), ("sigma_data", 0),
        ("t_max", True), ("threshold", "static"), ("network", None), ("network", Net), ("network", nn.Linear(4, 4, device="meta")),
        ("network", nn.LazyLinear(4)), ("network", torch.jit.script(nn.Linear(4, 4))), ("network", WithMore()),
    ],
)  # fmt: skip
def test_arguments_of_other_types_are_refused(setting: str, given: object) -> None:
    kept = {"network": Net(), "process": CosineVP(), "prediction_type": "sample", "sample_shape": (4,)}
    with pytest.raises(SettingError, match=setting):
        module_teacher(**{**kept, setting: given})  # type: ignore[arg-type]


# Wrappers


def wrapped() -> list[nn.Module]:
    inside, bound = Net(), Net()
    inside.first = torch.compile(inside.first, backend="eager")  # type: ignore[assignment]
    bound._original_forward = bound.forward  # type: ignore[assignment]  # as accelerate's prepare leaves it
    bound.forward = lambda x, t: 0 * x  # type: ignore[method-assign]
    return [
        torch.compile(Net(), backend="eager"),
        nn.DataParallel(torch.compile(Net(), backend="eager")),
        inside,
        bound,
    ]


@pytest.mark.parametrize("network", wrapped(), ids=["compiled", "parallel", "a part", "prepared"])
def test_wrappers_are_taken_off_the_student(network: nn.Module, tmp_path: Path) -> None:
    teacher = module_teacher(network, CosineVP(), "sample", (4,))
    student = onestill.Student(teacher)
    assert list(student.network.state_dict()) == list(Net().state_dict())
    assert "forward" not in vars(student.network)
    onestill.export_student(student, tmp_path / "out")
    for fresh in (Net(), torch.compile(Net(), backend="eager")):
        x = noise(range(3), (4,))
        found = onestill.load_module(tmp_path / "out", fresh)(x, {})  # type: ignore[arg-type]
        torch.testing.assert_close(found, student(x, None, 0.0, {}).detach(), rtol=1e-4, atol=1e-5)
    own = onestill.Student(teacher, network=laid_bare(Net()))
    assert list(own.network.state_dict()) == list(Net().state_dict())


def test_half_precision_is_exported_and_loaded_in_float32(tmp_path: Path) -> None:
    onestill.export_student(
        onestill.Student(module_teacher(Net().half(), CosineVP(), "sample", (4,))), tmp_path / "out"
    )
    generate = onestill.load_module(tmp_path / "out", Net().bfloat16())
    assert generate(torch.ones(2, 4), {}).dtype == torch.float32


def test_a_network_that_answers_in_float64_is_trained(tmp_path: Path) -> None:
    teacher = module_teacher(wrong(lambda f, x, t: f(x, t).double()), FlowMatching(), "velocity", (4,))
    assert onestill.distill(teacher, tmp_path / "run", **FAST).step == 1


def test_half_precision_becomes_float32() -> None:
    teacher = module_teacher(Net().bfloat16(), CosineVP(), "sample", (4,))
    assert {p.dtype for p in teacher.network.parameters()} == {torch.float32} and look(teacher, "cpu").rms > 0


# Layers and parameters that nobody calls


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.out, self.never = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(8, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.out(self.layer(self.into(x)[:, None])[:, 0])


def test_only_called_layers_are_told_the_target_time(tmp_path: Path) -> None:
    student = onestill.Student(module_teacher(Attention(), CosineVP(), "sample", (4,)))
    assert isinstance(student.injection, BiasInjection)
    assert set(student.injection.maps) == {"into", "out", "layer/linear1", "layer/linear2"}
    assert unused_parameters(student) == ["network.never.weight", "network.never.bias"]
    with torch.no_grad():
        for zero in student.injection.maps.values():
            zero.weight.normal_(0, 0.1)
    x = noise(range(3), (4,))
    with_gradient, without = student(x, None, 0.3, {}).detach(), torch.no_grad()(student)(x, None, 0.3, {})
    torch.testing.assert_close(with_gradient, without)
    assert onestill.export_student(student, tmp_path / "out", t=0.3) < 1e-4


# What comes of a failed start


class Breaks(Net):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if torch.is_grad_enabled() and len(x) == FAST["train_batch_size"]:
            raise RuntimeError("broken in training")
        return super().forward(x, t)


@pytest.mark.parametrize("was_there", [False, True])
def test_a_failed_start_blocks_no_other(tmp_path: Path, was_there: bool) -> None:
    folder = tmp_path / "run"
    if was_there:
        folder.mkdir()
    with pytest.raises(RuntimeError, match="broken in training"):
        onestill.distill(module_teacher(Breaks(), CosineVP(), "sample", (4,)), folder, **FAST)
    assert [*tmp_path.rglob("*")] == ([folder] if was_there else [])
    assert onestill.distill(module_teacher(Net(), CosineVP(), "sample", (4,)), folder, **FAST).step == 1


# Is it a denoiser?


def exact(sign: float, prediction: str, process: Any, t_max: float | None = None) -> onestill.load_teacher:  # type: ignore[valid-type]
    """Return a teacher whose network says `sign` times a velocity, and is read as `prediction`."""
    data = MixtureTeacher(torch.tensor([[2.0, 0.5], [-2.0, 0.0]]), 0.2, process)

    def network(x: Tensor, u: Tensor) -> Tensor:
        t = u.double().clamp(min=1e-3)
        return sign * (x - data.denoised(x, t, {})) / t[:, None].to(x)

    return module_teacher(network, process, prediction, (2,), t_max=t_max)


@pytest.mark.parametrize(
    ("sign", "prediction", "t_max", "doubted"),
    [(1, "velocity", None, ""), (1, "velocity", 0.95, ""), (-1, "velocity", None, "of the other sign"),
     (-1, "velocity", 0.95, "of the other sign"), (1, "v_prediction", None, "is not 'v_prediction'"),
     (1, "sample", None, "is not 'sample'"), (0, "velocity", None, "no training"), (0, "epsilon", None, "'epsilon'"),
     (0, "sample", None, "is 0:")],
)  # fmt: skip
def test_a_wrong_sign_or_type_is_told_from_the_right_one(
    sign: float, prediction: str, t_max: float | None, doubted: str
) -> None:
    teacher = exact(sign, prediction, FlowMatching(net_scale=1.0), t_max)
    found = doubts(look(teacher, "cpu"), teacher.spec)
    assert doubted in found and bool(found) == bool(doubted)


@pytest.mark.parametrize("std", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("process", [CosineVP(), onestill.VE(), onestill.VE(sigma_max=3.0), FlowMatching()])
@pytest.mark.parametrize("t_max", [1.0, 0.95, 0.5])
def test_exact_teachers_are_not_doubted(std: float, process: Any, t_max: float) -> None:
    for teacher in (onestill.GaussianTeacher(0.1 + torch.zeros(16), std, process, t_max),
                    MixtureTeacher(std * torch.tensor([[1.0, 0.0], [-1.0, 0.5]]), std / 5, process, t_max)):  # fmt: skip
        assert not doubts(look(teacher, "cpu"), teacher.spec) or not look(teacher, "cpu").rms


def test_epsilon_that_is_read_as_a_picture_is_doubted() -> None:
    process = onestill.VE(sigma_max=14.6)  # as noisy as Stable Diffusion's last index
    data = MixtureTeacher(torch.tensor([[2.0, 0.5], [-2.0, 0.0]]), 0.2, process)
    network = lambda x, _: (x - data.denoised(x, 1.0, {})) / 14.6  # noqa: E731
    teacher = module_teacher(network, process, "sample", (2,))
    assert "is not 'sample'" in doubts(look(teacher, "cpu"), teacher.spec)


def test_a_doubt_says_the_time_that_the_network_is_told() -> None:
    spec = exact(1, "velocity", FlowMatching()).spec  # whose network may take 0 to 1
    assert "(the network is told 1000 there)" in doubts(Look(0.0, 0.0, 391.0), spec)


def test_embedded_teachers_are_not_doubted() -> None:
    teacher = onestill.load_teacher("digits")
    assert not doubts(look(teacher, "cpu"), teacher.spec)
    eps = noise(range(64), teacher.spec.sample_shape)
    assert abs(measured(teacher.first_call(eps), eps).correlation) < 0.1


def test_inspect_and_distill_warn(uncond_teacher_folder: Path, tmp_path: Path) -> None:
    path = uncond_teacher_folder / "scheduler" / "scheduler_config.json"
    values = {**json.loads(path.read_text()), "prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    path.write_text(json.dumps(values))
    given = ["--teacher", str(uncond_teacher_folder), "--device", "cpu", "--train_batch_size", "2"]
    said = call_cli("inspect", *given, "--json")
    assert "repeats the noise" in json.loads(said.out)["warning"]
    assert "warning" in call_cli("inspect", *given).out
    said = call_cli("distill", *given, "--output_dir", tmp_path / "run", "--dry_run")
    assert said.code == 0 and "warning: what it predicts of x_0" in said.err
