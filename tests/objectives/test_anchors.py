"""Anchors: what the pool holds, how it is kept, and what a training makes of it."""

import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from runs_helpers import ALONE, FAST, NULL_CLASS, Interruption, copied, interrupt_at, same_state, teacher_folder
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import onestill
from onestill.core.errors import FoundWarning, RunError
from onestill.core.files import read_hashed, save_hashed
from onestill.core.writing import WriteError
from onestill.data.conditions import LabelConditions
from onestill.diffusion import trajectory
from onestill.diffusion.names import SolverName
from onestill.diffusion.process import CosineVP, FlowMatching, Process
from onestill.objectives.anchors import Anchors, inner_times
from onestill.objectives.base import Context
from onestill.objectives.boot import Boot
from onestill.objectives.pool import Pool, read_pool, write_pool
from onestill.objectives.registry import rows_of
from onestill.runs.build import build_run
from onestill.runs.folder import RunFolder
from onestill.runs.load import restore_student
from onestill.sampling.generate import teacher_generator
from onestill.teachers.base import Teacher
from onestill.teachers.closed_form import GaussianTeacher
from onestill.teachers.guidance import Guided
from onestill.teachers.load import load_teacher
from onestill.training.config import make_config, pool_settings
from onestill.training.loss import squared_residuals
from onestill.training.trainer import Fingerprints, Trainer

POOL: dict[str, Any] = {
    "anchor_fraction": 0.5,
    "anchor_path_fraction": 0.5,
    "num_anchors": 10,
    "num_anchor_steps": 3,
    "anchor_solver": "midpoint",
}


def anchors_of(teacher: Teacher, conditions: LabelConditions, folder: Path = Path(), **settings: Any) -> Anchors:
    """Return the objective, with nothing of a run that it does not need."""
    given = {
        "teacher": "x",
        "output_dir": folder,
        **ALONE,
        "anchor_fraction": 0.5,
        "anchor_solver": "midpoint",
        **settings,
    }
    return Anchors(
        Context(
            config=make_config(given),
            teacher=teacher,
            student=torch.nn.Identity(),
            target_student=torch.nn.Identity(),
            conditions=conditions,
            generator=torch.Generator().manual_seed(1),
            device=torch.device("cpu"),
            autocast=nullcontext,
            progress=lambda: 0.0,
            batch_size=4,
            seed=0,
            folder=folder,
            process_index=0,
            num_processes=1,
            identity={},
        )
    )


def pool_of(objective: Anchors) -> Pool:
    assert sum(objective.prepare()) == objective.settings.num_anchors and objective.pool is not None
    return objective.pool


def guided_teacher() -> Teacher:
    return Guided(load_teacher(teacher_folder("class"), null_class=NULL_CLASS), 2.0)


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    settings = {"num_anchors": 10, "num_anchor_steps": 4}
    return pool_of(anchors_of(guided_teacher(), LabelConditions((0, 1, 2)), tmp_path, **settings))


def ends_of(pool: Pool, teacher: Teacher, solver: SolverName, *, down_to: float = 0.0) -> Tensor:
    """Return the signal at a stop of four steps, or at the end of all, from the noise of a pool."""
    spec = teacher.spec
    times = [t for t in trajectory.refined_times(spec.process, spec.t_max, 4) if t >= down_to]
    with torch.no_grad():
        x_a = spec.trajectory.start(pool.eps)
        return trajectory.SOLVERS[solver](spec.trajectory, teacher.denoiser(pool.chosen), x_a, times)


def test_an_anchor_is_the_end_of_the_teachers_own_sampling(pool: Pool) -> None:
    anchors = pool
    assert anchors.eps.shape == anchors.signal.shape == (10, 1, 8, 8)
    expected = ends_of(anchors, guided_teacher(), "midpoint")
    # The same sums in batches of another size.
    torch.testing.assert_close(anchors.signal, expected, atol=1e-5, rtol=1e-5)


def test_anchors_are_made_by_the_solver_that_is_named(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"num_anchors": 4, "num_anchor_steps": 4, "anchor_solver": "dpmsolver++"}
    objective = anchors_of(guided_teacher(), LabelConditions((0, 1, 2)), tmp_path, **settings)
    anchors = pool_of(objective)
    torch.testing.assert_close(anchors.signal, ends_of(anchors, guided_teacher(), "dpmsolver++"), atol=1e-5, rtol=1e-5)
    assert (anchors.signal - ends_of(anchors, guided_teacher(), "midpoint")).abs().max() > 1e-3
    config = objective.settings
    assert Anchors.cost(config, 4).teacher_per_item == 5 and Boot.cost(config, 4).teacher == 2


def test_anchors_of_a_closed_form_reach_the_exact_map(tmp_path: Path) -> None:
    teacher = GaussianTeacher(torch.tensor([0.5, -0.3]), 0.6, CosineVP())
    objective = anchors_of(teacher, LabelConditions(), tmp_path, num_anchors=100, num_anchor_steps=64)
    anchors = pool_of(objective)
    # From pure noise to data: eq. (17) at s = 0.
    exact = torch.tensor([0.5, -0.3]) + 0.6 * anchors.eps
    assert (anchors.signal - exact).abs().max() < 4e-3


@pytest.mark.parametrize("solver", ["dpmsolver++", "ddim", "heun", "midpoint"])
@pytest.mark.parametrize("process", [CosineVP(), FlowMatching()], ids=["vp", "flow"])
def test_rows_on_the_way_are_pieces_of_the_exact_path(tmp_path: Path, process: Process, solver: str) -> None:
    mean, spread = torch.tensor([0.5, -0.3]), 0.6
    teacher = GaussianTeacher(mean, spread, process)
    given = {"num_anchors": 200, "num_anchor_steps": 64, "anchor_path_fraction": 1.0, "anchor_solver": solver}
    objective = anchors_of(teacher, LabelConditions(), tmp_path, bootstrap_weight="none", **given)
    pool = pool_of(objective)
    stops = pool.path["stops"]
    assert bool((stops[:, 0] > stops[:, 1]).all()) and stops.min() > 0 and stops.max() < 1
    batch, trajectory = objective.batch(400), teacher.spec.trajectory
    assert batch.r is not None and bool((batch.s < batch.r).all())

    def moments(t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = process.alpha_sigma(t)
        return alpha[:, None] * mean, ((alpha * spread) ** 2 + sigma**2).sqrt()[:, None]

    # The ODE of a Gaussian keeps how many deviations a point is from the mean.
    (mean_r, std_r), (mean_s, std_s) = moments(batch.r), moments(batch.s)
    expected = mean_s + std_s / std_r * (batch.x - mean_r)
    found = trajectory.state(batch.target, batch.x, batch.s, batch.r)
    assert (found - expected).abs().max() < (0.05 if solver == "ddim" else 0.02)
    # Every kind of row is there, in about equal parts, and those that begin lower weigh as much more.
    start, end = batch.r == 1, batch.s == 0
    shares = [float(rows.double().mean()) for rows in (start, end, ~start & ~end)]
    assert shares == pytest.approx([0.4, 0.4, 0.2], abs=0.08) and not bool((start & end).any())
    sigma = process.alpha_sigma(batch.r)[1].clamp(0.05, 1.0)
    torch.testing.assert_close(batch.weights.double(), sigma**-2, rtol=1e-5, atol=0.0)
    assert batch.is_profiled is not None and torch.equal(batch.is_profiled, start)


@pytest.mark.parametrize("solver", ["ddim", "heun", "midpoint"])
def test_what_is_kept_is_where_the_solver_was(tmp_path: Path, solver: SolverName) -> None:
    given = {"num_anchors": 12, "num_anchor_steps": 4, "anchor_path_fraction": 0.5, "anchor_solver": solver}
    pool, teacher = (
        pool_of(anchors_of(guided_teacher(), LabelConditions((0, 1, 2)), tmp_path, **given)),
        guided_teacher(),
    )
    for row in range(12):
        one = Pool(pool.eps[[row]], pool.signal[[row]], {name: value[[row]] for name, value in pool.chosen.items()})
        for stop, state in zip(pool.path["stops"][row].tolist(), pool.path["states"][row], strict=True):
            y, here = ends_of(one, teacher, solver, down_to=stop), torch.tensor([stop], dtype=torch.float64)
            there = teacher.spec.trajectory.state(y, teacher.spec.trajectory.start(one.eps), here)
            torch.testing.assert_close(state[None], there, atol=1e-4, rtol=1e-4)


def test_rows_begin_and_end_between_the_ends_of_a_run(tmp_path: Path) -> None:
    teacher = load_teacher(teacher_folder("plain"), t_max=0.8)
    given = {"num_anchors": 40, "num_anchor_steps": 8, "anchor_path_fraction": 1.0, "t_min": 0.2}
    objective = anchors_of(teacher, LabelConditions(), tmp_path, **given)
    pool_of(objective)
    batch = objective.batch(200)
    assert batch.r is not None and bool((batch.r > batch.s).all())
    assert (float(batch.r.max()), float(batch.s.min())) == pytest.approx((0.8, 0.2))
    assert bool(torch.as_tensor(batch.target).isfinite().all())


def test_one_row_is_on_the_way_where_any_is_asked_for_and_stops_are_the_networks_times(tmp_path: Path) -> None:
    given = {"num_anchors": 8, "num_anchor_steps": 4, "anchor_path_fraction": 0.01}
    objective = anchors_of(guided_teacher(), LabelConditions((0, 1, 2)), tmp_path, **given)
    pool_of(objective)
    batch = objective.batch(1)
    assert batch.r is not None and bool((batch.r - batch.s < 1).all())
    spec = load_teacher(teacher_folder("plain")).spec
    fine = trajectory.uniform_times(1.0, 2000)
    assert min(inner_times(fine, spec)) >= spec.process.t_min > fine[-2]


def test_a_share_of_the_rows_is_on_the_way_and_the_rest_are_whole(tmp_path: Path) -> None:
    given = {"num_anchors": 10, "num_anchor_steps": 4, "anchor_path_fraction": 0.25}
    objective = anchors_of(guided_teacher(), LabelConditions((0, 1, 2)), tmp_path, **given)
    pool = pool_of(objective)
    batch = objective.batch(40)
    whole = slice(10, None)
    assert batch.r is not None and bool((batch.r[whole] == 1).all()) and bool((batch.s[whole] == 0).all())
    for x, target in zip(batch.x[whole], batch.target[whole], strict=True):  # type: ignore[index]  # a tensor
        row = int((pool.eps == x).flatten(1).all(1).nonzero())
        assert torch.equal(target, pool.signal[row])
    again = anchors_of(guided_teacher(), LabelConditions((0, 1, 2)), tmp_path, **given)
    assert torch.equal(pool_of(again).path["states"], pool.path["states"]), "which the file has"


def test_draws_are_rows_of_the_pool_and_belong_together(pool: Pool) -> None:
    anchors = pool
    drawn = anchors.draw(50, torch.Generator().manual_seed(1))
    rows = [int((anchors.eps == eps).flatten(1).all(1).nonzero()) for eps in drawn.eps]
    assert torch.equal(drawn.signal, anchors.signal[rows])
    assert torch.equal(drawn.chosen["class_labels"], anchors.chosen["class_labels"][rows])
    assert len(set(rows)) > 5


def test_a_file_is_read_only_for_what_it_was_made_with(tmp_path: Path, pool: Pool) -> None:
    (tmp_path / "anchors-0.safetensors").unlink()
    path, generator = tmp_path / "anchors.safetensors", torch.Generator().manual_seed(3)
    assert read_pool(path, {"seed": 0}, generator) is None
    write_pool(anchors := pool, torch.Generator().manual_seed(5), path, {"seed": 0, "teacher": "a"})
    assert [p.name for p in tmp_path.iterdir()] == ["anchors.safetensors"]
    assert read_pool(path, {"teacher": "b", "seed": 0}, generator) is None
    assert generator.initial_seed() == 3 and torch.equal(
        generator.get_state(), torch.Generator().manual_seed(3).get_state()
    )
    found = read_pool(path, {"teacher": "a", "seed": 0}, generator)
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(5).get_state())
    assert found is not None and torch.equal(found.signal, anchors.signal) and torch.equal(found.eps, anchors.eps)
    assert torch.equal(found.chosen["class_labels"], anchors.chosen["class_labels"])


def test_what_is_no_file_is_not_waited_for_and_nothing_half_is_left(tmp_path: Path, pool: Pool) -> None:
    pipe, folder = tmp_path / "new" / "a.safetensors", tmp_path / "new" / "b.safetensors"
    pipe.parent.mkdir()
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match="is no file"):
        read_pool(pipe, {}, torch.Generator())
    folder.mkdir()
    with pytest.raises(WriteError):
        write_pool(pool, torch.Generator(), folder, {})
    assert sorted(pipe.parent.iterdir()) == [pipe, folder]


def test_at_the_exact_student_an_anchor_costs_nothing(tmp_path: Path) -> None:
    # With the student's own prediction in the place of the teacher's signal, its rows have no residual at all.
    values = {
        "teacher": str(teacher_folder()),
        "output_dir": tmp_path / "run",
        **FAST,
        **POOL,
        "anchor_path_fraction": 0.0,
        "boundary_weight": 0,
    }
    prepared = build_run(make_config(values))
    trainer = Trainer(prepared.config, prepared.student, prepared.conditions, Fingerprints("x"))
    (tmp_path / "run").mkdir()
    assert sum(num for _, num in trainer.prepare()) == 10
    boot, anchors = trainer.objectives
    num = rows_of(prepared.config, prepared.config.train_batch_size)
    assert isinstance(anchors, Anchors) and anchors.pool is not None
    with torch.no_grad():
        exact = trainer.student(anchors.pool.eps, None, 0.0, {})
        anchors.pool = Pool(anchors.pool.eps, exact, {})
        rows = anchors.batch(num[Anchors])
        assert isinstance(rows.target, Tensor)
        y = trainer.student(rows.x, rows.r, rows.s, rows.cond)
        assert squared_residuals(y, rows.target).max() < 1e-10
        # So that the loss of a batch is the bootstrap's alone, a mean over the rows of both.
        trainer.generator.manual_seed(0)
        both = float(trainer._losses()[0])
        trainer.generator.manual_seed(0)
        alone = boot.batch(num[Boot])
        residuals = squared_residuals(trainer.student(alone.x, None, alone.s, alone.cond), alone.target)
    assert both == pytest.approx(float((residuals * alone.weights).sum()) / prepared.config.train_batch_size, rel=1e-5)


def test_a_resumed_run_with_anchors_is_uninterrupted_bit_by_bit(tmp_path: Path) -> None:
    settings = {**FAST, **POOL, "checkpointing_steps": 2, "show_progress": False}
    onestill.distill(teacher_folder(), tmp_path / "one", **settings)
    with pytest.raises(Interruption):
        onestill.distill(teacher_folder(), tmp_path / "two", on_step=interrupt_at(3), **settings)
    # Whether the pool is still there or is made again, it is the same one.
    (tmp_path / "two" / "anchors-0.safetensors").unlink()
    onestill.distill(teacher_folder(), tmp_path / "two", resume_from_checkpoint="latest", **settings)
    assert same_state(tmp_path / "one" / "checkpoint-4", tmp_path / "two" / "checkpoint-4")


def test_a_pool_that_was_stopped_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trainer(name: str) -> Trainer:
        own: dict[str, Any] = {"teacher": str(teacher_folder("class")), "null_class": NULL_CLASS, "guidance_scale": 2.0}
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.yaml").touch()
        own |= {"output_dir": tmp_path / name, "resume_from_checkpoint": "latest"}
        prepared = build_run(make_config({**own, **FAST, **POOL}))
        return Trainer(prepared.config, prepared.student, prepared.conditions, Fingerprints("x"))

    whole = trainer("whole")
    made = lambda trainer: [num for _, num in trainer.prepare()]  # noqa: E731 - short
    assert made(whole) == [4, 4, 2]
    for _, num in (stopped := trainer("run")).prepare():
        assert num == 4
        stopped.stop_requested = True
    assert pool_in(stopped) is None
    monkeypatch.setattr("onestill.objectives.anchors.WRITE_SECONDS", 0.0)
    killed = trainer("run").prepare()
    assert [next(killed)[1] for _ in range(3)] == [4, 4, 2], (
        "what is there comes first; the second batch is written by now"
    )
    # How often a pool is written depends on how long that takes; at least the second batch is kept.
    for left, expected in ((trainer("run"), ([8, 2], [10])), (trainer("run"), ([10],))):
        assert made(left) in expected
        found, wanted = pool_in(left), pool_in(whole)
        assert found is not None and wanted is not None
        assert torch.equal(found.eps, wanted.eps) and torch.equal(found.signal, wanted.signal)
        assert torch.equal(found.chosen["class_labels"], wanted.chosen["class_labels"])


def test_a_pool_that_failed_in_a_batch_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The failed batch has drawn its noise already; what is kept begins after the last whole one.
    settings: dict[str, Any] = {"num_anchors": 10, "num_anchor_steps": 2}
    conditions = LabelConditions((0, 1, 2))
    (tmp_path / "one").mkdir()
    whole = pool_of(anchors_of(guided_teacher(), conditions, tmp_path / "one", **settings))
    real, calls = trajectory.SOLVERS["midpoint"], 0

    def failing(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("out of memory")
        return real(*args)

    (tmp_path / "two").mkdir()
    with monkeypatch.context() as patch:
        patch.setitem(trajectory.SOLVERS, "midpoint", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            list(anchors_of(guided_teacher(), conditions, tmp_path / "two", **settings).prepare())
    again = pool_of(anchors_of(guided_teacher(), conditions, tmp_path / "two", **settings))
    assert torch.equal(again.eps, whole.eps) and torch.equal(again.signal, whole.signal)
    assert torch.equal(again.chosen["class_labels"], whole.chosen["class_labels"])


def pool_in(trainer: Trainer) -> Pool | None:
    return next(objective.pool for objective in trainer.objectives if isinstance(objective, Anchors))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 16
    path.write_bytes(content)


def changed(path: Path, **tensors: torch.Tensor) -> None:
    """Write some tensors of a file anew, as another program would: with what is said of them as it was."""
    with safe_open(path, "pt") as file:
        found, said = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file({name: value for name, value in {**found, **tensors}.items() if len(value)}, path, said)


DAMAGED_POOLS = [
    flip,
    lambda path: changed(path, signal=torch.full((10, 1, 8, 8), torch.nan)),
    lambda path: changed(path, eps=torch.zeros(0)),
    lambda path: changed(path, eps=torch.zeros(3, 2)),
    lambda path: changed(path, stops=torch.zeros(0)),
    lambda path: changed(path, generator=torch.zeros(5, dtype=torch.uint8)),
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    lambda path: path.write_bytes(b"\xff" * 1000),
]


def test_a_file_that_is_broken_is_made_again(tmp_path: Path) -> None:
    settings = {**FAST, **POOL, "checkpointing_steps": 2, "show_progress": False}
    onestill.distill(teacher_folder(), tmp_path / "one", **settings)
    with pytest.raises(Interruption):
        onestill.distill(teacher_folder(), tmp_path / "two", on_step=interrupt_at(3), **settings)
    path = tmp_path / "two" / "anchors-0.safetensors"
    whole = path.read_bytes()
    for number, broken in enumerate(DAMAGED_POOLS):
        path.write_bytes(whole)
        broken(path)
        with pytest.raises(ValueError, match=r"anchors-0\.safetensors"):
            read_pool(path, {}, torch.Generator())
        folder = copied(tmp_path / "two", tmp_path / f"two-{number}") if number == 0 else tmp_path / "two"
        if number == 0 or broken is DAMAGED_POOLS[-1]:
            with pytest.warns(FoundWarning, match="made again"):
                onestill.distill(teacher_folder(), folder, resume_from_checkpoint="latest", **settings)
            assert same_state(tmp_path / "one" / "checkpoint-4", folder / "checkpoint-4")
            read_hashed(folder / path.name)


def test_a_pool_of_another_content_is_not_taken_for_the_one_the_run_was_begun_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**FAST, **POOL, "checkpointing_steps": 2, "show_progress": False, "output_dir": tmp_path / "run"}
    with pytest.raises(Interruption):
        onestill.distill(teacher_folder(), on_step=interrupt_at(3), **settings)
    path, write = tmp_path / "run" / "anchors-0.safetensors", {"resume_from_checkpoint": "latest"}
    tensors, said = read_hashed(path)
    save_hashed({**tensors, "signal": tensors["signal"] + 1}, path, said)
    with pytest.warns(FoundWarning, match="is not what this run was begun with; it is made again"):
        onestill.distill(teacher_folder(), **settings, **write)
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    path.unlink()
    monkeypatch.setattr(Anchors, "_roll_out", lambda *_: iter([Pool(tensors["eps"], tensors["signal"] + 1, {})]))
    with pytest.raises(RunError, match="is not the same: go on where it was made"):
        onestill.distill(teacher_folder(), **settings, **write)


def test_another_optimiser_takes_the_pool_that_is_there(tmp_path: Path) -> None:
    values = {"teacher": str(teacher_folder()), "output_dir": tmp_path, **FAST, **POOL}
    plain = pool_settings(make_config(values))
    assert pool_settings(make_config({**values, "learning_rate": 1e-2, "max_train_steps": 7})) == plain
    for other in ({"train_batch_size": 8}, {"num_anchors": 11}, {"seed": 1}, {"mixed_precision": "bf16"}):
        assert pool_settings(make_config({**values, **other})) != plain


def test_a_run_begun_again_with_other_settings_makes_a_pool_of_its_own(tmp_path: Path) -> None:
    settings = {**FAST, **POOL, "show_progress": False}
    other = {"guidance_scale": 3.0, "null_class": NULL_CLASS, "class_labels": [1]}
    onestill.distill(teacher_folder("class"), tmp_path / "clean", **other, **settings)
    own = {"guidance_scale": 2.0, "null_class": NULL_CLASS}
    with pytest.raises(Interruption):  # after its pool, before its first checkpoint
        onestill.distill(teacher_folder("class"), tmp_path / "run", on_step=interrupt_at(1), **own, **settings)
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    onestill.distill(teacher_folder("class"), tmp_path / "run", resume_from_checkpoint="latest", **other, **settings)
    assert same_state(tmp_path / "clean" / "checkpoint-4", tmp_path / "run" / "checkpoint-4")


def test_anchors_pull_the_student_to_the_teachers_images(tmp_path: Path) -> None:
    settings = {**FAST, "max_train_steps": 25, "train_batch_size": 8, "learning_rate": 3e-3, "show_progress": False}
    teacher = load_teacher(teacher_folder())
    eps = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(9))
    target = teacher_generator(teacher, num_steps=12, solver="midpoint")(eps, {})
    errors = []
    for fraction in (0.0, 0.5):
        run = tmp_path / f"run-{fraction}"
        own = {"anchor_fraction": fraction, "num_anchors": 100}
        onestill.distill(teacher_folder(), run, **{**settings, **own})
        student = restore_student(RunFolder(run), teacher)
        with torch.no_grad():
            errors.append(float((student(eps, None, 0.0, {}) - target.clamp(-10, 10)).square().mean()))
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"anchor_fraction": 0.5, "boundary_weight": 1, "boundary_fraction": 0.9, "train_batch_size": 4},
            "anchor_fraction=0.5 and corrector_fraction=0.25: 2 rows too many are asked for in a batch of 4",
        ),
        ({"anchor_fraction": 1.1}, "anchor_fraction=1.1: must be at most 1"),
        ({"num_anchors": 0}, "num_anchors=0: must be at least 1"),
        ({"num_anchor_steps": 0}, "num_anchor_steps=0: must be at least 1"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_config({"teacher": "digits", "output_dir": "run", **settings})
