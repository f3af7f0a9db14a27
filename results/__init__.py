"""Results: the DuckDB database and its record files, and everything that reads them.

* :class:`results.store.Store` is the only writer.
* :func:`connect`, :func:`runs` and :func:`runs_frame` read; :func:`rebuild`, :func:`export`, :func:`merge` and
  :func:`check` look after the files.

The schema, with the unit of every column, is ``schema.sql``. Importing this package imports neither DuckDB nor Arrow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from harness.registry import Entry

if TYPE_CHECKING:
    from results.maintenance import check, export, merge, rebuild
    from results.queries import connect, runs, runs_frame
    from results.store import Store

TABLE: dict[str, Entry] = {
    "duckdb": Entry("results.store:Store", "DuckDB database beside immutable JSON record files"),
}

_WHERE = {
    "Store": "results.store",
    "check": "results.maintenance",
    "connect": "results.queries",
    "export": "results.maintenance",
    "merge": "results.maintenance",
    "rebuild": "results.maintenance",
    "runs": "results.queries",
    "runs_frame": "results.queries",
}

__all__ = ["TABLE", "Store", "check", "connect", "export", "merge", "rebuild", "runs", "runs_frame"]


def __getattr__(name: str) -> Any:
    """Import a public function when it is first asked for (PEP 562)."""
    if name not in _WHERE:
        raise AttributeError(f"module 'results' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
