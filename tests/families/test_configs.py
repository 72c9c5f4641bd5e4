"""The shipped configurations: each parses as settings, its command as a command, and fits the class of teacher that it names."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import diffusers
import pytest
import typer
from pipelines import build
from runs_helpers import call_cli, teacher_folder
from test_conformance import perturbed, teacher_of

from onestill import cli
from onestill.core.errors import SettingError
from onestill.core.settings import find_config, make, read_yaml
from onestill.data.prompt_pool import refuse_prompts
from onestill.export.export import export_student
from onestill.teachers.load import EMBEDDED, FAMILY_OF_PIPELINE
from onestill.teachers.pixel import PIPELINES
from onestill.training.config import DistillConfig

ROOT = Path(__file__).parents[2]
FOLDER_OF_CONFIGS = ROOT / "src" / "onestill" / "configs"
CONFIGS = sorted(FOLDER_OF_CONFIGS.glob("*.yaml"))
# A tiny pipeline of each config's class, and what makes the config small enough for it.
TINY = {
    "cifar10": ("", []),
    "dit-xl": ("dit", []),
    "flux": ("flux", ["--height", 16, "--width", 16, "--max_sequence_length", 16]),
    "if-xl": ("if", []),
    "if-xl-stage2": ("if-super-resolution", []),
    "pixart": ("pixart-alpha", []),
    "sd15": ("sd-epsilon", []),
    "sd21-base": ("sd-epsilon", []),
    "sd3": ("sd3", []),
    "sdxl": ("sdxl-zeros", []),
}
each = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def header(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line[2:] for line in lines[: next(i for i, x in enumerate(lines) if not x.startswith("#"))])


def commands(path: Path) -> list[list[str]]:
    return [shlex.split(line)[1:] for line in header(path).splitlines() if line.strip().startswith("onestill ")]


def pipeline_of(path: Path) -> str:
    return re.findall(r"^pipeline: (\w+)$", header(path), re.MULTILINE)[0]


def parsed(words: list[str]) -> dict[str, Any]:
    """Return what the command line makes of a command, without running it."""
    group: Any = typer.main.get_command(cli.app)
    command: click.Command = group.commands[words[0]]
    return {k: v for k, v in command.make_context(words[0], words[1:]).params.items() if v not in (None, [], False)}


def export_of_stage_1(folder: Path) -> Path:
    export_student(perturbed(teacher_of("if")), folder)
    return folder


def test_there_are_configs_and_a_table_of_them() -> None:
    names = {path.stem for path in CONFIGS}
    assert names == {*TINY, "digits", "glyphs"}
    table = (ROOT / "docs" / "guide" / "configs.md").read_text(encoding="utf-8")
    for path in CONFIGS:
        teacher = read_yaml(path)["teacher"]
        assert f"| `{path.stem}` | {'embedded' if teacher in EMBEDDED else f'`{teacher}`'} " in table


def test_a_config_is_found_by_its_name_and_a_file_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sd15").mkdir()  # the folder of a run may have the config's name
    assert find_config("sd15") == FOLDER_OF_CONFIGS / "sd15.yaml"
    Path("sdxl").write_text("seed: 1\n")
    assert find_config("sdxl") == Path("sdxl") and find_config("no/such") == Path("no/such")
    with pytest.raises(SettingError, match="config='sd51'.*did you mean sd15"):
        find_config("sd51")


@each
def test_a_config_is_settings_for_a_teacher_that_anybody_has(path: Path) -> None:
    config = make(DistillConfig, {"output_dir": "run"}, path)
    assert config.teacher in EMBEDDED or re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", config.teacher)
    # Folders and files are the user's, and so is where it runs.
    for name in ("output_dir", "prompt_file", "cache_dir", "prompt_cache_dir", "device", "resume_from_checkpoint"):
        assert name not in read_yaml(path)
    assert pipeline_of(path) in {*FAMILY_OF_PIPELINE, *PIPELINES} and hasattr(diffusers, pipeline_of(path))


@each
def test_a_config_says_what_has_been_run(path: Path) -> None:
    text = " ".join(header(path).split())
    assert "Hardware: " in text
    if path.stem not in EMBEDDED:
        assert "memory and speed not measured" in text and "Not yet run on the published weights" in text


@each
def test_its_commands_are_commands(path: Path) -> None:
    assert commands(path)
    for words in commands(path):
        given = parsed(words)
        assert str(given["config"]) == path.stem
        settings = {name: value for name, value in given.items() if name in DistillConfig.model_fields}
        config = make(DistillConfig, settings, given["config"])
        assert config.output_dir.parts[0] == "runs"
        family = FAMILY_OF_PIPELINE.get(pipeline_of(path))
        if family is None or family.prompt != "prompt":
            refuse_prompts(config)
        else:
            assert config.prompt_file == Path("prompts.txt") or EMBEDDED[config.teacher].prompts


@each
def test_a_config_says_what_its_prompts_take_on_disk(path: Path) -> None:
    config = make(DistillConfig, {"output_dir": "run"}, path)
    family = FAMILY_OF_PIPELINE.get(pipeline_of(path))
    if path.stem in EMBEDDED or family is None or family.prompt != "prompt":
        assert "Prompt cache" not in header(path) and config.num_prompts is None
        return
    ((num, numbers, said),) = re.findall(
        r"^Prompt cache: ([\d,]+) prompts x ([\d x+()]+) x 4 bytes = ([\d.]+) GB", header(path), re.M
    )
    assert config.num_prompts == int(num.replace(",", ""))
    row = eval(numbers.replace(" x ", " * "))
    assert f"{config.num_prompts * row * 4 / 1e9:.1f}" == said and float(said) <= 50
    # As many parts as the tiny pipeline of that class has conditions, and of the same kinds.
    teacher = teacher_of(TINY[path.stem][0])
    assert numbers.count("+") + 1 == len(teacher.prompt_rows(teacher.example_cond)) + (path.stem == "sd3")


@pytest.mark.parametrize("name", EMBEDDED)
def test_what_is_embedded_is_set_as_for_the_numbers(name: str) -> None:
    source = (ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8")
    config = read_yaml(FOLDER_OF_CONFIGS / f"{name}.yaml")
    found = re.search(r"SETTINGS: dict\[str, Any\] = (\{.*?\})", source, re.DOTALL)
    assert found and {"teacher": name, **eval(found.group(1))} == config


@pytest.mark.parametrize("name", ["digits", "glyphs"])
def test_what_is_embedded_would_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (words,) = commands(FOLDER_OF_CONFIGS / f"{name}.yaml")
    outcome = call_cli(*words, "--output_dir", tmp_path / "run", "--prompt_cache_dir", tmp_path / "cache", "--dry_run")
    if name == "digits":  # which takes no prompts
        assert outcome.code == 2 and "--prompt_cache_dir" in outcome.words
        outcome = call_cli(*words, "--output_dir", tmp_path / "run", "--dry_run")
    assert outcome.code == 0 and "dry run: every setting is usable" in outcome.words, outcome.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", TINY)
def test_a_config_fits_the_class_it_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its very settings, on a tiny pipeline of that class: guidance, LoRA, checkpointing, prompts, start level.

    Less the rank of a LoRA, which no layer of so small a network has.
    """
    monkeypatch.chdir(ROOT)
    path, (kind, small) = FOLDER_OF_CONFIGS / f"{name}.yaml", TINY[name]
    words = commands(path)[0]
    teacher = teacher_folder("epsilon")
    if kind:
        teacher = tmp_path / "teacher"
        pipeline = build(kind)
        assert type(pipeline).__name__ == pipeline_of(path)
        pipeline.save_pretrained(teacher)
    (tmp_path / "p.txt").write_text("a photo\na drawing\n")
    own: list[object] = ["--prompt_file", tmp_path / "p.txt", "--prompt_cache_dir", tmp_path / "cache"]
    text = "--prompt_file" in words
    lora = () if read_yaml(path).get("lora_rank") is None else ("--lora_rank", 4)
    if "--base_student" in words:
        own += ["--base_student", export_of_stage_1(tmp_path / "base")]
    outcome = call_cli(
        *words, "--teacher", teacher, "--output_dir", tmp_path / "run", "--device", "cpu", *(own if text else []), *small,
        *lora, "--dry_run",
    )  # fmt: skip
    assert outcome.code == 0 and "dry run: every setting is usable" in outcome.words, outcome.err
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()
