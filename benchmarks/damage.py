"""What damaged files do: random changes to teachers' folders, and flipped bits in the files of a run.

python benchmarks/damage.py folders --num 400     # each is loaded: refused in one line, or harmless
python benchmarks/damage.py runs --num 220        # each is resumed: the same weights to the bit, or refused

A folder of one of four tiny text and class teachers has one file changed: a value of a JSON file is replaced by one of
another type or size, a binary file is cut, has a byte set, or begins with 2^64 - 1. A run of digits-like pictures with
anchors, stopped at step 3 of 4, has one bit of one file flipped and is resumed to its end. Changes are drawn with
`--seed`. Prints how each ended and whatever ended otherwise, and exits with 1 then: a message of several lines, another
exception, more than 10 seconds, other weights.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "families")]

import diffusers  # noqa: E402 - as the next
import torch  # noqa: E402 - the tests' tiny teachers are found by the path above
from pipelines import build  # noqa: E402
from runs_helpers import FAST, Interruption, interrupt_at, same_state, teacher_folder  # noqa: E402

import onestill  # noqa: E402
from onestill.core.errors import RunError  # noqa: E402

TEACHERS = ("sd-epsilon", "sd3", "pixart-alpha", "dit")
VALUES: tuple[Any, ...] = (
    "many", 0, -1, 10**6, 10**7, 10**9, 10**25, 2**31, None, [], {}, [[]], {"a": {"b": 1}}, 1e308, float("nan"), True,
    "", [10**6] * 3, "__doc__", ["os", "system"],
)  # fmt: skip
LONGEST = 10.0
RUN: dict[str, Any] = {
    **FAST, "anchor_fraction": 0.5, "num_anchors": 10, "num_anchor_steps": 3, "anchor_path_fraction": 0.5, "checkpointing_steps": 1,
    "checkpoints_total_limit": 2, "logging_steps": 1, "show_progress": False,
}  # fmt: skip


def change(path: Path, rng: random.Random) -> None:
    """Change one file of a teacher's folder."""
    if path.suffix == ".json":
        found, value = json.loads(path.read_text(encoding="utf-8")), rng.choice(VALUES)
        made = {**found, rng.choice(list(found)): value} if isinstance(found, dict) and found else value
        path.write_text(json.dumps(made), encoding="utf-8")
        return
    content = path.read_bytes()
    place = rng.randrange(len(content) + 1)
    cut, one = content[:place], content[:place] + b"\xff" + content[place + 1 :]
    path.write_bytes(rng.choice((cut, one, b"\xff" * 8 + content[8:])))


def flip(path: Path, rng: random.Random) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def ending(attempt: Callable[[], str]) -> str:
    """Return how an attempt ends: what it returns, "refused", or what is wrong with it."""
    started = time.perf_counter()
    try:
        said = attempt()
    except (ValueError, RunError) as error:
        said = "refused" if len(str(error).splitlines()) <= 20 and str(error) else "no line"
    except Exception as error:
        said = f"{type(error).__name__}: {str(error)[:200]}"
    return said if time.perf_counter() - started < LONGEST else f"slow: {said}"


def folders(num: int, rng: random.Random, place: Path) -> tuple[Counter[str], list[str]]:
    """Load teachers' folders with one file changed each."""
    for name in TEACHERS:
        build(name).save_pretrained(place / name)
    counts, wrong = Counter[str](), []
    for _ in range(num):
        name, folder = rng.choice(TEACHERS), place / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(place / name, folder)
        path = rng.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
        change(path, rng)

        def load(folder: Path = folder) -> str:
            onestill.load_teacher(folder)
            return "harmless"

        said = ending(load)
        counts[said] += 1
        if said not in ("refused", "harmless"):
            wrong.append(f"{name}/{path.relative_to(folder)}: {said}")
    return counts, wrong


def runs(num: int, rng: random.Random, place: Path) -> tuple[Counter[str], list[str]]:
    """Resume a run with one bit flipped in one of its files."""
    teacher = teacher_folder()
    onestill.distill(teacher, place / "whole", **RUN)
    with contextlib.suppress(Interruption):
        onestill.distill(teacher, place / "stopped", on_step=interrupt_at(3), **RUN)
    files = sorted(p.relative_to(place / "stopped") for p in (place / "stopped").rglob("*") if p.is_file())
    counts, wrong = Counter[str](), []
    for i in range(num):
        run, file = place / "damaged", files[i % len(files)]
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(place / "stopped", run)
        flip(run / file, rng)
        given = {"config_file": run / "config.yaml", "show_progress": False} if file.name == "config.yaml" else RUN

        def go_on(run: Path = run, given: dict[str, Any] = given) -> str:
            onestill.distill(teacher, run, resume_from_checkpoint="latest", **given)
            same = same_state(place / "whole" / "checkpoint-4", run / "checkpoint-4")
            return "the same to the bit" if same else "other weights"

        said = ending(go_on)
        counts[said] += 1
        if said not in ("refused", "the same to the bit"):
            wrong.append(f"{file}: {said}")
    return counts, wrong


def main() -> None:
    """Make the changes and print how each ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("folders", "runs"))
    parser.add_argument("--num", type=int, default=200, help="How many changes.")
    parser.add_argument("--seed", type=int, default=0, help="Seed that they are drawn with.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    diffusers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as place:
        counts, wrong = {"folders": folders, "runs": runs}[options.kind](
            options.num, random.Random(options.seed), Path(place)
        )
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{options.num} {options.kind}, seed {options.seed}: {dict(counts)}; at most {most} MB")
    print(*wrong, sep="\n", end="\n" if wrong else "")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
