"""What formats have in common that are files of graphs: what goes in, what comes out, and how they are checked."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from onestill.core.tensors import Cond
from onestill.core.writing import write_text
from onestill.export.base import Format
from onestill.export.graph import Drawing, Finish, fold_time
from onestill.export.text_parts import PROMPTS, Encoder, reads_tokens, token_ids, tokenizer_text
from onestill.students.model_card import Facts
from onestill.students.one_step import OneStep
from onestill.teachers.pipelines.teacher import PipelineTeacher

TOKENIZER_FILE, NOISE, TOKENS, PICTURE, SAMPLE = "tokenizer.json", "noise", "token_ids", "picture", "sample"
BATCHES = (1, 3)
"""The numbers of pictures that a file is checked with; it is traced with two."""


class GraphFormat(Format):
    """From noise [B, *sample_shape], and labels [B], token ids [B, L] or other conditions, to pictures [B, C, H, W].

    Pictures are in [-1, 1]; what networks of one's own draw is left as it is.
    """

    def write(self, step: OneStep, folder: Path) -> None:
        teacher = self.student.teacher
        self.reads_tokens = reads_tokens(self.student)
        eps, cond, inputs = self._rows()
        self.finish = Finish(teacher, clamps=self.clamps)
        # Of a student elsewhere than on the CPU the step, which does what it does, says what is expected.
        sample = self.expected(eps, cond) if self.device.type == "cpu" else step(eps, cond)
        teacher.to("cpu")
        self.checked = (eps, *inputs), self.finish(sample.cpu())
        fold_time(step, teacher, eps[:2], {name: value[:2] for name, value in cond.items()})
        if self.reads_tokens:
            write_text(folder / TOKENIZER_FILE, tokenizer_text(self.pipeline_teacher))
        try:
            self.write_graphs(step, folder)
        finally:
            teacher.to(self.device)
            del self.finish

    def check(self, folder: Path) -> float:
        (eps, *inputs), wanted = self.checked
        errors = []
        for num in BATCHES:
            found = self.drawn(folder, eps[:num], [rows[:num] for rows in inputs])
            errors.append(float((found - wanted[:num]).abs().max()) if found.shape == wanted[:num].shape else math.inf)
        return max(errors, key=lambda error: (math.isnan(error), error))

    @abstractmethod
    def write_graphs(self, step: OneStep, folder: Path) -> None:
        """Write the graphs of a step whose time is folded."""

    @abstractmethod
    def drawn(self, folder: Path, eps: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """Return what the folder, loaded afresh, makes of noise and inputs."""

    @property
    def clamps(self) -> bool:
        """Whether what is drawn is a picture, which is left in [-1, 1]."""
        return self.student.teacher.student_format == "pixel" or self.student.teacher.clamps

    @property
    def input_names(self) -> tuple[str, ...]:
        """The inputs besides noise."""
        if self.reads_tokens:
            return (TOKENS,)
        return tuple(name.replace(".", "_") for name in self.condition_names)

    @property
    def condition_names(self) -> tuple[str, ...]:
        """The conditions of the student's network."""
        return tuple(self.student.teacher.example_rows(1))

    @property
    def output_name(self) -> str:
        """What comes out."""
        return PICTURE if self.clamps else SAMPLE

    def drawing(self, step: OneStep) -> Drawing:
        """Return all of the student in one module: its text encoder, if it reads tokens, its step and its decoder."""
        encoder = Encoder(self.pipeline_teacher.pipeline.text_encoder) if self.reads_tokens else None
        return Drawing(step, self.condition_names, encoder, self.finish)

    def shapes(self) -> dict[str, str]:
        """Return what goes in and comes out, as the card and the files say it: "B x 1 x 8 x 8" by name."""
        (inputs, out) = self.checked
        tensors = dict(zip((NOISE, *self.input_names, self.output_name), (*inputs, out), strict=True))
        kinds = {torch.int64: "int64", torch.float32: "float32"}
        return {
            name: " x ".join(["B", *map(str, rows.shape[1:])]) + f" {kinds.get(rows.dtype, rows.dtype)}"
            for name, rows in tensors.items()
        }

    def in_words(self, facts: Facts) -> str:
        """Return what goes in and comes out, in words."""
        said = [f"`{name}` [{shape}]" for name, shape in self.shapes().items()]
        where = ", in [-1, 1]" if self.clamps else ""
        return f"from {', '.join(said[:-1])} to {said[-1]}{where}, for any number B of pictures"

    @property
    def pipeline_teacher(self) -> PipelineTeacher:
        """The teacher of a student that reads tokens."""
        return cast(PipelineTeacher, self.student.teacher)

    def _rows(self) -> tuple[Tensor, Cond, tuple[Tensor, ...]]:
        """Return (noise, conditions, inputs) of the pictures that a folder is checked with."""
        num = max(BATCHES)
        eps, cond = self.example(num)
        if not self.reads_tokens:
            return eps, cond, tuple(cond.values())
        cond = self.student.teacher.encode(PROMPTS[:num])
        return eps, cond, (token_ids(tokenizer_text(self.pipeline_teacher), PROMPTS[:num]),)
