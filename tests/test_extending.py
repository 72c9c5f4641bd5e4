"""Every example of docs/extending.md, put into a copy of the package as the page says, and run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import onestill

ROOT = Path(__file__).parents[1]
PACKAGE = Path(onestill.__file__).parent
TEXT = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
SECTIONS = {section.splitlines()[0]: section for section in TEXT.split("\n## ")[1:]}

# What stands before an example's run, and what must hold after it.
PRELUDE = {
    "An objective": """
from runs_helpers import teacher_folder
teacher = teacher_folder("plain")
""",
    "A family of pipelines": """
from unnamed_pipelines import aura_flow
aura_flow().save_pretrained("teacher")
Path("prompts.txt").write_text("a red cat\\na grey dog\\n")
""",
    "A sampler": "",
    "An export format": "",
}
CHECKS = {
    "An objective": """
from onestill.training.checkpoint import read_latest
assert result.step == 2
held = read_latest(Path("run"))[1].tensors
assert {"correction.psi", "correction.psi-optimizer"} <= set(held), sorted(held)
# Its network goes on with the rest, to the bit.
settings = {"lr_scheduler": "constant", "corrector_fraction": 0.0, "num_anchors": 4, "correction_fraction": 0.25, "train_batch_size": 8, "lr_warmup_steps": 1, "device": "cpu"}
onestill.distill(teacher, "long", max_train_steps=4, **settings)
onestill.distill(teacher, "short", max_train_steps=2, **settings)
onestill.distill(teacher, "short", max_train_steps=4, resume_from_checkpoint="latest", **settings)
one, other = (read_latest(Path(run))[1].tensors for run in ("long", "short"))
assert all(one[group][name].equal(other[group][name]) for group in one for name in one[group])
""",
    "A family of pipelines": """
assert teacher.spec.family == "aura_flow"
assert onestill.sample("run", num_images=1, prompts=["a red cat"]).shape == (1, 3, 16, 16)
""",
    "A sampler": """
assert Path("walk.png").stat().st_size > 1000
""",
    "An export format": """
assert {path.name for path in Path("program").iterdir()} >= {"step.pt2", "onestill.json", "README.md"}
""",
}


def blocks(section: str, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", SECTIONS[section], re.S)


def files_of(section: str) -> dict[str, str]:
    """Return the files of an example: the blocks that begin with a path."""
    found = (re.match(r"# (src/onestill/\S+\.py)\n", block) for block in blocks(section, "python"))
    return {match[1]: match.string for match in found if match}


def registrations(section: str) -> list[tuple[str, list[str]]]:
    """Return (file, lines of the difference) of an example."""
    return [(block.splitlines()[0][2:], block.splitlines()[1:]) for block in blocks(section, "diff")]


def run_of(section: str) -> str:
    (code,) = [block for block in blocks(section, "python") if not block.startswith("# src/")]
    return code


def registered(text: str, lines: list[str]) -> str:
    """Return a file with the added lines of a difference, each behind the line that stands above it there."""
    here, at = text.splitlines(), -1
    for line in lines:
        if line.startswith("+"):
            at += 1
            here.insert(at, line[1:])
        else:
            assert line[1:] in here[at + 1 :], f"no line {line[1:]!r}"
            at = here.index(line[1:], at + 1)
    return "\n".join(here) + "\n"


RUNNER = """
import contextlib, json, os, sys, traceback
from pathlib import Path
import onestill
failed = {}
for name, code in json.load(open("codes.json")).items():
    Path(name).mkdir()
    try:
        with contextlib.chdir(name), contextlib.redirect_stdout(sys.stderr):
            exec(compile(code, name, "exec"), {"Path": Path, "onestill": onestill})
    except Exception:
        failed[name] = traceback.format_exc()
print(json.dumps(failed))
"""


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return what went wrong in each example, all of them in one copy of the package and one process."""
    home = tmp_path_factory.mktemp("extended")
    shutil.copytree(PACKAGE, home / "onestill", ignore=shutil.ignore_patterns("embedded", "__pycache__"))
    (home / "onestill" / "embedded").symlink_to(PACKAGE / "embedded")
    for section in SECTIONS:
        for name, code in files_of(section).items():
            assert not (ROOT / name).exists(), f"{name} is no new file"
            (home / Path(name).relative_to("src")).write_text(code, encoding="utf-8")
        for name, lines in registrations(section):
            path = home / Path(name).relative_to("src")
            path.write_text(registered(path.read_text(encoding="utf-8"), lines), encoding="utf-8")
    codes = {section: "\n".join([PRELUDE[section], run_of(section), CHECKS[section]]) for section in SECTIONS}
    (home / "codes.json").write_text(json.dumps(codes), encoding="utf-8")
    paths = [str(home), str(ROOT / "tests"), str(ROOT / "tests" / "families")]
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", RUNNER]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("section", SECTIONS)
def test_an_example_is_one_short_file_and_its_registration(section: str) -> None:
    ((_, code),) = files_of(section).items()
    assert len(code.splitlines()) < 40
    added = [line for _, lines in registrations(section) for line in lines if line.startswith("+")]
    assert len(registrations(section)) <= 1 and len(added) <= 2, "an import and an entry"


@pytest.mark.parametrize("section", SECTIONS)
def test_an_example_runs(section: str, failed: dict[str, str]) -> None:
    assert section not in failed, failed[section]
