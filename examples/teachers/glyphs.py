"""Train the embedded text-to-image teacher `glyphs`: letters and digits, drawn as the caption says.

A stock `StableDiffusionPipeline` in every part, only small: a CLIP tokenizer whose byte-pair merges spell the
captions' words, a CLIP text encoder trained from scratch beside the U-Net, the autoencoder of `glyphs_vae.py`,
and a v-prediction `DDIMScheduler` at zero terminal SNR. A share of the captions is empty, so that
classifier-free guidance works. `glyphs_data.py` says what the pictures are and which combinations are held out.

    python examples/teachers/glyphs.py --vae runs/glyphs/vae \
        --output_dir runs/glyphs/pipeline --state runs/glyphs/state.pt --threads 2

A killed run goes on with the same command; with a larger `--max_train_steps`, a finished one goes on too, at the
learning rate of the longer cosine. Then `pipeline/` becomes `src/onestill/embedded/glyphs/`, with the `vae/` whose
decoder was trained further (`glyphs_vae.py --decoder_of`) in the place of its own: the latents are the same.

The U-Net does most of its work at the full 8x8, where a parameter is used 64 times: one step has to outweigh the
decoder, the tokenizer and the pipeline's own code beside it. One layer of text encoder is enough for words that are
tokens. The shipped weights: seed 0, 10,000 steps of 32 images, 38 minutes on two CPU cores. U-Net 3,844,220
parameters, text encoder 166,656. `glyphs_evaluate.py` has the numbers.
"""

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from glyphs_data import HEADS, caption, compose, render_masks, split
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import trange
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

MAX_TOKENS = 16
_END_OF_WORD = "</w>"


def byte_pairs(words: list[str]) -> list[tuple[str, str]]:
    """Return the merges, most frequent pair first, after which every word is one token."""
    spellings = [[*word[:-1], word[-1] + _END_OF_WORD] for word in words]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for parts in spellings for pair in pairwise(parts)):
        merges.append(max(sorted(pairs), key=pairs.__getitem__))
        spellings = [_merged(parts, merges[-1]) for parts in spellings]
    return merges


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """Return a spelling with each occurrence of the pair made one token, from the left."""
    result: list[str] = []
    for part in parts:
        # A token that came of this merge is no first half of it: it is longer than the pair's.
        if result and (result[-1], part) == pair:
            result[-1] += part
        else:
            result.append(part)
    return result


def build_tokenizer() -> CLIPTokenizer:
    """Return a CLIP tokenizer to which each word of a caption is one token; it spells any other ASCII text."""
    words = {"a", "an", "on", "background", *(name.lower() for names in HEADS.values() for name in names)}
    merges = byte_pairs(sorted(words))
    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(letter + _END_OF_WORD for letter in letters), *("".join(pair) for pair in merges)]
    vocab = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps(vocab))
        Path(folder, "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
        return CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS)


def build_pipeline(vae: AutoencoderKL) -> StableDiffusionPipeline:
    """Return the pipeline, untrained but for the autoencoder."""
    tokenizer = build_tokenizer()
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(104, 64),
        layers_per_block=[2, 1],
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,  # of diffusers' making: for this class it is the number of heads
        norm_num_groups=8,
    )
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # what the pipeline wants to see; "trailing" has no use for it
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def token_ids(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Return the tokens [N, 16] as the pipeline makes them."""
    return tokenizer(
        prompts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


@torch.no_grad()
def encode_pool(vae: AutoencoderKL, rows: Tensor, variants: int, seed: int) -> Tensor:
    """Return scaled latents [N, variants, 4, 8, 8], float16, of pictures drawn for each row of labels."""
    masks, generator = render_masks(32, seed=0), torch.Generator().manual_seed(seed)
    chunks = []
    for chunk in rows.repeat_interleave(variants, dim=0).split(256):
        images = compose(masks, chunk, generator).to(vae.device)
        chunks.append((vae.encode(images).latent_dist.mode() * vae.config.scaling_factor).half().cpu())
    return torch.cat(chunks).unflatten(0, (len(rows), variants))


def make_shippable(folder: Path) -> None:
    """Round all weights of a diffusers folder to float16 and forget where its parts came from.

    The classes load the weights into float32 again.
    """
    for path in folder.glob("*/*.safetensors"):
        save_file({key: value.half() for key, value in load_file(path).items()}, path, {"format": "pt"})
    for path in folder.glob("*/config.json"):
        facts = json.loads(path.read_text(encoding="utf-8"))
        facts.pop("_name_or_path", None)
        path.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_state(path: Path, state: dict[str, object]) -> None:
    """Write the training state in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def main() -> None:
    """Train, and save the averaged weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--max_train_steps", type=int, default=10000)
    parser.add_argument("--train_batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--caption_dropout", type=float, default=0.1)
    parser.add_argument("--pool_variants", type=int, default=2)
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    vae = AutoencoderKL.from_pretrained(args.vae).to(args.device).eval().requires_grad_(False)
    pipeline = build_pipeline(vae).to(args.device)
    unet, text_encoder, scheduler = pipeline.unet.train(), pipeline.text_encoder.train(), pipeline.scheduler
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.01, fused=True)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=300, num_training_steps=args.max_train_steps)
    ema = EMAModel(parameters, decay=0.9995, use_ema_warmup=True, power=0.75, foreach=True)
    parts = {"unet": unet, "text_encoder": text_encoder, "optimizer": optimizer, "schedule": schedule, "ema": ema}

    first, seconds = 0, 0.0
    if args.state.exists():
        state = torch.load(args.state, weights_only=True, map_location=args.device)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        first, seconds = state["step"], state["seconds"]
        torch.set_rng_state(state["random"].cpu())
    random = torch.get_rng_state()
    training, _ = split()
    pool = encode_pool(vae, training, args.pool_variants, args.seed)
    ids = token_ids(pipeline.tokenizer, [caption(row) for row in training])
    empty = token_ids(pipeline.tokenizer, [""])
    torch.set_rng_state(random)

    started, batch = time.monotonic() - seconds, args.train_batch_size
    for step in (bar := trange(first, args.max_train_steps, initial=first, total=args.max_train_steps, mininterval=10)):
        rows, variant = torch.randint(len(pool), (batch,)), torch.randint(args.pool_variants, (batch,))
        x_0, eps = pool[rows, variant].float(), torch.randn(batch, *pool.shape[2:])
        tokens = torch.where(torch.rand(batch, 1) < args.caption_dropout, empty, ids[rows])
        # Stratified times: the variance of the loss falls, the expectation stays.
        index = ((torch.arange(batch) + torch.rand(batch)) / batch * 1000).long()
        x_0, eps, tokens, index = (tensor.to(args.device) for tensor in (x_0, eps, tokens, index))
        hidden = text_encoder(tokens).last_hidden_state
        prediction = unet(scheduler.add_noise(x_0, eps, index), index, encoder_hidden_states=hidden).sample
        loss = torch.nn.functional.mse_loss(prediction, scheduler.get_velocity(x_0, eps, index))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(parameters)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % args.checkpointing_steps == 0 or step + 1 == args.max_train_steps:
            seconds = time.monotonic() - started
            state = {name: part.state_dict() for name, part in parts.items()}
            save_state(args.state, {**state, "step": step + 1, "seconds": seconds, "random": torch.get_rng_state()})
            ema.store(parameters)
            ema.copy_to(parameters)
            pipeline.save_pretrained(args.output_dir, safe_serialization=True)
            make_shippable(args.output_dir)
            ema.restore(parameters)
    count = {name: sum(p.numel() for p in parts[name].parameters()) for name in ("unet", "text_encoder")}
    print(f"parameters {count}, {args.max_train_steps} steps, seed {args.seed}, {seconds:.0f} s -> {args.output_dir}")


if __name__ == "__main__":
    main()
