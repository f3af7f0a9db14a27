"""``--only`` and ``--where``: ``key=value`` conditions, comma means and.

``key=value`` and ``key!=value`` compare text with shell wildcards (``task=fashion-mnist/*``); ``a|b`` allows several
values;
``key<value``, ``<=``, ``>``, ``>=`` compare numbers.
"""

from __future__ import annotations

import fnmatch
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from harness.errors import InputError, suggestion
from harness.text import shown

# A key may hold whatever a step's name does: "config.magnitude#2.sparsity", "config.mine:Prune.amount".
_CONDITION = re.compile(r"\s*([^\s!=<>,|]+)\s*(!=|<=|>=|=|<|>)\s*(.*?)\s*", re.DOTALL)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?")
_NUMERIC: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True)
class Condition:
    """One comparison."""

    key: str
    operator: str
    value: str

    def accepts(self, row: Mapping[str, Any]) -> bool:
        """Whether a row satisfies it; a missing value satisfies only ``!=``, and text no ordering."""
        given = row.get(self.key)
        if self.operator in _NUMERIC:
            if isinstance(given, bool) or not isinstance(given, int | float):
                return False
            return _NUMERIC[self.operator](given, float(self.value))
        matched = given is not None and any(
            fnmatch.fnmatchcase(_text(given), pattern) or _text(given) == pattern for pattern in self.value.split("|")
        )
        return matched == (self.operator == "=")


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Filter:
    """All conditions of one expression."""

    conditions: tuple[Condition, ...]

    @classmethod
    def parse(cls, text: str, allowed: Iterable[str] | None = None) -> Filter:
        """Read an expression.

        Parameters
        ----------
        text : str
            ``"method=magnitude,batch_size=1"``.
        allowed : iterable of str or None
            Keys that exist; an unknown one is refused.

        Raises
        ------
        InputError
            If it does not follow the grammar, or names an unknown key.
        """
        names = None if allowed is None else sorted(allowed)
        conditions = []
        for part in text.split(","):
            match = _CONDITION.fullmatch(part)
            if not match:
                raise InputError(
                    f"Cannot read the condition {shown(part.strip())}. "
                    "Write key=value, key!=value or key<number, joined by commas."
                )
            key, sign, value = match.groups()
            if names is not None and key not in names:
                raise InputError(f"Unknown key {shown(key)} in {shown(part.strip())}. {suggestion(key, names)}")
            if sign in _NUMERIC and not _is_number(value):
                raise InputError(f"{shown(part.strip())}: {shown(value)} is not a number, and {sign} compares numbers.")
            conditions.append(Condition(key, sign, value))
        return cls(tuple(conditions))

    def accepts(self, row: Mapping[str, Any]) -> bool:
        """Whether a row satisfies all conditions."""
        return all(condition.accepts(row) for condition in self.conditions)


def _is_number(text: str) -> bool:
    """Whether it is a plain decimal number: Python would also take "nan", which nothing compares with, and "1_0"."""
    return len(text) <= 100 and _NUMBER.fullmatch(text) is not None
