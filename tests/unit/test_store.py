"""The only writer: durability, idempotence, concurrency, and what it says when the disk or a file is bad."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import duckdb
import pytest

import results
from harness.errors import DatabaseBusy, InputError, StoreError
from harness.record import SCHEMA_VERSION
from results import database, maintenance, queries, records, schema
from results.store import Store
from tests.unit.factories import reading, record, unmeasured

ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "assay.duckdb", timeout_s=5)


def python(code: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def fill(store: Store, *added: dict[str, Any]) -> None:
    """Add several records under one connection."""
    for item in added:
        records.write(store.folder, records.checked("record", item))
    store.sync()


def ids(store: Store) -> list[str]:
    return [row["run_id"] for row in queries.select(store.path, "runs")]


def only_file(store: Store) -> Path:
    (path,) = records.files(store.folder)
    return path


def test_a_record_becomes_a_file_that_can_be_verified_and_rows(store: Store) -> None:
    added = record(energy=[reading(), reading(domain="dram")])
    store.add(added)
    path = only_file(store)
    assert path.relative_to(store.folder) == Path("2026-01") / f"{added['run_id']}.json"
    assert json.loads(path.read_text())["record"] == added
    assert records.read(path).value == added
    with database.reading(store.path) as connection:
        (n_latency,) = connection.execute("SELECT count(*) FROM latency_samples").fetchone()
        labels = connection.execute("SELECT label, predicted FROM predictions ORDER BY example_id").fetchall()
        energy = connection.execute("SELECT domain FROM energy_readings ORDER BY i").fetchall()
    assert n_latency == 700
    parts = added["scores"][0]["parts"]
    assert labels == list(zip(parts["label"], parts["predicted"], strict=True))
    assert energy == [("cpu",), ("dram",)]


def test_adding_twice_is_harmless_and_changing_is_refused(store: Store) -> None:
    added = record()
    store.add(added)
    store.add(added)
    assert ids(store) == [added["run_id"]]
    with pytest.raises(StoreError, match="another content"):
        store.add({**added, "seed": 99})
    assert maintenance.check(store.path) == []


def test_sync_takes_up_files_and_removes_what_dead_writers_left(store: Store) -> None:
    for _ in range(3):
        records.write(store.folder, records.checked("record", record()))
    leftover = next(store.folder.iterdir()) / ".20260101T000000-dead.4242.tmp"
    leftover.write_text('{"sha256": "')
    assert store.sync() == 3
    assert store.sync() == 0
    assert not leftover.exists()
    assert len(ids(store)) == 3


def test_finished_gives_the_newest_usable_row_per_cell(store: Store) -> None:
    old, new = record(), record()
    unsupported = unmeasured("unsupported", "depthwise layer conv3", seed=1)
    failed = unmeasured("failed", "boom", seed=2)
    fill(store, new, old, unsupported, failed)
    hashes = [item["cell_hash"] for item in (old, unsupported, failed)]
    found = store.finished([*hashes, "unknown"])
    assert {key: row["run_id"] for key, row in found.items()} == {
        hashes[0]: new["run_id"],
        hashes[1]: unsupported["run_id"],
    }
    json.dumps(dict(found))
    assert queries.of_runs(store.path, [failed["run_id"], "unknown"])[failed["run_id"]]["status"] == "failed"


def test_nothing_is_created_by_asking(tmp_path: Path) -> None:
    store = Store(tmp_path / "deep" / "assay.duckdb")
    assert store.finished(["x"]) == {}
    assert store.sync() == 0
    for call in (results.runs, results.connect, results.check, lambda db: results.export(db, tmp_path / "out")):
        with pytest.raises(InputError, match=r"No database at .*assay run quickstart"):
            call(store.path)
    assert list(tmp_path.iterdir()) == []


def scored(**changes: Any) -> dict[str, Any]:
    first, *rest = record()["scores"]
    return {"scores": [{**first, **changes}, *rest]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"status": "fine"}, "status 'fine' is not one of"),
        ({"run_id": "../../etc/passwd"}, "names a file"),
        ({"created_at": "yesterday"}, "ISO 8601"),
        ({"accuracy": 0.5}, "unknown fields accuracy"),
        ({"load_ms": float("nan")}, "'load_ms' cannot be stored"),
        ({"effective": {"x": {1, 2}}}, "'effective' cannot be stored"),
        (scored(value=0.07), "the value is 0.07, but 90 of 100 are right"),
        (scored(n=99), "n = 99, but a part has 100 values"),
        (scored(parts={"correct": [2] * 100}), "something else than 0 and 1"),
        ({"task": None}, "task are missing"),
        ({"schema": SCHEMA_VERSION + 1}, f"record format {SCHEMA_VERSION + 1}"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_no_record_is_refused_before_anything_is_written(
    store: Store, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(StoreError, match=message):
        store.add({**record(), **change})
    assert not store.folder.exists()
    assert not store.path.exists()


_WRITER = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from results.store import Store
from tests.unit.factories import record, predictions
from harness.record import new_run_id
store = Store(Path(sys.argv[2]), timeout_s=60)
print("ready", flush=True)
for i in range(int(sys.argv[3])):
    value = {**record(seed=i, **predictions([True] * 2000)), "run_id": new_run_id()}
    store.add(value)
    print(value["run_id"], flush=True)
"""


def test_kill_at_any_moment_loses_nothing_that_was_committed(store: Store) -> None:
    moments = random.Random(0)
    committed: list[str] = []
    for attempt in range(8):
        process = python(_WRITER, str(ROOT), str(store.path), "1000")
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        if attempt % 2:
            committed.append(process.stdout.readline())  # every other process is killed after its first commit
        time.sleep(moments.uniform(0.0, 0.5))
        process.kill()
        output, _ = process.communicate()
        committed += [line for line in output.splitlines(keepends=True) if line.endswith("\n")]
        if store.path.exists():
            ids(store)  # the database opens, right after the kill
    store.sync()
    found = ids(store)
    assert {line.strip() for line in committed} <= set(found)
    assert len(found) == len(set(found)) == len(list(records.files(store.folder)))
    assert len(committed) >= 4
    assert maintenance.check(store.path) == []
    assert list(store.folder.rglob("*.tmp")) == []


def test_a_kill_while_the_database_is_created_leaves_a_place_to_start_from(store: Store) -> None:
    # What a kill inside `database.create` leaves: an unfinished file under the other name.
    store.path.with_name(f".{store.path.name}.new").write_bytes(b"unfinished")
    store.add(record())
    assert len(ids(store)) == 1


def test_two_writers_at_once_both_finish(store: Store) -> None:
    processes = [python(_WRITER, str(ROOT), str(store.path), "5") for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert len(ids(store)) == 10
    assert maintenance.check(store.path) == []


def test_a_foreign_process_that_holds_the_database_is_named_and_the_record_is_safe(store: Store) -> None:
    store.add(record())
    code = "import duckdb, sys; c = duckdb.connect(sys.argv[1]); print('held', flush=True); sys.stdin.read()"
    process = python(code, str(store.path), stdin=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        assert process.stdout.readline() == "held\n"
        impatient = Store(store.path, timeout_s=0.2)
        late = record()
        with pytest.raises(DatabaseBusy, match=rf"process {process.pid} .*safe in their record files"):
            impatient.add(late)
        with pytest.raises(DatabaseBusy, match=str(process.pid)):
            database.connect(store.path, timeout_s=0.1)
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()
        assert process.stderr is not None
        process.stderr.close()
    assert store.sync() == 1
    assert late["run_id"] in ids(store)


def test_a_reader_of_this_process_is_waited_for_and_named(store: Store) -> None:
    store.add(record())
    connection = results.connect(store.path)
    try:
        with pytest.raises(DatabaseBusy, match="this process itself"):
            Store(store.path, timeout_s=0.1).add(record())
    finally:
        connection.close()
    assert store.sync() == 1


@pytest.mark.parametrize("content", [b"", b"garbage" * 1000], ids=["empty", "garbage"])
def test_a_corrupt_database_is_refused_with_the_remedy_that_works(store: Store, content: bytes) -> None:
    first = record()
    store.add(first)
    store.path.write_bytes(content)
    second = record()
    with pytest.raises(StoreError, match="assay db rebuild"):
        store.add(second)
    with pytest.raises(StoreError, match="assay db rebuild"):
        results.runs(store.path)
    done = results.rebuild(store.path)
    assert (done.records, done.damaged) == (2, ())
    assert done.kept_aside is not None
    assert done.kept_aside.read_bytes() == content
    assert ids(store) == [first["run_id"], second["run_id"]]


def test_a_database_damaged_in_the_middle_is_found_and_rebuilt(store: Store) -> None:
    fill(store, *(record(seed=i) for i in range(3)))
    size = store.path.stat().st_size
    with store.path.open("r+b") as stream:
        stream.seek(12_288)
        stream.write(random.Random(0).randbytes(size - 12_288))
    try:
        problems = results.check(store.path)
    except StoreError as error:
        problems = [str(error)]
    assert any("assay db rebuild" in problem for problem in problems)
    results.rebuild(store.path)
    assert results.check(store.path) == []
    assert len(ids(store)) == 3


def test_another_schema_version_and_a_foreign_database_are_refused(store: Store, tmp_path: Path) -> None:
    store.add(record())
    with database.writing(store.path) as connection:
        connection.execute("UPDATE schema_version SET version = 99")
    with pytest.raises(
        StoreError, match=f"schema version 99; this Assay reads version {schema.VERSION}. A later Assay"
    ):
        store.add(record())
    assert results.rebuild(store.path).records == 2
    foreign = tmp_path / "foreign.duckdb"
    duckdb.connect(str(foreign)).close()
    with pytest.raises(StoreError, match="not one of Assay's"):
        Store(foreign).sync() if records.folder_of(foreign).exists() else Store(foreign).add(record())


def test_a_truncated_or_changed_file_is_named_set_aside_and_the_others_are_taken_up(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad, changed = record(), record(), record()
    paths = [records.write(store.folder, records.checked("record", item)) for item in (good, bad, changed)]
    paths[1].write_text(paths[1].read_text()[:500])
    wrapper = json.loads(paths[2].read_text())
    wrapper["record"]["peak_rss_bytes"] = 1
    paths[2].write_text(json.dumps(wrapper))
    assert store.sync() == 1
    assert f"{paths[1]}: truncated" in caplog.text
    assert f"{paths[2]}: its content does not have the sha256" in caplog.text
    assert ids(store) == [good["run_id"]]
    assert {path.name for path in paths[0].parent.glob("*.damaged")} == {f"{path.name}.damaged" for path in paths[1:]}
    later = records.write(store.folder, records.checked("record", record()))
    later.write_text("{")
    done = results.rebuild(store.path)
    assert done.records == 1
    assert [path.name for path in done.damaged] == [f"{later.name}.damaged"]
    assert store.sync() == 0
    assert results.check(store.path) == []


def test_check_finds_what_was_tampered_with(store: Store) -> None:
    kept, lost, edited = record(), record(seed=1), record(seed=2)
    fill(store, kept, lost, edited)
    store.add_claims("paper", [{"id": "a", "verdict": "reproduced", "run_ids": ["nobody"]}])
    next(store.folder.rglob(f"{lost['run_id']}.json")).unlink()
    records.write(store.folder, records.checked("record", unmeasured("failed", "x")))
    with database.writing(store.path) as connection:
        connection.execute("UPDATE records SET load_ms = 1 WHERE run_id = ?", [edited["run_id"]])
        connection.execute("UPDATE latency_samples SET ns = ns + 1 WHERE run_id = ? AND i = 5", [edited["run_id"]])
        connection.execute("INSERT INTO example_scores VALUES ('orphan', 0, 'label', [1.0])")
    found = "\n".join(results.check(store.path))
    for text in (
        f"{lost['run_id']} is in the database, but its record file is missing",
        "is not in the database",
        f"{edited['run_id']}: load_ms differs",
        f"{edited['run_id']}: latency_samples differs",
        "example_scores: rows of orphan",
        "rests on run nobody",
    ):
        assert text in found
    assert kept["run_id"] not in found


def test_rebuild_refuses_to_drop_runs_without_files_unless_forced(store: Store) -> None:
    store.add(record())
    store.add(record(seed=1))
    next(records.files(store.folder)).unlink()
    with pytest.raises(StoreError, match="1 runs or claims without a record file"):
        results.rebuild(store.path)
    assert len(ids(store)) == 2
    done = results.rebuild(store.path, force=True)
    assert done.records == 1
    assert done.kept_aside is not None
    assert done.kept_aside.exists()


def test_rebuild_gives_the_same_database(store: Store) -> None:
    steps = [{"name": "baseline"}, {"name": "m", "x": 1}]
    fill(store, *(record(seed=i % 2, chain=[steps[i // 2]]) for i in range(4)))
    store.add_claims(
        "paper", [{"id": "a", "claimed": 1, "measured": 1.5, "tolerance": 0.1, "verdict": "not reproduced"}]
    )
    before = snapshot(store.path)
    assert results.rebuild(store.path).claims == 1
    assert snapshot(store.path) == before


def snapshot(db: Path) -> dict[str, list[dict[str, Any]]]:
    with database.reading(db) as connection:
        # How a record came is no part of it.
        less = {"records": "EXCLUDE (origin, arrived_at)"}
        return {
            name: queries.rows(connection, f"SELECT * {less.get(name, '')} FROM {name} ORDER BY ALL")
            for name in (
                "records",
                "latency_samples",
                "predictions",
                "phases",
                "scores",
                "example_scores",
                "comparisons",
                "energy_readings",
                "artifacts",
                "machines",
                "claims",
                "runs",
            )
        }


def test_machines_merge_in_any_order_and_twice_with_the_same_result(tmp_path: Path) -> None:
    sources = []
    for name in ("a", "b", "c"):
        store = Store(tmp_path / name / "assay.duckdb")
        fill(store, *(record(seed=i, machine={"machine_id": f"m-{i % 2}", "hostname": name}) for i in range(3)))
        store.add_claims(name, [{"id": "x", "verdict": "not run (no file)"}])
        sources.append(store.path)
    results.export(sources[0], tmp_path / "export")
    forms = [tmp_path / "export", sources[1], records.folder_of(sources[2])]
    snapshots = []
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2, 1, 0]):
        target = tmp_path / "-".join(map(str, order)) / "assay.duckdb"
        counts = [results.merge(target, forms[i]) for i in order]
        assert counts == [4, 4, 4, 0, 0][: len(order)]
        assert results.check(target) == []
        snapshots.append(snapshot(target))
    assert snapshots[0] == snapshots[1] == snapshots[2]
    assert len(snapshots[0]["runs"]) == 9


def test_merge_refuses_another_content_and_damaged_files_and_changes_nothing(tmp_path: Path) -> None:
    here, there = Store(tmp_path / "a" / "assay.duckdb"), Store(tmp_path / "b" / "assay.duckdb")
    shared = record()
    here.add(shared)
    there.add({**shared, "seed": 5})
    there.add(record())
    before = snapshot(here.path)
    with pytest.raises(InputError, match=r"another content\. Nothing was merged"):
        results.merge(here.path, there.path)
    next(records.files(there.folder)).write_text("{")
    with pytest.raises(InputError, match=r"truncated .* Nothing was merged"):
        results.merge(here.path, there.folder)
    with pytest.raises(InputError, match="no record files"):
        results.merge(here.path, tmp_path / "nowhere")
    assert snapshot(here.path) == before
    assert len(list(records.files(here.folder))) == 1


def test_an_export_can_be_read_by_strangers(store: Store, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    store.add(record())
    store.add(unmeasured("failed", "boom"))
    out = tmp_path / "out"
    counts = results.export(store.path, out)
    assert (counts["runs"], counts["latency_samples"], counts["files"]) == (2, 700, 2)
    table = pq.read_table(out / "runs.parquet")
    assert table.column("status").to_pylist() == ["ok", "failed"]
    assert "latency_p50_ms" in (out / "README.md").read_text()
    assert results.export(store.path, out) == counts
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(InputError, match="not empty"):
        results.export(store.path, tmp_path / "full")


def test_a_place_that_cannot_be_written_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "assay.duckdb", Path("/proc/nowhere/assay.duckdb")):
        with pytest.raises(StoreError, match="--db"):
            Store(place).add(record())


def test_a_full_disk_keeps_what_was_there(store: Store) -> None:
    # A limit on file size makes the kernel refuse writes, as a full disk does.
    store.add(record())
    code = (
        "import resource, signal, sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from results.store import Store\n"
        "from harness.errors import StoreError\n"
        "from tests.unit.factories import record, predictions\n"
        "value = {**record(**predictions([True] * 10_000)), 'run_id': 'another'}\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n    Store(Path(sys.argv[2])).add(value)\n"
        "except StoreError as error:\n    print(error)\n"
    )
    output, errors = python(code, str(ROOT), str(store.path)).communicate(timeout=60)
    assert "make room" in output, errors
    assert len(ids(store)) == 1
    assert results.check(store.path) == []
    assert list(store.folder.rglob("*.tmp")) == []


def test_a_disk_that_fills_under_the_database_keeps_the_record_file(store: Store) -> None:
    store.add(record())
    code = (
        "import resource, signal, sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from results.store import Store\n"
        "from harness.errors import StoreError\n"
        "from tests.unit.factories import record\n"
        "value = {**record(latency_ns=[(i * 7919) % 1_000_003 for i in range(60_000)]), 'run_id': 'another'}\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "size = Path(sys.argv[2]).stat().st_size\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))\n"
        "try:\n    Store(Path(sys.argv[2])).add(value)\n"
        "except StoreError as error:\n    print('refused', error)\n"
    )
    output, errors = python(code, str(ROOT), str(store.path)).communicate(timeout=60)
    assert "Traceback" not in errors
    store.sync()
    assert "another" in ids(store), output
    assert results.check(store.path) == []


def test_the_wait_is_set_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSAY_DB_TIMEOUT", "1.5")
    assert database.timeout() == 1.5
    for bad in ("soon", "-1", "inf", "nan"):
        monkeypatch.setenv("ASSAY_DB_TIMEOUT", bad)
        with pytest.raises(InputError, match="number of seconds"):
            database.timeout()


def test_results_come_as_arrow_and_pandas(store: Store) -> None:
    store.add(record())
    store.add(record(chain=[{"name": "magnitude", "sparsity": 0.9}], hardware_config={"precision": "bf16"}))
    assert results.runs(store.path).num_rows == 2
    assert results.runs(store.path, "config.magnitude.sparsity=0.9").num_rows == 1
    assert results.runs(store.path, "hardware.precision=bf16,method=magn*").num_rows == 1
    frame = results.runs_frame(store.path, "method=baseline")
    assert frame["accuracy"].tolist() == [0.9]
    with pytest.raises(InputError, match="accuracy"):
        results.runs(store.path, "acuracy>0.5")


def test_importing_results_is_light() -> None:
    heavy = ("duckdb", "pyarrow", "numpy", "matplotlib", "rich")
    code = f"import sys, results, harness.cli.reading; print([m for m in {heavy} if m in sys.modules])"
    output, errors = python(code).communicate(timeout=60)
    assert output.strip() == "[]", errors
