"""Networks of the contract suite, small and unlike one another: see :mod:`harness.testing.networks`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 10
VOCABULARY = 16


class Perceptron(nn.Module):
    """64-48-32-10 with ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 48)
        self.fc2 = nn.Linear(48, 32)
        self.fc3 = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 1, 8, 8)."""
        x = F.relu(self.fc1(x.flatten(1)))
        out: Tensor = self.fc3(F.relu(self.fc2(x)))
        return out


class Residual(nn.Module):
    """A stem, one residual block with batch normalisation, pooling and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.conv1 = nn.Conv2d(16, 24, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.conv2 = nn.Conv2d(24, 16, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(256, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 1, 8, 8)."""
        x = F.relu(self.norm(self.stem(x)))
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        x = self.pool(F.relu(x + y))
        out: Tensor = self.fc(x.flatten(1))
        return out


class Attention(nn.Module):
    """Causal attention of two heads over tokens that are not padding."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """(n, tokens, width) to the same; ``hidden`` (n, 1, tokens, tokens) is True where nothing may be seen."""
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        scores = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).masked_fill(hidden, -1e4)
        out: Tensor = self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return out


class TokenModel(nn.Module):
    """One transformer block over 16 tokens: ids and a mask in, scores of the next token out."""

    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.place = nn.Embedding(64, width)
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 48)
        self.down = nn.Linear(48, width)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Scores (n, tokens, 16) of ids (n, tokens); the mask is 1 where there is a token and 0 in the padding."""
        places = torch.arange(ids.shape[1], device=ids.device)
        hidden = (places[None, :] > places[:, None])[None, None] | (mask == 0)[:, None, None, :]
        x = self.embed(ids) + self.place(places)
        x = x + self.attention(self.norm1(x), hidden)
        x = x + self.down(F.relu(self.up(self.norm2(x))))
        out: Tensor = self.head(x)
        return out


class Denoiser(nn.Module):
    """Three convolutions that find the noise of an image, and take it away."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.conv3 = nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, noisy: Tensor) -> Tensor:
        """Images (n, 1, 8, 8) of noisy ones."""
        found = F.relu(self.norm(self.conv2(F.relu(self.conv1(noisy)))))
        out: Tensor = noisy - self.conv3(found)
        return out
