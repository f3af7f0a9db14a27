"""The schema's documentation, and the view ``runs`` against hand-computed values."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness import stats
from harness.contracts import Store as StoreContract
from harness.registry import resolve
from results import database, queries, records, schema
from results.store import Store
from tests.unit.factories import BASELINE, predictions, reading, record, unmeasured

PROMISED = """
run_id created_at status reason task method chain config hardware seed batch_size threads precision accuracy
accuracy_low accuracy_high n_examples size_bytes zstd_bytes compression_ratio params_total params_nonzero
pruning_rate macs latency_p50_ms latency_p90_ms latency_p99_ms n_latency speedup throughput_per_s energy_j
energy_method carbon_g peak_rss_bytes load_ms first_ms fidelity_max_abs fidelity_top1 accuracy_delta mcnemar_p
spec_hash method_hash git_commit git_dirty machine_id artifact_sha256 accuracy_delta_low accuracy_delta_high
energy_ratio zstd_compression_ratio baseline_run_id hardware_config spec_name cell_hash params_original effective
warnings reasons plain_bytes container_bytes shannon_bytes weights_zstd_bytes xz_bytes gzip_bytes
container_compression_ratio macs_ratio
"""

PRUNED = [{"name": "magnitude", "sparsity": 0.9}]


def rows_of(tmp_path: Path, *added: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of ``runs`` by run id, after adding the records in one go."""
    store = Store(tmp_path / "assay.duckdb")
    for item in added:
        records.write(store.folder, records.checked("record", item))
    store.sync()
    return {row["run_id"]: row for row in queries.select(store.path, "runs")}


def test_every_column_is_documented_with_a_unit_in_file_and_database(tmp_path: Path) -> None:
    database.create(tmp_path / "a.duckdb")
    with database.reading(tmp_path / "a.duckdb") as connection:
        for name, item in schema.documented().items():
            assert [row[0] for row in connection.execute(f"DESCRIBE {name}").fetchall()] == list(item.columns)
            for column, text in item.columns.items():
                assert text.endswith(")"), f"{name}.{column}: {text}"
        comments = connection.execute(
            "SELECT table_name, column_name, comment FROM duckdb_columns() "
            "WHERE NOT internal AND table_name <> 'latest'"
        )
        for table, column, comment in comments.fetchall():
            assert comment == schema.documented()[table].columns[column]


def test_the_promised_columns_and_tables_are_there() -> None:
    assert set(PROMISED.split()) <= set(schema.documented()["runs"].columns)
    tables = {"records", "latency_samples", "predictions", "energy_readings", "artifacts", "machines", "claims"}
    assert tables <= set(schema.tables())


def test_the_store_is_registered_and_keeps_its_contract(tmp_path: Path) -> None:
    store: StoreContract = resolve("store", "duckdb")(tmp_path / "assay.duckdb")
    assert isinstance(store, Store)


def test_values_of_a_compressed_run_are_those_computed_by_hand(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    right = rng.random(1000) < 0.9
    flipped = right ^ (rng.random(1000) < 0.05)
    samples = [int(v) for v in rng.lognormal(13, 0.3, 700)]
    base = record(latency_ns=[2_000_000] * 700, batch_size=4, energy=[reading(gross_j=8.0)], **predictions(right))
    pruned = record(
        chain=PRUNED,
        batch_size=4,
        latency_ns=samples,
        params_nonzero=100,
        artifact={"sha256": "f" * 64, "size_bytes": 1000, "zstd_bytes": 900, "files": ["m"], "format": "torch"},
        weights={
            "plain_bytes": 4000,
            "container_bytes": 100,
            "shannon_bytes": 99,
            "zstd_bytes": 150,
            "xz_bytes": 140,
            "gzip_bytes": 160,
        },
        macs=1000,
        energy=[
            reading(gross_j=3.0, method="modelled"),
        ],
        **predictions(flipped),
    )
    row = rows_of(tmp_path, base, pruned)[pruned["run_id"]]
    gained, lost = int((flipped & ~right).sum()), int((right & ~flipped).sum())
    interval = stats.paired_difference(gained, lost, 1000)
    ms = np.asarray(samples) / 1e6
    expected = {
        "accuracy": flipped.mean(),
        "accuracy_low": stats.wilson(int(flipped.sum()), 1000).low,
        "accuracy_high": stats.wilson(int(flipped.sum()), 1000).high,
        "accuracy_delta": (gained - lost) / 1000,
        "accuracy_delta_low": interval.low,
        "accuracy_delta_high": interval.high,
        "mcnemar_p": stats.mcnemar_exact(gained, lost),
        "n_gained": gained,
        "n_lost": lost,
        "compression_ratio": 4.0,
        "zstd_compression_ratio": 4.0,
        "container_compression_ratio": 40.0,
        "macs_ratio": 5.0,
        "pruning_rate": 0.9,
        "latency_p50_ms": np.percentile(ms, 50),
        "latency_p90_ms": np.percentile(ms, 90),
        "latency_p99_ms": np.percentile(ms, 99),
        "n_latency": 700,
        "speedup": 2.0 / np.percentile(ms, 50),
        "throughput_per_s": 4 * 700 / (ms.sum() / 1e3),
        "energy_j": 3.0 / 100 / 4,
        "energy_ratio": 8.0 / 3.0,
        "carbon_g": 3.0 / 100 / 4 / 3.6e6 * 480,
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    assert row["baseline_run_id"] == base["run_id"]
    assert json.loads(row["config"]) == {"magnitude": {"sparsity": 0.9}}
    assert json.loads(row["chain"]) == PRUNED


def test_a_baseline_is_its_own_reference(tmp_path: Path) -> None:
    first, second = record(latency_ns=[1_000_000] * 10), record(latency_ns=[3_000_000] * 10)
    for row in rows_of(tmp_path, first, second).values():
        ones = [
            row[name]
            for name in ("speedup", "compression_ratio", "zstd_compression_ratio", "energy_ratio", "mcnemar_p")
        ]
        assert ones == [1.0] * 5
        assert [row[f"accuracy_delta{end}"] for end in ("", "_low", "_high")] == [0.0] * 3
        assert row["baseline_run_id"] == row["run_id"]


def test_the_newest_ok_baseline_is_the_reference(tmp_path: Path) -> None:
    old, new = record(latency_ns=[4_000_000] * 10), record(latency_ns=[2_000_000] * 10)
    failed, pruned = unmeasured("failed", "boom"), record(chain=PRUNED, latency_ns=[1_000_000] * 10)
    row = rows_of(tmp_path, pruned, failed, new, old)[pruned["run_id"]]
    assert (row["baseline_run_id"], row["speedup"]) == (new["run_id"], 2.0)


@pytest.mark.parametrize(
    "difference",
    [
        {"task": "other"},
        {"task_config": {"width": 2}},
        {"hardware": "openvino"},
        {"hardware_config": {"precision": "bf16"}},
        {"seed": 1},
        {"threads": 2},
        {"batch_size": 32},
        {"machine": {"machine_id": "m2"}},
        {"machine": {}},
        {"dataset_hash": "e" * 64},
        {"dataset_hash": None},
    ],
    ids=lambda value: "-".join(value),
)
def test_what_is_incomparable_is_not_compared(tmp_path: Path, difference: dict[str, Any]) -> None:
    pruned = record(chain=PRUNED, **difference)
    row = rows_of(tmp_path, record(), pruned)[pruned["run_id"]]
    for name in ("speedup", "compression_ratio", "energy_ratio", "accuracy_delta", "mcnemar_p", "baseline_run_id"):
        assert row[name] is None
        assert "no ok baseline run" in json.loads(row["reasons"])[name]


def test_predictions_are_paired_only_over_equal_labels(tmp_path: Path) -> None:
    shorter, other = record(chain=PRUNED, **predictions([True] * 50)), record(chain=PRUNED)
    other["labels"] = other["predictions"][::-1]
    other["n_correct"] = sum(a == b for a, b in zip(other["labels"], other["predictions"], strict=True))
    rows = rows_of(tmp_path, record(), shorter, other)
    for run in (shorter, other):
        row = rows[run["run_id"]]
        assert (row["accuracy_delta"], row["mcnemar_p"], row["speedup"]) == (None, None, 1.0)
        assert "same examples" in json.loads(row["reasons"])["mcnemar_p"]


@pytest.mark.parametrize("n", [0, 5, 6, 63, 64, 661, 662])
def test_percentiles_need_samples(tmp_path: Path, n: int) -> None:
    (row,) = rows_of(tmp_path, record(latency_ns=[1_000_000] * n)).values()
    reasons = json.loads(row["reasons"])
    for name, needed in (("latency_p50_ms", 6), ("latency_p90_ms", 64), ("latency_p99_ms", 662)):
        assert (row[name] is not None) == (n >= needed)
        if 0 < n < needed:
            assert reasons[name] == f"{n} samples; p{name[9:11]} needs {needed}"


def test_measured_and_modelled_energy_are_never_mixed(tmp_path: Path) -> None:
    modelled = record()
    both = record(
        chain=PRUNED,
        energy=[
            reading(gross_j=1.0, method="measured_counter", domain="package-0", idle_w=1.0),
            reading(gross_j=0.5, method="measured_counter", domain="dram", idle_w=0.25),
            reading(gross_j=9.0),
        ],
    )
    row = rows_of(tmp_path, modelled, both)[both["run_id"]]
    assert (row["energy_method"], row["energy_j"]) == ("measured_counter", pytest.approx(1.5 / 100))
    assert row["energy_net_j"] == pytest.approx((1.5 - 1.25 * 0.4) / 100)
    assert row["energy_ratio"] is None
    assert "measured_counter" in json.loads(row["reasons"])["energy_ratio"]


def test_energy_under_another_stated_model_is_not_compared(tmp_path: Path) -> None:
    other = record(chain=PRUNED, settings={"measure": {}, "energy": {"enabled": True, "watts_per_core": 10.0}})
    row = rows_of(tmp_path, record(), other)[other["run_id"]]
    assert (row["energy_ratio"], row["speedup"]) == (None, 1.0)


def test_another_package_version_of_the_baseline_is_a_warning(tmp_path: Path) -> None:
    newer = record(chain=PRUNED, packages={"torch": "2.16.0"}, warnings=["load was high"])
    row = rows_of(tmp_path, record(), newer)[newer["run_id"]]
    assert [text.split(":")[0] for text in json.loads(row["warnings"])] == [
        "load was high",
        "the baseline ran with other package versions",
    ]


def test_every_null_has_its_reason(tmp_path: Path) -> None:
    bare = {
        "energy": [],
        "fidelity": None,
        "artifact": None,
        "params_nonzero": None,
        "git_commit": None,
        "git_dirty": None,
    }
    rows = rows_of(
        tmp_path,
        record(),
        unmeasured("failed", "the runtime crashed with signal 11", batch_size=2),
        unmeasured("timeout", "3 s", reasons={"accuracy": "recorded reason"}),
        record(chain=PRUNED, seed=9, latency_ns=[1000] * 3, **bare),
        record(
            batch_size=8, labels=None, predictions=None, n_examples=None, n_correct=None, machine={}, dataset_hash=None
        ),
    )
    for row in rows.values():
        reasons = json.loads(row["reasons"])
        missing = {name for name, value in row.items() if value is None} - {"reason"}
        assert missing <= set(reasons), missing - set(reasons)
        assert all(isinstance(text, str) and text for text in reasons.values())
    timed_out = next(row for row in rows.values() if row["status"] == "timeout")
    assert json.loads(timed_out["reasons"])["accuracy"] == "recorded reason"
    assert json.loads(timed_out["reasons"])["speedup"] == "status timeout: 3 s"


def test_latest_prefers_results_over_newer_failures(tmp_path: Path) -> None:
    old, new = record(), record()
    failed = unmeasured("interrupted", "Ctrl-C", cell_hash=old["cell_hash"])
    only_failed = unmeasured("failed", "boom", seed=5)
    rows_of(tmp_path, old, new, failed, only_failed)
    latest = queries.select(tmp_path / "assay.duckdb", "latest")
    assert [row["run_id"] for row in latest] == [new["run_id"], only_failed["run_id"]]


def test_the_view_does_not_depend_on_the_order_of_arrival(tmp_path: Path) -> None:
    runs = [
        record(),
        record(machine={"machine_id": "m1", "os": "new"}),
        record(chain=PRUNED, **predictions([True] * 100)),
    ]
    runs += [record(chain=PRUNED), unmeasured("failed", "boom"), record(chain=BASELINE, batch_size=7)]
    seen = []
    for i in range(3):
        random.Random(i).shuffle(runs)
        store = Store(tmp_path / str(i) / "assay.duckdb")
        for run in runs:
            store.add(run)
        with database.reading(store.path) as connection:
            machines = queries.rows(connection, "SELECT * FROM machines")
        seen.append((queries.select(store.path, "runs"), queries.select(store.path, "latest"), machines))
    assert all(item == seen[0] for item in seen)
    assert seen[0][2][0]["last_run_id"] == max(r["run_id"] for r in runs)


def test_views_of_an_older_text_are_replaced_by_the_writer(tmp_path: Path) -> None:
    store = Store(tmp_path / "assay.duckdb")
    store.add(record())
    with database.writing(store.path) as connection:
        connection.execute("CREATE OR REPLACE VIEW latest AS SELECT 1 AS old")
        connection.execute("UPDATE schema_version SET views_sha256 = 'older'")
    store.add(record(seed=3))
    assert len(queries.select(store.path, "latest")) == 2
