"""Where a paper's figures come from: command, machine, date, commit and the work they took."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from papers import Paper

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The provenance of a set of runs; None where it is not known.

    Parameters
    ----------
    command : str
        That makes them.
    machine : list of str
        Every machine that they ran on: processor, cores, threads of the timed runs.
    date : str or None
        Of the newest run, UTC, ISO 8601.
    commit : str or None
        Of Assay's checkout, with "+changes" where it had uncommitted ones; several are joined by commas.
    compute_s : float or None
        Seconds of training and compression, each stage counted once however many runs share it.
    """

    command: str
    machine: list[str]
    date: str | None
    commit: str | None
    compute_s: float | None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    def line(self) -> str:
        """One line of text."""
        parts = [f"`{self.command}`", "; ".join(self.machine) or "machine not known"]
        if self.date:
            parts.append(f"newest run {self.date}")
        if self.commit:
            parts.append(f"commit {self.commit}")
        if self.compute_s is not None:
            parts.append(f"{_duration(self.compute_s)} of training and compression")
        return " · ".join(parts)


def origin(paper: Paper, rows: Sequence[Row], db: Path) -> Origin:
    """Of a paper's runs.

    Parameters
    ----------
    paper : Paper
    rows : sequence of mapping
        Rows of the view ``runs``.
    db : Path
        The database, which knows the machines.
    """
    newest = max((str(row["created_at"]) for row in rows), default=None)
    commits = sorted({_commit(row) for row in rows if row.get("git_commit")})
    return Origin(
        command=paper.command,
        machine=_machines(rows, db),
        date=newest[:10] if newest else None,
        commit=", ".join(commits) or None,
        compute_s=_compute(rows),
    )


def _commit(row: Row) -> str:
    return str(row["git_commit"])[:10] + ("+changes" if row.get("git_dirty") else "")


def _machines(rows: Sequence[Row], db: Path) -> list[str]:
    from results import queries

    newest: dict[Any, Row] = {}
    for row in sorted(rows, key=lambda row: str(row["created_at"])):
        newest[row.get("machine_id"), row.get("threads")] = row
    found = [(queries.full(db, str(row["run_id"])).get("machine") or {}, row) for row in newest.values()]
    return sorted({_machine(machine, row) for machine, row in found if machine})


def _machine(machine: Mapping[str, Any], row: Row) -> str:
    counts = (_count(machine.get("cores"), "core"), f"timed on {_count(row.get('threads'), 'thread')}")
    return ", ".join((str(machine.get("cpu_model") or "processor not known"), *counts))


def _count(number: Any, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _compute(rows: Sequence[Row]) -> float | None:
    seconds: dict[str, float] = {}
    for row in rows:
        stages, chain = json.loads(row.get("stages") or "[]"), json.loads(row["chain"])
        for index, stage in enumerate(stages):
            # A stage is what came before it and its step; runs that share it have it from the cache.
            name = json.dumps([row["task"], row.get("task_config"), row["seed"], chain[:index]])
            if stage.get("seconds") is not None:
                seconds[name] = float(stage["seconds"])
    return sum(seconds.values()) if seconds else None


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
