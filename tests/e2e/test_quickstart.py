"""The main job on real data: digits, every method, every runtime that is here, twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.command import assay, rows

SPEC = """
task = "digits-cnn"
method = [
    "baseline",
    {name = "magnitude", sparsity = 0.8, finetune_epochs = 1},
    {name = "neuron-merging", ratio = 0.25},
    "ptq-int8",
    {chain = [{name = "neuron-merging", ratio = 0.25}, "ptq-int8"]},
]
hardware = ["torch", "onnxruntime", "openvino"]

[measure]
min_queries = 700
min_seconds = 0.05
"""

REQUIRED = [
    "run_id", "created_at", "status", "reason", "task", "method", "chain", "config", "hardware", "seed",
    "batch_size", "threads", "precision", "accuracy", "accuracy_low", "accuracy_high", "n_examples", "size_bytes",
    "zstd_bytes", "compression_ratio", "params_total", "params_nonzero", "pruning_rate", "macs", "latency_p50_ms",
    "latency_p90_ms", "latency_p99_ms", "n_latency", "speedup", "throughput_per_s", "energy_j", "energy_method",
    "carbon_g", "peak_rss_bytes", "load_ms", "first_ms", "fidelity_max_abs", "fidelity_top1", "accuracy_delta",
    "mcnemar_p", "spec_hash", "method_hash", "git_commit", "git_dirty", "machine_id", "artifact_sha256",
    "plain_bytes", "container_bytes", "shannon_bytes", "weights_zstd_bytes", "xz_bytes", "gzip_bytes",
    "container_compression_ratio", "macs_ratio",
]  # fmt: skip


@pytest.fixture(scope="module")
def twice(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("twice") / "home"
    home.mkdir()
    (home / "cache").symlink_to(trained / "cache")
    path = home.parent / "all.toml"
    path.write_text(SPEC)
    assay(home, "run", str(path))
    assay(home, "run", str(path), "--rerun")
    return home


@pytest.mark.slow
@pytest.mark.timeout(1200)
class TestEverything:
    def test_all_cells_are_ok_or_unavailable_with_a_reason(self, twice: Path) -> None:
        found = rows(twice, "SELECT status, reason FROM runs")
        assert len(found) == 2 * 5 * 3
        for row in found:
            assert row["status"] == "ok" or (row["status"] == "unavailable" and "pip install" in row["reason"])

    def test_two_runs_give_equal_accuracies_and_artifacts(self, twice: Path) -> None:
        sql = """SELECT cell_hash, count(*) AS n, count(DISTINCT accuracy) AS accuracies,
            count(DISTINCT artifact_sha256) AS artifacts FROM runs WHERE status = 'ok' GROUP BY cell_hash"""
        found = rows(twice, sql)
        assert found
        for row in found:
            assert (row["n"], row["accuracies"], row["artifacts"]) == (2, 1, 1)

    def test_no_value_is_missing_without_a_reason(self, twice: Path) -> None:
        for row in rows(twice, "SELECT * FROM runs WHERE status = 'ok'"):
            assert set(REQUIRED) <= row.keys()
            reasons = json.loads(row["reasons"])
            for column in REQUIRED:
                assert row[column] is not None or column == "reason" or reasons.get(column), column
            assert row["energy_j"] is None or row["energy_j"] > 0

    def test_every_stage_is_weighed_and_zeros_count_in_the_file_alone(self, twice: Path) -> None:
        for row in rows(twice, "SELECT chain, stages FROM records WHERE status = 'ok'"):
            stages = json.loads(row["stages"])
            assert len(stages) == 1 + len(json.loads(row["chain"]))
            assert all(0 < stage["shannon_bytes"] <= stage["container_bytes"] for stage in stages)
        found = rows(twice, "SELECT container_compression_ratio FROM latest WHERE method = 'magnitude'")
        assert all(row["container_compression_ratio"] > 1.3 for row in found)

    def test_every_method_keeps_its_promise_on_every_runtime(self, twice: Path) -> None:
        for row in rows(twice, "SELECT * FROM runs WHERE status = 'ok'"):
            assert row["fidelity_top1"] >= 0.95, (row["method"], row["hardware"], row["fidelity_top1"])
            assert row["accuracy"] > 0.8
            if row["method"] == "magnitude":
                assert row["pruning_rate"] > 0.75
                # Zeros alone make no file smaller: that is said, not hidden.
                assert row["compression_ratio"] < 1.1
            if "neuron-merging" in row["method"]:
                assert row["compression_ratio"] > 1.5
            if "ptq-int8" in row["method"]:
                assert row["compression_ratio"] > 2.5
                assert row["precision"] == ("f32" if row["hardware"] == "torch" else "int8")
                kernels = json.loads(row["effective"])["kernels"]
                assert kernels

    def test_the_results_can_be_read_in_every_way(self, twice: Path, tmp_path: Path) -> None:
        out, _ = assay(twice, "table", "--json")
        assert len(json.loads(out)) == len(
            {row["cell_hash"] for row in rows(twice, "SELECT cell_hash FROM runs WHERE status = 'ok'")}
        )
        for form in ("md", "latex", "csv"):
            assert assay(twice, "table", "--format", form)[0]
        run = json.loads(assay(twice, "ls", "runs", "--json")[0])[0]["name"]
        assert json.loads(assay(twice, "show", run, "--json")[0])
        assay(twice, "plot", "latency_p50_ms", "accuracy", "--out", str(tmp_path / "p.png"))
        assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
        assay(twice, "db", "export", str(tmp_path / "out"))
        assay(twice, "db", "merge", str(tmp_path / "out"), "--db", str(tmp_path / "other.duckdb"))
        assert len(
            json.loads(
                assay(twice, "db", "query", "SELECT * FROM runs", "--db", str(tmp_path / "other.duckdb"), "--json")[0]
            )
        ) == len(rows(twice, "SELECT * FROM runs"))
        assay(twice, "db", "check")


def test_the_python_interface(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import harness
    import results

    monkeypatch.setenv("ASSAY_HOME", str(home))
    settings = {"min_queries": 100, "min_seconds": 0.01}
    record = harness.run(harness.Spec(task="digits-cnn", measure=settings))
    assert record.status == "ok"
    assert (record.scores[0]["metric"], record.scores[0]["against"]) == ("accuracy", "targets")
    assert record.scores[0]["value"] > 0.9
    again = harness.run(harness.Spec(task="digits-cnn", measure=settings))
    assert again.run_id == record.run_id
    table = results.runs(home / "assay.duckdb")
    assert table.num_rows == 1
    assert table.column("run_id").to_pylist() == [record.run_id]


def test_reproducing_a_paper_without_its_files_is_a_stated_reason(home: Path) -> None:
    out, _ = assay(
        home,
        "reproduce",
        "neuron-merging-2020",
        "--json",
        code=1,
        ASSAY_DATA="",
        http_proxy="http://127.0.0.1:9",
        https_proxy="http://127.0.0.1:9",
    )
    report = json.loads(out)
    assert report["paper"] == "neuron-merging-2020"
    assert len(report["claims"]) == 9
    assert all(claim["verdict"].startswith("not run (") for claim in report["claims"])


def test_doctor_and_lists(home: Path) -> None:
    (report,) = json.loads(assay(home, "doctor", "--json")[0])
    assert {"torch", "onnxruntime", "openvino"} <= report["runtimes"].keys()
    assert report["machine"]["cores"] >= 1
    assert "Runtimes" in assay(home, "doctor")[0]
    for what in ("tasks", "methods", "hardware", "specs", "papers"):
        assert all(item["name"] for item in json.loads(assay(home, "ls", what, "--json")[0]))
    assert assay(home, "validate", "quickstart", "fashion-mnist")[0].count("valid") == 2
