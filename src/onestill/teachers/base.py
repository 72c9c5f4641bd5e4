"""The one contract of a teacher: `denoised(x_t, t, cond)`, its prediction of x_0, and what may be asked besides.

Whatever only some teachers have (prompts, a decoder, a picture to enlarge, a network to copy) has a default here that
says "none", so that nobody asks of which class a teacher is. Nothing changes a teacher but `to` and
`release_encoders`, which move or free memory: every `with_...` returns another teacher around the same network.
"""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor, nn

from onestill.core.errors import SettingError, named
from onestill.core.tensors import Cond, as_times, broadcast, float32_or_more, laid_bare, to_device
from onestill.diffusion.prediction import preconditioning
from onestill.diffusion.trajectory import Denoiser
from onestill.teachers.image_condition import ImageCondition
from onestill.teachers.prompt_limits import PromptLimit, exceeded
from onestill.teachers.teacher_spec import TeacherSpec

NO_TEXT, NO_PICTURE = "takes no text", "takes no picture of an earlier model"
Interval = tuple[float, float]
"""(low, high): levels t with low < t <= high."""
NO_NETWORK = "is known in closed form, without a network that another could take the place of"


class Teacher(ABC):
    """A pre-trained model that predicts x_0.

    Attributes:
        spec: What is known of it.
        network: Its network; None where there is none.
        null_cond: The conditions of "no prompt", one row each; empty where the null condition is a label, or there is
            none.
        example_cond: The conditions of some prompt, one row each; empty where labels or nothing condition the teacher.
        folder: Where it was loaded from, that of a hub id's files included; None of a teacher made in Python.
        arguments: The arguments of every call of its pipeline that were asked for, such as a size.
        student_format: The format that a student of it is exported in: "pixel", "pipeline" or "module".
        output_field: Where the output of its pipeline has its results: "images", "frames" or "audios".
        has_decoder: Whether it works on latents, which `decode` makes images of.
        clamps: Whether its pipeline leaves images in [-1, 1].
        takes_lora_files: Whether its pipeline loads LoRA files for its network.
        bytes_besides: Bytes of the weights of its pipeline besides its network's, which an exported student has too.
        records_null_class: Whether the folder of an exported student must be told which label means "no class".
    """

    _made_by = "load one with onestill.load_teacher, or wrap a network of your own with onestill.module_teacher"
    spec: TeacherSpec
    network: Any = None
    null_cond: Cond = MappingProxyType({})  # type: ignore[assignment]  # read only
    example_cond: Cond = MappingProxyType({})  # type: ignore[assignment]  # read only
    folder: Path | None = None
    arguments: Mapping[str, Any] = MappingProxyType({})
    student_format: str = "module"
    output_field: str = "images"
    has_decoder: bool = False
    clamps: bool = False
    takes_lora_files: bool = False
    bytes_besides: int = 0
    records_null_class: bool = False

    @abstractmethod
    def denoised(self, x_t: Tensor, t: float | Tensor, cond: Cond) -> Tensor:
        """Return f(x_t, t, cond), the prediction of x_0, in float32 or more.

        Args:
            x_t: State of the process, [B, *sample_shape].
            t: Time, one number or [B], in (0, 1].
            cond: Conditions with B rows each; {} if unconditional.
        """

    @property
    def evaluations(self) -> int:
        """Network evaluations in one call of `denoised`, the most at any time."""
        return 1

    def evaluations_at(self, t: float) -> int:
        """Return the network evaluations of one call of `denoised` at a time t."""
        return self.evaluations

    def denoiser(self, cond: Cond) -> Denoiser:
        """Return `denoised` with the conditions fixed: what the steps of a trajectory take."""
        return lambda x_t, t: self.denoised(x_t, t, cond)

    @torch.no_grad()
    def one_step(self, eps: Tensor, cond: Cond) -> Tensor:
        """Return the images of one step from pure noise: of an exported student, loaded as a teacher, its pictures."""
        return self.decode(self.denoised(eps, 1.0, cond))

    # Guidance

    @property
    def can_guide(self) -> bool:
        """Whether there is a null condition, which guidance needs."""
        return bool(self.null_cond) or self.spec.null_class is not None

    @property
    def guidance_input(self) -> str | None:
        """Name of the condition that tells the network its guidance scale; None where that is no input of it."""
        return None

    @property
    def usual_guidance(self) -> float:
        """The guidance scale where none is named: what the pipeline tells its network, or 1, which is none."""
        return 1.0

    @property
    def guidance_interval(self) -> Interval | None:
        """The levels at which it is guided; None where at all, or it is not."""
        return None

    def guidance_rows(self, scales: Tensor) -> Tensor:
        """Return the rows of `guidance_input` that tell the network some guidance scales [B]."""
        return scales

    @property
    def unguided(self) -> Teacher:
        """The teacher itself, without the guidance and the thresholding around it."""
        return self

    def null_rows(self, cond: Cond) -> Cond:
        """Return `cond` with the null condition in place of what a prompt or a label sets."""
        if self.spec.null_class is not None:
            return {**cond, "class_labels": torch.full_like(cond["class_labels"], self.spec.null_class)}
        rows = {n: v.to(cond[n]).expand(len(cond[n]), *v.shape[1:]) for n, v in self.null_cond.items()}
        return {**cond, **rows}

    def example_rows(self, num: int) -> Cond:
        """Return some valid conditions, for looking at a network without caring what it draws."""
        if self.spec.num_classes is not None:
            return {"class_labels": torch.full((num,), self.spec.labels[0])}
        return {n: v.expand(num, *v.shape[1:]) for n, v in self.example_cond.items()}

    # Other teachers around the same network

    def with_t_max(self, t_max: float) -> Self:
        """Return the teacher with another start level; SettingError if it cannot start there."""
        spec = self.spec
        spec.process.check_start_level(spec.prediction_type, t_max)
        return self._changed(spec=replace(spec, t_max=t_max, t_max_reason="given"))

    def with_negative_prompt(self, prompt: str | None, *, acts: bool = True) -> Self:
        """Return the teacher with a negative prompt in the place of its null condition; itself where None is given.

        Raises:
            SettingError: If the teacher takes no prompts, has no "no prompt", or nothing uses it (`acts` is False).
        """
        if prompt is None:
            return self
        if not self.spec.text:
            raise SettingError("negative_prompt", prompt, "this teacher takes no text")
        if not self.can_guide:
            raise SettingError("negative_prompt", prompt, f"a {self.kind} has no null condition that it could replace")
        if not acts:
            todo = f"give a {named('guidance_scale')} other than 1"
            raise SettingError("negative_prompt", prompt, "acts through guidance only", todo)
        return self._changed(null_cond=self.encode_negative(prompt))

    def with_image_condition(self, level: int, pictures: Tensor | None = None) -> Self:
        """Return the teacher with another noise level of the pictures that it takes; ValueError if it takes none.

        Its example calls go round `pictures`, some real ones [N, C, h, w] in [-1, 1], if there are any.
        """
        raise self._cannot(NO_PICTURE)

    def _changed(self, **attributes: Any) -> Self:
        other = copy.copy(self)
        vars(other).update(attributes)
        return other

    def _cannot(self, why: str) -> ValueError:
        return ValueError(f"this {self.kind} {why}")

    # Prompts

    @property
    def kind(self) -> str:
        """What it is, such as "StableDiffusionPipeline"."""
        return "teacher"

    @property
    def encoders_released(self) -> bool:
        """Whether the text encoders have left memory, so that `encode` is over."""
        return False

    def encode(self, prompts: Sequence[str], seeds: Sequence[int] = ()) -> Cond:
        """Return the conditions of prompts, one row each; `seeds` for what the pipeline draws on the way.

        Raises:
            RuntimeError: If the text encoders were released; so do the methods below.
        """
        raise self._cannot(NO_TEXT)

    def encode_negative(self, prompt: str) -> Cond:
        """Return the conditions that a prompt makes in the place of "no prompt", one row.

        They may differ from `encode`: some pipelines put words of their own before a prompt, and none before this one.
        """
        raise self._cannot(NO_TEXT)

    def prompt_rows(self, cond: Cond) -> Cond:
        """Return the conditions that prompts decide: without those that come with a picture, if the teacher takes one."""
        return cond

    def encoder_identity(self) -> str:
        """Return a name for what turns prompts into conditions: the same name is the same conditions."""
        raise self._cannot(NO_TEXT)

    @property
    def prompt_limits(self) -> tuple[PromptLimit, ...]:
        """The numbers of tokens of a prompt that its text encoders take, the smallest first; () if none is known."""
        return ()

    def exceeded_limits(self, prompts: Sequence[str]) -> list[int]:
        """Return which of those limits each prompt exceeds, as a number: bit i for the i-th."""
        return exceeded(self.prompt_limits, prompts)

    def negative_limits(self, prompt: str) -> list[PromptLimit]:
        """Return which limits of a prompt in the place of "no prompt" this one exceeds."""
        return []

    def release_encoders(self) -> None:
        """Let the text encoders go and all else that only `encode` needs, which is over."""
        return None

    def has_encoders_of(self, other: Teacher) -> bool:
        """Return whether what makes conditions of prompts is equal to another teacher's, component by component."""
        return False

    def share_encoders(self, other: Teacher) -> None:
        """Use the text encoders of another teacher in the place of equal ones of its own."""
        return None

    def lend_encoders(self, pipeline: Any) -> None:
        """Let a stock pipeline use the text encoders in the place of equal ones of its own."""
        return None

    # Pictures

    @property
    def image_condition(self) -> ImageCondition | None:
        """What is known of the picture of an earlier model that the teacher takes; None if it takes none."""
        return None

    def picture_rows(self, pictures: Tensor, noise: Tensor) -> Cond:
        """Return the conditions made of pictures [B, C, h, w] in [-1, 1] and of `noise` [B, *sample_shape].

        They take the place of those that `encode` made of an example picture; ValueError if the teacher takes none.
        """
        raise self._cannot(NO_PICTURE)

    def decode(self, latents: Tensor) -> Tensor:
        """Return the images of what the network makes: the same, where it works on pixels."""
        return latents

    def bound(self, x_0: Tensor) -> Tensor:
        """Return what a step of several goes on with: the same, or thresholded where the pipeline's last step does that."""
        return x_0

    # Students

    def why_not_in_steps(self, levels: Sequence[float]) -> str | None:
        """Return why no folder could walk a student down these start levels, or None if one can."""
        return None

    def check_start(self) -> None:
        """Raise SettingError if no exported student could start at this start level."""
        return None

    def call(self, network: Callable[..., Any], x_t: Tensor, net_time: Tensor, cond: Cond) -> Tensor:
        """Call a network: (network, scaled x_t, network time, cond) -> its raw output, of the sample's shape."""
        raise self._cannot(NO_NETWORK)

    def denoised_by(self, network: Callable[..., object], x_t: Tensor, t: float | Tensor, cond: Cond) -> Tensor:
        """Return `denoised` with another network in this one's place, such as a student's copy."""
        raise self._cannot(NO_NETWORK)

    def first_call(self, eps: Tensor, network: Callable[..., object] | None = None) -> Tensor:
        """Return f of the start state made of noise [B, *sample_shape] under some conditions; of another network if given.

        The one call that a run makes before it writes anything; SettingError if a network of one's own fails in it.
        """
        x_t, cond = self.spec.trajectory.start(eps), to_device(self.example_rows(len(eps)), eps.device)
        if network is None:
            return self.denoised(x_t, self.spec.t_max, cond)
        return self.denoised_by(network, x_t, self.spec.t_max, cond)

    def copy_network(self) -> nn.Module:
        """Return a trainable copy of the network, in float32 and in evaluation mode (no dropout)."""
        if not isinstance(self.network, nn.Module):
            raise ValueError(
                "this teacher is a plain callable without weights, so the student cannot be a copy of it; "
                "pass a torch.nn.Module of the student as `network=`"
            )
        return laid_bare(copy.deepcopy(self.network)).float().requires_grad_(True).eval()

    def share_network(self) -> nn.Module:
        """Return a network with modules of its own around this one's very parameters, frozen, in evaluation mode.

        What is hooked or put into its modules is not in this one's, and there is no second copy of the weights.
        """
        if not isinstance(self.network, nn.Module):
            raise ValueError("this teacher is a plain callable without weights, which nothing can be trained beside")
        shared = {id(tensor): tensor for tensor in (*self.network.parameters(), *self.network.buffers())}
        return laid_bare(copy.deepcopy(self.network, shared)).eval()

    def to(self, device: torch.device | str) -> Self:
        """Move the network, and what else it computes with, to `device`."""
        if isinstance(self.network, nn.Module):
            self.network.to(device)
        return self

    def fingerprint(self) -> str:
        """Return a short hash of the weights and of everything that decides its trajectories: the same teacher, or not."""
        digest = hashlib.sha256(repr(self.spec.facts()).encode())
        if isinstance(self.network, nn.Module):
            for name, value in self.network.state_dict().items():
                digest.update(name.replace("_orig_mod.", "").encode())  # of a compiled part
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    def pictures_fingerprint(self) -> str:
        """Return a hash of all that decides its pictures: text encoders and decoder too."""
        return self.fingerprint()


class NetworkTeacher(Teacher):
    """A teacher around a network, eq. (3): denoised = c_skip x_t + c_out network(c_in x_t, net_time(t), cond).

    The network is put into evaluation mode, its parameters frozen.
    """

    def __init__(self, network: Callable[..., object], spec: TeacherSpec) -> None:
        self.network, self.spec = network, spec
        if isinstance(network, nn.Module):
            network.eval().requires_grad_(False)

    @abstractmethod
    def call(self, network: Callable[..., Any], x_t: Tensor, net_time: Tensor, cond: Cond) -> Tensor: ...

    def denoised(self, x_t: Tensor, t: float | Tensor, cond: Cond) -> Tensor:
        return self.denoised_by(self.network, x_t, t, cond)

    def denoised_by(self, network: Callable[..., object], x_t: Tensor, t: float | Tensor, cond: Cond) -> Tensor:
        times = as_times(t, len(x_t))
        spec, process = self.spec, self.spec.process
        c_in, c_skip, c_out = preconditioning(spec.prediction_type, *process.alpha_sigma(times), spec.sigma_data)
        net_time = process.net_time(times).to(device=x_t.device, dtype=x_t.dtype)
        output = float32_or_more(self.call(network, broadcast(c_in, x_t) * x_t, net_time, cond))
        x_t = float32_or_more(x_t)
        return broadcast(c_skip, x_t) * x_t + broadcast(c_out, x_t) * output
