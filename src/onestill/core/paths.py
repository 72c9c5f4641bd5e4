"""Paths that people give: what no file system takes, and what lies there that is neither a file nor a folder."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

LONGEST_NAME: Final = 255
"""Bytes of a file's or folder's name that file systems take."""
LONGEST_PATH: Final = 3_800
"""Bytes of a path that systems take (4,096) with the names of what is written below it."""


def name_fault(given: str | Path) -> str:
    """Return why nothing can be named so, wherever it may lie; "" if something can."""
    text = str(given)
    if not text.strip():
        return "is empty; give a path, or leave it out"
    if "\0" in text:
        return "holds a zero byte, which no name does"
    longest = max(len(os.fsencode(part)) for part in text.split("/"))
    if longest > LONGEST_NAME:
        return f"holds a name of {longest:,} bytes, and a file system takes {LONGEST_NAME}"
    if len(os.fsencode(os.path.abspath(text))) > LONGEST_PATH:
        return f"is longer than the {LONGEST_PATH:,} bytes that a path may have"
    if text.startswith("~") and (user := text.split("/")[0]) != "~" and os.path.expanduser(user) == user:
        return f"there is no user {user[1:]}; write ./{user} if that is its name"
    return ""


def place_fault(given: str | Path) -> str:
    """Return why what lies at a path can be neither read nor replaced; "" if it can, or if nothing is there."""
    if fault := name_fault(given):
        return fault
    path = Path(given).expanduser()
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return ""
    except NotADirectoryError:
        file = next((above for above in path.parents if above.is_file()), path.parent)
        return f"cannot be there: {file} is no folder"
    except OSError as error:
        return f"cannot be reached: {(error.strerror or str(error)).lower()}"
    is_folder = stat.S_ISDIR(mode)
    if not is_folder and not stat.S_ISREG(mode):
        return "is a device, a pipe or a socket; give a file or a folder"
    if not os.access(path, os.R_OK | (os.X_OK if is_folder else 0)):
        return "cannot be read: permission denied"
    return ""
