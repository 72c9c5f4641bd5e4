"""Train the classifier whose features and labels judge the embedded `digits` teacher and its students.

The 1,797 real digits of scikit-learn (8x8 pixels, 17 grey levels) are split by a stratified draw: four fifths
train the classifier, one fifth is held out and gives the accuracy on record. The shipped weights are trained
on those four fifths only, so that accuracy is theirs. Training images are shifted by fractions of a pixel.

A classifier is free to forget everything but the class, and metrics on such features would call ten blurred
averages a good sample. So the features also feed a linear decoder of the pixels while training (it is thrown
away afterwards): they keep what the image looks like.

A second file holds the real digits as the reference of the evaluation: `images` [1797, 1, 8, 8] uint8 in
0..16 (floats in [-1, 1] are `images / 8 - 1`, exactly), `labels` [1797] uint8 and `held_out` [1797] bool.
It is for evaluation only; distillation never reads it.

    python examples/teachers/digits_classifier.py \
        --output src/onestill/embedded/digits/classifier.safetensors \
        --images_output src/onestill/embedded/digits/images.safetensors

The shipped weights: seed 0, 2,500 steps, batch 64, about a minute on one CPU core.
Held-out accuracy with seeds 0, 1 and 2 (other splits, other weights): 0.994, 0.994 and 1.000.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional
from tqdm.auto import trange

from onestill.evaluation.classifier import ConvFeatures
from onestill.evaluation.features import ClassifierFeatures, extract
from onestill.evaluation.metrics import frechet_distance, label_accuracy

MAX_SHIFT_PIXELS = 0.75


def load_images(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ([1797, 1, 8, 8] uint8 in 0..16, [1797] labels, [1797] whether held out)."""
    data = load_digits()
    labels = torch.tensor(data.target)
    _, rows = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=seed)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    held_out[rows] = True
    return torch.tensor(data.images, dtype=torch.uint8)[:, None], labels, held_out


def shifted(images: Tensor) -> Tensor:
    """Return the images, half of them shifted by up to `MAX_SHIFT_PIXELS` both ways on black ground."""
    # Bicubic, and half stay as they are: the features must not learn that blur is harmless.
    shift = (torch.rand(len(images), 2) * 2 - 1) * MAX_SHIFT_PIXELS * 2 / images.shape[-1]
    theta = torch.eye(2, 3).repeat(len(images), 1, 1)
    theta[:, :, 2] = shift
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    moved = functional.grid_sample(images + 1, grid, mode="bicubic", align_corners=False).clamp(0, 2) - 1
    return torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images, moved)


def train(model: ConvFeatures, images: Tensor, labels: Tensor, args: argparse.Namespace) -> None:
    """Minimise cross-entropy + weight * reconstruction error by AdamW with a one-cycle learning rate."""
    decoder = torch.nn.Linear(model.embed.out_features, images[0].numel())
    parameters = [*model.parameters(), *decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=args.learning_rate, total_steps=args.max_train_steps, pct_start=0.1
    )
    model.train()
    for step in (bar := trange(args.max_train_steps)):
        rows = torch.randint(len(images), (args.train_batch_size,))
        batch = shifted(images[rows])
        features = model.features(batch)
        loss = functional.cross_entropy(model.head(model.dropout(features)), labels[rows])
        loss = loss + args.reconstruction_weight * functional.mse_loss(decoder(features), batch.flatten(1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    model.eval()


def main() -> None:
    """Train, measure on the held-out digits, and write both files."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--images_output", type=Path, required=True)
    parser.add_argument("--max_train_steps", type=int, default=2500)
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--reconstruction_weight", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    pixels, labels, held_out = load_images(args.seed)
    images = pixels / 8 - 1
    model = ConvFeatures(in_channels=1, num_classes=10, width=32, num_stages=2, feature_dim=64, dropout=0.2)
    started = time.monotonic()
    train(model, images[~held_out], labels[~held_out], args)

    extractor = ClassifierFeatures(model)
    with torch.no_grad():
        accuracy = label_accuracy(extractor.logits(images[held_out]), labels[held_out])
    floor = frechet_distance(extract(extractor, images[~held_out]), extract(extractor, images[held_out]))
    model.record = {
        "data": "scikit-learn digits, stratified split",
        "num_train_images": int((~held_out).sum()),
        "num_held_out_images": int(held_out.sum()),
        "held_out_accuracy": accuracy,
        "seed": args.seed,
        "max_train_steps": args.max_train_steps,
        "reconstruction_weight": args.reconstruction_weight,
    }
    model.save(args.output)
    args.images_output.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {"images": pixels.contiguous(), "labels": labels.to(torch.uint8), "held_out": held_out},
        args.images_output,
        {"onestill": json.dumps({"kind": "onestill.Images", "max_value": 16, "source": "scikit-learn digits"})},
    )
    print(f"held-out accuracy {accuracy:.4f}, Fréchet distance held-out to training images {floor:.3f}")
    seconds = time.monotonic() - started
    print(f"{args.max_train_steps} steps, seed {args.seed}, {seconds:.0f} s -> {args.output}")


if __name__ == "__main__":
    main()
