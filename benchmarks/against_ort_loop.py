"""Assay's ONNX Runtime p50 against a bare loop: same file, same threads, alternating blocks in random order."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from pathlib import Path

import onnxruntime as ort
from _models import export_resnet20

from harness import environment
from harness.measure.latency import time_queries
from harness.spec import build

BLOCKS, QUERIES = 20, 300


def bare_session(path: Path, example: object) -> tuple[ort.InferenceSession, ort.IOBinding]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input(session.get_inputs()[0].name, example)
    binding.bind_output(session.get_outputs()[0].name)
    return session, binding


def bare_block(session: ort.InferenceSession, binding: ort.IOBinding) -> float:
    samples = []
    for _ in range(QUERIES):
        begin = time.perf_counter_ns()
        session.run_with_iobinding(binding)
        samples.append(time.perf_counter_ns() - begin)
    return statistics.median(samples) / 1e6


def main() -> None:
    hardware = build("hardware", {"name": "onnxruntime"})
    with tempfile.TemporaryDirectory() as folder:
        path, signature, example = export_resnet20(Path(folder), hardware)
        deployed = hardware.load(path, signature=signature, inputs=example, threads=1)
        deployed.bind(example)
        session, binding = bare_session(path, next(iter(example.values())))

        def assay_block() -> float:
            timing = time_queries(deployed, deployed.synchronize, min_queries=QUERIES, min_seconds=0, max_seconds=60)
            return statistics.median(timing.latency_ns["forward"]) / 1e6

        blocks = {"assay": assay_block, "bare loop": lambda: bare_block(session, binding)}
        p50: dict[str, list[float]] = {name: [] for name in blocks}
        for name in blocks:  # warm-up, not kept
            blocks[name]()
        for _ in range(BLOCKS):
            for name in random.sample(list(blocks), 2):
                p50[name].append(blocks[name]())
        deployed.close()
    for name, values in p50.items():
        print(f"{name:10} p50 of blocks: min {min(values):.4f} ms, median {statistics.median(values):.4f} ms")
    ratio = statistics.median(a / b for a, b in zip(p50["assay"], p50["bare loop"], strict=True))
    print(f"ratio assay / bare: of minima {min(p50['assay']) / min(p50['bare loop']):.4f}, median of pairs {ratio:.4f}")
    print(environment.machine()["cpu_model"], environment.conditions())


if __name__ == "__main__":
    main()
