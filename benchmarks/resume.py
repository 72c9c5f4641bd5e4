"""A run killed with SIGKILL at ten random moments and resumed, against the run that was not: anchors, corrector, flow map.

python benchmarks/resume.py --kills 10 --seed 0
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from onestill.training.checkpoint import list_checkpoints, read_checkpoint

STEPS = 240
COMMAND = [
    sys.executable, "-m", "onestill", "distill", "--teacher", "digits", "--device", "cpu", "--seed", "3",
    "--max_train_steps", str(STEPS), "--train_batch_size", "8", "--checkpointing_steps", "3", "--logging_steps", "10",
    "--validation_steps", "1000", "--lr_scheduler", "cosine", "--lr_warmup_steps", "20", "--num_teacher_steps", "2",
    "--num_anchors", "200", "--flow_map_fraction", "0.25", "--corrector_begin", "0.05",
    "--resume_from_checkpoint", "latest",
]  # fmt: skip


def start(output_dir: Path) -> subprocess.Popen[bytes]:
    """Start (or go on with) the run in its own process."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*COMMAND, "--output_dir", str(output_dir)], env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )


def digest(output_dir: Path) -> str:
    """Return a hash of the final checkpoint's tensors."""
    tensors = read_checkpoint(output_dir / f"checkpoint-{STEPS}").tensors
    content = hashlib.sha256()
    for group in sorted(tensors):
        for name in sorted(tensors[group]):
            content.update(f"{group}.{name}".encode())
            content.update(tensors[group][name].numpy().tobytes())
    return content.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        straight, killed = Path(folder) / "straight", Path(folder) / "killed"
        started = time.monotonic()
        assert start(straight).wait() == 0
        whole = time.monotonic() - started
        unreadable = kills = 0
        print(f"uninterrupted: {STEPS} steps in {whole:.0f} s, final state {digest(straight)}")
        while kills < args.kills:
            process = start(killed)
            # Loading takes seconds in which there is nothing to lose: wait for a step of this session, then strike.
            before = list_checkpoints(killed)[:1]
            while list_checkpoints(killed)[:1] == before and process.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.5))
            if process.poll() is not None:
                break
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            for checkpoint in list_checkpoints(killed):
                try:
                    read_checkpoint(checkpoint)
                except ValueError as error:
                    unreadable += 1
                    print(error)
            print(f"kill {kills}: newest {list_checkpoints(killed)[0].name}")
        assert start(killed).wait() == 0
        same = digest(killed) == digest(straight)
        print(
            f"{kills} kills, {unreadable} unreadable checkpoints, final state {digest(killed)}: {'bit-identical' if same else 'DIFFERENT'}"
        )
        sys.exit(0 if same and not unreadable and kills == args.kills else 1)


if __name__ == "__main__":
    main()
