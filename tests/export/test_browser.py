"""Students as a static page: what it draws in Chromium is what onnxruntime draws, and it asks nobody else for anything."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from runs_helpers import assert_refused, call_cli, finished_run
from tokenizers import Tokenizer

from browser import opened, served
from onestill.export import browser as browser_file
from onestill.export.export import check_format, export_student
from onestill.export.settings import Options
from onestill.students.student import Student
from onestill.teachers.load import load_teacher

PACKAGE = os.environ.get("ONESTILL_ONNXRUNTIME_WEB")
needs_package = pytest.mark.skipif(
    PACKAGE is None, reason="ONESTILL_ONNXRUNTIME_WEB names no unpacked npm package onnxruntime-web"
)


def fake_package(folder: Path) -> Path:
    """Return a folder that looks like the npm package, with empty files."""
    (folder / "dist").mkdir(parents=True)
    (folder / "package.json").write_text('{"name": "onnxruntime-web", "version": "0.0.1"}')
    for name in browser_file._WASM:
        (folder / "dist" / name).write_text(name)
    return folder


@pytest.fixture
def labelled(cases: dict[str, Any]) -> Student:
    """A student with three classes."""
    return Student(cases["module-class"].build())


def test_the_folder_holds_all_that_the_page_asks_for(labelled: Student, tmp_path: Path) -> None:
    package = fake_package(tmp_path / "package")
    options = Options(onnxruntime_web=package)
    assert export_student(labelled, tmp_path / "out", format="browser", options=options) <= 1e-5
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    runtime = {f"runtime/{name}" for name in browser_file._WASM}
    own = {"README.md", "onestill.json", "student.json", "student.onnx"}
    assert names == {*browser_file.PAGE, *runtime, *own}
    said = json.loads((tmp_path / "out" / "student.json").read_text(encoding="utf-8"))
    assert (said["labels"], said["text"], said["backends"]) == ([0, 1, 2], False, ["wasm"])
    text = "".join((tmp_path / "out" / name).read_text(encoding="utf-8") for name in browser_file.PAGE)
    assert "https://" not in text and text.count("http://") == 1, "the one address is that of one's own server"
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert (
        "```sh\ncd path/to/this/folder\npython -m http.server -b 127.0.0.1" in card and "onnxruntime-web 0.0.1" in card
    )
    assert "library_name: onnx\n" in card and "- diffusers" not in card
    assert "a seed is not torch's" in card and "Opened as a file it does not draw" in card


def test_what_cannot_be_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    run, out, package = finished_run(), tmp_path / "out", fake_package(tmp_path / "package")
    refused = call_cli("export", run, "--format", "browser", "--output", out)
    assert_refused(refused, "--onnxruntime_web: is required by the format browser")
    assert "npm pack onnxruntime-web@" in refused.words
    refused = call_cli("export", run, "--format", "onnx", "--onnxruntime_web", package, "--output", out)
    assert_refused(refused, "--onnxruntime_web ")
    assert "is of the format browser; give --format browser, or leave it out" in refused.words
    (package / "dist" / "ort-wasm-simd-threaded.wasm").unlink()
    refused = call_cli("export", run, "--format", "browser", "--onnxruntime_web", package, "--output", out)
    assert_refused(refused, "--onnxruntime_web ")
    assert "it has no dist/ort-wasm-simd-threaded.wasm" in refused.words and "npm pack" in refused.words
    assert not out.exists()


def test_students_that_no_page_shows(labelled: Student, cases: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browser_file, "MOST_BYTES", 1000)
    with pytest.raises(ValueError, match=r"format='browser': is for students of at most 0.0 GB"):
        check_format(labelled, "browser")
    student = Student(cases["module-cosine-v"].build())
    monkeypatch.setattr(type(student), "spec", replace(student.spec, sample_shape=(5, 8, 8)))
    with pytest.raises(ValueError, match="draws none"):
        check_format(student, "browser")


def test_tokenizers_that_the_page_does_not_read() -> None:
    known: dict[str, Any] = {"normalizer": {"type": "NFC"}, "model": {"type": "BPE"}}
    assert browser_file._unknown_in(known) == ""
    assert browser_file._unknown_in({**known, "model": {"type": "Unigram"}}) == "a model Unigram"
    assert browser_file._unknown_in({**known, "pre_tokenizer": {"type": "Metaspace"}}) == "a pre_tokenizer Metaspace"


def test_opened_as_a_file_the_page_says_what_to_do(labelled: Student, tmp_path: Path) -> None:
    package = fake_package(tmp_path / "package")
    export_student(labelled, tmp_path / "out", format="browser", options=Options(onnxruntime_web=package))
    with opened(tmp_path / "out" / "index.html") as page:
        assert "python -m http.server" in page.locator("#status").inner_text()
        assert not page.locator("main").is_visible()


@needs_package
def test_the_page_draws_what_the_student_draws(labelled: Student, tmp_path: Path) -> None:
    student, folder = labelled, tmp_path / "out"
    export_student(student, folder, format="browser", options=Options(onnxruntime_web=Path(PACKAGE or "")))
    with served(folder) as address, opened(address, width=390) as page:
        page.wait_for_selector("body[data-ready]", timeout=120_000)
        rows = torch.tensor(page.evaluate("[3, 4].map((seed) => Array.from(onestill.gaussian(seed, 64)))"))
        found = page.evaluate(
            "async () => (await onestill.draw([3, 4].map((s) => onestill.gaussian(s, 64)), [2, 0])).pixels"
        )
        many = torch.tensor(page.evaluate("Array.from(onestill.gaussian(9, 20000))"))
        middle = torch.tensor(
            page.evaluate("Array.from(onestill.between([1,2,3,4].map((s) => onestill.gaussian(s, 4096)), .3, .6))")
        )
        assert float(page.locator("#ms").inner_text()) > 0 and page.locator("#classes button").count() == 3
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        move = "document.querySelector('.pad').dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowLeft' }));"
        page.evaluate(f"{move} onestill.start('wasm'); {move}")  # pictures are asked for meanwhile
        page.wait_for_function("onestill.times.length > 1", timeout=20_000)
        assert not page.locator("#status").is_visible()
        said = [line for line in page.heard if not line.startswith(address)]
        assert set(said) <= {"No available adapters."}, "what Chromium says where it has no WebGPU"
    session = onnxruntime.InferenceSession(folder / "student.onnx")
    given = {"noise": rows.reshape(2, 1, 8, 8).numpy(), "class_labels": torch.tensor([2, 0]).numpy()}
    expected = torch.from_numpy(session.run(None, given)[0])
    pixels = torch.tensor(found).reshape(2, 1, 8, 8)
    assert (pixels - expected).abs().max() <= 1e-4
    assert abs(float(many.mean())) < 0.03 and abs(float(many.std()) - 1) < 0.03 and float(many.abs().max()) > 3.3
    assert abs(float((many[1:] * many[:-1]).mean())) < 0.03, "neighbours know nothing of each other"
    assert abs(float(middle.std()) - 1) < 0.05, "what lies between noises is one"


def test_the_page_reads_prompts_as_the_tokenizer(tmp_path: Path) -> None:
    folder = load_teacher("glyphs").folder
    assert folder is not None
    file = folder / "tokenizer" / "tokenizer.json"
    for name in ("tokenizer.js", "index.html"):
        (tmp_path / name).write_bytes((browser_file.TEMPLATES / name).read_bytes())
    prompts = [
        "a bold red serif D on a black background",
        "",
        "A  Photo!!  of 12 élan's 🙂 ÅÅ",
        "x" * 60,
        "<|endoftext|> it's",
        "日本 ½ don't\n\ttab",
        "ΟΔΟΣ İ a\u0085b\ufeffc",
    ]
    with served(tmp_path) as address, opened(address) as page:
        ask = "async ([file, prompts]) => { const { Tokenizer } = await import('/tokenizer.js'); const t = new Tokenizer(file); return prompts.map((p) => t.encode(p)); }"
        found = page.evaluate(ask, [json.loads(file.read_text(encoding="utf-8")), prompts])
    assert found == [row.ids for row in Tokenizer.from_file(str(file)).encode_batch(prompts)]
