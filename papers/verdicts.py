"""Claims against measurements."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from papers import Claim, Paper, figures
from papers.spread import Spread, spread

Row = Mapping[str, Any]

FAILED = ("not reproduced", "does not hold")
"""Words for a claim that was run and did not come out."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of one claim.

    Parameters
    ----------
    id : str
        The claim's.
    claimed : float or None
        In the unit of the metric; None where nothing is claimed.
    measured : float or None
        The mean over the seeds, or the mean difference of a relation, positive where ``better`` is better; None where
        nothing was measured.
    tolerance : float
        Of a value; of a relation its margin.
    verdict : str or None
        "reproduced", "not reproduced", "stand-in"; of a relation "holds", "does not hold", "inconclusive"; "not run
        (reason)"; None for a measurement without a claim. Qualifications stand in parentheses ("one seed", "stand-in",
        "cut budget"); a quick run's begin with "quick: ".
    run_ids : tuple of str
        The runs it rests on.
    kind, metric, stage, stand_in, paper, table, note
        The claim's.
    unit : str
        Of ``claimed`` and ``measured``.
    n : int
        Runs, or pairs of runs.
    sd, low, high : float or None
        Standard deviation and 95 % t-interval over the seeds; None for one.
    better, than : float or None
        Of a relation: the means of its two sides.
    """

    id: str
    claimed: float | None
    measured: float | None
    tolerance: float
    verdict: str | None
    run_ids: tuple[str, ...] = ()
    kind: str = "value"
    metric: str = "accuracy"
    stage: int | None = None
    unit: str = "%"
    n: int = 0
    sd: float | None = None
    low: float | None = None
    high: float | None = None
    better: float | None = None
    than: float | None = None
    stand_in: bool = False
    paper: str | None = None
    table: str | None = None
    note: str | None = None

    @property
    def not_run(self) -> bool:
        """Whether there is no measurement to judge."""
        return self.measured is None

    @property
    def failed(self) -> bool:
        """Whether the paper's own claim, at the paper's budget, did not come out."""
        return self.verdict in (*FAILED, *(f"{word} (one seed)" for word in FAILED))

    def to_json(self) -> dict[str, Any]:
        """The verdict as plain JSON values."""
        return {**dataclasses.asdict(self), "run_ids": list(self.run_ids)}


def judge(
    claims: Sequence[Claim],
    rows: Sequence[Row],
    not_run: str | None = None,
    *,
    quick: bool = False,
    cut_budget: bool = False,
) -> list[Verdict]:
    """Compare every claim with the runs it selects.

    A value's measured figure is the mean of the selected runs (several seeds); it counts as reproduced within
    ``tolerance``, ends included. A relation is judged on the differences of runs of equal seed. One selected run that
    is not ok leaves the claim "not run".

    Parameters
    ----------
    claims : sequence of Claim
        Of one paper.
    rows : sequence of mapping
        Rows of the view ``runs``: the claims' metrics, ``chain`` as JSON text or as a list, ``seed``, ``status``,
        ``reason``, ``run_id`` and whatever columns the claims select by.
    not_run : str, optional
        Why nothing was run at all (a source that cannot be had).
    quick, cut_budget : bool, optional
        Whether the runs are a quick run's, or of a smaller budget than the paper's: the verdicts say so.

    Returns
    -------
    list of Verdict
        One a claim, in order.
    """
    judged = [
        _relation(claim, rows, not_run) if claim.kind == "relation" else _value(claim, rows, not_run)
        for claim in claims
    ]
    return [_marked(item, quick, cut_budget) for item in judged]


def report(paper: Paper, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The verdicts as ``assay reproduce --json`` prints them."""
    return {
        "paper": paper.key,
        "settings": dict(paper.settings),
        "quick": paper.quick,
        "budget": paper.budget,
        "claims": [verdict.to_json() for verdict in verdicts],
    }


def matches(select: Mapping[str, Any], row: Row) -> bool:
    """Whether a run is what a claim selects.

    Columns have to be equal; a chain must have the same steps with the given parameters, ``task_config`` the given
    entries.
    """
    return all(_selected(key, value, row.get(key)) for key, value in select.items())


def _selected(key: str, wanted: Any, found: Any) -> bool:
    if key == "chain":
        steps = json.loads(found) if isinstance(found, str) else (found or [])
        return len(steps) == len(wanted) and all(_has(want, step) for want, step in zip(wanted, steps, strict=True))
    if key == "task_config":
        return _has(wanted, json.loads(found) if isinstance(found, str) else (found or {}))
    return _equal(wanted, found)


def _has(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    return all(_equal(value, found.get(key)) for key, value in wanted.items())


def _equal(wanted: Any, found: Any) -> bool:
    numbers = (int, float)
    if isinstance(wanted, numbers) and isinstance(found, numbers) and not isinstance(wanted, bool):
        return not isinstance(found, bool) and math.isclose(wanted, found, rel_tol=1e-9)
    return bool(wanted == found)


def _value(claim: Claim, rows: Sequence[Row], not_run: str | None) -> Verdict:
    found = [row for row in rows if matches(claim.select, row)]
    if reason := not_run or _incomplete(claim, found, "no run matches"):
        return _verdict(claim, found, None, f"not run ({reason})")
    measured = spread([value for row in found if (value := figures.value(claim, row)) is not None])
    return _verdict(claim, found, measured, _word(claim, measured.mean))


def _relation(claim: Claim, rows: Sequence[Row], not_run: str | None) -> Verdict:
    better = [row for row in rows if matches(claim.better, row)]
    than = [row for row in rows if matches(claim.than, row)]
    reason = (
        not_run
        or _incomplete(claim, better, "no run matches 'better'")
        or _incomplete(claim, than, "no run matches 'than'")
    )
    if reason:
        return _verdict(claim, [*better, *than], None, f"not run ({reason})")
    one, other = _by_seed(claim, better), _by_seed(claim, than)
    seeds = [seed for seed in one if seed in other]
    if not seeds:
        return _verdict(claim, [*better, *than], None, "not run (the two sides have no seed in common)")
    sign = 1 if figures.metric(claim.metric).better == "higher" else -1
    measured = spread([round(sign * (one[seed] - other[seed]), 10) for seed in seeds])
    means = {
        "better": spread([one[seed] for seed in seeds]).mean,
        "than": spread([other[seed] for seed in seeds]).mean,
    }
    return _verdict(claim, [*better, *than], measured, _relation_word(claim, measured), **means)


def _by_seed(claim: Claim, rows: Sequence[Row]) -> dict[Any, float]:
    values: dict[Any, list[float]] = {}
    for row in rows:
        if (value := figures.value(claim, row)) is not None:
            values.setdefault(row.get("seed"), []).append(value)
    return {seed: spread(found).mean for seed, found in values.items()}


def _incomplete(claim: Claim, rows: Sequence[Row], none: str) -> str | None:
    if not rows:
        return none
    for row in rows:
        if row.get("status") != "ok":
            return f"{row.get('status')}: {row.get('reason') or 'no reason given'}"
        if figures.value(claim, row) is None:
            return figures.missing(claim, row)
    return None


def _word(claim: Claim, measured: float) -> str | None:
    if claim.claimed is None:
        return None
    if claim.stand_in:
        return "stand-in"
    # A decimal tolerance is not exact in binary: 88.41 - 88.40 must not exceed 0.01.
    within = abs(measured - claim.claimed) <= claim.tolerance + 1e-9
    return "reproduced" if within else "not reproduced"


def _relation_word(claim: Claim, measured: Spread) -> str:
    # As above, for a difference of decimals.
    bound = -claim.margin - 1e-9
    low = measured.mean if measured.low is None else measured.low
    high = measured.mean if measured.high is None else measured.high
    word = "holds" if low >= bound else "does not hold" if high < bound else "inconclusive"
    notes = [*(["one seed"] if measured.n == 1 else []), *(["stand-in"] if claim.stand_in else [])]
    return _qualified(word, notes)


def _qualified(word: str, notes: Sequence[str]) -> str:
    return f"{word} ({', '.join(notes)})" if notes else word


def _marked(item: Verdict, quick: bool, cut_budget: bool) -> Verdict:
    """The verdict with what its runs' budget takes from it."""
    if item.verdict is None or item.not_run:
        return item
    if quick:
        return dataclasses.replace(item, verdict=f"quick: {item.verdict}")
    if not cut_budget:
        return item
    word, _, notes = item.verdict.partition(" (")
    return dataclasses.replace(item, verdict=_qualified(word, [*filter(None, [notes.removesuffix(")")]), "cut budget"]))


def _verdict(
    claim: Claim,
    rows: Sequence[Row],
    measured: Spread | None,
    word: str | None,
    better: float | None = None,
    than: float | None = None,
) -> Verdict:
    relation = claim.kind == "relation"
    return Verdict(
        id=claim.id,
        claimed=claim.claimed,
        measured=measured.mean if measured else None,
        tolerance=claim.margin if relation else claim.tolerance,
        verdict=word,
        run_ids=tuple(dict.fromkeys(str(row["run_id"]) for row in rows)),
        kind=claim.kind,
        metric=claim.metric,
        stage=claim.stage,
        unit=figures.unit(claim.metric, relation).strip(),
        n=measured.n if measured else 0,
        sd=measured.sd if measured else None,
        low=measured.low if measured else None,
        high=measured.high if measured else None,
        better=better,
        than=than,
        stand_in=claim.stand_in,
        paper=claim.paper,
        table=claim.table,
        note=claim.note,
    )
