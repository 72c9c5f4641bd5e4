"""A prompt file of a million lines: memory above the bare process, and seconds to the first step with a warm cache.

python benchmarks/prompts.py                 # a tiny text teacher with random weights, made here
python benchmarks/prompts.py --steps 20000   # draws from, and so encodes and caches, all of them: an hour

Each number is of a process of its own. "bare" trains on a file of four prompts, the other on the whole file; both
draw from the same number of prompts in each step and stop after three steps.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = "a photo drawing painting of the red blue cat house tree castle in at night morning style oil detailed".split()  # noqa: SIM905
BATCH = 64


def write_prompts(path: Path, num: int) -> Path:
    """Write `num` different prompts of about 100 letters."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for i in range(num):
            file.write(f"{' '.join(draw.choices(WORDS, k=18))} number {i}\n")
    return path


def write_teacher(folder: Path) -> Path:
    """Write the tiny Stable Diffusion of the tests."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "families"))
    from pipelines import build

    build("sd-epsilon").save_pretrained(folder)
    return folder


def measure(folder: Path, prompts: Path, steps: int) -> None:
    """Train to the third step and print, as JSON, the seconds to the first one and the peak of resident memory."""
    started = time.perf_counter()
    from onestill.runs.build import build_run
    from onestill.runs.distill import make_trainer
    from onestill.training.config import make_config

    settings = {"teacher": str(folder / "teacher"), "output_dir": str(folder / "run"), "device": "cpu"}
    rare = {"checkpointing_steps": 10**6, "validation_steps": 10**6, "logging_steps": 10**6}
    own = {
        "anchor_fraction": 0.0,
        "corrector_fraction": 0.0,
        "prompt_file": str(prompts),
        "prompt_cache_dir": str(folder / "cache"),
    }
    config = make_config({**settings, **rare, **own, "max_train_steps": steps, "train_batch_size": BATCH})
    prepared = build_run(config)
    trainer = make_trainer(prepared)
    seconds = 0.0
    for log in trainer.steps():
        seconds = seconds or time.perf_counter() - started
        if log.step == 3:
            break
    assert prepared.prompts is not None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "peak": peak, "prompts": len(prepared.prompts.pool)}))


def in_a_process(folder: Path, prompts: Path, steps: int) -> dict[str, float]:
    """Return what `measure` prints in a process of its own."""
    command = [sys.executable, __file__, "--folder", str(folder), "--measure", str(prompts), "--steps", str(steps)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=1_000_000, help="lines of the file")
    parser.add_argument("--steps", type=int, default=1000, help="steps of the run, which draws 64 prompts in each")
    parser.add_argument("--folder", type=Path, help="where to keep everything; a temporary folder if not given")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        measure(args.folder, args.measure, args.steps)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write_teacher(folder / "teacher")
        few, many = write_prompts(folder / "few.txt", 4), write_prompts(folder / "many.txt", args.num)
        bare, cold, warm = (in_a_process(folder, path, args.steps) for path in (few, many, many))
    print(
        "| file | prompts drawn from | first step after | peak memory | above the bare process |\n|---|---|---|---|---|"
    )
    for name, row in (("4 lines", bare), (f"{args.num:,} lines, cold cache", cold), ("the same, warm cache", warm)):
        above = row["peak"] - bare["peak"]
        print(f"| {name} | {row['prompts']:,} | {row['seconds']:.1f} s | {row['peak']:.0f} MiB | {above:+.0f} MiB |")


if __name__ == "__main__":
    main()
