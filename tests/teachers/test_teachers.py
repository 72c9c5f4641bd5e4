"""Teachers: one suite that every one of them passes, parity with diffusers' own samplers, and refusals by name."""

from __future__ import annotations

import errno
import json
import re
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from onestill.core.tensors import as_times, noise
from onestill.diffusion.prediction import PREDICTION_TYPES
from onestill.diffusion.process import VE, CosineVP, DiscreteVP, FlowMatching, Process
from onestill.diffusion.trajectory import Trajectory, ddim_step, solve, uniform_times
from onestill.export.export import export_student
from onestill.students.student import Student
from onestill.teachers import pixel as unet2d
from onestill.teachers.base import Teacher
from onestill.teachers.closed_form import GaussianTeacher, MixtureTeacher
from onestill.teachers.guidance import Thresholded
from onestill.teachers.load import EMBEDDED, load_teacher
from onestill.teachers.module import module_teacher
from onestill.teachers.pixel import self_check, unet2d_teacher
from onestill.teachers.teacher_spec import Threshold

Labels = Callable[[Teacher, int], dict[str, Tensor]]


def states(teacher: Teacher, num: int = 4) -> Tensor:
    return teacher.spec.trajectory.start(noise(range(num), teacher.spec.sample_shape))


# The conformance suite


def test_suite_covers_every_kind(cases: dict[str, Any]) -> None:
    specs = [case.build().spec for case in cases.values()]
    assert {spec.prediction_type for spec in specs} == set(PREDICTION_TYPES)
    assert {type(spec.process) for spec in specs} == {DiscreteVP, CosineVP, VE, FlowMatching}
    assert {(spec.num_classes is None, spec.null_class is None) for spec in specs} >= {
        (True, True),
        (False, True),
        (False, False),
    }


def test_spec_says_what_there_is(teacher: Teacher) -> None:
    spec = teacher.spec
    assert 0 < spec.t_max <= 1 and spec.t_max_reason
    assert (spec.t_max, spec.t_max_reason) == spec.process.start_level(spec.prediction_type)
    assert len(spec.sample_shape) == 3
    assert spec.conditioning == ("none" if spec.num_classes is None else "class")
    assert len(spec.labels) == (spec.num_classes or 0) and spec.null_class not in spec.labels
    assert spec.trajectory == Trajectory(spec.process, spec.t_max)
    assert teacher.evaluations == 1


@torch.no_grad()
@pytest.mark.parametrize("share", [1.0, 0.5, 0.01])
def test_prediction_is_finite_and_of_the_samples_shape(teacher: Teacher, labels_for: Labels, share: float) -> None:
    x = states(teacher)
    f = teacher.denoised(x, share * teacher.spec.t_max, labels_for(teacher, 4))
    assert f.shape == x.shape and f.dtype == torch.float32
    assert bool(f.isfinite().all())


@torch.no_grad()
def test_rows_do_not_know_each_other(teacher: Teacher, labels_for: Labels) -> None:
    x, cond = states(teacher), labels_for(teacher, 4)
    t = torch.tensor([1.0, 0.7, 0.4, 0.1], dtype=torch.float64) * teacher.spec.t_max
    together = teacher.denoised(x, t, cond)
    for i in range(4):
        alone = teacher.denoised(x[i : i + 1], float(t[i]), {k: v[i : i + 1] for k, v in cond.items()})
        # Float32 kernels of another batch size sum in another order; 1 / alpha reaches 20.
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_labels_matter_where_there_are_some(teacher: Teacher, labels_for: Labels) -> None:
    if not teacher.spec.labels:
        assert labels_for(teacher, 2) == {}
        return
    x, (first, second) = states(teacher, 1), teacher.spec.labels[:2]
    a, b = (teacher.denoised(x, 0.5, {"class_labels": torch.tensor([label])}) for label in (first, second))
    assert not torch.allclose(a, b, atol=1e-4)


@torch.no_grad()
def test_prediction_is_the_head_of_the_raw_output(teacher: Teacher, labels_for: Labels) -> None:
    spec, cond = teacher.spec, labels_for(teacher, 4)
    t = 0.6 * spec.t_max
    x, (alpha, sigma) = states(teacher), spec.process.level(t)
    c_in = (sigma**2 + spec.sigma_data**2) ** -0.5 if spec.prediction_type == "edm" else 1.0
    net_time = spec.process.net_time(as_times(t, 4)).float()
    raw: Any = teacher.network(c_in * x, net_time, **cond)  # type: ignore[operator]
    raw = raw if isinstance(raw, Tensor) else raw.sample[:, : spec.sample_shape[0]]
    expected = {
        "sample": lambda: raw,
        "epsilon": lambda: (x - sigma * raw) / alpha,
        "v_prediction": lambda: (alpha * x - sigma * raw) / (alpha**2 + sigma**2),
        "velocity": lambda: (x - sigma * raw) / (alpha + sigma),
        "edm": lambda: spec.sigma_data * c_in * (spec.sigma_data * c_in * x + sigma * raw),
    }[spec.prediction_type]()
    # Float32, the same sums in another order.
    torch.testing.assert_close(teacher.denoised(x, t, cond), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_sampling_is_finite(teacher: Teacher, labels_for: Labels) -> None:
    times = uniform_times(teacher.spec.t_max, 2)
    images = solve(teacher.spec.trajectory, teacher.denoiser(labels_for(teacher, 4)), states(teacher), times, ddim_step)
    assert bool(images.isfinite().all())


def test_teachers_are_frozen(teacher: Teacher, labels_for: Labels) -> None:
    network = teacher.network
    assert isinstance(network, nn.Module)
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert not teacher.denoised(states(teacher), 0.5, labels_for(teacher, 4)).requires_grad


def test_copies_are_trainable_and_apart(teacher: Teacher) -> None:
    copy = teacher.copy_network()
    pairs = list(zip(copy.parameters(), teacher.network.parameters(), strict=True))  # type: ignore[union-attr]
    assert pairs and not copy.training
    assert all(c.requires_grad and c.dtype == torch.float32 for c, _ in pairs)
    assert all(torch.equal(c, p) and c.data_ptr() != p.data_ptr() for c, p in pairs)


@pytest.mark.parametrize("name", ["ddim-v", "class", "module-cosine-v"])
def test_fingerprint_is_of_the_weights(cases: dict[str, Any], name: str) -> None:
    one, two = cases[name].build(), cases[name].build()
    assert one.fingerprint() == two.fingerprint()
    before = one.fingerprint()
    with torch.no_grad():
        next(two.network.parameters()).view(-1)[0] += 1e-6
    assert two.fingerprint() != before
    assert one.fingerprint() == before


def test_fingerprint_is_of_what_the_weights_mean(cases: dict[str, Any]) -> None:
    teacher = cases["ddim-v"].build()
    before, spec = teacher.fingerprint(), teacher.spec
    cosine = DiscreteVP(DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod)
    for other in (replace(spec, prediction_type="sample"), replace(spec, process=cosine)):
        teacher.spec = other
        assert teacher.fingerprint() != before
    for change in ({"t_max": 0.9}, {"num_classes": 3}, {"threshold": Threshold("dynamic")}, {"sigma_data": 0.7}):
        teacher.spec = replace(spec, **change)
        assert teacher.fingerprint() != before
    # Where it lies is not what it is.
    teacher.spec = replace(spec, source="elsewhere", t_max_reason="given")
    assert teacher.fingerprint() == before


def test_fingerprint_of_a_network_with_counters() -> None:
    # Batch normalisation keeps its number of batches as a tensor without axes.
    network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    teacher = module_teacher(lambda x, t: network(x), CosineVP(), "sample", (1, 8, 8))
    teacher.network = network
    assert len(teacher.fingerprint()) == 16


@torch.no_grad()
def test_low_precision_networks_have_a_float32_head(cases: dict[str, Any]) -> None:
    teacher = cases["ddim-v"].build()
    x, exact = states(teacher), teacher.denoised(states(teacher), 0.9, {})
    teacher.network.bfloat16()
    f = teacher.denoised(x.bfloat16(), 0.9, {})
    assert f.dtype == torch.float32
    # bfloat16 has 8 bits: the network's output of size 1 is off by 1e-2 or so, the head adds nothing to it.
    torch.testing.assert_close(f, exact, rtol=0, atol=0.1)
    coarse = f.bfloat16().float()
    assert not torch.equal(f, coarse), "the head must not have run in bfloat16"


# Parity with diffusers


@torch.no_grad()
def ddim_of_diffusers(teacher: Teacher, scheduler: Any, eps: Tensor, cond: dict[str, Tensor], *, clip: bool) -> Tensor:
    ddim = DDIMScheduler.from_config(
        scheduler.config, timestep_spacing="trailing", clip_sample=clip, set_alpha_to_one=True
    )
    ddim.set_timesteps(10)
    x = eps
    for t in ddim.timesteps:
        output = teacher.network(x, t, **cond).sample[:, : x.shape[1]]  # type: ignore[operator]
        # diffusers can keep the noise of the unclipped prediction; ours follows the clipped one, as DDPM does.
        x = ddim.step(output, t, x, use_clipped_model_output=clip).prev_sample
    return x


def check_ten_steps(case: Any, labels_for: Labels, *, clip: bool, allowed: float) -> None:
    teacher = case.build()
    teacher.spec = replace(teacher.spec, t_max=1.0)  # also for epsilon, so that both start at the last index
    eps, cond = noise(range(4), teacher.spec.sample_shape), labels_for(teacher, 4)
    wrapped = Thresholded(teacher, Threshold("static")) if clip else teacher
    theirs = ddim_of_diffusers(teacher, case.scheduler, eps, cond, clip=clip)
    ours = solve(wrapped.spec.trajectory, wrapped.denoiser(cond), eps, uniform_times(1.0, 10), ddim_step)
    assert float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)) <= allowed


@torch.no_grad()
def test_ten_steps_are_diffusers_ddim(vp_case: Any, labels_for: Labels) -> None:
    # Random networks leave [-1, 1] by 1 / alpha, up to 20 000: the difference is relative to the image. Float32 sums in
    # two orders: 1e-6 measured.
    check_ten_steps(vp_case, labels_for, clip=False, allowed=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["ddpm-epsilon", "ddim-v-zero-snr", "ddim-sample", "class-null-last"])
def test_ten_clipped_steps_are_diffusers_ddim(cases: dict[str, Any], name: str, labels_for: Labels) -> None:
    # Clipping the prediction of an epsilon network, x_0 = (x - sigma eps) / alpha, keeps the rounding of its first
    # step, 6e-8 / 0.006 = 1e-5, while it bounds the image: 1e-5 measured, and 1e-6 for the others.
    check_ten_steps(cases[name], labels_for, clip=True, allowed=3e-5 if "epsilon" in name else 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["edm-euler", "edm-dpmsolver"])
def test_ten_steps_are_diffusers_edm_euler(cases: dict[str, Any], name: str) -> None:
    teacher = cases[name].build()
    euler = EDMEulerScheduler.from_config(cases[name].scheduler.config)
    euler.set_timesteps(10)
    eps = noise(range(4), teacher.spec.sample_shape)
    x = eps * euler.init_noise_sigma
    torch.testing.assert_close(teacher.spec.trajectory.start(eps), x, rtol=1e-6, atol=0)
    for t in euler.timesteps:
        x = euler.step(teacher.network(euler.scale_model_input(x, t), t).sample, t, x).prev_sample
    # The Karras grid of diffusers is uniform in our t from 1 to t_min, with the clean end after it.
    times = [*uniform_times(1.0, 9, t_end=teacher.spec.process.t_min), 0.0]
    ours = solve(teacher.spec.trajectory, teacher.denoiser({}), teacher.spec.trajectory.start(eps), times, ddim_step)
    assert float((ours - x).abs().max() / x.abs().max()) <= 1e-5


def test_self_check_passes_with_digits_to_spare(unet_case: Any) -> None:
    # The gate is 1e-4; two float32 steps differ by 3e-7 measured, so the gate tells right from wrong with room to spare.
    assert 0 <= self_check(unet_case.build(), unet_case.scheduler) < 1e-5


@pytest.mark.parametrize("name", ["ddpm-epsilon", "ddim-v", "ddim-sample", "class-null-first"])
def test_self_check_fails_on_a_wrong_prediction_type(cases: dict[str, Any], name: str) -> None:
    teacher = cases[name].build()
    others = {"epsilon", "sample", "v_prediction"} - {teacher.spec.prediction_type}
    for wrong in others:
        teacher.spec = replace(teacher.spec, prediction_type=wrong)
        with pytest.raises(ValueError, match=rf"self-check failed.*{type(cases[name].scheduler).__name__}.*{wrong!r}"):
            self_check(teacher, cases[name].scheduler)


def test_self_check_fails_on_a_wrong_schedule(cases: dict[str, Any]) -> None:
    teacher = cases["ddim-v"].build()
    other = DiscreteVP(DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod)
    teacher.spec = replace(teacher.spec, process=other)
    with pytest.raises(ValueError, match="self-check failed"):
        self_check(teacher, cases["ddim-v"].scheduler)
    edm = cases["edm-euler"].build()
    edm.spec = replace(edm.spec, sigma_data=0.6)
    with pytest.raises(ValueError, match="self-check failed"):
        self_check(edm, cases["edm-euler"].scheduler)


def test_self_check_is_part_of_loading(monkeypatch: pytest.MonkeyPatch, uncond_teacher_folder: Path) -> None:
    load_teacher(uncond_teacher_folder)
    honest = unet2d.scheduler_process

    def lying(scheduler: Any) -> tuple[Process, str, float]:
        process, _, sigma_data = honest(scheduler)
        return process, "sample", sigma_data

    monkeypatch.setattr(unet2d, "scheduler_process", lying)
    with pytest.raises(ValueError, match="self-check failed"):
        load_teacher(uncond_teacher_folder)


# Loading


@pytest.mark.parametrize("cls", [DDPMPipeline, DDIMPipeline])
def test_pipeline_folder_loads(
    tmp_path: Path, save_pipeline: Callable[..., Path], tiny_unet: Callable[..., UNet2DModel], cls: Any
) -> None:
    unet = tiny_unet(channels=3, seed=5)
    folder = save_pipeline(tmp_path / "teacher", unet, DDPMScheduler(), cls)
    teacher = load_teacher(str(folder))
    assert (teacher.spec.family, teacher.spec.source) == ("unet2d", str(folder))
    assert teacher.spec.sample_shape == (3, 8, 8)
    x = noise(range(2), (3, 8, 8))
    assert torch.equal(teacher.denoised(x, 0.5, {}), unet2d_teacher(unet, DDPMScheduler()).denoised(x, 0.5, {}))


def test_class_conditional_folder_loads(class_teacher_folder: Path) -> None:
    plain = load_teacher(class_teacher_folder)
    assert (plain.spec.num_classes, plain.spec.null_class, plain.spec.labels) == (5, None, [0, 1, 2, 3, 4])
    guided = load_teacher(class_teacher_folder, null_class=4)
    assert (guided.spec.num_classes, guided.spec.null_class, guided.spec.labels) == (4, 4, [0, 1, 2, 3])
    first = load_teacher(class_teacher_folder, null_class=0)
    assert (first.spec.num_classes, first.spec.null_class, first.spec.labels) == (4, 0, [1, 2, 3, 4])


def test_given_start_level_is_kept(uncond_teacher_folder: Path) -> None:
    spec = load_teacher(uncond_teacher_folder, t_max=0.75).spec
    assert (spec.t_max, spec.t_max_reason) == (0.75, "given")


def test_an_old_folder_with_its_network_beside_the_index_loads(uncond_teacher_folder: Path) -> None:
    whole = load_teacher(uncond_teacher_folder).fingerprint()
    for part in ("unet", "scheduler"):
        for path in (uncond_teacher_folder / part).iterdir():
            path.rename(uncond_teacher_folder / path.name)
        (uncond_teacher_folder / part).rmdir()
    DDPMPipeline.from_pretrained(uncond_teacher_folder)  # as diffusers does
    assert load_teacher(uncond_teacher_folder).fingerprint() == whole
    weights = uncond_teacher_folder / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ValueError, match="only the pickle diffusion_pytorch_model.bin"):
        load_teacher(uncond_teacher_folder)


def test_variants_are_found(uncond_teacher_folder: Path) -> None:
    weights = uncond_teacher_folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    teacher = load_teacher(uncond_teacher_folder, variant="fp16")
    assert teacher.spec.sample_shape == (1, 8, 8)
    assert export_student(Student(teacher), uncond_teacher_folder.parent / "out") <= 1e-4
    with pytest.raises(ValueError, match=r"variant: unet/ holds .*fp16.safetensors; give variant fp16"):
        load_teacher(uncond_teacher_folder)


@pytest.mark.parametrize(
    ("scheduler", "threshold"),
    [
        (DDPMScheduler(), Threshold("static", 1.0)),
        (DDPMScheduler(clip_sample=False), Threshold()),
        (DDIMScheduler(clip_sample_range=2.0), Threshold("static", 2.0)),
        (DDIMScheduler(thresholding=True, sample_max_value=1.5), Threshold("dynamic", 1.5, 0.995)),
        (EDMEulerScheduler(), Threshold()),
    ],
)
def test_thresholding_of_the_scheduler_is_read(
    tiny_unet: Callable[..., UNet2DModel], scheduler: Any, threshold: Threshold
) -> None:
    assert unet2d_teacher(tiny_unet(), scheduler).spec.threshold == threshold


def test_schedule_is_read_from_the_schedule_not_from_its_betas(tiny_unet: Callable[..., UNet2DModel]) -> None:
    # Zero terminal SNR rescales after the betas' configuration; the betas in it say something else.
    scheduler = DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert unet2d_teacher(tiny_unet(), scheduler).spec.process.level(1.0) == (0.0, 1.0)


def test_embedded_digits() -> None:
    teacher = load_teacher("digits")
    assert (teacher.spec.num_classes, teacher.spec.null_class) == (10, 10)
    assert teacher.spec.source == "digits" and teacher.spec.sample_shape == (1, 8, 8)
    folder = EMBEDDED["digits"].folder
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) >= 4
    assert sum(path.stat().st_size for path in files) < 4e6, "the package stays small"
    assert {path.suffix for path in files} <= {".json", ".safetensors"}


def test_embedded_name_wins_over_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_teacher("digits").spec.num_classes == 10
    with pytest.raises(ValueError, match="no diffusers pipeline"):
        load_teacher("./digits")


# Refusals of what is on disk


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


REFUSED_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (lambda f: (f / "model_index.json").unlink(), "is no diffusers pipeline: it has no model_index.json"),
    "index that is no JSON": (lambda f: (f / "model_index.json").write_text("{"), "model_index.json does not parse"),
    "index that is no text": (
        lambda f: (f / "model_index.json").write_bytes(b"\xff\xfe"),
        "model_index.json does not parse",
    ),
    "index without a class": (
        lambda f: (f / "model_index.json").write_text("[1]"),
        "names no pipeline class",
    ),
    "score SDE": (
        lambda f: edit_json(f / "model_index.json", _class_name="ScoreSdeVePipeline"),
        r"ScoreSdeVePipeline cannot be a teacher: .*module_teacher.*Supported pipelines: .*DDPMPipeline",
    ),
    "unknown pipeline": (
        lambda f: edit_json(f / "model_index.json", _class_name="NoSuchPipeline"),
        r"a NoSuchPipeline cannot be a teacher: diffusers .* has no such pipeline",
    ),
    "pipeline of other parts": (
        lambda f: edit_json(f / "model_index.json", _class_name="StableDiffusionPipeline"),
        "the pipeline does not load: .*StableDiffusionPipeline.*expected",
    ),
    "no network in the index": (lambda f: edit_json(f / "model_index.json", unet=None), "names no 'unet'"),
    "no scheduler in the index": (
        lambda f: edit_json(f / "model_index.json", scheduler=None),
        "names no 'scheduler'",
    ),
    "empty network in the index": (
        lambda f: edit_json(f / "model_index.json", unet=[None, None]),
        "unet",
    ),
    "half a scheduler in the index": (
        lambda f: edit_json(f / "model_index.json", scheduler=["diffusers"]),
        "scheduler",
    ),
    "empty scheduler in the index": (
        lambda f: edit_json(f / "model_index.json", scheduler=[None, None]),
        "scheduler",
    ),
    "another network": (
        lambda f: edit_json(f / "model_index.json", unet=["diffusers", "UNet2DConditionModel"]),
        "network is a UNet2DConditionModel; .* need a UNet2DModel",
    ),
    "no such scheduler": (
        lambda f: edit_json(f / "model_index.json", scheduler=["diffusers", "NoSuchScheduler"]),
        "'NoSuchScheduler' is no scheduler of diffusers",
    ),
    "no scheduler at all": (
        lambda f: edit_json(f / "model_index.json", scheduler=["diffusers", "UNet2DModel"]),
        "'UNet2DModel' is no scheduler",
    ),
    "only a pickle": (
        lambda f: (f / "unet/diffusion_pytorch_model.safetensors").rename(f / "unet/diffusion_pytorch_model.bin"),
        "holds only the pickle diffusion_pytorch_model.bin, which can run code.*save_pretrained",
    ),
    "no weights": (
        lambda f: (f / "unet/diffusion_pytorch_model.safetensors").unlink(),
        r"missing weights unet/diffusion_pytorch_model.safetensors; the folder holds \['config.json'\]",
    ),
    "no network folder": (lambda f: shutil.rmtree(f / "unet"), "missing weights .*the folder holds nothing"),
    "half a file": (
        lambda f: (f / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"\x08" + bytes(20)),
        "unet/ cannot be read",
    ),
    "missing tensor": (
        lambda f: edit_weights(f, lambda w: w.pop("conv_in.weight")),
        "lack 1 of the network's tensors, such as 'conv_in.weight'",
    ),
    "unexpected tensor": (
        lambda f: edit_weights(f, lambda w: w.update(more=torch.zeros(1))),
        "no place for, such as 'more'",
    ),
    "wrong shape": (
        lambda f: edit_weights(f, lambda w: w.update({"conv_in.weight": torch.zeros(4, 1, 3, 3)})),
        "1 of the weights have another shape, such as .conv_in.weight",
    ),
    "non-finite weights": (
        lambda f: edit_weights(f, lambda w: w["conv_in.weight"].fill_(float("nan"))),
        r"the weights hold non-finite numbers \(NaN or infinity\): 'conv_in.weight' of the unet",
    ),
    "no network config": (lambda f: (f / "unet/config.json").unlink(), "unet/ cannot be read"),
    "unknown block": (
        lambda f: edit_json(f / "unet/config.json", down_block_types=["Nope", "DownBlock2D"]),
        "unet/ cannot be read: .*Nope",
    ),
    "no sample size": (lambda f: edit_json(f / "unet/config.json", sample_size=None), "has no sample_size"),
    "impossible sample size": (lambda f: edit_json(f / "unet/config.json", sample_size=7), "sample_size"),
    "no scheduler config": (
        lambda f: (f / "scheduler/scheduler_config.json").unlink(),
        "scheduler_config.json cannot be read",
    ),
    "scheduler config of no JSON": (
        lambda f: (f / "scheduler/scheduler_config.json").write_text("{"),
        "scheduler_config.json cannot be read",
    ),
    "unknown beta schedule": (
        lambda f: edit_json(f / "scheduler/scheduler_config.json", beta_schedule="nonsense"),
        "scheduler_config.json cannot be read: .*nonsense",
    ),
    "wrong type in the scheduler config": (
        lambda f: edit_json(f / "scheduler/scheduler_config.json", beta_end="much"),
        "scheduler_config.json cannot be read",
    ),
    "unknown prediction type": (
        lambda f: edit_json(f / "scheduler/scheduler_config.json", prediction_type="noise"),
        "prediction_type 'noise' is not supported; known: epsilon, sample, v_prediction",
    ),
    "epsilon at zero terminal SNR": (
        lambda f: edit_json(f / "scheduler/scheduler_config.json", prediction_type="epsilon"),
        "zero terminal SNR cannot be distilled",
    ),
}


@pytest.mark.parametrize("problem", REFUSED_FOLDERS)
def test_unusable_folders_are_refused(uncond_teacher_folder: Path, problem: str) -> None:
    spoil, message = REFUSED_FOLDERS[problem]
    spoil(uncond_teacher_folder)
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL | re.IGNORECASE)):
        load_teacher(uncond_teacher_folder)


@pytest.mark.parametrize("scheduler", [CMStochasticIterativeScheduler(), FlowMatchEulerDiscreteScheduler()])
def test_unsupported_schedulers_are_refused(tiny_unet: Callable[..., UNet2DModel], scheduler: Any) -> None:
    why = "flow matching" if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) else "no alphas_cumprod"
    message = f"{type(scheduler).__name__} is not supported.*{why}.*module_teacher"
    with pytest.raises(ValueError, match=message):
        unet2d_teacher(tiny_unet(), scheduler)


@pytest.mark.parametrize("config", [{"prediction_type": "v_prediction"}, {"sigma_schedule": "exponential"}])
def test_unsupported_edm_schedules_are_refused(tiny_unet: Callable[..., UNet2DModel], config: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="EDMEulerScheduler with prediction_type=.* is supported with sigma_"):
        unet2d_teacher(tiny_unet(), EDMEulerScheduler(**config))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier' is not supported"),
        ({"class_embed_type": "identity"}, "class_embed_type='identity' is not supported; only num_class_embeds"),
        ({"channels": 4, "out_channels": 3}, "4 input and 3 output channels takes more than a noisy image"),
        ({"sample_size": None}, "has no sample_size"),
        # The stock pipeline of the student draws square noise, so a student of this could never be exported.
        ({"sample_size": (8, 16)}, "square"),
    ],
)
def test_unsupported_networks_are_refused(
    tiny_unet: Callable[..., UNet2DModel], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        unet2d_teacher(tiny_unet(**config), DDPMScheduler())


def test_scheduler_that_needs_another_package_is_refused(
    uncond_teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class DummyScheduler:
        """What diffusers puts in place of a scheduler whose package is not installed."""

        @classmethod
        def from_pretrained(cls, *_: object, **__: object) -> None:
            raise ImportError("DummyScheduler requires the torchsde library but it was not found")

    monkeypatch.setattr(diffusers, "DummyScheduler", DummyScheduler, raising=False)
    edit_json(uncond_teacher_folder / "model_index.json", scheduler=["diffusers", "DummyScheduler"])
    with pytest.raises(ValueError, match="torchsde"):
        load_teacher(uncond_teacher_folder)


@pytest.mark.parametrize("null_class", [5, -1])
def test_null_class_must_be_a_label(class_teacher_folder: Path, null_class: int) -> None:
    with pytest.raises(
        ValueError, match=rf"null_class={null_class}: is not a label of the teacher, which has 5 \(0 to 4\)"
    ):
        load_teacher(class_teacher_folder, null_class=null_class)


def test_null_class_of_an_unconditional_teacher_is_refused(uncond_teacher_folder: Path) -> None:
    with pytest.raises(ValueError, match="null_class=0: the teacher is unconditional"):
        load_teacher(uncond_teacher_folder, null_class=0)


@pytest.mark.parametrize("t_max", [0.0, -0.5, 1.5, 0.0005])
def test_impossible_start_levels_are_refused(uncond_teacher_folder: Path, t_max: float) -> None:
    with pytest.raises(ValueError, match="must be above 0.001 and at most 1"):
        load_teacher(uncond_teacher_folder, t_max=t_max)


@pytest.mark.parametrize("source", ["nope", "no/such/folder", "/no/such/folder", "a" * 5000, "with\0zero"])
def test_what_is_not_there_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match=r"(?s)no such (teacher|folder); .*embedded teacher \(digits, glyphs\)"):
        load_teacher(source)


def test_file_is_refused(tmp_path: Path) -> None:
    for name, words in (("model.safetensors", "is no whole safetensors"), ("model.txt", "is a file")):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=words):
            load_teacher(tmp_path / name)


@pytest.mark.parametrize("local_files_only", [True, False])
def test_hub_id_without_a_network_is_refused(tmp_path: Path, local_files_only: bool) -> None:
    # conftest.py sets HF_HUB_OFFLINE.
    said = "local_files_only" if local_files_only else "HF_HUB_OFFLINE"
    words = f"owner/name.*: no such teacher: it is no folder here, and the hub gave no pipeline of that name: {said} forbids"
    with pytest.raises(ValueError, match=words):
        load_teacher("owner/name", local_files_only=local_files_only, cache_dir=tmp_path)


def refusal(kind: type[Exception]) -> Exception:
    """Return an error of the hub's client, which takes an answer of the hub to be made."""
    return kind.__new__(kind)


UNREACHED = "the hub cannot be reached"


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (refusal(errors.GatedRepoError), "it is gated: accept its terms"),
        (refusal(errors.RepositoryNotFoundError), "there is none, or it is private: log in"),
        (refusal(errors.RevisionNotFoundError), "it has no such revision"),
        (socket.gaierror(-2, "Name or service not known"), UNREACHED),
        (ConnectionRefusedError(), UNREACHED),
        (TimeoutError("timed out"), UNREACHED),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), UNREACHED),
        (OSError("Cannot load"), "OSError: Cannot load model"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_why_the_hub_gave_nothing_is_said(cause: Exception, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        # diffusers wraps what the hub's client raises, which wraps what the system does.
        try:
            try:
                raise cause
            except Exception:
                raise RuntimeError("no answer")  # noqa: B904 - as where nobody says from what
        except Exception as error:
            raise OSError("Cannot load model") from error

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", fail)
    with pytest.raises(ValueError, match=f"the hub gave no pipeline of that name: {words}"):
        load_teacher("owner/name")


@pytest.mark.parametrize("failure", [OSError(errno.ENETUNREACH, "unreachable"), TimeoutError("timed out")])
def test_a_network_that_does_not_answer_is_said(
    failure: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match=f"the hub gave no pipeline of that name: {UNREACHED}"):
        load_teacher("owner/name", cache_dir=tmp_path)


def test_hub_error_without_words_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise LookupError

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", fail)
    with pytest.raises(ValueError, match=r"owner/name.*no such teacher.*LookupError"):
        load_teacher("owner/name")


def test_hub_folder_is_downloaded_without_pickles_or_code(
    monkeypatch: pytest.MonkeyPatch, uncond_teacher_folder: Path
) -> None:
    asked: dict[str, Any] = {}

    def download(source: str, **options: Any) -> str:
        asked.update(options, source=source)
        return str(uncond_teacher_folder)

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)
    assert load_teacher("owner/name", revision="main").spec.source == "owner/name"
    assert asked["use_safetensors"] is True and asked["trust_remote_code"] is False
    assert (asked["source"], asked["revision"]) == ("owner/name", "main")


# Teachers made in Python


def test_module_teacher_reads_nothing_but_what_it_is_given() -> None:
    seen: list[tuple[Any, ...]] = []

    def network(x: Tensor, net_time: Tensor, class_labels: Tensor | None = None) -> Tensor:
        seen.append((x, net_time, class_labels))
        return torch.zeros_like(x)

    teacher = module_teacher(network, VE(time_input="sigma"), "sample", (1, 4, 4), num_classes=2)
    x, labels = torch.ones(3, 1, 4, 4), torch.tensor([0, 1, 0])
    assert torch.equal(teacher.denoised(x, 1.0, {"class_labels": labels}), torch.zeros_like(x))
    assert torch.equal(seen[0][0], x), "sample prediction scales no input"
    torch.testing.assert_close(seen[0][1], torch.full((3,), 80.0))
    assert torch.equal(seen[0][2], labels)


@pytest.mark.parametrize("t_max", [0.0, -0.5, 1.5, float("nan")])
def test_module_teacher_refuses_impossible_start_levels(t_max: float) -> None:
    with pytest.raises(ValueError, match="t_max"):
        module_teacher(lambda x, t: x, CosineVP(), "sample", (2,), t_max=t_max)


def test_module_teacher_refuses_epsilon_at_pure_noise() -> None:
    assert module_teacher(lambda x, t: x, CosineVP(), "epsilon", (2,)).spec.t_max < 1
    assert module_teacher(lambda x, t: x, CosineVP(), "epsilon", (2,), t_max=0.9).spec.t_max == 0.9
    with pytest.raises(ValueError, match="pure noise"):
        module_teacher(lambda x, t: x, CosineVP(), "epsilon", (2,), t_max=1.0)


def test_module_teacher_refuses_unknown_prediction_types() -> None:
    with pytest.raises(ValueError, match=r"unknown prediction type 'noise'; known: sample, .*edm"):
        module_teacher(lambda x, t: x, CosineVP(), "noise", (2,))


def test_module_teacher_refuses_what_is_no_prediction() -> None:
    pair = module_teacher(lambda x, t: (x, t), CosineVP(), "sample", (2,))
    with pytest.raises(ValueError, match="must return a tensor, it returned tuple"):
        pair.denoised(torch.zeros(3, 2), 0.5, {})
    cut = module_teacher(lambda x, t: x[:, :1], CosineVP(), "sample", (2,))
    with pytest.raises(ValueError, match=r"returned shape \[3, 1\] for input \[3, 2\]"):
        cut.denoised(torch.zeros(3, 2), 0.5, {})


def test_callables_have_no_copy() -> None:
    teacher = module_teacher(lambda x, t: x, CosineVP(), "sample", (2,))
    with pytest.raises(ValueError, match="plain callable without weights.*network="):
        teacher.copy_network()
    assert teacher.to("cpu") is teacher


# Closed forms


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tweedie(log_density: Callable[[Tensor], Tensor], x: Tensor, alpha: float, sigma: float) -> Tensor:
    """Return E[x_0 | x_t] = (x_t + sigma^2 grad log p_t(x_t)) / alpha, by automatic differentiation."""
    x = x.clone().requires_grad_(True)
    (score,) = torch.autograd.grad(log_density(x).sum(), x)
    return (x.detach() + sigma**2 * score) / alpha


def mixture_log_density(x: Tensor, means: Tensor, std: float, alpha: float, sigma: float) -> Tensor:
    parts = [
        torch.distributions.Normal(alpha * mean, (alpha**2 * std**2 + sigma**2) ** 0.5).log_prob(x).sum(-1)
        for mean in means
    ]
    return torch.logsumexp(torch.stack(parts), 0)


@pytest.mark.parametrize("process", [CosineVP(), VE(sigma_max=5.0)], ids=["cosine", "ve"])
@pytest.mark.parametrize("t", [0.05, 0.5, 0.9])
def test_closed_forms_are_tweedies_formula(process: Process, t: float) -> None:
    alpha, sigma = process.level(t)
    means, x = normal(5, 3, seed=1), 2 * normal(20, 3)
    mixture = MixtureTeacher(means, 0.3, process)
    expected = tweedie(lambda x: mixture_log_density(x, means, 0.3, alpha, sigma), x, alpha, sigma)
    # Float64; the division by alpha = 0.16 and differences of densities in the far tails cost digits.
    torch.testing.assert_close(mixture.denoised(x, t, {}), expected, rtol=1e-9, atol=1e-9)
    gaussian = GaussianTeacher(means[0], 0.3, process)
    expected = tweedie(lambda x: mixture_log_density(x, means[:1], 0.3, alpha, sigma), x, alpha, sigma)
    torch.testing.assert_close(gaussian.denoised(x, t, {}), expected, rtol=1e-9, atol=1e-9)


def test_conditional_mixture_is_its_component() -> None:
    means, x = normal(3, 2, seed=1), normal(8, 2)
    mixture = MixtureTeacher(means, 0.4, CosineVP(), conditional=True)
    assert (mixture.spec.num_classes, mixture.spec.null_class, mixture.spec.labels) == (3, 3, [0, 1, 2])
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    found = mixture.denoised(x, 0.4, {"class_labels": labels})
    for i, label in enumerate(labels.tolist()):
        whole = MixtureTeacher(means, 0.4, CosineVP())
        alone = whole if label == 3 else GaussianTeacher(means[label], 0.4, CosineVP())
        torch.testing.assert_close(found[i : i + 1], alone.denoised(x[i : i + 1], 0.4, {}), rtol=0, atol=1e-13)


def test_closed_forms_at_the_ends() -> None:
    means, x = normal(4, 2, seed=1), normal(6, 2)
    mixture = MixtureTeacher(means, 0.4, CosineVP())
    # Pure noise says nothing: the prediction is the mean of all data. At the clean end it is x itself.
    torch.testing.assert_close(mixture.denoised(x, 1.0, {}), means.mean(0).expand_as(x), rtol=0, atol=1e-14)
    torch.testing.assert_close(mixture.denoised(x, 0.0, {}), x, rtol=0, atol=1e-14)


def test_exact_gaussian_state_has_the_gaussians_moments() -> None:
    exact = GaussianTeacher(torch.tensor([0.5, -0.3], dtype=torch.float64), 0.6, CosineVP())
    x_s = exact.exact_state(normal(100_000, 2), 0.0)
    # The standard error of a mean of 1e5 draws is 0.002 and of a standard deviation 0.0014; five of them.
    torch.testing.assert_close(x_s.mean(0), exact.mean, rtol=0, atol=0.01)
    torch.testing.assert_close(x_s.std(0), torch.full((2,), 0.6).double(), rtol=0, atol=0.007)
    for t, s in pairwise([1.0, 0.6, 0.3]):  # and the map of two stretches is the map of the whole
        later = GaussianTeacher(exact.mean, 0.6, CosineVP(), t_max=t)
        x_a = normal(5, 2)
        torch.testing.assert_close(later.exact_state(later.exact_state(x_a, t), s), later.exact_state(x_a, s))


def test_mixture_draws_have_the_mixtures_moments() -> None:
    means = torch.tensor([[1.0, 0.0], [-1.0, 0.5]])
    drawn = MixtureTeacher(means, 0.3, CosineVP()).draw(20_000, torch.Generator().manual_seed(0))
    variance = 0.09 + means.var(0, unbiased=False)
    # Standard errors of 2e4 draws: 0.0074 for the mean, 0.01 for the variance.
    torch.testing.assert_close(drawn.mean(0), means.mean(0), rtol=0, atol=0.03)
    torch.testing.assert_close(drawn.var(0), variance, rtol=0, atol=0.05)
