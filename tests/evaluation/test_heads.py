"""Classifiers with several heads: what a prompt asks for, what the heads see, and what is refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from onestill.evaluation.classifier import ConvFeatures
from onestill.evaluation.heads import (
    head_accuracies,
    head_hits,
    heads_of,
    pattern_of,
    read_prompt,
    split_logits,
)
from onestill.teachers.load import EMBEDDED

HEADS = {"letter": ("A", "a", "1"), "color": ("red", "blue"), "background": ("red", "blue")}
PATTERN = re.compile(r"an? (?P<color>\w+) (?P<letter>\w) on (?P<background>\w+)")
RECORD = {"heads": {name: list(words) for name, words in HEADS.items()}, "prompt_pattern": PATTERN.pattern}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red A on blue", (0, 0, 1)),
        ("a blue A on red", (0, 1, 0)),
        ("a red A on red", (0, 0, 0)),
        ("a red a on blue", (1, 0, 1)),  # the letter, not the article
        ("  a red 1 on blue\n", (2, 0, 1)),
        ("a red B on blue", None),
        ("a green A on blue", None),
        ("a Red A on blue", None),
        ("a red A on blue, and a blue A on red", None),
        ("not a red A on blue", None),
        ("a cat", None),
        ("", None),
    ],
)
def test_prompts_are_read_by_where_words_stand(prompt: str, expected: tuple[int, ...] | None) -> None:
    assert read_prompt(prompt, HEADS, PATTERN) == expected


def test_a_prompt_that_leaves_a_head_open_is_not_judged() -> None:
    pattern = re.compile(r"a( (?P<color>\w+))? (?P<letter>\w) on (?P<background>\w+)")
    assert read_prompt("a A on blue", HEADS, pattern) is None
    assert read_prompt("a red A on blue", HEADS, pattern) == (0, 0, 1)


def test_hits_are_those_of_each_heads_own_logits() -> None:
    logits = torch.tensor([[9.0, 1, 0, 3, 4, 8, 2], [0, 1, 5, 3, 1, 1, 2]])
    parts = split_logits(logits, HEADS)
    assert list(parts) == list(HEADS) and [part.shape[1] for part in parts.values()] == [3, 2, 2]
    # The first sees A, blue, red; the second 1, red, blue.
    hits = head_hits(logits, torch.tensor([[0, 1, 0], [2, 1, 1]]), HEADS)
    assert hits.tolist() == [[True, True, True], [True, False, True]]
    assert head_accuracies(hits, HEADS) == {"all": 0.5, "letter": 1, "color": 0.5, "background": 1}
    assert next(iter(head_accuracies(hits, HEADS))) == "all"
    with pytest.raises(ValueError, match=r"must be \[N, 7\] and labels \[N, 3\], got \[2, 7\] and \[2, 2\]"):
        head_hits(logits, torch.zeros(2, 2), HEADS)
    with pytest.raises(ValueError, match="at least one picture"):
        head_accuracies(hits[:0], HEADS)


def test_a_record_without_heads_has_none() -> None:
    assert heads_of({}, 10) == {} and pattern_of({}, {}) is None
    assert heads_of(RECORD, 7) == HEADS and pattern_of(RECORD, HEADS) == PATTERN


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": {"letter": "AB"}}, "must map the name of each head"),
        ({"heads": ["letter"]}, "must map the name of each head"),
        ({"heads": {"letter": ["A", 1]}}, "must map the name of each head"),
        ({"heads": {"letter": ["A", "A"]}}, "must map the name of each head"),
        ({"heads": {"letter": []}}, "must map the name of each head"),
        ({"heads": {"all": ["A"]}}, "names a head 'all'"),
        ({"heads": {"letter": ["A", "B"]}}, "has 2 classes in all, and the classifier 7 logits"),
        ({"prompt_pattern": "(?P<letter"}, "is no regular expression: missing >"),
        ({"prompt_pattern": r"(?P<letter>\w)"}, "one named group for each head, letter, color, background; it has letter"),
        ({"prompt_pattern": 7}, "it has none"),
    ],
)  # fmt: skip
def test_nonsense_in_a_file_is_refused_when_it_is_loaded(tmp_path: Path, change: Any, message: str) -> None:
    model = ConvFeatures(num_classes=7, width=8)
    model.record = {**RECORD, **change}
    model.save(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"=.*c\.safetensors'?: is damaged or of another version: .*" + message):
        ConvFeatures.load(tmp_path / "c.safetensors")


def test_heads_and_pattern_come_back_from_a_file(tmp_path: Path) -> None:
    model = ConvFeatures(num_classes=7, width=8)
    assert model.heads == {} and model.prompt_pattern is None
    model.record = dict(RECORD)
    model.save(tmp_path / "c.safetensors")
    loaded = ConvFeatures.load(tmp_path / "c.safetensors")
    assert loaded.heads == HEADS and loaded.prompt_pattern == PATTERN
    assert ConvFeatures.load(EMBEDDED["digits"].folder / "classifier.safetensors").heads == {}


def test_the_embedded_glyphs_read_all_their_own_prompts() -> None:
    folder = EMBEDDED["glyphs"].folder
    classifier = ConvFeatures.load(folder / "classifier.safetensors")
    assert list(classifier.heads) == ["character", "color", "background", "style", "family"]
    pattern = classifier.prompt_pattern
    assert pattern is not None
    with safe_open(folder / "images.safetensors", "pt") as file:
        labels = file.get_tensor("labels")[file.get_tensor("caption").argsort()].tolist()
    heldout = (folder / "heldout.txt").read_text(encoding="utf-8").splitlines()
    assert [list(read_prompt(prompt, classifier.heads, pattern) or ()) for prompt in heldout] == labels
    for prompt in (folder / "prompts.txt").read_text(encoding="utf-8").splitlines():
        assert read_prompt(prompt, classifier.heads, pattern) is not None
