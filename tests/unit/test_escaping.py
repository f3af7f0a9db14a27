"""Foreign text in every format, files that are not written over, and locks that end."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import re
import unicodedata
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import duckdb
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import results
from harness import locks
from harness.cli import reading
from harness.errors import DatabaseBusy, InputError, StoreError
from harness.filters import Filter
from harness.runner import measuring_lock
from results import database, escaping, output, plots, queries, records, tables
from results.store import Store
from tests.unit.factories import record

EVIL = (
    "$\\frac{1}$ x|y\n| forged | row | \x1b[2J\x1b]0;owned\x07\x1b[31m <script>alert(1)</script> "
    "[c](javascript:alert(1)) ![i](http://evil/i.png) \\input{/etc/passwd} "
    "\u202e \r over \x9b31m _a_ *b* `c` &lt; \U000e0041"
)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = Store(tmp_path_factory.mktemp("hostile") / "assay.duckdb")
    added = record(
        task=EVIL,
        chain=[{"name": EVIL}],
        hardware=EVIL,
        precision="=cmd|' /C calc'!A0",
        spec_name="@SUM(1+1)",
        reasons={"latency_p99_ms": EVIL},
        latency_ns=[1000] * 8,
        warnings=[EVIL],
        traceback=f"first\n{EVIL}",
    )
    for item in (record(), added):
        records.write(store.folder, records.checked("record", item))
    store.sync()
    return store.path


def harmless(text: str) -> bool:
    return all(sign == "\n" or unicodedata.category(sign) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for sign in text)


@given(text=st.text(st.characters(codec=None)))
def test_no_format_lets_a_terminal_obey(text: str) -> None:
    for escape in (escaping.terminal, escaping.markdown, escaping.latex, escaping.csv_cell, escaping.plot_text):
        shown = escape(text)
        assert harmless(shown)
        assert "\n" not in shown
    assert harmless(escaping.terminal(text, lines=True))
    if not re.search("[\ud800-\udfff]", text):
        assert json.loads(escaping.json_text(json.dumps(text, ensure_ascii=False))) == text
    assert harmless(escaping.json_text(json.dumps(text, ensure_ascii=False)))


@pytest.mark.parametrize("text", ["=1+1", "+A1", "-A1", "@SUM(1)", " =1", "\t=1", "＝1", "-1+cmd"])
def test_a_spreadsheet_takes_no_text_for_a_formula(text: str) -> None:
    cell = escaping.csv_cell(text)
    assert not cell.lstrip().startswith(("=", "+", "-", "@", "＝"))


@pytest.mark.parametrize("value", [-0.25, -3, 1e-9, "-0.25", "+1e5", "plain", "", "a-b", None, True])
def test_numbers_and_words_stay_as_they_are_in_csv(value: Any) -> None:
    assert escaping.csv_cell(value) == ("" if value is None else str(value))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("magnitude (sparsity=0.9)", "magnitude (sparsity=0.9)"),
        ("params_nonzero of 3 < 4", "params_nonzero of 3 < 4"),
        ("__init__", r"\_\_init\_\_"),
        ("a|b", r"a\|b"),
        ("[a](b)", r"[a]\(b)"),
        ("<b>", "&lt;b>"),
        ("AT&T &amp;", "AT&T &amp;amp;"),
        ("$x$", r"\$x\$"),
        ("\\*", r"\\\*"),
    ],
)
def test_markdown_is_text(text: str, expected: str) -> None:
    assert escaping.markdown(text) == expected


def test_latex_takes_no_cell_for_an_argument_of_the_line_before() -> None:
    assert escaping.latex("[1] a_b") == r"{[}1] a\_b"
    assert escaping.latex("*") == "{*}"
    assert escaping.latex(r"\input{x}") == r"\textbackslash{}input\{x\}"


def test_tables_of_hostile_rows_have_the_rows_that_there_are(hostile: Path) -> None:
    rows = queries.select(hostile, "runs")
    names = ["task", "method", "hardware", "precision", "latency_p99_ms", "spec_name"]
    texts = {fmt: tables.render(tables.build(rows, names, fmt), fmt) for fmt in ("md", "latex", "csv")}  # type: ignore[arg-type]
    assert all(map(harmless, texts.values()))
    table = [line for line in texts["md"].splitlines() if line.startswith("|")]
    assert len(table) == 4
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {7}
    for sign in ("<script>", "](javascript", "![i](http"):
        assert sign not in texts["md"]
    assert "\\input" not in texts["latex"]
    cells = [cell for row in csv.reader(io.StringIO(texts["csv"])) for cell in row]
    assert len(cells) == 3 * len(names)
    assert not any(cell.startswith(("=", "@", "+")) for cell in cells)


@pytest.mark.parametrize(
    "arguments",
    [
        ["table", "--all"],
        ["table", "--all", "--json"],
        ["table", "--all", "--format", "csv"],
        ["db", "query", f"SELECT task, chain, warnings FROM runs -- {'x' * 10}"],
        ["db", "query", 'SELECT task AS "a\x1b[31m" FROM runs'],
        ["show", "LAST"],
        ["show", "LAST", "--json"],
    ],
    ids=" ".join,
)
def test_commands_print_nothing_that_a_terminal_obeys(hostile: Path, arguments: list[str]) -> None:
    last = next(row["run_id"] for row in queries.select(hostile, "runs") if row["task"] == EVIL)
    command = {"table": reading.table, "db": reading.db, "show": reading.show}[arguments[0]]
    given_ = [last if argument == "LAST" else argument for argument in arguments[1:]]
    result = CliRunner().invoke(command, [*given_, "--db", str(hostile)])
    assert result.exit_code == 0, result.output
    assert harmless(result.output)
    assert "forged" in result.output
    if given_ != [last]:  # `show` folds long lines
        assert not any(line.lstrip().startswith(("| forged", "forged")) for line in result.output.splitlines())


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_plots_draw_text_as_text(hostile: Path, tmp_path: Path, suffix: str) -> None:
    found, notes = plots.points(queries.select(hostile, "runs"), "size_bytes", "accuracy")
    plots.draw(found, "size_bytes", "accuracy", tmp_path / f"a{suffix}", notes)
    if suffix == ".svg":
        text = (tmp_path / "a.svg").read_text()
        assert "<script>" not in text
        assert "\\frac" in " ".join(ElementTree.fromstring(text).itertext())


# --- files -------------------------------------------------------------------------------------------------------


def test_an_output_never_takes_the_place_of_results(tmp_path: Path) -> None:
    store = Store(tmp_path / "assay.duckdb")
    store.add(record())
    (file,) = records.files(store.folder)
    linked = tmp_path / "link.md"
    linked.symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "pipe")
    other = tmp_path / "other.db"
    duckdb.connect(str(other)).close()
    for path in (store.path, file, linked, tmp_path / "pipe", other, tmp_path):
        before = file.read_bytes(), store.path.read_bytes()
        result = CliRunner().invoke(reading.table, ["--db", str(store.path), "--out", str(path)])
        assert isinstance(result.exception, InputError) or result.exit_code == 2, path
        assert (file.read_bytes(), store.path.read_bytes()) == before
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(InputError, match="is a link"):
        plots.draw([], "size_bytes", "accuracy", linked.rename(tmp_path / "link.svg"))


def test_an_export_does_not_follow_links(tmp_path: Path) -> None:
    store = Store(tmp_path / "assay.duckdb")
    store.add(record())
    results.export(store.path, tmp_path / "out")
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "out" / "README.md").unlink()
    (tmp_path / "out" / "README.md").symlink_to(victim)
    with pytest.raises(InputError, match="is a link"):
        results.export(store.path, tmp_path / "out")
    assert victim.read_text() == "mine"


def test_an_output_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_text("before")
    with pytest.raises(ZeroDivisionError), output.replacing(path) as stream:
        stream.write(b"half" * (1 // 0))
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


# --- foreign databases -------------------------------------------------------------------------------------------


def test_a_hostile_database_reads_no_files_and_its_views_are_not_used(tmp_path: Path) -> None:
    store = Store(tmp_path / "assay.duckdb")
    store.add(record())
    secret = tmp_path / "secret.csv"
    secret.write_text("run_id\nsecret\n")
    connection = duckdb.connect(str(store.path))
    for view in ("runs", "latest", "pairs"):
        connection.execute(f"CREATE OR REPLACE VIEW {view} AS SELECT * FROM read_csv('{secret}')")
    connection.close()
    (row,) = queries.select(store.path, "latest")
    assert row["accuracy"] == 0.9
    for sql in (f"FROM read_csv('{secret}')", "FROM assay.main.runs", f"COPY records TO '{tmp_path / 'x'}'"):
        with pytest.raises((InputError, StoreError)):
            queries.query(store.path, sql)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("sql", ["", " ;", "-- nothing", "SELECT 1; SELECT 2", "\ud800"])
def test_what_is_not_one_statement_is_bad_input(tmp_path: Path, sql: str) -> None:
    database.create(tmp_path / "a.duckdb")
    with pytest.raises(InputError, match="SQL"):
        queries.query(tmp_path / "a.duckdb", sql)


# --- locks -------------------------------------------------------------------------------------------------------


def _held(path: str, ready: Any, done: Any) -> None:
    with locks.hold(Path(path), 5):
        ready.set()
        done.wait(30)


@pytest.fixture
def other_process(tmp_path: Path) -> Any:
    """Another process that holds ``tmp_path / "a.lock"``."""
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=_held, args=(str(tmp_path / "a.lock"), ready, done))
    process.start()
    assert ready.wait(60)
    yield process
    done.set()
    process.join()


def test_a_wait_says_on_whom_and_ends(other_process: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    pid = other_process.pid
    hold = locks.hold(tmp_path / "a.lock", 0.2, waiting=told.append)
    with pytest.raises(locks.LockTimeout, match=f"process {pid}"), hold:
        pass
    assert len(told) == 1
    (tmp_path / f"assay-measuring-{os.getuid()}.lock").symlink_to(tmp_path / "a.lock")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(StoreError, match="cannot be opened"), measuring_lock(told.append, 0.1):
        pass
    (tmp_path / f"assay-measuring-{os.getuid()}.lock").unlink()
    os.link(tmp_path / "a.lock", tmp_path / f"assay-measuring-{os.getuid()}.lock")
    with pytest.raises(StoreError, match=rf"process {pid} .*--timeout"), measuring_lock(told.append, 0.1):
        pass


def test_a_writer_that_waits_keeps_new_readers_out_for_a_while_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "assay.duckdb", timeout_s=0.2)
    store.add(record())
    monkeypatch.setattr(database, "_BEHIND_WRITERS_S", 0.2)
    with database.locked(store.path):
        with pytest.raises(DatabaseBusy, match="has been writing"):
            store.add(record())
        assert len(queries.select(store.path, "runs")) == 1  # nobody has the database itself


def _add_some(db: str, count: int) -> None:
    for _ in range(count):
        value = {**record(), "run_id": f"{os.getpid()}-{_}"}
        Store(Path(db), 60).add(value)


def test_readers_in_a_loop_do_not_starve_writers(tmp_path: Path) -> None:
    store = Store(tmp_path / "assay.duckdb", timeout_s=60)
    store.add(record())
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_add_some, args=(str(store.path), 4)) for _ in range(2)]
    for process in writers:
        process.start()
    reads = 0
    while any(process.is_alive() for process in writers):
        queries.select(store.path, "latest")
        reads += 1
    assert [process.exitcode for process in writers] == [0, 0]
    assert reads
    assert len(queries.select(store.path, "runs")) == 9
    assert results.check(store.path) == []


# --- filters -----------------------------------------------------------------------------------------------------


def test_filters_take_names_of_steps_and_plain_numbers_only() -> None:
    row = {"config.mine:Prune#2.amount": 0.5, "seed": 3}
    assert Filter.parse("config.mine:Prune#2.amount>=0.5", row).accepts(row)
    assert not Filter.parse("seed<3").accepts(row)
    for text in ("seed<nan", "seed<1_0", "seed<inf", "seed<", f"seed<{'9' * 1000}", "a\x1b[2J", "=3"):
        with pytest.raises(InputError) as caught:
            Filter.parse(text)
        assert harmless(str(caught.value))
