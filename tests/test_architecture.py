"""The order of the rooms, read from the imports themselves; there is no list of exceptions."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import onestill

PACKAGE = Path(onestill.__file__).parent
# From the ground up: a module imports from rows above its own only. Modules of one row do not know each other.
LAYERS = (
    ("tensors", "files", "config", "prompts"),
    ("process", "prompt_cache", "checkpoint", "pictures", "resuming"),
    ("trajectory",),
    ("teachers.base", "objective"),
    (
        "teachers.closed_form",
        "teachers.guidance",
        "teachers.module",
        "teachers.recording",
        "teachers.codec",
        "teachers.encoders",
        "teachers.schedulers",
        "teachers.stock",
        "conditions",
        "card",
    ),
    ("teachers.family", "teachers.tokenizing", "teachers.unet2d"),
    ("teachers.pipeline", "teachers.stable_diffusion", "teachers.flow"),
    ("teachers.probe",),
    (
        "teachers.dit",
        "teachers.pixart",
        "teachers.deepfloyd",
        "teachers.sd3",
        "teachers.flux",
        "teachers.sana",
        "teachers.lumina2",
        "teachers.wan",
        "teachers.stable_audio",
        "teachers.generic",
    ),
    ("lora",),
    ("teachers.load", "student"),
    ("sampler",),
    ("chain", "anchors", "family_export"),
    ("prompt_plan",),
    ("trainer", "export", "checks"),
    ("preparation",),
    ("distillation", "sources"),
    ("exported", "evaluation.heads"),
    (
        "restore",
        "play",
        "inspection",
        "evaluation.classifier",
        "evaluation.metrics",
        "evaluation.report",
        "evaluation.speed",
    ),
    ("runs", "evaluation.features"),
    ("evaluation.pretrained", "evaluation.candidates"),
    ("evaluation.choice", "evaluation.references", "evaluation.clip"),
    ("evaluation.run", "api"),
    ("evaluation.pair",),
    ("onestill",),
    ("demo",),
    ("cli.options", "cli.fields", "cli.output"),
    ("cli.help",),
    ("cli.distill", "cli.inspect", "cli.sample", "cli.evaluate", "cli.export", "cli.demo"),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# Rooms that say what is in them and hold no code.
SIGNS = ("teachers", "evaluation")
# What `import onestill` must not load: seconds of start-up, or not installed at all.
LAZY = ("diffusers", "transformers", "matplotlib", "torchmetrics", "accelerate", "scipy", "pydantic", "typer")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "onestill"


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@functools.cache
def imports_of(name: str) -> set[str]:
    """Return the modules of this package that a module imports, wherever in the file it does so."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import, which this test does not read"
            home = node.module or ""
            targets = [f"{home}.{alias.name}" for alias in node.names]
            found |= {t if t.removeprefix("onestill.") in MODULES else home for t in targets}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    inside = {target for target in found if target == "onestill" or target.startswith("onestill.")}
    return {target.removeprefix("onestill.") for target in inside}


def test_every_module_has_its_place() -> None:
    assert len(MODULES) > 30, "the package must be found for this to be a test"
    assert set(MODULES) - set(SIGNS) == set(LEVEL), "a new file needs a row in LAYERS, and a removed one leaves it"


@pytest.mark.parametrize("name", sorted(set(MODULES) - set(SIGNS)))
def test_imports_point_down_only(name: str) -> None:
    for target in imports_of(name):
        assert target in LEVEL, f"{name} imports {target}, which is no module with code"
        assert LEVEL[target] < LEVEL[name], f"{name} must not import {target}"


def test_imports_are_seen() -> None:
    # The reading itself: a module from a module, modules from the package, and imports inside functions.
    assert imports_of("process") == set()
    assert "process" in imports_of("trajectory")
    assert {"objective", "pictures", "sampler"} <= imports_of("trainer")
    assert "cli.sample" in imports_of("cli") and "play" in imports_of("cli.sample")
    assert {"api", "evaluation.pair", "student"} <= imports_of("onestill")


def test_order_is_the_one_of_the_design() -> None:
    spine = (
        "tensors", "process", "trajectory", "teachers.base", "teachers.unet2d", "student", "sampler", "trainer",
        "preparation", "distillation", "restore", "runs", "api", "demo", "cli",
    )  # fmt: skip
    assert [LEVEL[name] for name in spine] == sorted(LEVEL[name] for name in spine)
    assert len({LEVEL[name] for name in spine}) == len(spine)


def reachable(name: str) -> set[str]:
    seen: set[str] = set()
    todo = [name]
    while todo:
        for target in imports_of(todo.pop()) - seen:
            seen.add(target)
            todo.append(target)
    return seen


def test_there_are_no_cycles() -> None:
    assert not [name for name in MODULES if name in reachable(name)]


def test_sampling_and_exporting_need_no_trainer() -> None:
    for name in ("sampler", "export", "student", "objective"):
        assert not reachable(name) & {"trainer", "checkpoint", "preparation", "distillation", "config"}


def test_maths_is_pure() -> None:
    # Everything random comes through an explicit generator, and these rooms draw nothing at all.
    for name in ("tensors", "process", "trajectory", "objective", "student"):
        drawn = [
            node.attr
            for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8")))
            if isinstance(node, ast.Attribute) and node.attr in ("rand", "randn", "randint", "rand_like", "randn_like")
        ]
        assert not drawn, name
    assert reachable("objective") == {"trajectory", "process", "tensors"}


def test_draws_name_their_generator() -> None:
    found = 0
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = node.func.value
            if (
                isinstance(owner, ast.Name)
                and owner.id == "torch"
                and node.func.attr in ("rand", "randn", "randint", "randperm")
            ):
                found += 1
                assert "generator" in [keyword.arg for keyword in node.keywords], f"{name}, line {node.lineno}"
    assert found >= 4, "draws must be found for this to be a test"


# The package from outside


def in_a_fresh_interpreter(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_nothing_optional() -> None:
    loaded = in_a_fresh_interpreter(
        f"import sys, onestill; print([name for name in {LAZY!r} if name in sys.modules]); "
        "print(sorted(name for name in sys.modules if name.startswith('onestill')))"
    )
    assert loaded.splitlines() == ["[]", "['onestill']"]


def test_core_loads_without_diffusers() -> None:
    core = ["process", "trajectory", "objective", "teachers.base", "teachers.closed_form", "teachers.module"]
    imports = "; ".join(f"import onestill.{name}" for name in core)
    assert in_a_fresh_interpreter(f"import sys; {imports}; print('diffusers' in sys.modules)").strip() == "False"


def test_public_names_are_there() -> None:
    assert sorted(onestill.__all__) == sorted(onestill._HOMES)
    for name in onestill.__all__:
        value = getattr(onestill, name)
        assert value.__module__ == f"onestill.{onestill._HOMES[name]}"
        assert callable(value), f"onestill.{name} is no function or class"
    with pytest.raises(AttributeError, match="module 'onestill' has no attribute 'no_such_name'"):
        onestill.no_such_name  # noqa: B018


def test_dir_names_what_is_not_loaded_yet() -> None:
    printed = in_a_fresh_interpreter("import sys, onestill; print(*dir(onestill)); print('torch' in sys.modules)")
    names, loaded = printed.splitlines()
    assert {*onestill.__all__, "__version__"} <= set(names.split()) and loaded == "False"


def test_public_names_are_not_shadowed_by_modules() -> None:
    # A module of the name of a function would take its place in the package once it is imported.
    for name in sorted(set(MODULES) - {"onestill", "__main__"}):
        importlib.import_module(f"onestill.{name}")
    assert not [name for name in onestill.__all__ if inspect.ismodule(getattr(onestill, name))]


def public_callables() -> Iterator[tuple[str, object]]:
    for name in sorted(set(MODULES) - {"onestill", "__main__", *SIGNS}):
        module = importlib.import_module(f"onestill.{name}")
        for key, value in vars(module).items():
            if key.startswith("_") or getattr(value, "__module__", None) != module.__name__:
                continue
            if inspect.isfunction(value):
                yield f"{name}.{key}", value
            elif inspect.isclass(value):
                for method, member in vars(value).items():
                    own = inspect.isfunction(member) and member.__module__ == module.__name__
                    if own and (not method.startswith("_") or method == "__init__"):
                        yield f"{name}.{key}.{method}", member


def test_no_public_signature_swallows_arguments() -> None:
    names = dict(public_callables())
    assert len(names) > 100, "signatures must be found for this to be a test"
    open_ended = [
        name
        for name, value in names.items()
        for parameter in inspect.signature(value).parameters.values()  # type: ignore[arg-type]
        if parameter.kind is parameter.VAR_KEYWORD
    ]
    assert open_ended == ["distillation.distill"]


def test_the_one_that_takes_settings_refuses_unknown_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown setting 'max_train_step'; did you mean 'max_train_steps'"):
        onestill.distill("digits", tmp_path / "run", max_train_step=5)
    assert not (tmp_path / "run").exists()


def test_public_names_have_docstrings() -> None:
    undocumented = [
        name
        for name, value in public_callables()
        if not inspect.getdoc(value) and not name.endswith("__init__") and name.count(".") < 2
    ]
    assert not undocumented
    assert all(
        ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) for n, path in MODULES.items() if n != "__main__"
    )
