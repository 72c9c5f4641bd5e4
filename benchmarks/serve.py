"""The answer of a student's page against the student's own call: what HTTP, the queue and the PNG add.

python benchmarks/serve.py --student RUN                       # the run's own weights, as the page draws with them
python benchmarks/serve.py --student FOLDER --prompt "a cat"   # an exported text student
One picture of the same seed either way, timed in turns: the call on the student's sampler in this process, and a request to
a server in a process of its own, over a connection that stays open, as a browser's does, up to the last byte.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from onestill.evaluation.speed import compare
from onestill.pages.server import DRAW
from onestill.runs.load import load_student

MOST_RATIO = 1.2


@contextmanager
def serving(student: Path, device: str, threads: int) -> Iterator[http.client.HTTPConnection]:
    """Start the command `serve` and give a connection to it."""
    command = [sys.executable, "-m", "onestill", "serve", str(student), "--port", "0", "--device", device]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    server = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        connection = http.client.HTTPConnection(server.stdout.readline().split()[0].removeprefix("http://"))
        yield connection
        connection.close()
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--prompt", default="a bold red serif A on a yellow background")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sampler = load_student(args.student, device=args.device, prefers_weights=True).sampler
    asked: dict[str, Any] = {"seed": 7}
    if sampler.takes_text:
        asked["prompt"] = args.prompt
    elif sampler.labels:
        asked["class_label"] = sampler.labels[0]
    labels, prompts = ([asked[name]] if name in asked else [] for name in ("class_label", "prompt"))
    rows, drawing = sampler.conditions(1, labels, prompts), []
    with serving(args.student, args.device, args.threads) as connection:

        def answer() -> None:
            connection.request("POST", DRAW, json.dumps(asked), {"Content-Type": "application/json"})
            drawing.append(json.loads(connection.getresponse().read())["milliseconds"])

        calls = {"call": lambda: sampler.images([7], rows), "answer": answer}
        seconds = compare(calls, device=args.device, repeats=args.repeats, warmup=5)
    ratio = seconds["answer"] / seconds["call"]
    print(f"| {args.threads} threads | the call | the answer | ratio |\n|---|---|---|---|")
    print(f"| {args.student.name} | {1e3 * seconds['call']:.2f} ms | {1e3 * seconds['answer']:.2f} ms | {ratio:.2f} |")
    print(f"drawing takes {median(drawing):.2f} ms of the answer; wanted is a ratio below {MOST_RATIO}")


if __name__ == "__main__":
    main()
