"""Sweeps that are killed, interrupted, doubled, or whose runtimes misbehave."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest

from tests.e2e.command import assay, rows, spec, start

KILLS = 20
CELLS = 20


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kill_9_at_random_moments_loses_nothing(home: Path) -> None:
    path = spec(home.parent, batches=list(range(1, CELLS + 1)))
    moments = random.Random(20)
    # Seconds to a first record, on this machine as it is now: kills are to fall before it and after it.
    other = home.parent / "other"
    other.mkdir()
    (other / "cache").symlink_to(home / "cache")
    begin = time.monotonic()
    assay(other, "run", spec(other, batches=1))
    first = time.monotonic() - begin
    committed: set[str] = set()
    seen: list[int] = []
    for _ in range(KILLS):
        with start(home, "run", path) as sweep:
            time.sleep(moments.uniform(0.1, 1.8) * first)
            sweep.send_signal(signal.SIGKILL)
            sweep.communicate()
        if not (home / "assay.duckdb").exists():
            assert not committed
            continue
        now = {row["run_id"] for row in rows(home, "SELECT run_id FROM runs")}
        assert committed <= now, "a committed record was lost"
        committed = now
        seen.append(len(now))
        half = "n_latency < 100 OR n_examples IS NULL OR accuracy IS NULL"
        assert rows(home, f"SELECT run_id FROM runs WHERE status = 'ok' AND ({half})") == []
    assert any(0 < count < CELLS for count in seen), "no kill fell between the first and the last record"
    assay(home, "run", path)
    assay(home, "db", "check")
    cells = rows(home, "SELECT cell_hash, count(*) AS n FROM runs WHERE status = 'ok' GROUP BY cell_hash")
    assert [cell["n"] for cell in cells] == [1] * CELLS
    assert committed <= {row["run_id"] for row in rows(home, "SELECT run_id FROM runs")}


def test_two_sweeps_into_one_database_share_the_work(home: Path) -> None:
    path = spec(home.parent, batches=[1, 2, 3, 4, 5, 6])
    with start(home, "run", path) as one, start(home, "run", path) as two:
        results = [(process.communicate(timeout=300), process.returncode) for process in (one, two)]
    for (out, err), code in results:
        assert code == 0, (out, err)
        assert "6 cells" in out
    assert [row["n"] for row in rows(home, "SELECT count(*) AS n FROM runs GROUP BY cell_hash")] == [1] * 6


def test_ctrl_c_stops_cleanly_and_the_same_command_goes_on(home: Path) -> None:
    path = spec(home.parent, behaviour="hang", batches=[1])
    mark = home.parent / "hangs"
    with start(home, "run", path, FAKE_HANGS=str(mark)) as sweep:
        while not mark.exists():
            assert sweep.poll() is None
            time.sleep(0.05)
        sweep.send_signal(signal.SIGINT)
        out, err = sweep.communicate(timeout=60)
    assert sweep.returncode == 130
    assert "Traceback" not in err
    assert "goes on" in out
    (row,) = rows(home, "SELECT status, reason FROM runs")
    assert row["status"] == "interrupted"
    # The cell is not taken for done.
    out, _ = assay(home, "run", path, "--dry-run")
    assert "1 to run" in out


@pytest.mark.parametrize(
    ("behaviour", "code", "status", "reason"),
    [
        ("segfault", 1, "failed", "SIGSEGV"),
        ("killed", 1, "failed", "memory runs out"),
        ("nan", 1, "failed", "NaN"),
        ("cannot", 0, "unsupported", "layer 'body.0'"),
        ("missing", 0, "unavailable", "pip install"),
    ],
)
def test_a_misbehaving_runtime_is_a_record_and_the_sweep_goes_on(
    home: Path, behaviour: str, code: int, status: str, reason: str
) -> None:
    path = home.parent / "mixed.toml"
    path.write_text(
        'task = "digits-cnn"\n'
        f'hardware = {{name = "tests.unit.fake_hardware:Fake", behaviour = ["{behaviour}", "ok"]}}\n'
        "[measure]\nmin_queries = 100\nmin_seconds = 0.01\n"
    )
    out, _ = assay(home, "run", str(path), "--json", code=code)
    bad, good = json.loads(out)
    assert (bad["status"], good["status"]) == (status, "ok")
    assert reason in bad["reason"]
    assert bad["latency_p50_ms"] is None
    assert good["latency_p50_ms"] > 0


def test_a_hang_ends_at_the_timeout(home: Path) -> None:
    out, _ = assay(home, "run", spec(home.parent, "hang"), "--timeout", "20", "--json", code=1)
    (row,) = json.loads(out)
    assert row["status"] == "timeout"
    assert row["reason"].startswith("measuring took longer than 20 s")
    assert "--timeout" in row["reason"]
    assert row["size_bytes"] > 0, "it was built, and hung when it ran"


def test_repeating_computes_nothing_and_says_so(home: Path) -> None:
    path = spec(home.parent, batches=[1, 2])
    assay(home, "run", path)
    out, _ = assay(home, "run", path)
    assert "nothing was computed again" in out
    assert len(rows(home, "SELECT * FROM runs")) == 2
    assay(home, "run", path, "--rerun")
    assert len(rows(home, "SELECT * FROM runs")) == 4


def test_only_and_dry_run(home: Path) -> None:
    path = spec(home.parent, batches=[1, 2, 3])
    out, _ = assay(home, "run", path, "--dry-run", "--only", "batch_size>=2")
    assert "2 cells" in out
    assert not (home / "assay.duckdb").exists()
    assay(home, "run", path, "--only", "batch_size=3")
    assert [row["batch_size"] for row in rows(home, "SELECT batch_size FROM runs")] == [3]
    _, err = assay(home, "run", path, "--only", "batchsize=3", code=2)
    assert "Did you mean 'batch_size'?" in err
    _, err = assay(home, "run", path, "--only", "batch_size=77", code=2)
    assert "accepts none" in err
