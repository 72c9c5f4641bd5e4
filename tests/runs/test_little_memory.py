"""Too little memory is one line: what was asked for, what is predicted, and which settings take less."""

from __future__ import annotations

import errno
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from runs_helpers import FAST, as_flags, call_cli, finished_run, go_on_with, teacher_folder

import onestill
from onestill.core.memory import OutOfMemory, enough_memory, is_out_of_memory
from onestill.core.reading import loading
from onestill.evaluation.comparison import Comparison
from onestill.export.pixel import PixelFormat
from onestill.runs import rehearsal
from onestill.sampling import explore
from onestill.training.trainer import Trainer

CPU = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
ERRORS = [
    RuntimeError(f"{CPU}2500000000 bytes. Error code 12 (Cannot allocate memory)"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.33 GiB. GPU 0 has a total capacity of 79.11 GiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB). Tried to allocate 2.00 GB on private pool."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]


def failing(error: BaseException) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_every_allocator_is_understood(error: Exception) -> None:
    assert is_out_of_memory(error)
    text = r"^not enough memory for it.*; 3 GB are usual; take less$"
    with pytest.raises(OutOfMemory, match=text) as caught, enough_memory("it", "take less", lambda: "3 GB are usual"):
        raise error
    assert ("asked for" in str(caught.value)) is ("allocate 2" in str(error) or "allocate 2." in str(error))
    with pytest.raises(type(error)), loading("x"):
        raise error


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2"), KeyError("memory"), ValueError("out of memory")])
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)), enough_memory("it", "take less"):
        raise error


@pytest.mark.parametrize("error", ERRORS[:2], ids=["cpu", "cuda"])
def test_training(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "update", failing(error))
    flags = as_flags({**FAST, "train_batch_size": 4096, "mixed_precision": "bf16"})
    outcome = call_cli("distill", "--teacher", teacher_folder(), "--output_dir", tmp_path / "run", *flags)
    assert outcome.code == 1 and "Traceback" not in outcome.err
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("stopped: ")]
    assert line.startswith("stopped: not enough memory for --train_batch_size 4,096 of 1 x 8 x 8 (2.")
    assert "; a step takes about " in line and " GB, as onestill inspect says" in line
    lower = "lower --train_batch_size and raise --gradient_accumulation_steps as much"
    assert line.endswith(f"; {lower}, or give --gradient_checkpointing or --lora_rank 64 or --num_ema_snapshots 0")
    assert not (tmp_path / "run").exists()


def test_a_run_with_its_pool_goes_on_with_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "update", failing(ERRORS[0]))
    flags = as_flags({**FAST, "train_batch_size": 8, "anchor_fraction": 0.5, "num_anchors": 4, "num_anchor_steps": 1})
    outcome = call_cli("distill", "--teacher", teacher_folder(), "--output_dir", tmp_path / "run", *flags)
    monkeypatch.undo()
    again = go_on_with(outcome.err)
    assert again[-4:] == ["--train_batch_size", "4", "--gradient_accumulation_steps", "2"]
    assert call_cli(*again).code == 0


def test_in_python_it_names_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "update", failing(ERRORS[0]))
    with pytest.raises(OutOfMemory, match=r"for train_batch_size 4 of .*; lower train_batch_size"):
        onestill.distill(teacher_folder(), tmp_path / "run", show_progress=False, **FAST)


@pytest.mark.parametrize(
    ("owner", "name", "command", "words"),
    [
        (explore, "samples", "sample --output OUT/x.png --batch_size 9", "drawing 9 images at once"),
        (Comparison, "run", "evaluate --output OUT/x --batch_size 9 --num_samples 16", "comparing 9 images at once"),
        (PixelFormat, "check", "export --output OUT/x", "the export"),
        (rehearsal, "export_student", "distill --output_dir OUT/x", "exporting a student of"),
    ],
    ids=["sample", "evaluate", "export", "rehearsal"],
)
def test_other_commands(
    owner: Any, name: str, command: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, failing(ERRORS[0]))
    who = ["--teacher", teacher_folder()] if "distill" in command else ["--student", finished_run()]
    outcome = call_cli(*command.replace("OUT", str(tmp_path)).split(), *who, "--device", "cpu")
    assert outcome.code == 1 and "Traceback" not in outcome.err, outcome
    assert f"error: not enough memory for {words}" in outcome.words
    assert list(tmp_path.iterdir()) == []


def test_a_batch_that_does_not_fit(tmp_path: Path) -> None:
    # The system's own refusal, not a patch: so much address space and no more.
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + 300 * 2**20, hard))
    try:
        flags = as_flags({**FAST, "train_batch_size": 100_000})
        outcome = call_cli("distill", "--teacher", teacher_folder(), "--output_dir", tmp_path / "run", *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert outcome.code == 1 and "Traceback" not in outcome.err, outcome
    assert "stopped: not enough memory for --train_batch_size 100,000 of 1 x 8 x 8" in outcome.words
    assert "a step takes about" in outcome.words
