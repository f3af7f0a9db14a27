"""Whole-process time of ``assay --help``."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import time

from harness import environment


def main() -> None:
    command = shutil.which("assay")
    if command is None:
        sys.exit("assay is not on PATH: pip install -e . first")
    seconds = []
    for _ in range(11):
        begin = time.perf_counter()
        subprocess.run([command, "--help"], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - begin)
    first, rest = seconds[0], seconds[1:]
    middle = statistics.median(rest)
    print(f"assay --help: first {first:.3f} s, then median {middle:.3f} s of {len(rest)} (goal: <= 0.3 s)")
    print(environment.machine()["cpu_model"], environment.conditions())


if __name__ == "__main__":
    main()
