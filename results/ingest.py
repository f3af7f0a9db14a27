"""From verified records to rows: what the only writer does inside its transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness import stats
from harness.canonical import digest, dumps
from results import comparisons
from results.appending import append, insert_table
from results.columns import COLUMNS
from results.records import Stored, moment

Rows = dict[str, list[dict[str, Any]]]
"""Table to rows."""

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
    "notes",
)
_RECORD_JSON_OR_NULL = ("signature", "workload")
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
    "original_sha256",
    "random_in_evaluation",
    "warmup_queries",
    *(column.name for column in COLUMNS if column.field),
)
_SETTING = (
    "task",
    "task_config",
    "task_hash",
    "hardware",
    "hardware_config",
    "seed",
    "threads",
    "batch_size",
    "dataset_hash",
)
"""What must be equal for two runs to be compared, beside machine, model and workload."""
_PERCENTILES = (("p50_ms", 0.5), ("p90_ms", 0.9), ("p99_ms", 0.99))
_LAYER = (*("name", "kind", "parameters", "nonzero", "bits", "rank", "error_mean", "error_max", "sqnr_db"),)
_SCORE = ("metric", "data", "against", "unit", "better", "proportion", "split_sha256", "n", "value")
_MACHINE_PLAIN = ("hostname", "cpu_model", "cores", "memory_bytes", "governor", "os")
_CLAIM_PLAIN = ("entry_id", "paper", "id", "claimed", "measured", "tolerance", "verdict", "reason")
_EMPTY: Mapping[str, Any] = {"chain": [], "stages": [], "warnings": [], "notes": []}


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
    machine_id = (record.get("machine") or {}).get("machine_id")
    row: dict[str, Any] = {name: record.get(name) for name in _RECORD_PLAIN}
    row |= {name: dumps(_or(record.get(name), _EMPTY.get(name, {}))) for name in _RECORD_JSON}
    row |= {name: None if record.get(name) is None else dumps(record[name]) for name in _RECORD_JSON_OR_NULL}
    setting = [*(record.get(name) for name in _SETTING), machine_id, stored.origin is not None]
    return row | {
        "created_at": moment(record["created_at"]),
        "config": dumps(config_of(record)),
        "machine_id": machine_id,
        "setting_sha256": digest(setting),
        "origin": stored.origin,
        "arrived_at": stored.arrived_at,
        "record_schema": stored.written.get("schema", 1),
        "record_sha256": stored.sha256,
    }


def measured_rows(stored: Stored) -> Rows:
    """The rows of a record in the other tables, table by table; see :func:`latency_samples` for that one.

    Statistics that :mod:`results.comparisons` computes are left out: ``low``, ``high`` and ``no_interval`` of scores,
    and comparisons.
    """
    record = stored.value
    rows: Rows = {
        "phases": _phase_rows(record),
        "scores": [],
        "example_scores": [],
        "energy_readings": _energy_rows(record),
        "artifacts": _artifact_rows(record),
        "weights": _weights_rows(record),
        "layers": _layer_rows(record),
    }
    for i, score in enumerate(record.get("scores") or ()):
        rows["scores"].append({"i": i, "config": dumps(score["config"])} | {name: score.get(name) for name in _SCORE})
        for part, values in (score.get("parts") or {}).items():
            rows["example_scores"].append({"i": i, "part": part, "by_example": values})
    return {name: [{"run_id": stored.id, **row} for row in found] for name, found in rows.items()}


def latency_samples(stored: Stored) -> Mapping[str, Sequence[int]]:
    """Phase to the nanoseconds of every timed call: ``latency_samples``, too many for a mapping each."""
    found: Mapping[str, Sequence[int]] = stored.value.get("latency") or {}
    return found


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


def insert(connection: Any, batch: Sequence[Stored], *, compare: bool = True) -> None:
    """Insert records and claims that the database does not have yet; the caller holds the transaction.

    What the tables hold afterwards depends on the set of records, not on their order.

    Parameters
    ----------
    connection : duckdb.DuckDBPyConnection
    batch : sequence of Stored
    compare : bool
        Whether to compare the runs with their baselines. A caller that inserts many batches leaves it out of all and
        calls :func:`results.comparisons.bring_up_to_date` once, in the end.
    """
    records = [stored for stored in batch if stored.kind == "record"]
    if records:
        append(connection, "records", [record_row(stored) for stored in records])
        _insert_samples(connection, records)
        rows: Rows = {}
        for stored in records:
            for name, found in measured_rows(stored).items():
                rows.setdefault(name, []).extend(_with_intervals(stored, found) if name == "scores" else found)
        for name, found in rows.items():
            append(connection, name, found)
        _upsert_machines(connection, records)
        if compare:
            comparisons.bring_up_to_date(connection)
    append(connection, "claims", [claim_row(stored) for stored in batch if stored.kind == "claim"])


def _with_intervals(stored: Stored, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    scores = stored.value.get("scores") or ()
    machine_id = machine_of(stored)
    return [
        row | comparisons.interval(row, score.get("parts") or {}, machine_id)
        for row, score in zip(rows, scores, strict=True)
    ]


def machine_of(stored: Stored) -> str | None:
    """Where a record was made; None for one that was merged: what it says of its machine is not our own word."""
    found: str | None = (stored.value.get("machine") or {}).get("machine_id")
    return found if stored.origin is None else None


def _insert_samples(connection: Any, records: Sequence[Stored]) -> None:
    import numpy as np
    import pyarrow as pa

    tables = []
    for stored in records:
        for phase, samples in latency_samples(stored).items():
            columns = [pa.repeat(stored.id, len(samples)), pa.repeat(phase, len(samples))]
            columns += [np.arange(len(samples), dtype=np.int32), pa.array(samples, pa.int64())]
            tables.append(pa.table(columns, names=["run_id", "phase", "i", "ns"]))
    if tables:
        insert_table(connection, "latency_samples", pa.concat_tables(tables))


def _phase_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Latency by phase, in the workload's order, summed up."""
    import numpy as np

    latency, workload = record.get("latency") or {}, record.get("workload") or {}
    calls = dict(workload.get("phases") or ())
    order = [*calls, *(name for name in latency if name not in calls)]
    rows = []
    for i, phase in enumerate(name for name in order if latency.get(name)):
        samples = np.sort(np.asarray(latency[phase], dtype=np.int64))
        row = {"i": i, "phase": phase, "calls": calls.get(phase, 1), "units": _units(phase, workload)}
        row |= {"n": len(samples), "total_ns": int(samples.sum())}
        for name, q in _PERCENTILES:
            enough = len(samples) >= stats.required_n(q)
            row[name] = float(np.quantile(samples, q)) / 1e6 if enough else None
        rows.append(row)
    return rows


def _units(phase: str, workload: Mapping[str, Any]) -> int:
    """How many of the workload's units one call makes of one example: a step of decoding makes one token."""
    if workload.get("unit", "example") == "example" or phase == "decode":
        return 1
    return int((workload.get("sizes") or {}).get("tokens", 1))


def _energy_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = ("method", "domain", "gross_j", "idle_w", "window_s", "inferences", "grid_g_per_kwh")
    return [
        {"i": i, "inputs": dumps(reading.get("inputs") or {})} | {name: reading.get(name) for name in names}
        for i, reading in enumerate(record.get("energy") or ())
    ]


def _artifact_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    artifact = record.get("artifact")
    if not artifact:
        return []
    files = artifact.get("files")
    names = ("sha256", "size_bytes", "zstd_bytes", "format")
    return [{name: artifact.get(name) for name in names} | {"files": None if files is None else dumps(files)}]


def _weights_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    weights = record.get("weights")
    names = ("plain_bytes", "container_bytes", "shannon_bytes", "zstd_bytes", "xz_bytes", "gzip_bytes")
    return [{name: weights.get(name) for name in names}] if weights else []


def _layer_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"i": i, "shape": None if layer.get("shape") is None else dumps(layer["shape"])}
        | {name: layer.get(name) for name in _LAYER}
        for i, layer in enumerate(record.get("layers") or ())
    ]


def _upsert_machines(connection: Any, records: Sequence[Stored]) -> None:
    """Keep each machine as its newest run described it: one of our own, where there is one, and by order of arrival."""
    newest: dict[str, tuple[Any, Stored]] = {}
    for stored in records:
        if machine_id := (stored.value.get("machine") or {}).get("machine_id"):
            age = (stored.origin is None, stored.arrived_at, moment(stored.value["created_at"]), stored.id)
            if machine_id not in newest or age > newest[machine_id][0]:
                newest[machine_id] = (age, stored)
    for machine_id, (age, stored) in newest.items():
        known = connection.execute(
            "SELECT origin IS NULL, arrived_at, created_at, run_id FROM records WHERE run_id = "
            "(SELECT last_run_id FROM machines WHERE machine_id = ?)",
            [machine_id],
        ).fetchall()
        row = _machine_row(stored)
        if not known:
            append(connection, "machines", [row])
        elif age > known[0]:
            # An update in place: DuckDB's index refuses to delete and insert one key within a transaction.
            names = [name for name in row if name != "machine_id"]
            assignments = ", ".join(f"{name} = ?" for name in names)
            connection.execute(
                f"UPDATE machines SET {assignments} WHERE machine_id = ?",  # noqa: S608  (column names are ours)
                [*(row[name] for name in names), machine_id],
            )


def _machine_row(stored: Stored) -> dict[str, Any]:
    machine = stored.value["machine"]
    return {name: machine.get(name) for name in _MACHINE_PLAIN} | {
        "machine_id": machine["machine_id"],
        "last_run_id": stored.id,
        "last_seen": moment(stored.value["created_at"]),
        "isa": dumps(machine["isa"]) if machine.get("isa") is not None else None,
        "gpus": dumps(machine["gpus"]) if machine.get("gpus") is not None else None,
        "description": dumps(machine),
    }


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
