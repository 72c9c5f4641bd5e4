"""A pipeline in one file under the names of the original training code: made into a folder, and a teacher like any other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pipelines import build
from runs_helpers import ALONE, as_flags, call_cli
from safetensors.torch import save_file
from torch import Tensor

import onestill
from onestill.teachers.load import load_teacher
from onestill.teachers.pipelines.single_file import _read_original, _scheduler

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def replaced(name: str, rules: dict[str, str]) -> str:
    for ours, theirs in rules.items():
        name = name.replace(f"{ours}.", f"{theirs}.")
    return name


def network_name(name: str, attends: set[int], per_block: int = 1) -> str:
    """Return the original name of a tensor of a U-Net with so many layers in a block; `attends`: the up blocks that do."""
    found = re.match(
        r"(down|mid|up)_blocks?(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name
    )
    if found is None:
        return replaced(name, ENDS)
    way, block, kind, layer, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    rest = replaced(rest, RESNET) if kind == "resnets" else rest
    if way == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * layer}.{rest}"
    at = block * (per_block + 1) + (layer if kind in ("resnets", "attentions") else per_block)
    if kind == "downsamplers":
        return f"input_blocks.{at + 1}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{at}.{2 if block in attends else 1}.{rest}"
    return f"{'input' if way == 'down' else 'output'}_blocks.{at + (way == 'down')}.{int(kind == 'attentions')}.{rest}"


def vae_name(name: str, num_blocks: int = 2) -> str:
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{num_blocks - 1 - int(m[1])}.block", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{num_blocks - 1 - int(m[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    if "mid_block.attentions.0" in name:
        return replaced(name.replace("mid_block.attentions.0", "mid.attn_1"), ATTENTION)
    return name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


def original(pipeline: Any) -> dict[str, Tensor]:
    """Return the weights of a tiny Stable Diffusion under their original names."""
    attends = {i for i, block in enumerate(pipeline.unet.up_blocks) if getattr(block, "attentions", None)}
    found = {
        f"model.diffusion_model.{network_name(name, attends)}": value
        for name, value in pipeline.unet.state_dict().items()
    }
    for name, value in pipeline.vae.state_dict().items():
        theirs = vae_name(name)
        is_conv = "attn_1" in theirs and ".norm." not in theirs and value.ndim == 2
        found[f"first_stage_model.{theirs}"] = value[..., None, None] if is_conv else value
    for name, value in pipeline.text_encoder.state_dict().items():
        name = name.removeprefix("text_model.")
        found[f"cond_stage_model.transformer.text_model.{name}"] = value
    return {name: value.contiguous().clone() for name, value in found.items()}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place with the file `model.safetensors` of a tiny pipeline, and the pipeline's folder `t`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    pipeline = build("sd-epsilon")
    pipeline.save_pretrained(tmp_path / "t")
    save_file(original(pipeline), tmp_path / "model.safetensors")
    (tmp_path / "p.txt").write_text("red\nblue\n")
    return tmp_path


def bare(place: Path) -> Path:
    """Leave the folder's configuration alone."""
    for weights in (place / "t").rglob("*.safetensors"):
        weights.unlink()
    return place / "t"


def test_a_file_is_the_teacher_that_its_folder_is(place: Path) -> None:
    expected = load_teacher(place / "t")
    found = load_teacher(place / "model.safetensors", original_config=bare(place))
    assert found.fingerprint() == expected.fingerprint()
    assert found.pictures_fingerprint() == expected.pictures_fingerprint()
    assert found.spec.source == str(place / "model.safetensors")


def test_a_run_of_a_file_is_resumed_exported_and_drawn(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    bare(place)
    flags = [
        "--teacher",
        "model.safetensors",
        "--original_config",
        "t",
        "--device",
        "cpu",
        "--prompt_file",
        "p.txt",
        "--prompt_cache_dir",
        "c",
    ]
    run = [
        *as_flags(ALONE),
        "--output_dir",
        "run",
        "--train_batch_size",
        "2",
        "--lr_warmup_steps",
        "0",
        "--num_validation_images",
        "1",
        "--num_teacher_steps",
        "2",
    ]
    assert call_cli("inspect", *flags).code == 0
    first = call_cli("distill", *flags, *run, "--max_train_steps", 1)
    assert first.code == 0, first.err
    config = yaml.safe_load((place / "run" / "config.yaml").read_text())
    assert (config["teacher"], config["original_config"]) == (str(place / "model.safetensors"), str(place / "t"))
    again = call_cli("distill", *flags, *run, "--max_train_steps", 2, "--resume_from_checkpoint", "latest")
    assert again.code == 0, again.err
    assert len(list((place / "cache" / "onestill" / "single_files").iterdir())) == 1
    assert onestill.sample(place / "run", prompts=["red"], num_images=1, device="cpu").shape == (1, 3, 16, 16)
    sampled = call_cli(
        "sample",
        *flags[:4],
        *["--prompt", "red", "--num_images", "1", "--num_inference_steps", "2", "--output", "x.png"],
    )
    assert sampled.code == 0, sampled.err


def test_v_prediction_is_read_off_the_file(place: Path) -> None:
    tensors = original(build("sd-epsilon"))
    save_file({**tensors, "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, place / "v.safetensors")
    spec = load_teacher(place / "v.safetensors", original_config=place / "t").spec
    assert (spec.prediction_type, spec.process.level(1.0)[0]) == ("v_prediction", 0.0)


def test_the_schedule_is_read_off_the_yaml(place: Path) -> None:
    unet = {"unet_config": {"params": {}}, "first_stage_config": {"params": {}}}
    params = {"parameterization": "v", "linear_start": 0.001, "timesteps": 500, **unet}
    (place / "v.yaml").write_text(yaml.safe_dump({"model": {"params": params}}))
    index = json.loads((place / "t" / "model_index.json").read_text())
    found = _scheduler(place / "t", index, _read_original(str(place / "v.yaml")), {})["scheduler"].config
    assert (found.prediction_type, found.beta_start, found.num_train_timesteps) == ("v_prediction", 0.001, 500)


def refusal(file: Path, **given: Any) -> str:
    with pytest.raises(ValueError, match=file.name) as caught:
        load_teacher(file, **given)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_that_cannot_be_read(place: Path) -> None:
    tensors = original(build("sd-epsilon"))
    command = "from_single_file("
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(2)}, place / "lora.safetensors")
    for part, words in (("t/unet/diffusion_pytorch_model", "give the folder of its whole"), ("lora", "fuse it into")):
        said = refusal(place / f"{part}.safetensors")
        # The command fails on these: it is said of another file, if at all.
        assert words in said and f"{command}{str(place)!r}"[:-1] not in said
        assert (f"{command}'FILE')" in said) == (part != "lora")
    assert command in refusal(place / "model.safetensors") and "original_config" in refusal(place / "model.safetensors")
    (place / "model.ckpt").write_bytes(b"cos\nsystem\n")
    assert "is a pickle" in (said := refusal(place / "model.ckpt")) and command in said
    (place / "cut.safetensors").write_bytes((place / "model.safetensors").read_bytes()[:1000])
    assert "safetensors" in refusal(place / "cut.safetensors")
    lacking = {name: value for name, value in tensors.items() if "middle_block.1" not in name}
    save_file(lacking, place / "lacking.safetensors")
    assert command in refusal(place / "lacking.safetensors", original_config=place / "t")
    config = place / "t" / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "block_out_channels": [8, 32]}))
    assert command in (said := refusal(place / "model.safetensors", original_config=place / "t"))
    assert "does not fit the configuration" in said
    assert not (place / "cache").exists()


def test_what_a_file_lacks_is_taken_from_the_folder(place: Path) -> None:
    tensors = original(build("sd-epsilon"))
    save_file({n: v for n, v in tensors.items() if not n.startswith("first_stage")}, place / "no-vae.safetensors")
    expected = load_teacher(place / "t").pictures_fingerprint()
    assert load_teacher(place / "no-vae.safetensors", original_config=place / "t").pictures_fingerprint() == expected
    for weights in (place / "t" / "vae").glob("*.safetensors"):
        weights.unlink()
    (place / "t" / "README.md").touch()
    bare(place)
    save_file({n: v for n, v in tensors.items() if not n.startswith("first_stage")}, place / "no-vae2.safetensors")
    assert "holds no vae" in refusal(place / "no-vae2.safetensors", original_config=place / "t")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("nowhere/at/all", "no such file or folder"),
        ("nowhere.yaml", "no such file or folder"),
        ("no-where/at-all", "no folder, no YAML"),
        ("p.txt", "is no YAML of the original"),
        (".", "has no model_index.json"),
    ],
)
def test_a_configuration_that_is_none(given: str, words: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    flags = ["--teacher", "model.safetensors", "--prompt_file", "p.txt", "--original_config", given]
    outcome = call_cli("inspect", *flags)
    assert outcome.code == 2 and "--original_config" in outcome.words and words in outcome.words, outcome.err


def test_a_configuration_beside_a_folder(place: Path) -> None:
    assert "leave it out" in refusal(place / "t", original_config=place / "t")


def test_a_configuration_that_means_harm(place: Path, tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.yaml"
    bomb.write_text(
        "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    )
    assert "repeats parts of itself" in message(place, bomb)
    index = json.loads((place / "t" / "model_index.json").read_text())
    for change, words in (
        ({"_class_name": "UNet2DConditionModel"}, "has no such pipeline"),
        ({"tokenizer": ["os", "system"]}, "code of its own"),
    ):
        folder = bare(place)
        (folder / "model_index.json").write_text(json.dumps({**index, **change}))
        assert words in message(place, folder)
    folder = bare(place)
    (folder / "model_index.json").write_text(json.dumps(index))
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "cross_attention_dim": 10**9}))
    assert "above" in message(place, folder)


def message(place: Path, original_config: Path) -> str:
    with pytest.raises(ValueError, match=r"\S") as caught:
        load_teacher(place / "model.safetensors", original_config=original_config)
    return str(caught.value)
