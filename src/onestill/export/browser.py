"""Students as a static page that draws in the browser: its ONNX graphs, onnxruntime-web, and nothing from elsewhere."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from onestill.core.errors import NOT_GIVEN, SettingError
from onestill.core.reading import read_mapping
from onestill.core.writing import write_text
from onestill.export.onnx_file import DECODER, STUDENT, TEMPLATES, TEXT_ENCODER, OnnxFormat, made_by
from onestill.export.settings import Options
from onestill.export.text_parts import tokenizer_text
from onestill.students.model_card import Facts, evaluations
from onestill.students.one_step import OneStep
from onestill.students.student import Student
from onestill.teachers.pipelines.teacher import PipelineTeacher

PAGE = ("index.html", "style.css", "app.js", "worker.js", "noise.js", "tokenizer.js")
RUNTIME = "runtime"
NPM_VERSION = "1.30.0"
"""The version of onnxruntime-web that the page was tested with."""
HOW_TO_GET = f"get it by npm pack onnxruntime-web@{NPM_VERSION} && tar xzf onnxruntime-web-{NPM_VERSION}.tgz, which makes a folder package"
_WASM = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
_WEBGPU = ("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm")
MOST_BYTES = 2**30 * 3 // 2
"""The most weights that a page loads: WebAssembly has 4 GB, and holds them twice while it does."""
_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Replace", "Lowercase"}
_PRE_TOKENIZERS = {"Split", "ByteLevel"}
_POST_PROCESSORS = {"RobertaProcessing", "TemplateProcessing"}


class BrowserFormat(OnnxFormat):
    """A folder that any static server serves: the page, the graphs, `student.json` for the page, and the runtime."""

    language = "sh"
    runs_alone = False

    @classmethod
    def check_options(cls, options: Options) -> None:
        package = options.onnxruntime_web
        if package is None:
            why = f"is required by the format browser: the folder of the unpacked npm package; {HOW_TO_GET}"
            raise SettingError("onnxruntime_web", NOT_GIVEN, why)
        missing = [name for name in _WASM if not (package / "dist" / name).is_file()]
        if missing or _package(package).get("name") != "onnxruntime-web":
            has = f"has no dist/{missing[0]}" if missing else "has no package.json of that name"
            raise SettingError(
                "onnxruntime_web", package, f"is no unpacked npm package onnxruntime-web: it {has}", HOW_TO_GET
            )

    @classmethod
    def why_not(cls, student: Student, num_steps: int) -> str | None:
        if (why := super().why_not(student, num_steps)) is not None:
            return why
        teacher, shape = student.teacher, student.spec.sample_shape
        if teacher.output_field != "images" or (
            not teacher.has_decoder and (len(shape) != 3 or shape[0] not in (1, 3))
        ):
            return "shows grey or coloured pictures, and this student draws none; onnx and torch have it"
        if not set(teacher.example_rows(1)) <= {"class_labels"} and not student.spec.text:
            return f"asks for labels or a prompt, and this student takes {', '.join(teacher.example_rows(1))}"
        size = 4 * sum(weight.numel() for weight in student.network.parameters()) + teacher.bytes_besides
        if size > MOST_BYTES:
            return f"is for students of at most {MOST_BYTES / 1e9:.1f} GB, and this one has {size / 1e9:.1f} GB; onnx has no limit"
        if student.spec.text and (unknown := _unknown_in(json.loads(tokenizer_text(cast(PipelineTeacher, teacher))))):
            return f"reads tokenizers like CLIP's, and this one has {unknown}; onnx has a runner in Python"
        return None

    def write_graphs(self, step: OneStep, folder: Path) -> None:
        super().write_graphs(step, folder)
        assert self.options.onnxruntime_web is not None, "asked for by `check_options`"
        dist = self.options.onnxruntime_web / "dist"
        has_gpu = all((dist / name).is_file() for name in _WEBGPU)
        (folder / RUNTIME).mkdir()
        for name in (*_WASM, *(_WEBGPU if has_gpu else ())):
            shutil.copyfile(dist / name, folder / RUNTIME / name)
        for name in PAGE:
            shutil.copyfile(TEMPLATES / name, folder / name)
        said = json.dumps(self._for_the_page(folder, has_gpu), indent=1)
        write_text(folder / "student.json", said)

    def _for_the_page(self, folder: Path, has_gpu: bool) -> dict[str, Any]:
        teacher, spec = self.student.teacher, self.student.spec
        graphs = sum(path.stat().st_size for path in folder.glob("*.onnx"))
        size = {name: (folder / RUNTIME / name).stat().st_size for name in (_WASM[-1], *_WEBGPU[-1:] * has_gpu)}
        in_all = {
            name: round((graphs + held) / 1e6) for name, held in zip(("wasm", "webgpu"), size.values(), strict=False)
        }
        name = Path(spec.source).name or "a network"
        return {
            "title": f"{name}, in {'one step' if self.num_steps == 1 else f'{self.num_steps} steps'}",
            "evaluations": evaluations(self.num_steps),
            "made_with": f"Made with onestill {made_by()}.",
            "sample_shape": spec.sample_shape,
            "picture_shape": list(self.checked[1].shape[1:]),
            "text": spec.text,
            "prompt": self.prompt if spec.text else None,
            "labels": list(spec.labels) if spec.num_classes else None,
            "condition": next(iter(teacher.example_rows(1)), None),
            "parts": [TEXT_ENCODER, STUDENT, DECODER] if self.reads_tokens else [STUDENT],
            "backends": list(in_all),
            "megabytes": in_all,
        }

    def code(self, facts: Facts) -> str:
        return "cd path/to/this/folder\npython -m http.server -b 127.0.0.1 8000\n# and open http://127.0.0.1:8000"

    def facts(self, folder: Path, facts: Facts) -> Facts:
        assert self.options.onnxruntime_web is not None, "asked for by `check_options`"
        version = _package(self.options.onnxruntime_web).get("version", "of an unknown version")
        backends = json.loads((folder / "student.json").read_text(encoding="utf-8"))["backends"]
        kinds = " or ".join({"wasm": "WASM", "webgpu": "WebGPU"}[name] for name in backends)
        stored = "in half precision, computed with in single" if self.options.half else "in float32"
        said = (
            f"a static page for any server; it draws by {kinds} and asks for nothing from elsewhere. Opened as a file it "
            f"does not draw: browsers keep the files beside it from it. Weights are stored {stored}; "
            f"`{RUNTIME}/` is onnxruntime-web {version} (MIT license). Its noise is its own: a seed is not torch's"
        )
        return replace(facts, files=said)


def _package(folder: Path) -> dict[str, Any]:
    """Return what a package's package.json says; {} if nothing."""
    try:
        return read_mapping(folder / "package.json")
    except (OSError, ValueError):
        return {}


def _unknown_in(tokenizer: dict[str, Any]) -> str:
    """Return what of a tokenizer.json the page does not know; "" if nothing."""
    parts = (
        ("normalizer", "normalizers", _NORMALIZERS),
        ("pre_tokenizer", "pretokenizers", _PRE_TOKENIZERS),
        ("post_processor", "processors", _POST_PROCESSORS),
    )
    for name, many, known in parts:
        part = tokenizer.get(name) or {}
        for step in part[many] if part.get("type") == "Sequence" else [part] if part else []:
            kept = step.get("behavior", "Removed") == "Removed" and step.get("invert", True)
            if step["type"] not in known or not kept or (step.get("add_prefix_space") and name == "pre_tokenizer"):
                return f"a {name} {step['type']}"
    model = tokenizer["model"]
    is_known = model["type"] == "BPE" and not model.get("byte_fallback") and not model.get("continuing_subword_prefix")
    return "" if is_known else f"a model {model['type']}"
