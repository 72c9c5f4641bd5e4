"""Students as `torch.export` programs: from noise to pictures with torch alone, without onestill and diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from onestill.export.graph import traced
from onestill.export.graph_format import TOKENIZER_FILE, TOKENS, GraphFormat
from onestill.students.model_card import Facts, evaluations, shown_labels
from onestill.students.one_step import OneStep
from onestill.students.student import Student

PROGRAM_FILE = "student.pt2"
UNTRACEABLE = ("FluxPipeline", "Lumina2Pipeline")
"""Pipelines whose networks torch cannot trace: the first decides by numbers in its inputs, the second looks up their count."""
_SHOWN_PROMPT = """from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("path/to/this/folder/{file}")
"""


class ProgramFormat(GraphFormat):
    """One `.pt2`, a zip of JSON and of the weights' bytes; of text students a tokenizer's file beside it.

    A family whose prompts become more than what one text encoder makes of token ids gets its conditions as inputs.
    """

    library = "pytorch"

    @classmethod
    def why_not(cls, student: Student, num_steps: int) -> str | None:
        if (kind := student.teacher.kind) not in UNTRACEABLE:
            return None
        return f"cannot be had of a {kind}, whose network torch.export does not trace; diffusers is the whole pipeline"

    def write_graphs(self, step: OneStep, folder: Path) -> None:
        (inputs, _) = self.checked
        program = traced(self.drawing(step), [rows[:2] for rows in inputs])
        torch.export.save(program, folder / PROGRAM_FILE)

    def drawn(self, folder: Path, eps: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        pictures: Tensor = torch.export.load(folder / PROGRAM_FILE).module()(eps, *inputs)
        return pictures

    def code(self, facts: Facts) -> str:
        spec, before, given, num = self.student.spec, "", "", 4
        if self.reads_tokens:
            prompt, num = repr(facts.prompt), 1
            before = _SHOWN_PROMPT.format(file=TOKENIZER_FILE)
            given = f"torch.tensor([tokenizer.encode({prompt}).ids])"
        elif labels := shown_labels(spec, facts) if spec.num_classes else []:
            given, num = f"torch.tensor({labels})", len(labels)
        else:
            given = ", ".join(self.input_names)
        shape = ", ".join(map(str, (num, *spec.sample_shape)))
        arguments = ", ".join(filter(None, [f"torch.randn({shape})", given]))
        return (
            f"import torch\n{before}"
            f'student = torch.export.load("path/to/this/folder/{PROGRAM_FILE}").module()\n'
            f"images = student({arguments})  # {evaluations(self.num_steps)}"
        )

    def facts(self, folder: Path, facts: Facts) -> Facts:
        ids = f"; `{TOKENIZER_FILE}` makes `{TOKENS}` of prompts" if self.reads_tokens else ""
        own = (
            "; its prompts are the teacher's pipeline's to encode"
            if self.student.spec.text and not self.reads_tokens
            else ""
        )
        said = (
            f"`{PROGRAM_FILE}` goes {self.in_words(facts)}{ids}{own}. It is a zip of JSON and of the weights' bytes, "
            "without pickles and without code; `torch.export.load` of files of others may open pickles"
        )
        return replace(facts, files=said)
