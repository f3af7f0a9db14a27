"""The schema's documentation, and the view ``runs`` against hand-computed values."""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest

from harness import environment, metrics, stats
from harness.canonical import digest
from harness.contracts import Store as StoreContract
from harness.record import Record
from harness.registry import resolve
from results import columns, comparisons, database, ingest, queries, records, schema
from results.store import Store
from tests.unit.factories import BASELINE, predictions, reading, record, score, unmeasured

PROMISED = """
run_id created_at status reason task method chain config hardware seed batch_size threads precision accuracy
accuracy_low accuracy_high n_examples size_bytes zstd_bytes compression_ratio params_total params_nonzero
pruning_rate macs latency_p50_ms latency_p90_ms latency_p99_ms n_latency speedup throughput_per_s energy_j
energy_method carbon_g peak_rss_bytes load_ms first_ms fidelity_max_abs fidelity_top1 accuracy_delta mcnemar_p
spec_hash method_hash git_commit git_dirty machine_id artifact_sha256 accuracy_delta_low accuracy_delta_high
energy_ratio zstd_compression_ratio baseline_run_id hardware_config spec_name cell_hash params_original effective
warnings reasons plain_bytes container_bytes shannon_bytes weights_zstd_bytes xz_bytes gzip_bytes
container_compression_ratio macs_ratio metric metric_unit metric_better score score_low score_high score_delta
score_delta_low score_delta_high score_p score_test prefill_p50_ms decode_p50_ms units_per_s fidelity_sqnr
quantization_top1 quantization_sqnr notes original_sha256
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
            "WHERE NOT internal AND table_name <> 'latest' AND database_name <> 'temp'"
        )
        for table, column, comment in comments.fetchall():
            assert comment == schema.documented()[table].columns[column]


def test_the_promised_columns_and_tables_are_there() -> None:
    assert set(PROMISED.split()) <= set(schema.documented()["runs"].columns)
    tables = {"records", "latency_samples", "phases", "scores", "example_scores", "comparisons", "layers"}
    tables |= {"energy_readings", "artifacts", "weights", "machines", "claims"}
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
    other["scores"][0]["split_sha256"] = "of other labels"
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


def test_what_the_tables_hold_does_not_depend_on_the_order(tmp_path: Path) -> None:
    """A baseline that comes late changes what earlier runs were compared with."""
    runs = [
        record(),
        record(machine={"machine_id": "m1", "os": "new"}),
        record(chain=PRUNED, **predictions([True] * 100)),
        record(**predictions([True] * 95 + [False] * 5)),
        record(chain=PRUNED, scores=[score("mae", range(50))]),
        record(scores=[score("mae", range(50)), score("other", range(9))]),
    ]
    runs += [record(chain=PRUNED), unmeasured("failed", "boom"), record(chain=BASELINE, batch_size=7)]
    seen: list[Any] = []
    for i in range(4):
        random.Random(i).shuffle(runs)
        connection = duckdb.connect()
        connection.execute("SET TimeZone = 'UTC'")
        schema.create(connection)
        stored = [records.checked("record", run) for run in runs]
        for start in range(0, len(stored), i + 1):
            ingest.insert(connection, stored[start : start + i + 1], compare=i > 0)
        comparisons.bring_up_to_date(connection)
        names = [name for name in schema.documented() if name != "schema_version"]
        seen.append({name: queries.rows(connection, f"SELECT * FROM {name} ORDER BY ALL") for name in names})
    assert all(item == seen[0] for item in seen)
    assert seen[0]["machines"][0]["last_run_id"] == max(r["run_id"] for r in runs)


def test_views_of_an_older_text_are_replaced_by_the_writer(tmp_path: Path) -> None:
    store = Store(tmp_path / "assay.duckdb")
    store.add(record())
    with database.writing(store.path) as connection:
        connection.execute("CREATE OR REPLACE VIEW latest AS SELECT 1 AS old")
        connection.execute("UPDATE schema_version SET views_sha256 = 'older'")
    store.add(record(seed=3))
    assert len(queries.select(store.path, "latest")) == 2


# ---- metrics that are no accuracy ----


def errors(shift: float = 0.0) -> list[float]:
    return [abs(float(x)) for x in np.random.default_rng(1).normal(1 + shift, 0.3, 80)]


def test_few_examples_have_a_difference_but_no_interval_and_no_test(tmp_path: Path) -> None:
    few = [score("mae", errors()[:3])], [score("mae", errors(0.2)[:3])]
    base, pruned = record(scores=few[0]), record(chain=PRUNED, scores=few[1])
    row = rows_of(tmp_path, base, pruned)[pruned["run_id"]]
    assert row["score_delta"] == pytest.approx(row["score"] - np.mean(errors()[:3]))
    assert row["score_low"] is row["score_delta_low"] is row["score_p"] is None
    for column in ("score_low", "score_delta_low", "score_p"):
        assert "3 examples are too few" in json.loads(row["reasons"])[column]


def test_a_metric_that_is_no_proportion_is_resampled_once(tmp_path: Path) -> None:
    base, pruned = record(scores=[score("mae", errors())]), record(chain=PRUNED, scores=[score("mae", errors(0.2))])
    row = rows_of(tmp_path, base, pruned)[pruned["run_id"]]
    metric = metrics.create("mae")
    ours, theirs = (np.stack([np.array(errors(shift)), np.ones(80)], axis=1) for shift in (0.2, 0.0))
    interval = stats.interval(metric, ours, stats.seed_of(pruned["run_id"]))
    paired = stats.compare(metric, theirs, ours, stats.seed_of(pruned["run_id"], base["run_id"]))
    expected = {"score": np.mean(errors(0.2)), "score_low": interval.low, "score_high": interval.high}
    expected |= {"score_delta": paired.delta, "score_delta_low": paired.low, "score_delta_high": paired.high}
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    assert row["score_low"] < row["score"] < row["score_high"]
    assert (row["metric"], row["metric_unit"], row["metric_better"]) == ("mae", "", "lower")
    assert (row["score_p"], row["score_test"]) == (paired.p, "randomization")
    reasons = json.loads(row["reasons"])
    for name in ("accuracy", "accuracy_low", "accuracy_delta", "mcnemar_p"):
        assert (row[name], reasons[name]) == (None, "the task's metric is mae")
    assert reasons["n_gained"] == "the metric does not call an example right or wrong"


def test_accuracy_beside_the_tasks_metric_keeps_its_columns(tmp_path: Path) -> None:
    accuracy = record()["scores"][0]
    first = record(scores=[score("mae", errors()), accuracy])
    second = record(chain=PRUNED, scores=[score("mae", errors()), {**accuracy, "parts": {}, "value": 0.5}])
    rows = rows_of(tmp_path, first, second)
    row = rows[first["run_id"]]
    assert (row["metric"], row["accuracy"], row["mcnemar_p"], row["n_gained"]) == ("mae", 0.9, 1.0, 0)
    row = rows[second["run_id"]]
    assert (row["accuracy"], row["accuracy_delta"], row["score_delta"], row["score_p"]) == (0.5, None, 0.0, 1.0)
    assert json.loads(row["reasons"])["accuracy_delta"] == comparisons.NO_PARTS


def test_what_a_metric_says_again_must_be_what_was_recorded(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, record(scores=[score("mae", errors(), value=3.0)])).values()
    assert (row["score"], row["score_low"]) == (3.0, None)
    assert "not 3" in json.loads(row["reasons"])["score_low"]


def test_a_metric_without_a_value_says_so(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, record(scores=[score("mae", errors(), value=None)])).values()
    for name in ("score", "score_low", "score_delta"):
        assert (row[name], json.loads(row["reasons"])[name]) == (None, "mae is not defined on these examples")


def test_an_example_without_a_score_is_left_out(tmp_path: Path) -> None:
    values: list[float | None] = [*errors()[:-1], None]
    entry = score("mae", errors()) | {"parts": {"absolute_error": values, "values": [*[1] * 79, None]}}
    (row,) = rows_of(tmp_path, record(scores=[entry | {"value": float(np.mean(errors()[:-1]))}])).values()
    assert row["score_low"] < row["score"] < row["score_high"]


@pytest.mark.parametrize("origin", ["local", "elsewhere"])
def test_the_users_metric_is_run_for_records_of_this_machine_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, origin: str
) -> None:
    module = tmp_path / "users_metric.py"
    module.write_text(
        "from pathlib import Path\nfrom pydantic.dataclasses import dataclass\n"
        "from harness.metrics.values import MAE\n"
        "Path(__file__).with_name('imported').touch()\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Mine(MAE):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "users_metric", raising=False)
    comparisons.forget()
    machine = environment.machine() if origin == "local" else {"machine_id": "m9"}
    entry = {"config": {"name": "users_metric:Mine"}}
    base = record(machine=machine, scores=[score("mae", errors(), **entry)])
    run = record(machine=machine, chain=PRUNED, scores=[score("mae", errors(0.1), **entry)])
    row = rows_of(tmp_path, base, run)[run["run_id"]]
    ran = origin == "local"
    assert [(tmp_path / "imported").exists(), row["score_low"] is not None, row["score_p"] is not None] == [ran] * 3
    if not ran:
        for name in ("score_low", "score_delta", "score_p"):
            assert "is run for records of this machine only" in json.loads(row["reasons"])[name]


def test_a_proportion_needs_no_code(tmp_path: Path) -> None:
    right = [1] * 70 + [0] * 10
    entry = {"config": {"name": "nowhere:Mine"}, "proportion": True, "unit": "%"}
    base = record(scores=[score("mine", right, parts={"right": right, "size": [3] * 80}, **entry)])
    worse = [0] * 5 + right[5:]
    run = record(chain=PRUNED, scores=[score("mine", worse, parts={"right": worse, "size": [3] * 80}, **entry)])
    row = rows_of(tmp_path, base, run)[run["run_id"]]
    assert (row["score_low"], row["score_high"]) == (stats.wilson(65, 80).low, stats.wilson(65, 80).high)
    assert (row["n_gained"], row["n_lost"], row["score_p"]) == (0, 5, stats.mcnemar_exact(0, 5))


# ---- which runs are compared ----


def test_a_run_is_paired_with_the_baseline_of_its_own_model(tmp_path: Path) -> None:
    first, second = record(original_sha256="a" * 64), record(original_sha256="b" * 64)
    of_first = record(chain=PRUNED, original_sha256="a" * 64)
    of_none, of_third = record(chain=PRUNED), record(chain=PRUNED, original_sha256="c" * 64)
    rows = rows_of(tmp_path, first, second, of_first, of_none, of_third)
    assert rows[of_first["run_id"]]["baseline_run_id"] == first["run_id"]
    for run in (of_none, of_third):
        row = rows[run["run_id"]]
        assert (row["baseline_run_id"], row["speedup"], row["score_delta"]) == (None, None, None)
        for name in ("speedup", "score_delta", "accuracy_delta", "baseline_run_id"):
            assert "the baseline is of another model" in json.loads(row["reasons"])[name]


@pytest.mark.parametrize("random_one", [0, 1])
def test_scores_of_a_model_that_is_random_in_evaluation_are_not_compared(tmp_path: Path, random_one: int) -> None:
    runs = [record(random_in_evaluation=random_one == 0), record(chain=PRUNED, random_in_evaluation=random_one == 1)]
    row = rows_of(tmp_path, *runs)[runs[1]["run_id"]]
    assert (row["accuracy"], row["speedup"]) == (0.9, 1.0)
    for name in ("accuracy_delta", "mcnemar_p", "score_delta", "score_p", "n_gained"):
        assert (row[name], json.loads(row["reasons"])[name]) == (None, "the model is random in evaluation")


def test_a_newer_baseline_replaces_the_comparison(tmp_path: Path) -> None:
    store = Store(tmp_path / "assay.duckdb")
    pruned = record(chain=PRUNED)
    for item in (pruned, record(), record(**predictions([True] * 100))):
        store.add(item)
    (row,) = [row for row in queries.select(store.path, "runs") if row["run_id"] == pruned["run_id"]]
    assert (row["score_delta"], row["n_lost"]) == (pytest.approx(-0.1), 10)
    assert len(queries.query(store.path, f"SELECT * FROM comparisons WHERE run_id = '{pruned['run_id']}'")) == 1


def test_a_merged_record_is_no_baseline_of_our_own_runs(tmp_path: Path) -> None:
    """A record from elsewhere may copy every field that is compared, and have any clock."""
    ours, pruned = record(), record(chain=PRUNED)
    forged = record(created_at="2026-06-01T00:00:00+00:00", latency_ns=[1] * 700)
    forged_pruned = record(chain=PRUNED, created_at="2026-06-02T00:00:00+00:00")
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'")
    schema.create(connection)
    stored = [records.checked("record", run) for run in (ours, pruned)]
    stored += [
        dataclasses.replace(records.checked("record", run), origin="elsewhere") for run in (forged, forged_pruned)
    ]
    ingest.insert(connection, stored)
    pairs = dict(connection.execute("SELECT run_id, baseline_run_id FROM pairs").fetchall())
    assert pairs[pruned["run_id"]] == ours["run_id"]
    assert pairs[forged_pruned["run_id"]] == forged["run_id"]
    latest = connection.execute("SELECT run_id FROM latest ORDER BY run_id").fetchall()
    assert latest == [(ours["run_id"],), (pruned["run_id"],)]
    assert connection.execute("SELECT last_run_id FROM machines").fetchall() == [(pruned["run_id"],)]


def test_a_language_models_phases_have_their_own_columns(tmp_path: Path) -> None:
    workload = {"phases": [["prefill", 1], ["decode", 3]], "sizes": {"tokens": 16}, "unit": "token"}
    latency = {"decode": [2_000_000] * 300, "prefill": [10_000_000] * 100}
    base = record(workload=workload, latency=latency, batch_size=2)
    fast = {"decode": [1_000_000] * 300, "prefill": [5_000_000] * 100}
    run = record(workload=workload, latency=fast, chain=PRUNED, batch_size=2)
    other = record(chain=PRUNED, batch_size=2, workload={**workload, "sizes": {"tokens": 32}}, latency=fast)
    rows = rows_of(tmp_path, base, run, other)
    row = rows[run["run_id"]]
    assert (row["prefill_p50_ms"], row["decode_p50_ms"], row["n_latency"]) == (5.0, 1.0, 100)
    assert row["speedup"] == pytest.approx((10 + 3 * 2) / (5 + 3 * 1))
    assert row["units_per_s"] == pytest.approx(2 / 1e-3)
    assert row["throughput_per_s"] == pytest.approx(2 / 8e-3)
    assert (row["latency_p50_ms"], json.loads(row["reasons"])["latency_p50_ms"]) == (
        None,
        "timed by phase: prefill, decode",
    )
    assert "ran another workload" in json.loads(rows[other["run_id"]]["reasons"])["speedup"]
    (plain,) = rows_of(tmp_path / "plain", record()).values()
    assert json.loads(plain["reasons"])["decode_p50_ms"] == "the workload has no phase decode"


def test_fidelity_is_told_by_metric_and_reference(tmp_path: Path) -> None:
    def entry(metric: str, against: str, value: float) -> dict[str, Any]:
        return score(metric, [value], against=against, data="validation", parts={})

    found = [entry("sqnr", "torch", 60.0), entry("sqnr", "float", 20.0), entry("top1-agreement", "float", 0.75)]
    (row,) = rows_of(tmp_path, record(scores=[score("mae", errors()), *found])).values()
    names = ("fidelity_sqnr", "quantization_sqnr", "quantization_top1", "fidelity_top1")
    assert [row[name] for name in names] == [60.0, 20.0, 0.75, None]
    assert json.loads(row["reasons"])["fidelity_top1"] == "no fidelity metric of the task"
    (row,) = rows_of(tmp_path / "equal", record(scores=[entry("sqnr", "torch", 1.0) | {"value": None}])).values()
    assert "the outputs are equal" in json.loads(row["reasons"])["fidelity_sqnr"]
    (row,) = rows_of(tmp_path / "none", record()).values()
    assert "nothing was quantized" in json.loads(row["reasons"])["quantization_sqnr"]


def test_what_happened_to_which_layer_is_a_query(tmp_path: Path) -> None:
    layer = {"kind": "Linear", "shape": [10, 20], "parameters": 200, "nonzero": 20, "bits": 32.0, "rank": 10}
    layer |= {"error_mean": 0.1, "error_max": 0.5, "sqnr_db": None}
    store = Store(tmp_path / "assay.duckdb")
    store.add(record(layers=[{"name": "a", **layer}, {"name": "b", **layer, "nonzero": 200}]))
    rows = queries.query(store.path, "SELECT name, nonzero / parameters AS density, shape FROM layers ORDER BY i")
    assert rows == [
        {"name": "a", "density": 0.1, "shape": "[10,20]"},
        {"name": "b", "density": 1.0, "shape": "[10,20]"},
    ]


def test_a_column_is_one_row_of_a_table() -> None:
    """What is said of a column is said once: view, comments, reasons, headings and sections come from it."""
    assert [column.name for column in columns.COLUMNS] == list(schema.documented()["runs"].columns)
    assert {column.section for column in columns.COLUMNS} - {""} <= set(columns.SECTIONS)
    for column in columns.COLUMNS:
        shown = column.shown
        if column.field:
            assert column.name in {field.name for field in dataclasses.fields(Record)}
            assert schema.documented()["records"].columns[column.name] == f"{column.text} ({column.unit})"
        for name in filter(None, (shown.low, shown.high, shown.change, shown.kind) if shown else ()):
            assert name in columns.BY_NAME


def test_tables_that_change_have_a_new_version() -> None:
    """A database with other tables must be refused, with `assay db rebuild` named, and not fail in the middle."""
    tables = {name: list(schema.documented()[name].columns) for name in schema.tables()}
    known = {3: "9cb1a94b9265243c"}
    assert known == {schema.VERSION: digest(tables)[:16]}, "raise schema.VERSION and write the new digest here"
