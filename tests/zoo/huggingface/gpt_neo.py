"""GPT-Neo: global and local attention in turn, tied head."""

from causal_language import BATCH_SIZE as BATCH_SIZE
from causal_language import VOCABULARY
from causal_language import loss_fn as loss_fn
from causal_language import make_batch as make_batch
from transformers import GPTNeoConfig, GPTNeoForCausalLM


def build_model():
    return GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_layers=4,
            attention_types=[[["global", "local"], 2]],
            num_heads=4,
            max_position_embeddings=32,
            window_size=4,
            use_cache=False,
        )
    )
