"""Runs a paper's recipe and reports its claims beside what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import Unavailable
from harness.runner import Event, open_store, sweep
from harness.spec import Spec
from papers import Paper, sources, verdicts
from papers.verdicts import Verdict

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """What became of a paper's claims.

    Parameters
    ----------
    paper : Paper
    verdicts : list of Verdict
        One a claim, in the order of ``claims.toml``.
    interrupted : bool
        Stopped before all cells had run; the same command goes on.
    """

    paper: Paper
    verdicts: list[Verdict]
    interrupted: bool = False

    @property
    def exit_code(self) -> int:
        """0 if every claim has its verdict and none is "not reproduced"; 130 if interrupted; else 1."""
        if self.interrupted:
            return 130
        return int(any(item.verdict and item.verdict.startswith("not ") for item in self.verdicts))

    def to_json(self) -> dict[str, Any]:
        """``{"paper", "claims": [{"id", "claimed", "measured", "tolerance", "verdict", ...}]}``."""
        return verdicts.report(self.paper, self.verdicts)

    def table(self) -> Table:
        """The claims as a table for a terminal."""
        from rich.table import Table

        table = Table(title=f"{self.paper.title} ({self.paper.key})", title_justify="left")
        for name, justify in (("claim", "left"), ("claimed %", "right"), ("measured %", "right"), ("verdict", "left")):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        for item in self.verdicts:
            claimed, measured = (f"{v:.2f}" if v is not None else "–" for v in (item.claimed, item.measured))
            table.add_row(item.id, claimed, measured, item.verdict or "measured; nothing claimed")
        return table

    def summary(self) -> str:
        """One line: how many claims were reproduced, and within what."""
        claimed = [item for item in self.verdicts if item.claimed is not None]
        good = sum(item.verdict == "reproduced" for item in claimed)
        tolerances = sorted({item.tolerance for item in claimed})
        within = f" within {', '.join(f'{value:g}' for value in tolerances)} points" if claimed else ""
        return f"{good} of {len(claimed)} claims reproduced{within}." + (" Interrupted." if self.interrupted else "")


def reproduce(
    paper: Paper, *, db: Path, rerun: bool = False, watch: Callable[[Event], None] | None = None
) -> Reproduction:
    """Fetch a paper's files, run its cells (those not yet in the database) and judge its claims.

    Verdicts on what was run are kept in the database's table ``claims``, so that a table of them can be made later.

    Parameters
    ----------
    paper : Paper
        From :func:`papers.load`.
    db : Path
        The database.
    rerun : bool
        Measure again what the database has.
    watch : callable, optional
        Receives the sweep's events.

    Raises
    ------
    DataError
        If a file is there but is not the one that the recipe names.
    """
    from results.queries import of_runs

    try:
        sources.fetch(paper)
    except Unavailable as error:
        return Reproduction(paper=paper, verdicts=verdicts.judge(paper.claims, [], not_run=str(error)))
    spec = Spec.from_mapping(paper.spec, f"papers/{paper.key}/recipe.toml")
    outcome = sweep(spec, db=db, rerun=rerun, watch=watch or (lambda event: None))
    found = of_runs(db, list(outcome.run_ids.values())) if outcome.run_ids else {}
    judged = verdicts.judge(paper.claims, list(found.values()))
    if not outcome.interrupted:
        open_store(db).add_claims(paper.key, [item.to_json() for item in judged if item.verdict is not None])
    return Reproduction(paper=paper, verdicts=judged, interrupted=outcome.interrupted)
