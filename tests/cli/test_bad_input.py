"""Bad input through the command line: exit code 2, one clear line that names the flag or the file, nothing written.

Every case starts in an empty folder with what its `make` puts there; the folder is the same afterwards, byte by byte.
"""

import json
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from runs_helpers import (
    FAST,
    as_flags,
    assert_refused,
    call_cli,
    copied,
    finished_run,
    snapshot,
    teacher_folder,
    tiny_network,
    with_places,
    write_teacher,
    zero_snr_scheduler,
)
from safetensors.torch import load_file, save_file

from onestill.teachers.load import load_teacher

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Case:
    """A command that must be refused."""

    name: str
    arguments: str
    words: str
    make: Callable[[], None] = field(default=lambda: None)

    def __str__(self) -> str:
        return self.name


PLACES: dict[str, Callable[[], object]] = {
    "PLAIN": lambda: teacher_folder("plain"),
    "CLASS": lambda: teacher_folder("class"),
    "EPSILON": lambda: teacher_folder("epsilon"),
    "OTHER": lambda: teacher_folder("other"),
    "RUN": lambda: finished_run(),
    "RUN_DRAWN": lambda: finished_run("drawn"),
}


def refused(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    case.make()
    before = snapshot(tmp_path)
    assert_refused(call_cli(*with_places(case.arguments, PLACES)), case.words)
    assert snapshot(tmp_path) == before
    if "RUN" in case.arguments:
        assert_untouched(finished_run())


def assert_untouched(run: Path) -> None:
    names = {path.name for path in run.iterdir()} - {"averages"}
    assert names == {"checkpoint-2", "checkpoint-4", "config.yaml", "logs", "pipeline", "samples", "teacher.json"}


# What is no teacher. Each is tried with every command that takes one.


def edit(path: str, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(Path(path).read_text())
    change(content)
    Path(path).write_text(json.dumps(content))


def bad_teacher(kind: str = "plain") -> Path:
    return copied(teacher_folder(kind), Path("teacher"))


def exported_alone() -> None:
    copied(finished_run() / "pipeline", Path("alone"))


def statistics_of_2048() -> None:
    np.savez("s.npz", mu=np.zeros(2048, np.float32), sigma=np.eye(2048, dtype=np.float32))


def no_pipeline() -> None:
    Path("teacher").mkdir()
    Path("teacher/photo.png").write_text("x")


def index_is(text: str) -> Callable[[], None]:
    def make() -> None:
        bad_teacher()
        Path("teacher/model_index.json").write_text(text)

    return make


def of_class(name: str, part: str = "_class_name") -> Callable[[], None]:
    def make() -> None:
        bad_teacher()
        edit(
            "teacher/model_index.json",
            lambda index: index.update({part: name if part == "_class_name" else ["diffusers", name]}),
        )

    return make


def unet_config(**values: Any) -> Callable[[], None]:
    def make() -> None:
        bad_teacher("class")
        edit("teacher/unet/config.json", lambda config: config.update(values))

    return make


def network(**config: Any) -> Callable[[], None]:
    return lambda: write_teacher(Path("teacher"), tiny_network(**config)) and None


def scheduler_config(**values: Any) -> Callable[[], None]:
    def make() -> None:
        bad_teacher("epsilon")
        edit("teacher/scheduler/scheduler_config.json", lambda config: config.update(values))

    return make


def without(name: str) -> Callable[[], None]:
    return lambda: (bad_teacher() / name).unlink()


def pickle_only() -> None:
    folder = bad_teacher()
    torch.save(load_file(folder / WEIGHTS), folder / "unet" / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[], None]:
    def make() -> None:
        path = bad_teacher() / WEIGHTS
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return make


def cut_weights() -> None:
    path = bad_teacher() / WEIGHTS
    path.write_bytes(path.read_bytes()[:5000])


TEACHERS = [
    Case("no such folder", "no/such/folder", "--teacher no/such/folder: no such teacher"),
    Case("no such hub id", "nobody/nothing", "--teacher nobody/nothing: no such teacher"),
    Case("no such name", "digitz", "--teacher digitz: no such teacher"),
    Case("a file", "teacher", "--teacher teacher: is a file", lambda: Path("teacher").write_text("") and None),
    Case("no pipeline", "teacher", "--teacher teacher: is no diffusers pipeline: it has no model_index.json", no_pipeline),
    Case("an empty folder", "teacher", "it has no model_index.json", lambda: Path("teacher").mkdir()),
    Case("an index that is no JSON", "teacher", "model_index.json does not parse", index_is("{")),
    Case("an index without a class", "teacher", "names no pipeline class", index_is("{}")),
    Case("an index that is a list", "teacher", "names no pipeline class", index_is("[]")),
    Case(
        "a text pipeline without its parts",
        "teacher",
        "the pipeline does not load",
        of_class("StableDiffusionPipeline"),
    ),
    Case("a token pipeline", "teacher", "it predicts discrete tokens", of_class("VQDiffusionPipeline")),
    Case("a score SDE", "teacher", "a ScoreSdeVePipeline cannot be a teacher", of_class("ScoreSdeVePipeline")),
    Case("another network", "teacher", "the network is a UNet1DModel", of_class("UNet1DModel", "unet")),
    Case("an unknown scheduler", "teacher", "'MyScheduler' is no scheduler", of_class("MyScheduler", "scheduler")),
    Case("a class embedding of another kind", "teacher", "class_embed_type='identity'", network(class_embed_type="identity")),
    Case("a time embedding of another kind", "teacher", "time_embedding_type='fourier'", network(time_embedding_type="fourier")),
    Case("no sample size", "teacher", "no sample_size", unet_config(sample_size=None)),
    Case("other classes than its weights", "teacher", "of the weights have another shape, such as", unet_config(num_class_embeds=7)),
    Case("wider than its weights", "teacher", "of the weights have another shape, such as", unet_config(block_out_channels=[8, 24])),
    Case("pickles only", "teacher", "only the pickle diffusion_pytorch_model.bin", pickle_only),
    Case("no weights", "teacher", "missing weights unet/diffusion_pytorch_model.safetensors", without(WEIGHTS)),
    Case("no network config", "teacher", "teacher: unet/ cannot be read", without("unet/config.json")),
    Case("no scheduler config", "teacher", "scheduler/scheduler_config.json cannot be read", without("scheduler/scheduler_config.json")),
    Case("half the weights", "teacher", "unet/ cannot be read", cut_weights),
    Case("a tensor too few", "teacher", "the weights lack 1 of the network's tensors, such as 'conv_in.bias'", weights(lambda w: w.pop("conv_in.bias"))),
    Case("a tensor too many", "teacher", "the weights hold tensors that unet/config.json has no place for", weights(lambda w: w.update(more=torch.ones(2)))),
    Case("a tensor of another shape", "teacher", "of the weights have another shape, such as", weights(lambda w: w.update({"conv_in.bias": torch.ones(9)}))),
    Case("NaN in the weights", "teacher", "the weights hold non-finite numbers (NaN or infinity): 'conv_in.bias' of the unet", weights(lambda w: w["conv_in.bias"].fill_(float("nan")))),
    Case("epsilon at zero terminal SNR", "teacher", "zero terminal SNR", scheduler_config(rescale_betas_zero_snr=True)),
    Case("an unknown prediction type", "teacher", "prediction_type", scheduler_config(prediction_type="score")),
]  # fmt: skip


@pytest.mark.parametrize("case", TEACHERS, ids=str)
def test_teachers(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    case.make()
    before = snapshot(tmp_path)
    teacher = case.arguments
    for command in (
        ["distill", "--output_dir", "run", "--device", "cpu"],
        ["inspect", "--device", "cpu"],
        ["sample", "--output", "x.png"],
    ):
        assert_refused(call_cli(*command, "--teacher", teacher), case.words)
        assert snapshot(tmp_path) == before


@pytest.mark.parametrize("path", ["./nothing", "./no/thing", "../nothing", "~/nothing-of-that-name", "/nothing/here"])
def test_a_path_never_reaches_the_hub(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffusers.DiffusionPipeline.download", asked)
    for command in (
        ["distill", "--output_dir", "run", "--device", "cpu"],
        ["inspect"],
        ["sample", "--output", "x.png"],
    ):
        outcome = call_cli(*command, "--teacher", path)
        assert outcome.code == 2 and f"--teacher {shlex.quote(path)}: no such folder; give a folder" in outcome.words, (
            outcome.err
        )
    assert list(tmp_path.iterdir()) == []
    # What may be a hub id does: this is the same door.
    with pytest.raises(ValueError, match="the hub was asked"):
        load_teacher("some/thing")


def test_weights_of_a_variant_that_is_not_there(tmp_path: Path) -> None:
    outcome = call_cli("distill", "--teacher", teacher_folder(), "--output_dir", tmp_path / "run", "--variant", "fp16")
    assert (
        outcome.code == 2
        and "--variant fp16: unet/ holds diffusion_pytorch_model.safetensors; leave it out" in outcome.words
    )


# Settings of a run

D = "distill --device cpu --output_dir run "


def write(path: str, text: str) -> Callable[[], None]:
    def make() -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text)

    return make


SETTINGS = [
    Case("no teacher", D, "--teacher: is required"),
    Case("no output", "distill --teacher PLAIN", "--output_dir: is required"),
    Case("unknown flag", D + "--teacher PLAIN --learning_rat 1", "no such option: --learning_rat; did you mean --learning_rate?"),
    Case("unknown command", "distil --teacher PLAIN", "no such command 'distil'. Did you mean 'distill'?"),
    Case("a word for a number", D + "--teacher PLAIN --delta small", "--delta"),
    Case("an unknown choice", D + "--teacher PLAIN --solver euler", "--solver"),
    Case("unknown YAML key", D + "--config run.yaml --teacher PLAIN", "run.yaml: unknown setting 'learning_rat'; did you mean 'learning_rate'?", write("run.yaml", "learning_rat: 1")),
    Case("no YAML file", D + "--config none.yaml --teacher PLAIN", "--config none.yaml: No such file"),
    Case("YAML that is none", D + "--config run.yaml --teacher PLAIN", "--config run.yaml: is no YAML in line 1: expected the node content", write("run.yaml", "a: [")),
    Case("YAML list", D + "--config run.yaml --teacher PLAIN", "--config run.yaml: must hold", write("run.yaml", "- a")),
    Case("YAML value", D + "--config run.yaml --teacher PLAIN", "run.yaml: --delta -1: must be above 0", write("run.yaml", "delta: -1")),
    Case("delta 0", D + "--teacher PLAIN --delta 0", "--delta 0: must be above 0"),
    Case("delta NaN", D + "--teacher PLAIN --delta nan", "--delta nan: must be a finite number"),
    Case("delta of the whole range", D + "--teacher PLAIN --anchor_fraction 0.5 --delta 0.7 --t_min 0.3", "--delta 0.7: must be below --t_max minus --t_min"),
    Case("delta below a step of the teacher", D + "--teacher PLAIN --anchor_fraction 0.5 --delta 1e-5", "--delta 1e-05: is below 0.001, one time step of the teacher"),
    Case("delta beyond the teacher's start", D + "--teacher EPSILON --anchor_fraction 0.5 --delta 0.8", "--delta 0.8: must be below t_max - t_min"),
    Case("t_min above t_max", D + "--teacher PLAIN --t_min 0.6 --t_max 0.5", "--t_min 0.6: must be below --t_max"),
    Case("t_min equal to t_max", D + "--teacher PLAIN --t_min 0.5 --t_max 0.5", "--t_min 0.5: must be below --t_max"),
    Case("t_min beyond the teacher's start", D + "--teacher EPSILON --t_min 0.8 --delta 0.1", "--t_min 0.8: must be below the teacher's start level"),
    Case("t_max beyond noise", D + "--teacher PLAIN --t_max 1.5", "--t_max 1.5: must be at most 1"),
    Case("t_max below a step", D + "--teacher PLAIN --t_max 0.0005 --delta 0.0001", "--t_max 0.0005: must be above 0.001"),
    Case("batch 0", D + "--teacher PLAIN --train_batch_size 0", "--train_batch_size 0: must be at least 2"),
    Case("batch 1", D + "--teacher PLAIN --train_batch_size 1", "--train_batch_size"),
    Case("no bootstrap rows", D + "--teacher PLAIN --train_batch_size 4 --boundary_weight 1 --boundary_fraction 0.9 --anchor_fraction 0 --corrector_fraction 0", "--boundary_fraction 0.9: no rows are left for them all"),
    Case("no rows beside the corrector", D + "--teacher PLAIN --train_batch_size 2 --corrector_fraction 0.25", "--anchor_fraction 1 and --corrector_fraction 0.25: no rows are left for them all in a batch of 2"),
    Case("rate NaN", D + "--teacher PLAIN --learning_rate nan", "--learning_rate nan: must be a finite number"),
    Case("rate infinite", D + "--teacher PLAIN --learning_rate inf", "--learning_rate inf: must be a finite number"),
    Case("rate negative", D + "--teacher PLAIN --learning_rate -1", "--learning_rate -1: must be above 0"),
    Case("no steps", D + "--teacher PLAIN --max_train_steps 0", "--max_train_steps"),
    Case("half a step", D + "--teacher PLAIN --max_train_steps 2.5", "--max_train_steps"),
    Case("warm-up of the whole run", D + "--teacher PLAIN --max_train_steps 10 --lr_warmup_steps 100", "--lr_warmup_steps 100: must be below --max_train_steps, 10"),
    Case("seed negative", D + "--teacher PLAIN --seed -1", "--seed"),
    Case("guidance negative", D + "--teacher CLASS --null_class 3 --guidance_scale -1", "--guidance_scale -1: must be at least 0"),
    Case("guidance NaN", D + "--teacher CLASS --null_class 3 --guidance_scale nan", "--guidance_scale nan: must be a finite"),
    Case("guidance fixed and drawn", D + "--teacher CLASS --null_class 3 --guidance_scale 2 --guidance_scale_min 1 --guidance_scale_max 3", "give one or the other"),
    Case("guidance half drawn", D + "--teacher CLASS --null_class 3 --guidance_scale_min 1", "given together"),
    Case("guidance of no classes", D + "--teacher PLAIN --guidance_scale 2", "--guidance_scale 2: needs a teacher with a null class, and this one has no classes"),
    Case("guidance without a null class", D + "--teacher CLASS --guidance_scale 2", "--guidance_scale 2: needs a teacher with a null class, and this one has none that is known; name it with --null_class"),
    Case("guidance drawn without one", D + "--teacher CLASS --guidance_scale_min 1 --guidance_scale_max 3", "--guidance_scale_min and --guidance_scale_max: need a teacher with a null class"),
    Case("guidance reversed", D + "--teacher CLASS --null_class 3 --guidance_scale_min 3 --guidance_scale_max 1", "--guidance_scale_min 3: must be below --guidance_scale_max, 1"),
    Case("interval reversed", D + "--teacher CLASS --null_class 3 --guidance_scale 2 --guidance_interval_min 0.8 --guidance_interval_max 0.2", "--guidance_interval_min 0.8: must be below --guidance_interval_max, 0.2"),
    Case("interval outside the levels", D + "--teacher CLASS --null_class 3 --guidance_scale 2 --guidance_interval_max 1.5", "--guidance_interval_max 1.5: must be at most 1"),
    Case("interval above the start level", D + "--teacher CLASS --null_class 3 --guidance_scale 2 --t_max 0.6 --guidance_interval_min 0.7", "--guidance_interval_min 0.7: must be below the teacher's start level t_max = 0.6"),
    Case("interval below every level", D + "--teacher CLASS --null_class 3 --guidance_scale 2 --guidance_interval_max 0.0001", "--guidance_interval_max 0.0001: is below 0.001, the cleanest level that the teacher knows"),
    Case("interval without guidance", D + "--teacher CLASS --null_class 3 --guidance_interval_max 0.8", "w = 1 is no guidance at any level; give a --guidance_scale other than 1"),
    Case("bootstrap by a whole solver", D + "--teacher PLAIN --solver dpmsolver++", "--solver"),
    Case("negative prompt of classes", D + "--teacher CLASS --null_class 3 --guidance_scale 2 --negative_prompt ugly", "--negative_prompt ugly: this teacher takes no text"),
    Case("LoRA of no rank", D + "--teacher PLAIN --lora_rank 0", "--lora_rank 0: must be at least 1"),
    Case("LoRA of no layers", D + "--teacher PLAIN --lora_rank 2 --lora_target_modules nowhere", "--lora_target_modules nowhere: no Linear or ungrouped Conv layer of UNet2DModel has a name that ends so"),
    Case("size of a network with one", D + "--teacher PLAIN --height 16 --width 16", "--height 16: the call of DDIMPipeline has no such argument"),
    Case("null class of no classes", D + "--teacher PLAIN --null_class 3", "--null_class 3: the teacher is unconditional"),
    Case("null class that is none", D + "--teacher CLASS --null_class 4", "--null_class 4: is not a label of the teacher, which has 4 (0 to 3)"),
    Case("labels of no classes", D + "--teacher PLAIN --class_labels 0", "--class_labels 0: the teacher is unconditional"),
    Case("labels that are none", D + "--teacher CLASS --class_labels 1 --class_labels 4 --class_labels 9", "--class_labels 4,9: the teacher's classes are 0 to 3"),
    Case("device", "distill --output_dir run --teacher PLAIN --device gpu", "--device gpu: unknown device; use auto, cpu, cuda, cuda:N or mps"),
    Case("device that is not there", "distill --output_dir run --teacher PLAIN --device cuda:99", "--device cuda:99: is not available"),
    Case("tracker", D + "--teacher PLAIN --report_to tensorbored", "--report_to tensorbored: is unknown"),
    Case("prompt", D + "--teacher PLAIN --prompt cat", "no such option: --prompt; did you mean --prompt_file?"),
    Case("output is a file", D + "--teacher PLAIN", "--output_dir run: is a file", write("run", "x")),
    Case("output below a file", "distill --output_dir file/run --teacher PLAIN", "--output_dir file/run: cannot be there: file is no folder", write("file", "x")),
    Case("output with other files", D + "--teacher PLAIN", "--output_dir run: holds other files", write("run/photo.png", "x")),
    Case("output with another run", "distill --output_dir RUN --teacher PLAIN", "holds another run; name a new folder, or go on with it: --resume_from_checkpoint latest"),
    Case("resume with other files", D + "--teacher PLAIN --resume_from_checkpoint latest", "--output_dir run: holds other files", write("run/photo.png", "x")),
    Case("resume from nowhere", D + "--teacher PLAIN --resume_from_checkpoint checkpoint-7", "--resume_from_checkpoint checkpoint-7: no such folder"),
    Case("resume from something else", D + "--teacher PLAIN --resume_from_checkpoint other", "checkpoint other is corrupt", write("other/a.txt", "x")),
]  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS, ids=str)
@pytest.mark.parametrize("dry", [False, True], ids=["", "dry run"])
def test_settings(case: Case, dry: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = case.arguments + " --dry_run" if dry and case.arguments.startswith("distill") else case.arguments
    refused(Case(case.name, arguments, case.words, case.make), tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "case",
    [case for case in SETTINGS if not any(word in case.name for word in ("output", "resume", "tracker", "command"))],
    ids=str,
)
def test_inspect_refuses_the_same(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = case.arguments.replace("distill", "inspect", 1)
    refused(Case(case.name, arguments, case.words, case.make), tmp_path, monkeypatch)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.access(locked, os.W_OK):  # root may write anywhere
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != locked or not mode & os.W_OK)
    run, few = finished_run(), ["--num_samples", 12, "--device", "cpu"]
    for command, flag in (
        (["distill", "--teacher", teacher_folder(), "--output_dir", locked / "run", "--device", "cpu"], "output_dir"),
        (["distill", "--teacher", teacher_folder(), "--output_dir", locked, "--device", "cpu"], "output_dir"),
        (["sample", "--student", run, "--output", locked / "x.png"], "output"),
        (["sample", "--student", run, "--output", locked], "output"),
        (["evaluate", "--student", run, "--output", locked / "report", *few], "output"),
        (["export", "--student", run, "--output", locked / "pipeline"], "output"),
        (["demo", "--output_dir", locked / "demo"], "output_dir"),
    ):
        outcome = call_cli(*command)
        assert outcome.code == 2, outcome
        assert f"--{flag} " in outcome.words and f"{locked} is not writable" in outcome.words
        assert list(locked.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that refuses folders")
def test_a_folder_that_the_system_refuses() -> None:
    outcome = call_cli("distill", "--teacher", teacher_folder(), "--output_dir", "/proc/run", *as_flags(FAST))
    assert outcome.code == 2 and "--output_dir /proc/run: cannot be written" in outcome.words


# Resuming


def resume(run: Path, *more: object, teacher: Path | None = None) -> Any:
    return call_cli(
        "distill", "--config", finished_run() / "config.yaml", "--output_dir", run, "--resume_from_checkpoint", "latest",
        "--teacher", teacher or teacher_folder(), *more,
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of a finished run, to be gone on with."""
    return copied(finished_run(), tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--learning_rate", 1e-5], "learning_rate: 0.003 -> 1e-05"),
        (["--delta", 0.2, "--seed", 5], "delta: 0.04 -> 0.2; seed: 0 -> 5"),
        (["--max_train_steps", 2], "max_train_steps: 4 -> 2"),
        (["--solver", "ddim"], "solver: 'midpoint' -> 'ddim'"),
        (["--ema_width", 0], "ema_width: [0.09] -> [0.0]"),
        (["--mixed_precision", "bf16"], "mixed_precision: 'no' -> 'bf16'"),
        (["--t_max", 0.9], "t_max: None -> 0.9"),
    ],
)
def test_resume_with_other_settings_says_which(run: Path, flags: list[object], words: str) -> None:
    before = snapshot(run)
    outcome = resume(run, *flags)
    assert outcome.code == 2 and "was trained with other settings" in outcome.words and words in outcome.words
    assert snapshot(run) == before


def test_resume_with_settings_that_may_differ(run: Path) -> None:
    flags = ["--checkpointing_steps", 3, "--logging_steps", 1, "--checkpoints_total_limit", 5, "--validation_steps", 3]
    assert resume(run, *flags, "--num_time_bins", 4).code == 0


def test_resume_with_another_teacher(run: Path) -> None:
    before = snapshot(run)
    outcome = resume(run, teacher=teacher_folder("other"))
    assert outcome.code == 2 and "was trained on a teacher with other weights" in outcome.words
    assert str(teacher_folder()) in outcome.words and str(teacher_folder("other")) in outcome.words
    assert snapshot(run) == before


@pytest.mark.parametrize(
    "scheduler",
    [zero_snr_scheduler("sample"), DDIMScheduler(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2")],
    ids=["prediction type", "schedule"],
)
def test_resume_with_the_same_weights_under_another_scheduler(run: Path, tmp_path: Path, scheduler: Any) -> None:
    outcome = resume(run, teacher=write_teacher(tmp_path / "teacher", tiny_network(), scheduler))
    assert outcome.code == 2 and "trained on a teacher" in outcome.words


def test_resume_with_the_same_teacher_elsewhere(run: Path, tmp_path: Path) -> None:
    assert resume(run, teacher=copied(teacher_folder(), tmp_path / "moved")).code == 0


def test_resume_from_an_older_checkpoint_overwrites_nothing(run: Path) -> None:
    before = snapshot(run)
    outcome = resume(run, "--resume_from_checkpoint", run / "checkpoint-2")
    assert outcome.code == 2 and "holds newer checkpoints (checkpoint-4)" in outcome.words
    assert snapshot(run) == before


def test_resume_where_every_checkpoint_is_corrupt(run: Path) -> None:
    for step in (2, 4):
        (run / f"checkpoint-{step}" / "student.safetensors").write_bytes(b"")
    before = snapshot(run)
    outcome = resume(run)
    assert outcome.code == 2 and "holds no usable checkpoint" in outcome.words
    assert "checkpoint-4" in outcome.words and "checkpoint-2" in outcome.words
    assert snapshot(run) == before


def test_a_corrupt_newest_checkpoint_falls_back_and_says_so(run: Path) -> None:
    path = run / "checkpoint-4" / "student.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    outcome = resume(run)
    assert outcome.code == 0, outcome.err
    assert "checkpoint-4 is corrupt: student.safetensors is not what was written" in outcome.words
    assert f"resuming from {run / 'checkpoint-2'}" in outcome.words


# The other commands

S, E, X = (
    "sample --output x.png ",
    "evaluate --no_speed --num_reference_steps 1 --num_samples 10 ",
    "export --output out ",
)

OTHERS = [
    Case("sample of nothing", S, "--student and --teacher: give one of them"),
    Case("sample of both", S + "--student RUN --teacher PLAIN", "--student and --teacher: give one of them: a student (one step) or a teacher (many steps)"),
    Case("sample of no folder", S + "--student none", "--student none: no such folder"),
    Case("sample of a folder that is no student", S + "--student stuff", "--student stuff: is neither a run (no config.yaml) nor an exported pipeline", write("stuff/a.txt", "x")),
    Case("sample of a run without a checkpoint", S + "--student new", "new holds no usable checkpoint", lambda: write("new/config.yaml", f"teacher: {teacher_folder()}\noutput_dir: new\n")()),
    Case("sample of a run with a broken config", S + "--student new", "unknown setting", lambda: write("new/config.yaml", "tacher: x\n")()),
    Case("sample with a prompt", S + "--student RUN --prompt cat", "run-plain/pipeline takes no text; leave it out"),
    Case("sample with a prompt of a teacher", S + "--teacher PLAIN --prompt cat", "teacher-plain takes no text; leave it out"),
    Case("sample with a prompt of classes", S + "--teacher CLASS --prompt cat", "takes no text; say what to draw with --class_labels"),
    Case("sample of no image", S + "--student RUN --num_images 0", "--num_images 0: must be at least 1"),
    Case("sample in batches of none", S + "--student RUN --batch_size 0", "--batch_size 0: must be at least 1"),
    Case("sample with a negative seed", S + "--student RUN --seed -1", "--seed"),
    Case("sample on no device", S + "--student RUN --device gpu", "--device gpu: unknown device"),
    Case("sample with many steps of a student", S + "--student RUN --num_inference_steps 9", "a student has 1 to 8 steps"),
    Case("sample with a step too many", S + "--student RUN --num_inference_steps 4", "was trained for one step; distil"),
    Case("export with a step too many", "export --student RUN --output out --num_inference_steps 4", "for one step; distil"),
    Case("export with steps without end", "export --student RUN --output out --num_inference_steps 9", "must be at most 8"),
    Case("sample with other steps", S + "--student RUN/pipeline --num_inference_steps 4", "was exported for 1, and no"),
    Case("evaluate with a step too many", E + "--student RUN --student_steps 1,4", "--student_steps 1,4: this student was"),
    Case("sample with no step of a teacher", S + "--teacher PLAIN --num_inference_steps 0", "--num_inference_steps 0: must be at least 1"),
    Case("sample with an unknown solver", S + "--teacher PLAIN --solver euler", "--solver: 'euler' is not one of 'ddim', 'heun', 'midpoint'"),
    Case("sample of labels of no classes", S + "--student RUN --class_labels 1", "is unconditional"),
    Case("sample of labels that are none", S + "--teacher CLASS --class_labels 7", "--class_labels 7: the teacher"),
    Case("sample with an interval without guidance", S + "--teacher CLASS --null_class 3 --guidance_interval_min 0.5", "w = 1 is no guidance at any level; give a --guidance_scale other than 1"),
    Case("sample with guidance of no classes", S + "--teacher PLAIN --guidance_scale 2", "needs a teacher with a null class"),
    Case("sample with guidance that is fixed", S + "--student RUN --guidance_scale 2", "distilled with w = 1 fixed"),
    Case("sample with guidance out of range", S + "--student RUN_DRAWN --guidance_scale 9", "--guidance_scale 9: is outside 1 to 3"),
    Case("sample at no time", S + "--student RUN --target_time 2", "--target_time 2: must be at most 1"),
    Case("sample at NaN", S + "--student RUN --target_time nan", "--target_time nan: must be a finite number"),
    Case("sample of a teacher at a time", S + "--teacher PLAIN --target_time 0.5", "--target_time 0.5: is the student's"),
    Case("sample of an export at a time", S + "--student RUN/pipeline --target_time 0.5", "give the run's folder for others"),
    Case("sample into a file that is there", S + "--student RUN", "--output x.png: exists; name another, or give --overwrite", write("x.png", "precious")),
    Case("sample into a folder that is not empty", "sample --output out --student RUN", "--output out: exists", write("out/a.txt", "x")),
    Case("sample into a folder named as a picture", S + "--student RUN", "--output x.png: is a folder", write("x.png/a.txt", "x")),
    Case("sample into another format", "sample --output x.gif --student RUN", "--output x.gif: a .gif needs frames, such as those of --interpolate 9; else give a .png, a .safetensors, or a folder"),
    Case("two things to play", S + "--student RUN --interpolate 4 --to_seed 1 --fixed_noise", "--interpolate and --fixed_noise: give one of them"),
    Case("two lists to play", S + "--student RUN --guidance_scales 1,2 --target_times 1,0", "--guidance_scales and --target_times: give one of them"),
    Case("an end without a way", S + "--student RUN --to_seed 1", "--to_seed 1: is where --interpolate goes to"),
    Case("a way without an end", S + "--student RUN --interpolate 4", "--interpolate 4: needs two ends; give two --prompts (got 0), or --to_seed"),
    Case("a way of three prompts", S + "--student RUN --interpolate 4 --prompt a --prompt b --prompt c", "give two --prompt (got 3), or one of --prompt and --to_seed"),
    Case("a way of one image", S + "--student RUN --interpolate 1 --to_seed 1", "--interpolate 1: must be at least 2"),
    Case("a way to the same noise", S + "--student RUN --interpolate 4 --seed 3 --to_seed 3", "--to_seed 3: is --seed"),
    Case("a way to no seed", S + "--student RUN --interpolate 4 --to_seed -1", "--to_seed"),
    Case("a way to a seed that is too large", S + "--student RUN --interpolate 4 --to_seed 9223372036854775807", "--to_seed 9223372036854775807: must be below"),
    Case("a way counted twice", S + "--student RUN --interpolate 4 --to_seed 1 --num_images 4", "--num_images 4: --interpolate 4 says how many already"),
    Case("a way between labels", S + "--student RUN --interpolate 4 --class_labels 1 --class_labels 2", "nothing between two labels that the network knows"),
    Case("a way with a label of no classes", S + "--student RUN --interpolate 4 --to_seed 1 --class_labels 1", "is unconditional"),
    Case("a way between prompts of no text", S + "--student RUN --interpolate 4 --prompt a --prompt b", "run-plain/pipeline takes no text; leave it out"),
    Case("a way with two prompts and two seeds", S + "--student RUN --interpolate 4 --to_seed 1 --prompt a --prompt b", "keeps the prompt; give one of --prompt, not 2"),
    Case("one noise of no classes", S + "--student RUN --fixed_noise", "is unconditional, so one noise is one image"),
    Case("one noise more often than labels", S + "--teacher CLASS --fixed_noise --num_images 9", "--num_images 9: with --fixed_noise there is one image for each of the 4 labels"),
    Case("scales that are none", S + "--student RUN_DRAWN --guidance_scales 1,x", "--guidance_scales x: must be a valid number"),
    Case("scales twice", S + "--student RUN_DRAWN --guidance_scales 1,1.0", "--guidance_scales 1,1: must be different numbers"),
    Case("scales below zero", S + "--student RUN_DRAWN --guidance_scales 1,-2", "--guidance_scales -2: must be at least 0"),
    Case("scales out of range", S + "--student RUN_DRAWN --guidance_scales 2,9", "--guidance_scales 2,9: is outside 1 to 3"),
    Case("a scale of a way", S + "--student RUN_DRAWN --interpolate 3 --to_seed 1 --guidance_scale 9", "--guidance_scale 9: is outside 1 to 3"),
    Case("one noise more often than its label", S + "--teacher CLASS --fixed_noise --class_labels 1 --num_images 9", "there is one image for the one label"),
    Case("scales and a scale", S + "--student RUN_DRAWN --guidance_scales 1,2 --guidance_scale 2", "--guidance_scales 1,2 and --guidance_scale 2: give one or the other"),
    Case("scales of a fixed student", S + "--student RUN --guidance_scales 1,2", "--guidance_scales 1,2: this student was distilled with w = 1 fixed; distil with --guidance_scale_min"),
    Case("scales of an export", S + "--student RUN/pipeline --guidance_scales 1,2", "give the run's folder for others"),
    Case("scales of no classes", S + "--teacher PLAIN --guidance_scales 1,2", "--guidance_scales 1,2: needs a teacher with a null class"),
    Case("times and a time", S + "--student RUN --target_times 1,0 --target_time 0.5", "--target_times 1,0 and --target_time 0.5: give one or the other"),
    Case("times that are none", S + "--student RUN --target_times 1,,0", "--target_times '': must be a valid number"),
    Case("times out of range", S + "--student RUN --target_times 2,0", "--target_times 2: must be at most 1"),
    Case("times before the end", S + "--student RUN --target_times 1,-1", "--target_times -1: must be at least 0"),
    Case("times of a teacher", S + "--teacher PLAIN --target_times 1,0", "--target_times 1,0: is a student's"),
    Case("the last time of a teacher", S + "--teacher PLAIN --target_times 0", "--target_times 0: is a student's"),
    Case("times of an export", S + "--student RUN/pipeline --target_times 1,0", "give the run's folder for others"),
    Case("playing without an image", S + "--student RUN --target_times 1,0 --num_images 0", "--num_images 0: must be at least 1"),
    Case("playing in batches of none", S + "--student RUN --target_times 1,0 --batch_size 0", "--batch_size 0: must be at least 1"),
    Case("playing into another format", "sample --output x.webp --student RUN --target_times 1,0", "--output x.webp: give a .png, a .gif, a .safetensors, or a folder"),
    Case("playing into a file that is there", "sample --output x.gif --student RUN --target_times 1,0", "--output x.gif: exists", write("x.gif", "precious")),
    Case("sample with an unknown flag", S + "--studnt RUN", "no such option: --studnt; did you mean --student?"),
    Case("a teacher for a student", S + "--student CLASS", "it is a pipeline of many steps, no one-step student; --teacher draws"),
    Case("a student for a teacher", S + "--teacher RUN/pipeline", "pipeline: is a one-step student: its network has no use for the time"),
    Case("evaluate against a student", E + "--student RUN --teacher RUN/pipeline --output out", "pipeline: is a one-step student"),
    Case("inspect of a student", "inspect --teacher RUN/pipeline", "pipeline: is a one-step student"),
    Case("a student distilled again", D + "--teacher RUN/pipeline", "pipeline: is a one-step student"),
    Case("evaluate of nothing", E, "--student: is required"),
    Case("evaluate of no folder", E + "--student none", "--student none: no such folder"),
    Case("evaluate of no folder beside a report", E + "--student none", "--student none: no such folder", write("none-evaluation/report.json", "{}")),
    Case("evaluate of no folder over a report", E + "--student none --output out", "--student none: no such folder", write("out/report.json", "{}")),
    Case("evaluate of an export that knows no teacher", E + "--student alone --output out", "does not know its teacher; name it with --teacher", exported_alone),
    Case("evaluate of too few", "evaluate --student RUN --num_samples 9 --output out", "--num_samples 9: must be at least 10"),
    Case("evaluate at no steps", E + "--student RUN --steps 4,x --output out", "--steps x: must be a valid integer"),
    Case("evaluate at zero steps", E + "--student RUN --steps 4,0 --output out", "--steps 0: must be at least 1"),
    Case("evaluate at the same steps", E + "--student RUN --steps 4,4 --output out", "--steps 4,4: must be different"),
    Case("evaluate without reference steps", "evaluate --student RUN --num_reference_steps 0 --output out", "--num_reference_steps 0: must be at least 1"),
    Case("evaluate against nothing", E + "--student RUN --reference none --output out", "--reference none: no such folder"),
    Case("evaluate against an empty folder", E + "--student RUN --reference real --output out", "--reference real: holds 0 images", lambda: Path("real").mkdir()),
    Case("evaluate with unknown features", E + "--student RUN --features no/such/thing/here --output out", "--features no/such/thing/here: no such file or folder"),
    Case("evaluate with a pickle", E + "--student RUN --features inception.pt --output out", "--features inception.pt: is a pickle"),
    Case("evaluate by a network without its weights", E + "--student RUN --features inception --output out", "--features_weights: is needed by --features inception, which is never downloaded; give the path of pt_inception"),
    Case("evaluate by weights of no network", E + "--student RUN --features_weights w.pth --output out", "--features_weights w.pth: is for --features inception alone, and they are auto"),
    Case("evaluate by weights that are not there", E + "--student RUN --features inception --features_weights w.pth --output out", "--features_weights w.pth: no such file"),
    Case("evaluate by other weights", E + "--student RUN --features inception --features_weights w.pth --output out", "--features_weights w.pth: has the SHA-256 2d711642..., which is not that of pt_inception-2015-12-05-6726825d.pth", write("w.pth", "x")),
    Case("evaluate against no statistics", E + "--student RUN --reference none.npz --output out", "--reference none.npz: no such file; give an .npz with 'mu' [D] and 'sigma' [D, D]"),
    Case("evaluate against other statistics", E + "--student RUN --reference s.npz --output out", "--reference s.npz: is of features of length 2,048, and those of the teacher's own mid_block", statistics_of_2048),
    Case("evaluate against statistics to be kept", E + "--student RUN --reference s.npz --save_reference t.npz", "--save_reference t.npz: is for a reference of images"),
    Case("evaluate and keep a reference that is there", E + "--student RUN --save_reference t.npz --output out", "--save_reference t.npz: is there already; name another, or give --overwrite", write("t.npz", "mine")),
    Case("evaluate and keep a reference as a text", E + "--student RUN --save_reference t.txt --output out", "--save_reference t.txt: is no name of an .npz file"),
    Case("evaluate by an unknown protocol", "evaluate --student RUN --protocol fid10k --output out", "fid10k"),
    Case("evaluate by a protocol of other features", "evaluate --student RUN --protocol fid50k --features digits --output out", "--features digits: --protocol fid50k has inception; leave out one of the two"),
    Case("evaluate by a protocol of more images", "evaluate --student RUN --protocol fid50k --num_samples 100 --output out", "--num_samples 100: --protocol fid50k has 50000; leave out one of the two"),
    Case("evaluate with negative resamples", E + "--student RUN --resamples -1 --output out", "--resamples -1: must be at least 0"),
    Case("evaluate with guidance of no classes", E + "--student RUN --guidance_scale 2 --output out", "needs a teacher with a null class"),
    Case("evaluate of labels of no classes", E + "--student RUN --class_labels 1 --output out", "is unconditional"),
    Case("evaluate with another teacher's classes", E + "--student RUN --teacher CLASS --output out", "has 4 classes and --student 0; not the same teacher"),
    Case("evaluate on no device", E + "--student RUN --device gpu --output out", "--device gpu"),
    Case("evaluate into a file", E + "--student RUN --output out", "--output out: is a file", write("out", "x")),
    Case("evaluate over a report", E + "--student RUN --output out", "--output out: holds a report; name another folder, or give --overwrite", write("out/report.json", "{}")),
    Case("evaluate over a table", E + "--student RUN --output out", "--output out: holds a report; name another folder, or give --overwrite", write("out/report.md", "x")),
    Case("export of nothing", X, "--student: is required"),
    Case("export to nothing", "export --student RUN", "--output: is required"),
    Case("export of no folder", X + "--student none", "--student none: no such folder"),
    Case("export of a teacher", X + "--student PLAIN", "is no run and no checkpoint-N folder"),
    Case("export over something", X + "--student RUN", "--output out: exists", write("out/a.txt", "x")),
    Case("export over what is no export", X + "--student RUN --overwrite", "is no exported student", write("out/a.txt", "x")),
    Case("export over a file", X + "--student RUN --overwrite", "is no exported student", write("out", "x")),
    Case("export with guidance that is fixed", X + "--student RUN --guidance_scale 2", "distilled with w = 1 fixed"),
    Case("export at no time", X + "--student RUN --target_time -1", "--target_time -1: must be at least 0"),
    Case("export on no device", X + "--student RUN --device gpu", "--device gpu"),
    Case("demo over other files", "demo --output_dir out --overwrite", "--output_dir out: holds other files", write("out/a.txt", "x")),
    Case("demo without steps", "demo --max_train_steps 0", "--max_train_steps"),
    Case("demo on no device", "demo --device gpu", "--device gpu"),
]  # fmt: skip


@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_other_commands(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(case, tmp_path, monkeypatch)


def test_a_reference_of_another_size(tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "real"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("L", (16, 8)).save(folder / name)
    outcome = call_cli(*E.split(), "--student", finished_run(), "--reference", folder, "--output", tmp_path / "out")
    assert outcome.code == 2 and "a.png is 16x8, the teacher makes 8x8; resize it first" in outcome.words
    assert not (tmp_path / "out").exists()


def test_a_run_whose_teacher_is_gone(tmp_path: Path) -> None:
    teacher = write_teacher(tmp_path / "teacher", tiny_network())
    run = copied(finished_run(), tmp_path / "run")
    config = (run / "config.yaml").read_text().replace(str(teacher_folder()), str(teacher))
    (run / "config.yaml").write_text(config)
    teacher.rename(tmp_path / "gone")
    outcome = call_cli("sample", "--student", run / "checkpoint-4", "--output", tmp_path / "x.png")
    assert outcome.code == 2 and f"--teacher {teacher}: no such folder" in outcome.words
    # What is exported needs no teacher.
    assert call_cli("sample", "--student", run, "--output", tmp_path / "x.png").code == 0


def test_what_the_cases_start_from_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what is bad about them, the commands above run: they are not refused for another reason."""
    monkeypatch.chdir(tmp_path)
    for kind in ("plain", "class", "epsilon", "other"):
        outcome = call_cli(
            "distill", "--dry_run", "--device", "cpu", "--output_dir", "run", "--teacher", teacher_folder(kind)
        )
        assert outcome.code == 0, outcome.err
    assert call_cli(*S.split(), "--student", finished_run(), "--num_images", 1).code == 0
    assert call_cli(*E.split(), "--student", finished_run(), "--steps", "1", "--output", "report").code == 0
    assert call_cli(*X.split(), "--student", finished_run()).code == 0
    write_teacher(tmp_path / "teacher", tiny_network(), zero_snr_scheduler())
    write_teacher(tmp_path / "epsilon", tiny_network(), DDIMScheduler())
    for name in ("teacher", "epsilon"):
        assert call_cli("distill", "--dry_run", "--device", "cpu", "--output_dir", "run", "--teacher", name).code == 0
