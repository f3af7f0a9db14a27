"""Reading: rows of the database as dictionaries, Arrow or pandas. Nothing here creates or changes a file."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from harness.errors import InputError
from harness.filters import Filter
from harness.text import shown
from results import database, schema


def connect(db: Path | str) -> Any:
    """A read-only DuckDB connection. Close it soon: while it is open nobody can write.

    Parameters
    ----------
    db : path
        The database file.

    Raises
    ------
    InputError
        If there is no such file.
    DatabaseBusy, StoreError
        If it is held by another process for too long, or cannot be read.
    """
    return database.connect(Path(db))


def runs(db: Path | str, where: str | None = None) -> Any:
    """The view ``runs`` as a ``pyarrow.Table``.

    Parameters
    ----------
    db : path
        The database file.
    where : str, optional
        ``key=value,...`` as in :mod:`harness.filters`; see :func:`chosen`.

    Raises
    ------
    InputError
        If there is no such file or column.
    DatabaseBusy, StoreError
        If it is held by another process for too long, or cannot be read.
    """
    with database.reading(Path(db)) as connection:
        table = connection.sql("SELECT * FROM runs").to_arrow_table()
    if where is None:
        return table
    rows_ = table.to_pylist()
    kept = {row["run_id"] for row in chosen(rows_, where)}
    return table.filter([row["run_id"] in kept for row in rows_])


def runs_frame(db: Path | str, where: str | None = None) -> Any:
    """:func:`runs` as a ``pandas.DataFrame``.

    Raises
    ------
    Unavailable
        If pandas is not installed.
    """
    try:
        import pandas  # noqa: F401
    except ImportError:
        from harness.errors import Unavailable

        raise Unavailable('pandas is not installed: pip install "assay-bench[plot]"') from None
    return runs(db, where).to_pandas()


def rows(connection: Any, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> list[dict[str, Any]]:
    """A query's rows as dictionaries of JSON values; times are ISO 8601 text, JSON columns stay text.

    Columns of equal name get ``_1``, ``_2``, ... as in DuckDB's own clients, so that no value is lost.
    """
    cursor = connection.execute(sql, parameters)
    if cursor.description is None:
        return []
    names: list[str] = []
    for column in cursor.description:
        name, count = column[0], 1
        while name in names:
            name, count = f"{column[0]}_{count}", count + 1
        names.append(name)
    return [dict(zip(names, map(plain, row), strict=True)) for row in cursor.fetchall()]


def plain(value: Any) -> Any:
    """A DuckDB value as a JSON value: NaN and infinity become None, times and everything unknown become text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.hex() if isinstance(value, bytes) else str(value)


def select(db: Path, view: str, where: str | None = None) -> list[dict[str, Any]]:
    """Rows of ``runs`` or ``latest`` that satisfy ``where``, oldest first.

    Raises
    ------
    InputError
        If there is no such file or column.
    DatabaseBusy, StoreError
        If it is held by another process for too long, or cannot be read.
    """
    with database.reading(db) as connection:
        found = rows(connection, f"SELECT * FROM {view}")  # noqa: S608  (one of two names of ours)
    return chosen(found, where)


def chosen(found: Sequence[Mapping[str, Any]], where: str | None) -> list[dict[str, Any]]:
    """Rows of ``runs`` that satisfy an expression.

    Keys are the columns of ``runs``; a dot reaches into JSON columns (``config.magnitude.sparsity=0.9``), and
    ``hardware.OPTION`` is a parameter of the hardware, as in ``--only``.

    Raises
    ------
    InputError
        For an expression that cannot be read, or an unknown key.
    """
    if not where:
        return [dict(row) for row in found]
    wide = [_flattened(row) for row in found]
    condition = Filter.parse(where, {*schema.documented()["runs"].columns, *(key for row in wide for key in row)})
    return [dict(row) for row, flat in zip(found, wide, strict=True) if condition.accepts(flat)]


def _flattened(row: Mapping[str, Any]) -> dict[str, Any]:
    flat = dict(row)
    for column in ("config", "settings", "effective", "task_config"):
        _flatten(flat, column, json.loads(row[column] or "{}"))
    _flatten(flat, "hardware", json.loads(row["hardware_config"] or "{}"))
    return flat


def _flatten(flat: dict[str, Any], prefix: str, value: Any) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _flatten(flat, f"{prefix}.{key}", item)
    elif prefix not in flat:
        flat[prefix] = value


def of_runs(db: Path, run_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The rows of ``runs`` of these run ids; one that the database does not have is left out.

    Raises
    ------
    InputError
        If there is no such file.
    DatabaseBusy, StoreError
        If it is held by another process for too long, or cannot be read.
    """
    with database.reading(db) as connection:
        found = rows(connection, "SELECT * FROM runs WHERE run_id IN (SELECT unnest(?))", [list(run_ids)])
    return {row["run_id"]: row for row in found}


def full(db: Path, run: str) -> dict[str, Any]:
    """Everything about one run: its row of ``runs`` with JSON parsed, the rest of its record, and its parts.

    The parts are lists of rows: ``scores``, ``phases``, ``layers`` and ``energy_readings``.

    Parameters
    ----------
    db : Path
        The database.
    run : str
        The run's id, or a prefix that only it has.

    Raises
    ------
    InputError
        If there is no such file, or not exactly one such run.
    DatabaseBusy, StoreError
        If it is held by another process for too long, or cannot be read.
    """
    with database.reading(db) as connection:
        ids = [name for (name,) in connection.execute("SELECT run_id FROM records ORDER BY run_id").fetchall()]
        matching = [name for name in ids if name == run] or [name for name in ids if name.startswith(run)]
        if not matching:
            raise InputError(f"No run {run!r} in {db}. `assay ls runs` lists them.")
        if len(matching) > 1:
            raise InputError(
                f"{run!r} is the beginning of {len(matching)} runs: {', '.join(matching[:5])} ... Write more of it."
            )
        (row,) = _of_run(connection, "runs", matching[0])
        (record,) = _of_run(connection, "records", matching[0])
        (artifact,) = _of_run(connection, "artifacts", matching[0]) or [{}]
        parts = {name: _of_run(connection, name, matching[0]) for name in ("scores", "phases", "layers")}
        parts["energy_readings"] = _of_run(connection, "energy_readings", matching[0])
    for part in itertools.chain.from_iterable(parts.values()):
        del part["run_id"]
    return {
        **record,
        "artifact_format": artifact.get("format"),
        "artifact_files": artifact.get("files"),
        **row,
        **parts,
    }


def _of_run(connection: Any, name: str, run_id: str) -> list[dict[str, Any]]:
    """A run's rows of a table or view, JSON columns parsed."""
    described = schema.documented()[name].columns
    order = "ORDER BY i" if "i" in described else ""
    found = rows(connection, f"SELECT * FROM {name} WHERE run_id = ? {order}", [run_id])  # noqa: S608  (ours)
    for row in found:
        for column, text in described.items():
            if "(JSON" in text and isinstance(row[column], str):
                row[column] = json.loads(row[column])
    return found


def query(db: Path, sql: str) -> list[dict[str, Any]]:
    """Run one read-only SQL statement.

    Raises
    ------
    InputError
        If there is no such file, or DuckDB refuses the statement.
    DatabaseBusy, StoreError
        If it is held by another process for too long, or cannot be read.
    """
    import duckdb

    with database.reading(db) as connection:
        try:
            statements = connection.extract_statements(sql)
            if len(statements) != 1:
                raise InputError(f'{shown(sql)} is not one SQL statement. Write one, such as "FROM latest".')
            return rows(connection, sql)
        except (duckdb.Error, TypeError) as error:  # a TypeError is what text with a lone surrogate gives
            raise InputError(f"SQL: {' '.join(str(error).split())}") from None
