"""Both CIFAR-10 scripts from end to end at toy size, on an archive made here."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from runs_helpers import read_report
from safetensors.torch import load_file

import onestill
from onestill.evaluation.classifier import ConvFeatures
from onestill.evaluation.features import ClassifierFeatures
from onestill.training.checkpoint import list_checkpoints

ROOT = Path(__file__).resolve().parent.parent.parent
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TEACHER = "--size toy --train_batch_size 8 --lr_warmup_steps 1 --mixed_precision bf16 --device cpu"


def load_script(path: Path) -> ModuleType:
    """Return a script as a module, under a name of its own: two of them are called cifar10."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def write_archive(path: Path, num: int, *, classes: tuple[str, ...] = CLASSES, size: int = 32) -> None:
    """Write `num` noisy images of each class, the archive's order mixed up; a class is a shade of grey."""
    random = np.random.default_rng(num)
    entries = [(label, name, i) for i in range(num) for label, name in enumerate(classes)]
    random.shuffle(entries)
    with tarfile.open(path, "w:xz") as archive:
        for label, name, i in entries:
            pixels = 20 + 22 * int(label) + random.integers(0, 20, (size, size, 3))
            file = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=95)
            member = tarfile.TarInfo(f"{name}/{int(i):04d}.jpg")
            member.size = file.tell()
            file.seek(0)
            archive.addfile(member, file)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_archive(folder / "cifar10-train.tar.xz", 4)
    write_archive(folder / "cifar10-test.tar.xz", 3)
    return folder


@pytest.fixture(scope="module")
def scripts() -> tuple[ModuleType, ModuleType]:
    """The teacher's script and the benchmark, which goes first since it makes the data importable."""
    benchmark = load_script(ROOT / "benchmarks" / "cifar10.py")
    return load_script(ROOT / "examples" / "teachers" / "cifar10.py"), benchmark


@pytest.fixture(scope="module")
def teacher_folder(
    data_dir: Path, scripts: tuple[ModuleType, ModuleType], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A teacher trained for three steps in one piece."""
    folder = tmp_path_factory.mktemp("teacher") / "whole"
    where = ["--data_dir", str(data_dir), "--output_dir", str(folder)]
    scripts[0].main([*where, *f"{TEACHER} --max_train_steps 3 --num_sample_images 20".split()])
    return folder


def test_archive_becomes_sorted_tensors_and_a_cache(
    data_dir: Path, scripts: tuple[ModuleType, ModuleType], tmp_path: Path
) -> None:
    data = sys.modules["cifar10_data"]
    images = data.load_images(data_dir, "train", tmp_path / "cache.safetensors")
    assert images.classes == CLASSES
    assert images.pixels.shape == (40, 3, 32, 32)
    assert images.pixels.dtype == torch.uint8
    assert images.labels.tolist() == [label for label in range(10) for _ in range(4)]
    # JPEG keeps an image's mean: the shades say that images and labels belong together.
    shades = images.pixels.float().mean((1, 2, 3))
    assert (shades - (29.5 + 22 * images.labels)).abs().max() < 3

    def no_decoding(archive: Path) -> None:
        raise AssertionError(f"{archive} was decoded again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "decode", no_decoding)
        again = data.load_images(data_dir, "train", tmp_path / "cache.safetensors")
        assert torch.equal(again.pixels, images.pixels)
        with pytest.raises(AssertionError, match=r"cifar10-test\.tar\.xz was decoded"):
            data.load_images(data_dir, "test", tmp_path / "cache.safetensors")


def test_unusable_archives_are_refused(scripts: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    load = scripts[1].load_images
    with pytest.raises(ValueError, match=r"holds no cifar10-train\.tar\.xz"):
        load(tmp_path, "train", tmp_path / "cache")
    write_archive(tmp_path / "cifar10-train.tar.xz", 1, classes=CLASSES[:9])
    with pytest.raises(ValueError, match="holds 9 classes, not 10"):
        load(tmp_path, "train", tmp_path / "cache")
    write_archive(tmp_path / "cifar10-train.tar.xz", 1, size=16)
    with pytest.raises(ValueError, match="not 32x32"):
        load(tmp_path, "train", tmp_path / "cache")
    (tmp_path / "cifar10-train.tar.xz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="does not decode"):
        load(tmp_path, "train", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_teacher_is_a_stock_folder_with_a_null_class(teacher_folder: Path) -> None:
    teacher = onestill.load_teacher(teacher_folder, null_class=10)
    assert teacher.spec.sample_shape == (3, 32, 32)
    assert teacher.spec.num_classes == 10
    assert teacher.spec.prediction_type == "v_prediction"
    assert teacher.spec.t_max == 1.0
    assert teacher.spec.process.level(1.0)[0] == 0
    assert teacher.spec.threshold.mode == "none"
    with Image.open(teacher_folder / "samples" / "step-000003.png") as picture:
        assert picture.size == (5 * 64 + 6 * 8, 4 * 64 + 5 * 8)


def test_teacher_in_pieces_is_the_teacher_in_one(
    data_dir: Path, scripts: tuple[ModuleType, ModuleType], teacher_folder: Path, tmp_path: Path
) -> None:
    where = ["--data_dir", str(data_dir), "--output_dir", str(tmp_path), "--resume_from_checkpoint", "latest"]
    pieces = f"{TEACHER} --max_train_steps 3 --max_minutes 0 --num_sample_images 0".split()
    for step in (1, 2, 3):
        scripts[0].main([*where, *pieces])
        assert list_checkpoints(tmp_path)[0].name == f"checkpoint-{step}"
    compared = 0
    for path in sorted(teacher_folder.rglob("*.safetensors")):
        expected, found = load_file(path), load_file(tmp_path / path.relative_to(teacher_folder))
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            assert torch.equal(value, found[name]), f"{path.name}: {name}"
            compared += 1
    assert compared > 300  # network, average, two moments and a step for each parameter; generator; images
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_teacher_refuses_to_overwrite_and_to_mix(
    data_dir: Path, scripts: tuple[ModuleType, ModuleType], teacher_folder: Path
) -> None:
    command = ["--data_dir", str(data_dir), "--output_dir", str(teacher_folder), *TEACHER.split()]
    with pytest.raises(ValueError, match="holds a training"):
        scripts[0].main(command)
    with pytest.raises(ValueError, match=r"other settings: learning_rate: 0\.0003 -> 0\.5"):
        scripts[0].main([*command, "--resume_from_checkpoint", "latest", "--learning_rate", "0.5"])


def test_sizes_are_what_they_say(scripts: tuple[ModuleType, ModuleType]) -> None:
    with torch.device("meta"):
        networks = {size: scripts[0].build_pipeline(size).unet for size in ("base", "toy")}
    count = {size: sum(p.numel() for p in network.parameters()) for size, network in networks.items()}
    assert count["base"] == pytest.approx(35.8e6, rel=0.01)
    assert count["toy"] < 100_000


def test_benchmark_from_teacher_to_table(
    data_dir: Path, scripts: tuple[ModuleType, ModuleType], teacher_folder: Path, tmp_path: Path
) -> None:
    where = ["--data_dir", str(data_dir), "--teacher", str(teacher_folder), "--output_dir", str(tmp_path)]
    student = "--max_train_steps 2 --train_batch_size 4 --mixed_precision bf16 --device cpu"
    features = "--feature_steps 10 --feature_batch_size 10 --feature_width 8"
    table = "--num_samples 10 --batch_size 10 --speed_rounds 1 --teacher_reference"
    scripts[1].main([*where, *f"{student} {features} {table}".split()])

    names = ["DDIM-50", "DDIM-10", "DDIM-4", "DDIM-1", "student"]
    report = read_report(tmp_path / "evaluation")
    assert [row.name for row in report.rows] == names
    assert [row.network_evaluations for row in report.rows] == [100, 20, 8, 2, 1]
    for row in report.rows:
        of_others = {"prompt_accuracy", "clip_score", "inception_score"}
        assert None not in row.model_dump(exclude=of_others).values()
    assert report.rows[4].speedup is not None
    assert report.rows[4].speedup > 1
    assert report.protocol.num_reference_images == 30
    assert report.protocol.reference == "the CIFAR-10 test images"
    judge = ConvFeatures.load(tmp_path / "features.safetensors")
    assert judge.record["num_held_out_images"] == 30
    assert report.protocol.extractor == judge.name
    other = read_report(tmp_path / "evaluation-teacher")
    assert "teacher's own DDIM-50 samples" in other.protocol.reference
    assert other.rows[0].frechet_distance != report.rows[0].frechet_distance
    assert (tmp_path / "evaluation" / "samples.png").is_file()
    index = json.loads((tmp_path / "student" / "pipeline" / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == "ConsistencyModelPipeline"


def test_label_accuracy_does_not_depend_on_the_batch(scripts: tuple[ModuleType, ModuleType]) -> None:
    extractor = ClassifierFeatures(ConvFeatures(in_channels=3, width=8))
    images = torch.rand(7, 3, 8, 8) * 2 - 1
    labels = extractor.logits(images).argmax(1)
    labels[2] = (labels[2] + 1) % 10
    for num in (3, 500):
        assert scripts[1].label_accuracy(extractor, images, labels, num) == pytest.approx(6 / 7)


def test_augmented_images_are_shifted_ones(scripts: tuple[ModuleType, ModuleType]) -> None:
    """A ramp to the right stays one in every row, wherever it was shifted to, or is one to the left."""
    ramp = torch.linspace(-1, 1, 32).expand(64, 3, 32, 32)
    moved = scripts[1].augmented(ramp)
    assert moved.shape == ramp.shape
    assert torch.equal(moved, moved[:, :1, :1].expand_as(moved))
    centre = moved[:, 0, 0, 16]
    assert len(centre.unique()) > 5  # of 9 shifts, times two for the mirror
    steps = moved[:, 0, 0, 5:27].diff(dim=1)
    assert torch.allclose(steps.abs(), torch.full_like(steps, 2 / 31), atol=1e-6)
