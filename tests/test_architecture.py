"""The rooms, read from the code itself: what each may import, and the habits that hold in all. There are no exceptions."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import onestill

PACKAGE = Path(onestill.__file__).parent
# From the ground up: a room imports from itself and from the rooms before it. "onestill" is the package's own __init__,
# the public names.
ROOMS = (
    "core",
    "diffusion",
    "teachers",
    "students",
    "data",
    "sampling",
    "objectives",
    "training",
    "export",
    "evaluation",
    "pages",
    "runs",
    "onestill",
    "cli",
)
# The largest room has an order of its own, by the same rule; what the contract speaks of stands below `base`.
TEACHERS = (
    ("settings", "teacher_spec", "image_condition", "prompt_limits"),
    ("base",),
    ("guidance", "closed_form", "module", "probe"),
    ("pipelines",),
    ("pixel", "pipelines.families", "pipelines.generic"),
    ("load",),
)
# Short names for what one's own networks are wrapped and drawn with: they import, and hold nothing.
SHORT_NAMES = ("process", "sampler")
# Folders of the package that hold no code.
DATA = ("embedded", "configs")
# What `import onestill` must not load: seconds of start-up, or not installed at all.
LAZY = ("torch", "diffusers", "transformers", "matplotlib", "torchmetrics", "accelerate", "scipy", "pydantic", "typer")
LONGEST_FUNCTION, MEDIAN_FUNCTION, LONGEST_FILE, ALL_LINES = 60, 10, 400, 28_000


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "onestill"


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
INSIDE = sorted(set(MODULES) - {"onestill", "__main__", *SHORT_NAMES})


def room_of(name: str) -> str:
    return name.split(".")[0]


@functools.cache
def imports_of(name: str) -> set[str]:
    """Return the modules of this package that a module imports, wherever in the file it does so."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import, which this test does not read"
            home = node.module or ""
            targets = [f"{home}.{alias.name}" for alias in node.names]
            found |= {t if t.removeprefix("onestill.") in MODULES else home for t in targets}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    inside = {target for target in found if target == "onestill" or target.startswith("onestill.")}
    return {target.removeprefix("onestill.") for target in inside}


@functools.cache
def reachable(name: str) -> frozenset[str]:
    seen: set[str] = set()
    todo = [name]
    while todo:
        for target in imports_of(todo.pop()) - seen:
            seen.add(target)
            todo.append(target)
    return frozenset(seen)


def nodes(*kinds: type[ast.AST], rooms: tuple[str, ...] = ROOMS) -> Iterator[tuple[str, ast.AST]]:
    """Return every node of these kinds in these rooms, with where it is."""
    for name in INSIDE:
        if room_of(name) in rooms:
            for node in ast.walk(TREES[name]):
                if isinstance(node, kinds):
                    yield f"{name}, line {getattr(node, 'lineno', 0)}", node


# The rooms


def test_the_folders_are_the_rooms_and_each_says_what_is_in_it() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {*ROOMS, *DATA} - {"onestill"}
    assert {name for name in MODULES if "." not in name} == {*ROOMS, *SHORT_NAMES, "__main__"}, (
        "no code beside the rooms"
    )
    for name in SHORT_NAMES:
        held = [type(node) for node in TREES[name].body]
        assert set(held[1:]) <= {ast.ImportFrom, ast.Assign}, f"{name} holds code"
    for name, path in MODULES.items():
        if path.name == "__init__.py":
            sentence = ast.get_docstring(TREES[name])
            assert sentence and sentence.splitlines()[0].endswith("."), f"{name} must say in a sentence what is in it"


@pytest.mark.parametrize("name", INSIDE)
def test_imports_point_down(name: str) -> None:
    allowed = ROOMS[: ROOMS.index(room_of(name)) + 1]
    for target in imports_of(name):
        assert target in MODULES, f"{name} imports {target}, which is no module"
        assert room_of(target) in allowed, f"{name} must not import {target}"


def level_in_teachers(name: str) -> int:
    """Return the level of a module of the teachers' room by the longest entry of its order that names it."""
    inner = name.removeprefix("teachers.")
    matches = [
        (len(entry), level)
        for level, entries in enumerate(TEACHERS)
        for entry in entries
        if inner == entry or inner.startswith(f"{entry}.")
    ]
    assert matches, f"{name} has no place in the teachers' room"
    return max(matches)[1]


@pytest.mark.parametrize("name", [name for name in INSIDE if name.startswith("teachers.")])
def test_imports_point_down_among_the_teachers(name: str) -> None:
    own = level_in_teachers(name)
    for target in imports_of(name):
        if target.startswith("teachers."):
            assert level_in_teachers(target) <= own, f"{name} must not import {target}"


def test_base_is_below_the_rest_of_its_folder() -> None:
    bases = [name for name in MODULES if name.endswith(".base")]
    assert {"teachers.base", "objectives.base"} <= set(bases)
    for name in bases:
        folder = name.rpartition(".")[0]
        below = TEACHERS[0] if name == "teachers.base" else ("settings",)
        beside = {target for target in imports_of(name) if target.startswith(f"{folder}.")}
        assert beside <= {f"{folder}.{lower}" for lower in below}, f"{name} must not import {beside}"


def test_there_are_no_circles() -> None:
    assert not [name for name in MODULES if name in reachable(name)]


def test_imports_are_seen() -> None:
    # The reading itself: a module from a module, modules from the package, and imports inside functions.
    assert "diffusion.process" in imports_of("diffusion.trajectory")
    assert "cli.sample" in imports_of("cli") and {"core.errors", "teachers.base"} <= reachable("cli.sample")
    assert {"runs.distill", "runs.evaluate", "students.student"} <= imports_of("onestill")


# Draws and maths


DRAWS = ("rand", "randn", "randint", "randperm", "rand_like", "randn_like")


def draws_in(tree: ast.AST) -> list[int]:
    return [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in DRAWS]


def test_maths_is_pure() -> None:
    # Everything random comes through an explicit generator, and these draw nothing at all.
    students = ("students.student", "students.injection", "students.bake", "students.one_step")
    pure = [name for name in INSIDE if room_of(name) == "diffusion" or name in (*students, "training.loss")]
    assert len(pure) >= len(students) + 4
    for name in pure:
        assert not draws_in(TREES[name]), name
    assert {room_of(name) for name in reachable("diffusion.trajectory")} <= {"core", "diffusion"}
    formulas = [node for node in TREES["objectives.boot"].body if isinstance(node, ast.FunctionDef)]
    assert len(formulas) >= 2 and not [formula.name for formula in formulas if draws_in(formula)]


def test_draws_name_their_generator() -> None:
    found = 0
    for where, node in nodes(ast.Call):
        assert isinstance(node, ast.Call)
        function = node.func
        if not isinstance(function, ast.Attribute) or not isinstance(function.value, ast.Name):
            continue
        if function.value.id == "torch" and function.attr in ("rand", "randn", "randint", "randperm"):
            found += 1
            assert "generator" in [keyword.arg for keyword in node.keywords], where
    assert found >= 4, "draws must be found for this to be a test"


# One contract, one spelling of a setting


def test_no_flag_is_spelt_below_the_command_line() -> None:
    spelt = [
        where
        for where, node in nodes(ast.Constant, rooms=ROOMS[:-1])
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.search(r"(?<![\w-])--[a-z]", node.value)
    ]
    assert not spelt, "a setting is mentioned by `named`, and spelt by whoever shows the text"


def test_nobody_asks_which_kind_of_teacher_it_is() -> None:
    outside = tuple(room for room in ROOMS if room != "teachers")
    asked = []
    for where, node in nodes(ast.Call, rooms=outside):
        assert isinstance(node, ast.Call)
        if isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "issubclass"):
            classes = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
            classes |= {n.attr for n in ast.walk(node.args[1]) if isinstance(n, ast.Attribute)}
            if classes & {"PipelineTeacher", "PixelTeacher", "ModuleTeacher", "GaussianTeacher", "MixtureTeacher"}:
                asked.append(where)
    assert not asked


def names_of_families_and_processes() -> set[str]:
    """Return every name that a family or a process goes by."""
    from onestill.diffusion import process
    from onestill.teachers.pipelines.families import FAMILIES

    processes = {
        value.name
        for value in vars(process).values()
        if inspect.isclass(value) and isinstance(vars(value).get("name"), str)
    }
    return {family.name for family in FAMILIES} | processes


def test_nobody_compares_the_name_of_a_family_or_a_process() -> None:
    names = names_of_families_and_processes()
    assert len(names) > 5
    compared = []
    for where, node in nodes(ast.Compare, rooms=tuple(room for room in ROOMS if room != "teachers")):
        assert isinstance(node, ast.Compare)
        texts = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        owners = [
            n.value for n in ast.walk(node) if isinstance(n, ast.Attribute) and n.attr in ("name", "family", "__name__")
        ]
        about = [ast.unparse(owner) for owner in owners if re.search(r"process|family|spec\b", ast.unparse(owner))]
        if texts & names or about:
            compared.append(f"{where}: {ast.unparse(node)}")
    assert not compared


# Files

WRITERS = {"write_text", "write_bytes", "savefig", "save", "save_pretrained", "save_lora_weights", "export_to_gif"}


def writes_a_file(node: ast.AST) -> bool:
    """Return whether a node writes a file by itself: an `open` to write, or one of these of somebody else's objects."""
    if not isinstance(node, ast.Call):
        return False
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    if name == "open":
        texts = [a.value for a in ast.walk(node) if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        return any(re.fullmatch(r"[rbt+]*[wax][bt+]*", text) for text in texts)
    ours = any(keyword.arg == "overwrite" for keyword in node.keywords) or not node.args
    return name in WRITERS and not ours and (isinstance(node.func, ast.Attribute) or name == "export_to_gif")


def is_guarded(node: ast.AST) -> bool:
    """Return whether a node is a `with` of what makes files whole or not there at all."""
    items = node.items if isinstance(node, ast.With) else []
    return any(re.match(r"(written|written_into|writing)\(", ast.unparse(item.context_expr)) for item in items)


def test_nobody_writes_a_file_but_through_writing() -> None:
    # A format of an export writes into the folder that `export_student` has from `written`.
    (export,) = [n for n in TREES["export.export"].body if getattr(n, "name", "") == "export_student"]
    assert any(map(is_guarded, ast.walk(export)))
    by_itself, found = [], 0
    for name in INSIDE:
        if room_of(name) == "export" or name == "core.writing":
            continue
        guarded = {id(n) for node in ast.walk(TREES[name]) if is_guarded(node) for n in ast.walk(node)}
        writing = [node for node in ast.walk(TREES[name]) if writes_a_file(node)]
        by_itself += [f"{name}, line {node.lineno}" for node in writing if id(node) not in guarded]  # type: ignore[attr-defined]
        found += len(writing)
    assert found > 3, "what writes must be found for this to be a test"
    assert not by_itself, "a full disk would leave a half: use core/writing"


# Lengths


def lengths_of_functions() -> dict[str, int]:
    return {
        f"{where}: {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for where, node in nodes(ast.FunctionDef)
        if isinstance(node, ast.FunctionDef)
    }


def test_functions_are_short() -> None:
    lengths = lengths_of_functions()
    assert len(lengths) > 300, "functions must be found for this to be a test"
    assert not {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION}
    assert statistics.median(lengths.values()) < MEDIAN_FUNCTION


def test_files_are_short() -> None:
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert not {name: length for name, length in lines.items() if length > LONGEST_FILE}
    assert sum(lines.values()) < ALL_LINES, f"{sum(lines.values())} lines"


# The package from outside

SCRIPTS = sorted(path for folder in ("benchmarks", "examples") for path in (PACKAGE.parents[1] / folder).rglob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_import_what_is_there(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "onestill":
            module = importlib.import_module(node.module or "")
            names = [alias.name for alias in node.names]
            there = [
                hasattr(module, name) or f"{node.module}.{name}".removeprefix("onestill.") in MODULES for name in names
            ]
            assert all(there), f"{node.module}: {names}"


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


@pytest.mark.parametrize(
    "name", ["training.config", "sampling.config", "evaluation.config", "teachers.settings", "data.settings",
             "students.settings", "core.settings", "core.errors"],
)  # fmt: skip
def test_settings_load_no_torch(name: str) -> None:
    # So that help and a refusal take a fraction of a second.
    heavy = ("torch", "diffusers", "transformers", "accelerate")
    code = f"import sys, onestill.{name}; print([name for name in {heavy!r} if name in sys.modules])"
    assert in_a_fresh_interpreter(code).strip() == "[]"


def test_the_maths_loads_without_diffusers() -> None:
    core = ["diffusion.process", "diffusion.trajectory", "objectives.boot", "teachers.base", "teachers.closed_form",
            "teachers.module"]  # fmt: skip
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
    for name in INSIDE:
        importlib.import_module(f"onestill.{name}")
    assert not [name for name in onestill.__all__ if inspect.ismodule(getattr(onestill, name))]


def public_callables() -> Iterator[tuple[str, object]]:
    for name in INSIDE:
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


def parameters_of(value: object) -> list[inspect.Parameter]:
    return list(inspect.signature(value).parameters.values())  # type: ignore[arg-type]


def takes_settings(value: object) -> bool:
    return callable(value) and any(p.kind is p.VAR_KEYWORD for p in parameters_of(value))


def test_only_what_takes_settings_takes_any_keyword() -> None:
    names = dict(public_callables())
    assert len(names) > 100, "signatures must be found for this to be a test"
    open_ended = {(n, p.name) for n, value in names.items() for p in parameters_of(value) if p.kind is p.VAR_KEYWORD}
    assert {name for name, keyword in open_ended if keyword != "settings"} == {"core.settings.setting"}
    for name, keyword in open_ended:
        assert keyword != "settings" or "ields of `" in str(inspect.getdoc(names[name])), (
            f"{name} must say whose fields"
        )


@pytest.mark.parametrize("name", [name for name in onestill.__all__ if takes_settings(getattr(onestill, name))])
def test_what_takes_settings_refuses_unknown_ones(name: str, tmp_path: Path) -> None:
    function = getattr(onestill, name)
    required = [p for p in parameters_of(function) if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    with pytest.raises(ValueError, match="unknown setting 'batch_sizes'"):
        function(*[tmp_path / "none" for _ in required], batch_sizes=5)
    assert not list(tmp_path.iterdir())


def test_an_unknown_setting_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_train_step.*did you mean.*max_train_steps"):
        onestill.distill("digits", tmp_path / "run", max_train_step=5)


def test_public_names_have_docstrings() -> None:
    undocumented = [
        name
        for name, value in public_callables()
        if not inspect.getdoc(value) and not name.endswith("__init__") and name.split(".")[-2][0].islower()
    ]
    assert not undocumented
    assert all(ast.get_docstring(TREES[name]) for name in MODULES if name != "__main__")
