"""Going on with a run: from which checkpoint, and whether it is the same run still."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onestill.core.errors import SettingError, named
from onestill.data.prompt_pool import split_fingerprint
from onestill.objectives.registry import rows_of
from onestill.training.checkpoint import Checkpoint, list_checkpoints, read_checkpoint, read_latest, step_of
from onestill.training.config import DistillConfig, deciding_settings, num_processes, usual_num_anchors, usual_warmup
from onestill.training.trainer import Fingerprints


def made_longer(config: DistillConfig, old: Mapping[str, Any]) -> DistillConfig:
    """Return the configuration of a run that goes on, with what its first length decided where the default is another.

    The warm-up of a short run and the number of its anchors do not grow with it.
    """
    lengths = [steps for steps in (old.get("max_train_steps"), config.max_train_steps) if isinstance(steps, int)]
    values, begun = config.model_dump(), {}
    usual: dict[str, set[Any]] = {
        "lr_warmup_steps": {usual_warmup(steps) for steps in lengths},
        "num_anchors": {usual_num_anchors({**values, "max_train_steps": steps}) for steps in lengths},
    }
    for name, either in usual.items():
        if values[name] != old.get(name) and {values[name], old.get(name)} <= either:
            begun[name] = old[name]
    return config.model_copy(update=begun) if begun and can_be_longer(config) else config


def changed_settings(old: Mapping[str, Any], new: DistillConfig) -> list[str]:
    """Return "name: old -> new" for each setting that must not differ on resume and does.

    A run may become longer where no step knows how many there will be: with a constant rate, no progressive times, and
    no objective that begins after a share of the run.
    """
    values = deciding_settings(new)
    if can_be_longer(new) and old.get("max_train_steps", 0) < new.max_train_steps:
        del values["max_train_steps"]
    # A run of a version without some setting had its default.
    defaults = {k: f.default for k, f in DistillConfig.model_fields.items()}
    old = {name: old.get(name, list(d) if isinstance(d := defaults[name], tuple) else d) for name in values}
    return [f"{name}: {old[name]!r} -> {values[name]!r}" for name in sorted(values) if old[name] != values[name]]


def can_be_longer(config: DistillConfig) -> bool:
    """Return whether no step of a run knows how many there will be."""
    follows = any(kind.follows_length(config) for kind in rows_of(config, config.train_batch_size))
    return not follows and config.lr_scheduler.startswith("constant") and config.time_sampling != "progressive"


def find_resume(
    config: DistillConfig, fingerprints: Fingerprints
) -> tuple[tuple[Path, Checkpoint] | None, tuple[str, ...]]:
    """Return (the checkpoint to go on from or None, messages).

    "latest" in a folder without any checkpoint starts from the beginning, so that one command can be re-queued.
    """
    source = config.resume_from_checkpoint
    if source is None:
        return None, ()
    if source == "latest" and not list_checkpoints(config.output_dir):
        return None, (f"{config.output_dir} holds no checkpoint yet: starting from the beginning",)
    folder, checkpoint, warnings = _read(config, source)
    _check_same_run(config, fingerprints, folder, checkpoint)
    step = checkpoint.values["progress"]["step"]
    newer = [path.name for path in list_checkpoints(config.output_dir) if step_of(path) > step]
    if newer and source != "latest":
        why = f"{config.output_dir} holds newer checkpoints ({', '.join(newer)}) that going on here would overwrite"
        raise SettingError("resume_from_checkpoint", source, why, "move them away first, or use 'latest'")
    return (folder, checkpoint), (*warnings, f"resuming from {folder}")


def _read(config: DistillConfig, source: str) -> tuple[Path, Checkpoint, list[str]]:
    """Return (folder, content, warnings) of the checkpoint that is named."""
    if source == "latest":
        return read_latest(config.output_dir)
    folder = next((path for path in (Path(source), config.output_dir / source) if path.is_dir()), None)
    if folder is None:
        raise SettingError("resume_from_checkpoint", source, "no such folder", "give 'latest' or a checkpoint-N folder")
    return folder, read_checkpoint(folder), []


def _check_same_run(config: DistillConfig, fingerprints: Fingerprints, folder: Path, checkpoint: Checkpoint) -> None:
    """Raise SettingError if a checkpoint is of another run than the configuration's."""

    def other(why: str, todo: str = "") -> SettingError:
        given = config.resume_from_checkpoint
        return SettingError("resume_from_checkpoint", given, f"{folder} was trained {why}", todo)

    values = checkpoint.values
    if values["num_processes"] != (num := num_processes()):
        why = f"by {values['num_processes']} processes, not {num}"
        raise other(why, "each has its own random state, so start as many")
    old, begun = values["config"], Fingerprints(**values["fingerprints"])
    if changes := changed_settings(old, made_longer(config, old)):
        without = f"a constant {named('lr_scheduler')}, and with neither progressive times nor a corrector,"
        longer = f"only a run with {without} can be made longer"
        todo = f"give those, or a new {named('output_dir')}; {longer}"
        raise other(f"with other settings: {'; '.join(changes)}", todo)
    if begun.teacher != fingerprints.teacher:
        raise other(f"on a teacher with other weights ({old['teacher']}) than {named('teacher')} {config.teacher}")
    (old_prompts, old_stage), (prompts, stage) = map(split_fingerprint, (begun.prompts, fingerprints.prompts))
    if old_stage != stage:
        given = f"{named('base_student')} {config.base_student}"
        raise other(f"on the pictures of another student ({old['base_student']}) than {given}")
    if old_prompts != prompts:
        given = f"{named('prompt_file')} {config.prompt_file} gives"
        raise other(f"on other prompts, or on those of another text encoder, than {given}")
