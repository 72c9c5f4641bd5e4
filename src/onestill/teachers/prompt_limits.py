"""How long a prompt may be: where the tokenizers of a text teacher truncate it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

EXAMPLE = "one plain zebra"
"""The prompt that tokenizers are watched with: no instruction says it, and no pipeline changes it but for capitals."""


@dataclass(frozen=True)
class Truncation:
    """Where one tokenizer is told to truncate, with what the pipeline puts around a prompt.

    Attributes:
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
        options = {"truncation": False, "padding": False, "add_special_tokens": self.special, "verbose": False}
        return [len(row) for row in self.tokenizer(list(texts), **options).input_ids]

    @property
    def room(self) -> int:
        """The tokens that are left for a prompt."""
        around, alone = self.num_tokens([self.before + EXAMPLE + self.after, EXAMPLE])
        return max(self.most - (around - alone), 0)


@dataclass(frozen=True)
class PromptLimit:
    """A number of tokens that some text encoders take of a prompt, and no more.

    Attributes:
        room: That number, with the special tokens and without what the pipeline puts around a prompt.
        encoders: Those encoders.
        truncations: Where their tokenizers truncate.
        alone: Whether no encoder of the pipeline takes another number.
    """

    room: int
    encoders: tuple[str, ...]
    truncations: tuple[Truncation, ...]
    alone: bool

    def are_exceeded(self, texts: Sequence[str]) -> list[bool]:
        """Return for each prompt whether it is longer."""
        # A token is a byte or more, and two more begin and end the text: most prompts need no counting.
        long = [i for i, text in enumerate(texts) if len(text.encode()) + 3 > self.room]
        found = [False] * len(texts)
        for truncation in self.truncations if long else ():
            numbers = truncation.num_tokens([truncation.before + texts[i] + truncation.after for i in long])
            for i, num in zip(long, numbers, strict=True):
                found[i] |= num > truncation.most
        return found

    def warning(self, num: int) -> str:
        """Return in words that `num` prompts are longer."""
        are, them = ("prompt is", "it") if num == 1 else ("prompts are", "them")
        named = "the text encoder" if self.alone else " and ".join(self.encoders)
        take, cut = ("takes", "it cuts") if self.alone or len(self.encoders) == 1 else ("take", "they cut")
        return f"warning: {num:,} {are} longer than the {self.room:,} tokens {named} {take}; {cut} {them}"


def exceeded(known: Sequence[PromptLimit], texts: Sequence[str]) -> list[int]:
    """Return which limits each prompt exceeds, as a number: bit i for the i-th."""
    bits = [[is_cut << place for is_cut in limit.are_exceeded(texts)] for place, limit in enumerate(known)]
    return [sum(row) for row in zip(*bits, strict=True)] if bits else [0] * len(texts)
