"""From verified records to rows: what the only writer does inside its transaction."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from harness.canonical import dumps
from results.records import Stored, moment

_RECORD_JSON = (
    "task_config",
    "chain",
    "hardware_config",
    "settings",
    "packages",
    "machine",
    "conditions",
    "effective",
    "stages",
    "reasons",
    "warnings",
)
_RECORD_PLAIN = (
    "run_id",
    "status",
    "reason",
    "traceback",
    "task",
    "method",
    "hardware",
    "seed",
    "batch_size",
    "threads",
    "spec_name",
    "spec_hash",
    "cell_hash",
    "task_hash",
    "method_hash",
    "hardware_hash",
    "dataset_hash",
    "git_commit",
    "git_dirty",
    "precision",
    "params_original",
    "params_total",
    "params_nonzero",
    "macs",
    "n_examples",
    "n_correct",
    "warmup_queries",
    "load_ms",
    "first_ms",
    "peak_rss_bytes",
)
_MACHINE_PLAIN = ("hostname", "cpu_model", "cores", "memory_bytes", "governor", "os")
_CLAIM_PLAIN = ("entry_id", "paper", "id", "claimed", "measured", "tolerance", "verdict", "reason")
_EMPTY: Mapping[str, Any] = {"chain": [], "stages": [], "warnings": []}


def config_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The column ``config``: ``{step: its parameters, ..., "hardware": its parameters}``, empty ones left out.

    A step name that occurs again gets ``#2``, ``#3``, ... so that none is lost.
    """
    found: dict[str, Any] = {}
    for step in record["chain"]:
        parameters = {key: value for key, value in step.items() if key != "name"}
        name, count = step["name"], 2
        while name in found:
            name, count = f"{step['name']}#{count}", count + 1
        if parameters:
            found[name] = parameters
    if record["hardware_config"]:
        found["hardware"] = dict(record["hardware_config"])
    return found


def record_row(stored: Stored) -> dict[str, Any]:
    """The row of ``records``."""
    record = stored.value
    labels, predictions = record.get("labels"), record.get("predictions")
    row: dict[str, Any] = {name: record.get(name) for name in _RECORD_PLAIN}
    row |= {name: dumps(_or(record.get(name), _EMPTY.get(name, {}))) for name in _RECORD_JSON}
    fidelity = record.get("fidelity")
    return row | {
        "created_at": moment(record["created_at"]),
        "config": dumps(config_of(record)),
        "correct": "".join("01"[a == b] for a, b in zip(labels, predictions, strict=True))
        if labels and predictions
        else None,
        "labels_sha256": hashlib.sha256(dumps(labels).encode()).hexdigest() if labels else None,
        "machine_id": (record.get("machine") or {}).get("machine_id"),
        "fidelity": None if fidelity is None else dumps(fidelity),
        "record_schema": record.get("schema", 1),
        "record_sha256": stored.sha256,
    }


def claim_row(stored: Stored) -> dict[str, Any]:
    """The row of ``claims``; fields without a column go to ``details``."""
    claim = stored.value
    rest = {k: v for k, v in claim.items() if k not in _CLAIM_PLAIN and k not in ("created_at", "run_ids", "details")}
    return {name: claim.get(name) for name in _CLAIM_PLAIN} | {
        "created_at": moment(claim["created_at"]),
        "run_ids": list(claim.get("run_ids") or ()),
        "details": dumps({**rest, **(claim.get("details") or {})}),
        "record_sha256": stored.sha256,
    }


def insert(connection: Any, batch: Sequence[Stored]) -> None:
    """Insert records and claims that the database does not have yet; the caller holds the transaction.

    What the tables hold afterwards depends on the set of records, not on their order.
    """
    records = [stored for stored in batch if stored.kind == "record"]
    if records:
        _append(connection, "records", [record_row(stored) for stored in records], {"correct": "CAST(correct AS BIT)"})
        _insert_samples(connection, records)
        _append(connection, "energy_readings", [row for s in records for row in _energy_rows(s)])
        _append(connection, "artifacts", [row for s in records if (row := _artifact_row(s))])
        _append(connection, "weights", [row for s in records if (row := _weights_row(s))])
        _upsert_machines(connection, records)
    _append(connection, "claims", [claim_row(stored) for stored in batch if stored.kind == "claim"])


def _insert_samples(connection: Any, records: Sequence[Stored]) -> None:
    import numpy as np
    import pyarrow as pa

    latency, predictions = [], []
    for stored in records:
        record = stored.value
        if samples := record.get("latency_ns"):
            columns = [pa.repeat(stored.id, len(samples)), np.arange(len(samples), dtype=np.int32)]
            latency.append(pa.table([*columns, pa.array(samples, pa.int64())], names=["run_id", "i", "ns"]))
        if labels := record.get("labels"):
            columns = [pa.repeat(stored.id, len(labels)), np.arange(len(labels), dtype=np.int32)]
            columns += [pa.array(labels, pa.int64()), pa.array(record["predictions"], pa.int64())]
            predictions.append(pa.table(columns, names=["run_id", "example_id", "label", "predicted"]))
    for name, parts in (("latency_samples", latency), ("predictions", predictions)):
        if parts:
            _insert_table(connection, name, pa.concat_tables(parts), {})


def _energy_rows(stored: Stored) -> list[dict[str, Any]]:
    names = ("method", "domain", "gross_j", "idle_w", "window_s", "inferences", "grid_g_per_kwh")
    return [
        {"run_id": stored.id, "i": i, "inputs": dumps(reading.get("inputs") or {})}
        | {name: reading.get(name) for name in names}
        for i, reading in enumerate(stored.value.get("energy") or ())
    ]


def _artifact_row(stored: Stored) -> dict[str, Any] | None:
    artifact = stored.value.get("artifact")
    if not artifact:
        return None
    files = artifact.get("files")
    return {name: artifact.get(name) for name in ("sha256", "size_bytes", "zstd_bytes", "format")} | {
        "run_id": stored.id,
        "files": None if files is None else dumps(files),
    }


def _weights_row(stored: Stored) -> dict[str, Any] | None:
    weights = stored.value.get("weights")
    if not weights:
        return None
    names = ("plain_bytes", "container_bytes", "shannon_bytes", "zstd_bytes", "xz_bytes", "gzip_bytes")
    return {"run_id": stored.id} | {name: weights.get(name) for name in names}


def _upsert_machines(connection: Any, records: Sequence[Stored]) -> None:
    newest: dict[Any, dict[str, Any]] = {}
    for stored in records:
        machine = stored.value.get("machine") or {}
        if not machine.get("machine_id"):
            continue
        row = {name: machine.get(name) for name in _MACHINE_PLAIN} | {
            "machine_id": machine["machine_id"],
            "last_run_id": stored.id,
            "last_seen": moment(stored.value["created_at"]),
            "isa": dumps(machine["isa"]) if machine.get("isa") is not None else None,
            "gpus": dumps(machine["gpus"]) if machine.get("gpus") is not None else None,
            "description": dumps(machine),
        }
        known = newest.get(row["machine_id"])
        if known is None or (row["last_seen"], row["last_run_id"]) > (known["last_seen"], known["last_run_id"]):
            newest[row["machine_id"]] = row
    for machine_id, row in newest.items():
        known_rows = connection.execute(
            "SELECT last_seen, last_run_id FROM machines WHERE machine_id = ?", [machine_id]
        ).fetchall()
        if not known_rows:
            _append(connection, "machines", [row])
        elif (row["last_seen"], row["last_run_id"]) > known_rows[0]:
            # An update in place: DuckDB's index refuses to delete and insert one key within a transaction.
            names = [name for name in row if name != "machine_id"]
            assignments = ", ".join(f"{name} = ?" for name in names)
            connection.execute(
                f"UPDATE machines SET {assignments} WHERE machine_id = ?",  # noqa: S608  (column names are ours)
                [*(row[name] for name in names), machine_id],
            )


def _append(
    connection: Any, name: str, rows: Sequence[Mapping[str, Any]], casts: Mapping[str, str] | None = None
) -> None:
    import pyarrow as pa

    if rows:
        # Types come from the database, so that a column of None in one batch is not guessed.
        described = {row[0]: row[1] for row in connection.execute(f"DESCRIBE {name}").fetchall()}
        fields = [pa.field(column, _arrow_type(described[column])) for column in rows[0]]
        _insert_table(connection, name, pa.Table.from_pylist(list(rows), schema=pa.schema(fields)), casts or {})


def _arrow_type(duckdb_type: str) -> Any:
    import pyarrow as pa

    types = {
        "BIGINT": pa.int64(),
        "INTEGER": pa.int32(),
        "DOUBLE": pa.float64(),
        "BOOLEAN": pa.bool_(),
        "TIMESTAMP WITH TIME ZONE": pa.timestamp("us", tz="UTC"),
        "VARCHAR[]": pa.list_(pa.string()),
    }
    return types.get(duckdb_type, pa.string())


def _insert_table(connection: Any, name: str, table: Any, casts: Mapping[str, str]) -> None:
    columns = ", ".join(table.column_names)
    values = ", ".join(casts.get(column, column) for column in table.column_names)
    connection.register("incoming", table)
    try:
        connection.execute(f"INSERT INTO {name} ({columns}) SELECT {values} FROM incoming")  # noqa: S608  (ours)
    finally:
        connection.unregister("incoming")


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
