"""Metrics of next-token scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic.dataclasses import dataclass

from harness.errors import InputError
from harness.metrics.base import STRICT, Direction, Sums
from harness.metrics.reading import labels, numbers, pick

if TYPE_CHECKING:
    from harness.contracts import Arrays, FloatArray

_BLOCK = 1 << 20
"""Scores that are worked on in float64 at a time: 8 MB an array, whatever the vocabulary."""


def shifted(scores: Any, targets: Any, shift: bool) -> tuple[Any, Any]:
    """Scores and targets of equal positions; with ``shift`` position t's scores are those of the token at t + 1."""
    return (scores[:, :-1], targets[:, 1:]) if shift else (scores, targets)


def check_tokens(scores: Any, targets: Any, shift: bool, who: str) -> None:
    """Refuse shapes that are not (n, tokens, vocabulary) and (n, tokens)."""
    if scores.ndim != 3 or tuple(targets.shape) != tuple(scores.shape[:2]):
        raise InputError(
            f"{who}: outputs have shape {tuple(scores.shape)} and targets {tuple(targets.shape)}; "
            "(n, tokens, vocabulary) and (n, tokens) are expected."
        )
    if scores.shape[1] < 1 + shift:
        raise InputError(f"{who}: examples of {scores.shape[1]} tokens have no next token to score.")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Perplexity(Sums):
    """exp(sum of negative log-likelihoods / number of tokens), over the whole set.

    Outputs are scores (n, tokens, vocabulary), targets token ids (n, tokens).

    Parameters
    ----------
    shift : bool
        True: targets are the input's ids, and the scores at position t are held against the token at t + 1, as in
        transformers; the first token of an example is not scored. False: targets are the next tokens already.
    ignore : tuple of int
        Targets that are not scored, such as padding.
    output, target : str or None
        See :class:`harness.metrics.base.Scored`.
    """

    title: ClassVar[str] = "perplexity"
    better: ClassVar[Direction] = "lower"
    parts: ClassVar[tuple[str, ...]] = ("nll", "tokens")
    shift: bool = True
    ignore: tuple[int, ...] = (-100,)

    def score(self, outputs: Arrays, against: Arrays) -> FloatArray:
        """Negative log-likelihood in nats, and number of tokens; NaN where all are ignored."""
        scores = np.asarray(pick(outputs, self.output, "output", self.name))
        targets = np.asarray(pick(against, self.target, "target", self.name))
        check_tokens(scores, targets, self.shift, self.name)
        remedy = f'metric = {{{{name = "{self.title}", ignore = {{ignore}}}}}}'
        tokens, counts = labels(targets, targets.shape, scores.shape[2], self.ignore, self.name, remedy)
        (scores, tokens), (_, counts) = shifted(scores, tokens, self.shift), shifted(scores, counts, self.shift)
        nll = np.zeros(tokens.shape)
        rows = max(1, _BLOCK // scores.shape[2])
        for place in range(len(scores)):
            for start in range(0, scores.shape[1], rows):
                part = (place, slice(start, start + rows))
                nll[part] = _nll(numbers(scores[part], "output", self.name), tokens[part])
        found = np.stack([(nll * counts).sum(axis=1), counts.sum(axis=1)], axis=1)
        return np.where(counts.any(axis=1)[:, None], found, np.nan)

    def total(self, sums: FloatArray) -> Any:
        """The perplexity."""
        return np.exp(super().total(sums))


def _nll(scores: Any, tokens: Any) -> Any:
    """-log softmax of the tokens' scores, in float64."""
    high = scores.max(axis=1, keepdims=True).astype(np.float64)
    return np.log(np.exp(scores - high).sum(axis=1)) + high[:, 0] - scores[np.arange(len(tokens)), tokens]
