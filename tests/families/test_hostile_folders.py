"""Folders that somebody broke or means harm with: each is refused in one line, soon, and no pickle is opened."""

from __future__ import annotations

import json
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_helpers import write_clip
from pipelines import build
from safetensors.torch import load_file, save_file

from onestill.core.models import LARGEST
from onestill.evaluation.choice import load_features
from onestill.evaluation.classifier import KIND, ConvFeatures
from onestill.evaluation.clip import ClipScore
from onestill.evaluation.heads import pattern_of, read_prompt
from onestill.teachers.load import load_teacher

PARTS = ("unet", "vae", "text_encoder")
Change = Callable[[Path], object]


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError, match=".") as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(autouse=True)
def _no_pickle_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*args: Any, **kwargs: Any) -> Any:
        raise SystemExit("a pickle was opened")

    for owner, name in ((torch, "load"), (pickle, "load"), (pickle, "loads")):
        monkeypatch.setattr(owner, name, opened)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build("sd-epsilon").save_pretrained(tmp_path / "t")
    return tmp_path / "t"


def config(name: str, **values: Any) -> Change:
    def change(folder: Path) -> object:
        path = folder / name
        return path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def sharded(part: str, name: str) -> Change:
    """Replace the weights of a part by an index that names a file."""

    def change(folder: Path) -> None:
        (old,) = (folder / part).glob("*.safetensors")
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(load_file(old), name)}
        (folder / part / f"{old.name}.index.json").write_text(json.dumps(index))
        (folder / part / "weights.bin").write_bytes(b"\x80\x04.")
        old.rename(folder / part / "other.safetensors")

    return change


def renamed(part: str, new: Callable[[str], str]) -> Change:
    def change(folder: Path) -> None:
        (file,) = (folder / part).glob("*.safetensors")
        save_file({new(name): value for name, value in load_file(file).items()}, file, {"format": "pt"})

    return change


def begins_with(part: str, number: int) -> Change:
    return lambda folder: next((folder / part).glob("*.safetensors")).write_bytes(struct.pack("<Q", number) + b"{}")


FOLDERS: dict[str, tuple[Change, str]] = {
    **{f"compiled {p}": (renamed(p, lambda name: f"_orig_mod.{name}"), f"{p}/: the weights lack .*compiled") for p in PARTS},
    **{f"wrapped {p}": (renamed(p, lambda name: f"module.{name}"), f"{p}/: the weights lack .*wrapped") for p in PARTS},
    **{f"a pickle in the index of {p}": (sharded(p, "weights.bin"), "index.json names the pickle 'weights.bin'") for p in PARTS},
    **{f"a shard elsewhere of {p}": (sharded(p, "../outside.safetensors"), "no safetensors file beside it") for p in PARTS},
    **{f"a shard of {p} by its whole path": (sharded(p, "/etc/x.safetensors"), "no safetensors file beside it") for p in PARTS},
    **{f"a header of 2^60 in {p}": (begins_with(p, 2**60), f"{p}/ cannot be read: a file of its weights is no whole") for p in PARTS},
    **{f"quantised {p}": (config(f"{p}/config.json", quantization_config={"quant_method": "x"}), "quantised") for p in PARTS},
    "an adapter": (lambda f: (f / "text_encoder/adapter_config.json").write_text("{}"), "not merged"),
    "weights of another name": (config("text_encoder/config.json", transformers_weights="weights.bin"), "another file"),
    "many layers": (config("text_encoder/config.json", num_hidden_layers=10**7), "larger model than its files hold"),
    "too many layers": (config("text_encoder/config.json", num_hidden_layers=10**12), f"above {LARGEST}"),
    "many blocks": (config("unet/config.json", layers_per_block=10**7), "larger model than its files hold"),
    "wide": (config("unet/config.json", block_out_channels=[10**7, 10**7]), "unet/ cannot be read"),
    "wider": (config("vae/config.json", block_out_channels=[10**9, 8]), f"above {LARGEST}"),
    "many heads": (config("unet/config.json", attention_head_dim=10**6), "."),
    "layers as a word": (config("text_encoder/config.json", num_hidden_layers="many"), "text_encoder/ cannot be read"),
    "no layers": (config("unet/config.json", layers_per_block=0), "."),
    "minus one": (config("text_encoder/config.json", hidden_size=-1), "text_encoder"),
    "a mapping for a number": (config("vae/config.json", latent_channels={"a": {}}), "vae/ cannot be read"),
    "a large picture": (config("unet/config.json", sample_size=10**6), "above 4096"),
    "a schedule without end": (config("scheduler/scheduler_config.json", num_train_timesteps=10**9), f"above {LARGEST}"),
    "prompts without end": (config("tokenizer/tokenizer_config.json", model_max_length=2**31), "above 262144"),
    "a schedule in words": (config("scheduler/scheduler_config.json", num_train_timesteps="many"), "."),
    "deep": (lambda f: (f / "unet/config.json").write_text('{"a":' * 9999 + "1" + "}" * 9999), "nested"),
    "a tokenizer of nothing": (lambda f: [p.write_text("[") for p in (f / "tokenizer").glob("*.json")], "."),
    "a docstring for a pipeline": (config("model_index.json", _class_name="__doc__"), "no such pipeline"),
    "a module for a pipeline": (config("model_index.json", _class_name="logging"), "no such pipeline"),
    "a network for a pipeline": (config("model_index.json", _class_name="ModelMixin"), "no such pipeline"),
    "any pipeline": (config("model_index.json", _class_name="DiffusionPipeline"), "no such pipeline"),
    "another library": (config("model_index.json", tokenizer=["os", "system"]), "code of its own, which is never run"),
    "a function": (config("model_index.json", tokenizer=["transformers", "pipeline"]), "no part of a pipeline"),
    "a pipeline inside": (config("model_index.json", vae=["diffusers", "StableDiffusionPipeline"]), "no part of a pipeline"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_a_teacher_that_means_harm(name: str, folder: Path) -> None:
    change, said = FOLDERS[name]
    change(folder)
    text = refusal(lambda: load_teacher(folder))
    assert re.search(said, text), text


def test_what_is_too_much_in_a_file_is_left_there(folder: Path) -> None:
    file = folder / "text_encoder" / "model.safetensors"
    usual = load_teacher(folder).fingerprint()
    save_file({**load_file(file), "position_ids": torch.arange(8)}, file, {"format": "pt"})
    assert load_teacher(folder).fingerprint() == usual


CLIPS: dict[str, Change] = {
    "a pickle in its index": sharded("", "weights.bin"),
    "a header of 2^60": begins_with("", 2**60),
    "layers as a word": config("config.json", vision_config={"num_hidden_layers": "many"}),
    "many layers": config("config.json", text_config={"num_hidden_layers": 10**7}),
    "no size": config("config.json", vision_config={"hidden_size": 0}),
    "a list for a mapping": config("config.json", text_config=[1]),
    "a deep one": lambda folder: (folder / "config.json").write_text("[" * 10**5),
}


@pytest.mark.parametrize("name", CLIPS)
def test_a_clip_that_means_harm(name: str, tmp_path: Path) -> None:
    folder = write_clip(tmp_path / "clip")
    CLIPS[name](folder)
    assert "clip=" in refusal(lambda: ClipScore(folder))
    assert "features=" in refusal(lambda: load_features(str(folder)))


@pytest.mark.parametrize(
    "values",
    [{"num_stages": 10**7}, {"blocks_per_stage": 10**6}, {"width": 2**23}, {"feature_dim": 10**9}, {"width": "8"},
     {"num_classes": True}, {"in_channels": -1}, {"dropout": "much"}, {"more": 1}, {"num_stages": 30}],
)  # fmt: skip
def test_a_classifier_that_means_harm(values: dict[str, Any], tmp_path: Path) -> None:
    model = ConvFeatures(width=8)
    about = {"kind": KIND, "config": {**model.config, **values}, "record": {}}
    save_file(model.state_dict(), tmp_path / "c.safetensors", {"onestill": json.dumps(about)})
    assert "is damaged or of another version" in refusal(lambda: ConvFeatures.load(tmp_path / "c.safetensors"))


def test_a_pattern_that_never_ends() -> None:
    heads = {"letter": ("a",)}
    pattern = pattern_of({"prompt_pattern": "(?P<letter>(a|aa)+)+b"}, heads)
    assert pattern is not None
    assert "does not end" in refusal(lambda: read_prompt("a" * 200, heads, pattern))
