"""A run's folder: what lies where in it, and what it says of the run."""

from __future__ import annotations

import functools
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from pydantic import Field

from onestill.core.errors import FoundWarning, SettingError, named
from onestill.core.files import RUN_FILE, check_writable
from onestill.core.reading import OwnFile, read_object
from onestill.objectives.registry import is_map
from onestill.students.model_card import Distilled
from onestill.training.checkpoint import Checkpoint, list_checkpoints, read_checkpoint, read_latest
from onestill.training.config import DistillConfig, make_config

CONFIG_FILE, TEACHER_FILE, PIPELINE_FOLDER, EVALUATION_FOLDER = "config.yaml", RUN_FILE, "pipeline", "evaluation"
"""What a run's folder holds, besides checkpoints, logs and pictures."""
REHEARSAL = ".onestill-rehearsal"
"""The folder of an export that is made for a try and removed; only a killed process leaves it."""


class RunFacts(OwnFile):
    """What a run was distilled from: the teacher's name, its fingerprint, that of the first stage, if there is one.

    And the budget that its length was planned for: its configuration has what came of it. What it was last trained on, and
    with, is said for people.
    """

    fingerprint: str
    teacher: str
    base_student: str | None = None
    budget: str | None = None
    hardware: str = ""
    versions: dict[str, str] = Field(default_factory=dict)


def is_run(folder: Path) -> bool:
    """Return whether a folder is (the beginning of) a run."""
    return (folder / CONFIG_FILE).is_file() or bool(list_checkpoints(folder))


@dataclass(frozen=True)
class RunFolder:
    """A run on disk, in the folder `path`."""

    path: Path

    @classmethod
    def of(cls, folder: Path) -> RunFolder | None:
        """Return the run that a folder is, or is a checkpoint of; None if it is neither."""
        return next((cls(path) for path in (folder, folder.parent) if is_run(path)), None)

    @classmethod
    def around(cls, pipeline: Path) -> RunFolder | None:
        """Return the run that an exported folder lies in, as its `pipeline`; None if it lies elsewhere."""
        pipeline = pipeline.resolve()
        ours = all((pipeline.parent / name).is_file() for name in (CONFIG_FILE, TEACHER_FILE))
        return cls(pipeline.parent) if ours and pipeline.name == PIPELINE_FOLDER else None

    @property
    def pipeline(self) -> Path:
        """Where its exported student is, once it is finished."""
        return self.path / PIPELINE_FOLDER

    @functools.cached_property
    def config(self) -> DistillConfig:
        """Its resolved configuration; ValueError if that is missing or unusable."""
        return make_config({}, self.path / CONFIG_FILE, recorded=True)

    @property
    def distilled(self) -> Distilled:
        """What was distilled into its student, by its configuration."""
        config = self.config
        return Distilled(config.guidance_scale, config.negative_prompt, config.null_class, config.class_labels)

    @property
    def is_map(self) -> bool:
        """Whether its student is trained between any two times, and so takes several steps."""
        return is_map(self.config)

    @functools.cached_property
    def facts(self) -> RunFacts | None:
        """What it was distilled from, by its teacher.json; None if it has none, ValueError if that says nothing."""
        path = self.path / TEACHER_FILE
        return read_object(path, RunFacts) if path.exists() else None

    def checkpoint(self, folder: Path | None = None) -> Checkpoint:
        """Return one of its checkpoint-N folders; the newest that is whole if None, warning of those passed over."""
        if folder is not None:
            return read_checkpoint(folder)
        _, found, messages = read_latest(self.path)
        for message in messages:
            warnings.warn(message, FoundWarning, stacklevel=4)
        return found


def _is_left(name: str) -> bool:
    """Return whether a name is of what only a killed process leaves: a rehearsal, or a file before its rename."""
    return name == REHEARSAL or fnmatchcase(name, ".*.partial-*")


def check_output_dir(folder: Path, *, resuming: bool) -> None:
    """Raise SettingError if a run cannot be written to `folder`, or would overwrite something there."""
    if folder.exists() and not folder.is_dir():
        raise SettingError("output_dir", folder, "is a file")
    if folder.is_dir() and any(not _is_left(path.name) for path in folder.iterdir()):
        if not is_run(folder):
            raise SettingError("output_dir", folder, "holds other files", "name a new or empty folder")
        if not resuming:
            go_on = f"name a new folder, or go on with it: {named('resume_from_checkpoint')} latest"
            raise SettingError("output_dir", folder, "holds another run", go_on)
    check_writable(folder, "output_dir")


def make_output_dir(folder: Path) -> None:
    """Create the run's folder; SettingError if the system refuses."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError("output_dir", folder, f"cannot be written: {error.strerror}") from error


@contextmanager
def removed_if_nothing_came(folder: Path) -> Iterator[None]:
    """Take a run's files away if it ends in an error before anything came of it, so that they block no other run.

    Only of a folder that was empty or not there; pools, which may have taken hours, are kept with all that is there.
    """
    was_there = folder.is_dir()
    is_new = not was_there or not any(folder.iterdir())
    try:
        yield
    except BaseException:
        logs, own = folder / "logs", {CONFIG_FILE, TEACHER_FILE, "logs"}
        if is_new and folder.is_dir() and {p.name for p in folder.iterdir()} <= own and not [*logs.glob("*.*")]:
            for name in (CONFIG_FILE, TEACHER_FILE):
                (folder / name).unlink(missing_ok=True)
            shutil.rmtree(logs, ignore_errors=True)
            if not was_there:
                with suppress(OSError):
                    folder.rmdir()
        raise
