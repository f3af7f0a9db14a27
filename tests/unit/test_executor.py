from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from harness.executor import JobError, Worker
from harness.spec import EnergySettings, MeasureSettings
from tests.unit.fake_hardware import Behaviour


@pytest.fixture
def job(tmp_path: Path) -> Any:
    reference = tmp_path / "reference"
    reference.mkdir()
    np.save(reference / "x.npy", np.zeros((8, 1, 4, 4), np.float32))
    np.save(reference / "logits.npy", np.zeros((8, 10), np.float32))
    np.save(tmp_path / "x.npy", np.zeros((20, 1, 4, 4), np.float32))
    np.save(tmp_path / "y.npy", np.arange(20) % 10)
    (tmp_path / "model.bin").write_bytes(b"weights")

    def make(behaviour: Behaviour, **settings: Any) -> dict[str, Any]:
        measure = MeasureSettings(min_queries=100, min_seconds=0.01, warmup_seconds=0.0, **settings)
        return {
            "op": "measure",
            "hardware": {"name": "tests.unit.fake_hardware:Fake", "behaviour": behaviour},
            "threads": 1,
            "batch_size": 2,
            "measure": vars(measure),
            "energy": vars(EnergySettings()),
            "artifact": str(tmp_path / "model.bin"),
            "reference": str(reference),
            "reference_data": "validation",
            "test": str(tmp_path),
        }

    return make


def test_a_measurement_returns_every_sample_and_prediction(job: Any) -> None:
    seen: list[float] = []
    with Worker(threads=1) as worker:
        result = worker.run(job("ok"), timeout=60, progress=lambda fraction, _: seen.append(fraction))
    assert len(result["latency_ns"]) >= 100
    assert result["predictions"] == [0] * 20
    assert result["n_correct"] == 2
    assert result["fidelity"] == {"max_abs": 0.0, "top1": 1.0, "mean_kl": 0.0, "n": 8, "data": "validation"}
    assert result["energy"][0]["method"] in ("modelled", "measured_counter")
    assert result["energy"][0]["inferences"] == len(result["latency_ns"])
    assert result["peak_rss_bytes"] > 1 << 20
    assert seen == sorted(seen)


def test_output_of_libraries_does_not_disturb_the_protocol(job: Any) -> None:
    with Worker(threads=1) as worker:
        assert worker.run(job("print"), timeout=60)["n_examples"] == 20


@pytest.mark.parametrize(
    ("behaviour", "status", "reason"),
    [
        ("segfault", "failed", "killed by SIGSEGV"),
        ("killed", "failed", "memory runs out"),
        ("exit", "failed", "exit code 3"),
        ("raise", "failed", "RuntimeError: the fake runtime broke"),
        ("memory", "failed", "out of memory"),
        ("nan", "failed", "NaN or infinity"),
        ("missing", "unavailable", "not installed"),
    ],
)
def test_every_way_to_fail_has_a_status_and_a_reason(job: Any, behaviour: Any, status: str, reason: str) -> None:
    with Worker(threads=1) as worker, pytest.raises(JobError) as caught:
        worker.run(job(behaviour), timeout=60)
    assert caught.value.status == status
    assert reason in caught.value.reason


def test_an_unexpected_exception_keeps_its_traceback(job: Any) -> None:
    with Worker(threads=1) as worker, pytest.raises(JobError) as caught:
        worker.run(job("raise"), timeout=60)
    assert caught.value.traceback is not None
    assert "fake_hardware.py" in caught.value.traceback


def test_a_hang_is_stopped_at_the_timeout(job: Any) -> None:
    begin = time.monotonic()
    with Worker(threads=1) as worker:
        with pytest.raises(JobError) as caught:
            worker.run(job("hang"), timeout=3)
        assert not worker.alive
    assert caught.value.status == "timeout"
    assert time.monotonic() - begin < 30


def test_a_worker_survives_a_failed_job(job: Any) -> None:
    with Worker(threads=1) as worker:
        with pytest.raises(JobError):
            worker.run(job("raise"), timeout=60)
        assert worker.run(job("ok"), timeout=60)["n_examples"] == 20


def test_a_worker_dies_with_its_killed_parent(tmp_path: Path) -> None:
    program = (
        "import sys, time; from harness.executor import Worker\n"
        "worker = Worker(1); print(worker._process.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    child.wait(timeout=20)
