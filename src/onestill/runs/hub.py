"""Exported students on the Hugging Face hub: what may fail is asked before any work, and an upload that fails loses nothing."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from onestill.core.errors import NOT_GIVEN, RunError, SettingError, in_short, named
from onestill.core.files import MARK_FILE
from onestill.core.reading import read_object
from onestill.evaluation.report import JSON_NAME, Report
from onestill.runs.folder import EVALUATION_FOLDER
from onestill.students.mark import read_mark
from onestill.students.model_card import add_results
from onestill.students.settings import HubSettings
from onestill.training.trainer import Trainer

H = TypeVar("H", bound=HubSettings)

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to one that may write"
_EMPTY = (".gitattributes", "README.md", "LICENSE")
"""What a repository may hold that nobody has uploaded to yet."""


class UploadError(RunError):
    """A folder is not on the hub: why, and the command that uploads what is there."""


def addressed(config: H, folder: Path) -> H:
    """Return settings with the whole id of the repository; SettingError if what is there, or missing, speaks against it.

    Nothing is made: the token, the owner's name, the right to write and what the repository holds are asked for.
    """
    if not config.push_to_hub:
        return config
    from huggingface_hub import HfApi, constants

    if constants.is_offline_mode() or getattr(config, "local_files_only", False):
        who = "HF_HUB_OFFLINE" if constants.is_offline_mode() else named("local_files_only")
        raise SettingError("push_to_hub", True, f"{who} forbids the network", "allow it, or upload the folder later")
    api = HfApi()
    with _asking("push_to_hub", True):
        user = api.whoami()
    config = config.model_copy(update={"hub_model_id": _whole_id(config.hub_model_id, folder, str(user.get("name")))})
    _check_right(config, user)
    _check_there(api, config)
    return config


def destination(config: HubSettings) -> str:
    """Return where an addressed folder will be."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{config.hub_model_id}{' (private)' if config.hub_private else ''}"


def create(config: HubSettings) -> None:
    """Make the repository, if it is to be and is not there yet; SettingError if the hub refuses."""
    if not config.push_to_hub or os.environ.get("RANK", "0") != "0":  # one process of a run makes it
        return
    from huggingface_hub import HfApi

    with _asking("hub_model_id", config.hub_model_id):
        HfApi().create_repo(str(config.hub_model_id), private=config.hub_private or None, exist_ok=True)


def tried(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Upload what a run has exported, if it is to be, by its first process; return its `hub_url`, or its `upload_error`."""
    config = trainer.config
    if not config.push_to_hub or not trainer.accelerator.is_main_process:
        return {}
    try:
        return {"hub_url": upload(config, folder, report_of(config.output_dir))}
    except UploadError as error:
        return {"upload_error": error.text}


def upload(config: HubSettings, folder: Path, report: Path | None = None) -> str:
    """Upload an exported folder that has passed its check; return its address on the hub.

    Its card says what an evaluation's `report` measured, if there is one.

    Raises:
        UploadError: If it is not there, or not all of it; nothing is lost here, and the text has the command to go on with.
    """
    from huggingface_hub import HfApi

    name, command = str(config.hub_model_id), shlex.join(["hf", "upload", str(config.hub_model_id), str(folder), "."])
    try:
        if report is not None and (results := _results(report, folder)):
            add_results(folder, name.rpartition("/")[2], results)
        HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message="Student exported by onestill")
    except Exception as error:  # the hub client and its transports raise many unrelated types
        kept = f"{folder} is whole and passed its check; upload it with: {command}"
        raise UploadError(f"the upload to {destination(config)} failed: {_reason(error)}. {kept}") from error
    return destination(config)


def raise_failed(upload_error: str) -> None:
    """Raise what `tried` has told of an upload, if it failed."""
    if upload_error:
        raise UploadError(upload_error)


def report_of(run: Path) -> Path | None:
    """Return the report of a run's evaluation, where the command writes it; None if there is none."""
    path = run / EVALUATION_FOLDER / JSON_NAME
    return path if path.is_file() else None


def _results(report: Path, folder: Path) -> list[dict[str, Any]]:
    """Return what was measured of the student in a folder as the hub's model index has it; [] if it is of another.

    It is of another with other steps, another average of the weights, which a row's name says, or another guidance scale.
    """
    found, mark = read_object(report, Report), read_mark(folder)
    num, scale = (1, None) if mark is None else (mark.num_inference_steps, mark.guidance_scale)
    name = "student" if num == 1 else f"student, {num} steps"
    rows = [row for row in found.rows if row.is_student and (row.name, row.num_steps) == (name, num)]
    if not rows or scale not in (None, found.protocol.guidance_scale):
        return []
    row, protocol = rows[0], found.protocol
    measured = (
        ("frechet_distance", f"Fréchet distance ({protocol.extractor})", row.frechet_distance),
        ("kernel_distance", f"Kernel distance ({protocol.extractor})", row.kernel_distance),
        ("precision", "Precision", row.precision),
        ("recall", "Recall", row.recall),
        ("accuracy", "Label accuracy", row.label_accuracy),
        ("accuracy", "Prompt accuracy", (row.prompt_accuracy or {}).get("all")),
        ("clip_score", f"CLIP score ({protocol.clip_model})", row.clip_score),
    )
    metrics = [{"type": kind, "name": name, "value": value} for kind, name, value in measured if value is not None]
    data = {"type": "generated", "name": f"{protocol.num_images:,} images, against {protocol.reference}"}
    return [{"dataset": data, "metrics": metrics}] if metrics else []


# Before any work


def _whole_id(given: str | None, folder: Path, user: str) -> str:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # which has it, untold

    name = given or folder.absolute().name
    whole = name if "/" in name else f"{user}/{name}"
    try:
        validate_repo_id(whole)
    except HFValidationError as error:
        why = in_short(error, 300) if given else f"the folder's name {name!r} is no name of a repository"
        raise SettingError("hub_model_id", given or NOT_GIVEN, why, "give owner/name") from None
    return whole


def _check_right(config: HubSettings, user: dict[str, Any]) -> None:
    """Raise SettingError if the user's token reads only, or the owner is neither the user nor one of their organisations."""
    owner = str(config.hub_model_id).partition("/")[0]
    owners = [str(user.get("name")), *(str(org.get("name")) for org in user.get("orgs") or [])]
    if owner not in owners:
        why = f"the token is of {owners[0]}, who is no member of {owner}"
        raise SettingError("hub_model_id", config.hub_model_id, why, f"write one of {', '.join(owners)} before the /")
    token = (user.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read" or (token.get("role") == "fineGrained" and not _may_write(token, owner)):
        raise SettingError("push_to_hub", True, f"the token may read and not write in {owner}", LOG_IN)


def _may_write(token: dict[str, Any], owner: str) -> bool:
    """Return whether a token of single rights has that of writing repositories of an owner, or one of theirs."""
    scopes = (token.get("fineGrained") or {}).get("scoped") or []
    of_owner = (scope for scope in scopes if str(scope.get("entity", {}).get("name", "")).partition("/")[0] == owner)
    return any("repo.write" in (scope.get("permissions") or ()) for scope in of_owner)


def _check_there(api: Any, config: HubSettings) -> None:
    """Raise SettingError if the repository is there and not to be written to, public against the settings, or another's."""
    from huggingface_hub.errors import RepositoryNotFoundError

    name = str(config.hub_model_id)
    with _asking("hub_model_id", name):
        try:
            found = api.repo_info(name)
        except RepositoryNotFoundError:
            return
        api.auth_check(name, write=True)
    if config.hub_private and not found.private:
        raise SettingError(
            "hub_private", True, f"{name} is there and public", "make it private on its page, or name another"
        )
    files = [file.rfilename for file in found.siblings or ()]
    others = [file for file in files if file not in _EMPTY]
    if others and not any(file.rpartition("/")[2] == MARK_FILE for file in files):
        raise SettingError(
            "hub_model_id", name, f"holds other files ({others[0]}, ...), and no student", "name another"
        )


@contextmanager
def _asking(setting: str, value: Any) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub client and its transports raise many unrelated types
        if isinstance(error, SettingError):
            raise
        raise SettingError(setting, value, _reason(error)) from error


def _reason(error: BaseException) -> str:
    """Return in a few words why the hub did not do something."""
    from huggingface_hub import errors

    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(isinstance(each, errors.LocalTokenNotFoundError) for each in causes):
        return f"there is no token for the hub; {LOG_IN}"
    for each in causes:
        status = getattr(getattr(each, "response", None), "status_code", None)
        if isinstance(status, int):
            return f"{_STATUS.get(status, 'the hub answers with an error')} ({status}){_said(each)}"
    first = causes[-1]
    if isinstance(first, UnicodeEncodeError):
        return f"the token has a character that no token has; {LOG_IN}"
    if any(isinstance(each, (ConnectionError, TimeoutError)) or _is_of_transport(each) for each in causes):
        return f"the hub cannot be reached, or the connection broke ({in_short(first, 120) or type(first).__name__})"
    return in_short(error, 200) or type(error).__name__


def _is_of_transport(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0].rstrip("0123456789") in ("httpx", "httpcore")


_STATUS = {
    401: f"the hub refuses the token; {LOG_IN}",
    403: "the hub does not let this token write there",
    404: "the hub has no such repository",
    409: "the hub is busy with the same repository",
    413: "the hub takes no files so large, or has no room for them",
    429: "the hub has been asked too often; try again later",
    507: "the hub has no room left for this account",
}


def _said(error: BaseException) -> str:
    """Return the hub's own words, if it has said any."""
    words = getattr(error, "server_message", None)
    plain = re.sub(r"\s+", " ", str(words or "")).strip()
    return f": {plain[:200]}" if plain else ""
