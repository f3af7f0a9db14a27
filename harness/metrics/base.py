"""What Assay's metrics share: which output and target they read, and one figure of weighted examples.

Resampling gives every example a weight (how often it was drawn), so a metric here says what its figure is when each
example counts that often; :meth:`Scored.value` is the case where each counts once.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

if TYPE_CHECKING:
    from harness.contracts import FloatArray

STRICT = ConfigDict(extra="forbid")
Direction = Literal["higher", "lower"]


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
                    found[place] = self.weighted(there, np.ones((1, len(there))))[0]
        return found.reshape(lead)[()]

    def weighted(self, scores: FloatArray, weights: FloatArray) -> Any:
        """The figure where example i counts ``weights[b, i]`` times, for every b.

        Parameters
        ----------
        scores : array, shape (n, parts)
            Without NaN.
        weights : array, shape (b, n)

        Returns
        -------
        array, shape (b,)
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

    def weighted(self, scores: FloatArray, weights: FloatArray) -> Any:
        """See :meth:`Scored.weighted`."""
        return self.total(weights @ self.terms(scores))


def grouped(weights: FloatArray, keys: Any) -> tuple[FloatArray, Any]:
    """Weights summed over examples of equal key.

    Parameters
    ----------
    weights : array, shape (b, n)
    keys : array, shape (n,)

    Returns
    -------
    sums : array, shape (b, groups)
        In ascending order of the keys.
    group : array of int, shape (n,)
        Each example's group.
    """
    order = np.argsort(keys, kind="stable")
    new = np.concatenate([[True], keys[order][1:] != keys[order][:-1]])
    group = np.empty(len(order), dtype=np.int64)
    group[order] = np.cumsum(new) - 1
    return np.add.reduceat(weights[:, order], np.flatnonzero(new), axis=1), group
