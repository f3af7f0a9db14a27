"""A network from features to one value."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Regressor(nn.Module):
    """10-64-64-1 with ReLU; the output is scaled to the targets' range, so that the weights stay of usual size.

    Parameters
    ----------
    mean, deviation : float
        Of the training targets.
    """

    def __init__(self, mean: float = 0.0, deviation: float = 1.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(10, 64)
        self.fc2 = nn.Linear(64, 64)
        self.fc3 = nn.Linear(64, 1)
        self.mean, self.deviation = mean, deviation

    def forward(self, features: Tensor) -> Tensor:
        """Values (n, 1) of features (n, 10)."""
        x = F.relu(self.fc1(features))
        x = F.relu(self.fc2(x))
        values: Tensor = self.fc3(x) * self.deviation + self.mean
        return values
