"""Whether an object keeps the contract of a metric: asked once, when it is made, and not after hours of measuring."""

from __future__ import annotations

from typing import Any

import numpy as np

from harness.errors import SpecError, explanation
from harness.text import shown

_MEMBERS = ("name", "unit", "better", "parts", "proportion")


def check(metric: Any, where: str) -> None:
    """Check the members of a metric, and that its value takes leading axes.

    Raises
    ------
    SpecError
        Saying which member is missing or wrong, and what is expected.
    """
    values = {}
    for member in _MEMBERS:
        try:
            values[member] = getattr(metric, member)
        except AttributeError:
            raise SpecError(f"{where}: the class has no {member!r}. Needed: {', '.join(_MEMBERS)}.") from None
        except Exception as error:  # the user's property may raise anything
            raise SpecError(f"{where}: reading {member!r} raised {explanation(error)}") from error
    parts = values["parts"]
    rules = (
        ("name", isinstance(values["name"], str) and values["name"] != "", "a text that is not empty"),
        ("unit", isinstance(values["unit"], str), 'a text, such as "%", or "" for a plain number'),
        ("better", values["better"] in ("higher", "lower"), '"higher" or "lower"'),
        ("proportion", isinstance(values["proportion"], bool), "True or False"),
        (
            "parts",
            isinstance(parts, tuple) and parts and all(isinstance(part, str) for part in parts),
            'a tuple of texts, such as ("correct",)',
        ),
    )
    for member, right, wanted in rules:
        if not right:
            raise SpecError(f"{where}: {member} must be {wanted}; it is {shown(values[member])}.")
    if len(set(parts)) < len(parts):
        raise SpecError(f"{where}: parts must have different names; they are {shown(parts)}.")
    scores = np.ones((2, 3, len(parts)))
    try:
        with np.errstate(all="ignore"):
            shape = np.shape(metric.value(scores))
    except Exception as error:  # the user's method may raise anything
        raise SpecError(f"{where}: value() of scores of shape {scores.shape} raised {explanation(error)}") from error
    if shape != (2,):
        raise SpecError(
            f"{where}: value() of scores of shape {scores.shape} must have shape (2,), one figure for each leading "
            f"index; it has {shape}. Reduce the second axis from the end: scores[..., 0].mean(axis=-1)."
        )
