"""A ResNet for small images. Hard to cut: in-place ReLUs forbid a cut after each norm, and inside a block every cut
carries the shortcut along; the BatchNorms keep statistics per microbatch, which the stages must update alike.

    plan --gpus 4 examples/resnet.py --train
"""

import math
from collections.abc import Iterable

import torch
from torch import nn

BATCH_SIZE = 16
LEARNING_RATE = 1e-3
NUM_CLASSES = 10
IMAGE_SIZE = 32
WIDTHS = (32, 64, 128, 256)  # half of ResNet-18's: one core trains a batch of 16 images in well under a second


class BasicBlock(nn.Module):
    """Two convolutions beside a shortcut; where the shape changes, the shortcut is a convolution too."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.relu2 = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu1(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu2(out)


class ResNet(nn.Module):
    """ResNet-18 as it is built for images of 32 × 32: a first convolution without pooling, four groups of two blocks.

    Every group halves the image and doubles the channels: the work stays the same, the tensor to send gets smaller.
    """

    def __init__(self, widths: tuple[int, ...] = WIDTHS, num_classes: int = NUM_CLASSES) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)
        )
        blocks: list[nn.Module] = []
        channels = widths[0]
        for group, width in enumerate(widths):
            blocks += [BasicBlock(channels, width, 1 if group == 0 else 2), BasicBlock(width, width, 1)]
            channels = width
        self.blocks = nn.ModuleList(blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [batch, classes] of images [batch, 3, height, width]."""
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return self.head(self.pool(x).flatten(1))


def build_model() -> nn.Module:
    """The model with fresh weights."""
    return ResNet()


def make_batch(batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Stripes in noise, [batch, 3, 32, 32], and the class of each: which of ten directions its stripes run in.

    Phase, wavelength and colour are random, so no single pixel tells the class.
    """
    classes = torch.randint(0, NUM_CLASSES, (batch_size,))
    angle = classes * math.pi / NUM_CLASSES
    phase, wavelength = 2 * math.pi * torch.rand(batch_size), 5 + 5 * torch.rand(batch_size)
    rows, columns = torch.meshgrid(torch.arange(IMAGE_SIZE), torch.arange(IMAGE_SIZE), indexing="ij")
    along = angle.cos()[:, None, None] * columns + angle.sin()[:, None, None] * rows
    stripes = torch.sin(2 * math.pi * along / wavelength[:, None, None] + phase[:, None, None])
    colours = torch.randn(batch_size, 3, 1, 1)
    return stripes[:, None] * colours + 0.5 * torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE), classes


def loss_fn(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy per image, in nats."""
    return nn.functional.cross_entropy(output, targets)


def make_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW; the pipeline calls this once per stage, with the stage's own parameters."""
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE)


def reference_loss() -> tuple[float, str]:
    """What the loss has to beat: guessing."""
    return math.log(NUM_CLASSES), f"a guess among {NUM_CLASSES} classes"
