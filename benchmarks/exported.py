"""An exported folder in an environment without onestill, against the student, same noise.

python benchmarks/exported.py --student RUN
A fresh virtual environment gets torch, diffusers and nothing of ours; or name one with --python.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import torch
from safetensors.torch import load_file

from onestill.checks import PIPELINE_FOLDER
from onestill.restore import read_run_config, restore_student
from onestill.sampler import noise, student_generator

STOCK = """
import importlib.util, sys, torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
assert importlib.util.find_spec("onestill") is None, "onestill is installed here"
folder, output, num = sys.argv[1], sys.argv[2], int(sys.argv[3])
pipe = DiffusionPipeline.from_pretrained(folder)
calls = []
pipe.unet.register_forward_hook(lambda *_: calls.append(1))
classes = pipe.unet.config.num_class_embeds
images = pipe(
    batch_size=num,
    class_labels=[i % classes for i in range(num)] if classes else None,
    generator=[torch.Generator().manual_seed(i) for i in range(num)],
    output_type="pt",
).images
save_file({"images": images.contiguous()}, output)
print(type(pipe).__name__, "network evaluations:", len(calls))
"""


def fresh_python(folder: Path) -> Path:
    """Return the interpreter of a new environment with torch and diffusers only."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    constraints = Path(__file__).parent.parent / "constraints.txt"
    for packages in (["torch"], ["diffusers", "accelerate", "numpy"]):
        subprocess.run([python, "-m", "pip", "install", "-q", "-c", constraints, *packages], check=True)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--python", type=Path)
    parser.add_argument("--num_images", type=int, default=64)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python = args.python or fresh_python(folder / "venv")
        output = folder / "images.safetensors"
        command = [python, "-I", "-c", STOCK, args.student / PIPELINE_FOLDER, output, str(args.num_images)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        stock = load_file(output)["images"] * 2 - 1
    student = restore_student(args.student, read_run_config(args.student), torch.device("cpu"))
    labels = {"class_labels": torch.arange(args.num_images) % len(student.spec.labels)} if student.spec.labels else {}
    eps = noise(range(args.num_images), student.spec.sample_shape)
    ours = student_generator(student)(eps, labels).clamp(-1, 1)
    error = float((stock - ours).abs().max())
    print(f"{said}; {args.num_images} images, largest difference in [-1, 1]: {error:.1e}")
    sys.exit(0 if error <= 1e-5 else 1)


if __name__ == "__main__":
    main()
