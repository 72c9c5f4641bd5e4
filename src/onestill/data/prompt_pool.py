"""Which prompts a run needs: chosen and checked before anything is written, encoded before the first step."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from tqdm.auto import tqdm

from onestill.core.errors import SettingError, named
from onestill.core.tensors import Cond
from onestill.data.cascade import CascadeConditions, FirstStage, with_prefix
from onestill.data.conditions import Conditions, PromptConditions
from onestill.data.prompt_cache import BATCH_SIZE, PromptCache, default_cache_dir, in_words
from onestill.data.prompts import Ints, PromptFile, text_key
from onestill.data.settings import PromptSettings
from onestill.teachers.base import Teacher
from onestill.teachers.pipelines import text_encoders as encoders


@dataclass(frozen=True)
class PromptPool:
    """The prompts of a run.

    Attributes:
        teacher: The teacher that encodes them.
        prompts: The file.
        drawn: Indices of the prompts that the run draws from.
        shown: The validation prompts.
        keys: Keys of the shown prompts and of the drawn ones, one after the other.
        cache: Where encoded prompts are.
        conditions: Where the trainer draws from, once all is encoded.
        messages: What should be said.
        first_stage: The student that draws pictures from the same prompts, if the teacher enlarges some.
        first_stage_cache: Where the prompts encoded for it are; None where the teacher's rows hold them.
    """

    teacher: Teacher
    prompts: PromptFile
    drawn: Ints
    shown: tuple[str, ...]
    keys: Ints
    cache: PromptCache
    conditions: Conditions
    messages: tuple[str, ...]
    first_stage: FirstStage | None = None
    first_stage_cache: PromptCache | None = None

    @property
    def fingerprint(self) -> str:
        """Return a hash of the encoder and of all prompts, and after a + that of the first stage, if there is one."""
        digest = hashlib.blake2b(self.cache.encoder.encode() + self.prompts.keys.tobytes(), digest_size=8)
        return digest.hexdigest() + (f"+{self.first_stage.fingerprint}" if self.first_stage is not None else "")

    @property
    def drawn_fingerprint(self) -> str:
        """Return a hash of which of the prompts the run draws from."""
        return hashlib.blake2b(self.drawn.tobytes(), digest_size=8).hexdigest()

    def encode(self, *, show_progress: bool = False) -> None:
        """Encode what the cache lacks and let the text encoders go; PromptCacheError if it cannot be written."""
        self._fill(self.cache, self.teacher, show_progress)
        if self.first_stage is not None:
            if self.first_stage_cache is not None:
                self._fill(self.first_stage_cache, self.first_stage.teacher, show_progress)
            self.first_stage.teacher.release_encoders()
        self.teacher.release_encoders()
        self.prompts.close()

    def _fill(self, cache: PromptCache, teacher: Teacher, show_progress: bool) -> None:
        cache.refresh()  # another run, or another process of this one, may have been here since
        cache.verify(self.keys)
        places = cache.missing(self.keys)
        if not len(places):
            return
        # One line in ten seconds where the bar cannot redraw itself, such as in a log file.
        rate = 0.5 if sys.stderr.isatty() else 10
        bar = tqdm(total=len(places), disable=not show_progress, desc="encoding", mininterval=rate)
        with encoders.quiet(), bar:
            cache.add(self._texts(places), teacher.encode, teacher.exceeded_limits, progress=bar.update)

    def _texts(self, places: Ints) -> Iterator[str]:
        """Yield prompts by their places in the shown ones and the drawn ones, one after the other."""
        for place in places:
            index = int(place) - len(self.shown)
            yield self.shown[place] if index < 0 else self.prompts[int(self.drawn[index])]

    def num_cut(self) -> list[int]:
        """Return how many of the prompts exceed each limit of the text encoders, which cut them there."""
        texts, keys = self._texts(self.cache.missing(self.keys)), np.unique(self.keys)
        found = [self.cache.num_cut(keys, place) for place in range(len(self.teacher.prompt_limits))]
        while batch := list(islice(texts, 32 * BATCH_SIZE)):
            cuts = self.teacher.exceeded_limits(batch)
            found = [num + sum(cut >> place & 1 for cut in cuts) for place, num in enumerate(found)]
        return found


def refuse_prompts(settings: PromptSettings, shown: Sequence[str] = ()) -> None:
    """Raise SettingError if a setting for prompts, or a prompt to be shown, was given to a teacher without."""
    given = {name: getattr(settings, name) for name in PromptSettings.model_fields}
    given = {name: v for name, v in given.items() if v != PromptSettings.model_fields[name].default}
    for name, value in [*given.items(), *(("validation_prompt", prompt) for prompt in shown)]:
        raise SettingError(name, value, "was given, but this teacher takes no text", "leave it out")


def split_fingerprint(fingerprint: str) -> tuple[str, str]:
    """Return the parts of a pool's fingerprint: (of the prompts, of the first stage or "")."""
    prompts, _, base = fingerprint.partition("+")
    return prompts, base


def make_prompt_pool(
    settings: PromptSettings,
    teacher: Teacher,
    prompts: PromptFile,
    *,
    num_draws: int,
    seed: int,
    shown: tuple[str, ...] = (),
    num_shown: int = 0,
    guidance_range: tuple[float, float] | None = None,
    first_stage: FirstStage | None = None,
) -> PromptPool:
    """Return the prompts of a run, all checked, SettingError if the disk has no room for them; nothing is written.

    The run draws from as many different prompts as it has draws, `num_draws` with repetition. Which ones is decided by
    its seed, and a longer run of the same seed has all prompts of a shorter one. Where none are to be `shown`, the
    file's first `num_shown` are. `PromptConditions` says what the guidance range is, `PromptPool` the rest.
    """
    if teacher.encoders_released:
        raise ValueError("the text encoders of this teacher were released by an earlier run: load it again")
    drawn = choose(len(prompts), settings.num_prompts or num_draws, seed)
    shown = shown or tuple(prompts[:num_shown])
    root = (settings.prompt_cache_dir or default_cache_dir()).expanduser()
    # Without what belongs to a picture: here that is an example, and each row of a run has its own.
    cache = PromptCache(root, teacher.encoder_identity(), teacher.prompt_rows(teacher.example_cond))
    encoded = PromptConditions(
        encoded=cache.rows,
        keys=prompts.keys[drawn],
        shown=np.array([text_key(text) for text in shown], dtype=np.int64),
        captions=shown,
        empty_cond=teacher.prompt_rows(teacher.encode([""])),
        empty_fraction=settings.empty_prompt_fraction,
        guidance_range=guidance_range,
    )
    conditions: Conditions = encoded
    own_cache = None
    if first_stage is not None:
        encoded, own_cache = _with_first_stage(encoded, cache, teacher, first_stage)
        conditions = CascadeConditions(encoded, teacher, first_stage)
    keys = np.concatenate([encoded.shown, encoded.keys])
    pool = PromptPool(teacher, prompts, drawn, shown, keys, cache, conditions, (), first_stage, own_cache)
    cache.check_space(len(cache.missing(keys)))
    if own_cache is not None:
        own_cache.check_space(len(own_cache.missing(keys)))
    return replace(pool, messages=_messages(pool, settings))


def _with_first_stage(
    encoded: PromptConditions, cache: PromptCache, teacher: Teacher, first_stage: FirstStage
) -> tuple[PromptConditions, PromptCache | None]:
    """Return (the conditions with those of the first stage among them, its own cache or None if it needs none)."""
    first, own = first_stage.teacher, None
    empty = with_prefix(first.encode([""]))
    if not first_stage.shares_rows(teacher):
        own = PromptCache(cache.root, first.encoder_identity(), first.example_cond)
    else:
        first_stage.fingerprint  # noqa: B018 - of its encoders too, which go here: those of the teacher do the same
        first.release_encoders()

    def rows(keys: Ints) -> Cond:
        found = cache.rows(keys)
        firsts = own.rows(keys) if own is not None else {name: found[name].clone() for name in first.example_cond}
        return found | with_prefix(firsts)

    return replace(encoded, encoded=rows, empty_cond={**encoded.empty_cond, **empty}), own


def choose(num: int, wanted: int, seed: int) -> Ints:
    """Return the indices of `wanted` of `num` prompts, or of all if there are no more, in the file's order."""
    if wanted >= num:
        return np.arange(num)
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
    return np.sort(order[:wanted].numpy())


def _messages(pool: PromptPool, settings: PromptSettings) -> tuple[str, ...]:
    prompts, missing = pool.prompts, len(pool.cache.missing(pool.keys))
    repeated = f" ({prompts.num_repeated:,} repeated)" if prompts.num_repeated else ""
    drawn = "" if len(pool.drawn) == len(prompts) else f", of which the run draws from {len(pool.drawn):,}"
    size = in_words(missing * pool.cache.row_bytes)
    cached = f"{missing:,} to encode into {pool.cache.folder} ({size})" if missing else "all encoded already"
    found = [f"{prompts.path}: {len(prompts):,} prompts{repeated}{drawn}; {cached}", *pool.cache.messages]
    if (cache := pool.first_stage_cache) is not None:
        if missing := len(cache.missing(pool.keys)):
            size = in_words(missing * cache.row_bytes)
            found.append(f"{missing:,} to encode for {named('base_student')} into {cache.folder} ({size})")
        found.extend(cache.messages)
    if settings.num_prompts is not None and settings.num_prompts > len(prompts):
        found.append(f"{named('num_prompts')} {settings.num_prompts:,} is more than there are, and all are drawn from")
    limits = pool.teacher.prompt_limits
    found.extend(limit.warning(num) for limit, num in zip(limits, pool.num_cut(), strict=True) if num)
    if settings.negative_prompt is not None:
        for limit in pool.teacher.negative_limits(settings.negative_prompt):
            found.append(f"warning: {named('negative_prompt')} is longer than {limit.room} tokens and is cut")
    return tuple(found)
