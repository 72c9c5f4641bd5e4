"""Encoded prompts on disk, shared between runs: safetensors shards in one folder for each encoder.

A row is found by (encoder, text). Each encoder has its own folder, named by a hash of its weights, so what one
encoder made is never read for another. Shards are written under a hidden name and published when they are whole; one
that is there already stays, so that what a run has read is what it reads again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
import uuid
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from onestill.core.errors import FoundWarning, RunError, SettingError, in_short, named
from onestill.core.files import PROBE, read_hashed, save_hashed
from onestill.core.reading import loading, reason
from onestill.core.tensors import Cond, row_bytes
from onestill.core.writing import writing
from onestill.data.prompts import Ints, text_key

BATCH_SIZE = 32
SHARD_BYTES = 64 * 2**20
LARGEST_SHARD = 4096
OPEN_SHARDS = 16
STALE_SECONDS = 24 * 3600
_KEYS, _CUT = "onestill.keys", "onestill.cut"
_KEY, _CUT_OF = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)


class PromptCacheError(SettingError):
    """The encoded prompts could not be written: most often, the disk is full."""


def default_cache_dir() -> Path:
    """Return $XDG_CACHE_HOME/onestill/prompts, or ~/.cache/onestill/prompts where that is not set."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "onestill" / "prompts"


def in_words(num_bytes: int) -> str:
    """Return a size on disk in words: in GB, or in MB below one."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.2f} MB"


def _published(path: Path) -> tuple[int, str]:
    """Return what shards are ordered by, oldest first; one that is gone meanwhile is first, and cannot be read."""
    with suppress(FileNotFoundError):
        return path.stat().st_mtime_ns, path.name
    return 0, path.name


class PromptCache:
    """The rows that one encoder made. Opening it writes nothing.

    Attributes:
        folder: Folder of this encoder's shards.
        row_bytes: Size of one encoded prompt.
        messages: What was found that is not used, in words.

    Args:
        root: Folder shared by all encoders.
        encoder: What identifies the encoder; becomes the folder's name.
        like: Some row of its conditions: names, shapes and dtypes that every row has.
    """

    def __init__(self, root: Path, encoder: str, like: Cond) -> None:
        self.root, self.encoder, self.folder, self.like = root, encoder, root / encoder, like
        self.row_bytes = row_bytes(like)
        self.messages: list[str] = []
        self._handles: OrderedDict[Path, Any] = OrderedDict()
        self._whole: set[Path] = set()
        self.refresh()
        try:
            others = sorted(p.name for p in root.iterdir() if p.is_dir() and p != self.folder) if root.is_dir() else []
        except OSError as error:
            raise SettingError("prompt_cache_dir", root, f"cannot be read: {reason(error)}") from error
        if others and not len(self):
            listed = ", ".join(others[:3] + (["..."] if len(others) > 3 else []))
            kept = f"{root} holds prompts of other text encoders or settings too, which are kept apart: {listed}"
            self.messages.append(kept)

    def __len__(self) -> int:
        return len(self._keys)

    def refresh(self) -> None:
        """Read which rows the folder holds now; the oldest of equal ones counts, so that resuming reads the same."""
        self._handles.clear()
        self._shards: list[Path] = []
        found: list[tuple[Ints, Ints]] = []
        for path in sorted(self.folder.glob("[!.]*.safetensors"), key=_published):
            try:
                found.append(self._read_index(path))
                self._shards.append(path)
            except ValueError as error:
                self.messages.append(f"{path} is not used: {in_short(error).removeprefix(f'{path} ')}")
        empty = np.zeros(0, dtype=np.int64)
        keys, first = np.unique(np.concatenate([empty, *(k for k, _ in found)]), return_index=True)
        shard = np.repeat(np.arange(len(found), dtype=np.int32), [len(k) for k, _ in found])
        row = np.concatenate([np.arange(len(k), dtype=np.int32) for k, _ in found] or [empty.astype(np.int32)])
        cut = np.concatenate([empty, *(c for _, c in found)])
        self._keys, self._shard, self._row, self._cut = keys, shard[first], row[first], cut[first]

    def _read_index(self, path: Path) -> tuple[Ints, Ints]:
        """Return (keys, which limits each prompt exceeds) of a shard; ValueError if it is not of this encoder."""
        if not path.is_file():  # a pipe would be waited for
            raise ValueError(f"{path} is no file")
        with loading(str(path)), safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("encoder") != self.encoder:
                raise ValueError("it was written for another text encoder")
            keys, cut = file.get_tensor(_KEYS), file.get_tensor(_CUT)
            found = {name: file.get_slice(name) for name in self.like}
            # Of no row, which has the dtype of all, without reading any.
            empty = {_KEYS: keys[:0], _CUT: cut[:0], **{name: part[:0] for name, part in found.items()}}
            shapes = {_KEYS: keys.shape, _CUT: cut.shape, **{name: part.get_shape() for name, part in found.items()}}
            for name, value in {_KEYS: _KEY, _CUT: _CUT_OF, **self.like}.items():
                kind, shape = empty[name].dtype, tuple(shapes[name])
                if (kind, shape) != (value.dtype, (len(keys), *value.shape[1:])):
                    raise ValueError(f"{name} is of {kind} and shape {shape}")
        return keys.numpy(), cut.numpy()

    def verify(self, keys: Ints) -> None:
        """Read every shard with one of these prompts once; what is not what was written goes, and is said.

        Its prompts are missing then. What is found whole is not read again by this object.
        """
        needed = np.unique(self._shard[np.isin(self._keys, keys)])
        damaged = False
        for path in (self._shards[i] for i in needed):
            try:
                if path not in self._whole:
                    read_hashed(path)
            except ValueError as error:
                damaged = True
                with writing(path):
                    path.unlink(missing_ok=True)
                warnings.warn(f"{error}; its prompts are encoded again", FoundWarning, stacklevel=2)
            else:
                self._whole.add(path)
        if damaged:
            self.refresh()

    def missing(self, keys: Ints) -> Ints:
        """Return the indices into `keys` of prompts that are not in the cache, each key once."""
        different, first = np.unique(keys, return_index=True)
        return np.sort(first[~np.isin(different, self._keys)])

    def num_cut(self, keys: Ints, limit: int = 0) -> int:
        """Return how many of `keys` are in the cache and exceed this limit of the encoder, the smallest being 0."""
        return int(np.isin(keys, self._keys[(self._cut >> limit) % 2 == 1]).sum())

    def check_space(self, num: int) -> None:
        """Raise SettingError if the disk has no room for `num` more rows."""
        place = next(p for p in [self.folder.absolute(), *self.folder.absolute().parents] if p.exists())
        free, needed = shutil.disk_usage(place).free, num * self.row_bytes
        if needed > free:
            why = f"{num:,} encoded prompts need {in_words(needed)} and {in_words(free)} are free"
            todo = f"name a folder on another disk, or draw from fewer prompts with {named('num_prompts')}"
            raise SettingError("prompt_cache_dir", self.root, why, todo)

    def add(
        self,
        texts: Iterator[str],
        encode: Callable[[Sequence[str]], Cond],
        cuts: Callable[[Sequence[str]], Sequence[int]],
        *,
        progress: Callable[[int], object] = lambda num: None,
    ) -> None:
        """Encode missing prompts in batches and write them; what was written stays if a later part fails.

        Which limits of the encoder each exceeds is told by `cuts`, bit i for the i-th; `progress` hears how many were
        written.

        Raises:
            PromptCacheError: If a shard cannot be written; nothing half-written is left.
            ValueError: If the conditions of a prompt are not finite, or not of the usual shape.
        """
        size = max(BATCH_SIZE, min(LARGEST_SHARD, SHARD_BYTES // max(1, self.row_bytes)))
        while block := list(islice(texts, size)):
            parts = [block[i : i + BATCH_SIZE] for i in range(0, len(block), BATCH_SIZE)]
            encoded = [self._checked(encode(part), part) for part in parts]
            rows = {name: torch.cat([part[name] for part in encoded]) for name in self.like}
            rows[_KEYS] = torch.tensor([text_key(text) for text in block])
            rows[_CUT] = torch.tensor([int(cut) for part in parts for cut in cuts(part)], dtype=torch.int32)
            self._write(rows)
            progress(len(block))
        self.refresh()

    def _checked(self, cond: Cond, texts: Sequence[str]) -> Cond:
        for name, value in self.like.items():
            rows, usual = cond[name].detach(), tuple(value.shape[1:])
            if rows.shape != (len(texts), *usual):
                found = f"the conditions of {texts[0]!r} have shape {tuple(rows.shape[1:])} and those of other prompts"
                raise ValueError(f"{found} {usual} ({name}): this pipeline's prompts cannot be kept")
            if not rows.isfinite().all():
                gave = "the text encoder gave non-finite numbers for a prompt among"
                raise ValueError(f"{gave} {texts[0]!r} ... ({name})")
        return {name: cond[name].detach().cpu().contiguous() for name in self.like}

    def _write(self, rows: dict[str, Tensor]) -> None:
        name = hashlib.blake2b(rows[_KEYS].numpy().tobytes(), digest_size=8).hexdigest()
        final = self.folder / f"{name}.safetensors"
        partial = self.folder / f".{name}-{uuid.uuid4().hex}.partial"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_stale()
            save_hashed(rows, partial, {"encoder": self.encoder})
            self._publish(partial, final)
        except (OSError, SafetensorError) as error:
            free = shutil.disk_usage(self.folder).free if self.folder.is_dir() else 0
            why = f"cannot be written: {' '.join(str(error).split())} ({in_words(free)} free)"
            todo = "name a folder on another disk; what was encoded before is kept"
            raise PromptCacheError("prompt_cache_dir", self.root, why, todo) from error
        finally:
            partial.unlink(missing_ok=True)

    def _publish(self, partial: Path, final: Path) -> None:
        """Give a whole shard its name, unless another process published the same prompts meanwhile: those rows stay."""
        os.utime(partial)  # the oldest shard counts, by when it could first be read
        try:
            os.link(partial, final)
        except OSError:  # it is there, or this file system has no links
            try:
                self._read_index(final)
            except ValueError:
                os.replace(partial, final)

    def _remove_stale(self) -> None:
        """Remove what a killed process left a day or more ago; a younger one may still be being written."""
        for left in [*self.folder.glob(".*.partial"), *self.folder.glob(f".*{PROBE}")]:
            with suppress(FileNotFoundError):  # its own process was here first
                if time.time() - left.stat().st_mtime > STALE_SECONDS:
                    left.unlink()

    def rows(self, keys: Ints) -> Cond:
        """Return the conditions of prompts by their keys, read from the mapped files; KeyError if one is not there."""
        places = np.searchsorted(self._keys, keys)
        if len(keys) and (places.max() >= len(self._keys) or (self._keys[places] != keys).any()):
            raise KeyError("a prompt is not in the cache")
        read = [self._read_row(self._shards[self._shard[i]], int(self._row[i])) for i in places]
        return {name: torch.cat([row[name] for row in read]) for name in self.like}

    def _read_row(self, shard: Path, row: int) -> Cond:
        if shard not in self._handles:
            try:
                self._handles[shard] = safe_open(shard, "pt")
            except (OSError, SafetensorError) as error:
                gone = f"{shard} was there when the run began and cannot be read any more: {reason(error)}"
                raise RunError(f"{gone}; go on with the run, and what is missing is encoded again") from error
        self._handles.move_to_end(shard)
        while len(self._handles) > OPEN_SHARDS:
            self._handles.popitem(last=False)
        return {name: self._handles[shard].get_slice(name)[row : row + 1] for name in self.like}
