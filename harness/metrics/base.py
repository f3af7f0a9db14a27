"""What Assay's metrics share: which output and target they read, and one figure of weighted examples.

Resampling gives every example a weight (how often it was drawn), so a metric here says what its figure is when each
example counts that often; :meth:`Scored.value` is the case where each counts once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

if TYPE_CHECKING:
    from harness.contracts import FloatArray

STRICT = ConfigDict(extra="forbid")
Direction = Literal["higher", "lower"]
Figure = Callable[["FloatArray"], Any]
"""A metric's figures, (b,), of weights, (b, n)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Scored:
    """A metric of one output.

    Parameters
    ----------
    output, target : str or None
        The name of the output that is scored, and of the target that it is scored against; the first where None.
    """

    proportion: ClassVar[bool] = False
    unit: ClassVar[str] = ""
    better: ClassVar[Direction] = "higher"
    title: ClassVar[str]

    output: str | None = None
    target: str | None = None

    @property
    def name(self) -> str:
        """The registered name, and in brackets the output or target where one is chosen."""
        chosen = [name for name in (self.output, self.target) if name is not None]
        return self.title + (f"[{','.join(chosen)}]" if chosen else "")

    def value(self, scores: Any) -> Any:
        """One figure of the scores, over any leading axes; examples with NaN are left out."""
        scores = np.asarray(scores, dtype=np.float64)
        *lead, n, parts = scores.shape
        found = np.full(math.prod(lead), np.nan)
        for place, rows in enumerate(scores.reshape(math.prod(lead), n, parts)):
            there = rows[~np.isnan(rows).any(axis=1)]
            if len(there):
                with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                    found[place] = self.weighted(there)(np.ones((1, len(there))))[0]
        return found.reshape(lead)[()]

    def weighted(self, scores: FloatArray) -> Figure:
        """The figure as a function of weights: weights (b, n) give figures (b,), example i counting ``weights[b, i]``.

        Parameters
        ----------
        scores : array, shape (n, parts)
            At least one, without NaN.
        """
        raise NotImplementedError


class Sums(Scored):
    """A metric that is a function of sums over the examples."""

    def terms(self, scores: FloatArray) -> FloatArray:
        """What is summed, shape (n, terms): the parts themselves, unless a metric says otherwise."""
        return scores

    def total(self, sums: FloatArray) -> Any:
        """The figure of sums, shape (..., terms): the first by the second, unless a metric says otherwise."""
        return sums[..., 0] / sums[..., 1]

    def weighted(self, scores: FloatArray) -> Figure:
        """See :meth:`Scored.weighted`."""
        terms = self.terms(scores)
        return lambda weights: self.total(weights @ terms)


class Groups:
    """Examples in the ascending order of a key, those of equal key together.

    Parameters
    ----------
    keys : array, shape (n,)
    """

    def __init__(self, keys: Any) -> None:
        self.order = np.argsort(keys, kind="stable")
        ordered = keys[self.order]
        new = np.concatenate([[True], ordered[1:] != ordered[:-1]])
        self.keys = ordered[new]
        self.starts = np.flatnonzero(new)
        self.group = np.cumsum(new) - 1
        """Of every example in that order."""

    def sums(self, ordered: FloatArray) -> Any:
        """What is in that order, (b, n), summed over each group: (b, groups)."""
        return ordered if len(self.starts) == len(self.order) else np.add.reduceat(ordered, self.starts, axis=1)

    def spread(self, values: FloatArray) -> Any:
        """What every group has, (b, groups), for every example in that order: (b, n)."""
        return values if len(self.starts) == len(self.order) else values.take(self.group, axis=1)
