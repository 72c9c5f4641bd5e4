"""Peak memory of a LoRA student beside a full one: same teacher, same settings, each in a process of its own.

python benchmarks/lora_memory.py                      # a U-Net of 26 million random weights, 3 steps of 4 images
python benchmarks/lora_memory.py --width 256 --device cuda

Peak: on CUDA the most that torch had allocated, on a CPU the most that the process had resident, less what it had
before the teacher was made. Weights: every distinct block of memory among the teacher's and the student's parameters.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import torch
from diffusers import DDIMScheduler, UNet2DModel

from onestill.checks import resolve_device
from onestill.config import make_config
from onestill.inspection import estimate
from onestill.preparation import prepare
from onestill.teachers.unet2d import unet2d_teacher
from onestill.tensors import num_parameters
from onestill.trainer import Trainer


def teacher_of(width: int) -> UNet2DModel:
    """Return a U-Net of random weights on images of 3 x 16 x 16."""
    return UNet2DModel(
        sample_size=16,
        block_out_channels=(width, 2 * width, 2 * width),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )


def distinct_bytes(*modules: torch.nn.Module) -> int:
    """Return the size of the parameters of some modules, each block of memory counted once."""
    blocks = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in modules for p in m.parameters()}
    return sum(blocks.values())


def peak(device: torch.device) -> int:
    """Return the most memory used so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def measure(rank: int, width: int, batch: int, steps: int, device: str) -> dict[str, float]:
    """Train some steps and return sizes in MB; rank 0 is a full student."""
    place = resolve_device(device)
    before = 0 if place.type == "cuda" else psutil.Process().memory_info().rss
    teacher = unet2d_teacher(teacher_of(width), DDIMScheduler(prediction_type="v_prediction"))
    with tempfile.TemporaryDirectory() as folder:
        settings = {"teacher": "random", "output_dir": f"{folder}/run", "device": device, "train_batch_size": batch}
        own = {"lora_rank": rank} if rank else {}
        prepared = prepare(make_config({**settings, **own}), teacher)
        trainer = Trainer(prepared.config, prepared.teacher, prepared.student, prepared.conditions, "")
        teacher.to(trainer.device)
        for _ in range(steps):
            trainer.update()
        most = peak(place) - before
    network, student = teacher.network, trainer.student
    assert isinstance(network, torch.nn.Module)
    trained = sum(p.numel() * p.element_size() for p in student.parameters() if p.requires_grad)
    estimated, _ = estimate(teacher, student, prepared.config, trainer.device)
    sizes = {
        "base": 4 * num_parameters(network),
        "trained": trained,
        "teacher and student": distinct_bytes(network, student),
        "peak": most,
        "inspect says": estimated,
    }
    return {name: size / 1e6 for name, size in sizes.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only is not None:
        print(json.dumps(measure(args.only, args.width, args.batch, args.steps, args.device)))
        return
    rows = {}
    for name, rank in {"full": 0, f"LoRA, rank {args.rank}": args.rank}.items():
        command = [sys.executable, __file__, *sys.argv[1:], "--only", str(rank)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows[name] = json.loads(done.stdout.splitlines()[-1])
    columns = list(rows["full"])
    print(f"| student (MB, {args.device}) | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name, sizes in rows.items():
        print(f"| {name} | {' | '.join(f'{sizes[column]:,.0f}' for column in columns)} |")
    full, lora = rows.values()
    second = lora["teacher and student"] - lora["base"] - lora["trained"]
    print(f"\npeak, LoRA / full: {lora['peak'] / full['peak']:.2f}")
    if second > 0.01 * lora["base"]:
        sys.exit(f"the LoRA run holds {second:.1f} MB of a second copy of the base weights")
    print("no second copy of the base weights exists: base + trained is all that teacher and student hold")


if __name__ == "__main__":
    main()
