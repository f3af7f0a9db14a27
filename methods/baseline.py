"""The model as it was trained: what every other method is compared with."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

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
