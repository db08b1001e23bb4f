"""A DCGAN generator: transposed convolutions from a code to an image, against a frozen discriminator."""

import torch
from torch import nn

BATCH_SIZE = 4


class Adversary(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(
            nn.ConvTranspose2d(16, 32, 4, 1, 0, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(True),
            nn.ConvTranspose2d(32, 16, 4, 2, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(True),
            nn.ConvTranspose2d(16, 3, 4, 2, 1, bias=False),
            nn.Tanh(),
        )
        self.discriminator = nn.Sequential(
            nn.Conv2d(3, 8, 4, 2, 1),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(8, 8, 4, 2, 1),
            nn.Flatten(),
            nn.Linear(128, 1),
        ).requires_grad_(False)

    def forward(self, code):
        return self.discriminator(self.generator(code))


def build_model():
    return Adversary()


def make_batch(batch_size):
    return torch.randn(batch_size, 16, 1, 1), torch.ones(batch_size, 1)


def loss_fn(output, targets):
    return nn.functional.binary_cross_entropy_with_logits(output, targets)
