"""A network from images to images."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Denoiser(nn.Module):
    """Three convolutions that estimate the noise, which is subtracted (Zhang et al. 2017, DnCNN, §3, made small).

    Parameters
    ----------
    width : int
        Channels between the convolutions.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.middle = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, noisy: Tensor) -> Tensor:
        """Images (n, 1, height, width) of the same size."""
        x = F.relu(self.first(noisy))
        x = F.relu(self.norm(self.middle(x)))
        clean: Tensor = noisy - self.last(x)
        return clean
