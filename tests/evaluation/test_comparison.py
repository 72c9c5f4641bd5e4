"""One evaluation: sources, references and features put together, on sources whose numbers are known."""

import platform
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs_helpers import NULL_CLASS, teacher_folder, tiny_network, write_teacher
from torch import Tensor, nn

from onestill.core.tensors import noise
from onestill.diffusion.process import CosineVP
from onestill.evaluation.choice import choose_features, teacher_features
from onestill.evaluation.comparison import Comparison, Entry
from onestill.evaluation.config import EvaluateConfig
from onestill.evaluation.features import ClassifierFeatures, FeatureExtractor
from onestill.evaluation.references import (
    REFERENCE_SEED,
    Reference,
    embedded_reference,
    folder_reference,
    teacher_reference,
)
from onestill.evaluation.report import Report
from onestill.evaluation.samples import Subjects
from onestill.sampling.generate import Rows
from onestill.sampling.samplers.base import Sampler
from onestill.teachers.load import EMBEDDED, load_teacher
from onestill.teachers.module import module_teacher

CPU = torch.device("cpu")


class Fake(Sampler):
    """A sampler whose images are a function of their noise and their labels."""

    def __init__(
        self, name: str, make: Callable[[Tensor], Tensor], num_classes: int = 0, *, text: bool = False
    ) -> None:
        self.name, self.make, self.labels, self.takes_text = name, make, tuple(range(num_classes)), text
        self.sample_shape, self.num_steps, self.evaluations = (1, 4, 4), 7, 14
        self.batches: list[int] = []

    def __call__(self, eps: Tensor, rows: Rows) -> Tensor:
        self.batches.append(len(eps))
        images = self.make(eps)
        return images + rows["class_labels"].reshape(-1, 1, 1, 1) if "class_labels" in rows else images


class FakeOnLatents(Fake):
    """The same around a decoder: its noise is its latents."""

    has_decoder = gives_latents = True

    def latents(self, eps: Tensor, rows: Rows) -> Tensor:
        return eps

    def decode(self, latents: Tensor) -> Tensor:
        return self.make(latents)


class Pixels:
    """The images themselves as features."""

    name = "pixels"

    def __call__(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def small(eps: Tensor) -> Tensor:
    return eps * 0.2


def far(eps: Tensor) -> Tensor:
    return eps * 0.2 + 0.5


FEW: dict[str, Any] = {"num_samples": 40, "batch_size": 16, "speed": False}
Made = tuple[Report, dict[str, Tensor]]


def config_of(**settings: Any) -> EvaluateConfig:
    return EvaluateConfig(student=Path("x"), **{**FEW, "device": "cpu", **settings})


def compare(
    *rows: tuple[str, Fake, bool],
    extractor: FeatureExtractor | None = None,
    prompts: Sequence[str] = (),
    clip: Any = None,
    notes: tuple[str, ...] = (),
    say: Callable[[str], None] = lambda _: None,
    **settings: Any,
) -> Made:
    """Return the report over (name, sampler, is it a student) and the first images of each row."""
    shared: Any = (reference(), extractor or Pixels(), Subjects(prompts=prompts), config_of(**settings), "t")
    return Comparison(*shared, clip, notes, say=say).run([Entry(*row) for row in rows])


def reference(num: int = 60) -> Reference:
    return Reference(small(noise(range(1000, 1000 + num), (1, 4, 4))), "small noise")


def test_the_nearer_source_has_the_better_numbers() -> None:
    report, shown = compare(("near", Fake("near", small), False), ("far", Fake("the student in x", far), True))
    near, away = report.rows
    assert near.frechet_distance < away.frechet_distance  # type: ignore[operator]
    # The means are 0.5 apart in each of 16 features, so the distance holds at least 16 / 4.
    assert away.frechet_distance == pytest.approx(4, rel=0.25)
    assert near.kernel_distance < away.kernel_distance  # type: ignore[operator]
    assert near.recall > 0.5 > away.recall == 0  # type: ignore[operator]
    assert (near.num_steps, near.network_evaluations, near.is_student, away.is_student) == (7, 14, False, True)
    assert near.images_per_second is None and near.speedup is None and near.label_accuracy is None
    assert set(shown) == {"near", "far"} and shown["near"].shape == (40, 1, 4, 4)


def test_the_protocol_says_everything() -> None:
    rows = ("DDIM", Fake("DDIM", small), False), ("student", Fake("the student in run/x", far), True)
    said: list[str] = []
    report, _ = compare(*rows, seed=5, guidance_scale=3, say=said.append)
    protocol = report.protocol
    assert (protocol.teacher, protocol.student, protocol.extractor) == ("t", "run/x", "pixels")
    assert (protocol.feature_dim, protocol.num_images, protocol.num_reference_images) == (16, 40, 60)
    assert (protocol.seeds, protocol.guidance_scale, protocol.neighbours) == ("5..44", 3, 3)
    assert protocol.kernel_subset_size == 40 and protocol.reference == "small noise"
    assert {"torch", "diffusers", "onestill"} <= set(
        protocol.versions
    ) and protocol.device == f"{platform.machine()} CPU, 1 thread"
    assert [line.split(":")[0] for line in said] == ["features of 60 reference images", "DDIM", "student"]


def test_slow_speeds_are_announced() -> None:
    said: list[str] = []
    compare(("a", Fake("a", small), True), speed=True, say=said.append)
    assert said[1] == "speed: all rows in turns, in batches of 1 and 16"


def test_too_few_images_are_warned_of() -> None:
    def warnings(num: int) -> tuple[str, ...]:
        return compare(("a", Fake("a", small), True), num_samples=num)[0].warnings

    assert warnings(40) == () and "12" in warnings(12)[0]


def test_rows_share_seeds_and_are_made_in_batches() -> None:
    one, two = Fake("one", small), Fake("two", small)
    report, shown = compare(("a", one, False), ("b", two, True))
    assert torch.equal(shown["a"], shown["b"])
    assert torch.equal(shown["a"], small(noise(range(40), (1, 4, 4))).clamp(-1, 1))
    assert report.rows[0].frechet_distance == report.rows[1].frechet_distance
    assert one.batches == [16, 16, 8]


def test_images_are_clipped_before_they_are_looked_at() -> None:
    source = Fake("loud", lambda eps: eps * 10)
    _, shown = compare(("a", source, True))
    assert shown["a"].abs().max() == 1


def test_speeds_are_relative_to_the_first_row() -> None:
    def slow(eps: Tensor) -> Tensor:
        for _ in range(300):
            eps = eps * 1.0
        return eps * 0.2

    rows = ("slow", Fake("slow", slow), False), ("fast", Fake("fast", small), True)
    report, _ = compare(*rows, num_samples=10, batch_size=8, speed=True)
    first, second = report.rows
    assert first.speedup == 1 and second.speedup is not None and second.speedup > 3
    for row in report.rows:
        assert row.images_per_second is not None and row.images_per_second_large is not None
    assert second.images_per_second_large / first.images_per_second_large == pytest.approx(second.speedup)  # type: ignore[operator]
    assert report.protocol.large_batch_size == 8 and report.protocol.speedup_over == "slow"
    assert report.protocol.device == f"{platform.machine()} CPU, 1 thread" and "CPU, 1 thread, float32" in str(report)


def test_label_accuracy_needs_a_classifier_and_labels() -> None:
    class ByMean(nn.Module):
        """Sees the label in the mean: the fakes add it."""

        name = "by mean"
        heads: dict[str, tuple[str, ...]] = {}  # noqa: RUF012
        prompt_pattern = None

        def features(self, images: Tensor) -> Tensor:
            return images.flatten(1)

        def forward(self, images: Tensor) -> Tensor:
            return torch.stack([-images.mean((1, 2, 3)), images.mean((1, 2, 3)) - 1e-3], 1)

    classifier = ClassifierFeatures(ByMean())  # type: ignore[arg-type]
    rows = (
        ("right", Fake("right", lambda eps: eps * 0.01 - 0.5, num_classes=2), False),
        ("blind", Fake("blind", lambda eps: eps * 0 + 0.9, num_classes=2), False),
        ("none", Fake("none", small), True),
    )
    report, _ = compare(*rows, extractor=classifier)
    assert [row.label_accuracy for row in report.rows] == [1, 0.5, None]


# Prompts


class DarkOrLight(nn.Module):
    """Two heads: is the picture light, and is its first pixel lighter than its last? The fakes below are told."""

    name = "dark or light"
    heads = {"light": ("dark", "light"), "first": ("dark", "light")}  # noqa: RUF012
    prompt_pattern = re.compile("(?P<light>[a-z]+), first (?P<first>[a-z]+)")

    def __init__(self, record: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.record = record or {}

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        mean, slope = images.mean((1, 2, 3)), images[:, 0, 0, 0] - images[:, 0, 3, 3]
        return torch.stack([-mean, mean, -slope, slope], 1)


def judge(record: dict[str, Any] | None = None) -> ClassifierFeatures:
    return ClassifierFeatures(DarkOrLight(record))  # type: ignore[arg-type]


PROMPTS = ("light, first light", "dark, first light", "a cat", "light, first dark")


def falling(eps: Tensor) -> Tensor:
    """Light pictures whose first pixel is the lightest, whatever the prompt."""
    return eps * 0.01 + torch.linspace(0.9, 0.1, 16).reshape(1, 1, 4, 4)


def test_prompts_are_judged_head_by_head_and_others_counted_out() -> None:
    record = {"held_out_accuracy_per_head": {"light": 1.0, "first": 0.9}}
    rows = (
        ("a", Fake("a", falling, text=True), False),
        ("b", Fake("b", lambda eps: -falling(eps), text=True), True),
    )
    report, _ = compare(*rows, extractor=judge(record), prompts=PROMPTS)
    light, dark = report.rows
    # Judged are 30 of 40: of three kinds of prompts "light" fits two, "first light" two, both one.
    assert light.prompt_accuracy == pytest.approx({"all": 1 / 3, "light": 2 / 3, "first": 2 / 3})
    assert dark.prompt_accuracy == pytest.approx({"all": 0, "light": 1 / 3, "first": 1 / 3})
    assert light.label_accuracy is None and light.clip_score is None
    assert report.protocol.notes == (
        "prompt accuracy: what the classifier sees in 30 of 40 images a row (10 have prompts that are not of its kind)",
        "the classifier itself, on real images: light 1.000, first 0.900",
    )


def test_without_a_prompt_that_can_be_read_the_protocol_says_why() -> None:
    source = ("a", Fake("a", falling, text=True), True)
    shared: dict[str, Any] = {"prompts": ("a cat", "a dog"), "notes": ("prompts: 2 given ones",)}
    report, _ = compare(source, extractor=judge(), **shared)
    assert report.rows[0].prompt_accuracy is None
    assert report.protocol.notes[0] == "prompts: 2 given ones"
    assert "no prompt is of the classifier's kind, such as 'a cat'" in report.protocol.notes[1]

    silent = judge()
    silent.classifier.prompt_pattern = None  # type: ignore[misc]
    report, _ = compare(source, extractor=silent, **shared)
    assert report.rows[0].prompt_accuracy is None and "does not say how prompts are read" in report.protocol.notes[1]
    # Features that are no classifier have nothing to say about prompts.
    report, _ = compare(source, **shared)
    assert report.protocol.notes == ("prompts: 2 given ones",)


def test_labels_are_not_read_off_several_heads() -> None:
    source = ("a", Fake("a", small, num_classes=2), True)
    assert compare(source, extractor=judge())[0].rows[0].label_accuracy is None


class Brightness:
    """In the place of a CLIP: how light a picture is, and which prompts it was shown with."""

    name, max_tokens = "brightness", 7

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        assert len(images) == len(prompts) and images.abs().max() <= 1
        self.seen += prompts
        return images.mean((1, 2, 3)) * 100

    def num_truncated(self, prompts: Sequence[str]) -> int:
        assert len(set(prompts)) == len(prompts)
        return sum(len(prompt) > 7 for prompt in prompts)


class Latents(Pixels):
    of_latents = True


@pytest.mark.parametrize("way", ["pictures", "decode", "again"])
def test_clip_sees_pictures_and_their_prompts(way: str) -> None:
    def picture(eps: Tensor) -> Tensor:
        return falling(eps) * 10  # clipped at 1

    kind, extractor = (Fake, Pixels()) if way == "pictures" else (FakeOnLatents, Latents())
    source = kind("a", picture, text=True)
    source.can_decode = way == "decode"
    clip = Brightness()
    report, _ = compare(("a", source, True), extractor=extractor, prompts=PROMPTS, clip=clip)
    expected = picture(noise(range(40), (1, 4, 4))).clamp(-1, 1).double().mean() * 100
    assert report.rows[0].clip_score == pytest.approx(float(expected), abs=1e-4)
    assert clip.seen == list(PROMPTS) * 10
    assert report.protocol.clip_model == "brightness"
    assert report.protocol.notes[-1] == "CLIP score: 3 different prompts have more than 7 tokens, and were cut there"
    assert any("CLIP score with brightness" in line for line in report.protocol.lines())


# References


def test_reference_of_the_teacher_has_seeds_of_its_own() -> None:
    source = Fake("teacher", lambda eps: eps * 2)
    found = teacher_reference(source, Pixels(), Subjects(), config_of(num_samples=10))  # type: ignore[arg-type]
    expected = (noise(range(REFERENCE_SEED, REFERENCE_SEED + 10), (1, 4, 4)) * 2).clamp(-1, 1)
    assert found.images is None and found.seen is not None and torch.equal(found.seen, expected.flatten(1))
    assert "7-step" in found.name and str(REFERENCE_SEED) in found.name


def save(folder: Path, name: str, pixels: Tensor, mode: str = "L") -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.numpy()).convert(mode).save(path)


def test_reference_of_a_folder_is_its_pixels_sorted_by_path(tmp_path: Path) -> None:
    first, second = torch.arange(16, dtype=torch.uint8).reshape(4, 4) * 17, torch.zeros(4, 4, dtype=torch.uint8)
    save(tmp_path / "real", "b.png", first)
    save(tmp_path / "real", "a/deep.png", second)
    (tmp_path / "real" / "notes.txt").write_text("not an image")
    found = folder_reference(tmp_path / "real", (1, 4, 4))
    assert found.name == "the images in real/" and found.images.shape == (2, 1, 4, 4)
    assert torch.equal(found.images[0], torch.full((1, 4, 4), -1.0))
    assert torch.allclose(found.images[1, 0], first.float() / 127.5 - 1)


def test_reference_of_a_folder_has_the_channels_of_the_teacher(tmp_path: Path) -> None:
    colours = torch.randint(256, (4, 6, 3), dtype=torch.uint8)
    for name in ("a.png", "b.bmp"):
        save(tmp_path, name, colours, "RGB")
    found = folder_reference(tmp_path, (3, 4, 6)).images
    assert torch.allclose(found[0].permute(1, 2, 0), colours.float() / 127.5 - 1)
    assert folder_reference(tmp_path, (1, 4, 6)).images.shape == (2, 1, 4, 6)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_reference_of_16_bits_keeps_its_greys(channels: int, tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 16).round().astype(np.uint16).reshape(4, 4)
    for name in ("a.png", "b.png"):
        Image.fromarray(ramp * 257).save(tmp_path / name)
    found = folder_reference(tmp_path, (channels, 4, 4)).images
    assert found.shape == (2, channels, 4, 4)
    expected = torch.from_numpy(ramp.astype(np.float32)) / 127.5 - 1
    torch.testing.assert_close(found[0], expected.expand(channels, -1, -1))


def test_reference_of_a_folder_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        folder_reference(tmp_path / "none", (1, 4, 4))
    save(tmp_path, "one.png", torch.zeros(4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="holds 1 image; at least 2"):
        folder_reference(tmp_path, (1, 4, 4))
    save(tmp_path, "two.png", torch.zeros(4, 5, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"two\.png is 5x4, the teacher makes 4x4; resize it first"):
        folder_reference(tmp_path, (1, 4, 4))


def test_embedded_references_are_real_pictures() -> None:
    assert set(EMBEDDED) == {"digits", "glyphs"}
    for name in EMBEDDED:
        found = embedded_reference(name)
        assert found.images.ndim == 4 and len(found.images) >= 480
        assert found.images.min() >= -1 and found.images.max() <= 1 and found.images.std() > 0.3
        assert f"{len(found.images):,} real {name}" in found.name


# Features


def test_embedded_features_are_a_classifier_that_knows_the_digits() -> None:
    teacher = load_teacher("digits")
    found = choose_features("digits", teacher, local_files_only=True, device=CPU)
    assert isinstance(found, ClassifierFeatures)
    assert choose_features("auto", teacher, local_files_only=True, device=CPU).name == found.name
    assert found(embedded_reference("digits").images[:3]).ndim == 2


@pytest.mark.parametrize(("kind", "null"), [("plain", None), ("class", None), ("class", NULL_CLASS)])
def test_features_of_the_teacher_are_fixed_and_see_the_image(kind: str, null: int | None) -> None:
    teacher = load_teacher(teacher_folder(kind), null_class=null)
    extractor = choose_features("teacher", teacher, local_files_only=True, device=CPU)
    assert choose_features("auto", teacher, local_files_only=True, device=CPU).name == extractor.name
    assert "mid_block" in extractor.name and "log-SNR 2" in extractor.name
    images = torch.randn(4, 1, 8, 8).clamp(-1, 1)
    features = extractor(images)
    assert features.shape == (4, 16) and torch.equal(features, extractor(images))
    # One noise for all images, so an image's features do not depend on its place.
    assert torch.allclose(extractor(images.flip(0)), features.flip(0), atol=1e-5)
    assert (extractor(-images) - features).abs().max() > 1e-3


def test_without_a_middle_block_the_last_block_down_is_the_middle(tmp_path: Path) -> None:
    teacher = load_teacher(write_teacher(tmp_path / "teacher", tiny_network(mid_block_type=None)))
    extractor = teacher_features(teacher, CPU)
    assert extractor.name == "the teacher's own down_blocks.1 at log-SNR 2"
    assert extractor(torch.zeros(3, 1, 8, 8)).shape == (3, 16)


def test_features_of_a_teacher_without_a_middle_are_refused() -> None:
    function = module_teacher(lambda x, net_time: x, CosineVP(), "sample", (1, 8, 8))
    with pytest.raises(ValueError, match="plain callable without middle features; give features a .safetensors file "):
        teacher_features(function, CPU)
    module = module_teacher(nn.Identity(), CosineVP(), "sample", (1, 8, 8))
    with pytest.raises(
        ValueError,
        match="Identity has neither a mid_block nor another layer that sees each image once; give features a .safetensors file ",
    ):
        teacher_features(module, CPU)
