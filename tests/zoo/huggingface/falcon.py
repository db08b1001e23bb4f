"""Falcon: one key head, attention and MLP side by side, tied head."""

from causal_language import BATCH_SIZE as BATCH_SIZE
from causal_language import VOCABULARY
from causal_language import loss_fn as loss_fn
from causal_language import make_batch as make_batch
from transformers import FalconConfig, FalconForCausalLM


def build_model():
    return FalconForCausalLM(
        FalconConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            use_cache=False,
        )
    )
