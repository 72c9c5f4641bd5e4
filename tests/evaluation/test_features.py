"""Extractors: shapes, independence of the batch, round trips, and what they refuse."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from onestill.evaluation.choice import load_features
from onestill.evaluation.classifier import ConvFeatures
from onestill.evaluation.clip import ClipScore
from onestill.evaluation.features import (
    ClassifierFeatures,
    FeatureExtractor,
    MiddleFeatures,
    extract,
)
from onestill.evaluation.metrics import frechet_distance, label_accuracy
from onestill.evaluation.pretrained import TransformersFeatures, stays_here

DIGITS = Path(str(files("onestill"))) / "embedded" / "digits"


def images_of(num: int, channels: int = 1, size: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num, channels, size, size, generator=generator) * 2 - 1


def tiny_classifier(seed: int = 0) -> ConvFeatures:
    torch.manual_seed(seed)
    return ConvFeatures(width=8, feature_dim=5, num_classes=3)


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny-vit"
    ViTModel(ViTConfig(**TINY_VIT)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.5] * 3).save_pretrained(folder)
    return folder


TINY_VIT: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 16,
    "patch_size": 8,
}


# extract


def test_extract_does_not_depend_on_the_batch_size() -> None:
    extractor = ClassifierFeatures(tiny_classifier())
    images = images_of(7)
    together, apart = extract(extractor, images), extract(extractor, images, batch_size=1)
    assert together.shape == (7, 5) and together.dtype == torch.float32 and not together.requires_grad
    # Other batch sizes may pick other convolution kernels: equal to single-precision rounding only.
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 8, 8), r"non-empty \[N, C, H, W\]"),
        (torch.zeros(0, 1, 8, 8), r"non-empty \[N, C, H, W\]"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "floats in"),
        (torch.full((2, 1, 8, 8), float("nan")), "2 of 2 images hold NaN"),
        (torch.full((2, 1, 8, 8), 1.5), r"must lie in \[-1, 1\], got \[1.5, 1.5\]"),
        (torch.zeros(2, 3, 8, 8), r"images of 1 channel.*was given \[2, 3, 8, 8\]; choose what fits"),
    ],
)
def test_extract_says_what_is_wrong_with_images(images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extract(ClassifierFeatures(tiny_classifier()), images)


def test_extract_refuses_what_is_not_one_row_per_image() -> None:
    class Broken:
        name = "broken"

        def __call__(self, images: Tensor) -> Tensor:
            return images

    with pytest.raises(ValueError, match=r"'broken' returned features of shape \[2, 1, 8, 8\] for 2 images"):
        extract(Broken(), images_of(2))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        extract(Broken(), images_of(2), batch_size=0)


# ConvFeatures


def test_logits_are_the_last_layer_on_the_features() -> None:
    model = tiny_classifier().eval()
    images = images_of(3)
    torch.testing.assert_close(model(images), model.head(model.features(images)))
    assert model(images).shape == (3, 3)


@pytest.mark.parametrize(("channels", "size", "stages"), [(1, 8, 2), (3, 32, 3), (3, 17, 2)])
def test_classifier_fits_any_image_size(channels: int, size: int, stages: int) -> None:
    model = ConvFeatures(in_channels=channels, width=8, num_stages=stages, blocks_per_stage=2, feature_dim=12)
    assert model.features(images_of(2, channels, size)).shape == (2, 12)


def test_classifier_round_trip(tmp_path: Path) -> None:
    model = tiny_classifier()
    model.record = {"held_out_accuracy": 0.75, "data": "noise"}
    model.save(tmp_path / "deep" / "model.safetensors")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model.safetensors"]
    loaded = ConvFeatures.load(tmp_path / "deep" / "model.safetensors")
    assert loaded.config == model.config and loaded.record == model.record and not loaded.training
    assert torch.equal(loaded.features(images_of(4)), model.eval().features(images_of(4)))
    assert loaded.name.startswith("ConvFeatures (5-d, held-out accuracy 75.0%, sha256 ")


def test_equal_weights_give_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        model = tiny_classifier()
        model.record = {"held_out_accuracy": 0.75, "data": "noise", "seed": 0}
        model.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_name_tells_two_sets_of_weights_apart(tmp_path: Path) -> None:
    names = []
    for seed in (0, 1):
        tiny_classifier(seed).save(tmp_path / "model.safetensors")
        names.append(load_features(str(tmp_path / "model.safetensors")).name)
    assert names[0] != names[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 12}, "multiple of 8, got 12"),
        ({"num_stages": 0}, "num_stages must be a whole number from 1 to .*, got 0"),
    ],
)
def test_classifier_says_what_is_wrong_with_its_sizes(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvFeatures(**arguments)


def test_extractor_leaves_training_modes_as_they_were() -> None:
    model = tiny_classifier().train()
    model.stem.eval()
    ClassifierFeatures(model).logits(images_of(2))
    assert model.training and model.head.training and not model.stem.training


# load_features


def test_load_features_refuses_files_that_are_something_else(tmp_path: Path) -> None:
    other, text, damaged = (tmp_path / f"{name}.safetensors" for name in ("other", "text", "damaged"))
    save_file({"x": torch.zeros(1)}, other)
    text.write_text("hello, this is not a tensor")
    save_file(
        {"x": torch.zeros(1)},
        damaged,
        {"onestill": json.dumps({"kind": "onestill.ConvFeatures", "config": {}})},
    )
    for path, message in (
        (other, "features=.*other.safetensors': was not written by ConvFeatures.save .*kind=None"),
        (text, "text.safetensors': is not a readable safetensors file"),
        (damaged, "damaged.safetensors': is damaged or of another version"),
        (tmp_path / "absent.safetensors", "features=.*absent.safetensors': no such file"),
        (tmp_path / "no" / "such" / "folder", "features=.*folder': no such file or folder"),
    ):
        with pytest.raises(ValueError, match=message):
            load_features(str(path))


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".pkl"])
def test_load_features_refuses_pickles_by_name(suffix: str) -> None:
    with pytest.raises(ValueError, match=rf"features='model\{suffix}': is a pickle .* can run code"):
        load_features(f"model{suffix}")


# MiddleFeatures


def test_middle_features_are_the_pooled_middle_block() -> None:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    )
    extractor = MiddleFeatures(unet, lambda images: unet(images, 10))
    features = extract(extractor, images_of(5), batch_size=2)
    assert features.shape == (5, 16) and features.std() > 0
    assert extractor.name == "UNet2DModel.mid_block"
    torch.testing.assert_close(features, extract(extractor, images_of(5)), rtol=1e-4, atol=1e-5)
    assert not unet.mid_block._forward_hooks, "the hook must not outlive the call"


def test_middle_features_take_any_submodule() -> None:
    network = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Conv2d(6, 2, 3))
    extractor = MiddleFeatures(network, network, submodule="0", name="first")
    torch.testing.assert_close(extractor(images_of(3)), network[0](images_of(3)).mean(dim=(2, 3)))
    assert extractor.name == "first"


def test_middle_features_say_what_went_wrong() -> None:
    network = nn.Sequential(nn.Conv2d(1, 6, 3))
    with pytest.raises(ValueError, match="Sequential has no submodule 'mid_block' .* its children are: 0"):
        MiddleFeatures(network, network)
    with pytest.raises(ValueError, match="must pass through the submodule once, it did 0 times"):
        MiddleFeatures(network, lambda _: None, submodule="0")(images_of(2))
    with pytest.raises(ValueError, match="sent 4 images through the network for 2 given"):
        MiddleFeatures(network, lambda x: network(torch.cat([x, x])), submodule="0")(images_of(2))


# TransformersFeatures


def test_transformers_features_from_a_folder(vit_folder: Path) -> None:
    extractor = load_features(str(vit_folder), local_files_only=True)
    assert isinstance(extractor, TransformersFeatures)
    assert extractor.name == "tiny-vit (pooled output, 16x16 bicubic)"
    grey, colour = images_of(3), images_of(3).expand(-1, 3, -1, -1)
    features = extract(extractor, grey, batch_size=2)
    assert features.shape == (3, 16)
    torch.testing.assert_close(features, extract(extractor, colour))


def test_transformers_features_see_what_the_processor_would_give(vit_folder: Path) -> None:
    extractor = TransformersFeatures(vit_folder, local_files_only=True)
    # Mean 0.5 and standard deviation 0.5 at the native size: the images come back unchanged.
    images = images_of(2, 3, 16)
    torch.testing.assert_close(extractor.pixels(images), images, rtol=0, atol=1e-6)
    assert extractor.pixels(images_of(2, 3, 5)).shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"sees grey or RGB images, .* was given \[2, 4, 8, 8\]"):
        extractor(images_of(2, 4))


def test_a_cached_hub_model_is_named_with_its_commit(
    vit_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--somebody--tiny" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in vit_folder.iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    references = tmp_path / "models--somebody--tiny" / "refs"
    references.mkdir()
    (references / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    extractor = load_features("somebody/tiny", local_files_only=True)
    assert extractor.name == "somebody/tiny@0123456789ab (pooled output, 16x16 bicubic)"
    assert torch.equal(extractor(images_of(2)), TransformersFeatures(vit_folder)(images_of(2)))


def test_random_pooler_is_not_used(vit_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, ViTConfig, ViTModel

    ViTModel(ViTConfig(**TINY_VIT), add_pooling_layer=False).save_pretrained(tmp_path)
    AutoImageProcessor.from_pretrained(vit_folder).save_pretrained(tmp_path)
    first, second = (TransformersFeatures(tmp_path, local_files_only=True) for _ in range(2))
    assert "mean of tokens" in first.name
    assert torch.equal(first(images_of(2)), second(images_of(2)))


def test_vision_half_of_clip_is_used(vit_folder: Path, tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    half = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**half, "vocab_size": 10, "max_position_embeddings": 8},
        vision_config={**half, "image_size": 16, "patch_size": 8},
    )
    CLIPModel(config).save_pretrained(tmp_path)
    size = {"height": 16, "width": 16}
    CLIPImageProcessor(size={"shortest_edge": 20}, crop_size=size).save_pretrained(tmp_path)
    extractor = TransformersFeatures(tmp_path, local_files_only=True)
    assert extractor.size == (16, 16) and extractor(images_of(2)).shape == (2, 16)


def test_incomplete_weights_are_refused(vit_folder: Path, tmp_path: Path) -> None:
    for file in vit_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("embeddings.cls_token")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lack 1 of the network's tensors, such as 'embeddings.cls_token'"):
        TransformersFeatures(tmp_path, local_files_only=True)


def test_text_models_are_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"features=.*: a BertModel does not take images"):
        load_features(str(tmp_path))


def test_missing_processor_and_missing_model_are_explained(vit_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="features=.*: cannot be loaded .* with safetensors weights"):
        load_features(str(tmp_path))
    with pytest.raises(
        ValueError, match=r"features='nobody/nothing': cannot be loaded .*\(local files only: nothing was downloaded\)"
    ) as refusal:
        load_features("nobody/nothing", local_files_only=True)
    assert "\n" not in str(refusal.value)
    for file in vit_folder.iterdir():
        if file.name != "preprocessor_config.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="has no usable image processor"):
        load_features(str(tmp_path))


# The embedded classifier of the digits


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor]:
    tensors = load_file(DIGITS / "images.safetensors")
    return tensors["images"] / 8 - 1, tensors["labels"].long(), tensors["held_out"]


@pytest.fixture(scope="module")
def embedded() -> ClassifierFeatures:
    extractor = load_features(str(DIGITS / "classifier.safetensors"))
    assert isinstance(extractor, ClassifierFeatures)
    return extractor


def test_embedded_images_are_the_digits(digits: tuple[Tensor, Tensor, Tensor]) -> None:
    images, labels, held_out = digits
    assert images.shape == (1797, 1, 8, 8) and images.min() == -1 and images.max() == 1
    assert labels.bincount().min() > 170 and held_out.sum() == 360


def test_embedded_classifier_reaches_its_recorded_accuracy(
    embedded: ClassifierFeatures, digits: tuple[Tensor, Tensor, Tensor]
) -> None:
    images, labels, held_out = digits
    accuracy = label_accuracy(embedded.logits(images[held_out]), labels[held_out])
    assert accuracy >= 0.985
    assert accuracy == pytest.approx(embedded.classifier.record["held_out_accuracy"])


def test_embedded_features_see_what_a_student_does_wrong(
    embedded: FeatureExtractor, digits: tuple[Tensor, Tensor, Tensor]
) -> None:
    images, labels, _ = digits
    real = extract(embedded, images)

    def distance(changed: Tensor) -> float:
        return frechet_distance(real, extract(embedded, changed.clamp(-1, 1)))

    blurred = functional.avg_pool2d(functional.pad(images, (1, 1, 1, 1), value=-1), 3, 1)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    averages = torch.stack([images[labels == label].mean(dim=0) for label in range(10)])[labels]
    # Two halves of the real digits: what chance alone makes of a perfect sampler.
    chance = frechet_distance(real[::2], real[1::2])
    for spoilt in (blurred, noise, averages):
        amounts = [distance(images.lerp(spoilt, share)) for share in (0.1, 0.3, 0.6)]
        assert amounts == sorted(amounts)
        assert amounts[-1] > 5 * chance
    assert distance(images[labels != 0]) > 5 * chance


@pytest.mark.parametrize("setting", ["features", "clip"])
def test_a_hub_that_does_not_answer_is_asked_once(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def unreachable(url: str, **_: Any) -> None:
        asked.append(url)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    load = {"features": TransformersFeatures, "clip": ClipScore}[setting]
    with pytest.raises(ValueError, match=f"^{setting}='nobody/nothing': the hub cannot be reached.*local_files_only"):
        load("nobody/nothing")
    assert len(asked) == 1 and asked[0].endswith("nobody/nothing/resolve/main/config.json")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "/config.json")
    assert stays_here("features", "nobody/nothing", False), "what is in the cache is read from there"
    assert len(asked) == 2 and stays_here("features", "nobody/nothing", True) and len(asked) == 2
