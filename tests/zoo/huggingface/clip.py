"""CLIP: a text and an image tower, compared by a contrastive loss within each microbatch."""

import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel

BATCH_SIZE = 4
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def build_model():
    text = {**SIZES, "vocab_size": 101, "max_position_embeddings": 16, "eos_token_id": 100}
    images = {**SIZES, "image_size": 16, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=images, projection_dim=16))


def make_batch(batch_size):
    text = torch.randint(4, 100, (batch_size, 8))
    text[:, -1] = 100
    images = torch.randn(batch_size, 3, 16, 16)
    return {"input_ids": text, "pixel_values": images}, torch.zeros(batch_size)


def loss_fn(output, targets):
    pairs = torch.arange(len(targets))
    by_text = nn.functional.cross_entropy(output.logits_per_text, pairs)
    return (by_text + nn.functional.cross_entropy(output.logits_per_image, pairs)) / 2
