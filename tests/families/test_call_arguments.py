"""Arguments of every call, such as a size: from flags and settings through a whole run, and what is refused by name."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from pipelines import build
from runs_helpers import ALONE, as_flags, call_cli, copied, snapshot
from safetensors.torch import load_file, save_file

import onestill
from onestill.runs.build import build_run
from onestill.teachers.load import load_teacher
from onestill.teachers.pipelines.teacher import CALL_FILE, read_call
from onestill.teachers.settings import CALL_ARGUMENTS
from onestill.training.config import make_config

FAST: dict[str, Any] = {
    "device": "cpu",
    "train_batch_size": 4,
    **ALONE,
    "max_train_steps": 2,
    "ema_width": 0,
    "checkpointing_steps": 2,
    "learning_rate": 3e-3,
    "num_validation_images": 2,
    "num_teacher_steps": 2,
}
FEW = ["--num_samples", 10, "--steps", "1", "--num_reference_steps", 1, "--device", "cpu", "--no_speed"]


@functools.cache
def place() -> Path:
    """Return a folder of teachers by name, with prompts: read only."""
    return Path(tempfile.mkdtemp(prefix="onestill-call-"))


@functools.cache
def teacher(name: str) -> Path:
    build(name).save_pretrained(place() / name)
    (place() / "p.txt").write_text("red\nblue\na cat\n")
    return place() / name


@functools.cache
def run(name: str, **arguments: Any) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="onestill-call-run-"))
    flags = as_flags({**FAST, **arguments, "prompt_cache_dir": folder / "cache"})
    source = teacher(name)
    outcome = call_cli(
        "distill", "--teacher", source, "--output_dir", folder / "run", "--prompt_file", place() / "p.txt", *flags
    )
    assert outcome.code == 0, outcome.err
    return folder / "run"


def drawn(source: Path, path: Path, *flags: object) -> torch.Tensor:
    outcome = call_cli("sample", *flags, source, "--prompt", "red", "--num_images", 2, "--output", path)
    assert outcome.code == 0, outcome.err
    return load_file(path)["images"]


def card(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def test_a_size_holds_from_distill_to_export(tmp_path: Path) -> None:
    folder = copied(run("sd-epsilon", height=24, width=32), tmp_path / "run")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["height"], config["width"], config["num_frames"]) == (24, 32, None)
    images = [
        drawn(student, tmp_path / "x.safetensors", "--overwrite", "--student")
        for student in (folder, folder / "checkpoint-2", folder / "pipeline")
    ]
    assert images[0].shape == (2, 3, 24, 32) and torch.equal(images[0], images[2])
    assert (images[0] - images[1]).abs().max() <= 1e-4
    # The folder's own default is the student's size: plain diffusers, nothing said of it.
    plain = DiffusionPipeline.from_pretrained(folder / "pipeline")
    picture = plain("red", num_inference_steps=1, guidance_scale=1, output_type="pt").images
    assert picture.shape == (1, 3, 24, 32) and plain.unet.config.sample_size == [12, 16]
    assert "guidance_scale=1.0, height=24, width=32).images" in card(folder / "pipeline")
    assert "height 24, width 32, as distilled and as in the call above; this folder's default" in card(
        folder / "pipeline"
    )
    # The exported folder alone knows it too, and takes a teacher to it.
    outcome = call_cli(
        "evaluate", "--student", copied(folder / "pipeline", tmp_path / "alone"), "--teacher", teacher("sd-epsilon"),
        "--prompt", "red", "--output", tmp_path / "report", *FEW,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert call_cli("export", "--student", folder / "checkpoint-2", "--output", tmp_path / "again").code == 0
    assert read_call(tmp_path / "again") == {"height": 24, "width": 32}
    notes = {"num_inference_steps": 1, "scheduler": "DDIMScheduler"}
    assert json.loads((tmp_path / "again" / CALL_FILE).read_text()) == {"height": 24, "width": 32, **notes}


def test_a_size_must_not_change_on_resume_and_goes_on(tmp_path: Path) -> None:
    folder = copied(run("sd-epsilon", height=24, width=32), tmp_path / "run")
    flags = [
        "distill",
        "--config",
        folder / "config.yaml",
        "--output_dir",
        folder,
        "--resume_from_checkpoint",
        "latest",
    ]
    before = snapshot(folder)
    outcome = call_cli(*flags, "--width", 24)
    assert outcome.code == 2 and "was trained with other settings: width: 32 -> 24" in outcome.words
    assert snapshot(folder) == before
    assert call_cli(*flags).code == 0


def test_frames_and_tokens_of_a_video(tmp_path: Path) -> None:
    folder = run("wan", height=32, width=48, num_frames=5, max_sequence_length=16)
    together = drawn(folder, tmp_path / "a.safetensors", "--student")
    assert together.shape == (2, 3, 5, 32, 48)
    assert not (folder / "samples").exists(), "a video has no sheet of pictures"
    alone = drawn(copied(folder / "pipeline", tmp_path / "alone"), tmp_path / "b.safetensors", "--student")
    assert torch.equal(together, alone)
    assert "frames = pipe(" in card(folder / "pipeline") and "pipeline_tag: text-to-video" in card(folder / "pipeline")
    assert "height=32, width=48, num_frames=5, max_sequence_length=16).frames" in card(folder / "pipeline")
    assert "the folder's defaults are others" in card(folder / "pipeline")


def test_the_end_of_a_sound(tmp_path: Path) -> None:
    folder = run("stable-audio", audio_end_in_s=0.5)
    sounds = [
        drawn(student, tmp_path / f"{student.name}.safetensors", "--student")
        for student in (folder, folder / "checkpoint-2")
    ]
    assert sounds[0].shape == sounds[1].shape == (2, 2, 8)  # half a second of 16 numbers
    assert (sounds[0] - sounds[1]).abs().max() <= 1e-4
    assert "audios = pipe(" in card(folder / "pipeline") and "audio_end_in_s=0.5).audios" in card(folder / "pipeline")


@pytest.mark.parametrize(
    ("name", "network", "default"),
    [("sdxl-zeros", "unet", 12), ("sd3", "transformer", 12), ("pixart-sigma", "transformer", 8)],
)  # fmt: skip
def test_a_square_is_the_default_where_the_class_has_one(name: str, network: str, default: int) -> None:
    size = 24
    folder = run(name, height=size, width=size)
    plain = DiffusionPipeline.from_pretrained(folder / "pipeline")
    assert getattr(plain, network).config.sample_size == default
    arguments = {"use_resolution_binning": False} if name.startswith("pixart") else {}
    call: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent", **arguments}
    assert plain("red", **call).images.shape[-2:] == (default, default)
    said = "this folder's default" if default == 12 else "the folder's defaults are others"
    assert said in card(folder / "pipeline")


def test_an_oblong_of_a_class_whose_default_is_a_square_is_said(tmp_path: Path) -> None:
    folder = run("sdxl-zeros", height=16, width=24)
    assert "the folder's defaults are others" in card(folder / "pipeline")
    assert drawn(folder / "pipeline", tmp_path / "x.safetensors", "--student").shape == (2, 3, 16, 24)
    assert json.loads((folder / "pipeline" / "unet" / "config.json").read_text())["sample_size"] == 8


def test_a_lora_file_is_called_at_the_size_of_its_card() -> None:
    folder = run("sd-epsilon", height=24, width=24, lora_rank=2)
    assert (folder / "pipeline" / "lora").is_dir() and "height=24, width=24" in card(folder / "pipeline")


def test_a_pipeline_that_no_family_names(tmp_path: Path) -> None:
    folder = run("unnamed-auraflow", height=16, width=24, max_sequence_length=16)
    images = [drawn(s, tmp_path / f"{s.name}.safetensors", "--student") for s in (folder, folder / "checkpoint-2")]
    assert images[0].shape == (2, 3, 16, 24) and (images[0] - images[1]).abs().max() <= 1e-4


def test_a_teacher_samples_at_a_size(tmp_path: Path) -> None:
    flags = ["--height", 24, "--width", 32, "--num_inference_steps", 2, "--teacher"]
    images = drawn(teacher("sd-epsilon"), tmp_path / "x.safetensors", *flags)
    assert images.shape == (2, 3, 24, 32)
    again = onestill.sample(
        teacher=teacher("sd-epsilon"), height=24, width=32, prompts=["red"], num_images=2, num_inference_steps=2
    )  # fmt: skip
    assert torch.equal(images, again)


def test_inspect_says_the_call() -> None:
    flags = ["inspect", "--teacher", teacher("sd-epsilon"), "--height", 24, "--width", 32, "--device", "cpu"]
    assert "height = 24, width = 32" in call_cli(*flags).out
    found = json.loads(call_cli(*flags, "--json").out)
    assert found["arguments"] == {"height": 24, "width": 32} and found["sample_shape"] == [4, 12, 16]


def test_a_teacher_object_brings_its_own(tmp_path: Path) -> None:
    made = load_teacher(teacher("sd-epsilon"), arguments={"height": 24, "width": 32})
    own_size = {"height": 24, "width": 32, "num_images": 1, "num_inference_steps": 1}
    assert onestill.sample(teacher=made, prompts=["red"], **own_size).shape == (1, 3, 24, 32)
    own = {**FAST, "prompt_file": place() / "p.txt", "prompt_cache_dir": tmp_path / "cache", "max_train_steps": 1}
    with pytest.raises(ValueError, match="height=16: was given with a teacher object"):
        onestill.distill(made, tmp_path / "run", height=16, width=16, show_progress=False, **own)
    onestill.distill(made, tmp_path / "run", show_progress=False, **own)
    assert onestill.sample(tmp_path / "run" / "checkpoint-1", prompts=["red"], num_images=1).shape == (1, 3, 24, 32)
    with pytest.raises(ValueError, match="height=8: was given with a teacher object that has 24"):
        onestill.sample(teacher=made, height=8, width=8, prompts=["red"])


def test_a_teacher_object_stays_as_it_is_and_is_all_recorded(tmp_path: Path) -> None:
    made = load_teacher(teacher("sd-epsilon"))
    own = {**FAST, "prompt_file": place() / "p.txt", "prompt_cache_dir": tmp_path / "cache", "max_train_steps": 1}
    before = {name: value.clone() for name, value in made.null_cond.items()}
    run = tmp_path / "run"
    onestill.distill(made, run, dry_run=True, negative_prompt="ugly", guidance_scale=2.0, show_progress=False, **own)
    assert all(torch.equal(made.null_cond[name], value) for name, value in before.items())

    other = load_teacher(teacher("flux"), arguments={"height": 16, "width": 16, "guidance_scale": 1.0})
    with pytest.raises(ValueError, match=r"the argument guidance_scale = 1\.0, which a run cannot record"):
        onestill.distill(other, run, show_progress=False, **own)
    assert not run.exists()


def test_more_tokens_are_cut_later(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a photo of it\n" + " ".join(["red cat"] * 5) + "\n")
    values = {
        "teacher": str(teacher("pixart-sigma")),
        "output_dir": tmp_path / "run",
        "prompt_file": tmp_path / "p.txt",
    }
    for longest, num_cut in ((4, 2), (8, 1), (16, 0)):
        own = {"max_sequence_length": longest, "prompt_cache_dir": tmp_path / "cache"}
        prepared = build_run(make_config({**FAST, **values, **own}))
        said = [message for message in prepared.messages if "longer than" in message]
        are, them = ("prompt is", "it") if num_cut == 1 else ("prompts are", "them")
        words = f"warning: {num_cut} {are} longer than the {longest} tokens the text encoder takes; it cuts {them}"
        assert said == ([words] if num_cut else []), longest  # fmt: skip


REFUSED = [
    ("no such argument", "sd-epsilon", "--num_frames 3", "--num_frames 3: the call of StableDiffusionPipeline has no such argument; it has --height, --width"),
    ("no tokens", "sd-epsilon", "--max_sequence_length 77", "--max_sequence_length 77: the call of StableDiffusionPipeline has no such argument"),
    ("no sound", "wan", "--audio_end_in_s 2", "--audio_end_in_s 2: the call of WanPipeline has no such argument"),
    ("no size", "dit", "--height 16 --width 16", "--height 16: the call of DiTPipeline has no such argument"),
    ("no such pipeline argument of an unnamed one", "unnamed-auraflow", "--num_frames 3", "--num_frames 3: the call of AuraFlowPipeline has no such argument"),
    ("height alone", "sd-epsilon", "--height 16", "--height and --width: are given together or not at all"),
    ("not divisible", "sd-epsilon", "--height 20 --width 16", "--height 20 and --width 16: `height` and `width` have to be divisible by 8"),
    ("rounded without a word", "flux", "--height 19 --width 16 --max_sequence_length 16", "--height 19: a FluxPipeline cannot make that and rounds it; ask for --height 16"),
    ("frames rounded", "wan", "--height 32 --width 32 --num_frames 6", "--num_frames 6: a WanPipeline cannot make that and rounds it; ask for --num_frames 5"),
    ("more than the network takes", "sd3", "--height 64 --width 16", "--height 64: Height (16) cannot be greater than"),
    ("too long a sound", "stable-audio", "--audio_end_in_s 50", "--audio_end_in_s 50: The total audio length requested"),
    ("far from its own", "sd-epsilon", "--height 512 --width 512", "--height 512 and --width 512: is more than 8 times what the teacher was trained on"),
    ("zero", "sd-epsilon", "--height 0 --width 16", "--height"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "pipeline", "flags", "words"), REFUSED, ids=[name for name, *_ in REFUSED])
def test_what_is_refused(
    name: str, pipeline: str, flags: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = teacher(pipeline)
    monkeypatch.chdir(tmp_path)
    more = ["--prompt_file", place() / "p.txt", "--prompt_cache_dir", "cache"]
    for command in (
        ["distill", "--output_dir", "run", "--device", "cpu", *more],
        ["inspect", "--device", "cpu"],
        ["sample", "--output", "x.png", "--prompt", "red"],
    ):
        outcome = call_cli(*command, "--teacher", source, *flags.split())
        assert outcome.code == 2 and words in outcome.words, outcome.err
        assert "Usage" in outcome.err or [line[:7] for line in outcome.err.splitlines()] == ["error: "], outcome.err
        assert list(tmp_path.iterdir()) == []


def test_a_student_has_one_size(tmp_path: Path) -> None:
    folder = run("sd-epsilon", height=24, width=32)
    outcome = call_cli(
        "sample", "--student", folder, "--prompt", "red", "--height", 8, "--width", 8, "--output", tmp_path / "x.png"
    )
    assert outcome.code == 2 and "--height 8: is for a teacher; a student has it distilled in" in outcome.words


def test_a_call_file_that_somebody_broke(tmp_path: Path) -> None:
    folder = copied(run("wan", height=32, width=48, num_frames=5, max_sequence_length=16) / "pipeline", tmp_path / "p")
    for text in ("{", "[1]"):
        (folder / CALL_FILE).write_text(text)
        outcome = call_cli("sample", "--student", folder, "--prompt", "red", "--output", tmp_path / "x.png")
        assert outcome.code == 2 and f"--student {folder}: does not load" in outcome.words


def test_the_flags_of_sample_are_those_of_the_settings() -> None:
    shown = call_cli("sample", "--help").out
    assert all(f"--{name}" in shown for name in CALL_ARGUMENTS)


# The start level of each kind


@pytest.mark.parametrize(
    ("name", "t_max", "reason"),
    [
        ("sd-epsilon", 1.0, "large enough for an epsilon head"),
        ("if", 0.968, "the epsilon head divides by alpha"),
        ("sd-v", 1.0, "v_prediction stays bounded at pure noise"),
        ("sd-v-zero-snr", 1.0, "v_prediction stays bounded at pure noise"),
        ("sd3", 1.0, "velocity stays bounded at pure noise"),
        ("stable-audio", 1.0, "v_prediction stays bounded at pure noise"),
    ],
)
def test_inspect_says_the_start_level_and_takes_another(name: str, t_max: float, reason: str) -> None:
    flags = ["inspect", "--teacher", teacher(name), "--device", "cpu", "--train_batch_size", 2, "--json"]
    found = json.loads(call_cli(*flags).out)
    assert found["t_max"] == pytest.approx(t_max, abs=1e-3) and reason in found["t_max_reason"]
    assert (found["alpha_at_t_max"] == pytest.approx(0, abs=1e-12)) == (
        name in ("sd-v-zero-snr", "sd3", "stable-audio")
    )
    outcome = call_cli(*flags, "--t_max", 0.9)
    if name == "sd3":  # whose stock scheduler starts one step from pure noise alone
        assert outcome.code == 2 and "a flow-matching student starts from pure noise" in outcome.words
        return
    given = json.loads(outcome.out)
    assert (given["t_max"], given["t_max_reason"]) == (0.9, "given")
    assert given["alpha_at_t_max"] > found["alpha_at_t_max"]


def test_a_given_start_level_is_kept_in_run_and_export(tmp_path: Path) -> None:
    name = "sd-epsilon"
    folder = run(name, t_max=0.9)
    assert yaml.safe_load((folder / "config.yaml").read_text())["t_max"] == 0.9
    images = [drawn(s, tmp_path / f"{s.name}.safetensors", "--student") for s in (folder, folder / "checkpoint-2")]
    assert (images[0] - images[1]).abs().max() <= 1e-4
    scheduler = json.loads((folder / "pipeline" / "scheduler" / "scheduler_config.json").read_text())
    alpha = load_teacher(teacher(name)).spec.process.level(0.9)[0]
    product = (1 - torch.tensor(scheduler["trained_betas"], dtype=torch.float64)).prod()
    assert float(product) ** 0.5 == pytest.approx(alpha, rel=1e-4)


def test_a_flow_student_that_could_not_be_exported_is_not_trained(tmp_path: Path) -> None:
    outcome = call_cli(
        "distill", "--teacher", teacher("sd3"), "--t_max", 0.9, "--output_dir", tmp_path / "run", "--device", "cpu",
        "--prompt_file", place() / "p.txt", "--prompt_cache_dir", tmp_path / "cache",
    )  # fmt: skip
    assert outcome.code == 2 and "a flow-matching student starts from pure noise; leave it at 1" in outcome.words
    assert list(tmp_path.iterdir()) == []


# Weights that hold no numbers


@pytest.mark.parametrize(
    ("part", "weights"),
    [
        ("unet", "diffusion_pytorch_model.safetensors"),
        ("vae", "diffusion_pytorch_model.safetensors"),
        ("text_encoder", "model.safetensors"),
    ],
)
def test_weights_that_are_no_numbers_are_named(part: str, weights: str, tmp_path: Path) -> None:
    folder = copied(teacher("sd-epsilon"), tmp_path / "t")
    tensors = load_file(folder / part / weights)
    name = next(n for n in tensors if "decoder" in n or part != "vae")
    tensors[name].flatten()[0] = torch.nan
    save_file(tensors, folder / part / weights, metadata={"format": "pt"})
    outcome = call_cli("inspect", "--teacher", folder, "--device", "cpu")
    assert outcome.code == 2 and "the weights hold non-finite numbers (NaN or infinity): " in outcome.words
    assert f"of the {part}" in outcome.words and f"'{name}'" in outcome.words
