"""The corrector: its gradient in closed form, its critic, the watched spread, and what a run makes of it."""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from runs_helpers import ALONE, FAST, NULL_CLASS, Interruption, interrupt_at, same_state, teacher_folder
from torch import Tensor, nn

import onestill
from onestill.data.conditions import LabelConditions
from onestill.diffusion.process import VE, CosineVP, FlowMatching, Process
from onestill.objectives.base import Context
from onestill.objectives.corrector import CORRECTOR, MEMORY, Corrector, correction, factor, output_weights, spread
from onestill.students.lora import Lora
from onestill.students.student import Student
from onestill.teachers.base import Teacher
from onestill.teachers.closed_form import GaussianTeacher, MixtureTeacher
from onestill.teachers.guidance import Wrapped, guided
from onestill.teachers.load import load_teacher
from onestill.teachers.module import module_teacher
from onestill.training.checkpoint import read_latest
from onestill.training.config import make_config
from onestill.training.loss import regression, squared_residuals, targets

PROCESSES = [CosineVP(), FlowMatching(shift=3.0), VE(sigma_max=20.0)]
ON: dict[str, Any] = {**FAST, "train_batch_size": 8, "corrector_fraction": 0.25, "max_train_steps": 8}


def corrector_of(student: Student, progress: float = 1.0, conditions: Any = None, **settings: Any) -> Corrector:
    """Return the objective, with nothing of a run that it does not need."""
    given = {
        "teacher": "x",
        "output_dir": Path(),
        **ALONE,
        "corrector_fraction": 0.5,
        "train_batch_size": 8,
        **settings,
    }
    return Corrector(
        Context(
            config=make_config(given),
            teacher=student.teacher,
            student=student,
            target_student=student,
            conditions=conditions or LabelConditions(tuple(student.spec.labels)),
            generator=torch.Generator().manual_seed(1),
            device=torch.device("cpu"),
            autocast=nullcontext,
            progress=lambda: progress,
            batch_size=8,
            seed=0,
            folder=Path(),
            process_index=0,
            num_processes=1,
            identity={},
        )
    )


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: process.name)
def test_the_gradient_is_that_of_the_divergence(process: Process) -> None:
    # Of the student's law N(m, s^2) and the teacher's N(mu, c^2), in m and in s; D is linear, so that a grid of signs
    # of z and n has the exact mean.
    mu, c, r = 0.3, 0.5, torch.tensor([0.4], dtype=torch.float64)
    m, s = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (-0.2, 0.8))
    alpha, sigma = (float(level) for level in process.alpha_sigma(r))
    v_q, v_p = (alpha * s) ** 2 + sigma**2, (alpha * c) ** 2 + sigma**2
    divergence = 0.5 * (v_q / v_p + (alpha * (m - mu)) ** 2 / v_p - 1 - (v_q / v_p).log())
    expected = torch.autograd.grad(divergence, [m, s])
    z, n = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64).T[..., None]
    y = m + s * z
    x_r, times = alpha * y.detach() + sigma * n, r.expand(4)
    teacher = GaussianTeacher(torch.tensor([mu], dtype=torch.float64), c, process)
    critic = GaussianTeacher(m.detach()[None], float(s.detach()), process)
    d = correction(y.detach(), critic.denoised(x_r, times, {}), teacher.denoised(x_r, times, {}))
    found = torch.autograd.grad((alpha / sigma) ** 2 * (d * y).sum(1).mean(), [m, s])
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)
    # The critic that knows the teacher's law corrects nothing.
    assert correction(y, teacher.denoised(x_r, times, {}), teacher.denoised(x_r, times, {})).abs().max() == 0


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: process.name)
def test_the_factors_of_a_gaussian(process: Process) -> None:
    teacher = GaussianTeacher(torch.zeros(20_000, dtype=torch.float64), 0.5, process)
    r = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    alpha, sigma = process.alpha_sigma(r)
    y, n = 0.5 * torch.randn(3, 20_000, dtype=torch.float64), torch.randn(3, 20_000, dtype=torch.float64)
    given = teacher.denoised(alpha[:, None] * y + sigma[:, None] * n, r, {})
    v = ((alpha * 0.5) ** 2 + sigma**2).sqrt()
    expected = math.sqrt(math.pi / 2) * v / (0.5 * sigma)
    torch.testing.assert_close(factor("dmd", teacher.spec, r, y, given), expected, rtol=0.03, atol=0)
    torch.testing.assert_close(factor("inverse_sigma", teacher.spec, r, y, given), 1 / sigma)
    assert factor("none", teacher.spec, r, y, given).eq(1).all()


def test_the_filter_takes_out_the_direction_of_the_critics_error() -> None:
    y, learned, given = torch.randn(3, 5, 2, 3, 3).unbind(0)
    d, kept = correction(y, learned, given), correction(y, learned, given, filtered=True)
    error = (learned - y).flatten(1)
    assert ((kept.flatten(1) * error).sum(1).abs() < 1e-4).all()
    removed = (d - kept).flatten(1)
    parallel = (removed * error).sum(1).abs() / (removed.norm(dim=1) * error.norm(dim=1))
    torch.testing.assert_close(parallel, torch.ones(5))
    assert correction(y, y, given, filtered=True).equal(y - given)  # a critic without an error


@pytest.mark.parametrize("name", ["module-cosine-v", "module-flow-velocity", "module-class"])
def test_the_critics_loss_is_that_of_its_own_output(name: str, cases: Any) -> None:
    kind = cases[name].build()
    x, r = (
        torch.randn(4, *kind.spec.sample_shape),
        torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64) * kind.spec.t_max,
    )
    cond = kind.example_rows(4)

    class Constant(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def forward(self, x: Tensor, *_: object, **__: object) -> Tensor:
            return torch.full_like(x, self.value)

    one, other = (kind.denoised_by(Constant(value), x, r, cond) for value in (0.0, 0.5))
    errors = (one - other).square().flatten(1).mean(1)
    torch.testing.assert_close(output_weights(kind.spec, r).float() * errors, torch.full((4,), 0.25))


def test_the_critic_begins_as_the_teacher_and_takes_the_students_conditions(kind: Teacher) -> None:
    objective = corrector_of(Student(kind))
    batch = objective.batch(8)
    y, r = torch.randn(8, *kind.spec.sample_shape), torch.linspace(0.1, 0.9, 8, dtype=torch.float64) * kind.spec.t_max
    torch.testing.assert_close(objective.networks["psi"](y, r, r, batch.cond), kind.denoised(y, r, batch.cond))
    assert all(value[::2].equal(value[1::2]) for value in batch.cond.values())
    assert batch.mean.eq(CORRECTOR).all() and batch.r is None and batch.s.eq(0).all()
    objective._look(torch.tensor(1.0))
    torch.testing.assert_close(targets([batch], y), y, atol=2e-3, rtol=0)  # D = 0


def test_the_gradient_of_a_row_is_the_weighted_correction(cases: Any) -> None:
    kind = cases["module-flow-velocity"].build()
    objective = corrector_of(Student(kind), corrector_weight=0.7, bootstrap_weight="none")
    objective._look(torch.tensor(0.01))
    psi = objective.networks["psi"]
    with torch.no_grad():
        for parameter in psi.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    batch, y = objective.batch(4), torch.randn(4, *kind.spec.sample_shape, requires_grad=True)
    state = objective.context.generator.get_state()
    target = targets([batch], y)
    regression(squared_residuals(y, target), batch.weights, batch.mean).backward()
    objective.context.generator.set_state(state)
    r, x_r = objective._noised(y.detach())
    with torch.no_grad():
        d = psi(x_r, r, r, {}) - kind.denoised(x_r, r, {})
        d /= (y - kind.denoised(x_r, r, {})).abs().mean((1, 2, 3), keepdim=True)
    assert y.grad is not None and d.norm() > 0.1
    torch.testing.assert_close(y.grad, 0.7 * d / (4 * d[0].numel()), atol=1e-6, rtol=1e-3)


def test_the_spread_is_the_variance_of_one_condition_and_a_smaller_one_holds_back(cases: Any) -> None:
    means = torch.randn(2_000, 1, 1).repeat_interleave(2, 0)
    assert abs(spread(means + 0.3 * torch.randn(4_000, 8, 8)) - 0.09) < 0.001
    objective = corrector_of(Student(cases["module-flow-velocity"].build()), corrector_min_spread=0.8)
    assert objective._look(torch.tensor(1.0)) is None, "the first batch is what later ones are compared with"
    strengths = [float(objective._look(torch.tensor(0.5)) or 0) for _ in range(150)]
    assert strengths[0] == 1 and strengths[-1] == 0 and strengths == sorted(strengths, reverse=True)
    kept = MEMORY**40 + 0.5 * (1 - MEMORY**40)
    assert strengths[39] == pytest.approx((kept - 0.6) / 0.2, abs=1e-4)
    off = corrector_of(Student(cases["module-flow-velocity"].build()), corrector_min_spread=0.0)
    assert [off._look(torch.tensor(v)) for v in (1.0, 1e-3)][1] == 1
    early = corrector_of(Student(cases["module-flow-velocity"].build()), progress=0.21)
    assert [early._look(torch.tensor(1.0)) for _ in range(3)] == [None] * 3


def test_a_lora_critic_is_beside_the_same_weights() -> None:
    teacher = load_teacher(teacher_folder("plain"))
    student = Student(teacher, lora=Lora(2))
    objective = corrector_of(student)
    psi = objective.networks["psi"]
    parameters = dict(psi.named_parameters())
    assert parameters.keys() == dict(student.named_parameters()).keys()
    for name, other in student.named_parameters():
        assert (parameters[name].data_ptr() == other.data_ptr()) is not other.requires_grad, name
    base = {p.data_ptr() for p in teacher.network.parameters()}
    frozen = {p.data_ptr() for p in parameters.values() if not p.requires_grad}
    assert frozen <= base and sum(p.numel() for p in parameters.values() if p.requires_grad) > 0


def test_gradient_checkpointing_changes_nothing_of_the_critic(cases: Any) -> None:
    teacher = load_teacher(teacher_folder("class"), null_class=NULL_CLASS)
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        student = Student(teacher)
        nn.init.normal_(student.target_embedding.mlp.linear_2.weight, std=0.02)
        if checkpointed:
            student.enable_gradient_checkpointing()
        objective = corrector_of(student, conditions=LabelConditions((0, 1, 2)))
        batch = objective.batch(4)
        objective.own_loss(batch, torch.ones(4, 1, 8, 8)).backward()
        assert all(p.grad is None for p in student.parameters())
        gradients.append([p.grad for p in objective.networks["psi"].parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_its_teacher_is_guided_as_it_is_told_and_else_as_the_runs(tmp_path: Path) -> None:
    plain, labels = load_teacher(teacher_folder("class"), null_class=NULL_CLASS), {"class_labels": torch.tensor([0, 1])}
    x, times = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.8], dtype=torch.float64)

    def told(**settings: Any) -> Tensor:
        teacher = guided(plain, settings.get("guidance_scale", 1.0))
        return corrector_of(Student(teacher), **settings).teacher.denoised(x, times, labels)

    by_scale = {w: guided(plain, w).denoised(x, times, labels) for w in (1.0, 2.0, 4.0)}
    assert told(guidance_scale=2.0).equal(by_scale[2.0])
    assert told(guidance_scale=2.0, corrector_guidance_scale=4.0).equal(by_scale[4.0])
    assert told(guidance_scale=2.0, corrector_guidance_scale=1.0).equal(by_scale[1.0])
    some = told(guidance_scale=2.0, corrector_guidance_interval_max=0.5)
    torch.testing.assert_close(some, torch.stack([by_scale[2.0][0], by_scale[1.0][1]]))
    # Of a run with drawn scales too: what is drawn is the student's, not the corrector's.
    student = Student(guided(plain, drawn=True), guidance_range=(1.0, 3.0))
    settings = {"guidance_scale_min": 1.0, "guidance_scale_max": 3.0, "corrector_guidance_scale": 4.0}
    objective = corrector_of(student, conditions=LabelConditions((0, 1, 2), (1.0, 3.0)), **settings)
    seen = []
    objective.teacher = Recorded(objective.teacher, seen)
    objective._look(torch.tensor(0.01))
    targets([objective.batch(4)], torch.randn(4, 1, 8, 8))
    assert seen == [{"class_labels"}]


class Recorded(Wrapped):
    """A teacher that notes which conditions it is given."""

    def __init__(self, teacher: Teacher, seen: list[set[str]]) -> None:
        super().__init__(teacher)
        self.seen = seen

    def denoised(self, x_t: Tensor, t: float | Tensor, cond: dict[str, Tensor]) -> Tensor:
        self.seen.append(set(cond))
        return self.teacher.denoised(x_t, t, cond)


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"corrector_guidance_scale": 2.0}, "corrector_guidance_scale=2: needs a teacher with a null condition"),
        ({"corrector_guidance_interval_max": 0.5}, "w = 1 is none"),
        ({"corrector_guidance_interval_min": 0.6, "corrector_guidance_interval_max": 0.5}, "must be below"),
        ({"corrector_level_min": 0.6, "corrector_level_max": 0.5}, "corrector_level_min=0.6: must be below"),
        ({"corrector_fraction": 0.9}, "1 rows too many are asked for in a batch of 8; raise train_batch_size"),
        ({"guidance_scale": 2.0, "null_class": 3, "corrector_guidance_interval_min": 0.99}, "none of the levels"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, own: dict[str, Any], words: str
) -> None:
    teacher = teacher_folder("class" if "null_class" in own else "plain")
    with pytest.raises(ValueError, match=words):
        onestill.distill(teacher, tmp_path / "run", show_progress=False, **{**ON, **own})
    assert list(tmp_path.iterdir()) == []


def test_what_it_costs_is_said_before(tmp_path: Path) -> None:
    settings = {**FAST, "train_batch_size": 8}
    without, with_it = (
        onestill.inspect_teacher(teacher_folder("plain"), **{**settings, "corrector_fraction": share})
        for share in (0.0, 0.25)
    )
    weights = 4 * without.num_parameters
    more = with_it.checkpoint_bytes - without.checkpoint_bytes
    assert 3 * weights < more < 3.5 * weights  # with its moments, without an average; it takes a target time too
    assert 1e9 * (with_it.estimated_memory_gb - without.estimated_memory_gb) > 4 * weights  # gradients, activations


def test_half_of_its_rows_begin_on_the_students_way_where_it_is_trained_from_there() -> None:
    teacher = load_teacher(teacher_folder("class"))
    student = Student(teacher)
    plain, mapped = (corrector_of(student, flow_map_fraction=share) for share in (0.0, 0.25))
    assert plain.batch(8).r is None and Corrector.cost(plain.settings, 8).student == 1
    batch = mapped.batch(8)
    assert batch.r is not None and bool((batch.r[4:] == 1).all()) and bool((batch.r[:4] < 1).all())
    assert bool((batch.s == 0).all()) and Corrector.cost(mapped.settings, 8).student == 1.5
    late = corrector_of(student, flow_map_fraction=0.25, t_min=0.6).batch(8)
    assert late.r is not None and bool((late.r >= late.s).all()), "never from below the end"
    # From the noise that the same generator draws first.
    eps = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(batch.x[4:], eps[4:])
    some = {name: value[:4] for name, value in batch.cond.items()}
    with torch.no_grad():
        y = student(eps[:4], None, batch.r[:4], some)
    torch.testing.assert_close(batch.x[:4], teacher.spec.trajectory.state(y, eps[:4], batch.r[:4]))


RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("plain", {}),
    "everything": ("class", {"anchor_fraction": 0.5, "anchor_path_fraction": 0.5, "flow_map_fraction": 0.25}),
    "drawn guidance": ("class", {"null_class": NULL_CLASS, "guidance_scale_min": 1.0, "guidance_scale_max": 3.0}),
    "LoRA": ("plain", {"lora_rank": 2}),
    "every option": (
        "epsilon",
        {
            "corrector_filter": True,
            "corrector_merge": 0.03,
            "corrector_rows": 3,
            "corrector_normalizer": "inverse_sigma",
            "corrector_learning_rate": 2e-3,
            "mixed_precision": "bf16",
            "gradient_accumulation_steps": 2,
            "ema_target_decay": 0.9,
        },
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_interrupted_goes_on_to_the_bit(tmp_path: Path, name: str) -> None:
    teacher, own = RUNS[name]
    settings = {**ON, **own, "learning_rate": 1e-3, "show_progress": False}
    onestill.distill(teacher_folder(teacher), tmp_path / "long", **settings)
    stop = interrupt_at(6)
    with pytest.raises(Interruption):
        onestill.distill(teacher_folder(teacher), tmp_path / "short", checkpointing_steps=5, on_step=stop, **settings)
    onestill.distill(teacher_folder(teacher), tmp_path / "short", resume_from_checkpoint="latest", **settings)
    assert same_state(tmp_path / "long" / "checkpoint-8", tmp_path / "short" / "checkpoint-8")
    one, other = (read_latest(tmp_path / run)[1] for run in ("long", "short"))
    assert {"corrector.psi", "corrector.psi-optimizer"} <= set(one.tensors)
    assert one.values["states"] == other.values["states"] and one.values["states"]["corrector"][0]["spread"] > 0


class Denoiser2d(nn.Module):
    """A perceptron of points in the plane and a time."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.inside, self.time = nn.Linear(2, width), nn.Linear(8, width)
        self.middle, self.last = nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.tensor([1.0, 2.0, 4.0, 8.0])
        h = nn.functional.silu(self.inside(x) + self.time(torch.cat([angles.sin(), angles.cos()], 1)))
        return self.last(nn.functional.silu(self.middle(h)))


def energy_distance(one: Tensor, other: Tensor) -> float:
    across, own, others = (torch.cdist(a, b).mean() for a, b in ((one, other), (one, one), (other, other)))
    return float(2 * across - own - others)


def test_it_leads_a_student_to_the_teachers_law_without_a_trajectory() -> None:
    means = torch.tensor([[1.0, 0.0], [-0.5, 0.9], [-0.5, -0.9]])
    teacher_law, generator = MixtureTeacher(means, 0.2, FlowMatching(net_scale=1.0)), torch.Generator().manual_seed(0)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return (x - teacher_law.denoised(x, t.double(), {})) / t[:, None]

    teacher = module_teacher(velocity, FlowMatching(net_scale=1.0), "velocity", (2,))
    student = Student(teacher, network=Denoiser2d())
    objective = corrector_of(student, train_batch_size=128, bootstrap_weight="none", corrector_min_spread=0.0)
    psi, data = objective.networks["psi"], teacher_law.draw(2000, generator)
    own, critic = (
        torch.optim.Adam(net.parameters(), rate, (0.5, 0.99)) for net, rate in ((student, 1e-3), (psi, 2e-3))
    )

    def distance() -> float:
        with torch.no_grad():
            return energy_distance(student(torch.randn(2000, 2, generator=generator), None, 0.0, {}), data)

    before = distance()
    for step in range(400):
        batch = objective.batch(128)
        y = student(batch.x, None, batch.s, batch.cond)
        loss = regression(squared_residuals(y, targets([batch], y)), batch.weights, batch.mean)
        learns = [(objective.own_loss(batch, y.detach()), critic), *([(loss, own)] if step >= 100 else [])]
        for value, optimizer in learns:
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    assert distance() < 0.65 * before


@pytest.mark.parametrize(("begin", "warmup"), [(0.99, 0.5), (0.5, 0.5)])
def test_a_corrector_that_would_never_correct_is_refused(begin: float, warmup: float) -> None:
    own = {"teacher": "x", "output_dir": "y", "corrector_begin": begin, "corrector_warmup": warmup}
    with pytest.raises(ValueError, match="corrector_begin=.* together are all of the run"):
        make_config(own)
    assert make_config({**own, "corrector_fraction": 0.0})
