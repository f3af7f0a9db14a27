"""Records from elsewhere: they are refused before a byte is written, or every command can use them."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pytest

import results
from harness.canonical import digest
from harness.errors import AssayError, InputError, StoreError
from harness.record import SCHEMA_VERSION
from results import database, limits, maintenance, queries, records, seeds, tables
from results.store import Store
from tests.unit.factories import reading, record

IN_FORMAT_1 = json.loads(
    """{"schema": 1, "n_examples": 4, "n_correct": 3, "labels": [0, 1, 2, 3], "predictions": [0, 1, 2, 2],
    "latency_ns": [5, 6, 7, 8, 9, 10], "fidelity": {"max_abs": 0.0, "top1": 1.0, "mean_kl": 0.0, "n": 4}}"""
)


def old(**changes: Any) -> dict[str, Any]:
    """A record as format 1 had it."""
    value = record()
    for name in ("scores", "latency", "layers", "signature", "workload", "notes", "original_sha256"):
        value.pop(name, None)
    value.pop("random_in_evaluation", None)
    return {**value, **copy.deepcopy(IN_FORMAT_1), **changes}


def put(folder: Path, value: Any, *, kind: str = "record", name: str | None = None, text: str | None = None) -> Path:
    """A record file as anybody can write one."""
    text = json.dumps(value) if text is None else text
    try:
        sha256 = digest(json.loads(text))
    except (ValueError, RecursionError):
        sha256 = "0" * 64
    path = folder / (name or f"2026-01/{value.get('run_id', value.get('entry_id'))}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"sha256":"{sha256}","{kind}":{text}}}', encoding="utf-8", errors="surrogatepass")
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    Store(folder / "assay.duckdb").add(record())
    return folder


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Store:
    """A database with one honest record."""
    shutil.copytree(made, tmp_path / "home")
    return Store(tmp_path / "home" / "assay.duckdb", timeout_s=5)


def contents(store: Store) -> dict[str, bytes]:
    files = (path for path in store.path.parent.rglob("*") if path.is_file())
    return {str(path): path.read_bytes() for path in files if path.suffix == ".json" or path.name.startswith(".")}


def use_everything(db: Path) -> None:
    """What the commands do with a database."""
    rows = tables.ordered(queries.select(db, "runs"), None)
    for fmt in ("md", "latex", "csv"):
        tables.render(tables.build(rows, tables.columns(None), fmt), fmt)  # type: ignore[arg-type]
    kept, _ = tables.newest_per_cell([row for row in queries.select(db, "latest") if row["status"] == "ok"])
    seeds.over_seeds(kept)
    for row in rows:
        queries.full(db, row["run_id"])


# Each is refused, in the format that has the field; a value for a whole record or a change of one.
DEEP: Any = 1
for _ in range(60):
    DEEP = [DEEP]
CHANGES: dict[str, dict[str, Any]] = {
    "seed is text": {"seed": "x"},
    "seed is true": {"seed": True},
    "seed above int64": {"seed": 2**63},
    "seed below 0": {"seed": -1},
    "no threads": {"threads": 0},
    "batch of -3": {"batch_size": -3},
    "batch of 2^62": {"batch_size": 2**62},
    "status is an object": {"status": {"a": 1}},
    "chain is empty": {"chain": []},
    "step without a name": {"chain": [{}]},
    "step's name is a number": {"chain": [{"name": 5}]},
    "artifact without a hash": {"artifact": {"sha256": None, "size_bytes": 1}},
    "energy without a method": {"energy": [{"gross_j": 1.0}]},
    "energy below 0": {"energy": [reading(gross_j=-1)]},
    "warnings are text": {"warnings": "text"},
    "a warning is an object": {"warnings": [{"a": 1}]},
    "reasons are text": {"reasons": "text"},
    "a reason is a list": {"reasons": {"accuracy": [1]}},
    "settings are text": {"settings": "x"},
    "task_config is text": {"task_config": "x"},
    "NUL in a name": {"task": "a\0b"},
    "NUL deep inside": {"effective": {"a": ["b\0c"]}},
    "a lone surrogate": {"task": "\ud800"},
    "an endless text": {"reason": "x" * 1_000_000},
    "an endless name": {"task": "x" * 100_000},
    "nested": {"conditions": {"x": DEEP}},
    "an integer of 400 digits": {"conditions": {"x": 10**400}},
    "negative size": {"params_total": -7},
    "negative time": {"load_ms": -1.0},
    "a time that is no double": {"load_ms": 2**53 + 1},
    "cores are text": {"machine": {"machine_id": "m", "cores": "two"}},
    "machine is a list": {"machine": [1]},
    "year 9999": {"created_at": "9999-12-31T23:59:59+00:00"},
    "year 1": {"created_at": "0001-01-01T00:00:00+14:00"},
    "a date": {"created_at": "2026-01-01"},
    "an offset of 99 hours": {"created_at": "2026-01-01T00:00:00+99:00"},
    "from tomorrow": {"created_at": (datetime.now(UTC) + timedelta(days=3)).isoformat()},
    "id is a path": {"run_id": "../../x"},
    "id is a number": {"run_id": 5},
    "unknown field": {"extra": 1},
}
CHANGES_1: dict[str, dict[str, Any]] = {
    "latency holds text": {"latency_ns": ["x"]},
    "latency below 0": {"latency_ns": [-5] * 700},
    "latency of centuries": {"latency_ns": [10**16] * 1000},
    "labels are a number": {"labels": 5, "predictions": 5},
    "more right than there are": {"labels": None, "predictions": None, "n_examples": 5, "n_correct": 10},
    "half of the counts": {"labels": None, "predictions": None, "n_examples": 5, "n_correct": None},
    "a field of format 2": {"scores": []},
    "fidelity of text": {"fidelity": {"max_abs": "x"}},
}


def score(**changes: Any) -> dict[str, Any]:
    first, *_ = record()["scores"]
    return {"scores": [{**first, **changes}]}


CHANGES_2: dict[str, dict[str, Any]] = {
    "a field of format 1": {"labels": [1]},
    "latency is a list": {"latency": [1, 2]},
    "latency holds fractions": {"latency": {"forward": [1.5]}},
    "a phase called 2^60 times": {"workload": {"phases": [["forward", 2**60]]}},
    "phases are text": {"workload": {"phases": "abc"}},
    "score without a unit": {"scores": [{"metric": "accuracy"}]},
    "a part of another length": score(n=7),
    "no proportion": score(value=7.0),
    "a value that its parts deny": score(value=0.5),
    "better is sideways": score(better="sideways"),
    "a part that is no double": score(parts={"correct": [2**53 + 1] * 100}),
    "parts are text": score(parts={"correct": "x" * 100}),
    "layers are numbers": {"layers": [1]},
    "layer of -1 parameters": {"layers": [{"name": "a", "parameters": -1}]},
}


@pytest.mark.parametrize(
    ("make", "change"),
    [
        *(pytest.param(record, change, id=name) for name, change in {**CHANGES, **CHANGES_2}.items()),
        *(pytest.param(old, change, id=f"1: {name}") for name, change in CHANGES_1.items()),
    ],
)
def test_a_record_out_of_bounds_is_refused_and_nothing_changes(
    home: Store, tmp_path: Path, make: Callable[[], dict[str, Any]], change: dict[str, Any]
) -> None:
    source, good, bad = tmp_path / "source", record(), {**make(), **change}
    put(source, good)
    put(source, bad, name="2026-01/zz.json" if not isinstance(bad["run_id"], str) or "/" in bad["run_id"] else None)
    before, rows = contents(home), home.path.read_bytes()
    with pytest.raises(InputError, match="Nothing was merged"):
        results.merge(home.path, source)
    assert contents(home) == before
    assert home.path.read_bytes() == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b"[]", "neither"),
        (b"\xff\xfe{}", "truncated"),
        ("{}".encode("utf-16"), "truncated"),
        (b"[" * 100_000, "truncated"),
        (b'{"record":{"seed":NaN}}', "no JSON number"),
        (b'{"record":{"seed":1,"seed":2}}', "twice"),
        (b'{"record":{"seed":' + b"1" * 5000 + b"}}", "truncated"),
        (b'{"record":{"seed":1e999}}', "cannot be stored"),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value[:20]),
)
def test_what_is_no_record_file_is_named(home: Store, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "source" / "2026-01" / "x.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        results.merge(home.path, path.parent)
    assert str(path) in str(caught.value)


def test_old_records_are_upgraded_and_their_files_stay_as_they_are(home: Store, tmp_path: Path) -> None:
    value = old()
    path = put(tmp_path / "source", value)
    assert results.merge(home.path, tmp_path / "source") == 1
    (row,) = queries.of_runs(home.path, [value["run_id"]]).values()
    assert (row["accuracy"], row["n_latency"]) == (0.75, 6)
    merged = records.find(home.folder, value["run_id"])
    assert merged is not None
    assert json.loads(merged.read_text()) == json.loads(path.read_text())
    results.export(home.path, tmp_path / "out")
    assert json.loads(next((tmp_path / "out").rglob(f"{value['run_id']}.json")).read_text())["record"] == value
    assert results.rebuild(home.path).records == 2
    assert results.check(home.path) == []
    use_everything(home.path)


@pytest.mark.parametrize("kind", ["same id", "id of ours", "claim with a record's id", "same id in two months"])
def test_ids_are_checked_over_the_whole_source_and_the_target(home: Store, tmp_path: Path, kind: str) -> None:
    source, first = tmp_path / "source", record()
    put(source, first)
    (ours,) = records.files(home.folder)
    if kind == "same id":
        put(source, {**first, "seed": 7}, name=f"other/{first['run_id']}.json")
    elif kind == "same id in two months":
        put(source, {**first, "created_at": "2025-05-05T00:00:00+00:00"}, name=f"2025-05/{first['run_id']}.json")
    elif kind == "id of ours":
        put(source, {**record(), "run_id": ours.stem})
    else:
        claim = {"entry_id": ours.stem, "created_at": first["created_at"], "paper": "p", "id": "c", "verdict": "holds"}
        put(source, claim, kind="claim")
    before = contents(home)
    with pytest.raises(InputError, match=r"another content|different content"):
        results.merge(home.path, source)
    assert contents(home) == before


def test_the_same_file_twice_in_a_source_counts_once(home: Store, tmp_path: Path) -> None:
    value = record()
    put(tmp_path / "source", value)
    put(tmp_path / "source", value, name=f"copy/{value['run_id']}.json")
    assert results.merge(home.path, tmp_path / "source") == 1
    assert results.merge(home.path, tmp_path / "source") == 0
    assert results.check(home.path) == []


def test_a_target_of_a_later_schema_is_asked_before_anything_is_written(home: Store, tmp_path: Path) -> None:
    with database.writing(home.path) as connection:
        connection.execute("UPDATE schema_version SET version = 99")
    put(tmp_path / "source", record())
    before = contents(home)
    with pytest.raises(StoreError, match="A later Assay wrote it"):
        results.merge(home.path, tmp_path / "source")
    assert contents(home) == before


def test_merging_is_undone_where_the_database_refuses(
    home: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "source", record())
    before = contents(home)

    def full(*_: Any, **__: Any) -> None:
        raise duckdb.IOException("disk full")

    monkeypatch.setattr(maintenance, "insert_in_order", full)
    with pytest.raises(StoreError, match="disk full"):
        results.merge(home.path, tmp_path / "source")
    assert contents(home) == before
    assert not list(home.folder.glob("*merg*"))


def test_merged_records_are_foreign_and_answer_no_cell_of_ours(home: Store, tmp_path: Path) -> None:
    ours, forged = record(seed=3), record(seed=4, latency_ns=[1] * 700)
    home.add(ours)
    copy_of_ours = {**forged, "cell_hash": ours["cell_hash"], "run_id": "20991231T000000000000-0000000000"}
    put(tmp_path / "source", forged)
    put(tmp_path / "source", copy_of_ours)
    results.merge(home.path, tmp_path / "source")
    for _ in range(2):  # and a rebuild keeps the marks
        found = home.finished([ours["cell_hash"], forged["cell_hash"]])
        assert {key: row["run_id"] for key, row in found.items()} == {ours["cell_hash"]: ours["run_id"]}
        latest = {row["cell_hash"]: row["run_id"] for row in queries.select(home.path, "latest")}
        assert latest[ours["cell_hash"]] == ours["run_id"]
        with database.reading(home.path) as connection:
            origins = dict(connection.execute("SELECT run_id, origin FROM records").fetchall())
        assert origins[ours["run_id"]] is None
        assert str(tmp_path / "source") in origins[forged["run_id"]]
        assert "merged 2" in origins[forged["run_id"]]
        results.rebuild(home.path)


def test_a_clock_that_was_ahead_does_not_hide_later_runs(tmp_path: Path) -> None:
    store = Store(tmp_path / "assay.duckdb")
    ahead = {**record(), "created_at": "2199-01-01T00:00:00+00:00", "run_id": "21990101T000000000000-0000000000"}
    honest = record()
    store.add(ahead)
    store.add(honest)
    for _ in range(2):
        (found,) = store.finished([honest["cell_hash"]]).values()
        assert found["run_id"] == honest["run_id"]
        (latest,) = queries.select(store.path, "latest")
        assert latest["run_id"] == honest["run_id"]
        results.rebuild(store.path)


def test_an_unreadable_file_is_not_damaged(
    home: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = put(home.folder, {**record(), "schema": SCHEMA_VERSION + 1, "new": 1})
    assert home.sync() == 0
    assert "upgrade it" in caplog.text
    with pytest.raises(StoreError, match=r"1 record files cannot be read.*upgrade it"):
        results.rebuild(home.path)
    assert len(queries.select(home.path, "runs")) == 1
    assert any("upgrade it" in problem for problem in results.check(home.path))
    done = results.rebuild(home.path, force=True)
    assert (done.records, done.damaged, done.unreadable) == (1, (), (later,))
    assert later.exists()


def test_another_users_file_is_left_where_it_is(home: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = put(home.folder, record())
    open_it = os.open

    def refusing(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path) == str(theirs):
            raise PermissionError(13, "Permission denied", str(path))
        return open_it(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(StoreError, match=r"cannot be read: Permission denied"):
        results.rebuild(home.path)
    assert theirs.exists()


def test_a_pipe_a_device_and_a_huge_file_are_named_and_never_waited_for(home: Store, tmp_path: Path) -> None:
    for number, make in enumerate(
        (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: _sparse(path, 1 << 40))
    ):
        source = tmp_path / str(number)
        put(source, record())
        make(source / "x.json")
        with pytest.raises(InputError, match=r"x\.json: (not a regular file|1,099,511,627,776 bytes)"):
            results.merge(home.path, source)
    os.mkfifo(next(iter(records.files(home.folder))).with_name("pipe.json"))
    home.sync()
    assert len(queries.select(home.path, "runs")) == 1
    os.mkfifo(tmp_path / "pipe.duckdb")
    for call in (results.runs, results.check, lambda db: Store(db).add(record()), lambda db: results.merge(db, source)):
        with pytest.raises(AssayError):
            call(tmp_path / "pipe.duckdb")


def _sparse(path: Path, size: int) -> None:
    with path.open("wb") as stream:
        stream.truncate(size)


def test_two_files_of_one_id_in_the_folder_do_not_stop_the_others(
    home: Store, caplog: pytest.LogCaptureFixture
) -> None:
    (ours,) = records.files(home.folder)
    value = json.loads(ours.read_text())["record"]
    put(home.folder, {**value, "seed": 8}, name=f"2020-01/{ours.name}")
    later = record()
    put(home.folder, later)
    assert home.sync() == 1
    assert "another content" in caplog.text
    assert {row["run_id"] for row in queries.select(home.path, "runs")} == {ours.stem, later["run_id"]}
    assert results.rebuild(home.path).records == 2


def test_an_endless_message_of_our_own_is_shortened_not_lost(home: Store) -> None:
    added = record(status="failed", reason="x" * 1_000_000 + "\0", traceback="\ud800", warnings=["w" * 100_000])
    home.add(added)
    (row,) = queries.of_runs(home.path, [added["run_id"]]).values()
    assert "1,000,006 characters in all" in row["reason"]


@pytest.mark.parametrize("version", limits.VERSIONS)
def test_bounds_name_every_field_of_the_record(version: int) -> None:
    import dataclasses

    from harness.record import Record

    if version == SCHEMA_VERSION:
        assert limits.names(version) == {field.name for field in dataclasses.fields(Record)}
    assert "run_id" in limits.names(version)


EXTREME: tuple[Any, ...] = (
    *("", "x", "\x1b[31m", "a\nb", "$\\frac{1}{0}$", "=1+1", "é\u202e😀", "\ud800", "\0", "y" * 30_000),
    *(0, -1, 1, 2**31, 2**53 + 1, 2**63, 10**400, 0.5, -0.0, 1e308, 5e-324, True, None),
    *([], {}, [None], [[]], {"": None}, {"name": 5}, [{"name": "x"}], [1] * 1000, DEEP, {"before": 1}),
)


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [at] if at else []
    if isinstance(value, dict):
        for key in value:
            found += _places(value[key], (*at, key))
    elif isinstance(value, list):
        for index in {0, len(value) - 1} if value else ():
            found += _places(value[index], (*at, index))
    return found


def mutated(chance: random.Random) -> dict[str, Any]:
    """A record with one to three values replaced, removed or added."""
    value = chance.choice((record, old))()
    for _ in range(chance.choice((1, 1, 2, 3))):
        *above, last = chance.choice(_places(value))
        holder = value
        for key in above:
            holder = holder[key]
        what = chance.randrange(10)
        if what == 0:
            holder.pop(last)
        elif what == 1 and isinstance(holder, dict):
            holder[chance.choice(("extra", "", "name"))] = chance.choice(EXTREME)
        else:
            holder[last] = copy.deepcopy(chance.choice(EXTREME))
        if not _places(value):
            break
    return value


def test_mutated_records_are_refused_or_of_use(tmp_path: Path) -> None:
    """A seeded sample; benchmarks/fuzz/merge.py goes on from here."""
    chance = random.Random(5)
    store = Store(tmp_path / "assay.duckdb")
    accepted = []
    for _ in range(200):
        value = mutated(chance)
        try:
            accepted.append(records.checked("record", value))
        except StoreError:
            continue
    assert 20 < len(accepted) < 180
    for stored in {stored.id: stored for stored in accepted}.values():
        records.write(store.folder, stored)
    store.sync()
    assert results.check(store.path) == []
    use_everything(store.path)
    assert results.rebuild(store.path).damaged == ()
