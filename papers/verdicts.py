"""Claims against measurements."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from papers import Claim, Paper

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of one claim.

    Parameters
    ----------
    id : str
        The claim's.
    claimed : float or None
        Percent; None where nothing is claimed.
    measured : float or None
        Percent; None where nothing was measured.
    tolerance : float
        Percent points.
    verdict : str or None
        "reproduced", "not reproduced", "stand-in", "not run (reason)"; None for a measurement without a claim.
    run_ids : tuple of str
        The runs it rests on.
    """

    id: str
    claimed: float | None
    measured: float | None
    tolerance: float
    verdict: str | None
    run_ids: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The verdict as plain JSON values."""
        return {**dataclasses.asdict(self), "run_ids": list(self.run_ids)}


def judge(claims: Sequence[Claim], rows: Sequence[Row], not_run: str | None = None) -> list[Verdict]:
    """Compare every claim with the runs it selects.

    The measured figure is the mean accuracy of the selected runs (several seeds) in percent; it counts as reproduced
    within ``tolerance``, ends included. One selected run that is not ok leaves the claim "not run".

    Parameters
    ----------
    claims : sequence of Claim
        Of one paper.
    rows : sequence of mapping
        Rows of the view ``runs``: ``accuracy`` in [0, 1], ``chain`` as JSON text or as a list, ``status``, ``reason``,
        ``run_id`` and whatever columns the claims select by.
    not_run : str, optional
        Why nothing was run at all (a source that cannot be had).

    Returns
    -------
    list of Verdict
        One a claim, in order.
    """
    return [_judge(claim, [row for row in rows if matches(claim.select, row)], not_run) for claim in claims]


def report(paper: Paper, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The verdicts as ``assay reproduce --json`` prints them."""
    return {"paper": paper.key, "claims": [verdict.to_json() for verdict in verdicts]}


def matches(select: Mapping[str, Any], row: Row) -> bool:
    """Whether a run is what a claim selects: equal columns, and a chain whose steps have the given parameters."""
    return all(
        _chain_matches(value, row.get("chain")) if key == "chain" else _equal(value, row.get(key))
        for key, value in select.items()
    )


def _judge(claim: Claim, rows: Sequence[Row], not_run: str | None) -> Verdict:
    run_ids = tuple(str(row["run_id"]) for row in rows)
    reason = not_run or _incomplete(rows)
    if reason:
        return Verdict(
            id=claim.id,
            claimed=claim.claimed,
            measured=None,
            tolerance=claim.tolerance,
            verdict=f"not run ({reason})",
            run_ids=run_ids,
        )
    # Ten decimals: more than any test set resolves, and 0.6676 reads 66.76 and not 66.75999999999999.
    measured = round(100 * math.fsum(row["accuracy"] for row in rows) / len(rows), 10)
    return Verdict(
        id=claim.id,
        claimed=claim.claimed,
        measured=measured,
        tolerance=claim.tolerance,
        verdict=_word(claim, measured),
        run_ids=run_ids,
    )


def _incomplete(rows: Sequence[Row]) -> str | None:
    if not rows:
        return "no run matches"
    for row in rows:
        if row.get("status") != "ok":
            return f"{row.get('status')}: {row.get('reason') or 'no reason given'}"
        if row.get("accuracy") is None:
            return "accuracy was not measured"
    return None


def _word(claim: Claim, measured: float) -> str | None:
    if claim.claimed is None:
        return None
    if claim.stand_in:
        return "stand-in"
    # A decimal tolerance is not exact in binary: 88.41 - 88.40 must not exceed 0.01.
    within = abs(measured - claim.claimed) <= claim.tolerance + 1e-9
    return "reproduced" if within else "not reproduced"


def _chain_matches(wanted: Sequence[Mapping[str, Any]], chain: Any) -> bool:
    steps = json.loads(chain) if isinstance(chain, str) else (chain or [])
    return len(steps) == len(wanted) and all(
        all(_equal(value, step.get(key)) for key, value in want.items())
        for want, step in zip(wanted, steps, strict=True)
    )


def _equal(wanted: Any, found: Any) -> bool:
    numbers = (int, float)
    if isinstance(wanted, numbers) and isinstance(found, numbers) and not isinstance(wanted, bool):
        return not isinstance(found, bool) and math.isclose(wanted, found, rel_tol=1e-9)
    return bool(wanted == found)
