"""The CLIP score, on a tiny random CLIP that is made here: against torchmetrics and by hand; what is refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from clip_helpers import MAX_TOKENS, write_clip
from safetensors.torch import load_file, save_file
from torch import Tensor

from onestill.evaluation.clip import ClipScore, check_pictures

PROMPTS = ["a cat", "a dog", "two cats", "a cat", "red"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("models") / "tiny-clip")


@pytest.fixture(scope="module")
def score(folder: Path) -> ClipScore:
    return ClipScore(folder)


def pictures(num: int = 5, channels: int = 3, size: int = 20) -> Tensor:
    pixels = torch.randint(256, (num, channels, size, size), generator=torch.Generator().manual_seed(1))
    return pixels / 127.5 - 1


def copied(folder: Path, target: Path) -> Path:
    target.mkdir(exist_ok=True)
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


class Unwrapped:
    """A CLIP model whose embeddings are tensors, which torchmetrics 1.9 expects and transformers 5 does not give."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config

    def to(self, device: object) -> "Unwrapped":
        return self

    def get_image_features(self, *args: Tensor) -> Tensor:
        return self.model.get_image_features(*args).pooler_output

    def get_text_features(self, *args: Tensor) -> Tensor:
        return self.model.get_text_features(*args).pooler_output


@pytest.mark.parametrize("size", [16, 20])
def test_each_score_is_that_of_torchmetrics(folder: Path, score: ClipScore, size: int) -> None:
    from torchmetrics.functional.multimodal import clip_score
    from transformers import CLIPModel, CLIPProcessor

    theirs = Unwrapped(CLIPModel.from_pretrained(folder).requires_grad_(False)), CLIPProcessor.from_pretrained(folder)
    images = pictures(size=size)
    ours = score(images, PROMPTS)
    pixels = ((images + 1) * 127.5).round().to(torch.uint8)
    for i, prompt in enumerate(PROMPTS):
        assert float(ours[i]) == pytest.approx(float(clip_score(pixels[i], prompt, lambda: theirs)), abs=1e-4)
    assert ours.std() > 0.1 and ours.min() >= 0 and ours.max() > 1


def test_the_score_is_the_cosine_by_hand(folder: Path, score: ClipScore) -> None:
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    # At the model's own size the processor only normalises, and logits_per_image is exp(scale) cos.
    images = pictures(2, size=16)
    mean, std = (
        torch.tensor(v).view(3, 1, 1)
        for v in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    tokens = processor.tokenizer(PROMPTS[:2], padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(pixel_values=((images + 1) / 2 - mean) / std, **tokens)
        cosines = (out.logits_per_image / model.logit_scale.exp()).diagonal()
    expected = (100 * cosines).clamp(min=0)
    torch.testing.assert_close(score(images, PROMPTS[:2]), expected, rtol=0, atol=1e-4)


def test_negative_cosines_count_as_zero_one_by_one(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["text_projection.weight"] *= -1
    other = copied(folder, tmp_path / "other")
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    one, two = (ClipScore(path)(pictures(), PROMPTS) for path in (folder, other))
    # cos and -cos: one of the two is cut to zero, picture by picture.
    assert torch.equal(torch.minimum(one, two), torch.zeros(5)) and (torch.maximum(one, two) > 0).all()


def test_a_score_does_not_depend_on_its_neighbours(score: ClipScore, folder: Path) -> None:
    together = score(pictures(), PROMPTS)
    torch.testing.assert_close(score(pictures(), PROMPTS, batch_size=2), together, rtol=0, atol=1e-4)
    fresh = ClipScore(folder)
    torch.testing.assert_close(fresh(pictures()[2:3], PROMPTS[2:3]), together[2:3], rtol=0, atol=1e-4)


def test_grey_pictures_are_their_rgb(score: ClipScore) -> None:
    grey = pictures(channels=1)
    assert torch.equal(score(grey, PROMPTS), score(grey.expand(-1, 3, -1, -1), PROMPTS))


def test_long_prompts_are_cut_and_keep_their_end(score: ClipScore) -> None:
    assert score.max_tokens == MAX_TOKENS
    kept = "a" * (MAX_TOKENS - 2)  # one token each, between start and end
    assert score.num_truncated([kept, kept + "bcd", "a"]) == 1
    # The last letter of a word is another token: end the words where both are cut.
    first, second = score(pictures(2).roll(1, 0)[:1].expand(2, -1, -1, -1), [kept + "bcd", kept + "xyz"])
    assert first == second
    ids = score._processor.tokenizer([kept + "bcd"], truncation=True, max_length=MAX_TOKENS)["input_ids"][0]
    assert len(ids) == MAX_TOKENS and ids[-1] == score._processor.tokenizer.eos_token_id


def test_each_prompt_is_embedded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score, seen = ClipScore(folder), []
    embed = score._model.get_text_features
    monkeypatch.setattr(score._model, "get_text_features", lambda **k: seen.append(len(k["input_ids"])) or embed(**k))
    score(pictures(), PROMPTS)
    score(pictures(), PROMPTS, batch_size=2)
    assert seen == [4]


def test_a_tensor_of_embeddings_serves_too(folder: Path) -> None:
    score = ClipScore(folder)
    expected = score(pictures(), PROMPTS)
    plain = ClipScore(folder)
    model = Unwrapped(plain._model)
    plain._model = SimpleNamespace(
        get_image_features=lambda pixel_values: model.get_image_features(pixel_values),
        get_text_features=lambda input_ids, attention_mask: model.get_text_features(input_ids, attention_mask),
    )
    assert torch.equal(plain(pictures(), PROMPTS), expected)


def test_the_model_is_named(folder: Path, score: ClipScore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    assert score.name == "tiny-clip"
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--somebody--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "snapshots").mkdir()
    (repository / "refs" / "main").write_text(commit)
    copied(folder, repository / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    found = ClipScore("somebody/tiny", local_files_only=True)
    assert found.name == "somebody/tiny@0123456789ab"
    assert torch.equal(found(pictures(), PROMPTS), score(pictures(), PROMPTS))


# Refusals


def test_what_is_no_clip_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="clip='no where': no such folder; give the folder or hub id"):
        ClipScore("no where")
    with pytest.raises(ValueError, match="clip=.*: no such folder"):
        ClipScore("x/" * 5000)
    (tmp_path / "clip.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="clip=.*: no such folder"):
        ClipScore(tmp_path / "clip.safetensors")
    with pytest.raises(ValueError, match=r"clip='nobody/nothing': cannot be loaded .*\(local files only") as refusal:
        ClipScore("nobody/nothing", local_files_only=True)
    assert "\n" not in str(refusal.value)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ValueError, match="of type 'vit', and the CLIP score needs a whole CLIP"):
        ClipScore(tmp_path)


def test_half_a_clip_is_refused(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop("visual_projection.weight")
    other = copied(folder, tmp_path / "incomplete")
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"clip=.*incomplete': .*lack 1 of the network's tensors, such as 'visual_projection.weight'"
    ):
        ClipScore(other)
    other = copied(folder, tmp_path / "pickled")
    torch.save(weights, other / "pytorch_model.bin")
    (other / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="clip=.*pickled': cannot be loaded .* with safetensors weights"):
        ClipScore(other)
    other = copied(folder, tmp_path / "without_processor")
    for name in ("processor_config.json", "preprocessor_config.json"):
        (other / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="clip=.*: has no usable CLIP processor"):
        ClipScore(other)


def test_what_are_no_pictures_is_refused(score: ClipScore) -> None:
    check_pictures((1, 8, 8))
    for shape in ((2, 2048), (3, 5, 16, 16), (4, 8, 8)):
        with pytest.raises(ValueError, match="clip: CLIP sees pictures, .* and this teacher makes"):
            check_pictures(shape)
    with pytest.raises(ValueError, match=r"^features: the Inception network sees pictures, .* makes \[4, 8, 8\]"):
        check_pictures((4, 8, 8), "features", "the Inception network")
    with pytest.raises(ValueError, match="5 pictures and 1 prompts"):
        score(pictures(), ["a"])
    with pytest.raises(ValueError, match=r"images must lie in \[-1, 1\]"):
        score(pictures() * 2, PROMPTS)
