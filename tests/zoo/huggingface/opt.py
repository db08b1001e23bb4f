"""OPT: embeddings narrower than the layers, projected in and out."""

from causal_language import BATCH_SIZE as BATCH_SIZE
from causal_language import VOCABULARY
from causal_language import loss_fn as loss_fn
from causal_language import make_batch as make_batch
from transformers import OPTConfig, OPTForCausalLM


def build_model():
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            word_embed_proj_dim=16,
            ffn_dim=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=32,
            dropout=0.0,
            use_cache=False,
        )
    )
