"""How long a picture takes in Chromium, by WASM, and in onnxruntime from Python: the same graphs, one picture at a time.

python benchmarks/browser.py --student RUN --onnxruntime_web PACKAGE
PACKAGE is the unpacked npm package onnxruntime-web. One thread each: a plain static server gives a page no more. Text is encoded
once, as on the page, and not counted. Of an exported folder of the format browser, give --page instead of both.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

ROUNDS, WARM = 40, 5
IN_THE_PAGE = """async ([rounds, length]) => {
    const found = [];
    for (let i = 0; i < rounds; i++) found.push((await onestill.draw([onestill.gaussian(i, length)], [%s])).ms);
    return found;
}"""


class Quiet(SimpleHTTPRequestHandler):
    """A plain static server that keeps its requests to itself."""

    def log_message(self, *_: Any) -> None:
        return None


def in_chromium(folder: Path, said: dict[str, Any]) -> list[float]:
    """Return the milliseconds of pictures that a page draws."""
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        page.wait_for_selector("body[data-ready]", timeout=300_000)
        label = (said["labels"] or [0])[0]
        found: list[float] = page.evaluate(IN_THE_PAGE % label, [ROUNDS, int(np.prod(said["sample_shape"]))])
        browser.close()
    server.shutdown()
    return found[WARM:]


def in_python(folder: Path, said: dict[str, Any]) -> list[float]:
    """Return the milliseconds of pictures that onnxruntime draws with one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    parts = {name: onnxruntime.InferenceSession(folder / f"{name}.onnx", options) for name in said["parts"]}
    given: dict[str, Any] = {}
    if said["text"]:
        from tokenizers import Tokenizer

        ids = [Tokenizer.from_file(str(folder / "tokenizer.json")).encode(said["prompt"]).ids]
        (given[said["condition"]],) = parts["text_encoder"].run(None, {"token_ids": np.array(ids)})
    elif said["labels"]:
        given[said["condition"]] = np.array(said["labels"][:1])
    found = []
    for seed in range(ROUNDS):
        noise = np.random.default_rng(seed).standard_normal((1, *said["sample_shape"]), dtype=np.float32)
        start = time.perf_counter()
        (drawn,) = parts["student"].run(None, {"noise": noise, **given})
        if said["text"]:
            parts["decoder"].run(None, {"latents": drawn})
        found.append(1000 * (time.perf_counter() - start))
    return found[WARM:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path)
    parser.add_argument("--onnxruntime_web", type=Path)
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = given.page
        if folder is None:
            from onestill.runs.export import export

            folder = Path(place) / "page"
            export(given.student, folder, format="browser", onnxruntime_web=given.onnxruntime_web)
        said = json.loads((folder / "student.json").read_text(encoding="utf-8"))
        ways: dict[str, Callable[..., list[float]]] = {"Chromium, WASM": in_chromium, "onnxruntime, Python": in_python}
        medians = {}
        for name, measure in ways.items():
            times = measure(folder, said)
            medians[name] = statistics.median(times)
            print(f"{said['title']}: {name}: {medians[name]:.1f} ms (from {min(times):.1f} to {max(times):.1f})")
        browser, python = medians.values()
        print(f"{said['title']}: the browser takes {browser / python:.1f} times as long")


if __name__ == "__main__":
    main()
