"""Where Assay keeps things: ``$ASSAY_HOME`` (default ``./runs``)."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """The folder of databases, records and caches."""
    return Path(os.environ.get("ASSAY_HOME") or "runs").absolute()


def default_db() -> Path:
    """The database used where ``--db`` is not given."""
    return home() / "assay.duckdb"


def cache(*parts: str) -> Path:
    """A folder under the cache: baselines, compressed models, artifacts, test sets."""
    return home().joinpath("cache", *parts)


def data_folders() -> list[Path]:
    """Folders named in ``ASSAY_DATA`` (separated like ``PATH``), in order."""
    return [Path(part).absolute() for part in os.environ.get("ASSAY_DATA", "").split(os.pathsep) if part]
