"""Marian: sinusoidal positions computed under no_grad, tied three ways."""

from sequence_to_sequence import BATCH_SIZE as BATCH_SIZE
from sequence_to_sequence import VOCABULARY
from sequence_to_sequence import loss_fn as loss_fn
from sequence_to_sequence import make_batch as make_batch
from transformers import MarianConfig, MarianMTModel


def build_model():
    return MarianMTModel(
        MarianConfig(
            vocab_size=VOCABULARY,
            decoder_vocab_size=VOCABULARY,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=32,
            pad_token_id=3,
            eos_token_id=2,
            decoder_start_token_id=3,
            dropout=0.0,
            use_cache=False,
        )
    )
