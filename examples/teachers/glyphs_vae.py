"""Train the autoencoder of the embedded text-to-image teacher `glyphs`: 32x32 RGB pictures to 8x8x4 latents.

A stock `AutoencoderKL`, trained on renderings of the training combinations with an L1 and an L2 error and a small
KL term. `scaling_factor` is set such that the latents have unit standard deviation. It is narrow at full size and
has no attention: in a one-step generator the decoder is a good part of the time. A second run trains the decoder
alone, while a U-Net may be trained on the latents, which stay.

    python examples/teachers/glyphs_vae.py --output_dir runs/glyphs/vae
    python examples/teachers/glyphs_vae.py --decoder_of runs/glyphs/vae --max_train_steps 8000 \
        --output_dir runs/glyphs/vae-decoder

The shipped weights: seed 0, 5,000 steps of 32 images (375 s on one CPU core; 27.8 dB on held-out combinations drawn
with unseen masks), then 8,000 steps of the decoder alone (about 20 minutes of a busy core; 30.4 dB).
"""

import argparse
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from glyphs_data import compose, render_masks, split
from torch import Tensor
from tqdm.auto import trange


def build_vae() -> AutoencoderKL:
    """Return the untrained autoencoder."""
    return AutoencoderKL(
        sample_size=32,
        latent_channels=4,
        block_out_channels=(8, 16, 48),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def vae_loss(vae: AutoencoderKL, images: Tensor, kl_weight: float) -> tuple[Tensor, Tensor]:
    """Return (the loss, the mean squared error of the reconstruction)."""
    posterior = vae.encode(images).latent_dist
    error = vae.decode(posterior.sample()).sample - images
    squared = error.square().mean()
    return 0.5 * error.abs().mean() + squared + kl_weight * posterior.kl().mean() / images[0].numel(), squared


@torch.no_grad()
def latent_std(vae: AutoencoderKL, images: Tensor) -> float:
    """Return the standard deviation of the images' latents over all channels."""
    return vae.encode(images).latent_dist.mode().std().item()


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """Return the mean PSNR of the clamped reconstructions in dB."""
    restored = vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
    error = (restored - images).square().flatten(1).mean(1)
    return (10 * torch.log10(4 / error)).mean().item()


def main() -> None:
    """Train, measure on held-out combinations, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--decoder_of", type=Path, help="an autoencoder of this script: its decoder is trained further")
    parser.add_argument("--max_train_steps", type=int, default=5000)
    parser.add_argument("--train_batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--kl_weight", type=float, default=1e-2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    (training, held_out), masks = split(), render_masks(32, seed=0)
    unseen = compose(render_masks(4, seed=1), held_out[:500]).to(args.device)
    vae = build_vae() if args.decoder_of is None else AutoencoderKL.from_pretrained(args.decoder_of)
    vae.to(args.device)
    if args.decoder_of is not None:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    parameters = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=args.learning_rate, total_steps=args.max_train_steps, pct_start=0.1
    )
    ema = EMAModel(parameters, decay=0.999, use_ema_warmup=True, power=0.75)

    started = time.monotonic()
    for step in (bar := trange(args.max_train_steps, mininterval=10)):
        rows = torch.randint(len(training), (args.train_batch_size,))
        loss, squared = vae_loss(vae, compose(masks, training[rows]).to(args.device), args.kl_weight)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        ema.step(parameters)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", psnr=f"{10 * torch.log10(4 / squared).item():.1f}")
        if (step + 1) % 500 == 0 or step + 1 == args.max_train_steps:
            ema.store(parameters)
            ema.copy_to(parameters)
            if args.decoder_of is None:
                vae.register_to_config(scaling_factor=1 / latent_std(vae, unseen))
            vae.save_pretrained(args.output_dir)
            print(f"\nstep {step + 1}: held-out PSNR {psnr(vae, unseen):.2f} dB", flush=True)
            ema.restore(parameters)
    count = sum(p.numel() for p in vae.parameters())
    print(f"{count:,} parameters, scaling_factor {vae.config.scaling_factor:.4f}")
    print(f"{args.max_train_steps} steps, seed {args.seed}, {time.monotonic() - started:.0f} s -> {args.output_dir}")


if __name__ == "__main__":
    main()
