"""What a deployed artifact answers: its outputs, scored against the targets and against torch's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from harness import arrays
from harness.errors import InputError, NotFinite

if TYPE_CHECKING:
    from harness.contracts import Arrays, Deployed, Metric

Load = Callable[[Mapping[str, Any]], "Deployed"]
"""Loads the artifact for a batch of these inputs."""


def answer(deployed: Deployed, inputs: Arrays, size: int | None = None, phase: str = "forward") -> dict[str, Any]:
    """Outputs of one batch by name.

    Parameters
    ----------
    deployed : Deployed
    inputs : Arrays
        n examples.
    size : int or None
        The batch size that ``deployed`` was loaded for, where it may exceed n: the batch is filled up by repeating its
        examples, and the answers to those are dropped.
    phase : str
        What is called.

    Raises
    ------
    NotFinite
        If any output is NaN or infinite.
    """
    n = len(next(iter(inputs.values())))
    deployed.bind(inputs if size is None or n == size else arrays.repeated(inputs, size))
    deployed(phase)
    deployed.synchronize()
    outputs = {name: value[:n] for name, value in deployed.fetch().items()}
    for name, value in outputs.items():
        if np.issubdtype(value.dtype, np.inexact) and not np.isfinite(value).all():
            bad = int((~np.isfinite(value)).reshape(n, -1).any(axis=1).sum())
            raise NotFinite(f"The deployed model returned NaN or infinity for {bad} of {n} examples (output {name!r}).")
    return outputs


class Scores:
    """Per-example scores of one metric over a whole set."""

    def __init__(self, metric: Metric, config: Mapping[str, Any], data: str, against: str, split: str | None) -> None:
        self._metric, self._config = metric, config
        self._data, self._against, self._split = data, against, split
        self._parts: list[Any] = []

    @property
    def name(self) -> str:
        """The metric's name."""
        return self._metric.name

    def add(self, outputs: Arrays, against: Arrays) -> None:
        """Score some more examples."""
        scores = np.asarray(self._metric.score(outputs, against), dtype=np.float64)
        expected = (len(next(iter(outputs.values()))), len(self._metric.parts))
        if scores.shape != expected:
            raise InputError(
                f"Metric {self._metric.name!r} returned scores of shape {scores.shape}; {expected} is expected: one "
                f"row an example, one column for each of its parts ({', '.join(self._metric.parts)})."
            )
        self._parts.append(scores)

    def entry(self) -> dict[str, Any]:
        """The entry of ``scores`` in a record."""
        metric, scores = self._metric, np.concatenate(self._parts)
        value = float(metric.value(scores))
        return {
            "metric": metric.name,
            "config": dict(self._config),
            "unit": metric.unit,
            "better": metric.better,
            "proportion": metric.proportion,
            "data": self._data,
            "against": self._against,
            "split_sha256": self._split,
            "n": len(scores),
            "parts": {name: _plain(scores[:, place]) for place, name in enumerate(metric.parts)},
            "value": value if np.isfinite(value) else None,
        }


def scored(
    load: Load,
    blocks: Sequence[arrays.Block],
    size: int,
    take: Callable[[Arrays, Arrays], None],
    phase: str = "forward",
) -> None:
    """Run every example of some blocks through the artifact, loaded once for each shape.

    Parameters
    ----------
    load : callable
    blocks : sequence of Block
    size : int
        Batch size.
    take : callable
        ``take(outputs, targets)`` for every batch.
    phase : str
        What is called: a prompt's outputs are those of "prefill".
    """
    for block in blocks:
        deployed: Deployed | None = None
        try:
            for inputs, targets in block.parts(size):
                if deployed is None:
                    deployed = load(arrays.repeated(inputs, size))
                take(answer(deployed, inputs, size, phase), targets)
        finally:
            if deployed is not None:
                deployed.close()


def _plain(values: Any) -> list[Any]:
    """Numbers as JSON has them: integers where all are, NaN (an example without a score) as None."""
    if np.isfinite(values).all() and (values == np.round(values)).all():
        return list(values.astype(np.int64).tolist())
    return [value if np.isfinite(value) else None for value in values.tolist()]
