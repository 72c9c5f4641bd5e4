"""What onestill adds to the bare network: per training step, per sample, and in memory over 2,000 steps.

python benchmarks/overhead.py            # ratios, measured in turns within one process
python benchmarks/overhead.py --memory   # 2,000 steps, resident memory every 200
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from onestill.core.tensors import noise
from onestill.evaluation.speed import compare
from onestill.export.export import export_student
from onestill.objectives.registry import rows_of
from onestill.runs.build import build_run
from onestill.runs.folder import PIPELINE_FOLDER
from onestill.runs.load import load_student
from onestill.sampling.generate import teacher_generator
from onestill.teachers.load import load_teacher
from onestill.training.config import make_config
from onestill.training.trainer import Trainer

ALONE: dict[str, Any] = {"anchor_fraction": 0.0, "corrector_fraction": 0.0}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "bootstrap": ALONE,
    "anchors": {"corrector_fraction": 0.0},
    "flow map, half, of anchors": {"corrector_fraction": 0.0, "flow_map_fraction": 0.5},
    "flow map, half, of the student": {**ALONE, "flow_map_fraction": 0.5},
    "corrector, half": {"corrector_fraction": 0.5},
}


def trainer_on_digits(folder: str, *, batch: int = 64, steps: int = 10**6, **settings: Any) -> Trainer:
    """Return a trainer on the embedded digits that logs, validates and saves never within a benchmark."""
    rare = {"checkpointing_steps": 10**6, "validation_steps": 10**6, "logging_steps": 100, "num_anchors": 200}
    given = {"teacher": "digits", "output_dir": f"{folder}/run", "device": "cpu", "max_train_steps": steps, **rare}
    prepared = build_run(make_config({**given, "train_batch_size": batch, **settings}))
    trainer = Trainer(prepared.config, prepared.student, prepared.conditions, prepared.fingerprints)
    prepared.config.output_dir.mkdir(parents=True, exist_ok=True)
    for _ in trainer.prepare():
        pass
    trainer.progress.step = steps // 2  # where every objective has begun
    return trainer


def training_step(name: str, batch: int = 64, repeats: int = 30) -> None:
    """Print a training step beside the sum of its bare passes: each objective's own, and the student's for all rows."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_on_digits(folder, batch=batch, **OBJECTIVES[name])
        config, teacher = trainer.config, load_teacher("digits").network
        networks = [
            trainer.student.network,
            *(load_teacher("digits").network.requires_grad_() for _ in trainer.trained[1:]),
        ]
        optimizers = [torch.optim.AdamW(network.parameters(), lr=1e-12, fused=True) for network in networks]
        costs = [(rows, kind.cost(config, batch)) for kind, rows in rows_of(config, batch).items()]
        x, labels = torch.randn(batch, 1, 8, 8), torch.randint(0, 10, (batch,))
        t = torch.full((batch,), 500.0)

        def forward(network: nn.Module, calls: float) -> Tensor:
            num = round(calls)
            return network(x[:num], t[:num], class_labels=labels[:num]).sample

        def forwards(network: nn.Module, rows: int, calls: float) -> None:
            for part in [rows] * int(calls) + [rows * (calls % 1)]:
                if round(part):
                    forward(network, part)

        def bare() -> None:
            with torch.no_grad():
                for rows, cost in costs:
                    forwards(networks[0], rows, cost.student)
                    forwards(teacher, rows, cost.teacher)
            forward(networks[0], batch).square().mean().backward()
            for rows, cost in costs:
                if cost.learned:
                    forward(networks[1], rows * cost.learned).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

        seconds = compare({"onestill": trainer.update, "bare": bare}, repeats=repeats, warmup=3)
        took, least = (1e3 * seconds[one] for one in ("onestill", "bare"))
        print(
            f"| training step, {name}, batch {batch} | {took:.1f} ms | {least:.1f} ms | {took / least:.3f} |",
            flush=True,
        )


def sampling(batch: int = 64, repeats: int = 20) -> None:
    """Print one-step sampling beside one bare network call, and beside the teacher's DDIM-50."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_on_digits(folder)
        export_student(trainer.student, trainer.config.output_dir / PIPELINE_FOLDER)
        source = load_student(trainer.config.output_dir / PIPELINE_FOLDER).sampler
        many = teacher_generator(trainer.teacher, num_steps=50)
        network = trainer.student.network
        eps, cond = noise(range(batch), (1, 8, 8)), source.conditions(batch)
        t = torch.full((batch,), 999)

        def bare() -> None:
            with torch.no_grad():
                network(eps, t, class_labels=cond["class_labels"])

        one = {"student": lambda: source(eps, cond), "bare": bare, "DDIM-50": lambda: many(eps, cond)}
        seconds = compare(one, repeats=repeats, warmup=2)
        print(
            f"| one-step sampling, batch {batch} | {seconds['student'] * 1e3:.2f} ms | {seconds['bare'] * 1e3:.2f} ms | {seconds['student'] / seconds['bare']:.3f} |"
        )
        print(
            f"| DDIM-50 against one step, batch {batch} | {seconds['DDIM-50'] * 1e3:.1f} ms | {seconds['student'] * 1e3:.2f} ms | {seconds['DDIM-50'] / seconds['student']:.1f} |"
        )


def memory(num_steps: int = 2000, batch: int = 16) -> None:
    """Print the resident memory of this process along a training of 2,000 steps."""
    process = psutil.Process()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_on_digits(folder, batch=batch, steps=num_steps)
        seen = []
        for log in trainer.steps():
            if log.step % 200 == 0:
                seen.append((log.step, process.memory_info().rss / 2**20))
    print("| step | resident MiB |\n|---|---|")
    for step, size in seen:
        print(f"| {step} | {size:.1f} |")
    print(f"\nfrom step 200 to {seen[-2][0]}: {seen[-2][1] - seen[0][1]:+.1f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory:
        memory()
        return
    print(f"| what ({args.threads} threads) | onestill | bare | ratio |\n|---|---|---|---|")
    for name in OBJECTIVES:
        training_step(name)
    sampling()


if __name__ == "__main__":
    main()
