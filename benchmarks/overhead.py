"""Overhead of Assay's timing loop: a no-op adapter's samples, and the loop's whole time per query."""

from __future__ import annotations

import statistics

from harness import environment
from harness.measure.latency import time_queries


class NoOp:
    """An adapter that does nothing."""

    def __call__(self, phase: str) -> None:
        pass

    def synchronize(self) -> None:
        pass


def main() -> None:
    deployed = NoOp()
    for block in range(5):
        timing = time_queries(
            deployed, deployed.synchronize, min_queries=200_000, min_seconds=0.1, max_seconds=30, warmup_queries=1000
        )
        inside = statistics.median(timing.latency_ns["forward"]) / 1e3
        whole = timing.wall_s / timing.queries * 1e6
        print(f"block {block}: median sample {inside:.3f} µs, loop {whole:.3f} µs a query (goal: <= 5 µs)")
    print(environment.machine()["cpu_model"], environment.conditions())


if __name__ == "__main__":
    main()
