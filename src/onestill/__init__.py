"""onestill: one-step generators from pre-trained diffusion models, without a training image.

    import onestill
    onestill.distill("path/to/teacher", "run", max_train_steps=10_000)
    images = onestill.sample("run", num_images=16)

t = 0 is clean and t = 1 is noise, everywhere; images are floats in [-1, 1].
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onestill.core.errors import SettingError
    from onestill.diffusion.process import VE, CosineVP, DiscreteVP, FlowMatching
    from onestill.evaluation.config import EvaluateConfig
    from onestill.export.export import export_student
    from onestill.export.module import load_module
    from onestill.pages.config import CompareConfig, ServeConfig
    from onestill.runs.compare import compare
    from onestill.runs.distill import RunResult, distill
    from onestill.runs.evaluate import evaluate
    from onestill.runs.inspect import inspect_teacher
    from onestill.runs.load import load_sampler
    from onestill.runs.sample import sample
    from onestill.runs.serve import serve
    from onestill.sampling.config import SampleConfig
    from onestill.sampling.explore import fixed_noise, guidance_sweep, interpolate, student_trajectory
    from onestill.students.student import Student
    from onestill.teachers.closed_form import GaussianTeacher, MixtureTeacher
    from onestill.teachers.guidance import guided
    from onestill.teachers.load import load_teacher
    from onestill.teachers.module import module_teacher
    from onestill.training.config import DistillConfig

__version__ = "0.1.0"

# Resolved on first use, so that `import onestill` stays fast and loads nothing optional.
_HOMES = {
    "evaluate": "runs.evaluate",
    "sample": "runs.sample",
    "CompareConfig": "pages.config",
    "compare": "runs.compare",
    "ServeConfig": "pages.config",
    "serve": "runs.serve",
    "DistillConfig": "training.config",
    "EvaluateConfig": "evaluation.config",
    "SampleConfig": "sampling.config",
    "SettingError": "core.errors",
    "guided": "teachers.guidance",
    "RunResult": "runs.distill",
    "distill": "runs.distill",
    "export_student": "export.export",
    "load_module": "export.module",
    "inspect_teacher": "runs.inspect",
    "fixed_noise": "sampling.explore",
    "guidance_sweep": "sampling.explore",
    "interpolate": "sampling.explore",
    "student_trajectory": "sampling.explore",
    "CosineVP": "diffusion.process",
    "DiscreteVP": "diffusion.process",
    "FlowMatching": "diffusion.process",
    "VE": "diffusion.process",
    "load_sampler": "runs.load",
    "Student": "students.student",
    "GaussianTeacher": "teachers.closed_form",
    "MixtureTeacher": "teachers.closed_form",
    "load_teacher": "teachers.load",
    "module_teacher": "teachers.module",
}

__all__ = [
    "CompareConfig",
    "compare",
    "VE",
    "CosineVP",
    "DiscreteVP",
    "DistillConfig",
    "EvaluateConfig",
    "FlowMatching",
    "GaussianTeacher",
    "MixtureTeacher",
    "RunResult",
    "SampleConfig",
    "ServeConfig",
    "SettingError",
    "Student",
    "distill",
    "evaluate",
    "export_student",
    "fixed_noise",
    "guidance_sweep",
    "guided",
    "inspect_teacher",
    "interpolate",
    "load_module",
    "load_sampler",
    "load_teacher",
    "module_teacher",
    "sample",
    "serve",
    "student_trajectory",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'onestill' has no attribute {name!r}")
    value = getattr(import_module(f"onestill.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
