"""BLOOM: ALiBi biases, built once and read by every layer."""

from causal_language import BATCH_SIZE as BATCH_SIZE
from causal_language import VOCABULARY
from causal_language import loss_fn as loss_fn
from causal_language import make_batch as make_batch
from transformers import BloomConfig, BloomForCausalLM


def build_model():
    return BloomForCausalLM(
        BloomConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            n_layer=4,
            n_head=4,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            use_cache=False,
        )
    )
