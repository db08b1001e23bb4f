"""DeBERTa-v2: content and positions attend apart; relative embeddings shared by all layers."""

from masked_language import BATCH_SIZE as BATCH_SIZE
from masked_language import VOCABULARY
from masked_language import loss_fn as loss_fn
from masked_language import make_batch as make_batch
from transformers import DebertaV2Config, DebertaV2ForMaskedLM


def build_model():
    return DebertaV2ForMaskedLM(
        DebertaV2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=32,
            relative_attention=True,
            position_buckets=8,
            pos_att_type=["p2c", "c2p"],
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
