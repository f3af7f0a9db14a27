"""A text encoder with a linear head."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class SentenceClassifier(nn.Module):
    """Mean of the tokens' states, of length 1 (as sentence-transformers has it), and a linear layer.

    Parameters
    ----------
    encoder : nn.Module
        Gives ``last_hidden_state`` of ``input_ids`` and ``attention_mask``.
    width, classes : int
        Size of a state, and number of classes.
    """

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, classes)

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeddings (n, width)."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[:, :, None].to(states.dtype)
        return F.normalize((states * mask).sum(1) / mask.sum(1).clamp(min=1e-9), dim=1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores (n, classes)."""
        scores: Tensor = self.head(self.embed(input_ids, attention_mask))
        return scores
