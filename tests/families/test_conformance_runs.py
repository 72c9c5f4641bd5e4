"""What every family must pass as whole runs: train, save, resume, export, in bf16 too, and what `inspect` says of it."""

from __future__ import annotations

import functools
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import ARGUMENTS, BUILDERS
from runs_helpers import call_cli, copied, same_state
from test_conformance import folder_of, perturbed, teacher_of
from torch import Tensor, nn

from onestill.diffusion.process import VE
from onestill.export.export import export_student
from onestill.runs.build import PYTHON_OBJECT, Run, build_run, configure
from onestill.runs.distill import RunResult, carry_out
from onestill.runs.inspect import Inspection, inspect_run, inspect_teacher
from onestill.teachers.base import Teacher
from onestill.teachers.guidance import guided
from onestill.teachers.module import module_teacher
from onestill.teachers.settings import CALL_ARGUMENTS
from onestill.training.config import make_config

FAST: dict[str, Any] = {
    "device": "cpu",
    "report": False,
    "train_batch_size": 2,
    "max_train_steps": 3,
    "checkpointing_steps": 2,
    "lr_warmup_steps": 0,
    "learning_rate": 1e-3,
    "num_validation_images": 1,
    "num_teacher_steps": 1,
}

# family, prediction, shape, start level, guidance, negative prompts, tokens that each text encoder takes
FACTS: dict[str, tuple[str, str, tuple[int, ...], float, str, bool, tuple[int, ...]]] = {
    "dit": ("dit", "epsilon", (4, 8, 8), 0.769, "classifier-free", False, ()),
    "flux": ("flux", "velocity", (4, 8, 12), 1, "embedded", False, (8, 16)),
    "flux-schnell": ("flux", "velocity", (4, 8, 8), 1, "none", False, (8, 16)),
    "if": ("deepfloyd_if", "epsilon", (3, 8, 8), 0.968, "classifier-free", True, (77,)),
    "if-static": ("deepfloyd_if", "epsilon", (3, 8, 8), 0.968, "classifier-free", True, (77,)),
    "if-super-resolution": (
        "deepfloyd_if_super_resolution", "epsilon", (3, 16, 16), 0.968, "classifier-free", True, (77,),
    ),
    "lumina2": ("lumina2", "velocity", (4, 8, 8), 1, "classifier-free", True, (226,)),
    "pixart-alpha": ("pixart", "epsilon", (4, 8, 8), 0.769, "classifier-free", True, (120,)),
    "pixart-alpha-1024": ("pixart", "epsilon", (4, 128, 128), 0.769, "classifier-free", True, (120,)),
    "pixart-sigma": ("pixart", "epsilon", (4, 8, 8), 0.769, "classifier-free", True, (300,)),
    "sana": ("sana", "velocity", (4, 16, 16), 1, "classifier-free", True, (299,)),
    "sana-dpm": ("sana", "velocity", (4, 16, 16), 1, "classifier-free", True, (299,)),
    "sd-epsilon": ("stable_diffusion", "epsilon", (4, 8, 8), 1, "classifier-free", True, (8,)),
    "sd-v": ("stable_diffusion", "v_prediction", (4, 8, 8), 1, "classifier-free", True, (8,)),
    "sd-v-zero-snr": ("stable_diffusion", "v_prediction", (4, 8, 8), 1, "classifier-free", True, (8,)),
    "sd3": ("stable_diffusion_3", "velocity", (4, 8, 8), 1, "classifier-free", True, (8, 8, 256)),
    "sd3-two-encoders": ("stable_diffusion_3", "velocity", (4, 8, 8), 1, "classifier-free", True, (8, 8)),
    "sdxl-statistics": ("stable_diffusion_xl", "epsilon", (4, 8, 8), 1, "classifier-free", True, (8, 8)),
    "sdxl-zeros": ("stable_diffusion_xl", "epsilon", (4, 8, 8), 1, "classifier-free", True, (8, 8)),
    "stable-audio": ("stable_audio", "v_prediction", (4, 16), 1, "classifier-free", True, (16,)),
    "unnamed-auraflow": ("generic", "velocity", (4, 8, 8), 1, "classifier-free", True, (16,)),
    "unnamed-pag": ("generic", "epsilon", (4, 8, 8), 0.936, "classifier-free", True, (8,)),
    "wan": ("wan", "velocity", (4, 2, 4, 6), 1, "classifier-free", True, (16,)),
    "wan-unipc": ("wan", "velocity", (4, 1, 4, 4), 1, "classifier-free", True, (16,)),
}  # fmt: skip
# An argument of their call is no setting of a run, and without it they are refused.
NO_RUN = {name for name, arguments in ARGUMENTS.items() if not arguments.keys() <= set(CALL_ARGUMENTS)}
# One of each class of pipeline, where a test is of what its network computes: others differ by schedule and conditions.
OF_EACH = sorted(BUILDERS.keys() - NO_RUN - {
    "flux-schnell", "if-static", "pixart-alpha-1024", "pixart-sigma", "sana-dpm", "sd-v", "sd-v-zero-snr", "sd3-two-encoders",
    "sdxl-statistics", "unnamed-pag", "wan-unipc",
})  # fmt: skip


@functools.cache
def place() -> Path:
    """Return a folder with p.txt, prompts, and stage-1/, a student that draws what is enlarged: read only."""
    folder = Path(tempfile.mkdtemp(prefix="onestill-conformance-"))
    (folder / "p.txt").write_text("a photo\na drawing of it\nred\nblue cat\n")
    export_student(perturbed(teacher_of("if")), folder / "stage-1")
    return folder


def prepared_run(name: str, folder: Path, **own: Any) -> Run:
    """Return a run of a family as the command line prepares it, from the teacher's folder; guided where it can be."""
    spec = teacher_of(name).spec
    settings = {**FAST, **ARGUMENTS.get(name, {}), "teacher": str(folder_of(name)), "output_dir": folder}
    if teacher_of(name).can_guide or FACTS[name][4] == "embedded":
        settings["guidance_scale"] = 2.0
    if spec.text:
        settings |= {"prompt_file": place() / "p.txt", "prompt_cache_dir": folder.parent / "cache"}
    if name == "if-super-resolution":
        settings["base_student"] = place() / "stage-1"
    return build_run(make_config({**settings, **own}))


def trained(prepared: Run) -> RunResult:
    """Run to the end; assert that the student and nothing else was trained, and that its export exists."""
    before = [parameter.detach().clone() for parameter in prepared.student.parameters()]
    first, losses = prepared.resume[1].values["progress"]["step"] if prepared.resume else 0, []
    result = carry_out(prepared, show_progress=False, on_step=lambda log: losses.append(log.loss))
    assert len(losses) == prepared.config.max_train_steps - first and all(map(math.isfinite, losses)), losses
    after = list(prepared.student.parameters())
    assert all(parameter.isfinite().all() for parameter in after)
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    if isinstance(prepared.teacher.unguided.network, nn.Module):
        assert all(not p.requires_grad and p.grad is None for p in prepared.teacher.unguided.network.parameters())
    assert prepared.teacher.unguided.fingerprint() == prepared.fingerprints.teacher
    assert result.pipeline is not None and any(result.pipeline.rglob("*.safetensors"))
    assert result.export_error is not None and result.export_error <= 1e-4
    return result


def check_run(prepared: Callable[..., Run], tmp_path: Path) -> None:
    """Assert that three steps train, and that a run that had two of them and was killed ends in the same bits."""
    trained(prepared(tmp_path / "run"))
    again = copied(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(again / "checkpoint-3")
    shutil.rmtree(again / "pipeline")
    resumed = prepared(again, resume_from_checkpoint="latest")
    assert resumed.resume is not None and resumed.resume[0].name == "checkpoint-2"
    trained(resumed)
    assert same_state(tmp_path / "run" / "checkpoint-3", again / "checkpoint-3")
    assert not same_state(again / "checkpoint-2", again / "checkpoint-3")


def check_bf16(prepared: Run) -> None:
    """Assert that a run in bf16 computes in bf16, student and all, and trains."""
    seen: set[torch.dtype] = set()

    def see(_module: nn.Module, _args: Any, output: Tensor) -> None:
        seen.add(output.dtype)

    for module in prepared.student.network.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            module.register_forward_hook(see)
    trained(prepared)
    assert torch.bfloat16 in seen


def inspected(teacher: Teacher, **own: Any) -> Inspection:
    return inspect_teacher(teacher, **FAST, **own)


@pytest.mark.parametrize("name", [*OF_EACH, "sd-v-zero-snr"])
def test_a_run_is_resumed_to_the_bit(name: str, tmp_path: Path) -> None:
    check_run(functools.partial(prepared_run, name), tmp_path)


@pytest.mark.parametrize("name", ["dit", "flux", "if-super-resolution", "sd-v"])
def test_a_run_with_every_objective_is_resumed_to_the_bit(name: str, tmp_path: Path) -> None:
    own = {"train_batch_size": 8, "anchor_fraction": 0.5, "flow_map_fraction": 0.25, "boundary_weight": 1.0}
    own |= {"corrector_fraction": 0.25, "corrector_begin": 0.0, "corrector_warmup": 0.0}
    check_run(functools.partial(prepared_run, name, **own), tmp_path)


@pytest.mark.parametrize("name", OF_EACH)
def test_a_run_in_bfloat16(name: str, tmp_path: Path) -> None:
    check_bf16(prepared_run(name, tmp_path / "run", mixed_precision="bf16", max_train_steps=1))


@pytest.mark.parametrize("name", sorted(NO_RUN))
def test_a_run_that_could_not_be_opened_again_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="which a run cannot record"):
        configure(teacher_of(name), {**FAST, "output_dir": tmp_path / "run"})


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_inspect_tells_the_truth(name: str) -> None:
    teacher = teacher_of(name)
    text = name != "dit"
    own = {"num_prompts": 7} if text else {}
    if name in NO_RUN:  # which no run could say again
        config = make_config({**FAST, **own, "teacher": PYTHON_OBJECT, "output_dir": Path("run")})
        found = inspect_run(config, teacher)
    else:
        found = inspected(teacher, **own)
    told = (found.family, found.prediction_type, found.sample_shape, round(found.t_max, 3))
    limits = tuple(found.prompt_limits.values())
    assert (*told, found.guidance, found.negative_prompts, limits) == FACTS[name]
    # And the teacher does what is said of it.
    assert found.conditioning == ("text" if text else "class")
    assert (found.num_prompts, found.prompt_bytes > 0) == ((7 + 1, True) if text else (0, False))  # and one shown
    scale = 1.0 if found.guidance == "none" else 3.0
    assert guided(teacher, scale).evaluations == (2 if found.guidance == "classifier-free" else 1)
    if found.guidance == "none":
        with pytest.raises(ValueError, match="need a null condition"):
            guided(teacher, drawn=True)
    if not found.negative_prompts:
        with pytest.raises(ValueError, match="negative_prompt='red': a .* no null condition|takes no text"):
            teacher.with_negative_prompt("red")
    if found.negative_prompts:
        teacher.with_negative_prompt("red")
    if text:
        assert teacher.exceeded_limits(["a", "a " * max(limits)]) == [0, 2 ** len(set(limits)) - 1]
        kept = teacher.prompt_rows(teacher.encode(["a"]))
        assert found.prompt_bytes == sum(value.numel() * value.element_size() for value in kept.values())


def test_inspect_says_what_encoded_prompts_take_on_disk(tmp_path: Path) -> None:
    flags: list[object] = ["inspect", "--teacher", folder_of("sd-epsilon"), "--device", "cpu", "--train_batch_size", 2]
    assert (
        "tokens at most: 8 (text_encoder); 20,010 or fewer to encode, 10.25 MB of cache (512 bytes each)"
        in call_cli(*flags).out
    )
    outcome = call_cli(*flags, "--prompt_file", place() / "p.txt", "--validation_prompt", "red")
    assert "5 or fewer to encode, 0.00 MB of cache" in outcome.out
    # No fewer than the run itself encodes.
    flags += ["--prompt_file", place() / "p.txt", "--num_prompts", 3]
    assert "4 or fewer to encode" in call_cli(*flags).out
    own = ["--output_dir", tmp_path / "run", "--prompt_cache_dir", tmp_path / "cache"]
    assert "4 to encode" in call_cli("distill", "--dry_run", *flags[1:], *own).words
    flags = flags[:-4]
    outcome = call_cli(*flags, "--prompt_file", place() / "none.txt")
    assert outcome.code == 2 and "none.txt" in outcome.words


# Teachers around a network alone: pixels, EDM, modules of one's own

OTHERS = [
    "class-null-last",
    "ddim-v-zero-snr",
    "ddpm-epsilon",
    "ddpm-learned-variance-rgb",
    "edm-dpmsolver",
    "edm-euler",
    "module-class",
    "module-cosine-v",
    "module-flow-velocity",
    "module-ve-sigma",
]
"""Names of cases in tests/conftest.py."""


def prepared_object(teacher: Teacher, folder: Path, network: nn.Module | None = None, **own: Any) -> Run:
    """Return a run of a teacher object, guided where it can be."""
    settings = {**FAST, "output_dir": folder, "guidance_scale": 2.0 if teacher.can_guide else 1.0, **own}
    return build_run(configure(teacher, settings), teacher, network)


@pytest.mark.parametrize("other", OTHERS)
def test_a_run_around_a_network_is_resumed_to_the_bit(other: str, cases: dict[str, Any], tmp_path: Path) -> None:
    check_run(functools.partial(prepared_object, cases[other].build()), tmp_path)


@pytest.mark.parametrize("other", OTHERS)
def test_a_run_around_a_network_in_bfloat16(other: str, cases: dict[str, Any], tmp_path: Path) -> None:
    teacher = cases[other].build()
    check_bf16(prepared_object(teacher, tmp_path / "run", mixed_precision="bf16", max_train_steps=1))


@pytest.mark.parametrize("other", OTHERS)
def test_inspect_tells_the_truth_of_a_network(other: str, cases: dict[str, Any]) -> None:
    teacher = cases[other].build()
    found, spec = inspected(teacher), teacher.spec
    kind = "module" if other.startswith("module") else "unet2d"
    channels = 3 if other.endswith("rgb") else 1
    assert (found.family, found.sample_shape) == (kind, (channels, 8, 8))
    assert (found.prediction_type, found.t_max) == (spec.prediction_type, spec.t_max)
    assert found.conditioning == ("class" if "class" in other else "none")
    assert found.guidance == ("classifier-free" if found.null_class is not None else "none")
    assert not found.negative_prompts and found.prompt_limits == {} and found.num_prompts == 0
    assert ("fallback" in found.target_time_enters) == (other in ("module-cosine-v", "module-ve-sigma"))


def test_a_run_on_a_callable_without_weights(plain_network: Callable[..., nn.Module], tmp_path: Path) -> None:
    """An EDM network D(x; sigma) that is a plain function: the student is a module that is given."""
    network = plain_network()
    teacher = module_teacher(lambda x, sigma: network(x, sigma), VE(time_input="sigma"), "sample", (1, 8, 8))
    check_run(lambda folder, **own: prepared_object(teacher, folder, plain_network(seed=4), **own), tmp_path)
