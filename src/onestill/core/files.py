"""Files of tensors: none is a pickle, and other users of a machine may read them as they may read any other file."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from onestill.core.errors import SettingError, named
from onestill.core.paths import place_fault
from onestill.core.reading import loading

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Ends the names of files that are pickles, which can run code when they are opened: none is, but one of a known SHA-256."""
RUN_FILE = "teacher.json"
"""Says what the run in its folder was distilled from."""
MARK_FILE = "onestill.json"
"""Says that its folder holds a one-step student, beside stock files."""
PROBE = ".probe"
"""Ends the name of an empty file that shows the mode of new files and is gone at once; no other file ends so."""
_HASH = "sha256"


def variant_of(name: str) -> str | None:
    """Return the variant that the name of a safetensors file says it is of, such as "fp16", whole or one of its shards."""
    shard = r"(?:-\d{5}-of-\d{5})?"
    found = re.fullmatch(rf"[^.]+?{shard}(?:\.(?P<variant>.+?))?{shard}\.safetensors", name)
    return found and found["variant"]


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the mode that new files get."""
    save_file(dict(tensors), path, metadata)
    set_usual_mode(path)


def save_hashed(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with a hash of all that is in it, onto the disk; `read_hashed` reads it."""
    save_tensors(tensors, path, {**metadata, _HASH: hash_of(tensors, metadata)})
    with path.open("rb") as file:
        os.fsync(file.fileno())


def read_hashed(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return (tensors, metadata) of a file of `save_hashed`; ValueError that names it if it is not what was written."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path} is no file")
    with loading(str(path)):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
        if metadata.pop(_HASH, None) != hash_of(tensors, metadata):
            raise ValueError(f"{path} is not what was written")
    return tensors, metadata


def hash_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return a hash of tensors on the CPU, of their names, dtypes and shapes, and of what is said of them."""
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        value = tensors[name].detach().contiguous()
        digest.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def set_usual_mode(path: Path) -> None:
    """Give a safetensors file, or each in a folder, the mode that new files get there.

    safetensors writes a temporary file, readable by its owner alone, and renames it: without this nobody else could
    load what is shared with them.
    """
    usual = _mode_of_new_files(path if path.is_dir() else path.parent)
    for file in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
        # A file system without modes shows the same one for all files, and may not let any be set.
        if stat.S_IMODE(file.stat().st_mode) != usual:
            file.chmod(usual)


def _mode_of_new_files(folder: Path) -> int:
    """Return the mode that a file gets that is made in a folder now.

    The umask can only be read by setting it, and until it is set back every thread would write under the wrong one;
    read once, at import, it would miss what is set later. An empty file shows what it does, and what the folder's own
    default (an ACL) makes of it.
    """
    # A name that nobody has, not even a killed process of another umask: one that is there would keep its mode.
    probe = folder / f".{uuid.uuid4().hex}{PROBE}"
    try:
        probe.touch(exist_ok=False)
        return stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink(missing_ok=True)


def check_writable(path: Path, setting: str) -> None:
    """Raise SettingError if `path`, which a setting names, or the folder it would be made in, cannot be written to."""
    if fault := place_fault(path):
        raise SettingError(setting, path, fault)
    parent = next(p for p in [path.absolute(), *path.absolute().parents] if p.exists())
    if parent == path.absolute() and not path.is_dir():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK) or os.statvfs(parent).f_flag & os.ST_RDONLY:
        raise SettingError(setting, path, f"cannot be written: {parent} is not writable")


def check_output(folder: Path, there: str, *, overwrite: bool) -> None:
    """Raise SettingError if `output`, a folder, cannot be written to, or holds what is `there` and is not to be replaced."""
    if folder.exists() and not folder.is_dir():
        raise SettingError("output", folder, "is a file", "give a folder")
    check_writable(folder, "output")
    if there and not overwrite:
        raise SettingError("output", folder, f"holds {there}", f"name another folder, or give {named('overwrite')}")
