"""A tiny random CLIP on disk: letters are its words, pictures are 16 x 16."""

import string
from pathlib import Path

import torch

MAX_TOKENS = 12


def write_clip(folder: Path) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocabulary = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    half = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        "vocab_size": len(vocabulary),
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": vocabulary["<|startoftext|>"],
        "eos_token_id": vocabulary["<|endoftext|>"],
    }
    config = CLIPConfig(
        text_config={**half, **text}, vision_config={**half, "image_size": 16, "patch_size": 8}, projection_dim=8
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    pixels = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(pixels, CLIPTokenizer(vocab=vocabulary, merges=[])).save_pretrained(folder)
    return folder
