"""Whisper: convolutions over a spectrogram, an encoder, a decoder, and a head tied to its embedding."""

import torch
from torch import nn
from transformers import WhisperConfig, WhisperForConditionalGeneration

BATCH_SIZE = 4
VOCABULARY, FRAMES, BINS, LENGTH = 101, 16, 8, 6


def build_model():
    return WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=VOCABULARY,
            num_mel_bins=BINS,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_source_positions=FRAMES,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=3,
            dropout=0.0,
            use_cache=False,
        )
    )


def make_batch(batch_size):
    text = torch.randint(4, VOCABULARY, (batch_size, LENGTH + 1))
    sound = torch.randn(batch_size, BINS, 2 * FRAMES)
    return {"input_features": sound, "decoder_input_ids": text[:, :-1].contiguous()}, text[:, 1:].contiguous()


def loss_fn(output, targets):
    return nn.functional.cross_entropy(output.logits.flatten(0, 1), targets.flatten())
