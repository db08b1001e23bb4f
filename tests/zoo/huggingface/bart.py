"""BART: encoder and decoder with learned positions, one embedding for both and the head."""

from sequence_to_sequence import BATCH_SIZE as BATCH_SIZE
from sequence_to_sequence import VOCABULARY
from sequence_to_sequence import loss_fn as loss_fn
from sequence_to_sequence import make_batch as make_batch
from transformers import BartConfig, BartForConditionalGeneration


def build_model():
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCABULARY,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=32,
            dropout=0.0,
            use_cache=False,
        )
    )
