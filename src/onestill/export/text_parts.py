"""The parts of a text student that turn prompts into what its network is given: a tokenizer's file and one text encoder."""

from __future__ import annotations

from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from onestill.export.graph import unguarded
from onestill.students.student import Student
from onestill.teachers.pipelines.teacher import PipelineTeacher

PROMPTS = ("a photo", "", "Two  Words, and 3 numbers' worth of them: " + "again and " * 40)
"""Prompts that tell whether ids are those of the pipeline: a plain one, none, and one that is too long."""

_KNOWN: WeakKeyDictionary[PipelineTeacher, bool] = WeakKeyDictionary()
"""What was found of a teacher: each format asks in turn, and its encoder may be large."""


class Encoder(nn.Module):
    """From token ids [B, L] to what a text encoder makes of them, [B, L, D]."""

    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, ids: Tensor) -> Tensor:
        """Return the last hidden states."""
        with unguarded(ids):
            return self.text_encoder(ids)[0].float()


def reads_tokens(student: Student) -> bool:
    """Return whether all that prompts decide is the last hidden states of one text encoder, of token ids alone."""
    teacher = cast(PipelineTeacher, student.teacher)
    pipeline = getattr(teacher, "pipeline", None)
    if pipeline is None or not teacher.spec.text or teacher.image_condition is not None or teacher.encoders_released:
        return False
    more = ("text_encoder_2", "tokenizer_2", "prior", "text_encoder_3")
    tokenizer = getattr(getattr(pipeline, "tokenizer", None), "backend_tokenizer", None)
    if tokenizer is None or len(teacher.signature.per_image) != 1 or any(hasattr(pipeline, name) for name in more):
        return False
    if teacher not in _KNOWN:
        _KNOWN[teacher] = _are_equal(teacher)
    return _KNOWN[teacher]


@torch.no_grad()
def _are_equal(teacher: PipelineTeacher) -> bool:
    """Return whether the ids of the tokenizer's file, encoded, are what the network is given for some prompts."""
    (wanted,) = teacher.encode(PROMPTS).values()
    encoder = teacher.pipeline.text_encoder
    ids = token_ids(tokenizer_text(teacher), PROMPTS).to(next(encoder.parameters()).device)
    try:
        found = Encoder(encoder)(ids).to(wanted)
    except (TypeError, ValueError, RuntimeError):  # an encoder that wants more than ids
        return False
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= 1e-5 * wanted.abs().max())


def tokenizer_text(teacher: PipelineTeacher) -> str:
    """Return the tokenizer of a pipeline as the text of a `tokenizer.json`, which pads and cuts prompts as it does."""
    from tokenizers import Tokenizer

    own: Any = teacher.pipeline.tokenizer
    tokenizer = Tokenizer.from_str(own.backend_tokenizer.to_str())
    tokenizer.enable_truncation(own.model_max_length)
    tokenizer.enable_padding(length=own.model_max_length, pad_id=own.pad_token_id, pad_token=own.pad_token)
    return str(tokenizer.to_str(pretty=True))


def token_ids(tokenizer: str, prompts: tuple[str, ...]) -> Tensor:
    """Return the ids [N, L] of prompts by the text of a `tokenizer.json`."""
    from tokenizers import Tokenizer

    return torch.tensor([found.ids for found in Tokenizer.from_str(tokenizer).encode_batch(list(prompts))])
