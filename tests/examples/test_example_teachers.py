"""The two small teachers of the benchmark of recipes, from script to a student, and the benchmark's own arithmetic."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import onestill
from onestill.teachers.base import Teacher
from onestill.training.config import make_config

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """benchmarks/recipes.py, which makes both teachers importable."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    return importlib.import_module("recipes")


def distilled(teacher: Teacher | Path, folder: Path) -> onestill.RunResult:
    """Distil a few steps, exported and checked."""
    settings = {"max_train_steps": 2, "train_batch_size": 4, "num_teacher_steps": 1, "device": "cpu"}
    return onestill.distill(teacher, folder, show_progress=False, **settings)  # type: ignore[arg-type]


def test_ddpm_teacher_is_a_stock_folder_with_linear_betas(benchmark: ModuleType, tmp_path: Path) -> None:
    sys.modules["ddpm16"].main(
        ["--output_dir", str(tmp_path), *["--max_train_steps", "2", "--num_masks", "10", "--num_sample_images", "2"]]
    )
    index = json.loads((tmp_path / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == "DDPMPipeline"
    teacher = onestill.load_teacher(tmp_path)
    assert teacher.spec.prediction_type == "epsilon"
    assert teacher.spec.sample_shape == (3, 16, 16)
    assert teacher.spec.num_classes is None
    assert teacher.spec.t_max < 1  # epsilon cannot start where hardly any signal is left
    assert (tmp_path / "samples.png").is_file()
    assert distilled(tmp_path, tmp_path / "run").export_error is not None


def test_shapes_are_seeded_and_of_one_colour_on_grey(benchmark: ModuleType) -> None:
    ddpm16 = sys.modules["ddpm16"]
    pictures = ddpm16.render(20, 7)
    assert torch.equal(pictures, ddpm16.render(20, 7))
    assert not torch.equal(pictures, ddpm16.render(20, 8))
    assert pictures.shape == (20, 3, 16, 16)
    assert torch.allclose(pictures[:, :, 0, 0], torch.tensor(ddpm16.BACKGROUND / 127.5 - 1))
    colors = torch.tensor(ddpm16.COLORS) / 127.5 - 1
    # The middle of a disc (the first kind of every five) is its colour.
    gaps = (pictures[::5, :, 8, 8][:, None] - colors).abs().amax(2)
    assert (gaps.min(1).values < 1e-5).all()


def test_flow_teacher_is_a_network_of_ones_own(benchmark: ModuleType, tmp_path: Path) -> None:
    flow = sys.modules["flow"]
    flow.main(["--output_dir", str(tmp_path), *["--max_train_steps", "2", "--num_sample_images", "2"]])
    teacher = flow.open_teacher(tmp_path)
    assert teacher.spec.prediction_type == "velocity"
    assert teacher.spec.t_max == 1
    assert not [name for name, part in teacher.network.named_modules() if type(part).__module__.startswith("diffusers")]
    # What its network predicts is the velocity: x_0 = x_t - t v.
    x, t = torch.randn(3, *flow.SHAPE), torch.tensor([0.2, 0.5, 1.0])
    expected = x - t[:, None, None, None] * teacher.network(x, t)
    assert torch.allclose(teacher.denoised(x, t, {}), expected, atol=1e-6)
    assert (tmp_path / "samples.png").is_file()
    assert distilled(teacher, tmp_path / "run").export_error is not None


def test_every_recipe_is_a_run(benchmark: ModuleType, tmp_path: Path) -> None:
    bench = benchmark.Bench("digits", lambda: None)
    for name in benchmark.RECIPES:
        settings = benchmark.settings_of(name, 0, bench)
        assert 0 < settings.pop(benchmark.POOL) < 1
        config = make_config({"teacher": "digits", "output_dir": tmp_path, **settings})
        assert config.seed == 0


def test_energy_distance_of_two_gaussians(benchmark: ModuleType) -> None:
    """In one dimension E|x - y| = 2 / sqrt(pi) for N(0, 1), and sqrt(2) times a folded normal's mean between two."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(4000, 1, generator=generator) for _ in range(2))
    assert abs(benchmark.energy_distance(x, y)) < 2e-3
    folded = math.sqrt(2) * (math.sqrt(2 / math.pi) * math.exp(-1 / 4 * 2**2 / 1) + 2 / math.sqrt(2) * math.erf(1))
    expected = 2 * folded - 4 / math.sqrt(math.pi)
    assert benchmark.energy_distance(x, y + 2) == pytest.approx(expected, rel=0.03)


def test_table_is_of_what_is_there(benchmark: ModuleType, tmp_path: Path) -> None:
    args = argparse.Namespace(output_dir=tmp_path, minutes=8.0)
    assert "nothing" in benchmark.table(args)

    def row(distance: float) -> dict[str, float]:
        return {"distance": distance, "recall": 0.5, "precision": 0.5}

    teachers = [{"teacher": name, "rows": {"DDIM-50": row(2), "DDIM-8": row(3)}} for name in ("digits", "flow")]
    runs = [("a", "digits", 0, 4.0), ("a", "digits", 1, 1.0), ("a", "flow", 0, 8.0), ("b", "digits", 0, 2.0)]
    found = [{"recipe": r, "teacher": t, "seed": s, "rows": {"1": row(d), "4": row(d / 2)}} for r, t, s, d in runs]
    for name, lines in {"teachers.jsonl": teachers, "results-8.jsonl": found}.items():
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = benchmark.table(args)
    # The geometric mean of 4 and 1 is 2, of DDIM-50's 2 once: ratios 1 and 4, their mean 2; half of that in 4 steps.
    assert "| a | 2.000 | 1.000 | 1.00 / 0.50 (+0.00) | 4.00 / 2.00 (+0.00) | 2 |" in text
    assert "| teacher, DDIM-8 | 1.500 |" in text
    assert text.index("| a |") < text.index("| b |")  # which has not been run everywhere
