"""Files of tensors, which other users of a machine may read as they may read any other file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the mode that new files get."""
    save_file(dict(tensors), path, metadata)
    set_usual_mode(path)


def set_usual_mode(path: Path) -> None:
    """Give a safetensors file, or each in a folder, the mode that new files get there.

    safetensors writes a temporary file, readable by its owner alone, and renames it: without this nobody else could
    load what is shared with them.
    """
    # The umask can only be read by setting it, which another thread might notice: an empty file shows what it does.
    folder = path if path.is_dir() else path.parent
    probe = folder / f".{path.name}.mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for file in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
        file.chmod(mode)
