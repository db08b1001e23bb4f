"""Mamba: a selective state space scanned over the tokens, without the fused kernels."""

from causal_language import BATCH_SIZE as BATCH_SIZE
from causal_language import VOCABULARY
from causal_language import loss_fn as loss_fn
from causal_language import make_batch as make_batch
from transformers import MambaConfig, MambaForCausalLM


def build_model():
    return MambaForCausalLM(
        MambaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            state_size=4,
            num_hidden_layers=4,
            use_cache=False,
        )
    )
