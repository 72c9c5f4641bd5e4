"""One file for each family of pipelines."""

from __future__ import annotations

from onestill.teachers.pipelines.families.deepfloyd import IF_STAGE_1, IF_STAGE_2
from onestill.teachers.pipelines.families.dit import DIT
from onestill.teachers.pipelines.families.flux import FLUX
from onestill.teachers.pipelines.families.lumina2 import LUMINA_2
from onestill.teachers.pipelines.families.pixart import PIXART
from onestill.teachers.pipelines.families.sana import SANA
from onestill.teachers.pipelines.families.sd3 import STABLE_DIFFUSION_3
from onestill.teachers.pipelines.families.stable_audio import STABLE_AUDIO
from onestill.teachers.pipelines.families.stable_diffusion import STABLE_DIFFUSION, STABLE_DIFFUSION_XL
from onestill.teachers.pipelines.families.wan import WAN
from onestill.teachers.pipelines.spec import PipelineSpec

FAMILIES: tuple[PipelineSpec, ...] = (
    STABLE_DIFFUSION,
    STABLE_DIFFUSION_XL,
    DIT,
    PIXART,
    IF_STAGE_1,
    IF_STAGE_2,
    STABLE_DIFFUSION_3,
    FLUX,
    SANA,
    LUMINA_2,
    WAN,
    STABLE_AUDIO,
)
