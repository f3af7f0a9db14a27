"""Runs jobs in worker processes, so that no crash, hang or memory blow-up of a runtime reaches the sweep.

The parent writes one JSON line per job (:mod:`harness.jobs`) to the worker's standard input; the worker
(:mod:`harness.worker`) answers with JSON lines on a pipe of its own: ``step`` and ``progress`` lines and a last
``result`` or ``error`` line. What libraries print goes to a log file. A worker ends itself when its standard input
closes, so that none outlives a killed parent.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import psutil

from harness.jobs import Job, from_json, to_json
from harness.record import Status
from harness.text import cut, printable

Result = TypeVar("Result")

_ASSAY = str(Path(__file__).parents[1])
_GRACE_S = 5.0
_LOOK_S = 1.0
_TRUST = "ASSAY_TRUSTED_MODULES"
_TAIL_BYTES = 2000
_LINE_SHOWN = 200
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
    passive_wait : bool
        Threads that wait for one another sleep instead of spinning: for training, never for measuring. Training a small
        CNN on two busy cores took 167 s with spinning and 9 s without.
    """

    def __init__(self, threads: int, trusted: Sequence[str] = (), *, passive_wait: bool = False) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed in close()
        answers, child_end = os.pipe()
        environment = {
            **({"OMP_WAIT_POLICY": "PASSIVE"} if passive_wait else {}),
            **os.environ,
            **{name: str(threads) for name in _THREAD_VARIABLES},
            "PYTHONPATH": os.pathsep.join(_search_path()),
            "PYTHONUNBUFFERED": "1",
            _TRUST: ",".join([*trusted, *filter(None, [os.environ.get(_TRUST)])]),
            "ASSAY_ANSWERS_FD": str(child_end),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "harness.worker"],  # -P: nothing of the current folder comes first
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
        self._buffer = bytearray()

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._answers >= 0 and not self._has_ended()

    def run(self, job: Job[Result], *, timeout: float, progress: Callable[[float, str], None] | None = None) -> Result:
        """Run one job and return its result.

        Parameters
        ----------
        job : Job
        timeout : float
            Seconds that each step of the job may take; a job that begins none is one step.
        progress : callable or None
            ``progress(fraction, message)``.

        Raises
        ------
        JobError
            If the job failed, a step of it took too long, or the process died.
        """
        kind = type(job)
        message = {"job": f"{kind.__module__}:{kind.__qualname__}", "value": to_json(job)}
        step, at = job.title, ""
        try:
            self._jobs.write(json.dumps(message).encode() + b"\n")
            self._jobs.flush()
        except BrokenPipeError:
            raise self._death() from None
        deadline = time.monotonic() + timeout
        while True:
            line = self._receive(deadline)
            if line is None:
                self.close()
                where = f' at "{printable(at)}"' if at else ""
                reason = f"{printable(step)} took longer than {timeout:g} s and was stopped{where} (see --timeout)"
                raise JobError("timeout", reason)
            match line["kind"]:
                case "step":
                    step, at, deadline = str(line["name"]), "", time.monotonic() + timeout
                case "progress":
                    at = str(line["message"])
                    if progress:
                        progress(line["fraction"], at)
                case "result":
                    return cast(Result, from_json(job.result, line["result"]))
                case _:
                    raise JobError(line["status"], line["reason"], line["traceback"])

    def _receive(self, deadline: float) -> dict[str, Any] | None:
        """The next line of the worker's, or None where there is none by the deadline."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return None
                # A child of the worker's may hold the pipe open when the worker is dead: the process is looked at too.
                if not selector.select(min(remaining, _LOOK_S)):
                    if self._has_ended() and not selector.select(0):
                        raise self._death()
                    continue
                chunk = os.read(self._answers, 1 << 20)
                if not chunk:
                    raise self._death()
                self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return dict(json.loads(line))

    def _has_ended(self) -> bool:
        """Whether the process has ended; it is not yet waited for, so that its number stays its own."""
        if self._process.returncode is not None:
            return True
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _death(self) -> JobError:
        until = time.monotonic() + _GRACE_S
        while not self._has_ended() and time.monotonic() < until:
            time.sleep(0.01)
        ended = self._has_ended()
        self._kill()
        code = self._process.returncode
        if not ended:
            reason = "the process closed its pipe and did not end"
        elif code < 0:
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
        return " | ".join(cut(printable(line.strip()), _LINE_SHOWN) for line in lines[-3:])

    def _kill(self) -> None:
        """Kill the process and all that it started, then wait for it; its number is free only after that."""
        if self._process.returncode is not None:
            return
        children: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(self._process.pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for child in children:  # those that began a session of their own
            with contextlib.suppress(psutil.Error):
                child.kill()
        self._process.wait()

    def close(self) -> None:
        """Kill the process and everything that it started."""
        if self._answers < 0:
            return
        self._kill()
        with contextlib.suppress(BrokenPipeError):
            self._jobs.close()
        os.close(self._answers)
        self._answers = -1
        self._log.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _search_path() -> list[str]:
    """Where a worker looks for modules: as this process does, but in the user's own folders last.

    Python puts the folder of a script, or the current one, first. A user's ``json.py`` or ``hardware.py`` there must
    not replace Python's or Assay's own; :mod:`harness.usercode` finds it where it is asked for.
    """
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    users = {os.path.realpath(folder) for folder in ([Path(script).parent] if script else [])}
    with contextlib.suppress(OSError):  # a current folder that was deleted
        users.add(os.path.realpath(os.getcwd()))  # noqa: PTH109
    users.discard(os.path.realpath(_ASSAY))
    entries = [entry for entry in sys.path if entry]
    first = [entry for entry in entries if os.path.realpath(entry) not in users]
    last = [entry for entry in entries if os.path.realpath(entry) in users]
    # A folder whose name holds a colon cannot be written down here.
    return [entry for entry in dict.fromkeys([*first, _ASSAY, *last]) if os.pathsep not in entry]


def scratch_folder(parent: Path) -> tempfile.TemporaryDirectory[str]:
    """A temporary folder under ``parent``, so that moving results into place stays on one file system."""
    parent.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(dir=parent, prefix="tmp-")
