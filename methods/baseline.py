"""The model as it was trained: what every other method is compared with."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

if TYPE_CHECKING:
    from torch import nn

    from harness.contracts import Context


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Baseline:
    """Return a copy of the model; the reference of every ratio and difference."""

    def compress(self, model: nn.Module, context: Context) -> nn.Module:  # noqa: ARG002 (the contract's signature)
        """Return a deep copy of ``model``."""
        return copy.deepcopy(model)

    def promises(self, original: nn.Module, compressed: nn.Module) -> Iterator[str]:
        """Nothing has changed."""
        before, after = original.state_dict(), compressed.state_dict()
        if before.keys() != after.keys() or any(not torch.equal(value, after[name]) for name, value in before.items()):
            yield "the state is not the given one"
