"""CIFAR-10: distil the teacher of examples/teachers/cifar10.py, then the whole table against the test images.

python benchmarks/cifar10.py --data_dir DATA --teacher runs/cifar10-teacher --output_dir runs/cifar10 \
    --mixed_precision bf16

Three parts, each skipped or gone on with when the same command runs again: a feature network trained on the
training archive (or --features), the student (without any image), the table. Ctrl-C and SIGTERM save the
student and stop.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional

from onestill.core.devices import resolve_device
from onestill.core.tensors import Cond, noise
from onestill.evaluation import metrics, speed
from onestill.evaluation.classifier import ConvFeatures
from onestill.evaluation.features import ClassifierFeatures, extract
from onestill.evaluation.report import EvaluationProtocol, Report, Row, package_versions
from onestill.evaluation.tables import print_report
from onestill.runs.distill import distill
from onestill.runs.load import load_student
from onestill.sampling import pictures
from onestill.sampling.generate import Generate, generate_images
from onestill.sampling.samplers.base import Sampler
from onestill.sampling.samplers.network import TeacherSampler
from onestill.teachers.guidance import Guided
from onestill.teachers.load import load_teacher

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "teachers"))
from cifar10_data import NUM_CLASSES, LabelledImages, load_images, to_floats

NULL_CLASS = NUM_CLASSES
TEACHER_STEPS = (50, 10, 4, 1)
SETTINGS: dict[str, Any] = {"lr_scheduler": "cosine", "null_class": NULL_CLASS}
REFERENCE_SEED = 10_000_000
NEIGHBOURS, KERNEL_SUBSETS = 3, 50
RECONSTRUCTION_WEIGHT = 5.0
MAX_SHIFT_PIXELS = 4


# The feature network


def augmented(images: Tensor) -> Tensor:
    """Return the images, half of them mirrored, each shifted by up to 4 pixels into its own reflection."""
    num, channels, size, _ = images.shape
    images = torch.where(torch.rand(num, 1, 1, 1, device=images.device) < 0.5, images.flip(3), images)
    padded = functional.pad(images, (MAX_SHIFT_PIXELS,) * 4, mode="reflect")
    shift = torch.randint(2 * MAX_SHIFT_PIXELS + 1, (2, num, 1), device=images.device)
    rows, columns = shift + torch.arange(size, device=images.device)
    batch = torch.arange(num, device=images.device)[:, None, None, None]
    layer = torch.arange(channels, device=images.device)[:, None, None]
    return padded[batch, layer, rows[:, None, :, None], columns[:, None, None, :]]


def train_features(args: argparse.Namespace, path: Path, train: LabelledImages, test: LabelledImages) -> None:
    """Train a wide `ConvFeatures`, measure it on the test images, and write it.

    Minimises cross-entropy + weight * reconstruction error by AdamW with a one-cycle learning rate. The
    linear decoder of the pixels is thrown away afterwards: it keeps the features from forgetting all but the
    class.
    """
    device, started = resolve_device(args.device), time.monotonic()
    torch.manual_seed(args.seed)
    model = ConvFeatures(
        in_channels=3,
        num_classes=NUM_CLASSES,
        width=args.feature_width,
        num_stages=3,
        blocks_per_stage=2,
        feature_dim=2 * args.feature_width,
        dropout=0.2,
    ).to(device, memory_format=torch.channels_last)
    decoder = torch.nn.Linear(model.embed.out_features, train.pixels[0].numel()).to(device)
    parameters = [*model.parameters(), *decoder.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=args.feature_learning_rate, weight_decay=0.05, fused=device.type in ("cpu", "cuda")
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=args.feature_learning_rate, total_steps=args.feature_steps, pct_start=0.2
    )
    train = train.to(device)
    model.train()
    for step in range(args.feature_steps):
        rows = torch.randint(len(train.pixels), (args.feature_batch_size,), device=device)
        batch = augmented(to_floats(train.pixels[rows])).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
            features = model.features(batch)
            logits, decoded = model.head(model.dropout(features)), decoder(features)
        loss = functional.cross_entropy(logits.float(), train.labels[rows])
        loss = loss + RECONSTRUCTION_WEIGHT * functional.mse_loss(decoded.float(), batch.flatten(1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 500 == 0:
            print(f"features: step {step + 1:,}/{args.feature_steps:,}  loss {loss.item():.4f}", flush=True)
    accuracy = label_accuracy(ClassifierFeatures(model), to_floats(test.pixels), test.labels)
    model.record = {
        "data": "CIFAR-10, the training archive",
        "num_train_images": len(train.pixels),
        "num_held_out_images": len(test.pixels),
        "held_out_accuracy": accuracy,
        "seed": args.seed,
        "max_train_steps": args.feature_steps,
        "reconstruction_weight": RECONSTRUCTION_WEIGHT,
    }
    model.save(path)
    seconds = time.monotonic() - started
    print(f"features: accuracy on the test archive {accuracy:.4f}, {seconds:.0f} s -> {path}", flush=True)


def label_accuracy(extractor: ClassifierFeatures, images: Tensor, labels: Tensor, num: int = 500) -> float:
    """Return the share of images that show their label, computed `num` at a time."""
    with torch.no_grad():
        logits = torch.cat([extractor.logits(batch).cpu() for batch in images.split(num)])
    return metrics.label_accuracy(logits, labels)


# The student


def distil(args: argparse.Namespace) -> Path:
    """Distil the teacher, or go on; return the run's folder. A signal that stops it ends the script."""
    run, started, steps = args.output_dir / "student", time.monotonic(), args.max_train_steps
    result = distill(
        args.teacher,
        run,
        max_train_steps=steps,
        train_batch_size=args.train_batch_size,
        learning_rate=args.learning_rate,
        lr_warmup_steps=min(100, steps // 10),
        guidance_scale=args.guidance_scale,
        seed=args.seed,
        device=args.device,
        mixed_precision=args.mixed_precision,
        checkpointing_steps=max(1, min(1000, steps // 2)),
        validation_steps=max(1, steps // 5),
        resume_from_checkpoint="latest",
        show_progress=args.progress,
        **SETTINGS,
    )
    minutes = (time.monotonic() - started) / 60
    if result.stopped_by is not None:
        print(f"student: stopped at step {result.step:,} of {steps:,}; the same command goes on")
        raise SystemExit(128 + result.stopped_by)
    error = "" if result.export_error is None else f", export differs by {result.export_error:.1e}"
    print(f"student: step {result.step:,}, {minutes:.1f} minutes this time{error} -> {run}", flush=True)
    return run


# The table


def rows_of(args: argparse.Namespace, run: Path, device: torch.device) -> dict[str, Sampler]:
    """Return the samplers of the table by name: the teacher's first, the student's last."""
    teacher = load_teacher(args.teacher, null_class=NULL_CLASS, device=str(device))
    guided = Guided(teacher, args.guidance_scale)
    sources = {f"DDIM-{n}": TeacherSampler(guided, num_steps=n, device=device) for n in TEACHER_STEPS}
    return {**sources, "student": load_student(run, device=device).sampler}


def in_precision(generate: Generate, device: torch.device, mixed_precision: str) -> Generate:
    """Return the same generator with its networks in the precision of the run; images stay float32."""

    def lowered(eps: Tensor, cond: Cond) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision == "bf16"):
            return generate(eps, cond).float()

    return lowered


def measure_speeds(
    sources: dict[str, Sampler], generate: dict[str, Generate], num: int, rounds: int, device: torch.device
) -> dict[str, float]:
    """Return images per second of each row in batches of `num`, all rows timed in turns."""

    def call(name: str) -> Callable[[], object]:
        source = sources[name]
        eps, cond = noise(range(num), source.sample_shape), source.conditions(num)
        return lambda: generate[name](eps, cond)

    seconds = speed.compare({name: call(name) for name in sources}, device=device, repeats=rounds)
    return {name: num / value for name, value in seconds.items()}


def make_report(
    args: argparse.Namespace,
    sources: dict[str, Sampler],
    samples: dict[str, Tensor],
    speeds: tuple[dict[str, float], dict[str, float]],
    reference: tuple[str, Tensor],
    extractor: ClassifierFeatures,
    device: torch.device,
) -> Report:
    """Return the table of all samples against one reference."""
    real = extract(extractor, reference[1])
    one, large = speeds
    subset = min(1000, len(real), args.num_samples)
    rows = []
    for name, source in sources.items():
        fake = extract(extractor, samples[name])
        kernel, spread = metrics.kernel_distance(real, fake, subset_size=subset, num_subsets=KERNEL_SUBSETS)
        precision, recall = metrics.precision_recall(real, fake, k=NEIGHBOURS)
        rows.append(
            Row(
                name=name,
                is_student=name == "student",
                num_steps=source.num_steps,
                network_evaluations=source.evaluations,
                frechet_distance=metrics.frechet_distance(real, fake),
                kernel_distance=kernel,
                kernel_distance_std=spread,
                precision=precision,
                recall=recall,
                label_accuracy=label_accuracy(
                    extractor, samples[name], source.conditions(args.num_samples)["class_labels"]
                ),
                images_per_second=one[name],
                images_per_second_large=large[name],
                speedup=large[name] / large[next(iter(large))],
            )
        )
    warning = metrics.sample_warning(len(real), args.num_samples, real.shape[1])
    hardware = f"{device}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    protocol = EvaluationProtocol(
        teacher=args.teacher.name,
        student=f"{args.max_train_steps:,} steps of {args.train_batch_size:,} images, seed {args.seed}",
        extractor=extractor.name,
        feature_dim=real.shape[1],
        num_images=args.num_samples,
        reference=reference[0],
        num_reference_images=len(real),
        seeds=f"{args.seed}..{args.seed + args.num_samples - 1}",
        guidance_scale=args.guidance_scale,
        device=hardware,
        dtype="float32" if args.mixed_precision == "no" else "bfloat16 autocast",
        large_batch_size=args.batch_size,
        kernel_subset_size=subset,
        kernel_num_subsets=KERNEL_SUBSETS,
        neighbours=NEIGHBOURS,
        speedup_over=next(iter(sources)),
        versions=package_versions(),
    )
    return Report(protocol=protocol, rows=tuple(rows), warnings=(warning,) if warning else ())


def draw(args: argparse.Namespace, source: Sampler, generate: Generate, first_seed: int) -> Tensor:
    """Return `num_samples` images of a sampler, clipped as any pipeline's output is."""
    seeds, cond = range(first_seed, first_seed + args.num_samples), source.conditions(args.num_samples)
    images = generate_images(generate, seeds, source.sample_shape, cond, batch_size=args.batch_size)
    return images.clamp(-1, 1)


def evaluate(args: argparse.Namespace, run: Path, extractor: ClassifierFeatures, test: Tensor) -> None:
    """Draw all samples once; compare them with the test images and, if asked, with the teacher's own."""
    device = resolve_device(args.device)
    sources = rows_of(args, run, device)
    generate = {name: in_precision(s, device, args.mixed_precision) for name, s in sources.items()}
    samples = {}
    for name, source in sources.items():
        started = time.monotonic()
        samples[name] = draw(args, source, generate[name], args.seed)
        print(f"{name}: {args.num_samples:,} images, {time.monotonic() - started:.0f} s", flush=True)
    one, large = (measure_speeds(sources, generate, num, args.speed_rounds, device) for num in (1, args.batch_size))
    references = {"evaluation": ("the CIFAR-10 test images", test)}
    if args.teacher_reference:
        name = next(iter(sources))
        images = draw(args, sources[name], generate[name], REFERENCE_SEED)
        words = f"the teacher's own {name} samples, seeds {REFERENCE_SEED}.."
        references["evaluation-teacher"] = (words, images)
    for folder, reference in references.items():
        report = make_report(args, sources, samples, (one, large), reference, extractor, device)
        report.save(args.output_dir / folder, overwrite=True)
        print_report(report, Console(width=100))
    rows = {name: images[: 2 * NUM_CLASSES] for name, images in samples.items()}
    picture = args.output_dir / "evaluation" / "samples.png"
    pictures.save_rows(rows, picture, title="same noise in every column")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder with the two archives")
    parser.add_argument("--teacher", type=Path, required=True, help="folder of the teacher's pipeline")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_train_steps", type=int, default=3000)
    parser.add_argument("--train_batch_size", type=int, default=256)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--guidance_scale", type=float, default=1.5)
    parser.add_argument("--num_samples", type=int, default=10_000)
    parser.add_argument("--batch_size", type=int, default=500, help="images per call of a sampler")
    parser.add_argument("--speed_rounds", type=int, default=5, help="each sampler is timed so often")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--features", type=Path, help="a ConvFeatures file; else one is trained, once")
    parser.add_argument("--feature_steps", type=int, default=4000)
    parser.add_argument("--feature_batch_size", type=int, default=256)
    parser.add_argument("--feature_learning_rate", type=float, default=2e-3)
    parser.add_argument("--feature_width", type=int, default=128)
    parser.add_argument("--teacher_reference", action="store_true", help="compare with its samples too")
    parser.add_argument("--progress", action="store_true", help="show the distillation's progress bar")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train the feature network, distil, and write the table."""
    args = parse(argv)
    resolve_device(args.device)
    device = resolve_device(args.device)
    # An export is compared with its student to 1e-4, on two devices; convolutions in TF32 differ by more.
    torch.backends.cudnn.allow_tf32 = False
    test = load_images(args.data_dir, "test", args.output_dir / "test.safetensors")
    path = args.features or args.output_dir / "features.safetensors"
    if not path.is_file() and args.features is None:
        train = load_images(args.data_dir, "train", args.output_dir / "train.safetensors")
        train_features(args, path, train, test)
    extractor = ClassifierFeatures(ConvFeatures.load(path, device=device))
    print(f"features: {extractor.name}", flush=True)
    evaluate(args, distil(args), extractor, to_floats(test.pixels))


if __name__ == "__main__":
    main()
