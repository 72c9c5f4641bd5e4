"""Checkpoints: complete or not there, checked when read, rotated."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from onestill.training import checkpoint as room
from onestill.training.checkpoint import (
    STATE_FILE,
    Checkpoint,
    list_checkpoints,
    read_checkpoint,
    read_latest,
    rotate,
    step_of,
    write_checkpoint,
)


def make_checkpoint(number: float = 0.0) -> Checkpoint:
    tensors = {
        "student": {"b": torch.full((2, 3), number), "a": torch.arange(4.0)},
        "random": {"0": torch.Generator().manual_seed(1).get_state()},
    }
    return Checkpoint(tensors, {"progress": {"step": 3}, "rates": [1e-4], "none": None})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip_is_exact(tmp_path: Path) -> None:
    written = make_checkpoint(1 / 3)
    folder = write_checkpoint(tmp_path, 3, written)
    assert folder == tmp_path / "checkpoint-3"
    found = read_checkpoint(folder)
    assert found.values == written.values
    assert set(found.tensors) == set(written.tensors)
    for group, tensors in written.tensors.items():
        assert set(found.tensors[group]) == set(tensors)
        assert all(torch.equal(found.tensors[group][name], value) for name, value in tensors.items())
        assert all(found.tensors[group][name].dtype == value.dtype for name, value in tensors.items())


def test_only_safetensors_and_json_are_written(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 1, make_checkpoint())
    assert names(folder) == ["random.safetensors", "state.json", "student.safetensors"]
    assert json.loads((folder / STATE_FILE).read_text())["step"] == 1


@pytest.mark.parametrize("broken", ["save_tensors", "_sync", "replace"])
def test_crash_while_writing_leaves_nothing_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    write_checkpoint(tmp_path, 1, make_checkpoint(1))

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os if broken == "replace" else room, broken, crash)
        with pytest.raises(KeyboardInterrupt):
            write_checkpoint(tmp_path, 2, make_checkpoint(2))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1"]
    # What the crash left is hidden, does not stop the next write, and goes with the next rotation.
    assert ".checkpoint-2.partial" in names(tmp_path)
    folder = write_checkpoint(tmp_path, 2, make_checkpoint(2))
    assert read_latest(tmp_path)[0] == folder
    rotate(tmp_path, 5, newest=2)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sync, replace = room._sync, os.replace
    monkeypatch.setattr(room, "_sync", lambda path: (events.append(path.name), sync(path))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b))[1])
    write_checkpoint(tmp_path, 4, make_checkpoint())
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert set(before) == {"student.safetensors", "random.safetensors", "state.json", ".checkpoint-4.partial"}
    assert after == [tmp_path.name]


def test_a_checkpoint_written_again_replaces_the_old_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 2, make_checkpoint(1))
    folder = write_checkpoint(tmp_path, 2, make_checkpoint(2))
    assert read_checkpoint(folder).tensors["student"]["b"].unique().tolist() == [2]
    assert names(tmp_path) == ["checkpoint-2"]


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "a flipped bit": lambda folder: flip_a_byte(folder / "student.safetensors"),
    "half a file": lambda folder: cut_in_half(folder / "student.safetensors"),
    "an empty file": lambda folder: (folder / "random.safetensors").write_bytes(b""),
    "a missing file": lambda folder: (folder / "student.safetensors").unlink(),
    "a pipe": lambda folder: ((folder / "random.safetensors").unlink(), os.mkfifo(folder / "random.safetensors")),
    "no state": lambda folder: (folder / STATE_FILE).unlink(),
    "half a state": lambda folder: cut_in_half(folder / STATE_FILE),
    "a state of another kind": lambda folder: (folder / STATE_FILE).write_text("[1]"),
    "a state without files": lambda folder: (folder / STATE_FILE).write_text('{"values": {}}'),
    "nothing": lambda folder: [path.unlink() for path in folder.iterdir()],
    "a file in its place": lambda folder: (shutil.rmtree(folder), folder.write_text("")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_the_one_before_taken(tmp_path: Path, damage: str) -> None:
    good = write_checkpoint(tmp_path, 5, make_checkpoint(5))
    bad = write_checkpoint(tmp_path, 10, make_checkpoint(10))
    DAMAGE[damage](bad)
    with pytest.raises(ValueError, match="checkpoint-10 is corrupt"):
        read_checkpoint(bad)
    folder, found, warnings = read_latest(tmp_path)
    assert folder == good and found.tensors["student"]["b"].unique().tolist() == [5]
    assert len(warnings) == 1 and "checkpoint-10 is corrupt" in warnings[0] and "falling back" in warnings[0]


def test_without_a_whole_checkpoint_there_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no usable checkpoint$"):
        read_latest(tmp_path)
    flip_a_byte(write_checkpoint(tmp_path, 1, make_checkpoint()) / "student.safetensors")
    with pytest.raises(ValueError, match=r"no usable checkpoint: .*student\.safetensors is not what was written"):
        read_latest(tmp_path)


def test_newest_is_by_number_and_other_names_do_not_count(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        write_checkpoint(tmp_path, step, make_checkpoint(step))
    for other in ("checkpoint-best", "checkpoint-", "checkpoint-7.old", "my-checkpoint-500"):
        (tmp_path / other).mkdir()
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [100, 20, 9]


def test_rotation_keeps_the_newest_and_cleans_leftovers(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        write_checkpoint(tmp_path, step, make_checkpoint())
    for left in (".checkpoint-11.partial", ".checkpoint-1.removed"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "half.safetensors").write_text("")
    (tmp_path / "config.yaml").write_text("")
    rotate(tmp_path, 2, newest=10)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-3", "config.yaml"]


def test_rotation_drops_what_could_not_be_read_and_keeps_what_was_written(tmp_path: Path) -> None:
    for step in (8, 12, 20):
        write_checkpoint(tmp_path, step, make_checkpoint())
    (tmp_path / "checkpoint-20" / "student.safetensors").write_text("broken")
    # The run fell back to step 8, went on and was stopped at step 12.
    rotate(tmp_path, 1, newest=12)
    assert names(tmp_path) == ["checkpoint-12"]


def test_rotation_never_shows_half_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        write_checkpoint(tmp_path, step, make_checkpoint())
    seen: list[str] = []
    remove = shutil.rmtree
    # At every removal of files, what still has the name of a checkpoint is whole.
    monkeypatch.setattr(
        shutil,
        "rmtree",
        lambda path, **options: (
            seen.append(Path(path).name),
            [read_checkpoint(folder) for folder in list_checkpoints(tmp_path)],
            remove(path, **options),
        )[2],
    )
    rotate(tmp_path, 1, newest=2)
    assert ".checkpoint-1.removed" in seen and not any(name.startswith("checkpoint") for name in seen)


def test_no_flipped_bit_of_the_state_is_taken(tmp_path: Path) -> None:
    """A flip that leaves the values as they were is none; any other is damage, and never another error."""
    folder = write_checkpoint(tmp_path, 3, make_checkpoint(2.0))
    path, whole, refused = folder / STATE_FILE, (folder / STATE_FILE).read_bytes(), 0
    values = read_checkpoint(folder).values
    draws, said = random.Random(0), set[str]()
    for _ in range(300):
        content = bytearray(whole)
        content[draws.randrange(len(whole))] ^= 1 << draws.randrange(8)
        path.write_bytes(content)
        try:
            assert read_checkpoint(folder).values == values
        except ValueError as error:
            said.add(str(error).partition(": ")[0] if "\n" not in str(error) else str(error))
            refused += 1
    assert refused > 250 and said == {f"checkpoint {folder} is corrupt"}


def test_a_changed_rate_is_damage_and_the_checkpoint_before_is_taken(tmp_path: Path) -> None:
    before = write_checkpoint(tmp_path, 2, make_checkpoint())
    path = write_checkpoint(tmp_path, 3, make_checkpoint()) / STATE_FILE
    path.write_text(path.read_text().replace("0.0001", "0.0002"))
    folder, _, said = read_latest(tmp_path)
    assert folder == before and "state.json is not what was written; falling back to the one before" in said[0]


def test_what_another_version_wrote_is_not_misread(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 3, make_checkpoint())
    state = json.loads((folder / STATE_FILE).read_text())
    del state["format"], state["sha256"]  # as before there was one
    (folder / STATE_FILE).write_text(json.dumps(state))
    with pytest.raises(ValueError, match="checkpoint-3 is of another version of onestill"):
        read_checkpoint(folder)
