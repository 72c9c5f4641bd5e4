"""What a pipeline's tokenizers are really given, learned by watching them: words around a prompt, and where it is cut.

A tokenizer's own limit is not what its pipeline cuts at: DeepFloyd IF cuts at 77 tokens whatever its T5 takes, and
Lumina 2 and Sana put instructions before each prompt. One call with an example shows all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from onestill.teachers.pipelines import text_encoders as encoders

# Tokenizers that have no limit say so with an endless number.
NO_LIMIT = 100_000
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
    """Collect the calls of a pipeline's tokenizers, which says nothing of what it cuts meanwhile."""
    heard: list[Heard] = []
    with encoders.quiet(), ExitStack() as stack:
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


@dataclass(frozen=True)
class Cut:
    """Where one tokenizer is told to cut, with what the pipeline puts around a prompt.

    Attributes:
        tokenizer: The tokenizer.
        before: What the pipeline puts before a prompt.
        after: What it puts behind it.
        most: The tokens of all three that it passes on.
        special: Whether the special tokens are among them.
    """

    tokenizer: Any
    before: str
    after: str
    most: int
    special: bool

    def num_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text."""
        rows = self.tokenizer(
            list(texts), truncation=False, padding=False, add_special_tokens=self.special, verbose=False
        ).input_ids
        return [len(row) for row in rows]

    @property
    def room(self) -> int:
        """The tokens that are left for a prompt."""
        around, alone = self.num_tokens([self.before + EXAMPLE + self.after, EXAMPLE])
        return max(self.most - (around - alone), 0)


@dataclass(frozen=True)
class Limit:
    """A number of tokens that some text encoders take of a prompt, and no more.

    Attributes:
        room: That number, with the special tokens and without what the pipeline puts around a prompt.
        encoders: Those encoders.
        cuts: Where their tokenizers cut.
        alone: Whether no encoder of the pipeline takes another number.
    """

    room: int
    encoders: tuple[str, ...]
    cuts: tuple[Cut, ...]
    alone: bool

    def are_exceeded(self, texts: Sequence[str]) -> list[bool]:
        """Return for each prompt whether it is longer."""
        # A token is a byte or more, and two more begin and end the text: most prompts need no counting.
        long = [i for i, text in enumerate(texts) if len(text.encode()) + 3 > self.room]
        found = [False] * len(texts)
        for cut in self.cuts if long else ():
            for i, num in zip(long, cut.num_tokens([cut.before + texts[i] + cut.after for i in long]), strict=True):
                found[i] |= num > cut.most
        return found

    def warning(self, num: int) -> str:
        """Return in words that `num` prompts are longer."""
        are, them = ("prompt is", "it") if num == 1 else ("prompts are", "them")
        named = "the text encoder" if self.alone else " and ".join(self.encoders)
        take, cut = ("takes", "it cuts") if self.alone or len(self.encoders) == 1 else ("take", "they cut")
        return f"warning: {num:,} {are} longer than the {self.room:,} tokens {named} {take}; {cut} {them}"


def limits(heard: Sequence[Heard]) -> tuple[Limit, ...]:
    """Return the limits of a pipeline that was given `EXAMPLE`, the smallest first; a tokenizer without one has none."""
    found: dict[int, list[tuple[str, Cut]]] = {}
    for call in heard:
        text = next((text for text in call.texts if EXAMPLE in text.lower()), None)
        if text is not None and call.most is not None and call.most < NO_LIMIT:
            before, _, after = text.lower().rpartition(EXAMPLE)
            around = text[: len(before)], text[len(text) - len(after) :]
            cut = Cut(call.tokenizer, *around, call.most, call.special)
            found.setdefault(cut.room, []).append((call.name.replace("tokenizer", "text_encoder"), cut))
    return tuple(
        Limit(room, tuple(dict.fromkeys(name for name, _ in cuts)), tuple(cut for _, cut in cuts), len(found) == 1)
        for room, cuts in sorted(found.items())
    )


def exceeded(known: Sequence[Limit], texts: Sequence[str]) -> list[int]:
    """Return which limits each prompt exceeds, as a number: bit i for the i-th."""
    numbers = [0] * len(texts)
    for place, limit in enumerate(known):
        numbers = [old | is_cut << place for old, is_cut in zip(numbers, limit.are_exceeded(texts), strict=True)]
    return numbers
