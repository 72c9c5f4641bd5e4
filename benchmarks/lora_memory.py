"""Peak memory of a LoRA student beside a full one, training and export: same settings, each in a process of its own.

python benchmarks/lora_memory.py                      # U-Nets of 26 million random weights, 3 steps of 4 images
python benchmarks/lora_memory.py --width 256 --device cuda

A third student is LoRA with a LoRA corrector, whose critic is a second adapter on the same weights.
Two teachers: a U-Net on pixels, and one in the Stable Diffusion `glyphs`, in the place of its own small one.

Peak: on CUDA the most that torch had allocated, on a CPU the most that the process had resident, less what it had
before the teacher was made; of the training, and with the export that ends a run. Weights: every distinct block of
memory among the parameters of the teacher and of what is trained.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel, UNet2DModel

from onestill.core.devices import resolve_device
from onestill.core.tensors import num_parameters
from onestill.export.export import export_student
from onestill.runs.build import build_run
from onestill.runs.distill import make_trainer
from onestill.runs.inspect import estimate
from onestill.teachers.base import Teacher
from onestill.teachers.load import EMBEDDED, load_teacher
from onestill.teachers.pixel import unet2d_teacher
from onestill.training.config import make_config

TEACHERS = ("pixels", "text")


def on_pixels(width: int) -> Teacher:
    """Return a U-Net of random weights on images of 3 x 16 x 16."""
    network = UNet2DModel(
        sample_size=16,
        block_out_channels=(width, 2 * width, 2 * width),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    return unet2d_teacher(network, DDIMScheduler(prediction_type="v_prediction"))


def write_text_teacher(width: int, folder: Path) -> None:
    """Write `glyphs` with a larger U-Net of random weights."""
    network = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(width, 2 * width, 2 * width),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
    )
    StableDiffusionPipeline.from_pretrained(EMBEDDED["glyphs"].folder, unet=network).save_pretrained(folder)


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


def forget_peak(device: torch.device) -> None:
    """Let `peak` begin again from what is in use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def measure(
    kind: str, rank: int, share: float, width: int, batch: int, steps: int, device: str, folder: Path
) -> dict[str, float]:
    """Train some steps, export, and return sizes in MB; rank 0 is a full student, `share` that of the corrector's rows."""
    place = resolve_device(device)
    settings: dict[str, Any] = {"output_dir": f"{folder}/run", "device": device, "train_batch_size": batch}
    settings |= {"anchor_fraction": 0.0, "boundary_weight": 1.0}
    settings |= {"max_train_steps": steps, **({"lora_rank": rank} if rank else {})}
    settings |= {"corrector_fraction": share, "corrector_begin": 0.0, "corrector_warmup": 0.0}
    before = 0 if place.type == "cuda" else psutil.Process().memory_info().rss
    if kind == "text":
        teacher = load_teacher(folder / "teacher")
        settings |= {"prompt_file": EMBEDDED["glyphs"].prompts, "prompt_cache_dir": f"{folder}/cache"}
    else:
        teacher = on_pixels(width)
    prepared = build_run(make_config({**settings, "teacher": "random"}), teacher)
    trainer = make_trainer(prepared)
    for _ in range(steps):
        trainer.update()
    training = peak(place) - before
    network, student = teacher.network, trainer.student
    assert isinstance(network, torch.nn.Module)
    modules = [each.module for each in trainer.trained]
    all_of_them = distinct_bytes(network, *modules)
    trained = sum(p.numel() * p.element_size() for m in modules for p in m.parameters() if p.requires_grad)
    forget_peak(place)
    with trainer.averaged():
        export_student(student, folder / "pipeline")
    exporting = peak(place) - before
    estimated = estimate(student, prepared.config, trainer.device).memory
    sizes = {
        "base": 4 * num_parameters(network),
        "trained": trained,
        "all networks": all_of_them,
        "peak of the training": training,
        "peak of the export": exporting,
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
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only is not None:
        kind, rank, share, folder = args.only.split(":")
        sizes = measure(kind, int(rank), float(share), args.width, args.batch, args.steps, args.device, Path(folder))
        print(json.dumps(sizes))
        return
    rows = {}
    for kind in TEACHERS:
        ways = {"full": (0, 0.0), "LoRA": (args.rank, 0.0), "LoRA, LoRA corrector": (args.rank, 0.5)}
        for name, (rank, share) in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                if kind == "text":
                    write_text_teacher(args.width, Path(folder) / "teacher")
                command = [sys.executable, __file__, *sys.argv[1:], "--only", f"{kind}:{rank}:{share}:{folder}"]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows[f"{kind}, {name}"] = json.loads(done.stdout.splitlines()[-1])
    columns = list(next(iter(rows.values())))
    print(f"| student (MB, {args.device}) | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name, sizes in rows.items():
        print(f"| {name} | {' | '.join(f'{sizes[column]:,.0f}' for column in columns)} |")
    full, lora = list(rows.values())[:2]
    second = lora["teacher and student"] - lora["base"] - lora["trained"]
    print(
        f"\npeak of the training on pixels, LoRA / full: {lora['peak of the training'] / full['peak of the training']:.2f}"
    )
    if second > 0.01 * lora["base"]:
        sys.exit(f"the LoRA run holds {second:.1f} MB of a second copy of the base weights")
    print("no second copy of the base weights exists: base + trained is all that teacher and student hold")


if __name__ == "__main__":
    main()
