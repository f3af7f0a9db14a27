from __future__ import annotations

import time
from pathlib import Path

import pytest

from harness import energy
from harness.energy import rapl
from harness.energy.model import CpuTimeModel


def _spin(seconds: float) -> None:
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def test_the_model_is_cpu_seconds_times_watts_and_says_so() -> None:
    meter = CpuTimeModel(watts_per_core=5.0)
    meter.start()
    _spin(0.2)
    time.sleep(0.2)
    (reading,) = meter.stop(inferences=7)
    assert reading.method == "modelled"
    assert reading.inferences == 7
    assert reading.gross_j == pytest.approx(reading.inputs["cpu_s"] * 5.0)
    # Sleeping costs wall time but no CPU time.
    assert 0.2 <= reading.inputs["cpu_s"] < reading.window_s - 0.1


def _counter(root: Path, folder: str, name: str, value: int, wraps_at: int = 1_000_000) -> Path:
    place = root / folder
    place.mkdir(parents=True)
    (place / "name").write_text(name + "\n")
    (place / "energy_uj").write_text(f"{value}\n")
    (place / "max_energy_range_uj").write_text(f"{wraps_at}\n")
    return place / "energy_uj"


def test_rapl_reads_package_and_dram_but_not_their_parts(tmp_path: Path) -> None:
    package = _counter(tmp_path, "intel-rapl:0", "package-0", 100)
    _counter(tmp_path, "intel-rapl:0:0", "core", 50)
    _counter(tmp_path, "intel-rapl-mmio:0", "package-0", 100)
    dram = _counter(tmp_path, "intel-rapl:0:1", "dram", 10)
    domains = rapl.readable_domains(tmp_path)
    assert [domain.name for domain in domains] == ["0 package-0", "0:1 dram"]
    meter = rapl.RaplMeter(domains, idle_s=0.0)
    meter.start()
    package.write_text("2000100\n")
    dram.write_text("500010\n")
    readings = meter.stop(inferences=4)
    assert [reading.gross_j for reading in readings] == pytest.approx([2.0, 0.5])
    assert {reading.method for reading in readings} == {"measured_counter"}


def test_a_counter_that_wraps_still_counts_forward(tmp_path: Path) -> None:
    counter = _counter(tmp_path, "intel-rapl:0", "package-0", 900_000)
    meter = rapl.RaplMeter(rapl.readable_domains(tmp_path), idle_s=0.0)
    meter.start()
    counter.write_text("99999\n")
    (reading,) = meter.stop(inferences=1)
    assert reading.gross_j == pytest.approx(0.2)


def test_reasons_where_there_is_no_counter(tmp_path: Path) -> None:
    assert "no RAPL counters" in str(rapl.unavailable(tmp_path))
    _counter(tmp_path, "intel-rapl:0", "package-0", 1).write_text("not a number")
    assert "not readable" in str(rapl.unavailable(tmp_path))


def test_some_meter_is_always_chosen_and_modelled_is_the_last_resort() -> None:
    meter = energy.choose({"watts_per_core": 6.25})
    assert isinstance(meter, CpuTimeModel if rapl.unavailable() else rapl.RaplMeter)
    assert set(energy.available()) == {"rapl", "nvml", "modelled"}
