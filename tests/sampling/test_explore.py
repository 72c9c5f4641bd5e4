"""Interpolation, one noise for all, guidance sweeps and trajectories: the arithmetic, and the ends against `sample`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageSequence
from runs_helpers import NULL_CLASS, call_cli, finished_run, teacher_folder
from safetensors.torch import load_file
from torch import Tensor

import onestill
from onestill.core.tensors import noise
from onestill.runs import load as runs
from onestill.sampling.explore import Sheet, between, slerp

PLACES = torch.linspace(0, 1, 9, dtype=torch.float64)
CLOSE = 1e-5  # the same number sums in another order in a batch of another size


def differ(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().max())


# Arithmetic


@given(st.floats(0.05, 3.0), st.floats(0, 1))
def test_slerp_turns_by_its_share_of_the_angle(angle: float, u: float) -> None:
    start = torch.tensor([2.0, 0.0], dtype=torch.float64)
    end = 2 * torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    (found,) = slerp(start, end, torch.tensor([u], dtype=torch.float64))
    expected = 2 * torch.tensor([math.cos(u * angle), math.sin(u * angle)], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("shape", [(4, 8, 8), (3, 64, 64)])
def test_slerp_of_noise_is_as_long_as_noise(shape: tuple[int, ...]) -> None:
    start, end = noise([0, 1], shape)
    lengths = slerp(start, end, PLACES).flatten(1).norm(dim=1)
    ends = torch.stack([start.norm(), end.norm()])
    # Between those of its ends, and far above the 0.71 of a straight line.
    assert lengths.min() >= 0.995 * ends.min() and lengths.max() <= 1.005 * ends.max()
    assert abs(float(lengths[4]) / math.sqrt(start.numel()) - 1) < 0.1
    assert ((start + end) / 2).norm() < 0.8 * lengths[4]


def test_slerp_ends_are_exact_in_any_precision() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        start, end = noise([0, 1], (3, 5)).to(dtype)
        for dim in (None, -1):
            found = slerp(start, end, PLACES, dim=dim)
            assert found.dtype == dtype and found.shape == (9, 3, 5)
            assert torch.equal(found[0], start) and torch.equal(found[-1], end)


@pytest.mark.parametrize("factor", [1.0, 2.0, -1.0, 0.0])
def test_slerp_is_linear_where_there_is_no_arc(factor: float) -> None:
    (start,) = noise([0], (2, 5))
    for dim in (None, -1):
        found = slerp(start, factor * start, PLACES, dim=dim)
        expected = (1 - PLACES + PLACES * factor).float()[:, None, None] * start
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_slerp_along_an_axis_turns_each_vector_by_its_own_angle() -> None:
    start, end = noise([0, 1], (4, 6))
    end[0] = start[0]
    found = slerp(start, end, PLACES, dim=-1)
    for i in range(4):
        torch.testing.assert_close(found[:, i], slerp(start[i], end[i], PLACES))
    assert torch.equal(found[4, 0], start[0])


def test_conditions_on_the_way() -> None:
    def cond(tokens: int, size: float) -> dict[str, Tensor]:
        mask = (torch.arange(5) < tokens).long()[None]
        return {
            "encoder_hidden_states": torch.full((1, 5, 3), size) + torch.eye(5, 3)[None],
            "encoder_attention_mask": mask,
            "float_mask": mask.float(),
            "seen": mask.bool(),
            "time_ids": torch.tensor([[16.0, 16.0, 0.0]]),
            "guidance": torch.tensor([3.5]),
            "ids": torch.tensor([[tokens]]),
        }

    start, end = cond(2, 1.0), cond(4, -1.0)
    u = torch.tensor([0.0, 0.25, 0.75, 1.0], dtype=torch.float64)
    found = between(start, end, u)
    for name, value in found.items():
        assert len(value) == 4 and value.dtype == start[name].dtype
        assert torch.equal(value[0], start[name][0]) and torch.equal(value[3], end[name][0]), name
    for name in ("encoder_attention_mask", "float_mask", "seen"):
        assert found[name][1].tolist() == found[name][2].tolist() == [1, 1, 1, 1, 0]
    assert torch.equal(found["time_ids"], start["time_ids"].expand(4, 3))
    assert found["guidance"].tolist() == [3.5] * 4 and found["ids"].flatten().tolist() == [2, 2, 4, 4]


# Interpolation


@pytest.mark.parametrize(
    ("source", "labels"),
    [
        ({"student": finished_run}, []),
        ({"student": lambda: finished_run("class") / "checkpoint-4"}, [1]),
        ({"student": lambda: finished_run("drawn"), "guidance_scale": 2.5}, [2]),
        ({"teacher": lambda: teacher_folder("class"), "null_class": NULL_CLASS, "guidance_scale": 2.0}, [0]),
    ],
    ids=["run", "checkpoint", "drawn", "teacher"],
)
def test_both_ends_are_plain_samples(source: dict[str, Any], labels: list[int]) -> None:
    opened = {name: value() if callable(value) else value for name, value in source.items()}
    opened |= {"num_inference_steps": 2} if "teacher" in opened else {}
    walk = onestill.interpolate(
        onestill.load_sampler(**opened), 4, seed=3, to_seed=11, class_labels=labels, batch_size=3
    )
    assert walk.images.shape == (1, 4, 1, 8, 8) and walk.columns == ("seed 3", "", "", "seed 11")
    ends = [onestill.sample(**opened, num_images=1, seed=seed, class_labels=labels)[0] for seed in (3, 11)]
    assert differ(walk.images[0, 0], ends[0]) <= CLOSE and differ(walk.images[0, -1], ends[1]) <= CLOSE
    steps = (walk.images[0, 1:] - walk.images[0, :-1]).flatten(1).norm(dim=1)
    assert (steps > 0).all() and steps.max() < (ends[0] - ends[1]).norm()


def test_the_label_of_the_first_seed_stays() -> None:
    walk = onestill.interpolate(onestill.load_sampler(finished_run("class")), 3, seed=2, to_seed=4)
    end = onestill.sample(finished_run("class"), num_images=1, seed=4, class_labels=[2])
    assert differ(walk.images[0, -1], end[0]) <= CLOSE and walk.title == "from one noise to another: label 2"


# One noise for all


def test_one_noise_for_every_label() -> None:
    sheet = onestill.fixed_noise(onestill.load_sampler(finished_run("class")), seed=5)
    assert sheet.columns == ("label 0", "label 1", "label 2") and sheet.images.shape == (1, 3, 1, 8, 8)
    for label in range(3):
        alone = onestill.sample(finished_run("class"), num_images=1, seed=5, class_labels=[label])
        assert differ(sheet.images[0, label], alone[0]) <= CLOSE
    some = onestill.fixed_noise(onestill.load_sampler(finished_run("class")), seed=5, class_labels=[2, 0], num_images=1)
    assert some.columns == ("label 2",) and differ(some.images[0, 0], sheet.images[0, 2]) <= CLOSE


# Guidance sweeps


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_every_row_of_a_sweep_is_the_sample_at_that_scale(kind: str) -> None:
    where: dict[str, Any] = {"student": finished_run("drawn")}
    if kind == "teacher":
        where = {"teacher": teacher_folder("class"), "null_class": NULL_CLASS, "num_inference_steps": 2}
    scales = [3.0, 1.0, 1.5]
    sheet = onestill.guidance_sweep(onestill.load_sampler(**where), scales, num_images=3, seed=4)
    assert sheet.images.shape == (3, 3, 1, 8, 8) and sheet.rows == ("w = 3", "w = 1", "w = 1.5")
    assert sheet.columns == ("label 1", "label 2", "label 0")
    for row, w in zip(sheet.images, scales, strict=True):
        assert differ(row, onestill.sample(**where, num_images=3, seed=4, guidance_scale=w)) <= CLOSE
    assert differ(sheet.images[0], sheet.images[1]) > 1e-4


# Trajectories


def test_a_trajectory_is_the_samples_at_its_times() -> None:
    times = [1.0, 0.5, 0.0]
    sheet = onestill.student_trajectory(onestill.load_sampler(finished_run("class")), times, num_images=2, seed=7)
    assert sheet.images.shape == (2, 3, 1, 8, 8) and sheet.columns == ("t = 1", "t = 0.5", "t = 0")
    assert sheet.rows == ("seed 7\nlabel 1", "seed 8\nlabel 2")
    for i, t in enumerate(times):
        assert (
            differ(sheet.images[:, i], onestill.sample(finished_run("class"), num_images=2, seed=7, target_time=t))
            <= CLOSE
        )
    assert differ(sheet.images[:, 0], sheet.images[:, 2]) > 1e-4


def test_a_trajectory_keeps_the_guidance_scale() -> None:
    source = onestill.load_sampler(finished_run("drawn"), guidance_scale=3.0)
    sheet = onestill.student_trajectory(source, [0.5, 0.0])
    expected = onestill.sample(finished_run("drawn"), num_images=1, target_time=0.5, guidance_scale=3.0)
    assert differ(sheet.images[:, 0], expected) <= CLOSE and sheet.rows == ("",)


def test_nothing_is_loaded_twice_or_drawn_before_everything_is_known_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    restored: list[Path] = []
    restore = runs.restore_student
    monkeypatch.setattr(runs, "restore_student", lambda run, *a: restored.append(run.path) or restore(run, *a))
    source = onestill.load_sampler(finished_run("drawn"))
    onestill.student_trajectory(source, [1.0, 0.5, 0.25, 0.0])
    assert len(restored) == 1
    monkeypatch.setattr(
        "onestill.sampling.samplers.base.generate_images", lambda *a, **k: pytest.fail("drawn too early")
    )
    with pytest.raises(ValueError, match=r"guidance_scales=\(1.0, 2.0, 9.0\): is outside 1 to 3"):
        onestill.guidance_sweep(source, [1.0, 2.0, 9.0])


# Pictures


def sheet(rows: int, columns: int, *, down: bool = False, words: str = "") -> Sheet:
    images = torch.linspace(-1, 1, rows * columns).reshape(rows, columns, 1, 1, 1).expand(-1, -1, 3, 8, 8)
    names = tuple(f"column {i}" + words * i for i in range(columns))
    return Sheet(images, tuple(f"row {i}" for i in range(rows)), names, "a title", down=down)


def frames(path: Path) -> list[Image.Image]:
    with Image.open(path) as picture:
        assert picture.format == "GIF" and picture.info["loop"] == 0
        return [frame.convert("RGB") for frame in ImageSequence.Iterator(picture)]


@pytest.mark.parametrize(("down", "there"), [(False, 5), (True, 3)])
def test_a_gif_goes_there_and_back(tmp_path: Path, down: bool, there: int) -> None:
    made = sheet(3, 5, down=down, words=" of many words")
    drawn = frames(made.save(tmp_path / "new" / "x.gif"))
    assert len(drawn) == made.num_frames == 2 * there - 2 and len({frame.size for frame in drawn}) == 1
    corner = [frame.getpixel((13, frame.height - 12)) for frame in drawn]  # in the first picture of each
    expected = sheet(3, 5).images[:, 0] if down else sheet(3, 5).images[0]
    shades = [round((float(image[0, 0, 0]) + 1) * 127.5) for image in expected]
    for got, shade in zip(corner, [*shades, *shades[-2:0:-1]], strict=True):
        assert isinstance(got, tuple) and abs(got[0] - shade) <= 2


def test_a_gif_of_an_interpolation_is_the_pictures_alone(tmp_path: Path) -> None:
    walk = onestill.interpolate(onestill.load_sampler(finished_run()), 3, seed=0, to_seed=1)
    drawn = frames(walk.save(tmp_path / "x.gif"))
    assert [frame.size for frame in drawn] == [(128, 128)] * 4


def test_a_sheet_as_other_files(tmp_path: Path) -> None:
    made = sheet(2, 3)
    with Image.open(made.save(tmp_path / "x.png")) as picture:
        assert picture.width > 3 * 112 and picture.height > 2 * 112
    assert torch.equal(load_file(made.save(tmp_path / "x.safetensors"))["images"], made.images.flatten(0, 1))
    assert len(list(made.save(tmp_path / "folder").iterdir())) == 6
    with pytest.raises(ValueError, match="x.png.* exists.*overwrite"):
        made.save(tmp_path / "x.png")
    made.save(tmp_path / "x.png", overwrite=True)
    with pytest.raises(ValueError, match="give a .png, a .gif, a .safetensors, or a folder"):
        made.save(tmp_path / "x.jpg")


# The command line


@pytest.mark.parametrize(
    ("flags", "name", "words"),
    [
        (
            "--student CLASS --interpolate 3 --to_seed 4 --class_labels 1",
            "x.gif",
            "3 images (--interpolate), 4 frames there and back",
        ),
        ("--student CLASS --fixed_noise", "x.png", "3 images (--fixed_noise)"),
        ("--student DRAWN --guidance_scales 1,3 --num_images 2", "x.safetensors", "4 images (--guidance_scales)"),
        (
            "--student DRAWN --target-times 1,0.5,0 --guidance-scale 2",
            "x.gif",
            "3 images (--target_times), 4 frames there and back",
        ),
    ],
)
def test_the_command_line(flags: str, name: str, words: str, tmp_path: Path) -> None:
    given = flags.replace("CLASS", str(finished_run("class"))).replace("DRAWN", str(finished_run("drawn"))).split()
    outcome = call_cli("sample", *given, "--device", "cpu", "--output", tmp_path / name)
    assert outcome.code == 0, outcome.err
    assert f"{words} -> {tmp_path / name}" in outcome.out
    if name == "x.gif":
        assert len(frames(tmp_path / name)) == 4
    if name == "x.safetensors":
        expected = [onestill.sample(finished_run("drawn"), num_images=2, guidance_scale=w) for w in (1.0, 3.0)]
        assert differ(load_file(tmp_path / name)["images"], torch.cat(expected)) <= CLOSE
