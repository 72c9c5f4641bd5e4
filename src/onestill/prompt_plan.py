"""Which prompts a run needs: chosen and checked before anything is written, encoded before the first step."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from tqdm.auto import tqdm

from onestill.conditions import PromptConditions
from onestill.config import DistillConfig
from onestill.prompt_cache import BATCH_SIZE, PromptCache, default_cache_dir
from onestill.prompts import Ints, PromptFile, text_key
from onestill.teachers import encoders
from onestill.teachers.base import NetworkTeacher
from onestill.teachers.family import PipelineTeacher

PROMPT_SETTINGS = (
    "prompt_file",
    "prompt_field",
    "num_prompts",
    "negative_prompt",
    "empty_prompt_fraction",
    "validation_prompt",
    "prompt_cache_dir",
)


@dataclass(frozen=True)
class PromptPlan:
    """The prompts of a run.

    Attributes:
        teacher: The teacher that encodes them.
        prompts: The file.
        pool: Indices of the prompts that the run draws from.
        shown: The validation prompts.
        cache: Where encoded prompts are.
        conditions: Where the trainer draws from, once all is encoded.
        messages: What should be said.
    """

    teacher: PipelineTeacher
    prompts: PromptFile
    pool: Ints
    shown: tuple[str, ...]
    cache: PromptCache
    conditions: PromptConditions
    messages: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """Return a hash of the encoder and of all prompts: the same conditions, or not."""
        digest = hashlib.blake2b(self.cache.encoder.encode(), digest_size=8)
        digest.update(np.ascontiguousarray(self.prompts.keys).tobytes())
        return digest.hexdigest()

    def encode(self, *, show_progress: bool = False) -> None:
        """Encode what the cache lacks and let the text encoders go.

        Raises:
            PromptCacheError: If the cache cannot be written.
        """
        self.cache.refresh()  # another run, or another process of this one, may have been here since
        texts = list(self.missing())
        if texts:
            # One line in ten seconds where the bar cannot redraw itself, such as in a log file.
            rate = 0.5 if sys.stderr.isatty() else 10
            hidden = not show_progress
            with encoders.quiet(), tqdm(total=len(texts), disable=hidden, desc="encoding", mininterval=rate) as bar:
                self.cache.add(
                    self._texts(texts),
                    self.teacher.encode,
                    self.teacher.are_cut,
                    progress=bar.update,
                )
        self.prompts.close()
        self.teacher.release_encoders()

    def missing(self) -> Ints:
        """Return which prompts are to be encoded: places in the shown ones and the pool, one after the other."""
        return self.cache.missing(np.concatenate([self.conditions.shown, self.conditions.keys]))

    def _texts(self, places: Ints | list[int]) -> Iterator[str]:
        for place in places:
            index = int(place) - len(self.shown)
            yield self.shown[place] if index < 0 else self.prompts[int(self.pool[index])]

    def num_cut(self) -> int:
        """Return how many of the prompts the text encoders will cut."""
        keys = np.unique(np.concatenate([self.conditions.shown, self.conditions.keys]))
        texts, found = self._texts(self.missing()), self.cache.num_cut(keys)
        while batch := list(islice(texts, 32 * BATCH_SIZE)):
            found += sum(self.teacher.are_cut(batch))
        return found


def use_negative_prompt(teacher: NetworkTeacher, negative_prompt: str | None, *, acts: bool = True) -> None:
    """Put a negative prompt in the place of the teacher's null condition.

    Args:
        teacher: The teacher, changed in place.
        negative_prompt: The prompt; None changes nothing.
        acts: Whether anything uses the null condition.

    Raises:
        ValueError: If the teacher takes no prompts, none of its guidance has a "no prompt", or nothing would change.
    """
    if negative_prompt is None:
        return
    if not isinstance(teacher, PipelineTeacher) or not teacher.spec.text:
        raise ValueError(f"--negative_prompt {negative_prompt!r} was given, but this teacher takes no text")
    if not teacher.can_guide:
        raise ValueError(
            f"--negative_prompt {negative_prompt!r}: a {type(teacher.pipeline).__name__} has no null condition that it could replace"
        )
    if not acts:
        raise ValueError(
            f"--negative_prompt {negative_prompt!r} acts through guidance only: give a --guidance_scale other than 1"
        )
    teacher.null_cond = teacher.encode([negative_prompt])


def refuse_prompts(config: DistillConfig) -> None:
    """Raise ValueError if a setting for prompts was given to a teacher without."""
    for name in PROMPT_SETTINGS:
        value = getattr(config, name)
        if value != DistillConfig.model_fields[name].default:
            shown = f" {value}" if not isinstance(value, tuple) else f" {value[0]}"
            raise ValueError(f"--{name}{shown} was given, but this teacher takes no text; leave it out")


def plan_prompts(config: DistillConfig, teacher: NetworkTeacher, num_processes: int = 1) -> PromptPlan:
    """Return the prompts of a run, all checked; nothing is written.

    The run draws from as many different prompts as it has draws. Which ones is decided by its seed, and a longer
    run of the same seed has all prompts of a shorter one.

    Raises:
        ValueError: If there is no usable prompt file, a setting does not fit the teacher, or the disk has no room.
    """
    if not isinstance(teacher, PipelineTeacher) or teacher.encoders_released:
        raise ValueError("the text encoders of this teacher were released by an earlier run: load it again")
    if config.prompt_file is None:
        raise ValueError("this teacher takes prompts: give a file of them with --prompt_file (.txt, .jsonl or .csv)")
    if config.empty_prompt_fraction > 0 and not teacher.can_guide:
        raise ValueError(
            f"--empty_prompt_fraction {config.empty_prompt_fraction:g}: a {type(teacher.pipeline).__name__} has no null condition"
        )
    prompts = PromptFile(config.prompt_file.expanduser(), config.prompt_field)
    draws = config.max_train_steps * config.train_batch_size * config.gradient_accumulation_steps * num_processes
    pool = choose(len(prompts), config.num_prompts or draws, config.seed)
    shown = config.validation_prompt or tuple(prompts[: config.num_validation_images])
    root = (config.prompt_cache_dir or default_cache_dir()).expanduser()
    cache = PromptCache(root, teacher.encoder_identity(), teacher.example_cond)
    conditions = PromptConditions(
        rows=cache.rows,
        keys=prompts.keys[pool],
        shown=np.array([text_key(text) for text in shown], dtype=np.int64),
        captions=shown,
        null_cond=teacher.null_cond,
        empty_fraction=config.empty_prompt_fraction,
        guidance_range=config.guidance_range,
    )
    plan = PromptPlan(teacher, prompts, pool, shown, cache, conditions, ())
    cache.check_space(len(plan.missing()))
    return PromptPlan(teacher, prompts, pool, shown, cache, conditions, _messages(plan, config))


def choose(num: int, wanted: int, seed: int) -> Ints:
    """Return the indices of `wanted` of `num` prompts, or of all if there are no more, in the file's order."""
    if wanted >= num:
        return np.arange(num)
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
    return np.sort(order[:wanted].numpy())


def _messages(plan: PromptPlan, config: DistillConfig) -> tuple[str, ...]:
    prompts, missing = plan.prompts, len(plan.missing())
    repeated = f" ({prompts.num_repeated:,} repeated)" if prompts.num_repeated else ""
    drawn = "" if len(plan.pool) == len(prompts) else f", of which the run draws from {len(plan.pool):,}"
    size = missing * plan.cache.row_bytes / 1e6
    cached = f"{missing:,} to encode into {plan.cache.folder} ({size:,.1f} MB)" if missing else "all encoded already"
    found = [f"{prompts.path}: {len(prompts):,} prompts{repeated}{drawn}; {cached}", *plan.cache.messages]
    teacher = plan.teacher
    if num_cut := plan.num_cut():
        most = teacher.prompt_limit
        are, them = ("prompt is", "it") if num_cut == 1 else ("prompts are", "them")
        found.append(f"warning: {num_cut:,} {are} longer than the {most} tokens the text encoder takes; it cuts {them}")
    if config.negative_prompt is not None and any(teacher.are_cut([config.negative_prompt])):
        found.append(f"warning: --negative_prompt is longer than {teacher.prompt_limit} tokens and is cut")
    return tuple(found)
