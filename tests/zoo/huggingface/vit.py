"""ViT: patches, a class token, and the head on it alone."""

from image_classes import BATCH_SIZE as BATCH_SIZE
from image_classes import CLASSES, SIZE
from image_classes import loss_fn as loss_fn
from image_classes import make_batch as make_batch
from transformers import ViTConfig, ViTForImageClassification


def build_model():
    return ViTForImageClassification(
        ViTConfig(
            image_size=SIZE,
            patch_size=8,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=64,
            num_labels=CLASSES,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
