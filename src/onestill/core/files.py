"""Files of tensors, which other users of a machine may read as they may read any other file."""

from __future__ import annotations

import stat
import uuid
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Ends of the names of files that can run code when they are loaded."""
PROBE = ".probe"
"""Ends the name of an empty file that shows the mode of new files and is gone at once; no other file ends so."""


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the mode that new files get."""
    save_file(dict(tensors), path, metadata)
    set_usual_mode(path)


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
