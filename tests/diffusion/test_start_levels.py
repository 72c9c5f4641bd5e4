"""The start level of each kind of teacher: said by inspect, overridden with --t_max, kept in the run and the export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler
from runs_helpers import FAST, as_flags, call_cli, tiny_network

import onestill


@pytest.mark.parametrize(
    ("scheduler", "t_max", "sigma", "reason"),
    [
        (DDPMScheduler(), 0.7691, 0.9987, "the epsilon head divides by alpha"),
        (DDIMScheduler(prediction_type="v_prediction"), 1.0, 1.0, "v_prediction stays bounded"),
        (DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True), 1.0, 1.0, "v_prediction stays bounded"),
        (DDIMScheduler(prediction_type="sample"), 1.0, 1.0, "sample stays bounded"),
        (EDMEulerScheduler(), 1.0, 80.0, "edm stays bounded"),
    ],
    ids=["epsilon", "v", "zero SNR", "x_0", "EDM"],
)  # fmt: skip
def test_it_is_said_and_a_given_one_is_kept(
    scheduler: Any, t_max: float, sigma: float, reason: str, tmp_path: Path, save_pipeline: Callable[..., Path]
) -> None:
    folder = save_pipeline(tmp_path / "teacher", tiny_network(), scheduler)
    flags = ["inspect", "--teacher", folder, "--device", "cpu", "--train_batch_size", 2]
    found = json.loads(call_cli(*flags, "--json").out)
    assert found["t_max"] == pytest.approx(t_max, abs=1e-3) and reason in found["t_max_reason"]
    assert found["sigma_at_t_max"] == pytest.approx(sigma, rel=1e-3)
    given = json.loads(call_cli(*flags, "--json", "--t_max", 0.7).out)
    assert (given["t_max"], given["t_max_reason"]) == (0.7, "given")
    assert given["sigma_at_t_max"] < found["sigma_at_t_max"]
    run = tmp_path / "run"
    own = {**FAST, "max_train_steps": 1, "checkpointing_steps": 1, "lr_warmup_steps": 0, "t_max": 0.7}
    outcome = call_cli("distill", "--teacher", folder, "--output_dir", run, *as_flags(own))
    assert outcome.code == 0 and "start level t = 0.7 (given)" in outcome.words, outcome.err
    assert yaml.safe_load((run / "config.yaml").read_text())["t_max"] == 0.7
    images = [onestill.sample(source, num_images=2, device="cpu") for source in (run, run / "checkpoint-1")]
    assert (images[0] - images[1]).abs().max() <= 1e-4
    resumed = ["distill", "--config", run / "config.yaml", "--resume_from_checkpoint", "latest", "--t_max", 0.6]
    outcome = call_cli(*resumed)
    assert outcome.code == 2 and "t_max: 0.7 -> 0.6" in outcome.words


def test_inspect_prints_it(tmp_path: Path, save_pipeline: Callable[..., Path]) -> None:
    folder = save_pipeline(tmp_path / "teacher", tiny_network(), EDMEulerScheduler())
    out = call_cli("inspect", "--teacher", folder, "--device", "cpu", "--train_batch_size", 2).out
    assert "t_max = 1, alpha = 1, sigma = 80: edm stays bounded at pure noise" in out
