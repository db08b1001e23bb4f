"""BERT: the head is tied to the token embedding, padding is masked in every layer."""

from masked_language import BATCH_SIZE as BATCH_SIZE
from masked_language import VOCABULARY
from masked_language import loss_fn as loss_fn
from masked_language import make_batch as make_batch
from transformers import BertConfig, BertForMaskedLM


def build_model():
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=32,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
