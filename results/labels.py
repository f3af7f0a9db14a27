"""Names of rows: what was compressed, how, and on what, with the parameters in which the rows differ."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

_STRENGTH = frozenset(
    {
        *("sparsity", "ratio", "rate", "output_rate", "quality"),
        *("bits", "conv_bits", "linear_bits", "clusters", "centroids", "compression", "rank"),
    }
)


def method_labels(rows: Sequence[Row]) -> list[str]:
    """A name for each row's chain: ``magnitude (sparsity=0.9) > ptq-int8``.

    What says how strong a technique was is always shown; other parameters where they differ between rows that apply the
    same step.
    """
    return _chain_labels([json.loads(row["chain"]) for row in rows])


def curve_labels(rows: Sequence[Row]) -> list[str]:
    """A name for each row's chain without what says how strong a technique was: rows of one curve have one name."""
    chains = [json.loads(row["chain"]) for row in rows]
    return _chain_labels([[{k: v for k, v in step.items() if k not in _STRENGTH} for step in c] for c in chains])


def _chain_labels(chains: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    varying = _varying((step["name"], step) for chain in chains for step in chain)

    def label(step: Mapping[str, Any]) -> str:
        shown = {
            key: value
            for key, value in step.items()
            if key != "name" and ((step["name"], key) in varying or (key in _STRENGTH and value is not None))
        }
        return _named(step["name"], shown)

    return [" > ".join(map(label, chain)) for chain in chains]


def task_labels(rows: Sequence[Row]) -> list[str]:
    """A name for each row's task, with the parameters in which its rows differ: ``digits-cnn (epochs=1)``."""
    return _labels(rows, "task", "task_config")


def hardware_labels(rows: Sequence[Row]) -> list[str]:
    """A name for each row's runtime, with the options in which its rows differ: ``openvino (precision=bf16)``."""
    return _labels(rows, "hardware", "hardware_config")


def _labels(rows: Sequence[Row], name: str, column: str) -> list[str]:
    configs = [json.loads(row[column] or "{}") for row in rows]
    varying = _varying((row[name], config) for row, config in zip(rows, configs, strict=True))
    return [
        _named(row[name], {key: value for key, value in config.items() if (row[name], key) in varying})
        for row, config in zip(rows, configs, strict=True)
    ]


def _varying(named: Iterable[tuple[str, Mapping[str, Any]]]) -> set[tuple[str, str]]:
    """Name and key of the parameters that differ between what has one name; one that only some have differs too."""
    values: dict[tuple[str, str], set[str]] = {}
    keys: dict[tuple[str, str], int] = {}
    count: dict[str, int] = {}
    for name, config in named:
        count[name] = count.get(name, 0) + 1
        for key, value in config.items():
            values.setdefault((name, key), set()).add(json.dumps(value, sort_keys=True))
            keys[name, key] = keys.get((name, key), 0) + 1
    return {found for found, seen in values.items() if len(seen) > 1 or keys[found] < count[found[0]]}


def _named(name: Any, shown: Mapping[str, Any]) -> str:
    return f"{name} ({', '.join(f'{key}={_value(value)}' for key, value in shown.items())})" if shown else str(name)


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def natural(text: str) -> list[str | float]:
    """A sort key in which numbers count by value: texts and numbers in turn."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", text)
    return [float(part) if place % 2 else part for place, part in enumerate(parts)]
