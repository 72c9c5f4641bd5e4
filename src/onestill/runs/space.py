"""What a run writes: bytes of its checkpoints, its pools and its export, and whether the disk has room for them."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil

from onestill.core.errors import SettingError, named
from onestill.data.prompt_cache import in_words
from onestill.objectives.registry import OBJECTIVES, rows_of
from onestill.students.student import Student
from onestill.training.averages import snapshot_steps
from onestill.training.config import DistillConfig, num_processes


@dataclass(frozen=True)
class Space:
    """What a run takes on the disk, in bytes; the pictures and logs that it shows are not counted.

    Attributes:
        checkpoint: One checkpoint: the parameters that are trained, two Adam moments, and the averages.
        num_checkpoints: How many of them are there at once, the one that is being written included.
        export: The exported student: its network, and what else the teacher's pipeline has.
        pools: What the objectives keep, such as anchors.
        snapshots: The averages that are kept of the way.
    """

    checkpoint: int
    num_checkpoints: int
    export: int
    pools: int
    snapshots: int = 0

    @property
    def total(self) -> int:
        """All of it at once."""
        return self.num_checkpoints * self.checkpoint + self.export + self.pools + self.snapshots


def space_of(student: Student, config: DistillConfig) -> Space:
    """Return what a run of an untrained student takes on the disk."""
    trained = sum(p.numel() * p.element_size() for p in student.parameters() if p.requires_grad)
    tracks = len(config.ema_tracks)
    written = math.ceil(config.max_train_steps / config.checkpointing_steps)
    kept = min(config.checkpoints_total_limit + 1, written)
    network = sum(p.numel() * p.element_size() for p in student.network.parameters())
    values, rows = 4 * math.prod(student.spec.sample_shape), rows_of(config, config.train_batch_size)
    costs = [kind.cost(config, config.train_batch_size) for kind in OBJECTIVES if rows.get(kind)]
    pools = sum(cost.pool * cost.samples_per_item * values for cost in costs)
    networks = 1 + sum(cost.networks for cost in costs)
    copies = 3 * networks + tracks + (config.ema_target_decay > 0)
    snapshots = len(snapshot_steps(config)) * tracks * trained
    return Space(copies * trained, kept, network + student.teacher.bytes_besides, pools, snapshots)


def check_space(space: Space, folder: Path) -> tuple[str, ...]:
    """Return what to say where a disk may become full; SettingError if one checkpoint and the export have no room."""
    place = next(p for p in [folder.absolute(), *folder.absolute().parents] if p.exists())
    usage, least = shutil.disk_usage(place), space.checkpoint + space.export + space.pools + space.snapshots
    free = usage.free
    if usage.total == 0:  # of a file system that does not say, or holds no files of people's
        _try_folder(place, folder)
        return ()
    todo = f"free some, or name a folder on another disk; {named('lora_rank')} makes both small"
    if free < least:
        averages = f", averages ({in_words(space.snapshots)})" if space.snapshots else ""
        pools = f", the pool of anchors ({in_words(space.pools)})" if space.pools else ""
        parts = (
            f"a checkpoint ({in_words(space.checkpoint)}){averages}{pools} and the export ({in_words(space.export)})"
        )
        todo += f", fewer {named('num_anchors')} a smaller pool" if pools else ""
        todo += f", {named('num_ema_snapshots')} 0 keeps no averages" if averages else ""
        why = f"{parts} do not fit: {in_words(least)} are needed in all, {in_words(free)} are free"
        raise SettingError("output_dir", folder, why, todo)
    if free < space.total:
        needs = f"{space.num_checkpoints} checkpoints, pools, averages and the export take {in_words(space.total)}"
        limit = f"lower {named('checkpoints_total_limit')} or {named('num_ema_snapshots')}, or free some"
        return (f"{folder}: {needs} and {in_words(free)} are free: the run will stop when the disk is full; {limit}",)
    return ()


def check_memory(space: Space) -> None:
    """Raise SettingError if the pools, which are held in memory whole, are larger than that of this machine."""
    # Each process holds its own part, and those of one machine share it.
    here = space.pools * int(os.environ.get("LOCAL_WORLD_SIZE", 1)) // num_processes()
    total = psutil.virtual_memory().total
    if here > total:
        why = f"takes {in_words(here)} of memory as a pool, and this machine has {in_words(total)}"
        raise SettingError("num_anchors", why=why, todo="lower it")


def _try_folder(place: Path, folder: Path) -> None:
    """Raise SettingError if no folder can be made in `place`, where `folder` is to be."""
    try:
        os.rmdir(tempfile.mkdtemp(dir=place))
    except OSError as error:
        raise SettingError("output_dir", folder, f"cannot be written: {error.strerror}") from error
