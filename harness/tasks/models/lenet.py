"""The two LeNets of the pruning literature."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class LeNet300(nn.Module):
    """LeNet-300-100: 784-300-100-10, ReLU; 266,610 parameters (LeCun et al. 1998, §III.C.4)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 1, 28, 28)."""
        x = x.flatten(1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        logits: Tensor = self.fc3(x)
        return logits


class LeNet5Caffe(nn.Module):
    """Caffe's variant of LeNet-5, 20-50-500-10; 431,080 parameters.

    The pruning literature's "LeNet-5" (Han et al. 2015) is this one, not LeCun's of 61 thousand. As in SNIP (Lee et al.
    2019), a ReLU follows each convolution; Caffe's own file has only the one after the first fully connected layer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 1, 28, 28)."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.flatten(1)
        x = F.relu(self.fc1(x))
        logits: Tensor = self.fc2(x)
        return logits
