"""Files of ours, read back after somebody or something changed them: each command ends in one line that says which."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from pipelines import build
from runs_helpers import FAST, Outcome, call_cli, copied, finished_run, session_folder, snapshot

import onestill
from onestill.core.files import MARK_FILE
from onestill.runs.folder import CONFIG_FILE, TEACHER_FILE
from onestill.students.model_card import CARD_FILE
from onestill.teachers.pipelines.teacher import CALL_FILE

DEEP = '{"a": ' * 200 + "1" + "}" * 200
ANY_JSON = {
    "empty": "",
    "no JSON": "{",
    "a list": "[1]",
    "null": "null",
    "deep": DEEP,
    "deeper than Python's stack": "[" * 100_000,
    "a number of 5,000 digits": '{"teacher": ' + "9" * 5000 + "}",
    "no text": "\udcff\udcfe",
    "an unknown name": '{"__class__": 1}',
}
TEACHER_JSON = {
    **ANY_JSON,
    "an empty object": "{}",
    "a fingerprint that is a number": '{"fingerprint": 1, "teacher": "x"}',
    "a fingerprint that is a list": '{"fingerprint": ["a"], "teacher": "x"}',
    "another fingerprint": '{"fingerprint": "0", "teacher": "x"}',
    "a name that is an object": '{"fingerprint": "0", "teacher": {}}',
    "a base student that is a truth value": '{"fingerprint": "0", "teacher": "x", "base_student": true}',
}
MARK_JSON = {
    **ANY_JSON,
    **{
        f"{name}: {value!r:.20}": {name: value}
        for name, values in {
            "kind": ["another", 1, None],
            "format": [1, [], "x" * 1000],
            "sample_shape": [[], [0], [1e400], ["1"], 3, [10**19], [True], [1] * 100, [3, 9, 9]],
            "head": [[], {}, {"a": 1, "b": 1, "c": 1}, {"self": 1, "b": 1, "c": 1, "a": 1}, {"a": "x"}],
            "target_time": ["0", -1, 2, None, 10**400],
            "guidance_scale": ["1", -1, {}, float("nan")],
        }.items()
        for value in values
    },
}
CALL_JSON = {
    **{name: text for name, text in ANY_JSON.items() if name != "an unknown name"},
    **{
        f"{name}: {value!r:.20}": json.dumps({name: value})
        for name, values in {
            "self": [1, "x"],
            "callback_on_step_end": ["print"],
            "callback": [1],
            "output_type": ["pil"],
            "return_dict": [False],
            "latents": [1],
            "no_such_name": [1],
            "__class__": ["x"],
            "height": [10**19, 0, -8, "16", True, 16.5, None, [16], {}],
            "guidance_rescale": [[1], {"a": 1}, float("inf")],
            "clip_skip": [10**19, 1.5],
            "num_images_per_prompt": [1000],
        }.items()
        for value in values
    },
}
LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 30))
ANY_YAML = {
    "a billion laughs": LAUGHS,
    "a list in itself": "a: &a [*a]",
    "deep": "a: " + "[" * 10_000,
    "an object of Python": "a: !!python/object/apply:os.system ['true']",
    "no date": "a: 2020-99-99",
    "a key twice": "seed: 1\nseed: 2",
    "a number of 5,000 digits": "seed: " + "9" * 5000,
    "no end": "a: [1",
    "a zero byte": "a: \0",
}
CONFIG_YAML = {
    **ANY_YAML,
    "empty": "",
    "a list": "- 1",
    "no text": "\udcff\udcfe",
    **{
        f"{name}: {value!r:.20}": {name: value}
        for name, values in {
            "seed": [10**19, -1, "x", [1], {}, None, 1.5],
            "t_min": [10**19, "x", {"a": 1}],
            "teacher": [1, [], {}, ""],
            "class_labels": ["x", ["x"], [{}], 3],
            "lora_rank": [-1, "big"],
            "self": [1],
            "__init__": [1],
            "1": [1],
        }.items()
        for value in values
    },
}
CARD_YAML = {
    **ANY_YAML,
    **{
        f"{name}: {value!r:.20}": f"onestill_{name}: {json.dumps(value)}"
        for name, values in {
            "guidance_scale": ["x", [1], 1e300, -1, {}, True],
            "negative_prompt": [1, ["x"]],
            "null_class": ["1", -1, 10**19, 1.5],
            "class_labels": ["x", [1.5], [-1], {"a": 1}, [10**19]],
            "thresholding": [1, "static", {}, {"mode": "x", "limit": 1, "ratio": 1}, {"mode": "static", "limit": 1}],
            "noise_level": ["x", -1, 10**19],
            "self": [1],
        }.items()
        for value in values
    },
}


@functools.cache
def exported() -> Path:
    """Return the exported student of a text pipeline."""
    folder = session_folder() / "own-files"
    build("sd-v-zero-snr").save_pretrained(folder / "teacher")
    prompts = folder / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    settings = {**FAST, "max_train_steps": 1, "num_validation_images": 1, "lr_warmup_steps": 0}
    settings |= {"prompt_file": prompts, "prompt_cache_dir": folder / "cache", "show_progress": False}
    onestill.distill(folder / "teacher", folder / "run", **settings)
    return folder / "run" / "pipeline"


def written(folder: Path, name: str, content: str | dict[str, object], to: Path) -> Path:
    """Return a copy of a folder with other content in one of its files, or with some values changed in it."""
    path = copied(folder, to) / name
    if isinstance(content, dict):
        text = path.read_text(encoding="utf-8")
        is_json = path.suffix == ".json"
        values = {**(json.loads(text) if is_json else yaml.safe_load(text)), **content}
        content = json.dumps(values) if is_json else yaml.safe_dump(values)
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    return to


def sampled(folder: Path, tmp_path: Path) -> Outcome:
    return call_cli("sample", "--student", folder, "--device", "cpu", "--output", tmp_path / "x.png", "--num_images", 1)


def assert_one_line(outcome: Outcome, folder: Path, name: str, before: dict[str, str]) -> None:
    assert outcome.code == 2 and outcome.out == "", outcome
    lines = outcome.err.splitlines()
    assert all(line.startswith("error: ") and len(line) < 1000 for line in lines) and len(lines) <= 2, outcome.err
    assert name in outcome.err or str(folder) in outcome.err, outcome.err
    assert snapshot(folder) == before


def every(cases: dict[str, object], number: int) -> list[str]:
    """Return the names of every so-manieth case, and of the first ones, which are of other kinds."""
    names = list(cases)
    return [name for i, name in enumerate(names) if i % number == 0 or i < 3]


@pytest.mark.parametrize("case", TEACHER_JSON)
def test_what_a_run_was_distilled_from(tmp_path: Path, case: str) -> None:
    folder = written(finished_run(), TEACHER_FILE, TEACHER_JSON[case], tmp_path / "run")
    before = snapshot(folder)
    outcome = call_cli("export", "--student", folder, "--output", tmp_path / "out")
    assert_one_line(outcome, folder, TEACHER_FILE, before)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", CONFIG_YAML)
def test_the_configuration_of_a_run(tmp_path: Path, case: str) -> None:
    folder = written(finished_run(), CONFIG_FILE, CONFIG_YAML[case], tmp_path / "run")
    before = snapshot(folder)
    assert_one_line(sampled(folder, tmp_path), folder, CONFIG_FILE, before)


@pytest.mark.parametrize("case", MARK_JSON)
def test_the_mark_of_a_student(tmp_path: Path, case: str) -> None:
    folder = written(finished_run() / "pipeline", MARK_FILE, MARK_JSON[case], tmp_path / "out")
    before = snapshot(folder)
    assert_one_line(sampled(folder, tmp_path), folder, MARK_FILE, before)


@pytest.mark.parametrize("case", CARD_YAML)
def test_the_front_matter_of_a_card(tmp_path: Path, case: str) -> None:
    text = f"---\n{CARD_YAML[case]}\n---\n\nwords\n"
    folder = written(finished_run() / "pipeline", CARD_FILE, text, tmp_path / "out")
    before = snapshot(folder)
    assert_one_line(sampled(folder, tmp_path), folder, CARD_FILE, before)


@pytest.mark.parametrize("case", every(CALL_JSON, 2))
def test_the_call_of_a_student(tmp_path: Path, case: str) -> None:
    folder = copied(exported(), tmp_path / "out")
    (folder / CALL_FILE).write_bytes(CALL_JSON[case].encode("utf-8", "surrogateescape"))
    before = snapshot(folder)
    assert_one_line(sampled(folder, tmp_path), folder, CALL_FILE, before)


def test_a_configuration_of_another_run(tmp_path: Path) -> None:
    folder = written(finished_run(), CONFIG_FILE, {"t_min": 0.25}, tmp_path / "run")
    outcome = call_cli("sample", "--student", folder / "checkpoint-4", "--output", tmp_path / "x.png")
    assert_one_line(outcome, folder, CONFIG_FILE, snapshot(folder))
    assert "does not say what its checkpoint was trained with: t_min: " in outcome.err


def _as_somebody_else(monkeypatch: pytest.MonkeyPatch, hidden: Path) -> None:
    """Let reading one file be refused, as that of another user is, whoever runs the tests."""
    read = Path.read_text

    def refused(path: Path, *args: object, **more: object) -> str:
        if path == hidden:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "read_text", refused)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        (CONFIG_FILE, lambda run, out: ("sample", "--student", run, "--output", out)),
        (TEACHER_FILE, lambda run, out: ("export", "--student", run, "--output", out)),
        (f"pipeline/{MARK_FILE}", lambda run, out: ("sample", "--student", run / "pipeline", "--output", out)),
        (f"pipeline/{CARD_FILE}", lambda run, out: ("sample", "--student", run / "pipeline", "--output", out)),
    ],
)
def test_a_file_that_may_not_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, command: Callable[[Path, Path], tuple[object, ...]]
) -> None:
    folder = copied(finished_run(), tmp_path / "run")
    _as_somebody_else(monkeypatch, folder / name)
    outcome = call_cli(*command(folder, tmp_path / "x.png"))
    assert_one_line(outcome, folder, Path(name).name, snapshot(folder))
    assert "Permission denied" in outcome.err
