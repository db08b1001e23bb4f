"""Phi: attention and MLP side by side, rotary positions on half of each head."""

from causal_language import BATCH_SIZE as BATCH_SIZE
from causal_language import VOCABULARY
from causal_language import loss_fn as loss_fn
from causal_language import make_batch as make_batch
from transformers import PhiConfig, PhiForCausalLM


def build_model():
    return PhiForCausalLM(
        PhiConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            partial_rotary_factor=0.5,
            resid_pdrop=0.0,
            use_cache=False,
        )
    )
