"""The settings of sampling: Python, YAML and flags are one model, and every mistake is found before anything loads."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs_helpers import as_flags, call_cli, finished_run
from safetensors.torch import load_file

import onestill
from onestill.core.errors import SettingError
from onestill.core.settings import make
from onestill.sampling.config import DrawSettings, SampleConfig, SamplerSettings, check_interpolation


def test_python_yaml_and_flags_are_one_thing(tmp_path: Path) -> None:
    values: dict[str, Any] = {"num_images": 3, "seed": 4, "batch_size": 2, "device": "cpu"}
    run, output = finished_run("class"), tmp_path / "x.safetensors"
    images = onestill.sample(run, class_labels=[1], **values)
    (tmp_path / "s.yaml").write_text("".join(f"{name}: {value}\n" for name, value in values.items()))
    assert torch.equal(onestill.sample(run, config_file=tmp_path / "s.yaml", class_labels=[1]), images)
    common = ["sample", "--student", run, "--class_labels", 1, "--output", output, "--overwrite"]
    for flags in (as_flags(values), ["--config", tmp_path / "s.yaml"]):
        outcome = call_cli(*common, *flags)
        assert outcome.code == 0, outcome.err
        assert torch.equal(load_file(output)["images"], images)


def test_python_writes_what_the_command_writes(tmp_path: Path) -> None:
    run = finished_run("drawn")
    common: dict[str, Any] = {"num_images": 2, "device": "cpu"}
    images = onestill.sample(run, guidance_scales=[1.0, 3.0], output=tmp_path / "a.png", **common)
    assert images.shape == (4, 1, 8, 8), "row by row"
    command = ["sample", "--student", run, "--guidance_scales", "1,3", "--output", tmp_path / "b.png"]
    assert call_cli(*command, *as_flags(common)).code == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with pytest.raises(SettingError, match="exists; name another, or give overwrite"):
        onestill.sample(run, output=tmp_path / "a.png", **common)


def test_lists_are_texts_with_commas_or_lists() -> None:
    for given in ("1,0.5,0", [1, 0.5, 0]):
        assert make(SampleConfig, {"student": "x", "target_times": given}).target_times == (1.0, 0.5, 0.0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "student and teacher: give one of them"),
        ({"student": "a", "teacher": "b"}, "student='a' and teacher='b'|student and teacher: give one of them"),
        ({"student": "a", "interpolate": 3, "fixed_noise": True}, "interpolate and fixed_noise: give one of them"),
        ({"student": "a", "to_seed": 3}, "to_seed=3: is where interpolate goes to"),
        (
            {"student": "a", "interpolate": 3, "to_seed": 1, "num_images": 2},
            "num_images=2: interpolate 3 says how many",
        ),
        ({"student": "a", "guidance_scales": "1,2", "guidance_scale": 3}, "guidance_scales=.* and guidance_scale=3"),
        ({"student": "a", "target_times": "1,1"}, r"target_times=\(1.0, 1.0\): must be different numbers"),
        ({"student": "a", "height": 3}, "height and width: are given together"),
        ({"student": "a", "height": 8, "width": 8}, "height=8: is for a teacher"),
        ({"teacher": "a", "target_time": 0.5}, "target_time=0.5: is the student's"),
        ({"student": "a", "seed": 2**63 - 3, "num_images": 3}, "seed=.*: must be below"),
        ({"student": "a", "studnet": 3}, "unknown setting 'studnet'; did you mean 'student'"),
    ],
)
def test_what_does_not_go_together(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(SampleConfig, values)


@pytest.mark.parametrize(
    ("to_seed", "prompts", "labels", "words"),
    [
        (None, (), (), "interpolate=3: needs two ends"),
        (None, ("a", "b", "c"), (), "got 3"),
        (1, ("a", "b"), (), "to_seed=1: keeps the prompt"),
        (0, (), (), "to_seed=0: is seed"),
        (1, (), (1, 2), r"class_labels=\[1, 2\]: with interpolate there is nothing between"),
    ],
)
def test_a_way_has_two_ends(to_seed: int | None, prompts: tuple[str, ...], labels: tuple[int, ...], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        check_interpolation(3, make(DrawSettings, {"class_labels": labels}), to_seed, prompts)


def test_every_setting_is_a_flag() -> None:
    shown = set(re.findall(r"--(\w+)", call_cli("sample", "--help").out))
    assert set(SampleConfig.model_fields) <= shown and {"prompt", "config"} <= shown
    assert set(SamplerSettings.model_fields) <= set(SampleConfig.model_fields)


def test_a_mistake_is_said_without_loading_torch() -> None:
    code = (
        "import sys\nfrom onestill import cli\nsys.argv = ['onestill', 'sample', '--num_images', '0']\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    print(end.code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"], done
    assert "--num_images 0: must be at least 1" in done.stderr
