"""What some formats are told besides, and which."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from onestill.core.errors import SettingError, named

USED_BY = {"half": ("onnx", "browser"), "onnxruntime_web": ("browser",)}
"""The formats that use a setting; it is refused beside others alone."""


@dataclass(frozen=True)
class Options:
    """What some formats are told besides, as `ExportConfig` has it."""

    half: bool = False
    onnxruntime_web: Path | None = None

    def of(self, format: str) -> Options:
        """Return what one format of several is told: what it uses of it."""
        return Options(**{name: getattr(self, name) for name, users in USED_BY.items() if format in users})

    def refuse_unused(self, formats: Collection[str | None]) -> None:
        """Raise SettingError if one is given that none of some formats uses."""
        for name, users in USED_BY.items():
            if (value := getattr(self, name)) and not set(users) & set(formats):
                known = f"format{'s' if len(users) > 1 else ''} {' and '.join(users)}"
                raise SettingError(
                    name, value, f"is of the {known}", f"give {named('format')} {users[0]}, or leave it out"
                )
