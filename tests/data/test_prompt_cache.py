"""Encoded prompts on disk: found again, never mixed, whole or not there."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from onestill.core.errors import FoundWarning, RunError
from onestill.core.files import PROBE
from onestill.core.tensors import Cond
from onestill.data import prompt_cache
from onestill.data.prompt_cache import PromptCache, PromptCacheError, default_cache_dir
from onestill.data.prompts import Ints, text_key

LIKE = {"states": torch.zeros(1, 3, 2), "pooled": torch.zeros(1, 2, dtype=torch.bfloat16)}


class Encoder:
    """Conditions made of the text's key; counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, texts: Sequence[str]) -> Cond:
        self.asked += texts
        value = torch.tensor([float(text_key(text) % 1000) for text in texts])
        return {
            "states": value[:, None, None].expand(-1, 3, 2) + torch.arange(6.0).reshape(3, 2),
            "pooled": value[:, None].expand(-1, 2).to(torch.bfloat16),
        }


def keys_of(texts: Sequence[str]) -> Ints:
    return np.array([text_key(text) for text in texts], dtype=np.int64)


def fill(cache: PromptCache, texts: Sequence[str], encode: Any = None) -> Encoder:
    encoder = Encoder()
    cache.add(iter(texts), encode or encoder, lambda batch: [len(text) > 8 for text in batch])
    return encoder


TEXTS = [f"prompt {i}" for i in range(100)]


def test_rows_are_found_again_in_any_order_by_another_process_of_thought(tmp_path: Path) -> None:
    cache = PromptCache(tmp_path / "cache", "one", LIKE)
    assert not (tmp_path / "cache").exists() and cache.missing(keys_of(TEXTS)).tolist() == list(range(100))
    assert fill(cache, TEXTS).asked == TEXTS
    again = PromptCache(tmp_path / "cache", "one", LIKE)
    order = [70, 3, 3, 99, 0]
    expected = Encoder()([TEXTS[i] for i in order])
    for name, value in again.rows(keys_of([TEXTS[i] for i in order])).items():
        assert torch.equal(value, expected[name]) and value.dtype == LIKE[name].dtype
    assert again.missing(keys_of(["new", "prompt 5", "new"])).tolist() == [0]
    assert again.num_cut(keys_of(TEXTS)) == 90 and again.num_cut(keys_of(TEXTS[:10])) == 0
    with pytest.raises(KeyError):
        again.rows(keys_of(["new"]))


def test_shards_are_many_and_few_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_cache, "BATCH_SIZE", 2)
    monkeypatch.setattr(prompt_cache, "LARGEST_SHARD", 2)
    cache = PromptCache(tmp_path, "one", LIKE)
    fill(cache, TEXTS)
    assert len(list((tmp_path / "one").iterdir())) == 50
    assert torch.equal(cache.rows(keys_of(TEXTS))["states"], Encoder()(TEXTS)["states"])
    assert len(cache._handles) == prompt_cache.OPEN_SHARDS


def test_another_encoder_is_kept_apart_and_that_is_said(tmp_path: Path) -> None:
    fill(PromptCache(tmp_path, "one", LIKE), TEXTS)
    other = PromptCache(tmp_path, "two", LIKE)
    assert len(other) == 0 and "other text encoders or settings too, which are kept apart: one" in other.messages[0]
    # Somebody who copies the files by hand does not mix them either.
    (tmp_path / "two").mkdir()
    for path in (tmp_path / "one").iterdir():
        (tmp_path / "two" / path.name).write_bytes(path.read_bytes())
    other = PromptCache(tmp_path, "two", LIKE)
    assert len(other) == 0 and "written for another text encoder" in other.messages[0]


def test_a_damaged_shard_is_not_used_and_written_anew(tmp_path: Path) -> None:
    fill(PromptCache(tmp_path, "one", LIKE), TEXTS)
    (path,) = (tmp_path / "one").iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    cache = PromptCache(tmp_path, "one", LIKE)
    assert len(cache) == 0 and f"{path} is not used" in cache.messages[0]
    fill(cache, TEXTS)
    assert len(PromptCache(tmp_path, "one", LIKE)) == 100


def changed(path: Path, **tensors: torch.Tensor) -> None:
    """Write some tensors of a shard anew, as another program would: with what is said of them as it was."""
    with safe_open(path, "pt") as file:
        found, said = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file({**found, **tensors}, path, said)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip(path, -3),
        lambda path: flip(path, 40),
        lambda path: changed(path, states=torch.full((100, 3, 2), torch.nan)),
        lambda path: changed(path, states=torch.zeros(100, 3, 2, dtype=torch.float16)),
        lambda path: changed(path, states=torch.zeros(7, 3, 2)),
        lambda path: changed(path, **{"onestill.keys": torch.zeros(100)}),
        lambda path: changed(path, **{"onestill.cut": torch.zeros(3, dtype=torch.int32)}),
        lambda path: path.unlink(),
        lambda path: (path.unlink(), os.mkfifo(path)),
        lambda path: shutil.rmtree(path.parent),
    ],
)
def test_what_is_not_what_was_written_is_encoded_again(
    tmp_path: Path, damage: Callable[[Path], None], recwarn: pytest.WarningsRecorder
) -> None:
    fill(PromptCache(tmp_path, "one", LIKE), TEXTS)
    (path,) = (tmp_path / "one").iterdir()
    damage(path)
    cache, keys = PromptCache(tmp_path, "one", LIKE), keys_of(TEXTS)
    cache.verify(keys)
    assert len(cache.missing(keys)) == 100
    assert not path.exists() or cache.messages, "it is said"
    if path.is_fifo():
        path.unlink()
    fill(cache, TEXTS)
    cache.verify(keys)
    expected = Encoder()(TEXTS)
    assert all(torch.equal(value, expected[name]) for name, value in cache.rows(keys).items())
    assert all(issubclass(warning.category, FoundWarning) for warning in recwarn)


def test_a_cache_that_vanished_meanwhile_is_one_line(tmp_path: Path) -> None:
    cache = PromptCache(tmp_path, "one", LIKE)
    fill(cache, TEXTS)
    shutil.rmtree(tmp_path / "one")
    with pytest.raises(RunError, match="cannot be read any more: .*; go on with the run, and what is missing is enc"):
        cache.rows(keys_of(TEXTS))


class Crash(BaseException):
    """What a signal raises."""


def test_an_interrupted_encoding_keeps_whole_shards_and_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_cache, "LARGEST_SHARD", 32)
    encoder = Encoder()

    def crash(texts: Sequence[str]) -> Cond:
        if len(encoder.asked) >= 64:
            raise Crash
        return encoder(texts)

    with pytest.raises(Crash):
        fill(PromptCache(tmp_path, "one", LIKE), TEXTS, crash)
    cache = PromptCache(tmp_path, "one", LIKE)
    assert len(cache) == 64 and cache.missing(keys_of(TEXTS)).tolist() == list(range(64, 100))
    assert fill(cache, TEXTS[64:]).asked == TEXTS[64:] and len(cache) == 100


@pytest.mark.parametrize("when", ["writing", "renaming"])
def test_a_full_disk_is_said_and_leaves_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def full(*args: Any, **_: Any) -> None:
        if when == "writing":
            Path(args[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    if when == "writing":
        monkeypatch.setattr(prompt_cache, "save_hashed", full)
    else:
        monkeypatch.setattr(os, "link", full)
        monkeypatch.setattr(os, "replace", full)
    with pytest.raises(PromptCacheError, match=r"prompt_cache_dir=.*: cannot be written: .*No space left on device"):
        fill(PromptCache(tmp_path, "one", LIKE), TEXTS)
    assert list((tmp_path / "one").iterdir()) == []


def test_room_is_asked_for_before(tmp_path: Path) -> None:
    cache = PromptCache(tmp_path / "new", "one", LIKE)
    assert cache.row_bytes == 3 * 2 * 4 + 2 * 2
    cache.check_space(10)
    with pytest.raises(ValueError, match=r"prompt_cache_dir=.*need 28,000,000.0 GB and .* are free; .*num_prompts"):
        cache.check_space(10**15)


def test_what_a_killed_process_left_is_ignored_and_removed_when_old(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    young, old = (tmp_path / "one" / f".{name}-1.partial" for name in ("young", "old"))
    for path in (young, old):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * prompt_cache.STALE_SECONDS,) * 2)
    cache = PromptCache(tmp_path, "one", LIKE)
    assert len(cache) == 0 and cache.messages == []
    fill(cache, TEXTS)
    assert young.exists() and not old.exists()


def test_what_another_process_takes_away_meanwhile_is_nothing_to_stop_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one").mkdir()
    stat, gone = Path.stat, [".other-1.partial", f".other{PROBE}"]
    for name in gone:
        (tmp_path / "one" / name).touch()

    def late(path: Path, **options: Any) -> os.stat_result:
        if path.name in gone:
            path.unlink(missing_ok=True)
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", late)
    fill(PromptCache(tmp_path, "one", LIKE), TEXTS)
    assert len(PromptCache(tmp_path, "one", LIKE)) == 100


def test_no_probe_of_the_mode_looks_like_a_half_written_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch, probes = Path.touch, []
    monkeypatch.setattr(Path, "touch", lambda path, **options: probes.append(path.name) or touch(path, **options))
    fill(PromptCache(tmp_path, "one", LIKE), TEXTS)
    assert probes and not [name for name in probes if name.endswith(".partial")]


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_rows_that_are_there_stay_when_another_run_encodes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def refused(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    if not links:
        monkeypatch.setattr(os, "link", refused)
    first, second = (PromptCache(tmp_path, "one", LIKE) for _ in range(2))
    fill(first, TEXTS)
    before = first.rows(keys_of(TEXTS))
    # On another device, say, or on more threads.
    fill(second, TEXTS, lambda texts: {name: value + 1 for name, value in Encoder()(texts).items()})
    for cache in (first, second, PromptCache(tmp_path, "one", LIKE)):
        cache.refresh()
        assert all(torch.equal(value, before[name]) for name, value in cache.rows(keys_of(TEXTS)).items())
    assert len(list((tmp_path / "one").iterdir())) == 1


def test_conditions_that_are_not_numbers_or_not_alike_are_refused(tmp_path: Path) -> None:
    def broken(texts: Sequence[str]) -> Cond:
        return {**Encoder()(texts), "states": torch.full((len(texts), 3, 2), torch.nan)}

    def longer(texts: Sequence[str]) -> Cond:
        return {**Encoder()(texts), "states": torch.zeros(len(texts), 4, 2)}

    for encode, words in ((broken, "non-finite"), (longer, r"shape \(4, 2\)")):
        with pytest.raises(ValueError, match=words):
            fill(PromptCache(tmp_path, "one", LIKE), TEXTS, encode)
    assert not (tmp_path / "one").exists()


def test_the_default_folder_honours_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "onestill" / "prompts"
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert default_cache_dir() == Path.home() / ".cache" / "onestill" / "prompts"
