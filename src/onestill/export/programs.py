"""How programs that read Stable Diffusion's original names draw with a student, and where that is not what it draws.

They make the network's input, its time and the picture themselves. In one Euler step from their largest sigma s to 0
that is sqrt(1 + s^2) n - s F(n) of an epsilon network and (n - s F(n)) / sqrt(1 + s^2) of one of v-prediction, n being
the noise: eq. (19), where s is sigma / alpha of the student's start level.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onestill.students.student import Student

USUAL_SIGMA, ZERO_SNR_SIGMA = 14.6146, 4518.76
"""Where such programs start: on Stable Diffusion's schedule, and on that schedule with zero terminal SNR."""
SAME_LEVEL = 1e-3
"""How far the start levels of a program and a student may differ, relative to them, and be called the same."""
USUAL_SCALE, USUAL_SCALE_XL = 0.18215, 0.13025
"""What such programs multiply an autoencoder's latents by."""
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v_prediction", "sample": "x0"}
"""What ComfyUI calls a prediction."""


@dataclass(frozen=True)
class Programs:
    """A student of so many steps as such programs draw it."""

    student: Student
    num_steps: int

    @property
    def pipeline(self) -> Any:
        """The teacher's pipeline."""
        return getattr(self.student.teacher, "pipeline", None)

    @property
    def stem(self) -> str:
        """The name of a file without its ending: that of the teacher, and the number of steps."""
        teacher = Path(self.student.spec.source).name.removesuffix(".safetensors")
        plain = re.sub(r"[^\w.-]+", "-", teacher).strip("-.")[:80]
        return f"{plain or 'student'}-{self.num_steps}-step"

    @functools.cached_property
    def sigmas(self) -> list[float]:
        """The ratio sigma / alpha of each of the student's start levels; the first may be infinite."""
        levels = (self.student.spec.process.level(t) for t in self.student.levels(self.num_steps))
        return [sigma / alpha if alpha else math.inf for alpha, sigma in levels]

    @property
    def size(self) -> str:
        """Width and height of the pictures, in pixels."""
        height, width = self.student.spec.sample_shape[-2:]
        scale = 2 ** (len(self.pipeline.vae.config.block_out_channels) - 1)
        return f"{width * scale}x{height * scale}"

    @property
    def sampler(self) -> str:
        """The settings to use."""
        steps = "1 step" if self.num_steps == 1 else f"{self.num_steps} steps"
        return f"sampler euler, scheduler sgm_uniform, {steps}, CFG 1, denoise 1, {self.size} pixels"

    def words(self, file: str, kind: str) -> str:
        """Return what a card says of a file that is such a program's `kind` of file."""
        told, is_default = (
            PREDICTIONS[self.student.spec.prediction_type],
            self.student.spec.prediction_type == "epsilon",
        )
        zsnr = ", zsnr on" if math.isinf(self.sigmas[0]) else ""
        usual = (
            "their default"
            if is_default
            else f"which ComfyUI's `ModelSamplingDiscrete` says where it is not read off the file{zsnr}"
        )
        parts = [
            f"`{file}` has the names that ComfyUI, A1111 and Forge read, as {kind}",
            f"{self.sampler}, no negative prompt",
            f"prediction {told}, {usual}",
            self._start(self.sigmas[0]),
        ]
        if self.num_steps > 1:
            shown = ", ".join(f"{sigma:.4f}" for sigma in [*self.sigmas, 0.0])
            parts.append(
                f"the student's own levels are the sigmas {shown}, for a node that takes sigmas; `sgm_uniform` is near them"
            )
        is_xl = getattr(self.pipeline, "text_encoder_2", None) is not None
        scale, known = self.pipeline.vae.config.scaling_factor, USUAL_SCALE_XL if is_xl else USUAL_SCALE
        if abs(scale / known - 1) > SAME_LEVEL:
            parts.append(
                f"its latents are scaled by {scale:g}, where programs that read no more than the file take {known:g}"
            )
        return "; ".join(parts)

    def _start(self, sigma: float) -> str:
        """Return how a program's first step compares with the student's."""
        if math.isinf(sigma):
            return f"their largest sigma, {ZERO_SNR_SIGMA:.0f}, stands for this student's start at noise alone"
        rest = f"{50 / sigma:.1g} %"
        if abs(sigma / USUAL_SIGMA - 1) <= SAME_LEVEL:
            exact = f"ComfyUI's Euler step from its largest sigma, {USUAL_SIGMA}, is this student's own"
            less = f"A1111 scales the first noise by sigma, which leaves {rest} of it in the picture, unless its setting `SGM noise multiplier` is on"
            return f"{exact}; {less}" if self.student.spec.prediction_type == "epsilon" else exact
        own = (
            f"they start at sigma {USUAL_SIGMA} and this student at {sigma:.4f}, so their own step draws something else"
        )
        todo = f"give ComfyUI's `SamplerCustom` the sigmas {sigma:.4f}, 0"
        return f"{own}: {todo}" if sigma > USUAL_SIGMA else f"{own}: {todo}, which leaves about {rest} of the noise"
