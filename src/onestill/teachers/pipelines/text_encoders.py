"""What a stock pipeline makes conditions of prompts with: which parts that is, and letting them go."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

# Parts that make no conditions: what denoises, what decodes, and what is done to finished pictures.
OTHERS = ("unet", "transformer", "vae", "safety_checker", "feature_extractor", "watermark")


def parts(pipeline: Any) -> dict[str, Any]:
    """Return by name what makes conditions: text encoders, tokenizers, and any other module, such as a projection."""
    return {
        name: part
        for name, part in pipeline.components.items()
        if not name.startswith(OTHERS) and (isinstance(part, torch.nn.Module) or _tokenizer_of(part) is not None)
    }


def tokenizers(pipeline: Any) -> dict[str, Any]:
    """Return the pipeline's tokenizers by the name of the component that each is, or is in."""
    found = {name: _tokenizer_of(part) for name, part in parts(pipeline).items()}
    return {name: tokenizer for name, tokenizer in found.items() if tokenizer is not None}


def _tokenizer_of(part: Any) -> Any:
    """Return a tokenizer, or the one in a processor; None for anything else."""
    if isinstance(part, torch.nn.Module):
        return None
    return part if hasattr(part, "get_vocab") else getattr(part, "tokenizer", None)


def release(pipeline: Any) -> None:
    """Take these parts out of the pipeline, so that their memory is free."""
    for name in parts(pipeline):
        setattr(pipeline, name, None)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def share(pipeline: Any, other: Any) -> None:
    """Let a pipeline use these modules of another in place of equal ones of its own; tokenizers are small."""
    theirs = parts(other)
    for name, part in parts(pipeline).items():
        other_part = theirs.get(name)
        if isinstance(part, torch.nn.Module) and part is not other_part and _are_equal(part, other_part):
            setattr(pipeline, name, other_part)


def _are_equal(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    weights, others = one.state_dict(), other.state_dict()
    return (
        plain_config(_config_of(one)) == plain_config(_config_of(other))
        and weights.keys() == others.keys()
        and all((v.dtype, v.device) == (others[key].dtype, others[key].device) for key, v in weights.items())
        and all(torch.equal(value, others[key]) for key, value in weights.items())
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep pipelines from printing every prompt that they cut: those are counted here."""
    from diffusers.utils import logging

    usual = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(usual)


def identity(pipeline: Any, facts: Sequence[object]) -> str:
    """Return a hash of these parts, weights and configurations and rules of tokenizers, and of further `facts`."""
    digest = hashlib.blake2b(repr(tuple(facts)).encode(), digest_size=8)
    for name, part in sorted(parts(pipeline).items()):
        if isinstance(part, torch.nn.Module):
            add_module(digest, name, part)
        else:
            digest.update(name.encode())
            digest.update(_tokenizer_words(_tokenizer_of(part)).encode())
    return digest.hexdigest()


def plain_config(config: Any) -> str:
    """Return a configuration as text, without where it was loaded from and by which version."""
    values = dict(config) if isinstance(config, Mapping) else config.to_dict()
    kept = {k: v for k, v in values.items() if not k.startswith("_") and k != "transformers_version"}
    return json.dumps(kept, sort_keys=True, default=str)


def add_module(digest: Any, name: str, module: Any) -> None:
    """Add a component's name, configuration and weights to a hash."""
    digest.update(name.encode())
    digest.update(plain_config(_config_of(module)).encode())
    for key, value in module.state_dict().items():
        digest.update(f"{key}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _config_of(module: Any) -> Any:
    return getattr(module, "config", {})  # a plain module of torch has none


def _tokenizer_words(tokenizer: Any) -> str:
    """Return what decides a tokenizer's tokens: its class, its rules or its vocabulary, and its limits."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.dumps(tokenizer.get_vocab(), sort_keys=True) if backend is None else backend.to_str()
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    return f"{type(tokenizer).__name__} {tokenizer.model_max_length} {special} {rules}"
