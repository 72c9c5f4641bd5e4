"""Everything that can be known to be wrong before a run begins: the machine, the folder, the times, what it resumes.

Each check raises ValueError with what is wrong, what was given and what to do, naming the flag; none writes anything.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from onestill.data.prompt_pool import split_fingerprint
from onestill.runs.folder import is_run
from onestill.runs.resume import changed_settings, made_longer
from onestill.teachers.base import Teacher
from onestill.training.checkpoint import Checkpoint, list_checkpoints, read_checkpoint, read_latest, step_of
from onestill.training.config import DistillConfig


def check_device(name: str) -> None:
    """Raise ValueError if `name` is no device of this machine."""
    if name == "auto":
        return
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: unknown device; use auto, cpu, cuda, cuda:N or mps") from None
    usable = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not usable.get(device.type, False):
        raise ValueError(
            f"--device {name} is not available on this machine (CUDA devices: {torch.cuda.device_count()}); use auto or cpu"
        )


def resolve_device(name: str) -> torch.device:
    """Return the device that a checked name stands for."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def check_count(flag: str, value: int, least: int = 1) -> None:
    """Raise ValueError if the value of a flag that counts something is too small."""
    if value < least:
        raise ValueError(f"--{flag} must be at least {least}, got {value}")


def check_seeds(seed: int, num: int = 1, flag: str = "seed") -> None:
    """Raise ValueError if the seeds seed, ..., seed + num - 1 are not all 64-bit numbers."""
    if not 0 <= seed < 2**63 - num:
        raise ValueError(f"--{flag} must be between 0 and 2^63 minus the number of images, got {seed}")


def check_guidance(guidance_scale: float | None, flag: str = "guidance_scale") -> None:
    """Raise ValueError if a guidance scale is no number from 0 up."""
    if guidance_scale is not None and not 0 <= guidance_scale < math.inf:
        raise ValueError(f"--{flag} must be a number from 0 up, got {guidance_scale}")


def check_tracker(name: str | None) -> None:
    """Raise ValueError if the tracker is unknown to accelerate or not installed."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if name is None or name in [str(getattr(t, "value", t)) for t in get_available_trackers()]:
        return
    known = name in LOGGER_TYPE_TO_CLASS
    hint = (
        f"is not installed: pip install {name}"
        if known
        else f"is unknown; accelerate has {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}"
    )
    raise ValueError(f"--report_to {name} {hint}")


def check_start(teacher: Teacher) -> None:
    """Raise ValueError if a student that starts where the teacher does could not be exported."""
    teacher.check_start()


def check_times(config: DistillConfig, teacher: Teacher) -> None:
    """Raise ValueError if the step size or the cleanest time does not fit the teacher's start level."""
    t_max = teacher.spec.t_max
    if config.t_min >= t_max:
        raise ValueError(f"--t_min {config.t_min:g} must be below the teacher's start level t_max = {t_max:.4g}")
    if config.delta >= t_max - config.t_min:
        raise ValueError(f"--delta {config.delta:g} must be below t_max - t_min = {t_max - config.t_min:.4g}")
    if config.delta < teacher.spec.process.t_min:
        raise ValueError(
            f"--delta {config.delta:g} is below {teacher.spec.process.t_min:g}, one time step of the teacher"
        )


def check_output_dir(folder: Path, *, resuming: bool) -> None:
    """Raise ValueError if a run cannot be written to `folder`, or would overwrite something there."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file")
    if folder.is_dir() and any(folder.iterdir()):
        if not is_run(folder):
            raise ValueError(f"--output_dir {folder} holds other files; name a new or empty folder")
        if not resuming:
            raise ValueError(
                f"--output_dir {folder} holds another run; name a new folder, or go on with it: --resume_from_checkpoint latest"
            )
    check_writable(folder, "output_dir")


def check_writable(path: Path, flag: str) -> None:
    """Raise ValueError if `path`, or the folder it would be made in, cannot be written to."""
    parent = next(p for p in [path.absolute(), *path.absolute().parents] if p.exists())
    if parent == path.absolute() and not path.is_dir():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK) or os.statvfs(parent).f_flag & os.ST_RDONLY:
        raise ValueError(f"--{flag} {path} cannot be written: {parent} is not writable")


def make_output_dir(folder: Path) -> None:
    """Create the run's folder; ValueError if the system refuses."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output_dir {folder} cannot be written: {error.strerror}") from error


def find_resume(
    config: DistillConfig, fingerprint: str, prompts_fingerprint: str = ""
) -> tuple[tuple[Path, Checkpoint] | None, tuple[str, ...]]:
    """Return (the checkpoint to go on from or None, messages).

    "latest" in a folder without any checkpoint starts from the beginning, so that one command can be re-queued.

    Raises:
        ValueError: If no checkpoint is usable, or its teacher or settings are not this run's.
    """
    source = config.resume_from_checkpoint
    if source is None:
        return None, ()
    if source == "latest":
        if not list_checkpoints(config.output_dir):
            return None, (f"{config.output_dir} holds no checkpoint yet: starting from the beginning",)
        folder, checkpoint, warnings = read_latest(config.output_dir)
    else:
        folder, warnings = Path(source), []
        if not folder.is_dir() and (config.output_dir / folder).is_dir():
            folder = config.output_dir / folder
        if not folder.is_dir():
            raise ValueError(
                f"--resume_from_checkpoint {source}: no such folder; give 'latest' or a checkpoint-N folder"
            )
        checkpoint = read_checkpoint(folder)
    values = checkpoint.values
    if changes := changed_settings(values["config"], made_longer(config, values["config"])):
        raise ValueError(
            f"--resume_from_checkpoint {source}: {folder} was trained with other settings: {'; '.join(changes)}. Give those, "
            "or a new --output_dir; only a run with a constant --lr_scheduler and no progressive times can be made longer"
        )
    if values["fingerprints"]["teacher"] != fingerprint:
        raise ValueError(
            f"--resume_from_checkpoint {source}: {folder} was trained on a teacher with other weights "
            f"({values['config']['teacher']}) than --teacher {config.teacher}"
        )
    old_prompts, old_base = split_fingerprint(values["fingerprints"]["prompts"])
    prompts, base = split_fingerprint(prompts_fingerprint)
    if old_base != base:
        raise ValueError(
            f"--resume_from_checkpoint {source}: {folder} was trained on the pictures of another student "
            f"({values['config']['base_student']}) than --base_student {config.base_student}"
        )
    if old_prompts != prompts:
        raise ValueError(
            f"--resume_from_checkpoint {source}: {folder} was trained on other prompts, or on those of another text "
            f"encoder, than --prompt_file {config.prompt_file} gives"
        )
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    if values["num_processes"] != num_processes:
        raise ValueError(
            f"--resume_from_checkpoint {source}: {folder} was trained by {values['num_processes']} processes, not "
            f"{num_processes}; each has its own random state, so start as many"
        )
    newer = (
        [p.name for p in list_checkpoints(config.output_dir) if step_of(p) > values["progress"]["step"]]
        if source != "latest"
        else []
    )
    if newer:
        raise ValueError(
            f"--resume_from_checkpoint {source}: {config.output_dir} holds newer checkpoints ({', '.join(newer)}) that going on "
            "from here would overwrite; move them away first, or use 'latest'"
        )
    return (folder, checkpoint), (*warnings, f"resuming from {folder}")
