"""Which prompts a run needs: chosen and checked before anything is written, encoded before the first step."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from tqdm.auto import tqdm

from onestill.data.cascade import CascadeConditions, FirstStage, joined_rows, with_prefix
from onestill.data.conditions import Conditions, PromptConditions
from onestill.data.prompt_cache import BATCH_SIZE, PromptCache, default_cache_dir, in_words
from onestill.data.prompts import Ints, PromptFile, text_key
from onestill.teachers.base import Teacher
from onestill.teachers.pipelines import text_encoders as encoders
from onestill.training.config import DistillConfig

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
        keys: Keys of the shown prompts and of the pool, one after the other.
        cache: Where encoded prompts are.
        conditions: Where the trainer draws from, once all is encoded.
        messages: What should be said.
        base: The student that draws pictures from the same prompts, if the teacher enlarges some.
        base_cache: Where the prompts encoded for it are; None where the teacher's rows hold them.
    """

    teacher: Teacher
    prompts: PromptFile
    pool: Ints
    shown: tuple[str, ...]
    keys: Ints
    cache: PromptCache
    conditions: Conditions
    messages: tuple[str, ...]
    base: FirstStage | None = None
    base_cache: PromptCache | None = None

    @property
    def fingerprint(self) -> str:
        """Return a hash of the encoder and of all prompts, and after a + that of the base student, if there is one."""
        digest = hashlib.blake2b(self.cache.encoder.encode(), digest_size=8)
        digest.update(np.ascontiguousarray(self.prompts.keys).tobytes())
        return digest.hexdigest() + (f"+{self.base.fingerprint}" if self.base is not None else "")

    @property
    def drawn_fingerprint(self) -> str:
        """Return a hash of which of the prompts the run draws from."""
        return hashlib.blake2b(np.ascontiguousarray(self.pool).tobytes(), digest_size=8).hexdigest()

    def encode(self, *, show_progress: bool = False) -> None:
        """Encode what the cache lacks and let the text encoders go.

        Raises:
            PromptCacheError: If the cache cannot be written.
        """
        self._fill(self.cache, self.teacher, show_progress)
        if self.base is not None and self.base_cache is not None:
            self._fill(self.base_cache, self.base.teacher, show_progress)
        self.prompts.close()
        self.teacher.release_encoders()
        if self.base is not None:
            self.base.teacher.release_encoders()

    def _fill(self, cache: PromptCache, teacher: Teacher, show_progress: bool) -> None:
        cache.refresh()  # another run, or another process of this one, may have been here since
        texts = list(cache.missing(self.keys))
        if not texts:
            return
        # One line in ten seconds where the bar cannot redraw itself, such as in a log file.
        rate = 0.5 if sys.stderr.isatty() else 10
        with (
            encoders.quiet(),
            tqdm(total=len(texts), disable=not show_progress, desc="encoding", mininterval=rate) as bar,
        ):
            cache.add(
                self._texts(texts),
                teacher.encode,
                teacher.exceeded_limits,
                progress=bar.update,
            )

    def missing(self) -> Ints:
        """Return which prompts are to be encoded: places in the shown ones and the pool, one after the other."""
        return self.cache.missing(self.keys)

    def _texts(self, places: Ints | list[int]) -> Iterator[str]:
        for place in places:
            index = int(place) - len(self.shown)
            yield self.shown[place] if index < 0 else self.prompts[int(self.pool[index])]

    def num_cut(self) -> list[int]:
        """Return how many of the prompts exceed each limit of the text encoders, which cut them there."""
        texts, keys, places = self._texts(self.missing()), np.unique(self.keys), range(len(self.teacher.prompt_limits))
        found = [self.cache.num_cut(keys, place) for place in places]
        while batch := list(islice(texts, 32 * BATCH_SIZE)):
            cuts = self.teacher.exceeded_limits(batch)
            found = [num + sum(cut >> place & 1 for cut in cuts) for place, num in enumerate(found)]
        return found


def refuse_prompts(config: DistillConfig) -> None:
    """Raise ValueError if a setting for prompts was given to a teacher without."""
    for name in PROMPT_SETTINGS:
        value = getattr(config, name)
        if value != DistillConfig.model_fields[name].default:
            shown = f" {value}" if not isinstance(value, tuple) else f" {value[0]}"
            raise ValueError(f"--{name}{shown} was given, but this teacher takes no text; leave it out")


def split_fingerprint(fingerprint: str) -> tuple[str, str]:
    """Return the parts of a plan's fingerprint: (of the prompts, of the base student or "")."""
    prompts, _, base = fingerprint.partition("+")
    return prompts, base


def plan_prompts(
    config: DistillConfig,
    teacher: Teacher,
    prompts: PromptFile,
    num_processes: int = 1,
    base: FirstStage | None = None,
) -> PromptPlan:
    """Return the prompts of a run, all checked; nothing is written.

    The run draws from as many different prompts as it has draws. Which ones is decided by its seed, and a longer
    run of the same seed has all prompts of a shorter one.

    Args:
        config: The run.
        teacher: The teacher.
        prompts: The prompts to choose from.
        num_processes: How many draw.
        base: The student that draws the pictures that the teacher enlarges, if it does.

    Raises:
        ValueError: If a setting does not fit the teacher, or the disk has no room.
    """
    if teacher.encoders_released:
        raise ValueError("the text encoders of this teacher were released by an earlier run: load it again")
    pool = choose(len(prompts), most_prompts(config, num_processes), config.seed)
    shown = config.validation_prompt or tuple(prompts[: config.num_validation_images])
    root = (config.prompt_cache_dir or default_cache_dir()).expanduser()
    # Without what belongs to a picture: here that is an example, and each row of a run has its own.
    cache = PromptCache(root, teacher.encoder_identity(), teacher.prompt_rows(teacher.example_cond))
    encoded = PromptConditions(
        encoded=cache.rows,
        keys=prompts.keys[pool],
        shown=np.array([text_key(text) for text in shown], dtype=np.int64),
        captions=shown,
        empty_cond=teacher.prompt_rows(teacher.encode([""])),
        empty_fraction=config.empty_prompt_fraction,
        guidance_range=config.guidance_range,
    )
    conditions: Conditions = encoded
    base_cache = None
    if base is not None:
        encoded, base_cache = _with_base(encoded, cache, teacher, base)
        conditions = CascadeConditions(encoded, teacher, base)
    keys = np.concatenate([encoded.shown, encoded.keys])
    plan = PromptPlan(teacher, prompts, pool, shown, keys, cache, conditions, (), base, base_cache)
    cache.check_space(len(plan.missing()))
    if base_cache is not None:
        base_cache.check_space(len(base_cache.missing(keys)))
    return replace(plan, messages=_messages(plan, config))


def _with_base(
    encoded: PromptConditions, cache: PromptCache, teacher: Teacher, base: FirstStage
) -> tuple[PromptConditions, PromptCache | None]:
    """Return (the conditions with those of the base student beside them, its own cache or None if it needs none)."""
    names = tuple(base.teacher.example_cond)
    empty = with_prefix(base.teacher.encode([""]))
    if base.shares_rows(teacher):
        rows = lambda keys: joined_rows(cache.rows(keys), None, names)  # noqa: E731 - passed on at once
        own = None
        base.fingerprint  # noqa: B018 - of its encoders too, which go here: those of the teacher do the same
        base.teacher.release_encoders()
    else:
        own = PromptCache(cache.root, base.teacher.encoder_identity(), base.teacher.example_cond)
        rows = lambda keys: joined_rows(cache.rows(keys), lambda: own.rows(keys), names)  # noqa: E731 - passed on at once
    return replace(encoded, encoded=rows, empty_cond={**encoded.empty_cond, **empty}), own


def most_prompts(config: DistillConfig, num_processes: int = 1) -> int:
    """Return how many different prompts a run draws from, if its file holds so many."""
    draws = config.max_train_steps * config.train_batch_size * config.gradient_accumulation_steps * num_processes
    return config.num_prompts or draws


def check_longer(plan: PromptPlan, config: DistillConfig, begun_with: int, num_processes: int = 1) -> None:
    """Raise ValueError if a run that was begun with so many steps draws from other prompts now that it has more."""
    before = most_prompts(config.model_copy(update={"max_train_steps": begun_with}), num_processes)
    if (drew := min(len(plan.prompts), before)) != len(plan.pool):
        raise ValueError(
            f"--max_train_steps {config.max_train_steps}: the run was begun with {begun_with}, and draws from {drew:,} of the "
            f"{len(plan.prompts):,} prompts; a longer one draws from {len(plan.pool):,}, so it is another run. Name a new "
            "--output_dir; with --num_prompts from the start a run can be made longer"
        )


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
    size = in_words(missing * plan.cache.row_bytes)
    cached = f"{missing:,} to encode into {plan.cache.folder} ({size})" if missing else "all encoded already"
    found = [f"{prompts.path}: {len(prompts):,} prompts{repeated}{drawn}; {cached}", *plan.cache.messages]
    if plan.base_cache is not None and len(lacking := plan.base_cache.missing(plan.keys)):
        size = in_words(len(lacking) * plan.base_cache.row_bytes)
        found.append(f"{len(lacking):,} to encode for --base_student into {plan.base_cache.folder} ({size})")
    if plan.base_cache is not None:
        found.extend(plan.base_cache.messages)
    if config.num_prompts is not None and config.num_prompts > len(prompts):
        found.append(f"--num_prompts {config.num_prompts:,} is more than there are, and all are drawn from")
    limits = plan.teacher.prompt_limits
    found.extend(limit.warning(num) for limit, num in zip(limits, plan.num_cut(), strict=True) if num)
    if config.negative_prompt is not None:
        for limit in plan.teacher.negative_limits(config.negative_prompt):
            found.append(f"warning: --negative_prompt is longer than {limit.room} tokens and is cut")
    return tuple(found)
