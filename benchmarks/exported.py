"""Exported folders in an environment without onestill, against the student, same noise.

python benchmarks/exported.py --student RUN --num_inference_steps 1 2 4
A fresh virtual environment gets torch, diffusers, transformers and peft, and nothing of ours; or name one with --python. One step is
RUN/pipeline, others are exported first. Where a LoRA file lies in the folder, the teacher's own pipeline with it is checked too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from onestill.export.lora_file import LORA_FOLDER
from onestill.runs.export import export
from onestill.runs.folder import PIPELINE_FOLDER, RunFolder
from onestill.runs.load import restore_student, run_teacher
from onestill.sampling.generate import Rows
from onestill.sampling.samplers.network import StudentSampler
from onestill.teachers.pipelines.teacher import PipelineTeacher

PROMPTS = ("a bold red serif A on a yellow background", "a regular blue mono 7 on a white background")
STOCK = """
import importlib.util, json, sys, torch, diffusers
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
assert importlib.util.find_spec("onestill") is None, "onestill is installed here"
folder, output, prompts, arguments, lora = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:6])
pipe = DiffusionPipeline.from_pretrained(folder)
if lora:
    pipe.load_lora_weights(lora)
    name = json.load(open(lora + "/scheduler_config.json"))["_class_name"]
    pipe.scheduler = getattr(diffusers, name).from_pretrained(lora)
network = getattr(pipe, "unet", None) or pipe.transformer
calls, images = [], []
network.register_forward_hook(lambda *_: calls.append(1))
for i, asked in enumerate(prompts):
    given = {"prompt": asked} if isinstance(asked, str) else {} if asked is None else {"class_labels": [asked]}
    generator = torch.Generator().manual_seed(i)
    images.append(pipe(**given, **arguments, generator=generator, output_type="pt").images)
save_file({"images": torch.cat(images).contiguous()}, output)
print(type(pipe).__name__, "network evaluations per image:", len(calls) / len(prompts))
"""


def fresh_python(folder: Path) -> Path:
    """Return the interpreter of a new environment with torch, diffusers, transformers and peft only."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    constraints = Path(__file__).parent.parent / "constraints.txt"
    for packages in (["torch"], ["diffusers", "transformers", "accelerate", "peft", "numpy"]):
        subprocess.run([python, "-m", "pip", "install", "-q", "-c", constraints, *packages], check=True)
    return python


def check(python: Path, folder: Path, source: StudentSampler, rows: Rows, num: int, lora: Path | None = None) -> bool:
    """Print how far the plain call of a folder, with a LoRA file if one is given, is from the student; return whether near."""
    teacher, asked = source.student.teacher, rows.get("prompt")
    if asked is None:
        asked = rows["class_labels"].tolist() if rows else [None] * num
    arguments: dict[str, Any] = {"num_inference_steps": source.num_steps}
    if isinstance(teacher, PipelineTeacher):
        arguments = dict(teacher.plain_call_arguments(source.num_steps))
    with tempfile.TemporaryDirectory() as name:
        output = Path(name) / "images.safetensors"
        given = [folder, output, *map(json.dumps, (asked, arguments, None if lora is None else str(lora.absolute())))]
        said = subprocess.run([python, "-I", "-c", STOCK, *given], check=True, capture_output=True, text=True).stdout
        stock = load_file(output)["images"] * 2 - 1
    ours = source.images(range(num), rows, batch_size=1)
    error = float((stock - ours.clamp(-1, 1)).abs().max())
    kind = f"{source.num_steps} step{'s' if source.num_steps > 1 else ''}{'' if lora is None else ', LoRA file'}"
    print(f"{kind}: {said.strip()}; {num} images, largest difference in [-1, 1]: {error:.1e}", flush=True)
    return error <= (1e-4 if source.takes_text or lora is not None else 1e-5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--num_inference_steps", type=int, nargs="+", default=[1])
    parser.add_argument("--python", type=Path)
    parser.add_argument("--num_images", type=int, default=64)
    parser.add_argument("--prompt", action="append", help="for a text student; repeatable, taken in turn")
    args = parser.parse_args()
    run, fine = RunFolder(args.student), True
    student = restore_student(run, run_teacher(run, torch.device("cpu")))
    with tempfile.TemporaryDirectory() as name:
        python = args.python or fresh_python(Path(name) / "venv")
        for steps in args.num_inference_steps:
            source = StudentSampler(
                student, distilled=run.distilled, t_min=run.config.t_min, num_inference_steps=steps, is_map=run.is_map
            )
            rows = source.conditions(args.num_images, prompts=args.prompt or PROMPTS if source.takes_text else ())
            folder = args.student / PIPELINE_FOLDER
            if steps > 1:
                export(args.student, folder := Path(name) / f"steps-{steps}", num_inference_steps=steps)
            fine &= check(python, folder, source, rows, args.num_images)
            if (folder / LORA_FOLDER).is_dir():
                place = student.teacher.folder
                assert place is not None
                fine &= check(python, place, source, rows, args.num_images, folder / LORA_FOLDER)
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
