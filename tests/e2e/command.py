"""Runs the command line as a user does: a process of its own, in a folder of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

SMALL = """
name = "small"
task = "digits-cnn"
method = "baseline"
hardware = {{name = "tests.unit.fake_hardware:Fake", behaviour = "{behaviour}"}}
batch_size = {batches}

[measure]
min_queries = 100
min_seconds = 0.01
warmup_seconds = 0.0
"""


def environment(home: Path, **changes: str) -> dict[str, str]:
    return {**os.environ, "ASSAY_HOME": str(home), "PYTHONPATH": str(ROOT), **changes}


def _interruptible() -> None:
    """Undo what a shell does to background jobs: they ignore Ctrl-C, and so does all that they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(home: Path, *arguments: str, **changes: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "harness", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(home, **changes),
        cwd=home.parent,
        preexec_fn=_interruptible,
    )


def assay(home: Path, *arguments: str, code: int | None = 0, **changes: str) -> tuple[str, str]:
    """Run to the end; returns (stdout, stderr) after checking the exit code and that no traceback is shown."""
    with start(home, *arguments, **changes) as process:
        out, err = process.communicate(timeout=900)
    assert "Traceback" not in err, err
    if code is not None:
        assert process.returncode == code, (process.returncode, out, err)
    return out, err


def rows(home: Path, sql: str) -> list[dict[str, Any]]:
    out, _ = assay(home, "db", "query", sql, "--json")
    found: list[dict[str, Any]] = json.loads(out)
    return found


def spec(folder: Path, behaviour: str = "ok", batches: list[int] | int = 1) -> str:
    path = folder / f"{behaviour}.toml"
    path.write_text(SMALL.format(behaviour=behaviour, batches=batches))
    return str(path)
