"""Runs a paper's recipe and reports its claims beside what was measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import Unavailable
from harness.runner import Event, open_store, sweep
from harness.spec import Spec
from papers import Paper, sources, tables, verdicts
from papers.origin import Origin, origin
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
    origin : Origin or None
        Where the figures come from; None where nothing was run.
    interrupted : bool
        Stopped before all cells had run; the same command goes on.
    """

    paper: Paper
    verdicts: list[Verdict]
    origin: Origin | None = None
    interrupted: bool = False

    @property
    def exit_code(self) -> int:
        """130 if interrupted; 1 if a claim was not run, or one did not come out; else 0.

        Stand-ins and cut budgets are no verdict on the paper and never fail; nor does a quick run's figure.
        """
        if self.interrupted:
            return 130
        return int(any(item.not_run or (item.failed and not self.paper.quick) for item in self.verdicts))

    def to_json(self) -> dict[str, Any]:
        """``{"paper", "settings", "quick", "budget", "claims": [{"id", "claimed", "measured", ...}], "origin"}``."""
        made = self.origin.to_json() if self.origin else None
        return {**verdicts.report(self.paper, self.verdicts), "origin": made}

    def table(self) -> Table:
        """The claims as a table for a terminal."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=escape(f"{self.paper.title} ({self.paper.key})"), title_justify="left")
        for name in tables.HEADER:
            table.add_column(name, overflow="fold")
        for item in self.verdicts:
            table.add_row(*map(escape, tables.cells(item)))
        return table

    def markdown(self) -> str:
        """The claims as a Markdown table, and where they come from."""
        lines = [f"The full run is cut from the paper's budget: {self.paper.budget}\n"] if self.paper.budget else []
        if self.origin:
            lines.append(self.origin.line())
        return tables.markdown(self.verdicts, lines)

    def summary(self) -> str:
        """How many claims were reproduced and within what; what became of the relations; what was not run."""
        values = [item for item in self.verdicts if item.kind == "value" and not item.stand_in]
        stand_ins = [item for item in self.verdicts if _base(item) == "stand-in"]
        relations = [item for item in self.verdicts if item.kind == "relation"]
        parts = [_reproduced(values)] if any(item.claimed is not None for item in values) else []
        parts += [f"{len(stand_ins)} figures of a stand-in (no verdict)"] if stand_ins else []
        parts += [f"{len(relations)} relations: {_counts(relations)}"] if relations else []
        missing = sum(item.not_run for item in self.verdicts)
        parts += [f"{missing} of all not run"] if missing else []
        text = f"{'; '.join(parts) or 'Nothing is claimed'}."
        if self.paper.quick:
            text += " This was a quick run: no verdict on the paper."
        elif self.paper.budget:
            text += f" Cut budget: {self.paper.budget}"
        return text + (" Interrupted." if self.interrupted else "")


def _reproduced(values: Sequence[Verdict]) -> str:
    claimed = [item for item in values if item.claimed is not None]
    good = sum(_base(item) == "reproduced" for item in claimed)
    tolerances = {(item.tolerance, "points" if item.unit == "%" else item.unit) for item in claimed}
    # One tolerance is worth a word; several stand in the claims.
    within = " within {:g} {}".format(*tolerances.pop()) if len(tolerances) == 1 else ""
    return f"{good} of {len(claimed)} claims reproduced{within}"


def _counts(relations: Sequence[Verdict]) -> str:
    counts = Counter(_base(item) for item in relations)
    words = ("holds", "does not hold", "inconclusive", "not run")
    return ", ".join(f"{word} {counts[word]}" for word in words if counts[word])


def _base(item: Verdict) -> str:
    """The verdict's word without its qualifications."""
    return (item.verdict or "").removeprefix("quick: ").partition(" (")[0]


def reproduce(
    paper: Paper, *, db: Path, rerun: bool = False, watch: Callable[[Event], None] | None = None
) -> Reproduction:
    """Fetch a paper's files, run its cells (those not yet in the database) and judge its claims.

    Verdicts on what was run are kept in the database's table ``claims``, so that a table of them can be made later; a
    quick run's are not kept.

    Parameters
    ----------
    paper : Paper
        From :func:`papers.recipe.load`.
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
    try:
        sources.fetch(paper)
    except Unavailable as error:
        return Reproduction(paper=paper, verdicts=verdicts.judge(paper.claims, [], not_run=str(error)))
    run_ids, interrupted = _run(paper, db, rerun, watch or (lambda event: None))
    rows = _rows(db, run_ids)
    judged = verdicts.judge(paper.claims, rows, quick=paper.quick, cut_budget=paper.budget is not None)
    made = origin(paper, rows, db) if rows else None
    if not interrupted and not paper.quick:
        open_store(db).add_claims(paper.key, [kept(paper, item, made) for item in judged if item.verdict is not None])
    return Reproduction(paper=paper, verdicts=judged, origin=made, interrupted=interrupted)


def _run(paper: Paper, db: Path, rerun: bool, watch: Callable[[Event], None]) -> tuple[list[str], bool]:
    """Run the paper's specs one after the other, as one sweep for who watches; the run ids, and if it was stopped."""
    specs = [Spec.from_mapping(spec, f"papers/{paper.key}/recipe.toml") for spec in paper.specs]
    # All of them are expanded, and so checked, before the first is run.
    counts = [len(spec.cells()) for spec in specs]
    run_ids: dict[str, None] = {}
    for index, spec in enumerate(specs):
        before = sum(counts[:index])

        def shifted(event: Event, before: int = before) -> None:
            watch(replace(event, index=event.index + before, total=sum(counts)))

        outcome = sweep(spec, db=db, rerun=rerun, watch=shifted)
        run_ids.update(dict.fromkeys(outcome.run_ids.values()))
        if outcome.interrupted:
            return list(run_ids), True
    return list(run_ids), False


def _rows(db: Path, run_ids: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of ``runs``, with what each stage of the chain reported."""
    from results import queries

    if not run_ids:
        return []
    stages = {row["run_id"]: row["stages"] for row in queries.query(db, "SELECT run_id, stages FROM records")}
    return [{**row, "stages": stages[run_id]} for run_id, row in queries.of_runs(db, run_ids).items()]


def kept(paper: Paper, item: Verdict, made: Origin | None) -> dict[str, Any]:
    """What the table ``claims`` keeps; what is not one of its columns goes to ``details``."""
    return {
        **item.to_json(),
        "settings": dict(paper.settings),
        "budget": paper.budget,
        "origin": made.to_json() if made else None,
    }
