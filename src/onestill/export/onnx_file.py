"""Students as ONNX graphs, and what draws with them without torch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from onestill.core.tensors import SELF_CHECK_TOLERANCE
from onestill.core.writing import write_text
from onestill.export.graph import Drawing, traced
from onestill.export.graph_format import NOISE, PICTURE, TOKENIZER_FILE, TOKENS, GraphFormat
from onestill.export.text_parts import Encoder, reads_tokens
from onestill.students.model_card import Facts, evaluations, shown_labels
from onestill.students.one_step import OneStep
from onestill.students.student import Student

STUDENT, TEXT_ENCODER, DECODER, LATENTS, RUNNER = "student", "text_encoder", "decoder", "latents", "run.py"
OPSET = 18
MOST_BYTES = 2**31 - 2**26
"""What one file of ONNX holds; of more the weights lie in a file beside it."""
HALF_TOLERANCE = 0.05
"""The largest difference of a student whose weights are stored in half precision, in images of [-1, 1]."""
_LEAST_HALVED = 64
_FOLDED = 2**24
"""The most numbers of a constant that is computed once and for all."""
TEMPLATES = Path(__file__).with_name("templates")
Graph = tuple[nn.Module, Sequence[Tensor], Sequence[str], str]
"""(module, some rows of its inputs, their names, the name of its output)."""


class OnnxFormat(GraphFormat):
    """`student.onnx`; of students that read tokens `text_encoder.onnx`, `student.onnx` and `decoder.onnx`, in turn.

    With `half` the weights are stored in half precision, and computed with in single.
    """

    library = "onnx"
    extra = "onnx"
    modules = ("onnx", "onnxruntime", "onnxscript")
    runs_alone: ClassVar[bool] = True
    """Whether what draws with the graphs is written beside them."""

    @classmethod
    def why_not(cls, student: Student, num_steps: int) -> str | None:
        if not student.spec.text or reads_tokens(student):
            return None
        names = ", ".join(student.teacher.example_rows(1))
        return (
            f"takes prompts that one text encoder turns into one tensor, and those of a {student.teacher.kind} become "
            f"{names}; the format torch has them as inputs, and diffusers is the whole pipeline"
        )

    @property
    def tolerance(self) -> float:
        """The largest difference that may be."""
        return HALF_TOLERANCE if self.options.half else SELF_CHECK_TOLERANCE

    def write_graphs(self, step: OneStep, folder: Path) -> None:
        for name, (module, inputs, given, out) in self.graphs(step).items():
            write_onnx(traced(module, inputs), folder / f"{name}.onnx", given, out, self.said(), half=self.options.half)
        if self.draws_pictures and self.runs_alone:
            write_text(folder / RUNNER, (TEMPLATES / "run.txt").read_text(encoding="utf-8"))

    def graphs(self, step: OneStep) -> dict[str, Graph]:
        """Return the graphs by name, with two rows of their inputs."""
        eps, *inputs = [rows[:2] for rows in self.checked[0]]
        if not self.reads_tokens:
            module = Drawing(step, self.condition_names, None, self.finish)
            return {STUDENT: (module, (eps, *inputs), (NOISE, *self.input_names), self.output_name)}
        encoder = Encoder(self.pipeline_teacher.pipeline.text_encoder)
        (hidden,) = self.condition_names
        return {
            TEXT_ENCODER: (encoder, inputs, (TOKENS,), hidden),
            STUDENT: (Drawing(step, (hidden,)), (eps, encoder(*inputs)), (NOISE, hidden), LATENTS),
            DECODER: (self.finish, (eps,), (LATENTS,), PICTURE),
        }

    def drawn(self, folder: Path, eps: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        if not self.reads_tokens:
            return ran(folder / f"{STUDENT}.onnx", dict(zip((NOISE, *self.input_names), (eps, *inputs), strict=True)))
        (hidden,) = self.condition_names
        rows = ran(folder / f"{TEXT_ENCODER}.onnx", {TOKENS: inputs[0]})
        latents = ran(folder / f"{STUDENT}.onnx", {NOISE: eps, hidden: rows})
        return ran(folder / f"{DECODER}.onnx", {LATENTS: latents})

    @property
    def draws_pictures(self) -> bool:
        """Whether a grey or a coloured picture comes out of noise, and of labels or prompts where anything else goes in."""
        shape, is_asked = self.checked[1].shape[1:], self.reads_tokens or self.student.spec.num_classes is not None
        is_picture = len(shape) == 3 and shape[0] in (1, 3) and self.student.teacher.output_field == "images"
        return is_picture and (is_asked or not self.input_names)

    def said(self) -> dict[str, str]:
        """Return what the metadata of each file says."""
        labels = self.student.spec.labels if self.student.spec.num_classes else ()
        said = {
            "made_with": f"onestill {made_by()}",
            "opset": str(OPSET),
            "batch": "dynamic: any number of rows",
            "picture": "in [-1, 1]" if self.clamps else "as the student draws it",
            "network_evaluations": str(self.num_steps),
            "weights": "float16, computed with in float32" if self.options.half else "float32",
        }
        return said | ({"class_labels": ",".join(map(str, labels))} if labels else {})

    def code(self, facts: Facts) -> str:
        spec, note = self.student.spec, f"  # {evaluations(self.num_steps)}"
        if self.draws_pictures:
            asked = [facts.prompt] if spec.text else shown_labels(spec, facts) if spec.num_classes else [0]
            seeds = list(range(len(asked)))
            return (
                'import sys\n\nsys.path.append("path/to/this/folder")\nfrom run import draw\n\n'
                f"images = draw({asked!r}, seeds={seeds}){note}"
            )
        shape = ", ".join(map(str, (4, *spec.sample_shape)))
        given = "".join(f', "{name}": {name}' for name in self.input_names)
        return (
            "import numpy as np\nimport onnxruntime\n\n"
            f'student = onnxruntime.InferenceSession("path/to/this/folder/{STUDENT}.onnx")\n'
            f"noise = np.random.default_rng(0).standard_normal(({shape}), dtype=np.float32)\n"
            f'(images,) = student.run(None, {{"{NOISE}": noise{given}}}){note}'
        )

    def facts(self, folder: Path, facts: Facts) -> Facts:
        if self.reads_tokens:
            chain = f"`{TOKENIZER_FILE}`, `{TEXT_ENCODER}.onnx`, `{STUDENT}.onnx` and `{DECODER}.onnx`, one after the other, go"
        else:
            chain = f"`{STUDENT}.onnx` goes"
        stored = "stored in half precision and computed with in single" if self.options.half else "in float32"
        runner = f"; `{RUNNER}` draws with numpy, onnxruntime and pillow" if self.draws_pictures else ""
        said = f"{chain} {self.in_words(facts)}; opset {OPSET}, weights {stored}{runner}. Its seeds are numpy's, not torch's"
        return replace(facts, files=said if self.draws_pictures else said.rpartition(". ")[0])


def made_by() -> str:
    """Return the version of this package that writes the files."""
    try:
        return version("onestill")
    except PackageNotFoundError:
        return "unknown"


def ran(path: Path, given: Mapping[str, Tensor]) -> Tensor:
    """Return what a file of ONNX, loaded afresh, makes of its inputs on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: rows.cpu().numpy() for name, rows in given.items()})
    return torch.from_numpy(found)


def write_onnx(
    program: Any, path: Path, inputs: Sequence[str], output: str, said: Mapping[str, str], *, half: bool = False
) -> None:
    """Write a traced module as a file of ONNX, all that is constant in it computed.

    `said` is its metadata. Of more than `MOST_BYTES` the weights are in a file of the same name that ends in .data.
    """
    import onnx_ir
    from onnxscript import optimizer

    with _quiet():
        made = torch.onnx.export(
            program, (), input_names=list(inputs), output_names=[output], opset_version=OPSET, dynamo=True, optimize=False,
            verbose=False,
        )  # fmt: skip
        assert made is not None
        model: Any = made.model
        optimizer.optimize(model, input_size_limit=_FOLDED, output_size_limit=_FOLDED)
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    _name_batch(model.graph)
    if half:
        _halve(model.graph)
    model.graph.name, model.producer_name, model.producer_version = path.stem, "onestill", made_by()
    model.metadata_props.clear()
    model.metadata_props.update(said)
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    onnx_ir.save(model, path, external_data=f"{path.name}.data" if size > MOST_BYTES else None)


def _name_batch(graph: Any) -> None:
    """Let the number of rows be called "batch", and not by the number that its trace gave it."""
    own = str(graph.inputs[0].shape[0])
    for value in [*graph.inputs, *(value for node in graph.all_nodes() for value in node.outputs)]:
        for axis, size in enumerate(value.shape or ()):
            if str(size) == own:
                value.shape[axis] = "batch"


def _halve(graph: Any) -> None:
    """Store the large weights of a graph in half precision, made single where they are used."""
    import onnx_ir

    ir: Any = onnx_ir
    for name, value in list(graph.initializers.items()):
        weight = value.const_value
        if weight.dtype != ir.DataType.FLOAT or weight.size < _LEAST_HALVED:
            continue
        stored = f"{name}.half"
        with np.errstate(over="ignore"):  # the check sees what does not fit
            tensor = ir.tensor(weight.numpy().astype(np.float16), name=stored)
        half = ir.Value(name=stored, shape=tensor.shape, type=ir.TensorType(ir.DataType.FLOAT16), const_value=tensor)
        graph.register_initializer(half)
        cast = ir.node("Cast", [half], attributes={"to": int(ir.DataType.FLOAT)}, num_outputs=1)
        graph.insert_before(graph[0], cast)
        value.replace_all_uses_with(cast.outputs[0])
        del graph.initializers[name]
        cast.outputs[0].name, cast.outputs[0].type = name, ir.TensorType(ir.DataType.FLOAT)
        cast.outputs[0].shape = tensor.shape


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep to itself what an exporter says of packages that are not there and of its own deprecations."""
    logger, before = logging.getLogger("torch.onnx"), logging.getLogger("torch.onnx").level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
