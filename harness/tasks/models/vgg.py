"""A small plain convolutional network of VGG's kind."""

from __future__ import annotations

from torch import Tensor, nn

_WIDTHS = (16, 16, 32, 32, 64, 64)


class VGGSmall(nn.Module):
    """Six 3x3 convolutions with batch normalisation, widths 16-16-32-32-64-64; 72,666 parameters.

    VGG's plan (Simonyan & Zisserman 2015, §2) with the batch normalisation that filter pruning's papers use (Li et
    al. 2017, Liu et al. 2017), one fully connected layer, and a width for 28x28 images.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 1
        for index, width in enumerate(_WIDTHS):
            layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            if index in (1, 3):
                layers.append(nn.MaxPool2d(2))
            inputs = width
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 1, h, w)."""
        logits: Tensor = self.fc(self.pool(self.features(x)).flatten(1))
        return logits
