"""What all tests share: tiny networks with random weights, stock pipeline folders, and one list of teachers."""

from __future__ import annotations

import gc
import os

# Before anything imports huggingface_hub, which reads it once: no test may go to the network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Nor is a line broken: pytest's workers say 80 before a console is made, which keeps what it found then.
os.environ["COLUMNS"] = "200"

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from hypothesis import HealthCheck, settings
from torch import Tensor, nn

from onestill.diffusion.process import VE, CosineVP, FlowMatching, Process
from onestill.teachers.base import Teacher
from onestill.teachers.module import module_teacher
from onestill.teachers.pixel import unet2d_teacher

# What is imported stays: an export's garbage collection then looks at what the tests have made, not at all of torch.
gc.freeze()
torch.set_num_threads(1)
diffusers.logging.disable_progress_bar()
# The same examples on every machine, and no time limit on a busy one.
settings.register_profile(
    "onestill", derandomize=True, deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("onestill")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test starts from the same global random state, whichever ran before."""
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def make_unet(
    *,
    channels: int = 1,
    out_channels: int | None = None,
    num_classes: int | None = None,
    sample_size: Any = 8,
    seed: int = 0,
    **config: Any,
) -> UNet2DModel:
    """Return a `UNet2DModel` of 45 000 random weights; one forward pass takes milliseconds."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DModel(
            sample_size=sample_size,
            in_channels=channels,
            out_channels=channels if out_channels is None else out_channels,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
            norm_num_groups=4,
            num_class_embeds=num_classes,
            **config,
        )


def write_pipeline(
    folder: Path, unet: UNet2DModel | None = None, scheduler: Any = None, cls: type[Any] = DDPMPipeline
) -> Path:
    """Save a stock pipeline and return its folder."""
    cls(unet=unet or make_unet(), scheduler=scheduler or DDPMScheduler()).save_pretrained(folder)
    return folder


class PlainNetwork(nn.Module):
    """A network that knows nothing of diffusers: a target time can only enter through its layers' outputs."""

    def __init__(self, channels: int = 1, width: int = 6, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.time = nn.Linear(1, width)
        self.mix = nn.Linear(width, width, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x: Tensor, net_time: Tensor) -> Tensor:
        time = self.time((1 + net_time.to(x)).log()[:, None])
        h = torch.tanh(self.first(x / (1 + x.square().mean((1, 2, 3), keepdim=True)).sqrt()) + time[..., None, None])
        h = torch.tanh(self.mix(h.movedim(1, -1)).movedim(-1, 1))
        return self.last(self.dropout(h))


class TimedNetwork(nn.Module):
    """A small convolutional network with the time embedding of diffusers, and with classes."""

    def __init__(self, channels: int = 1, width: int = 6, num_classes: int | None = None) -> None:
        super().__init__()
        self.time_proj = Timesteps(16, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(16, width)
        self.class_embedding = nn.Embedding(num_classes, width) if num_classes else None
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.last = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x: Tensor, net_time: Tensor, class_labels: Tensor | None = None) -> Tensor:
        emb = self.time_embedding(self.time_proj(net_time).to(x.dtype))
        if self.class_embedding is not None:
            emb = emb + self.class_embedding(class_labels)
        return self.last(nn.functional.silu(self.first(x) + emb[..., None, None]))


@dataclass(frozen=True)
class Case:
    """One teacher that every test of teachers, students and exports runs on."""

    name: str
    build: Callable[[], Teacher]
    scheduler: Any = None

    def __str__(self) -> str:
        return self.name


def _unet_case(name: str, scheduler: Any, null_class: int | None = None, **unet: Any) -> Case:
    return Case(name, lambda: unet2d_teacher(make_unet(**unet), scheduler, null_class=null_class), scheduler)


def _seeded_network(make: Callable[[], nn.Module], seed: int = 3) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def _module_case(name: str, make: Callable[[], nn.Module], process: Process, prediction: str, **spec: Any) -> Case:
    return Case(name, lambda: module_teacher(_seeded_network(make), process, prediction, (1, 8, 8), **spec))


CASES = [
    _unet_case("ddpm-epsilon", DDPMScheduler()),
    _unet_case("ddpm-epsilon-rgb-unclipped", DDPMScheduler(clip_sample=False), channels=3),
    _unet_case("ddpm-learned-variance", DDPMScheduler(variance_type="learned_range"), out_channels=2),
    _unet_case("ddpm-learned-variance-rgb", DDPMScheduler(variance_type="learned_range"), channels=3, out_channels=6),
    _unet_case("ddpm-cosine-epsilon", DDPMScheduler(beta_schedule="squaredcos_cap_v2")),
    _unet_case("ddim-v", DDIMScheduler(prediction_type="v_prediction")),
    _unet_case("ddim-v-zero-snr", DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)),
    _unet_case("ddim-sample", DDIMScheduler(prediction_type="sample", clip_sample=False)),
    _unet_case("euler", EulerDiscreteScheduler()),
    _unet_case("pndm", PNDMScheduler()),
    _unet_case("dpmsolver", DPMSolverMultistepScheduler(prediction_type="v_prediction")),
    _unet_case("unipc", UniPCMultistepScheduler()),
    _unet_case("edm-euler", EDMEulerScheduler()),
    _unet_case("edm-dpmsolver", EDMDPMSolverMultistepScheduler(sigma_min=0.01, sigma_max=50.0)),
    _unet_case("class", DDIMScheduler(prediction_type="v_prediction"), num_classes=4),
    _unet_case("class-null-last", DDIMScheduler(prediction_type="v_prediction"), null_class=4, num_classes=5),
    _unet_case("class-null-first", DDIMScheduler(prediction_type="sample"), null_class=0, num_classes=5),
    _module_case("module-cosine-v", PlainNetwork, CosineVP(), "v_prediction"),
    _module_case("module-flow-velocity", TimedNetwork, FlowMatching(shift=3.0), "velocity"),
    _module_case(
        "module-class", lambda: TimedNetwork(num_classes=4), CosineVP(), "sample", num_classes=3, null_class=3
    ),
    _module_case("module-ve-sigma", PlainNetwork, VE(sigma_max=20.0, time_input="sigma"), "sample"),
]


# Teachers that differ in more than their schedule.
KINDS = {
    "ddpm-epsilon", "ddpm-learned-variance-rgb", "ddim-v-zero-snr", "edm-euler", "class-null-last",
    "module-cosine-v", "module-flow-velocity", "module-class",
}  # fmt: skip


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    """Each teacher of the conformance suite in turn."""
    found: Case = request.param
    return found


@pytest.fixture(params=[case for case in CASES if case.scheduler is not None], ids=str)
def unet_case(request: pytest.FixtureRequest) -> Case:
    """Each teacher with a `UNet2DModel` and a scheduler of diffusers."""
    found: Case = request.param
    return found


@pytest.fixture(params=[case for case in CASES if hasattr(case.scheduler, "alphas_cumprod")], ids=str)
def vp_case(request: pytest.FixtureRequest) -> Case:
    """Each teacher that `DDIMScheduler` can sample."""
    found: Case = request.param
    return found


_BUILT: dict[str, Teacher] = {}


def _shared(case: Case) -> Teacher:
    if case.name not in _BUILT:
        _BUILT[case.name] = case.build()
    return _BUILT[case.name]


@pytest.fixture
def teacher(case: Case) -> Teacher:
    """Each teacher of the conformance suite in turn, built once for all tests: never change it."""
    return _shared(case)


@pytest.fixture(params=[case for case in CASES if case.name in KINDS], ids=str)
def kind(request: pytest.FixtureRequest) -> Teacher:
    """One teacher of each kind of network and head, built once for all tests: never change it."""
    return _shared(request.param)


@pytest.fixture(scope="session")
def cases() -> dict[str, Case]:
    """The teachers of the conformance suite by name."""
    return {case.name: case for case in CASES}


@pytest.fixture(scope="session")
def tiny_unet() -> Callable[..., UNet2DModel]:
    """`make_unet`, for tests that need their own network."""
    return make_unet


@pytest.fixture(scope="session")
def save_pipeline() -> Callable[..., Path]:
    """`write_pipeline(folder, unet, scheduler, cls)`."""
    return write_pipeline


@pytest.fixture(scope="session")
def plain_network() -> Callable[..., nn.Module]:
    """A maker of `PlainNetwork`s, by seed."""
    return lambda *, seed=3, **config: _seeded_network(lambda: PlainNetwork(**config), seed)


@pytest.fixture(scope="session")
def timed_network() -> Callable[..., nn.Module]:
    """A maker of `TimedNetwork`s, by seed."""
    return lambda *, seed=3, **config: _seeded_network(lambda: TimedNetwork(**config), seed)


@pytest.fixture(scope="session")
def labels_for() -> Callable[[Teacher, int], dict[str, Tensor]]:
    """`labels_for(teacher, num)` are conditions that go round the teacher's classes; {} if it has none."""

    def labels(teacher: Teacher, num: int) -> dict[str, Tensor]:
        known = teacher.spec.labels
        return {"class_labels": torch.tensor([known[i % len(known)] for i in range(num)])} if known else {}

    return labels


@pytest.fixture
def uncond_teacher_folder(tmp_path: Path) -> Path:
    """A stock pipeline folder of an unconditional teacher: 1 x 8 x 8, v-prediction, zero terminal SNR."""
    scheduler = DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    return write_pipeline(tmp_path / "teacher", make_unet(), scheduler)


@pytest.fixture
def class_teacher_folder(tmp_path: Path) -> Path:
    """A stock pipeline folder of a class-conditional teacher: 4 classes, and label 4 is the null class."""
    scheduler = DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    return write_pipeline(tmp_path / "class_teacher", make_unet(num_classes=5), scheduler)
