"""The recipe that fine-tuning derives from where nobody gave one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.contracts import Recipe

if TYPE_CHECKING:
    from torch import nn

_ADAPTIVE = ("attention", "layernorm", "rmsnorm", "embedding")


def default(model: nn.Module, batch_size: int) -> Recipe:
    """A careful recipe for a model that came trained.

    SGD at 0.01 with momentum 0.9, or AdamW at 2e-4 where the model has attention, LayerNorm or an embedding. Methods
    fine-tune at a tenth of the rate (:meth:`harness.contracts.Recipe.finetune`), which makes 1e-3 and 2e-5: the usual
    rates of the field.

    Parameters
    ----------
    model : nn.Module
        Trained.
    batch_size : int
        Of the training loader.
    """
    kinds = {type(module).__name__.lower() for module in model.modules()}
    if any(part in kind for kind in kinds for part in _ADAPTIVE):
        return Recipe(epochs=1, batch_size=batch_size, lr=2e-4, optimizer="adamw", weight_decay=0.01, schedule="cosine")
    return Recipe(epochs=1, batch_size=batch_size, lr=0.01, momentum=0.9, weight_decay=1e-4, schedule="cosine")
