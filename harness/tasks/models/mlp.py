"""The multilayer perceptron of the sparse evolutionary training experiments."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class SetMLP(nn.Module):
    """784-1000-1000-1000-10, ReLU, dropout 0.2 after each hidden layer; 2,797,010 parameters (Mocanu et al. 2018).

    As in the authors' code for Fashion-MNIST with 5,000 training images
    (github.com/SelimaC/Tutorial-SCADS-Summer-School-2020-Scalable-Deep-Learning): weights are drawn from
    U(-sqrt(6/n_in), sqrt(6/n_in)), biases begin at zero, and pixels are in [0, 1], to which this network scales its
    inputs in [-1, 1].
    """

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 1000)
        self.fc2 = nn.Linear(1000, 1000)
        self.fc3 = nn.Linear(1000, 1000)
        self.fc4 = nn.Linear(1000, 10)
        self.dropout = nn.Dropout(0.2)
        for layer in (self.fc1, self.fc2, self.fc3, self.fc4):
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 1, 28, 28)."""
        x = x.flatten(1) * 0.5 + 0.5
        x = self.dropout(F.relu(self.fc1(x)))
        x = self.dropout(F.relu(self.fc2(x)))
        x = self.dropout(F.relu(self.fc3(x)))
        logits: Tensor = self.fc4(x)
        return logits
