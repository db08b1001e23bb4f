"""ConvNeXt-T on pictures of 224 pixels."""

from random_batches import CLASSES, class_loss, pictures
from torch import nn
from transformers import ConvNextConfig, ConvNextForImageClassification

make_batch, loss_fn = pictures, class_loss


def build_model() -> nn.Module:
    """The model with random weights."""
    return ConvNextForImageClassification(ConvNextConfig(num_labels=CLASSES))
