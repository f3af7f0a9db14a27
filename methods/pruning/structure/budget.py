"""What to remove: budgets by channels, multiply-accumulates or parameters, in steps that kernels like."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from harness.errors import Unsupported
from methods.pruning.structure.criteria import Scores
from methods.pruning.structure.units import Layer, Structure, Unit

Target = Literal["ratio", "macs", "params"]
Scope = Literal["global", "layer"]

_WORDS = {"ratio": "channels", "macs": "multiply-accumulates", "params": "parameters"}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is removed.

    Parameters
    ----------
    units : tuple of Unit
        All that go.
    channels, macs, params : float
        The shares removed: of the channels of the layers that can lose some, of the model's multiply-accumulates, and
        of its parameters.
    sizes : tuple of (str, int, int)
        Name of a layer, its channels before and after.
    """

    units: tuple[Unit, ...]
    channels: float
    macs: float
    params: float
    sizes: tuple[tuple[str, int, int], ...]

    def __str__(self) -> str:
        changed = ", ".join(f"{name} {before} -> {after}" for name, before, after in self.sizes if after < before)
        return (
            f"removed {self.channels:.1%} of the channels, {self.macs:.1%} of the multiply-accumulates, "
            f"{self.params:.1%} of the parameters: {changed or 'nothing'}"
        )


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """Units of one layer that go in one step."""

    layer: int
    units: tuple[Unit, ...]
    key: float


def step(layer: Layer, round_to: int) -> int:
    """Units that a layer loses at a time, such that its channels stay multiples of ``round_to``.

    Where that leaves a layer no choice (fewer than twice as many channels), the step is halved until there is one: 16
    becomes 8 for a layer of 16 to 31 channels, 4 for one of 8 to 15. A head or a group as wide as ``round_to`` goes by
    itself.
    """
    widths = {unit.width for unit in layer.units}
    if len(widths) > 1:
        return 1
    width = widths.pop()
    count = round_to // math.gcd(round_to, width)
    while count > 1 and layer.channels < 2 * count * width:
        count //= 2
    return count


def make(
    structure: Structure,
    scores: Scores,
    *,
    ratio: float,
    target: Target,
    scope: Scope,
    round_to: int,
    min_channels: int,
) -> Plan:
    """Choose the units of lowest score.

    The units of each layer are ranked, and taken in steps (:func:`step`); every layer keeps at least one step, and
    ``min_channels``. With ``"global"`` the steps of all layers are ranked by their mean score. With ``"layer"`` they
    are ranked by the share of its layer that each step brings the removal to, so that all layers lose the same share.
    Steps are taken in this order until the target is reached; those that the last one made unnecessary are given back,
    so that the target is exceeded by less than any one step. The exception is ``"layer"`` with ``"ratio"``: every layer
    gets the number of channels nearest to its ``1 - ratio``.

    Parameters
    ----------
    structure : Structure
        The units.
    scores : list
        Of :func:`methods.pruning.structure.criteria.score`; layers without scores lose nothing and do not count.
    ratio : float
        Share to remove, in [0, 1).
    target : {"ratio", "macs", "params"}
        Of what: the channels of the layers that can lose some; the model's multiply-accumulates; its parameters.
    scope : {"global", "layer"}
        Rank all layers together, or each by itself.
    round_to : int
        Channels that stay are multiples of it.
    min_channels : int
        That every layer keeps.

    Raises
    ------
    Unsupported
        If the target is out of reach.
    """
    ranked: list[_Chunk] = []
    for index, (layer, values) in enumerate(zip(structure.layers, scores, strict=True)):
        if values is not None:
            ranked += _chunks(index, layer, values.tolist(), scope, round_to, min_channels)
    ranked.sort(key=lambda chunk: chunk.key)  # stable: of equal ones, the layer that runs first
    measure = _Measure(structure, [part is not None for part in scores])
    if scope == "layer" and target == "ratio":
        taken = [chunk for chunk in ranked if chunk.key <= ratio]
    else:
        goal = ratio - 1e-9  # shares are quotients of whole numbers
        most = measure(ranked, target)
        if most < goal:
            held = "; ".join(f"{name}: {reason}" for name, reason in list(structure.left_alone.items())[:3])
            raise Unsupported(
                f"ratio {ratio:g} cannot be reached: at most {most:.1%} of the {_WORDS[target]} can be removed with "
                f"round_to={round_to} and min_channels={min_channels}" + (f" ({held})" if held else "")
            )
        count = bisect.bisect_left(range(len(ranked)), goal, key=lambda n: measure(ranked[:n], target))
        taken = _without_excess(ranked[:count], goal, lambda chunks: measure(chunks, target))
    units = tuple(unit for chunk in taken for unit in chunk.units)
    lost = {unit.label for unit in units}
    return Plan(
        units=units,
        channels=measure(taken, "ratio"),
        macs=measure(taken, "macs"),
        params=measure(taken, "params"),
        sizes=tuple(
            (layer.name, layer.channels, layer.channels - sum(u.width for u in layer.units if u.label in lost))
            for layer in structure.layers
        ),
    )


class _Measure:
    """The share of channels, multiply-accumulates or parameters that steps remove."""

    def __init__(self, structure: Structure, counted: list[bool]) -> None:
        self.structure = structure
        nothing = structure.removed([])
        layers = [layer for layer, counts in zip(structure.layers, counted, strict=True) if counts]
        self.channels = max(1, sum(layer.channels for layer in layers))
        self.macs, self.params = max(1, structure.macs(nothing)), structure.parameters(nothing)

    def __call__(self, chunks: Sequence[_Chunk], target: Target) -> float:
        units = [unit for chunk in chunks for unit in chunk.units]
        if target == "ratio":
            return sum(unit.width for unit in units) / self.channels
        gone = self.structure.removed(units)
        if target == "macs":
            return 1 - self.structure.macs(gone) / self.macs
        return 1 - self.structure.parameters(gone) / self.params


def _without_excess(taken: list[_Chunk], goal: float, share: Callable[[list[_Chunk]], float]) -> list[_Chunk]:
    """Give steps back, the most important first, that the last one has made unnecessary.

    Only the last step of a layer can be given back.
    """
    kept = list(taken)
    closed: set[int] = set()
    for chunk in reversed(taken):
        if chunk.layer not in closed:
            fewer = [other for other in kept if other is not chunk]
            if share(fewer) >= goal:
                kept = fewer
            else:
                closed.add(chunk.layer)
    return kept


def _chunks(
    index: int, layer: Layer, scores: list[float], scope: Scope, round_to: int, min_channels: int
) -> list[_Chunk]:
    order = sorted(range(len(scores)), key=lambda position: scores[position])
    size, width = step(layer, round_to), max(unit.width for unit in layer.units)
    # The first step is shorter where the layer's channels are no multiple.
    first = (layer.channels // width - 1) % size + 1
    made: list[_Chunk] = []
    taken, start, left = 0, 0, layer.channels
    while start < len(order):
        count = first if start == 0 else size
        positions = order[start : start + count]
        start += count
        units = tuple(layer.units[position] for position in positions)
        lost = sum(unit.width for unit in units)
        left -= lost
        if len(positions) < count or left < max(min_channels, 1):
            break
        taken += lost
        key = (taken - lost / 2) / layer.channels
        if scope == "global":
            key = sum(scores[position] for position in positions) / len(positions)
        made.append(_Chunk(layer=index, units=units, key=key))
    return made
