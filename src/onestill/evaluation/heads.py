"""Classifiers with several heads: what a prompt says that a picture must show, and whether it does.

The logits of the heads lie side by side. A classifier's record names the heads and their classes in this order
(`heads`), and how prompts of its kind are read (`prompt_pattern`): a regular expression with one named group for
each head, which has to fit the whole prompt, and whose groups have to be classes of their heads. So equal words in
two heads (the colour of a letter, and of what is behind it) and classes of one character are told apart by where
they stand. Case matters.
"""

import re
from collections.abc import Mapping, Sequence

import regex
import torch
from torch import Tensor

from onestill.core.errors import SettingError

Heads = Mapping[str, tuple[str, ...]]
"""The classes of each head, by the head's name, in the order of the logits."""
_PATIENCE = 0.5  # seconds for one prompt; usual patterns take microseconds
_LONGEST_PATTERN = 100_000
ALL = "all"
"""The name of "every head is right" among the accuracies."""


def heads_of(record: Mapping[str, object], num_classes: int) -> dict[str, tuple[str, ...]]:
    """Return the heads that the record of a classifier of `num_classes` logits names; empty where it names none.

    Raises:
        ValueError: If the heads are not lists of different words with `num_classes` in all, or one is named "all".
    """
    found = record.get("heads", {})
    if not isinstance(found, Mapping) or not all(_are_words(classes) for classes in found.values()):
        raise ValueError("record['heads'] must map the name of each head to the list of its different class words")
    if ALL in found:
        raise ValueError(f"record['heads'] names a head {ALL!r}, which stands for all of them")
    heads = {str(name): tuple(classes) for name, classes in found.items()}
    total = sum(map(len, heads.values()))
    if heads and total != num_classes:
        raise ValueError(f"record['heads'] has {total} classes in all, and the classifier {num_classes} logits")
    return heads


def pattern_of(record: Mapping[str, object], heads: Heads) -> re.Pattern[str] | None:
    """Return the pattern by which prompts are read; None where a classifier's record has none.

    Raises:
        ValueError: If the pattern is no regular expression, or its named groups are not the heads.
    """
    text = record.get("prompt_pattern")
    if text is None:
        return None
    if isinstance(text, str) and len(text) > _LONGEST_PATTERN:
        raise ValueError(f"record['prompt_pattern'] has {len(text)} characters; it may have {_LONGEST_PATTERN}")
    try:
        pattern = re.compile(text if isinstance(text, str) else "")
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"record['prompt_pattern'] is no regular expression: {error}") from error
    if set(pattern.groupindex) != set(heads):
        wanted, found = (", ".join(names) or "none" for names in (heads, pattern.groupindex))
        raise ValueError(f"record['prompt_pattern'] must have one named group for each head, {wanted}; it has {found}")
    return pattern if heads else None


def read_prompt(prompt: str, heads: Heads, pattern: re.Pattern[str]) -> tuple[int, ...] | None:
    """Return the class of each head that a prompt asks for; None for a prompt that is not of this kind.

    Raises:
        SettingError: If the pattern does not end: it tries again and again, as `(a+)+` does.
    """
    try:
        # The engine that knows a bound.
        match = regex.fullmatch(pattern.pattern, prompt.strip(), timeout=_PATIENCE)
    except (TimeoutError, regex.error) as error:
        why = f"the classifier's prompt_pattern {pattern.pattern[:60]!r} does not end on the prompt {prompt[:60]!r}"
        raise SettingError("features", why=why, todo="write one without a repetition inside another") from error
    if match is None or any(match[name] not in classes for name, classes in heads.items()):
        return None
    return tuple(classes.index(match[name]) for name, classes in heads.items())


def split_logits(logits: Tensor, heads: Heads) -> dict[str, Tensor]:
    """Return the logits [N, classes of the head] of each head, of the logits [N, sum of classes] side by side."""
    parts = torch.split(logits, [len(classes) for classes in heads.values()], dim=1)
    return dict(zip(heads, parts, strict=True))


def head_hits(logits: Tensor, labels: Tensor, heads: Heads) -> Tensor:
    """Return whether each head's largest logit [N, sum of classes] is at its label, both [N, num_heads]."""
    total = sum(map(len, heads.values()))
    if logits.ndim != 2 or logits.shape[1] != total or labels.shape != (len(logits), len(heads)):
        found = f"{list(logits.shape)} and {list(labels.shape)}"
        raise ValueError(f"logits must be [N, {total}] and labels [N, {len(heads)}], got {found}")
    guesses = torch.stack([part.argmax(dim=1) for part in split_logits(logits, heads).values()], dim=1)
    return guesses.cpu() == labels.cpu()


def head_accuracies(hits: Tensor, heads: Heads) -> dict[str, float]:
    """Return the share of pictures on which every head hits, as `all`, and that of each head; of hits [N, num_heads]."""
    if not len(hits):
        raise ValueError("an accuracy needs at least one picture")
    each = hits.double().mean(dim=0).tolist()
    return {ALL: hits.all(dim=1).double().mean().item(), **dict(zip(heads, each, strict=True))}


def _are_words(classes: object) -> bool:
    if not isinstance(classes, Sequence) or isinstance(classes, str) or not classes:
        return False
    return all(isinstance(word, str) for word in classes) and len(set(classes)) == len(classes)
