"""``assay db``, ``table``, ``plot``, ``show`` and ``ls runs`` as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from harness.cli import reading
from harness.errors import AssayError, InputError, UnknownName
from results import records
from results.store import Store
from tests.unit.factories import record, unmeasured

PRUNED = [{"name": "magnitude", "sparsity": 0.9}]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database that the tests only read."""
    return filled(tmp_path_factory.mktemp("cli") / "assay.duckdb")


def filled(db: Path) -> Path:
    store = Store(db)
    added = [record(), record(chain=PRUNED, energy=[], reasons={"energy": "switched off"}, warnings=["load 3.1"])]
    added.append(unmeasured("failed", "signal 11", chain=PRUNED, hardware="openvino", traceback="Traceback: here"))
    for item in added:
        records.write(store.folder, records.checked("record", item))
    store.sync()
    return db


def invoke(command: click.Command, *arguments: object) -> Result:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit | AssayError):
        raise result.exception
    return result


def listed(command: click.Command, *arguments: object) -> list[dict[str, Any]]:
    result = invoke(command, *arguments, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert isinstance(found, list)
    return found


def test_query_prints_one_object_a_row(shared: Path) -> None:
    rows = listed(reading.db, "query", "SELECT status, count(*) AS n FROM runs GROUP BY ALL ORDER BY n", "--db", shared)
    assert rows == [{"status": "failed", "n": 1}, {"status": "ok", "n": 2}]
    plain = invoke(reading.db, "query", "SELECT created_at, speedup, NULL AS nothing FROM runs", "--db", shared)
    assert plain.output.splitlines()[0].split() == ["created_at", "speedup", "nothing"]
    assert "–" in plain.output
    assert "(no rows)" in invoke(reading.db, "query", "SELECT 1 WHERE false", "--db", shared).output


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("SELEC 1", "syntax error"),
        ("SELECT acuracy FROM runs", "acuracy"),
        ("DELETE FROM records", "read-only"),
        ("CREATE TABLE x (i INTEGER)", "read-only"),
        ("SELECT * FROM read_csv('/etc/passwd')", "disabled"),
    ],
)
def test_a_bad_or_writing_query_is_bad_input(shared: Path, sql: str, message: str) -> None:
    before = shared.read_bytes()
    error = invoke(reading.db, "query", sql, "--db", shared).exception
    assert isinstance(error, InputError)
    assert error.exit_code == 2
    assert message in str(error)
    assert shared.read_bytes() == before


def test_path_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path))
    assert invoke(reading.db, "path").output.strip() == str(tmp_path / "assay.duckdb")
    assert listed(reading.db, "path", "--db", tmp_path / "x.duckdb") == [
        {"path": str(tmp_path / "x.duckdb"), "exists": False}
    ]


def test_export_merge_check_rebuild(tmp_path: Path) -> None:
    db, out, other = filled(tmp_path / "a.duckdb"), tmp_path / "out", tmp_path / "b" / "b.duckdb"
    assert "3 record files" in invoke(reading.db, "export", out, "--db", db).output
    assert listed(reading.db, "merge", out, "--db", other) == [{"source": str(out), "new": 3}]
    assert "0 new records" in invoke(reading.db, "merge", out, "--db", other).output
    assert "agree" in invoke(reading.db, "check", "--db", other).output
    assert listed(reading.db, "rebuild", "--db", other)[0]["records"] == 3
    next(records.files(records.folder_of(other))).write_text("{")
    checked = invoke(reading.db, "check", "--db", other)
    assert checked.exit_code == 1
    assert "truncated" in checked.output
    as_json = invoke(reading.db, "check", "--db", other, "--json")
    assert as_json.exit_code == 1
    assert "truncated" in json.loads(as_json.output)[0]["problem"]


def test_table_shows_ok_rows_and_writes_files(shared: Path, tmp_path: Path) -> None:
    text = invoke(reading.table, "--db", shared).output
    assert "magnitude (sparsity=0.9)" in text
    assert "openvino" not in text
    assert "[1] switched off" in text
    assert "1 of 2 rows carry warnings" in text
    assert "openvino" in invoke(reading.table, "--db", shared, "--all").output
    out = tmp_path / "deep" / "t.tex"
    assert invoke(reading.table, "--db", shared, "--format", "latex", "--out", out).output == ""
    assert r"\toprule" in out.read_text()
    rows = listed(reading.table, "--db", shared, "--columns", "method,accuracy", "--where", "method=magn*")
    assert rows == [{"method": "magnitude", "accuracy": 0.9}]


def test_table_says_what_is_wrong(shared: Path) -> None:
    for arguments, kind, message in (
        (["--columns", "acuracy"], UnknownName, "Did you mean 'accuracy'"),
        (["--where", "metod=x"], InputError, "Did you mean 'method'"),
        (["--where", "method=nothing"], InputError, "No rows"),
        (["--out", "/proc/nowhere/t.md"], InputError, "--out"),
    ):
        error = invoke(reading.table, "--db", shared, *arguments).exception
        assert isinstance(error, kind)
        assert message in str(error)


def test_plot_prints_points_and_draws(shared: Path, tmp_path: Path) -> None:
    points = listed(reading.plot, "size_bytes", "accuracy", "--db", shared)
    assert {(p["x"], p["y"]) for p in points} == {(4.0, 90.0)}
    out = tmp_path / "p.svg"
    assert invoke(reading.plot, "latency_p50_ms", "accuracy", "--db", shared, "--out", out).output.strip() == str(out)
    assert out.stat().st_size > 1000
    error = invoke(reading.plot, "latency", "accuracy", "--db", shared).exception
    assert isinstance(error, UnknownName)


def test_show_takes_a_unique_prefix_and_tells_everything(shared: Path) -> None:
    run_ids = [
        row["run_id"] for row in listed(reading.db, "query", "SELECT run_id FROM runs ORDER BY run_id", "--db", shared)
    ]
    text = invoke(reading.show, run_ids[1], "--db", shared).output
    for word in ("switched off", "Warning: load 3.1", "latency_p50_ms", "sparsity", "baseline_run_id", "bytes"):
        assert word in text
    assert "Traceback: here" in invoke(reading.show, run_ids[2], "--db", shared).output
    (row,) = listed(reading.show, run_ids[0], "--db", shared)
    assert row["chain"] == [{"name": "baseline"}]
    assert row["energy_readings"][0]["method"] == "modelled"
    assert row["artifact_files"] == ["model.pt"]
    for argument, message in (("2026", "3 runs"), ("nope", "No run 'nope'")):
        error = invoke(reading.show, argument, "--db", shared).exception
        assert isinstance(error, InputError)
        assert message in str(error)


def test_ls_runs_lists_every_run(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reading.ls_runs(shared, True)
    rows = json.loads(capsys.readouterr().out)
    assert [row["status"] for row in rows] == ["ok", "ok", "failed"]
    assert all(row["name"] == row["run_id"] for row in rows)
    reading.ls_runs(shared, False)
    assert len(capsys.readouterr().out.splitlines()) == 4


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (reading.db, ["query", "SELECT 1"]),
        (reading.db, ["check"]),
        (reading.db, ["export", "out"]),
        (reading.table, []),
        (reading.plot, ["size_bytes", "accuracy"]),
        (reading.show, ["x"]),
    ],
    ids=lambda value: value.name if isinstance(value, click.Command) else "-".join(value),
)
def test_readers_never_create_a_database(tmp_path: Path, command: click.Command, arguments: list[str]) -> None:
    error = invoke(command, *arguments, "--db", tmp_path / "none.duckdb").exception
    assert isinstance(error, InputError)
    assert "assay run quickstart" in str(error)
    assert list(tmp_path.iterdir()) == []


def test_every_command_has_help_and_takes_db_and_json() -> None:
    commands = [reading.table, reading.plot, reading.show, *reading.db.commands.values()]
    for command in commands:
        assert command.help
        names = {name for option in command.params for name in option.opts}
        assert {"--db", "--json"} <= names
