"""Runs jobs in worker processes, so that no crash, hang or memory blow-up of a runtime reaches the sweep.

The parent writes one JSON line per job to the worker's standard input; the worker (:mod:`harness.worker`) answers
with JSON
lines on a pipe of its own: ``progress`` lines and a last ``result`` or ``error`` line. What libraries print goes to a
log
file. A worker ends itself when its standard input closes, so that none outlives a killed parent.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

from harness.contracts import JSON
from harness.record import Status

_GRACE_S = 5.0
_TRUST = "ASSAY_TRUSTED_MODULES"
_TAIL_BYTES = 2000
# Libraries read these once, when they start; every runtime's own thread setting is given too.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class JobError(Exception):
    """A job that did not end with a result: its status, reason and, where unexpected, traceback."""

    def __init__(self, status: Status, reason: str, traceback: str | None = None) -> None:
        super().__init__(reason)
        self.status: Status = status
        self.reason = reason
        self.traceback = traceback


class Worker:
    """One child process. Use as a context manager; it is killed with all its descendants on leaving.

    Parameters
    ----------
    threads : int
        Upper bound for the thread pools of numeric libraries.
    trusted : sequence of str
        Top-level packages whose classes a stored model may name (see :mod:`harness.modelfile`), beside those that the
        user's own ``ASSAY_TRUSTED_MODULES`` names.
    patient : bool
        Threads that wait for one another sleep instead of spinning: for training, never for measuring. Training a small
        CNN on two busy cores took 167 s with spinning and 9 s without.
    """

    def __init__(self, threads: int, trusted: Sequence[str] = (), *, patient: bool = False) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed in close()
        answers, child_end = os.pipe()
        environment = {
            **({"OMP_WAIT_POLICY": "PASSIVE"} if patient else {}),
            **os.environ,
            **{name: str(threads) for name in _THREAD_VARIABLES},
            "PYTHONPATH": os.pathsep.join(part for part in sys.path if part),
            "PYTHONUNBUFFERED": "1",
            _TRUST: ",".join([*trusted, *filter(None, [os.environ.get(_TRUST)])]),
            "ASSAY_ANSWERS_FD": str(child_end),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "harness.worker"],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            pass_fds=(child_end,),
            env=environment,
            start_new_session=True,  # a Ctrl-C in the terminal is the parent's to handle
        )
        os.close(child_end)
        self._jobs = cast(IO[bytes], self._process.stdin)
        self._answers = answers
        self._buffer = b""

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def run(
        self,
        job: Mapping[str, JSON],
        *,
        timeout: float,
        progress: Callable[[float, str], None] | None = None,
    ) -> dict[str, Any]:
        """Run one job and return its result.

        Raises
        ------
        JobError
            If the job failed, took longer than ``timeout`` seconds, or the process died.
        """
        try:
            self._jobs.write(json.dumps(job).encode() + b"\n")
            self._jobs.flush()
        except BrokenPipeError:
            raise self._death() from None
        deadline = time.monotonic() + timeout
        while True:
            message = self._receive(deadline, timeout)
            if message["kind"] == "progress":
                if progress:
                    progress(message["fraction"], message["message"])
            elif message["kind"] == "result":
                return dict(message["result"])
            else:
                raise JobError(message["status"], message["reason"], message["traceback"])

    def _receive(self, deadline: float, timeout: float) -> dict[str, Any]:
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    self.close()
                    raise JobError("timeout", f"took longer than {timeout:g} s and was stopped (see --timeout)")
                # In parts: the system refuses to wait for weeks at once.
                if not selector.select(min(remaining, 3600.0)):
                    continue
                chunk = os.read(self._answers, 1 << 20)
                if not chunk:
                    raise self._death()
                self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return dict(json.loads(line))

    def _death(self) -> JobError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_S)
        code = self._process.poll()
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            reason = f"the process was killed by {name}"
            if name == "SIGKILL":
                reason += " (Linux does this when memory runs out)"
        else:
            reason = f"the process ended without a result (exit code {code})"
        if tail := self._tail():
            reason += f"; last output: {tail}"
        return JobError("failed", reason)

    def _tail(self) -> str:
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - _TAIL_BYTES))
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return " | ".join(lines[-3:])

    def close(self) -> None:
        """Kill the process and everything that it started."""
        with contextlib.suppress(BrokenPipeError):
            self._jobs.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._answers >= 0:
            os.close(self._answers)
            self._answers = -1
        self._log.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        if self._answers >= 0:
            self.close()


def scratch_folder(parent: Path) -> tempfile.TemporaryDirectory[str]:
    """A temporary folder under ``parent``, so that moving results into place stays on one file system."""
    parent.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(dir=parent, prefix="tmp-")
