"""Checkpoints: complete, written atomically, checked when read; safetensors and JSON only."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor

from onestill.core.files import save_tensors
from onestill.core.reading import OwnFile, as_model, loading, read_mapping
from onestill.core.writing import writing

STATE_FILE = "state.json"
FORMAT = 6
"""Of the names of groups and values; what another version wrote is refused, not misread."""
Tensors = dict[str, Tensor]


class _State(OwnFile):
    """What state.json holds: hashes of the other files, plain values, and a hash of all that."""

    format: int
    step: Annotated[int, Field(ge=0)]
    files: dict[Annotated[str, Field(pattern=r"^[\w-][\w.-]*\.safetensors$")], str]
    values: dict[str, Any]
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: named groups of tensors, and plain values."""

    tensors: dict[str, Tensors]
    values: dict[str, Any]


def write_checkpoint(output_dir: Path, step: int, checkpoint: Checkpoint) -> Path:
    """Write the folder `checkpoint-{step}`, which is returned, so that it is either complete or not there.

    Everything goes into a hidden folder and to the disk first; the rename at the end is atomic.
    """
    final, partial = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    digests = {}
    for group, tensors in checkpoint.tensors.items():
        path = partial / f"{group}.safetensors"
        save_tensors({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)
        digests[path.name] = _digest(path)
        _sync(path)
    state = {"format": FORMAT, "step": step, "files": digests, "values": checkpoint.values}
    state["sha256"] = _digest_of(state)
    with writing(final):
        (partial / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    _sync(partial / STATE_FILE)
    _sync(partial)
    if final.exists():
        _remove(final)
    os.replace(partial, final)
    _sync(output_dir)
    return final


def read_checkpoint(folder: Path) -> Checkpoint:
    """Return what `folder` holds; ValueError if a file is missing, not what was written, or of another version."""
    try:
        state = _read_state(folder / STATE_FILE)
        for name, digest in state.files.items():
            if not (folder / name).is_file() or _digest(folder / name) != digest:
                raise ValueError(f"{name} is not what was written")
        with loading("a file of tensors"):
            tensors = {name.removesuffix(".safetensors"): load_file(folder / name) for name in state.files}
    except OtherVersionError as error:
        raise ValueError(f"checkpoint {folder} {error}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {folder} is corrupt: {error}") from error
    return Checkpoint(tensors, state.values)


class OtherVersionError(ValueError):
    """A checkpoint is whole, and its names and values are not those of this version."""


def _read_state(path: Path) -> _State:
    found = read_mapping(path)
    rest = {name: value for name, value in found.items() if name != "sha256"}
    of_another = {"files", "values"} <= found.keys() and found.get("format") != FORMAT
    if of_another and found.get("sha256") in (None, _digest_of(rest)):
        raise OtherVersionError("is of another version of onestill: use that one, or distil again")
    if found.get("sha256") != _digest_of(rest):
        raise ValueError(f"{path.name} is not what was written")
    return as_model(found, _State, path.name)


def _digest_of(state: Mapping[str, Any]) -> str:
    """Return a hash of plain values, whatever their layout in a file."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the `checkpoint-N` folders, newest first."""
    found = (p for p in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name))
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """Return N of a `checkpoint-N` folder."""
    return int(folder.name.rsplit("-", 1)[-1])


def read_latest(output_dir: Path) -> tuple[Path, Checkpoint, list[str]]:
    """Return (folder, content, warnings) of the newest checkpoint that is whole; ValueError if there is none."""
    warnings: list[str] = []
    for folder in list_checkpoints(output_dir):
        try:
            return folder, read_checkpoint(folder), warnings
        except ValueError as error:
            warnings.append(f"{error}; falling back to the one before")
    reason = f": {'; '.join(warnings)}" if warnings else ""
    raise ValueError(f"{output_dir} holds no usable checkpoint{reason}")


def rotate(output_dir: Path, limit: int, newest: int) -> None:
    """Remove what is not among the `limit` last checkpoints, and what interrupted writes and removals left.

    A checkpoint of a later step than `newest`, the one just written, is one that could not be read, or the run would
    have gone on from it.
    """
    found = list_checkpoints(output_dir)
    unread = [folder for folder in found if step_of(folder) > newest]
    for folder in [*unread, *found[len(unread) + limit :]]:
        _remove(folder)
    for left in [*output_dir.glob(".checkpoint-*.partial"), *output_dir.glob(".checkpoint-*.removed")]:
        shutil.rmtree(left, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Remove a folder so that nobody sees a half of it under its own name."""
    hidden = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
