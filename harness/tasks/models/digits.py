"""A small convolutional network for 8x8 digits."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class DigitsCNN(nn.Module):
    """Two 3x3 convolutions with batch normalisation (16, 32 channels), max-pooling, 512-64-10; 38,330 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.fc1 = nn.Linear(512, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 1, 8, 8)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.max_pool2d(x, 2)
        x = x.flatten(1)
        x = F.relu(self.fc1(x))
        logits: Tensor = self.fc2(x)
        return logits
