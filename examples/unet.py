"""A U-Net that finds discs in noise. Hard to cut: the first level's features are read again by the last level, so
every cut carries all the skips that are open there, and a stage in the middle passes tensors on that it never reads.

    plan --gpus 4 examples/unet.py --train
"""

from collections.abc import Iterable

import torch
from torch import nn

BATCH_SIZE = 16
LEARNING_RATE = 2e-3
IMAGE_SIZE = 48
WIDTHS = (12, 24, 48, 96)  # channels per level; one core trains a batch of 16 images in well under a second


class ConvPair(nn.Module):
    """Two convolutions, each with its norm and an in-place ReLU."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu1(self.norm1(self.conv1(x)))
        return self.relu2(self.norm2(self.conv2(x)))


class UNet(nn.Module):
    """Down through the levels, and up again: each level on the way up also reads what the same level made going down.

    The widest skip is the longest: full resolution, from the first layers to the last.
    """

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            ConvPair(before, after) for before, after in zip((1, *widths[:-2]), widths[:-1], strict=True)
        )
        self.pool = nn.ModuleList(nn.MaxPool2d(2) for _ in widths[:-1])
        self.bottom = ConvPair(widths[-2], widths[-1])
        upwards = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.grow = nn.ModuleList(nn.ConvTranspose2d(below, above, 2, stride=2) for below, above in upwards)
        self.up = nn.ModuleList(ConvPair(2 * above, above) for _, above in upwards)
        self.head = nn.Conv2d(widths[0], 1, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [batch, height, width] of images [batch, 1, height, width]: is this pixel part of a disc?"""
        x, skips = images, []
        for down, pool in zip(self.down, self.pool, strict=True):
            skips.append(down(x))
            x = pool(skips[-1])
        x = self.bottom(x)
        for grow, up, skip in zip(self.grow, self.up, reversed(skips), strict=True):
            x = up(torch.cat([skip, grow(x)], dim=1))
        return self.head(x).squeeze(1)


def build_model() -> nn.Module:
    """The model with fresh weights."""
    return UNet()


def make_batch(batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy images [batch, 1, 48, 48] of three discs on a slope of brightness, and the masks [batch, 48, 48].

    The slope is as strong as the discs are bright, so brightness alone does not tell them apart.
    """
    rows, columns = torch.meshgrid(torch.arange(IMAGE_SIZE), torch.arange(IMAGE_SIZE), indexing="ij")
    centres = IMAGE_SIZE * torch.rand(batch_size, 3, 2, 1, 1)
    radii = 4 + 6 * torch.rand(batch_size, 3, 1, 1)
    squared_distance = (rows - centres[:, :, 0]).square() + (columns - centres[:, :, 1]).square()
    masks = (squared_distance < radii.square()).any(dim=1).float()
    steepness = torch.randn(batch_size, 2, 1, 1) / IMAGE_SIZE
    slope = steepness[:, 0] * (rows - IMAGE_SIZE / 2) + steepness[:, 1] * (columns - IMAGE_SIZE / 2)
    images = masks + slope + 0.4 * torch.randn(batch_size, IMAGE_SIZE, IMAGE_SIZE)
    return images[:, None], masks


def loss_fn(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy per pixel plus one minus the soft Dice overlap, each per image and then averaged.

    Per image, because the Dice of a batch is not the mean of the Dice of its microbatches.
    """
    entropy = nn.functional.binary_cross_entropy_with_logits(output, targets)
    probability = output.sigmoid()
    overlap = 2 * (probability * targets).sum(dim=(1, 2)) + 1
    dice = overlap / (probability.sum(dim=(1, 2)) + targets.sum(dim=(1, 2)) + 1)
    return entropy + (1 - dice).mean()


def make_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW; the pipeline calls this once per stage, with the stage's own parameters."""
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE)


def reference_loss() -> tuple[float, str]:
    """What the loss has to beat: knowing only how much of an image the discs cover."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, masks = make_batch(256)
    return loss_fn(masks.mean().logit().expand_as(masks), masks).item(), "the discs' share of the image, everywhere"
