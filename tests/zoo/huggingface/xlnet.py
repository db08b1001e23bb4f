"""XLNet: relative positions that every layer reads, two streams in reserve."""

from causal_language import BATCH_SIZE as BATCH_SIZE
from causal_language import VOCABULARY
from causal_language import loss_fn as loss_fn
from causal_language import make_batch as make_batch
from transformers import XLNetConfig, XLNetLMHeadModel


def build_model():
    return XLNetLMHeadModel(
        XLNetConfig(
            vocab_size=VOCABULARY,
            d_model=32,
            n_layer=4,
            n_head=4,
            d_inner=64,
            dropout=0.0,
            use_mems_eval=False,
            use_mems_train=False,
        )
    )
