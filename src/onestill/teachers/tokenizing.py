"""What a pipeline's tokenizers are really given, learned by watching them: words around a prompt, and where it is cut.

A tokenizer's own limit is not what its pipeline cuts at: DeepFloyd IF cuts at 77 tokens whatever its T5 takes, and
Lumina 2 and Sana put instructions before each prompt. One call with an example shows all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from onestill.teachers import encoders

EXAMPLE = "one plain zebra"
"""The prompt that tokenizers are watched with: no instruction says it, and no pipeline changes it but for capitals."""


@dataclass(frozen=True)
class Heard:
    """One call of a tokenizer.

    Attributes:
        name: The component that it is, or is in.
        tokenizer: The tokenizer.
        texts: What it was given.
        most: The tokens that it cut each text at; None if it cut none.
        special: Whether it added its special tokens.
        tokens: What it returned.
    """

    name: str
    tokenizer: Any
    texts: tuple[str, ...]
    most: int | None
    special: bool
    tokens: Any


@contextmanager
def listening(pipeline: Any) -> Iterator[list[Heard]]:
    """Collect the calls of a pipeline's tokenizers."""
    heard: list[Heard] = []
    with ExitStack() as stack:
        for name, tokenizer in encoders.tokenizers(pipeline).items():
            stack.enter_context(_heard_by(heard, name, tokenizer))
        yield heard


@contextmanager
def _heard_by(heard: list[Heard], name: str, tokenizer: Any) -> Iterator[None]:
    cls = type(tokenizer)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = cls.__call__(self, *args, **kwargs)
        heard.append(_as_heard(name, self, args, kwargs, found))
        return found

    # `tokenizer(...)` is looked up in the class, so the one object gets a class of its own for the time.
    tokenizer.__class__ = type(cls.__name__, (cls,), {"__call__": call})
    try:
        yield
    finally:
        tokenizer.__class__ = cls


def _as_heard(name: str, tokenizer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], found: Any) -> Heard:
    given = kwargs.get("text", args[0] if args else None)
    texts = tuple(text for text in ([given] if isinstance(given, str) else given or ()) if isinstance(text, str))
    most = None
    if kwargs.get("truncation") not in (None, False, "do_not_truncate"):
        most = kwargs.get("max_length") or tokenizer.model_max_length
    tokens = found["input_ids"]
    tokens = tokens.tolist() if hasattr(tokens, "tolist") else tokens
    return Heard(name, tokenizer, texts, most, kwargs.get("add_special_tokens", True), tokens)
