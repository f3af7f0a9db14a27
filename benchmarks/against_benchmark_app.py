"""Assay's OpenVINO p50 against OpenVINO's own ``benchmark_app``: same file, precision, threads and streams.

Blocks alternate in random order, each in a process of its own; ``benchmark_app`` prints its median.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from _models import export_resnet20

from harness import arrays, environment
from harness.contracts import Workload
from harness.executor import Worker
from harness.jobs import Deployment, Item, MeasureJob
from harness.spec import EnergySettings, MeasureSettings, build

BLOCKS, SECONDS = 10, 3
VENDOR = "from openvino.tools.benchmark.main import main; main()"


def vendor_block(path: Path) -> float:
    done = subprocess.run(
        [sys.executable, "-c", VENDOR, "-m", str(path), "-d", "CPU", "-api", "sync",
         "-t", str(SECONDS), "-hint", "none", "-nthreads", "1", "-nstreams", "1", "-infer_precision", "f32",
         "-data_shape", "[1,1,28,28]", "-shape", "[1,1,28,28]"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = re.search(r"Median:\s+([\d.]+) (ms|us)", done.stdout)
    if not found:
        sys.exit(f"benchmark_app printed no median:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return float(found[1]) / (1000 if found[2] == "us" else 1)


def assay_block(job: MeasureJob) -> float:
    with Worker(threads=1) as worker:
        return statistics.median(worker.run(job, timeout=120).latency["forward"]) / 1e6


def main() -> None:
    hardware = {"name": "openvino", "precision": "f32"}
    with tempfile.TemporaryDirectory() as folder:
        path, signature, example = export_resnet20(Path(folder), build("hardware", hardware))
        reference = Path(folder) / "reference"
        reference.mkdir()
        arrays.write(reference, [(example, {})])
        job = MeasureJob(
            hardware=Item.of(hardware),
            threads=1,
            batch_size=1,
            measure=vars(MeasureSettings(min_seconds=float(SECONDS), max_seconds=SECONDS + 10.0)),
            energy=vars(EnergySettings()),
            deployment=Deployment(
                artifact=path, signature=signature, workload=Workload(), reference=reference, reference_data="random",
                test=None, test_sha256=None, eval_batch=1, metrics=(), fidelity=(), quantized=False,
            ),
        )  # fmt: skip
        p50: dict[str, list[float]] = {"assay": [], "benchmark_app": []}
        for _ in range(BLOCKS):
            for name in random.sample(list(p50), 2):
                p50[name].append(assay_block(job) if name == "assay" else vendor_block(path))
    for name, values in p50.items():
        print(f"{name:14} p50 of blocks: min {min(values):.4f} ms, median {statistics.median(values):.4f} ms")
    ratio = min(p50["assay"]) / min(p50["benchmark_app"])
    print(f"ratio assay / benchmark_app of block minima: {ratio:.4f} (goal: 0.95 to 1.05)")
    print(json.dumps({"cpu": environment.machine()["cpu_model"], **environment.conditions()}))


if __name__ == "__main__":
    main()
