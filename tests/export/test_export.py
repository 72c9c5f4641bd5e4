"""Exports: what stock diffusers makes of the folder is what the student makes, and nothing half is ever left."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DModel
from export_helpers import trained
from runs_helpers import copied, teacher_folder
from torch import Tensor, nn

from onestill.core.tensors import Cond, noise
from onestill.core.writing import WriteError
from onestill.diffusion.process import CosineVP
from onestill.export import pixel
from onestill.export.export import export_student
from onestill.export.module import load_module
from onestill.export.pixel import PixelFormat, call_pipeline
from onestill.sampling.generate import student_generator
from onestill.students.model_card import (
    NO_TABLE,
    TABLE_END,
    TABLE_START,
    Facts,
    teacher_license,
    write_card,
    write_table,
)
from onestill.students.student import Student
from onestill.teachers.base import Teacher
from onestill.teachers.load import load_teacher
from onestill.teachers.module import module_teacher
from onestill.teachers.pipelines.folder import load_stock
from onestill.teachers.pixel import PixelTeacher, unet2d_teacher
from onestill.teachers.teacher_spec import TeacherSpec

Labels = Callable[[Teacher, int], Cond]
NUM = 16


def expected_images(student: Student, cond: Cond, t: float = 0.0, num: int = NUM) -> Tensor:
    return student_generator(student, t=t)(noise(range(num), student.spec.sample_shape), cond)


def stock_images(folder: Path, labels: list[int] | None, num: int = NUM) -> Tensor:
    """Return images of the plain pipeline call, with nothing of onestill in it."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(num)]
    images = pipeline(batch_size=num, class_labels=labels, generator=generators, output_type="pt").images
    return 2 * images - 1


def allowed(student: Student) -> float:
    # Float32: the folded weights round the network's output by up to 1e-6. An epsilon head divides that by
    # alpha = 0.05 at its start level: 2e-5, of which 1e-5 is measured.
    return 3e-5 if student.spec.prediction_type == "epsilon" else 1e-5


def compare(student: Student, folder: Path, cond: Cond, t: float = 0.0) -> None:
    expected = expected_images(student, cond, t)
    labels = cond["class_labels"].tolist() if "class_labels" in cond else None
    inside = expected.abs() < 1
    # An image of nothing but clipped pixels would be right for the wrong reason. (Epsilon: the head of a random
    # network at its start level leaves 3 % of the pixels.)
    assert int(inside.sum()) > 20
    found = stock_images(folder, labels)
    assert float((found - expected.clamp(-1, 1)).abs().max()) <= allowed(student)
    assert float((found[inside] - expected[inside]).abs().max()) <= allowed(student)


# The stock folder is the student


def test_stock_pipeline_is_the_student(unet_case: Any, tmp_path: Path, labels_for: Labels) -> None:
    teacher = unet_case.build()
    student = trained(teacher)
    error = export_student(student, tmp_path / "out")
    assert 0 <= error <= allowed(student)
    compare(student, tmp_path / "out", labels_for(teacher, NUM))


@pytest.mark.parametrize("name", ["ddpm-epsilon", "ddim-v", "edm-euler"])
def test_level_of_the_written_schedule_is_exact(cases: dict[str, Any], name: str, tmp_path: Path) -> None:
    # alpha^2 = 4e-5 as one float32 "1 - beta" would be off by a part in a thousand.
    teacher = cases[name].build()
    export_student(trained(teacher), tmp_path / "out")
    alpha, sigma = teacher.spec.process.level(teacher.spec.t_max)
    if name == "edm-euler":  # c_skip times the scale of the start
        alpha = 0.25 / (sigma**2 + 0.25) * (sigma**2 + 1) ** 0.5
    written = DDIMScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")
    assert float(written.alphas_cumprod[-1]) == pytest.approx(alpha**2, rel=2e-6)


@pytest.mark.parametrize("asked", [None, 3.3])
@pytest.mark.parametrize("name", ["class-null-last", "class-null-first"])
def test_drawn_guidance_is_baked(
    cases: dict[str, Any], name: str, tmp_path: Path, labels_for: Labels, asked: float | None
) -> None:
    teacher = cases[name].build()
    student = trained(teacher, guidance_range=(1.0, 4.0))
    export_student(student, tmp_path / "out", guidance_scale=asked)
    w = 2.5 if asked is None else asked
    cond = {**labels_for(teacher, NUM), "guidance_scale": torch.full((NUM,), w)}
    compare(student, tmp_path / "out", cond)
    other = expected_images(student, {**cond, "guidance_scale": torch.full((NUM,), 1.0)})
    assert float((expected_images(student, cond) - other).abs().max()) > 1e-3, "w must matter for this to be a test"


@pytest.mark.parametrize("name", ["ddpm-epsilon", "edm-euler"])
def test_other_target_times_are_baked(cases: dict[str, Any], name: str, tmp_path: Path) -> None:
    student = trained(cases[name].build())
    export_student(student, tmp_path / "out", t=0.3)
    compare(student, tmp_path / "out", {}, t=0.3)
    assert float((expected_images(student, {}, 0.3) - expected_images(student, {}, 0.0)).abs().max()) > 1e-2


def test_given_start_levels_are_exported(cases: dict[str, Any], tmp_path: Path) -> None:
    for name, t_max in (("ddpm-epsilon", 0.6), ("ddim-v-zero-snr", 0.75), ("ddim-sample", 0.5), ("edm-euler", 0.5)):
        teacher = cases[name].build()
        teacher.spec = replace(teacher.spec, t_max=t_max)
        student = trained(teacher)
        export_student(student, tmp_path / name)
        compare(student, tmp_path / name, {})


def test_square_sizes_written_as_pairs_are_exported(tiny_unet: Callable[..., UNet2DModel], tmp_path: Path) -> None:
    scheduler = DDIMScheduler(prediction_type="v_prediction")
    student = trained(unet2d_teacher(tiny_unet(sample_size=(8, 8)), scheduler))
    export_student(student, tmp_path / "out")
    compare(student, tmp_path / "out", {})


def test_one_image_is_one_network_evaluation(uncond_folder: Path) -> None:
    pipeline = load_stock(DiffusionPipeline, uncond_folder)
    calls: list[int] = []
    pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    assert call_pipeline(pipeline, range(3), None).shape == (3, 1, 8, 8)
    assert len(calls) == 1


def test_null_class_that_stands_last_is_dropped(cases: dict[str, Any], tmp_path: Path) -> None:
    export_student(trained(cases["class-null-last"].build()), tmp_path / "out")
    pipeline = load_stock(DiffusionPipeline, tmp_path / "out")
    # So that the stock pipeline's random labels are classes.
    assert pipeline.unet.config.num_class_embeds == 4
    assert pipeline.unet.class_embedding.weight.shape[0] == 4
    assert pipeline(batch_size=5, output_type="pt").images.shape == (5, 1, 8, 8)
    export_student(trained(cases["class-null-first"].build()), tmp_path / "first")
    assert load_stock(DiffusionPipeline, tmp_path / "first").unet.config.num_class_embeds == 5, (
        "labels keep their numbers"
    )


@pytest.fixture
def uncond_folder(cases: dict[str, Any], tmp_path: Path) -> Path:
    export_student(trained(cases["ddim-v-zero-snr"].build()), tmp_path / "out")
    return tmp_path / "out"


def test_folder_holds_safetensors_and_json_only(cases: dict[str, Any], tmp_path: Path) -> None:
    for name in ("ddim-v", "class-null-last", "module-cosine-v"):
        export_student(trained(cases[name].build()), tmp_path / name)
        files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        assert {path.suffix for path in files} == {".json", ".safetensors", ".md"}
        assert [path.name for path in files if path.suffix == ".md"] == ["README.md"]


def test_folder_is_a_stock_pipeline(uncond_folder: Path) -> None:
    index = json.loads((uncond_folder / "model_index.json").read_text())
    assert index["_class_name"] == "ConsistencyModelPipeline"
    assert index["unet"] == ["diffusers", "UNet2DModel"]
    assert index["scheduler"][0] == "diffusers"
    images = DiffusionPipeline.from_pretrained(uncond_folder)(batch_size=2).images
    assert [image.size for image in images] == [(8, 8), (8, 8)], "the default output is pictures"


# Folders are whole or not there


def test_existing_folder_is_not_overwritten(uncond_folder: Path, cases: dict[str, Any]) -> None:
    before = {path: path.read_bytes() for path in uncond_folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"output=.*out': exists; .*overwrite"):
        export_student(trained(cases["ddim-v"].build()), uncond_folder)
    assert {path: path.read_bytes() for path in uncond_folder.rglob("*") if path.is_file()} == before
    assert os.listdir(uncond_folder.parent) == ["out"]


def test_overwriting_replaces_everything(uncond_folder: Path, cases: dict[str, Any], labels_for: Labels) -> None:
    (uncond_folder / "stray.txt").touch()
    teacher = cases["class-null-last"].build()
    student = trained(teacher)
    export_student(student, uncond_folder, overwrite=True)
    assert not (uncond_folder / "stray.txt").exists()
    assert os.listdir(uncond_folder.parent) == ["out"], "nothing is left beside it"
    compare(student, uncond_folder, labels_for(teacher, NUM))


def test_overwriting_that_fails_half_way_keeps_the_old_folder(
    uncond_folder: Path, cases: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (uncond_folder / "model_index.json").read_bytes()
    rename = os.replace

    def fail(source: Any, target: Any) -> None:
        if Path(target) == uncond_folder and ".partial" in Path(source).name:
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(WriteError, match="no space left"):
        export_student(trained(cases["class-null-last"].build()), uncond_folder, overwrite=True)
    assert (uncond_folder / "model_index.json").read_bytes() == before


@pytest.mark.parametrize("error", [1.0, 2e-4, float("nan")])
def test_failed_self_check_leaves_nothing(
    cases: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: float
) -> None:
    monkeypatch.setattr(PixelFormat, "check", lambda *_: error)
    with pytest.raises(RuntimeError, match=r"export self-check failed: .* differ .*allowed 1e-04"):
        export_student(trained(cases["ddim-v"].build()), tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_failed_self_check_keeps_the_old_folder(
    uncond_folder: Path, cases: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (uncond_folder / "model_index.json").read_bytes()
    monkeypatch.setattr(PixelFormat, "check", lambda *_: 1.0)
    with pytest.raises(RuntimeError, match="self-check failed"):
        export_student(trained(cases["class-null-last"].build()), uncond_folder, overwrite=True)
    assert (uncond_folder / "model_index.json").read_bytes() == before
    assert os.listdir(uncond_folder.parent) == ["out"]


def test_self_check_sees_a_wrong_head(cases: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # One part in a thousand off in the folded weights, and the export must not get its name.
    honest = pixel._scale_output
    monkeypatch.setattr(pixel, "_scale_output", lambda network, factor: honest(network, factor * 1.001))
    with pytest.raises(RuntimeError, match="self-check failed"):
        export_student(trained(cases["ddim-v-zero-snr"].build()), tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_student_with_non_finite_weights_is_not_exported(cases: dict[str, Any], tmp_path: Path) -> None:
    for name in ("ddim-v-zero-snr", "module-cosine-v"):
        student = trained(cases[name].build())
        with torch.no_grad():
            next(student.network.parameters()).fill_(float("nan"))
        with pytest.raises(RuntimeError, match="self-check failed"):
            export_student(student, tmp_path / name)
    assert os.listdir(tmp_path) == []


# Modules


def fresh_network(teacher: Teacher) -> nn.Module:
    """Return the network that a user would build again, with other weights than the teacher's."""
    network: Any = teacher.copy_network()
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    return network


@pytest.mark.parametrize("name", ["module-cosine-v", "module-flow-velocity", "module-ve-sigma", "module-class"])
@pytest.mark.parametrize("t", [0.0, 0.4])
def test_module_round_trip(cases: dict[str, Any], name: str, tmp_path: Path, labels_for: Labels, t: float) -> None:
    teacher = cases[name].build()
    student, cond = trained(teacher), labels_for(teacher, NUM)
    export_student(student, tmp_path / "out", t=t)
    generate = load_module(str(tmp_path / "out"), fresh_network(teacher))
    eps = noise(range(NUM), teacher.spec.sample_shape)
    # Float32; what was added after a layer is now part of its bias.
    torch.testing.assert_close(generate(eps, cond), expected_images(student, cond, t), rtol=1e-5, atol=1e-5)
    assert not generate(eps, cond).requires_grad


def test_module_round_trip_with_drawn_guidance(cases: dict[str, Any], tmp_path: Path, labels_for: Labels) -> None:
    teacher = cases["module-class"].build()
    student, cond = trained(teacher, guidance_range=(1.0, 4.0)), labels_for(teacher, NUM)
    export_student(student, tmp_path / "out", guidance_scale=3.3)
    generate = load_module(tmp_path / "out", fresh_network(teacher))
    expected = expected_images(student, {**cond, "guidance_scale": torch.full((NUM,), 3.3)})
    found = generate(noise(range(NUM), teacher.spec.sample_shape), cond)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_layers_without_bias_get_one(cases: dict[str, Any], tmp_path: Path) -> None:
    teacher = cases["module-cosine-v"].build()
    export_student(trained(teacher), tmp_path / "out")
    network: Any = fresh_network(teacher)
    assert network.first.bias is None and network.mix.bias is None
    load_module(tmp_path / "out", network)
    assert network.first.bias is not None and network.mix.bias is not None


def test_networks_that_share_weights_are_exported(tmp_path: Path) -> None:
    class Tied(nn.Module):
        """One matrix, used twice."""

        def __init__(self) -> None:
            super().__init__()
            self.into, self.out = nn.Linear(2, 2), nn.Linear(2, 2)
            self.out.weight = self.into.weight

        def forward(self, x: Tensor, net_time: Tensor) -> Tensor:
            return self.out(torch.tanh(self.into(x)))

    teacher = module_teacher(Tied(), CosineVP(), "sample", (2,))
    student = trained(teacher)
    export_student(student, tmp_path / "out")
    found = load_module(tmp_path / "out", Tied())(noise(range(NUM), (2,)), {})
    torch.testing.assert_close(found, expected_images(student, {}), rtol=1e-5, atol=1e-5)


def test_wrong_network_is_refused(
    cases: dict[str, Any], tmp_path: Path, plain_network: Callable[..., nn.Module]
) -> None:
    export_student(trained(cases["module-cosine-v"].build()), tmp_path / "out")
    for wrong in (nn.Linear(2, 2), plain_network(width=7), plain_network(channels=3)):
        with pytest.raises(ValueError, match=r"out: the weights are not of this network: \S"):
            load_module(tmp_path / "out", wrong)
    weights = tmp_path / "out" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(
        ValueError, match=r"model\.safetensors cannot be read: a file of its weights is no whole safetens"
    ):
        load_module(tmp_path / "out", plain_network())


def test_folder_that_is_no_module_is_refused(
    uncond_folder: Path, tmp_path: Path, plain_network: Callable[..., nn.Module]
) -> None:
    for folder, missing in ((uncond_folder, "model.safetensors"), (tmp_path / "missing", "onestill.json")):
        with pytest.raises(ValueError, match=f"is no exported module: it has no {missing}"):
            load_module(folder, plain_network())


# The card


def front_matter(folder: Path) -> dict[str, Any]:
    match = re.match(r"---\n(.*?)\n---\n", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert match is not None
    front: dict[str, Any] = yaml.safe_load(match.group(1))
    return front


def test_card_says_what_it_must(cases: dict[str, Any], tmp_path: Path) -> None:
    facts = Facts(
        guidance="w = 2.5", training="900 steps of 128 images", settings="s_first times", license={"license": "mit"}
    )
    error = export_student(trained(cases["class-null-last"].build()), tmp_path / "out", facts=facts)
    front, text = front_matter(tmp_path / "out"), (tmp_path / "out" / "README.md").read_text()
    assert front["library_name"] == "diffusers" and front["license"] == "mit"
    assert front["pipeline_tag"] == "unconditional-image-generation"
    assert {"diffusers", "distillation", "one-step", "data-free"} <= set(front["tags"])
    assert "base_model" not in front, "there is no hub id to point to"
    for said in (
        "No training data was used",
        "and class labels",
        "w = 2.5",
        "900 steps",
        "s_first",
    ):
        assert said in text
    assert f"{error:.1e}" in text, "the self-check's own number"
    assert f"{TABLE_START}\n{NO_TABLE}\n{TABLE_END}" in text


@pytest.mark.parametrize("name", ["ddim-v-zero-snr", "class-null-last", "class-null-first"])
def test_code_in_the_card_runs(cases: dict[str, Any], tmp_path: Path, name: str) -> None:
    export_student(trained(cases[name].build()), tmp_path / "out")
    blocks = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1 and "path/to/this/folder" in blocks[0]
    scope: dict[str, Any] = {}
    exec(blocks[0].replace("path/to/this/folder", str(tmp_path / "out")), scope)
    assert len(scope["images"]) == 4


def test_code_in_a_modules_card_runs(cases: dict[str, Any], tmp_path: Path) -> None:
    teacher = cases["module-cosine-v"].build()
    export_student(trained(teacher), tmp_path / "out")
    blocks = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    scope = {"MyNetwork": lambda: fresh_network(teacher), "noise": noise(range(2), (1, 8, 8))}
    exec(blocks[0].replace("path/to/this/folder", str(tmp_path / "out")), scope)
    assert scope["images"].shape == (2, 1, 8, 8)
    assert front_matter(tmp_path / "out")["library_name"] == "onestill"


def card_of(source: str, folder: Path) -> None:
    spec = TeacherSpec("unet2d", source, CosineVP(), "v_prediction", (3, 8, 8), 1.0, "given")
    write_card(folder, PixelTeacher(nn.Identity(), spec), Facts(), 1e-6, library="diffusers", code="")


def test_card_names_the_hub_teacher(tmp_path: Path) -> None:
    card_of("google/ddpm-cat-256", tmp_path)
    front = front_matter(tmp_path)
    assert (front["base_model"], front["base_model_relation"]) == ("google/ddpm-cat-256", "finetune")
    assert "# One-step student of ddpm-cat-256" in (tmp_path / "README.md").read_text()


def test_card_of_a_hub_teacher_has_its_license(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copied(teacher_folder(), tmp_path / "snapshot")

    def fetch(source: str, name: str, **_: Any) -> str:
        assert (source, name) == ("owner/name", "README.md")
        (folder / name).write_text("---\nlicense: cc-by-4.0\n---\n")
        return str(folder / name)

    monkeypatch.setattr(DiffusionPipeline, "download", lambda *_args, **_options: str(folder))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    student = trained(load_teacher("owner/name"))
    export_student(student, tmp_path / "out")
    assert front_matter(tmp_path / "out")["license"] == "cc-by-4.0"
    assert front_matter(tmp_path / "out")["base_model"] == "owner/name"
    export_student(student, tmp_path / "mine", facts=Facts(license={"license": "mit"}))
    assert front_matter(tmp_path / "mine")["license"] == "mit", "what is given wins"


def test_a_hub_teacher_without_a_card_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    # conftest.py sets HF_HUB_OFFLINE: the card cannot be had.
    monkeypatch.setattr(DiffusionPipeline, "download", lambda *_args, **_options: str(teacher_folder()))
    assert load_teacher("owner/name").folder == teacher_folder()


def test_table_is_put_in_place_of_the_one_before(tmp_path: Path) -> None:
    write_table(tmp_path, "| nowhere |")  # no card: nothing to do
    assert os.listdir(tmp_path) == []
    card_of("digits", tmp_path)
    before = (tmp_path / "README.md").read_text()
    for table in ("| a | 1 |", r"| b | \1 \g<0> |"):  # the second would be a back reference to a careless writer
        write_table(tmp_path, table)
        text = (tmp_path / "README.md").read_text()
        assert text == before.replace(NO_TABLE, table)
    (tmp_path / "README.md").write_text("# Somebody else's card")
    write_table(tmp_path, "| c |")
    assert (tmp_path / "README.md").read_text() == "# Somebody else's card"


ITS_OWN = "license: other\nlicense_name: somebodys\nlicense_link: "
OTHER = {"license": "other", "license_name": "somebodys"}
ELSEWHERE = "https://huggingface.co/owner/name/blob/main/LICENSE.md"


@pytest.mark.parametrize(
    ("card", "found", "linked"),
    [
        ("---\nlicense: mit\ntags: [a]\n---\n# A model", {"license": "mit"}, None),
        ("---\ntags: [a]\n---\n", {}, None),
        ("# No front matter", {}, None),
        ("---\n: [\n---\n", {}, None),
        ("---\njust words\n---\n", {}, None),
        ("---\nlicense:\n---\n", {}, None),
        ("---\nlicense: [mit, bsd]\n---\n", {}, None),
        ("---\nlicense_name: mine\n---\n", {}, None),
        ("---\n\xe9: \xff\n---\n", {}, None),
        (f"---\n{ITS_OWN}./LICENSE.md\n---\n", OTHER, ELSEWHERE),
        (f"---\n{ITS_OWN}LICENSE.md\n---\n", OTHER, ELSEWHERE),
    ],
)
def test_card_takes_the_teachers_license(card: str, found: dict[str, str], linked: str | None, tmp_path: Path) -> None:
    assert teacher_license(tmp_path) == {}, "there is no card"
    (tmp_path / "README.md").write_text(card, encoding="latin-1")
    assert teacher_license(tmp_path) == found, "a file beside the card does not come along"
    assert teacher_license(tmp_path, "owner/name").get("license_link") == linked


def test_an_address_of_a_license_is_kept(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{ITS_OWN}https://example.org/license\n---\n")
    assert teacher_license(tmp_path) == {**OTHER, "license_link": "https://example.org/license"}
