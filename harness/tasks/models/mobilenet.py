"""A depthwise-separable network for small images."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class SeparableBlock(nn.Module):
    """Depthwise 3x3, then pointwise 1x1 convolution, each with batch normalisation and ReLU6."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Features (n, outputs, h / stride, w / stride)."""
        x = F.relu6(self.bn1(self.depthwise(x)))
        return F.relu6(self.bn2(self.pointwise(x)))


class MobileNetTiny(nn.Module):
    """MobileNet's blocks (Howard et al. 2017, §3.1) at 32-64-128-256 channels for 28x28 images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.blocks = nn.Sequential(
            SeparableBlock(32, 64, 1),
            SeparableBlock(64, 64, 1),
            SeparableBlock(64, 128, 2),
            SeparableBlock(128, 128, 1),
            SeparableBlock(128, 128, 1),
            SeparableBlock(128, 256, 2),
            SeparableBlock(256, 256, 1),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 1, h, w)."""
        x = F.relu6(self.bn1(self.conv1(x)))
        x = self.blocks(x)
        x = self.pool(x).flatten(1)
        logits: Tensor = self.fc(x)
        return logits
