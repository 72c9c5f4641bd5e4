"""Measure the embedded text-to-image teacher `glyphs` on held-out captions, through the pipeline's own call.

For each guidance scale and number of DDIM steps: the share of held-out captions whose character, color,
background, style and family the classifier finds in the picture, and the Fréchet distance of its features to
those of real renderings of the same captions (masks of a seed of their own).

    python examples/teachers/glyphs_evaluate.py --teacher src/onestill/embedded/glyphs --grid runs/glyphs/grid.png

docs/results.md has the numbers of the shipped weights. A thousand pictures at 50 steps with guidance take about 150 CPU
seconds.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from glyphs_data import REFERENCE_SEED, caption, compose, render_masks, split
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from onestill.evaluation.classifier import ConvFeatures
from onestill.evaluation.features import ClassifierFeatures, extract
from onestill.evaluation.heads import head_accuracies, head_hits
from onestill.evaluation.metrics import frechet_distance


def generate(
    pipeline: StableDiffusionPipeline,
    prompts: list[str],
    guidance_scale: float,
    steps: int,
    seed: int,
    batch: int = 100,
) -> Tensor:
    """Return pictures [N, 3, 32, 32] in [-1, 1], rounded as they would be stored; seed + i makes picture i."""
    chunks = []
    for first in tqdm(range(0, len(prompts), batch), desc=f"w={guidance_scale} steps={steps}", leave=False):
        texts = prompts[first : first + batch]
        generators = [torch.Generator().manual_seed(seed + first + i) for i in range(len(texts))]
        images = pipeline(
            texts, guidance_scale=guidance_scale, num_inference_steps=steps, generator=generators, output_type="np"
        ).images
        chunks.append(torch.from_numpy((images * 255).round() / 127.5 - 1).permute(0, 3, 1, 2).float())
    return torch.cat(chunks)


def save_grid(images: Tensor, path: Path, columns: int = 16, zoom: int = 2) -> None:
    """Write pictures in [-1, 1] as one PNG, row by row."""
    rows = images[: len(images) // columns * columns].unflatten(0, (-1, columns))
    pixels = ((rows + 1) * 127.5).round().to(torch.uint8).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    picture = Image.fromarray(np.ascontiguousarray(pixels.numpy()))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(path)


def main() -> None:
    """Print one line for each guidance scale and number of steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--classifier", type=Path, help="by default the one beside the teacher")
    parser.add_argument("--guidance_scales", type=float, nargs="+", default=[1.0, 2.0, 3.0, 5.0])
    parser.add_argument("--steps", type=int, nargs="+", default=[50])
    parser.add_argument("--num_images", type=int, default=1000)
    parser.add_argument("--grid", type=Path, help="where the first 96 pictures are drawn, _w3_s50 added to the name")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(1)
    pipeline = StableDiffusionPipeline.from_pretrained(args.teacher, local_files_only=True).to(args.device)
    pipeline.set_progress_bar_config(disable=True)
    classifier = ConvFeatures.load(args.classifier or args.teacher / "classifier.safetensors")
    extractor = ClassifierFeatures(classifier)
    _, held_out = split()
    labels = held_out.repeat(-(-args.num_images // len(held_out)), 1)[: args.num_images]
    prompts = [caption(row) for row in labels]
    real = compose(render_masks(16, REFERENCE_SEED), labels, torch.Generator().manual_seed(REFERENCE_SEED))
    rows = {"real": (real, 0.0)}
    print(f"{args.num_images} held-out captions, seeds {args.seed}..{args.seed + args.num_images - 1}")
    for steps in args.steps:
        for scale in args.guidance_scales:
            started = time.monotonic()
            images = generate(pipeline, prompts, scale, steps, args.seed)
            rows[f"w={scale:g} steps={steps}"] = images, time.monotonic() - started
            if args.grid:
                save_grid(images[:96], args.grid.with_stem(f"{args.grid.stem}_w{scale:g}_s{steps}"))
            for name in list(rows):
                images, seconds = rows.pop(name)
                hits = head_hits(extractor.logits(images), labels, classifier.heads)
                shares = head_accuracies(hits, classifier.heads)
                shown = " ".join(f"{head} {share:.3f}" for head, share in shares.items())
                distance = frechet_distance(extract(extractor, real), extract(extractor, images))
                print(f"{name}: {shown} | Fréchet {distance:.3f} | {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
