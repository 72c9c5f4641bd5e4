"""The report: a table of samplers beside each other, and always the protocol beneath it."""

import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from onestill.core.errors import SettingError, named
from onestill.core.reading import OwnFile
from onestill.core.writing import write_text, written_into
from onestill.evaluation.rows import EvaluationProtocol, Row
from onestill.evaluation.tables import as_markdown

JSON_NAME = "report.json"
MARKDOWN_NAME = "report.md"


class Report(OwnFile):
    """Rows, the protocol they share, and warnings about both."""

    kind: Literal["onestill.Report"] = "onestill.Report"
    protocol: EvaluationProtocol
    rows: tuple[Row, ...]
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.to_markdown()

    def to_markdown(self) -> str:
        """Return the table, the warnings and the protocol as GitHub-flavoured Markdown."""
        return as_markdown(self)

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> tuple[Path, Path]:
        """Write `report.json` and `report.md` into the folder, which is made if missing, and return their paths.

        Raises:
            SettingError: If there is a report already and `overwrite` is not set.
        """
        target = Path(folder)
        self.check_save(target, overwrite=overwrite)
        with written_into(target) as partial:
            self.write(partial)
        return target / JSON_NAME, target / MARKDOWN_NAME

    def check_save(self, folder: Path, *, overwrite: bool) -> None:
        """Raise SettingError if there is a report already and `overwrite` is not set."""
        existing = [name for name in (JSON_NAME, MARKDOWN_NAME) if (folder / name).exists()]
        if existing and not overwrite:
            todo = f"name another folder, or give {named('overwrite')}"
            raise SettingError("output", folder, f"already holds {' and '.join(existing)}", todo)

    def write(self, folder: Path) -> None:
        """Write `report.json` and `report.md` into a folder that is there."""
        write_text(folder / JSON_NAME, self.model_dump_json(indent=2) + "\n")
        write_text(folder / MARKDOWN_NAME, self.to_markdown())


def package_versions(names: Sequence[str] = ("onestill", "torch", "diffusers")) -> dict[str, str]:
    """Return the installed versions of the packages, for `EvaluationProtocol.versions`."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
