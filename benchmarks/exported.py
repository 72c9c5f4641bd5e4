"""An exported folder in an environment without onestill, against the student, same noise.

python benchmarks/exported.py --student RUN
A fresh virtual environment gets torch, diffusers and nothing of ours; or name one with --python.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import torch
from safetensors.torch import load_file

from onestill.runs.folder import PIPELINE_FOLDER, RunFolder
from onestill.runs.load import restore_student, run_teacher
from onestill.sampling.generate import Rows
from onestill.sampling.samplers.network import StudentSampler
from onestill.teachers.pipelines.teacher import PipelineTeacher

PROMPTS = ("a bold red serif A on a yellow background", "a regular blue mono 7 on a white background")
STOCK = """
import importlib.util, json, sys, torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
assert importlib.util.find_spec("onestill") is None, "onestill is installed here"
folder, output, prompts, arguments = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
pipe = DiffusionPipeline.from_pretrained(folder)
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
    """Return the interpreter of a new environment with torch, diffusers and transformers only."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    constraints = Path(__file__).parent.parent / "constraints.txt"
    for packages in (["torch"], ["diffusers", "transformers", "accelerate", "numpy"]):
        subprocess.run([python, "-m", "pip", "install", "-q", "-c", constraints, *packages], check=True)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--python", type=Path)
    parser.add_argument("--num_images", type=int, default=64)
    parser.add_argument("--prompt", action="append", help="for a text student; repeatable, taken in turn")
    args = parser.parse_args()
    run = RunFolder(args.student)
    student = restore_student(run, run_teacher(run, torch.device("cpu")))
    source = StudentSampler(student, distilled=run.distilled, t_min=run.config.t_min)
    rows: Rows = source.conditions(args.num_images, prompts=args.prompt or PROMPTS if source.takes_text else ())
    asked = rows["prompt"] if source.takes_text else rows["class_labels"].tolist() if rows else [None] * args.num_images
    arguments = student.teacher.pipeline_spec.export_arguments if isinstance(student.teacher, PipelineTeacher) else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python = args.python or fresh_python(folder / "venv")
        output = folder / "images.safetensors"
        given = [args.student / PIPELINE_FOLDER, output, json.dumps(asked), json.dumps(dict(arguments))]
        said = subprocess.run([python, "-I", "-c", STOCK, *given], check=True, capture_output=True, text=True).stdout
        stock = load_file(output)["images"] * 2 - 1
    seeds = range(args.num_images)
    ours = source.images(seeds, rows, batch_size=1)
    error = float((stock - ours.clamp(-1, 1)).abs().max())
    print(f"{said.strip()}; {args.num_images} images, largest difference in [-1, 1]: {error:.1e}")
    sys.exit(0 if error <= (1e-4 if source.takes_text else 1e-5) else 1)


if __name__ == "__main__":
    main()
