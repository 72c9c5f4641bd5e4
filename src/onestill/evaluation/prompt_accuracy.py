"""Prompt accuracy: whether a classifier of several heads sees in the images what their prompts say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onestill.evaluation.features import ClassifierFeatures, FeatureExtractor
from onestill.evaluation.heads import ALL, head_accuracies, head_hits, read_prompt


@dataclass(frozen=True)
class PromptTargets:
    """What the classifier has to see: the images whose prompt it can read, [M], and their labels, [M, num_heads]."""

    judge: ClassifierFeatures
    rows: Tensor
    labels: Tensor

    def hits(self, images: Tensor, first: int = 0) -> Tensor:
        """Return whether each head is right, [K, num_heads], on the K images to judge of some [N, C, H, W] from `first` on."""
        heads = self.judge.classifier.heads
        here = (self.rows >= first) & (self.rows < first + len(images))
        if not here.any():
            return torch.empty(0, len(heads), dtype=torch.bool)
        return head_hits(self.judge.logits(images[self.rows[here] - first]), self.labels[here], heads)

    def accuracies(self, hits: Tensor) -> dict[str, float]:
        """Return the share of the judged images on which every head is right, and that of each head."""
        return head_accuracies(hits, self.judge.classifier.heads)

    def parts(self, hits: Tensor) -> dict[str, Tensor]:
        """Return what each judged image says of the accuracies, by their names, [M]."""
        return {ALL: hits.all(dim=1), **dict(zip(self.judge.classifier.heads, hits.T, strict=True))}


def read_prompts(extractor: FeatureExtractor, prompts: Sequence[str]) -> tuple[PromptTargets | None, tuple[str, ...]]:
    """Return what has to be seen in images of these prompts (None without a fit classifier), and lines about it."""
    if not isinstance(extractor, ClassifierFeatures):
        return None, ()
    heads, pattern = extractor.classifier.heads, extractor.classifier.prompt_pattern
    if pattern is None:
        return None, ("no prompt accuracy: the classifier of the features does not say how prompts are read",)
    read = {prompt: read_prompt(prompt, heads, pattern) for prompt in dict.fromkeys(prompts)}
    rows = [i for i, prompt in enumerate(prompts) if read[prompt] is not None]
    if not rows:
        return None, (f"no prompt accuracy: no prompt is of the classifier's kind, such as {prompts[0]!r}",)
    without = len(prompts) - len(rows)
    have = "has a prompt that is" if without == 1 else "have prompts that are"
    others = f" ({without:,} {have} not of its kind)" if without else ""
    lines = [f"prompt accuracy: what the classifier sees in {len(rows):,} of {len(prompts):,} images a row{others}"]
    own = extractor.classifier.record.get("held_out_accuracy_per_head")
    if isinstance(own, dict) and set(own) == set(heads) and all(isinstance(v, (int, float)) for v in own.values()):
        lines.append("the classifier itself, on real images: " + ", ".join(f"{head} {own[head]:.3f}" for head in heads))
    labels = torch.tensor([read[prompts[i]] for i in rows])
    return PromptTargets(extractor, torch.tensor(rows), labels), tuple(lines)
