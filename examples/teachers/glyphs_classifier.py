"""Train the classifier whose features and labels judge the embedded text-to-image teacher `glyphs`.

One `ConvFeatures` network with five heads: its logits are those of the heads side by side, and in the metadata of the
file `record["heads"]` names the heads and their classes in this order, and `record["prompt_pattern"]` where a caption
says each of them. It sees renderings of the training combinations (masks of seed 0), half of them with a little noise;
held-out combinations drawn with masks of seed 1 give the accuracies on record. As with the digits, the features also
feed a linear decoder of the (coarse) picture while training, so that they keep what it looks like.

    python examples/teachers/glyphs_classifier.py --output src/onestill/embedded/glyphs/classifier.safetensors

With `--keep_weights` nothing is trained: heads and pattern are written anew into the metadata of a file that is there.

The shipped weights: seed 0, 4,000 steps of 64 images, 14 minutes on a shared core, stored as float16. On 3,528 unseen
renderings: character, color and background 1.000, style 0.9997, family 0.965 (a regular or italic F, L, P or 1 of the
sans family is much like that of the mono family), all five 0.965.
"""

import argparse
import time
from pathlib import Path

import torch
from glyphs_data import HEADS, PROMPT_PATTERN, compose, render_masks, split
from torch import Tensor
from torch.nn import functional
from tqdm.auto import trange

from onestill.evaluation.classifier import ConvFeatures
from onestill.evaluation.features import ClassifierFeatures, extract
from onestill.evaluation.heads import head_accuracies, head_hits, split_logits
from onestill.evaluation.metrics import frechet_distance

READING = {"heads": {name: list(classes) for name, classes in HEADS.items()}, "prompt_pattern": PROMPT_PATTERN}
"""What `evaluate` needs to judge a prompt's picture: the order of the logits, and where a prompt says each value."""


def head_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the heads' cross-entropies for labels [N, 5]."""
    parts = split_logits(logits, HEADS).values()
    return torch.stack(
        [functional.cross_entropy(part, label) for part, label in zip(parts, labels.T, strict=True)]
    ).sum()


def _noised(images: Tensor) -> Tensor:
    """Return the images, half of them with noise of up to a fiftieth of their range, and clipped."""
    level = torch.rand(len(images), 1, 1, 1) * 0.04 * (torch.rand(len(images), 1, 1, 1) < 0.5)
    return (images + level * torch.randn_like(images)).clamp(-1, 1)


def train(model: ConvFeatures, masks: Tensor, training: Tensor, args: argparse.Namespace) -> None:
    """Minimise the heads' cross-entropies + weight * reconstruction error by AdamW with a one-cycle rate."""
    decoder = torch.nn.Linear(model.embed.out_features, 3 * 16 * 16).to(args.device)
    parameters = [*model.parameters(), *decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=args.learning_rate, total_steps=args.max_train_steps, pct_start=0.1
    )
    model.train()
    for step in (bar := trange(args.max_train_steps, mininterval=10)):
        labels = training[torch.randint(len(training), (args.train_batch_size,))]
        images = compose(masks, labels)
        batch, labels = _noised(images).to(args.device), labels.to(args.device)
        features = model.features(batch)
        coarse = functional.avg_pool2d(images.to(args.device), 2).flatten(1)
        loss = head_loss(model.head(model.dropout(features)), labels)
        loss = loss + args.reconstruction_weight * functional.mse_loss(decoder(features), coarse)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    model.eval()


def main() -> None:
    """Train, measure on held-out combinations drawn with unseen masks, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--max_train_steps", type=int, default=4000)
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--reconstruction_weight", type=float, default=2.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep_weights", action="store_true", help="only write heads and pattern anew")
    args = parser.parse_args()

    torch.set_num_threads(1)
    if args.keep_weights:
        model = ConvFeatures.load(args.output)
        model.record |= READING
        model.half().save(args.output)
        return
    torch.manual_seed(args.seed)
    training, held_out = split()
    num_classes = sum(map(len, HEADS.values()))
    model = ConvFeatures(in_channels=3, num_classes=num_classes, width=16, num_stages=4, feature_dim=64, dropout=0.1)
    model.to(args.device)
    started = time.monotonic()
    train(model, render_masks(32, seed=0), training, args)

    labels = held_out.repeat(2, 1)
    images = compose(render_masks(16, seed=1), labels).to(args.device)
    judge = ClassifierFeatures(model)
    shares = head_accuracies(head_hits(judge.logits(images), labels, HEADS), HEADS)
    features = extract(judge, images)
    floor = frechet_distance(features[: len(held_out)], features[len(held_out) :])
    model.record = {
        "data": "glyphs of the DejaVu fonts of matplotlib, held-out combinations, unseen masks",
        **READING,
        "num_held_out_images": len(images),
        "held_out_accuracy": shares["all"],
        "held_out_accuracy_per_head": {name: shares[name] for name in HEADS},
        "seed": args.seed,
        "max_train_steps": args.max_train_steps,
        "reconstruction_weight": args.reconstruction_weight,
    }
    model.half().save(args.output)  # `ConvFeatures.load` makes float32 of it again
    shown = ", ".join(f"{name} {share:.4f}" for name, share in shares.items())
    print(f"{shown}; Fréchet distance of the two halves {floor:.4f}")
    print(f"{args.max_train_steps} steps, seed {args.seed}, {time.monotonic() - started:.0f} s -> {args.output}")


if __name__ == "__main__":
    main()
