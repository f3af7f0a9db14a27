"""A small vision transformer whose attention is written out, so that it can be traced and exported."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, eq. 1) from explicit linear layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens of the same shape (n, tokens, width)."""
        # (3, n, heads, tokens, width / heads), indexed and not unpacked: a traced tensor cannot be iterated over.
        parts = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        tokens: Tensor = self.project(y.transpose(1, 2).flatten(2))
        return tokens


class EncoderBlock(nn.Module):
    """Attention and a two-layer perceptron, each normalised before and added to its input."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens of the same shape (n, tokens, width)."""
        x = x + self.attention(self.norm1(x))
        y: Tensor = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x + y


class ViTTiny(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021, §3.1): 49 patches of 4x4, width 64, four heads, four blocks.

    The mean over the tokens is classified instead of a class token.
    """

    def __init__(self) -> None:
        super().__init__()
        width, heads, hidden, depth = 64, 4, 128, 4
        self.patches = nn.Conv2d(1, width, 4, 4)
        self.position = nn.Parameter(torch.empty(1, 49, width))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 1, 28, 28)."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        x = self.norm(self.blocks(x)).mean(1)
        logits: Tensor = self.fc(x)
        return logits
