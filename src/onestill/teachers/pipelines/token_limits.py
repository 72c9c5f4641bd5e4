"""What a pipeline's tokenizers are really given, learned by watching them: words around a prompt, and where it is cut.

A tokenizer's own limit is not what its pipeline cuts at: DeepFloyd IF cuts at 77 tokens whatever its T5 takes, and
Lumina 2 and Sana put instructions before each prompt. One call with an example shows all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from onestill.core.patch import replaced
from onestill.teachers.pipelines import text_encoders as encoders
from onestill.teachers.prompt_limits import EXAMPLE, PromptLimit, Truncation

# Tokenizers that have no limit say so with an endless number.
NO_LIMIT = 100_000


@dataclass(frozen=True)
class TokenizerCall:
    """One call of a tokenizer.

    Attributes:
        name: The component that it is, or is in.
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
def listening(pipeline: Any) -> Iterator[list[TokenizerCall]]:
    """Collect the calls of a pipeline's tokenizers, which says nothing of what it cuts meanwhile."""
    calls: list[TokenizerCall] = []
    with encoders.quiet(), ExitStack() as stack:
        for name, tokenizer in encoders.tokenizers(pipeline).items():
            stack.enter_context(_recorded(calls, name, tokenizer))
        yield calls


@contextmanager
def _recorded(calls: list[TokenizerCall], name: str, tokenizer: Any) -> Iterator[None]:
    cls = type(tokenizer)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = cls.__call__(self, *args, **kwargs)
        calls.append(_as_tokenizer_call(name, self, args, kwargs, found))
        return found

    # `tokenizer(...)` is looked up in the class, so the one object gets a class of its own for the time.
    with replaced(tokenizer, "__class__", type(cls.__name__, (cls,), {"__call__": call})):
        yield


def _as_tokenizer_call(
    name: str, tokenizer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], found: Any
) -> TokenizerCall:
    given = kwargs.get("text", args[0] if args else None)
    texts = tuple(text for text in ([given] if isinstance(given, str) else given or ()) if isinstance(text, str))
    most = None
    if kwargs.get("truncation") not in (None, False, "do_not_truncate"):
        most = kwargs.get("max_length") or tokenizer.model_max_length
    tokens = found["input_ids"]
    tokens = tokens.tolist() if hasattr(tokens, "tolist") else tokens
    return TokenizerCall(name, tokenizer, texts, most, kwargs.get("add_special_tokens", True), tokens)


def limits(calls: Sequence[TokenizerCall]) -> tuple[PromptLimit, ...]:
    """Return the limits of a pipeline that was given `EXAMPLE`, the smallest first; a tokenizer without one has none."""
    found: dict[int, list[tuple[str, Truncation]]] = {}
    for call in calls:
        text = next((text for text in call.texts if EXAMPLE in text.lower()), None)
        if text is not None and call.most is not None and call.most < NO_LIMIT:
            before, _, after = text.lower().rpartition(EXAMPLE)
            around = text[: len(before)], text[len(text) - len(after) :]
            truncation = Truncation(call.tokenizer, *around, call.most, call.special)
            found.setdefault(truncation.room, []).append((call.name.replace("tokenizer", "text_encoder"), truncation))
    known = []
    for room, here in sorted(found.items()):
        encoders_here = tuple(dict.fromkeys(name for name, _ in here))
        known.append(PromptLimit(room, encoders_here, tuple(each for _, each in here), len(found) == 1))
    return tuple(known)
